"""Does a score tell wrong answers from right ones, and what is gained by leaving answers out?

A score is higher where an answer is more likely wrong. Answers with equal scores are accepted or
left out together. Intervals are percentile bootstraps over groups of answers (questions of one
theory share a group), made from one table of weights for all scores, so that two scores can be
compared in pairs; everything is vectorised over resamples.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
_BLOCK = 1 << 22  # weights at a time: 32 MiB


@dataclass(frozen=True)
class Curve:
    """Risk against coverage, one point per threshold, the surest answers first.

    Attributes:
        thresholds: answers with a score of at most this are accepted.
        accepted: how many they are.
        wrong: how many of those are wrong.
    """

    thresholds: Floats
    accepted: NDArray[np.int64]
    wrong: NDArray[np.int64]

    @property
    def coverage(self) -> Floats:
        """Fraction of answers that are accepted, 0-1."""
        return np.asarray(self.accepted / self.accepted[-1], dtype=np.float64)

    @property
    def risk(self) -> Floats:
        """Fraction of accepted answers that are wrong, 0-1."""
        return np.asarray(self.wrong / self.accepted, dtype=np.float64)


def auroc(scores: ArrayLike, wrong: ArrayLike, strata: ArrayLike | None = None) -> float:
    """Probability that a wrong answer scores higher than a right one, ties counted half.

    Args:
        scores: [answers], finite.
        wrong: [answers], whether an answer is wrong.
        strata: [answers]; only pairs inside a stratum count (all answers are one if None). This
            shows what is left of a score that only tells kinds of questions apart.

    Returns:
        0-1; NaN where there is no pair.

    Raises:
        ValueError: shapes differ, there is no answer, or a score is not finite.

    Source: Hanley and McNeil 1982; pooling the pairs of all strata is ours.
    """
    return float(auroc_resampled(scores, wrong, _once(scores), strata)[0])


def auroc_resampled(
    scores: ArrayLike, wrong: ArrayLike, weights: Floats, strata: ArrayLike | None = None
) -> Floats:
    """The same for every row of weights [resamples, answers]: [resamples]."""
    values, bad = _checked(scores, wrong)
    kinds = np.zeros(len(values)) if strata is None else np.asarray(strata)
    wins = pairs = np.zeros(len(weights))
    for kind in np.unique(kinds):
        inside = np.flatnonzero(kinds == kind)
        won, met = _in_blocks(_wins, values[inside], bad[inside], weights[:, inside])
        wins, pairs = wins + won, pairs + met
    return _ratio(wins, pairs)


def aurc(scores: ArrayLike, wrong: ArrayLike) -> float:
    """Area under the risk-coverage curve, 0-1; smaller is better.

    The risk of each accepted set, weighted by the coverage that its last answers add: without ties
    the mean of the risks at coverage 1/n, 2/n, ..., 1. A score that knows nothing has the error
    rate.

    Raises:
        ValueError: as `auroc`.

    Source: Geifman and El-Yaniv 2017 (curve), Geifman, Uziel and El-Yaniv 2019 (area).
    """
    return float(aurc_resampled(scores, wrong, _once(scores))[0])


def aurc_resampled(scores: ArrayLike, wrong: ArrayLike, weights: Floats) -> Floats:
    """The same for every row of weights [resamples, answers]: [resamples]."""
    values, bad = _checked(scores, wrong)
    area, total = _in_blocks(_areas, values, bad, weights)
    return _ratio(area, total)


def risk_coverage(scores: ArrayLike, wrong: ArrayLike) -> Curve:
    """The risk-coverage curve; equal scores make one point.

    Raises:
        ValueError: as `auroc`.
    """
    values, bad = _checked(scores, wrong)
    order, starts = _tied(values)
    ends = np.append(starts[1:], len(values))
    return Curve(values[order][starts], ends, np.cumsum(bad[order])[ends - 1])


def resample(groups: ArrayLike, resamples: int, seed: int) -> Floats:
    """How often each answer is in each bootstrap resample, [resamples, answers].

    Groups are drawn as often as there are groups, with replacement, each with all its answers.

    Raises:
        ValueError: there is no answer.

    Source: Efron 1979; whole groups: Davison and Hinkley 1997, section 3.8.
    """
    names, member = np.unique(np.asarray(groups), return_inverse=True)
    if not len(names):
        raise ValueError("no answers to resample")
    even = np.full(len(names), 1 / len(names))
    drawn = np.random.default_rng(seed).multinomial(len(names), even, size=resamples)
    return drawn[:, member].astype(np.float64)


def percentiles(values: Floats, level: float = 0.95) -> tuple[float, float]:
    """The percentile interval of resampled values, NaN left out; (NaN, NaN) if nothing is left."""
    finite = values[np.isfinite(values)]
    if not len(finite):
        return math.nan, math.nan
    low, high = np.quantile(finite, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def youden(scores: ArrayLike, wrong: ArrayLike) -> float:
    """The cut with the largest J = (wrong at or above it) - (right at or above it), as fractions.

    Half way between two neighbouring scores, or NaN where all answers are right, all are wrong, or
    all scores are equal. The lowest of equally good cuts.

    Raises:
        ValueError: as `auroc`.

    Source: Youden 1950.
    """
    values, bad = _checked(scores, wrong)
    levels = np.unique(values)
    if len(levels) < 2 or bad.all() or not bad.any():
        return math.nan
    cuts = (levels[:-1] + levels[1:]) / 2
    gain = _share_above(values[bad], cuts) - _share_above(values[~bad], cuts)
    return float(cuts[int(np.argmax(gain))])


def _share_above(values: Floats, cuts: Floats) -> Floats:
    return np.asarray(1 - np.searchsorted(np.sort(values), cuts) / len(values), dtype=np.float64)


def lowest_wrong(scores: ArrayLike, wrong: ArrayLike) -> int | None:
    """Which wrong answer has the lowest score (the first of several); None if all are right.

    Raises:
        ValueError: as `auroc`.
    """
    values, bad = _checked(scores, wrong)
    return int(np.argmin(np.where(bad, values, np.inf))) if bad.any() else None


def combine(
    known: Floats, wrong: ArrayLike, new: Floats, *, folds: int = 5, seed: int = 0
) -> tuple[Floats, Floats] | None:
    """Several scores as one: the probability of being wrong by a logistic regression.

    Scores are standardised and the regression is scikit-learn's with its usual penalty (C = 1).

    Args:
        known: [answers, scores] of the calibration split.
        wrong: [answers] of the calibration split.
        new: [other answers, scores], never used for fitting.
        folds: of the calibration split; fewer where a class has fewer members.

    Returns:
        Probabilities of the calibration answers, each from a fit on the other folds, and of the
        new answers from a fit on the whole calibration split; None where a class has fewer than
        two members.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    bad = np.asarray(wrong, dtype=bool)
    fewest = int(min(bad.sum(), (~bad).sum()))
    if fewest < 2:
        return None
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    splits = StratifiedKFold(min(folds, fewest), shuffle=True, random_state=seed)
    held_out = cross_val_predict(model, known, bad, cv=splits, method="predict_proba")[:, 1]
    fitted: Any = model.fit(known, bad)
    return np.asarray(held_out), np.asarray(fitted.predict_proba(new)[:, 1])


