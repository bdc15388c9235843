"""Is a chosen group better than random ones of its size? Refusal rates with paired intervals."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tasks.numerics.intervals import Interval
from tasks.numerics.subspaces import percentile_interval

Flags = NDArray[np.bool_]


class Contrast(NamedTuple):
    """A mean with its interval, in fractions."""

    value: float
    low: float
    high: float


class Comparison(NamedTuple):
    """Refusal rates of a chosen group against the intact model and against random groups.

    Attributes:
        change: chosen - intact.
        random: mean over random groups.
        beyond: chosen - random.
        as_low: (1 + random groups refusing as little) / (1 + random groups), a p value.
    """

    change: Contrast
    random: Contrast
    beyond: Contrast
    as_low: float


def compare_rates(
    chosen: Flags, intact: Flags, random: Flags, *, resamples: int, seed: int, level: float = 0.95
) -> Comparison:
    """Percentile bootstrap: prompts are resampled in pairs, and random groups independently.

    Args:
        chosen, intact: [prompts], whether each was refused.
        random: [draws, prompts], the same under each random group.

    Raises:
        ValueError: no prompts, no random groups, or shapes that differ.
    """
    if chosen.ndim != 1 or not chosen.size or chosen.shape != intact.shape:
        raise ValueError(f"rates of {chosen.shape} and {intact.shape} prompts cannot be compared")
    if random.ndim != 2 or not len(random) or random.shape[1] != chosen.size:
        raise ValueError(f"random groups of shape {random.shape} do not fit {chosen.size} prompts")
    generator = np.random.default_rng(seed)
    draws, n = random.shape
    prompts = generator.multinomial(n, np.full(n, 1 / n), size=resamples) / n
    groups = generator.multinomial(draws, np.full(draws, 1 / draws), size=resamples) / draws
    of_chosen, of_intact = prompts @ chosen.astype(float), prompts @ intact.astype(float)
    of_random = ((groups @ random.astype(float)) * prompts).sum(1)

    def contrast(value: float, resampled: NDArray[np.float64]) -> Contrast:
        low, high = percentile_interval(resampled, level)
        return Contrast(float(value), float(low), float(high))

    rate = chosen.mean()
    as_low = (1 + int((random.mean(1) <= rate).sum())) / (1 + draws)
    return Comparison(
        contrast(rate - intact.mean(), of_chosen - of_intact),
        contrast(random.mean(), of_random),
        contrast(rate - random.mean(), of_chosen - of_random),
        as_low,
    )


def bootstrap_spearman(
    a: NDArray[np.float64], b: NDArray[np.float64], *, resamples: int, seed: int
) -> tuple[float, Interval]:
    """Spearman's rank correlation and its 95 % percentile interval over resampled pairs.

    NaN where one side is constant.
    """
    from scipy.stats import rankdata

    drawn = np.random.default_rng(seed).integers(len(a), size=(resamples, len(a)))
    drawn[0] = np.arange(len(a))
    ranks = [rankdata(side[drawn], axis=1) for side in (a, b)]
    centred = [r - r.mean(1, keepdims=True) for r in ranks]
    spread = np.sqrt((centred[0] ** 2).sum(1) * (centred[1] ** 2).sum(1))
    with np.errstate(invalid="ignore", divide="ignore"):
        found = (centred[0] * centred[1]).sum(1) / spread
    resampled = found[1:][np.isfinite(found[1:])]
    if not resampled.size or not np.isfinite(found[0]):
        return float("nan"), (float("nan"), float("nan"))
    low, high = percentile_interval(resampled)
    return float(found[0]), (float(low), float(high))
