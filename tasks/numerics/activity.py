"""Concept directions from contrastive pairs, activity scores, and what they are worth.

The recipe for directions is that of RepE's linear artificial tomography (arXiv 2310.01405):
differences within pairs, signed in turn so that their mean says nothing, the first principal
component of each state, and a sign from the labels. Score and scale are ours, see
`activity_scores`. Float64 throughout.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tasks.numerics.intervals import Interval

Array = NDArray[np.float64]
Recipe = Literal["pca", "mean", "probe"]
RECIPES: tuple[Recipe, ...] = ("pca", "mean", "probe")

PROBE_C = 0.1  # inverse strength of the probe's L2 penalty, for differences of variance one
LIMIT = 2.0  # of a score, standard deviations: the range of the seed's colour bar
_ROUNDING = 1e-9  # of the largest state: what float32 states leave of a difference that is zero


@dataclass(frozen=True)
class PairDirections:
    """Directions of every state, from false answers minus true ones.

    Attributes:
        vectors: [states, hidden], unit vectors that point to false; a row of zeros where the pairs
            do not differ.
        explained: [states], share of the differences' second moment along the vector, 0-1.
        right: [states], pairs whose false answer lies further along the vector, of those fitted.
    """

    vectors: Array
    explained: Array
    right: NDArray[np.int64]


def pair_directions(
    false: ArrayLike, true: ArrayLike, *, recipe: Recipe = "pca", seed: int = 0
) -> PairDirections:
    """One unit direction per state from pairs of states.

    "pca": differences in an order drawn from `seed`, every second one negated, centred, and their
    first principal component; its sign is the one by which most pairs are right (a tie: by which
    the mean difference is positive). "mean": the mean difference. "probe": the weights of a
    logistic regression that tells differences from their negatives; what not even that finds on
    other questions is not there to be found by a line.

    Args:
        false, true: [pairs, states, hidden], states of the two answers to one question.

    Raises:
        ValueError: shapes differ or are others, fewer than two pairs, or a value is not finite.

    Source: "pca" is RepE's, arXiv 2310.01405; the others are for comparison.
    """
    bad, good = _checked(false), _checked(true)
    if bad.shape != good.shape or bad.ndim != 3:
        raise ValueError(f"pairs need equal shapes [pairs, states, hidden], got {bad.shape}")
    if len(bad) < 2:
        raise ValueError(f"a direction needs at least two pairs, got {len(bad)}")
    differences = (bad - good).swapaxes(0, 1)
    sizes = np.abs(bad).max(axis=(0, 2), initial=0.0)
    signs = np.where(np.random.default_rng(seed).permutation(len(bad)) % 2, -1.0, 1.0)
    found = [
        _direction(rows, signs, recipe) if np.abs(rows).max() > _ROUNDING * size else _none(rows)
        for rows, size in zip(differences, sizes, strict=True)
    ]
    vectors = np.stack(found)
    along = np.einsum("sph,sh->sp", differences, vectors)
    whole = (differences**2).sum(axis=(1, 2))
    explained = np.divide((along**2).sum(axis=1), whole, out=np.zeros_like(whole), where=whole > 0)
    return PairDirections(vectors, explained, (along > 0).sum(axis=1))


def _direction(differences: Array, signs: Array, recipe: Recipe) -> Array:
    """The unit direction of differences [pairs, hidden]; zeros where the recipe finds none."""
    mean = differences.mean(axis=0)
    if recipe == "mean":
        return unit_rows(mean)
    if recipe == "probe":
        return _probe(differences)
    signed = differences * signs[:, None]
    centred = signed - signed.mean(axis=0)
    if not np.abs(centred).max() > _ROUNDING * np.abs(differences).max():
        return _none(differences)
    first: Array = np.linalg.svd(centred, full_matrices=False)[2][0]
    along = differences @ first
    majority = int(np.sign(along).sum())
    return -first if majority < 0 or (majority == 0 and first @ mean < 0) else first


def _probe(differences: Array) -> Array:
    from sklearn.linear_model import LogisticRegression

    both = np.concatenate([differences, -differences]) / differences.std()
    labels = np.repeat([1, 0], len(differences))
    model = LogisticRegression(C=PROBE_C, fit_intercept=False, max_iter=1000).fit(both, labels)
    return unit_rows(model.coef_[0])


def _none(rows: Array) -> Array:
    return np.zeros(rows.shape[-1])


def unit_rows(vectors: ArrayLike) -> Array:
    """Vectors [..., hidden] of length one; zero ones stay zero."""
    found = np.asarray(vectors, dtype=np.float64)
    norms = np.linalg.norm(found, axis=-1, keepdims=True)
    units: Array = np.divide(found, norms, out=np.zeros_like(found), where=norms > 0)
    return units


def random_directions(draws: int, states: int, hidden: int, seed: int) -> Array:
    """Unit vectors [draws, states, hidden] in directions that are equally likely."""
    return unit_rows(np.random.default_rng(seed).standard_normal((draws, states, hidden)))


def shuffled_pairs(false: Array, true: Array, seed: int) -> tuple[Array, Array]:
    """The same answers, labelled and paired at random: what a recipe finds where nothing is true.

    Labels swapped within pairs would leave the first component as it is, up to its sign, because
    it does not depend on the differences' signs. So answers are paired anew, too.

    Args:
        false, true: [pairs, ...].
    """
    both = np.concatenate([false, true])
    order = np.random.default_rng(seed).permutation(len(both))
    return both[order[: len(false)]], both[order[len(false) :]]


def neutral_scale(projections: ArrayLike) -> tuple[Array, Array]:
    """Mean and standard deviation (population) over the tokens of neutral text.

    A deviation that is nothing but rounding is zero: no score can be had there.

    Args:
        projections: [tokens, ...], scalar products with unit directions.

    Raises:
        ValueError: fewer than two tokens, or a value is not finite.
    """
    found = _checked(projections)
    if len(found) < 2:
        raise ValueError(f"a scale needs at least two neutral tokens, got {len(found)}")
    mean, deviation = found.mean(axis=0), found.std(axis=0)
    largest = np.abs(found).max(axis=0)
    return mean, np.where(deviation > _ROUNDING * largest, deviation, 0.0)


def activity_scores(projections: ArrayLike, mean: ArrayLike, deviation: ArrayLike) -> Array:
    """clip((projection - mean) / deviation, -2, 2); NaN where the deviation is zero.

    Args:
        projections: [tokens, ...], scalar products with unit directions.
        mean, deviation: [...], of neutral text, never of what is scored.

    Raises:
        ValueError: a deviation is negative, or a value is not finite.
    """
    values, middle, spread = _checked(projections), _checked(mean), _checked(deviation)
    if (spread < 0).any():
        raise ValueError("a standard deviation is not negative")
    with np.errstate(invalid="ignore", divide="ignore"):
        scaled = np.where(spread > 0, (values - middle) / spread, np.nan)
    return np.clip(scaled, -LIMIT, LIMIT)


def auroc(higher: ArrayLike, lower: ArrayLike) -> float:
    """Probability that a value of `higher` exceeds one of `lower`, ties by half, 0-1.

    Raises:
        ValueError: one of them is empty, or a value is not finite.
    """
    from sklearn.metrics import roc_auc_score  # a second to import, and few who score need it

    up, down = _checked(higher), _checked(lower)
    if not (up.size and down.size):
        raise ValueError(f"an AUROC needs values of both kinds, got {up.size} and {down.size}")
    labels = np.repeat([1, 0], [up.size, down.size])
    return float(roc_auc_score(labels, np.concatenate([up.ravel(), down.ravel()])))


def auroc_interval(
    higher: ArrayLike, lower: ArrayLike, *, resamples: int, seed: int, level: float = 0.95
) -> Interval:
    """Percentile bootstrap interval of `auroc` over questions, of which both values are drawn.

    Both answers to a question share its words, so they enter a resample together. A resample is a
    weight per question, so its AUROC is one quadratic form of the pairwise comparisons.

    Args:
        higher, lower: [questions], in the same order.

    Raises:
        ValueError: no questions, lists of different lengths, or a value is not finite.

    Source: Efron 1979.
    """
    up, down = _checked(higher), _checked(lower)
    if up.ndim != 1 or up.shape != down.shape or not up.size:
        raise ValueError(f"questions need two values each, got {up.shape} and {down.shape}")
    beats = (up[:, None] > down) + 0.5 * (up[:, None] == down)
    weights = _weights(len(up), resamples, seed)
    found = np.einsum("bi,bi->b", weights @ beats, weights)
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


@lru_cache(maxsize=16)
def _weights(size: int, resamples: int, seed: int) -> Array:
    """How much of each resample each question is: [resamples, size], rows sum to one."""
    drawn = np.random.default_rng(seed).integers(size, size=(resamples, size))
    cells = drawn + size * np.arange(resamples)[:, None]
    counts = np.bincount(cells.ravel(), minlength=resamples * size)
    found: Array = counts.reshape(resamples, size) / size
    return found


def verdict(answer: str, true: str, false: str) -> str:
    """Which of two answers a third one agrees with: "true", "false" or "neither".

    Judged by the words that only one of the two has: all of one and none of the other.

    Raises:
        ValueError: the two answers have the same words.
    """
    said, right, wrong = (_words(text) for text in (answer, true, false))
    if right == wrong:
        raise ValueError(f"the answers '{true}' and '{false}' have the same words")
    only_right, only_wrong = right - wrong, wrong - right
    if said >= only_right and said and not said & only_wrong:
        return "true"
    return "false" if said >= only_wrong and said and not said & only_right else "neither"


def _words(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"[^\W_]+", text.lower()))


def _checked(values: ArrayLike) -> Array:
    found = np.asarray(values, dtype=np.float64)
    if not np.isfinite(found).all():
        raise ValueError("a value is not finite")
    return found
