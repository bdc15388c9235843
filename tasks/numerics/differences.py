"""Intervals for a difference between two measurements that may share some of their prompts.

A second measurement meets the same prompts, others, or some of each. The prompts that both met are
paired, the rest are independent; one estimator covers all three cases, and with no or all prompts
shared it is the published one.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tasks.numerics.intervals import Interval, wilson

Values = NDArray[np.float64]


@dataclass(frozen=True)
class Samples:
    """One value per prompt, before and after.

    Attributes:
        gone: [prompts met only before].
        before, after: [prompts met twice], in one order.
        new: [prompts met only after].
    """

    gone: Values
    before: Values
    after: Values
    new: Values

    @property
    def n_before(self) -> int:
        return self.gone.size + self.before.size

    @property
    def n_after(self) -> int:
        return self.after.size + self.new.size

    @property
    def means(self) -> tuple[float, float]:
        """Means over all prompts before, and over all prompts after."""
        return (
            math.fsum([*self.gone, *self.before]) / self.n_before,
            math.fsum([*self.after, *self.new]) / self.n_after,
        )

    @property
    def same(self) -> bool:
        """Whether both measurements met the same prompts and gave the same values, to the bit."""
        return not self.gone.size and not self.new.size and np.array_equal(self.before, self.after)


def match(before: Mapping[Hashable, float], after: Mapping[Hashable, float]) -> Samples:
    """Pair two measurements by prompt. The order of neither counts.

    Raises:
        ValueError: one of them is empty.
    """
    if not before or not after:
        raise ValueError(f"a difference needs values, got {len(before)} and {len(after)}")
    shared = sorted(before.keys() & after.keys(), key=repr)

    def values(of: Mapping[Hashable, float], names: list[Hashable]) -> Values:
        return np.array([of[name] for name in names], dtype=np.float64)

    return Samples(
        gone=values(before, sorted(before.keys() - after.keys(), key=repr)),
        before=values(before, shared),
        after=values(after, shared),
        new=values(after, sorted(after.keys() - before.keys(), key=repr)),
    )


def rate_difference(samples: Samples, level: float = 0.95) -> Interval:
    """Interval of the rate after minus the rate before, as fractions -1 to 1.

    Wilson's intervals of both rates, combined by the squares of their distances from the rates
    (MOVER) with the correlation of the two estimates. All prompts shared: Newcombe's method 10 for
    paired proportions, his correction of phi included, so that no disagreement among n prompts is
    no proof of none. No prompt shared: his method 10 for independent proportions. Between them the
    correlation shrinks by n_shared / sqrt(n_before * n_after), the share of the covariance that
    shared prompts can have.

    Args:
        samples: values 0 or 1.

    Raises:
        ValueError: a value is neither 0 nor 1, or level not in (0, 1).

    Source: Newcombe 1998, Statistics in Medicine 17:873-890 and 17:2635-2650; Zou and Donner 2008,
    Statistics in Medicine 27:1693-1702; Derrick et al. 2015 (partly overlapping samples).
    """
    values = np.concatenate([samples.gone, samples.before, samples.after, samples.new])
    if not np.isin(values, (0.0, 1.0)).all():
        raise ValueError("a rate needs values of 0 or 1")
    first, second = samples.means
    low_1, high_1 = wilson(round(first * samples.n_before), samples.n_before, level)
    low_2, high_2 = wilson(round(second * samples.n_after), samples.n_after, level)
    share = samples.before.size / math.sqrt(samples.n_before * samples.n_after)
    correlation = share * _corrected_phi(samples.before, samples.after)
    return (
        max(-1.0, second - first - _combined(second - low_2, high_1 - first, correlation)),
        min(1.0, second - first + _combined(high_2 - second, first - low_1, correlation)),
    )


def _combined(one: float, other: float, correlation: float) -> float:
    """Length of the difference of two vectors of these lengths and this cosine."""
    return math.sqrt(max(0.0, one * one - 2 * correlation * one * other + other * other))


def _corrected_phi(before: Values, after: Values) -> float:
    """Phi of the pairs; a positive one is moved towards 0 by n/2 in its numerator (Newcombe)."""
    n = before.size
    both, first, second = (float((before * after).sum()), float(before.sum()), float(after.sum()))
    margins = first * (n - first) * second * (n - second)
    if margins == 0:
        return 0.0
    cross = both * n - first * second  # ad - bc
    return (max(cross - n / 2, 0.0) if cross > 0 else cross) / math.sqrt(margins)


def mean_difference(
    samples: Samples, level: float = 0.95, seed: int = 0, resamples: int = 2000
) -> Interval:
    """Percentile bootstrap interval of the mean after minus the mean before, in their unit.

    Prompts are drawn within three strata: met only before, twice (a pair is drawn whole), only
    after. Those met once vary as all prompts of their time do: a stratum of one prompt would show
    no spread, and replacing one prompt would prove a difference. The same values and seed give the
    same interval. Few prompts (under about 20) give too narrow an interval, as any percentile
    bootstrap does; pairs that all differ alike, a single pair among them, give one of no width, so
    a caller needs a least number of prompts (tasks/drift.py).

    Raises:
        ValueError: a value is not finite, or level not in (0, 1).

    Source: Efron and Tibshirani 1993, chapters 8 and 13.
    """
    if not 0 < level < 1:
        raise ValueError(f"the level is between 0 and 1, got {level}")
    parts = (samples.gone, samples.before, samples.after, samples.new)
    if not all(np.isfinite(part).all() for part in parts):
        raise ValueError("a mean needs finite values")
    generator = np.random.default_rng(seed)

    def drawn_sum(values: Values, among: Values) -> Values:
        if not values.size:
            return np.zeros(resamples)
        spread = among - among.mean()
        chosen = generator.integers(spread.size, size=(resamples, values.size))
        return np.asarray(values.sum() + spread[chosen].sum(axis=1), dtype=np.float64)

    changes = samples.after / samples.n_after - samples.before / samples.n_before
    paired = drawn_sum(changes, changes)
    gone = drawn_sum(samples.gone, np.concatenate([samples.gone, samples.before]))
    new = drawn_sum(samples.new, np.concatenate([samples.after, samples.new]))
    drawn = paired + new / samples.n_after - gone / samples.n_before
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
