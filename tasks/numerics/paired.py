"""Two edits on the same prompts: what differs, how surely, and what that makes of a comparison.

Every prompt is its own control, so all tests here are paired. Smaller is better throughout. All
randomness is seeded: the same values in the same order give the same answer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tasks.numerics.differences import Samples, rate_difference
from tasks.numerics.intervals import Interval

Values = NDArray[np.float64]

BETTER, TIED, WORSE = "better", "tied", "worse"
LEVEL = 0.95
_NONE = np.zeros(0)
_ROUNDING = 1e-12  # of a standard error, against what it is the error of


@dataclass(frozen=True)
class PairedTable:
    """How many prompts were refused under both edits, one of them, or neither."""

    both: int
    only_a: int
    only_b: int
    neither: int

    @property
    def n(self) -> int:
        return self.both + self.only_a + self.only_b + self.neither


def paired_table(a: Values, b: Values) -> PairedTable:
    """The 2x2 table of two lists [prompts] of 0 and 1, in one order of prompts.

    Raises:
        ValueError: the lists differ in length, or hold another value.
    """
    _same_length(a, b)
    if not np.isin(np.concatenate([a, b]), (0.0, 1.0)).all():
        raise ValueError("a rate needs values of 0 or 1")
    both, only_a, only_b = (int(part.sum()) for part in (a * b, a * (1 - b), (1 - a) * b))
    return PairedTable(both, only_a, only_b, a.size - both - only_a - only_b)


def mcnemar(table: PairedTable) -> float:
    """Two-sided exact McNemar p: of the prompts that changed, were half gained and half lost?

    1 where no prompt changed. Conditional on the prompts that changed, hence never too small; with
    few of them well above its nominal level (5 changes can never give p below 0.0625).

    Source: McNemar 1947; statsmodels.
    """
    from statsmodels.stats.contingency_tables import mcnemar as exact

    cells = [[table.both, table.only_a], [table.only_b, table.neither]]
    return float(exact(cells, exact=True).pvalue)


def permutation(a: Values, b: Values, *, seed: int = 0, resamples: int = 9999) -> float:
    """Two-sided p of a difference of means when, of each pair, either value could be either's.

    All 2^m exchanges of the m pairs that differ where they are no more than `resamples`, else as
    many seeded draws, with the observed one among them: so p is never 0 (Phipson and Smyth 2010).
    For values of 0 and 1 the exact form is McNemar's test. 1 where no pair differs.

    Raises:
        ValueError: lists of different lengths, or a value that is not finite.

    Source: Fisher 1935; scipy.stats.permutation_test.
    """
    _same_length(a, b)
    differences = a - b
    if not np.isfinite(differences).all():
        raise ValueError("a difference needs finite values")
    moved = differences[differences != 0]  # an exchange of equal values changes nothing
    if moved.size < 2:  # none, or one that is as far from zero either way
        return 1.0
    from scipy.stats import permutation_test

    found = permutation_test(
        (moved,),
        lambda x, axis: np.abs(np.mean(x, axis=axis)),
        permutation_type="samples",
        alternative="greater",  # of the distance from zero, so both tails count
        n_resamples=resamples,
        vectorized=True,
        rng=np.random.default_rng(seed),
    )
    return min(1.0, float(found.pvalue))


def rate_interval(a: Values, b: Values, level: float = LEVEL) -> Interval:
    """Interval of rate a minus rate b, as fractions -1 to 1: Newcombe's method 10 for pairs."""
    _same_length(a, b)
    return rate_difference(Samples(_NONE, b, a, _NONE), level)


def mean_interval(
    a: Values, b: Values, level: float = LEVEL, seed: int = 0, resamples: int = 2000
) -> Interval:
    """Interval of mean a minus mean b, in their unit: symmetric bootstrap t over pairs.

    The distance of a resampled mean from the mean, in its own standard errors and whichever way, is
    what the true mean may be away. KLs have long tails, for which plain percentiles are too narrow
    at these numbers of prompts; docs/statistics.md has the coverage of six intervals. Under about
    30 prompts this one is too narrow as well. Pairs that all differ alike, one pair among them,
    give one of no width; the permutation test is what keeps so few pairs from a win.

    Raises:
        ValueError: lists of different lengths, a value that is not finite, or level not in (0, 1).

    Source: Hall 1988; Efron and Tibshirani 1993, section 12.5.
    """
    _same_length(a, b)
    if not 0 < level < 1:
        raise ValueError(f"the level is between 0 and 1, got {level}")
    d = a - b
    if not np.isfinite(d).all():
        raise ValueError("a difference needs finite values")
    mean, error = float(d.mean()), float(d.std()) / math.sqrt(d.size)
    if error <= _ROUNDING * float(np.abs(d).max()):
        return mean, mean
    drawn = d[np.random.default_rng(seed).integers(d.size, size=(resamples, d.size))]
    off, errors = drawn.mean(axis=1) - mean, drawn.std(axis=1) / math.sqrt(d.size)
    least = _ROUNDING * error  # a resample of one value says that a mean may lie anywhere
    reach = error * float(np.quantile(np.abs(off) / np.maximum(errors, least), level))
    return mean - reach, mean + reach


def holm(p: Sequence[float]) -> list[float]:
    """Holm's adjusted p values of one family, in the order given; none of an empty family.

    Raises:
        ValueError: a p value is not in 0..1.

    Source: Holm 1979; statsmodels.
    """
    if not all(0 <= value <= 1 for value in p):  # NaN is neither
        raise ValueError(f"p values lie between 0 and 1, got {list(p)}")
    if not p:
        return []
    from statsmodels.stats.multitest import multipletests

    return [float(value) for value in multipletests(p, method="holm")[1]]


def verdict(
    difference: float,
    interval: Interval,
    adjusted: float,
    *,
    level: float = LEVEL,
    resolution: float = 0.0,
) -> str:
    """Whether a is better, tied or worse, from a minus b of a metric of which less is better.

    A win needs three things: an interval without zero, an adjusted p of at most 1 - level, and a
    difference beyond `resolution`, the least that anybody would show.
    """
    low, high = interval
    excludes_zero = low > 0 or high < 0
    if not (excludes_zero and adjusted <= 1 - level + 1e-12 and abs(difference) > resolution):
        return TIED
    return BETTER if difference < 0 else WORSE


def decide(verdicts: Sequence[str], gated: tuple[bool, bool]) -> tuple[str, int | None]:
    """The verdict of the strict order, and which metric gave it.

    Args:
        verdicts: per metric, in the order of the ranking.
        gated: whether a and b failed a gate.

    Returns:
        The first verdict that is not a tie, and its index; None: a gate decided, or nothing did.
    """
    if gated[0] != gated[1]:
        return (WORSE if gated[0] else BETTER), None
    for number, found in enumerate(verdicts):
        if found != TIED:
            return found, number
    return TIED, None


def spread_of_pairs(a: Values, b: Values) -> tuple[float, float]:
    """Standard deviations of the differences and, pooled, of the values; NaN for a single pair."""
    _same_length(a, b)
    if a.size < 2:
        return math.nan, math.nan
    return float((a - b).std(ddof=1)), math.sqrt((a.var(ddof=1) + b.var(ddof=1)) / 2)


def _same_length(a: Values, b: Values) -> None:
    if a.ndim != 1 or a.shape != b.shape or not a.size:
        raise ValueError(f"pairs need two lists of one length, got {a.shape} and {b.shape}")