def _once(scores: ArrayLike) -> Floats:
    return np.ones((1, np.size(np.asarray(scores))))


def _checked(scores: ArrayLike, wrong: ArrayLike) -> tuple[Floats, Bools]:
    values, bad = np.asarray(scores, dtype=np.float64), np.asarray(wrong, dtype=bool)
    if values.ndim != 1 or values.shape != bad.shape:
        raise ValueError(f"scores and labels have shapes {values.shape} and {bad.shape}")
    if not len(values):
        raise ValueError("no answers to score")
    if not np.isfinite(values).all():
        raise ValueError(f"score {int(np.flatnonzero(~np.isfinite(values))[0])} is not finite")
    return values, bad


def _tied(values: Floats) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Order by score, and where in that order each new value begins."""
    order = np.argsort(values, kind="stable")
    ranked = values[order]
    return order, np.flatnonzero(np.append(True, ranked[1:] != ranked[:-1]))


def _in_blocks(measure: Any, values: Floats, bad: Bools, weights: Floats) -> tuple[Floats, Floats]:
    """Both results of `measure` for all resamples, some at a time."""
    order, starts = _tied(values)
    rows = max(1, _BLOCK // len(values))
    parts = []
    for first in range(0, len(weights), rows):
        ranked = weights[first : first + rows][:, order]
        lost = np.add.reduceat(ranked * bad[order], starts, axis=1)
        kept = np.add.reduceat(ranked * ~bad[order], starts, axis=1)
        parts.append(measure(lost, kept))
    first_part, second_part = zip(*parts, strict=True)
    return np.concatenate(first_part), np.concatenate(second_part)


def _wins(lost: Floats, kept: Floats) -> tuple[Floats, Floats]:
    """Pairs won by wrong answers, and all pairs; from weights per distinct score."""
    below = np.cumsum(kept, axis=1) - kept / 2
    return (lost * below).sum(axis=1), lost.sum(axis=1) * kept.sum(axis=1)


def _areas(lost: Floats, kept: Floats) -> tuple[Floats, Floats]:
    """Sum of risks weighted by the answers that each threshold adds, and all answers."""
    added = lost + kept
    accepted = np.cumsum(added, axis=1)
    risk = _ratio(np.cumsum(lost, axis=1), accepted, empty=0.0)
    return (added * risk).sum(axis=1), accepted[:, -1]


def _ratio(over: Floats, under: Floats, empty: float = math.nan) -> Floats:
    return np.divide(over, under, out=np.full_like(under, empty), where=under > 0)
