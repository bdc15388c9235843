"""How far two labellers agree beyond chance: Cohen's kappa, with an interval over prompts.

Raw agreement flatters two labellers that both say "complied" to nearly everything; kappa is 0 for
what their own rates give by chance and 1 for full agreement. Responses to one prompt resemble each
other, so the interval resamples prompts with all their responses, never single responses.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tasks.numerics.intervals import Interval, clopper_pearson

Counts = NDArray[np.int64]
DEFINED = 0.95  # of the resamples must have a kappa, else there is no interval


@dataclass(frozen=True)
class Agreement:
    """Two labellers on the same responses.

    Attributes:
        responses, prompts: how many both labelled.
        both, only_a, only_b, neither: how many of the responses are refusals, by whom.
        kappa: Cohen's, -1 to 1; NaN where both say one and the same of everything.
        low, high: its 95 % interval; NaN where there is none.
    """

    responses: int
    prompts: int
    both: int
    only_a: int
    only_b: int
    neither: int
    kappa: float
    low: float
    high: float

    @property
    def rate(self) -> float:
        """Fraction of responses with equal labels, 0-1; NaN without responses."""
        return (self.both + self.neither) / self.responses if self.responses else math.nan


def cohen_kappa(tables: NDArray[np.generic]) -> NDArray[np.float64]:
    """Cohen's kappa of tables [..., 4]: counts of both, only a, only b, neither; [...].

    (observed - expected agreement) / (1 - expected). NaN for an empty table, and where both
    labellers use one and the same label throughout: chance alone then agrees always.

    Source: Cohen 1960, Educational and Psychological Measurement 20:37-46.
    """
    both, only_a, only_b, neither = np.moveaxis(np.asarray(tables, dtype=np.float64), -1, 0)
    total = both + only_a + only_b + neither
    # Multiplied by total squared, so that counts stay whole numbers and 1 is exactly 1.
    observed = (both + neither) * total
    expected = (both + only_a) * (both + only_b) + (neither + only_a) * (neither + only_b)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray((observed - expected) / (total * total - expected), dtype=np.float64)


def agreement(
    a: NDArray[np.bool_],
    b: NDArray[np.bool_],
    prompts: NDArray[np.generic],
    *,
    seed: int = 0,
    resamples: int = 2000,
    level: float = 0.95,
) -> Agreement:
    """Kappa of two labellers with its interval.

    The interval is the percentile bootstrap over prompts. Where the labellers agree on every
    response, no resample shows a disagreement; the lower end then follows from the exact lower
    bound of the rate of prompts without disagreement, at the observed chance agreement, so that 8
    prompts of 8 are no proof of 1. There is no interval where more than 5 % of the resamples have
    no kappa, as with a label that hardly occurs, or with one prompt.

    Args:
        a, b: [responses], whether each labeller calls it a refusal.
        prompts: [responses], which prompt each answers; any values that can be sorted.

    Raises:
        ValueError: the shapes differ, or level not in (0, 1).

    Source: Cohen 1960; Efron and Tibshirani 1993, chapter 13.
    """
    if a.ndim != 1 or a.shape != b.shape or a.shape != prompts.shape:
        raise ValueError(f"labels of {a.shape} and {b.shape} for responses of {prompts.shape}")
    if not 0 < level < 1:
        raise ValueError(f"the level is between 0 and 1, got {level}")
    names, which = np.unique(prompts, return_inverse=True)
    cells = np.stack([a & b, a & ~b, ~a & b, ~a & ~b], axis=1)
    tables: Counts = np.zeros((names.size, 4), dtype=np.int64)
    np.add.at(tables, which, cells.astype(np.int64))
    whole = tables.sum(axis=0)
    kappa = float(cohen_kappa(whole)) if a.size else math.nan
    low, high = _interval(tables, kappa, seed, resamples, level)
    both, only_a, only_b, neither = map(int, whole)
    return Agreement(a.size, names.size, both, only_a, only_b, neither, kappa, low, high)


def _interval(tables: Counts, kappa: float, seed: int, resamples: int, level: float) -> Interval:
    """Interval of kappa from the tables [prompts, 4]."""
    n = len(tables)
    if math.isnan(kappa) or n < 2:
        return math.nan, math.nan
    if not tables[:, 1:3].any():
        return _low_of_full_agreement(tables, level), 1.0
    drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples)
    found = cohen_kappa(drawn @ tables)
    defined = found[np.isfinite(found)]
    if defined.size < DEFINED * resamples:
        return math.nan, math.nan
    low, high = np.quantile(defined, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _low_of_full_agreement(tables: Counts, level: float) -> float:
    """Kappa at the smallest rate of agreement that n agreeing prompts of n leave possible."""
    rate, _ = clopper_pearson(len(tables), len(tables), level)
    total = int(tables.sum())
    refused = int(tables[:, 0].sum()) / total
    expected = refused**2 + (1 - refused) ** 2
    return max(-1.0, (rate - expected) / (1 - expected))
