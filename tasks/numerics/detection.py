"""How well a score tells two classes apart, with intervals over prompts.

Metrics are those of scikit-learn. Intervals are percentile bootstraps over prompts, drawn within
each class, so that the share of each class is the same in every resample; all resamples are matrix
products, because a figure needs thousands of them per layer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
SENSITIVITY = 0.95


@dataclass(frozen=True)
class Metric:
    """A number and its interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Classifier:
    """Logistic regression on standardised features: probability of the positive class."""

    mean: Floats
    scale: Floats
    weights: Floats
    intercept: float

    def probability(self, features: Floats) -> Floats:
        """Of each row [rows, features], 0-1."""
        scores = (features - self.mean) / self.scale @ self.weights + self.intercept
        found: Floats = 1 / (1 + np.exp(-np.clip(scores, -500, 500)))
        return found


def fit_classifier(features: Floats, positive: NDArray[np.bool_]) -> Classifier:
    """Fit scikit-learn's logistic regression (L2, C = 1), classes weighted equally.

    Raises:
        ValueError: features that are not finite, or only one class.
    """
    if not np.isfinite(features).all():
        raise ValueError("features are not finite")
    if positive.all() or not positive.any():
        raise ValueError("a classifier needs both classes")
    from sklearn.linear_model import LogisticRegression

    mean, spread = features.mean(axis=0), features.std(axis=0)
    scale = np.where(spread > 0, spread, 1.0)
    model = LogisticRegression(class_weight="balanced", max_iter=1000)
    model.fit((features - mean) / scale, positive)
    return Classifier(mean, scale, model.coef_[0].astype(np.float64), float(model.intercept_[0]))


def metrics(
    positive: Floats,
    negative: Floats,
    *,
    threshold: float = 0.5,
    level: float = 0.95,
    seed: int = 0,
    resamples: int = 2000,
) -> dict[str, Metric]:
    """AUROC, F1 and the false-positive rate at 95 % true positives.

    - "auroc": probability that a positive scores above a negative, ties half.
    - "f1": of calling positive what scores at least `threshold`.
    - "fpr_at_95_tpr": share of negatives at or above the highest threshold that still reaches
      95 % of the positives.

    Args:
        positive: scores of the positive class.
        negative: of the other.

    Raises:
        ValueError: a class without scores, or a score that is not finite.
    """
    for name, scores in (("positive", positive), ("negative", negative)):
        if not scores.size or not np.isfinite(scores).all():
            raise ValueError(f"{name} scores must be finite numbers, and at least one")
    generator = np.random.default_rng(seed)
    every = [np.ones((1, each.size)) for each in (positive, negative)]
    drawn = [
        generator.multinomial(n, np.full(n, 1 / n), size=resamples).astype(np.float64)
        for n in (positive.size, negative.size)
    ]
    ends = [(1 - level) / 2, (1 + level) / 2]
    found = {}
    for name, metric in (("auroc", _auroc), ("f1", _f1), ("fpr_at_95_tpr", _fpr)):
        value = float(metric(positive, negative, every[0], every[1], threshold)[0])
        low, high = np.quantile(metric(positive, negative, drawn[0], drawn[1], threshold), ends)
        found[name] = Metric(value, float(low), float(high))
    return found


def _auroc(pos: Floats, neg: Floats, of_pos: Floats, of_neg: Floats, threshold: float) -> Floats:
    above = (pos[:, None] > neg) + 0.5 * (pos[:, None] == neg)
    pairs: Floats = ((of_pos @ above) * of_neg).sum(axis=1)
    return pairs / (pos.size * neg.size)


def _f1(pos: Floats, neg: Floats, of_pos: Floats, of_neg: Floats, threshold: float) -> Floats:
    true, false = of_pos @ (pos >= threshold), of_neg @ (neg >= threshold)
    found: Floats = 2 * true / (true + false + pos.size)
    return found


def _fpr(pos: Floats, neg: Floats, of_pos: Floats, of_neg: Floats, threshold: float) -> Floats:
    order = np.argsort(-pos, kind="stable")
    reached = np.cumsum(of_pos[:, order], axis=1) >= math.ceil(SENSITIVITY * pos.size)
    at_least = pos[order][:, None] <= neg  # [thresholds, negatives]
    flagged: Floats = (at_least[reached.argmax(axis=1)] * of_neg).sum(axis=1)
    return flagged / neg.size
