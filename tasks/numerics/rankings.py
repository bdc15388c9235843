"""How firmly a ranking stands: under other prompts of the same kind, and over several models."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tasks.numerics.intervals import Interval

Values = NDArray[np.float64]

_CELLS = 4_000_000  # of one array of resamples and trials: 32 MB
_DIGITS = 12  # of a mean KL; a matrix product may round equal rows apart


class Standing(NamedTuple):
    """What becomes of a ranking when its prompts are drawn again.

    Attributes:
        first: [trials], how often each is first, 0-1; they add up to 1.
        holds: how often the whole order is the observed one, 0-1.
    """

    first: Values
    holds: float


def standing(
    harmful: Values,
    others: Sequence[Values],
    kl: Values,
    gated: NDArray[np.bool_],
    *,
    seed: int = 0,
    resamples: int = 2000,
) -> Standing:
    """Draw the prompts of each class with replacement, rank by the strict order, and count.

    Gates stay as they are: they are part of what a trial is. Equal trials rank in the order given.

    Args:
        harmful: [trials, harmful prompts], 1 where refused.
        others: the same for harmless and, if there are any, borderline prompts, whose refusals are
            overrefusals.
        kl: [trials, harmless prompts], nats; drawn together with the first of `others`.
        gated: [trials].

    Raises:
        ValueError: no trials, or shapes that do not fit.

    Source: Efron 1979; the bootstrap of ranks is consistent unless trials are exactly tied.
    """
    trials = len(gated)
    parts = [harmful, *others, kl]
    if not trials or any(part.ndim != 2 or len(part) != trials for part in parts):
        shapes = [part.shape for part in parts]
        raise ValueError(f"a ranking needs [trials, prompts] of {trials} trials, got {shapes}")
    if kl.shape[1] != others[0].shape[1]:
        raise ValueError(f"KL of {kl.shape[1]} prompts, labels of {others[0].shape[1]}")
    observed = _orders([np.ones((1, part.shape[1])) for part in (harmful, *others)], parts, gated)
    generator = np.random.default_rng(seed)
    first, held, left = np.zeros(trials), 0, resamples
    while left:
        count = min(left, max(1, _CELLS // trials))
        weights = [_weights(generator, part.shape[1], count) for part in (harmful, *others)]
        orders = _orders(weights, parts, gated)
        first += np.bincount(orders[:, 0], minlength=trials)
        held += int((orders == observed).all(axis=1).sum())
        left -= count
    return Standing(first / resamples, held / resamples)


def _weights(generator: np.random.Generator, n: int, count: int) -> Values:
    """How often each of n prompts is drawn, [count, n]."""
    if not n:
        return np.zeros((count, 0))
    return generator.multinomial(n, np.full(n, 1 / n), size=count).astype(np.float64)


def _orders(
    weights: Sequence[Values], parts: Sequence[Values], gated: NDArray[np.bool_]
) -> NDArray[np.intp]:
    """Trials in the strict order, per resample, [resamples, trials]."""
    harmful, *others, kl = parts
    refusals = weights[0] @ harmful.T
    overrefusals = np.sum([w @ part.T for w, part in zip(weights[1:], others, strict=True)], axis=0)
    with np.errstate(invalid="ignore"):  # an infinite KL that is not drawn; NaN sorts last as well
        mean_kl = np.round(weights[1] @ kl.T / max(kl.shape[1], 1), _DIGITS)
    stopped = np.broadcast_to(gated, refusals.shape)
    return np.lexsort((mean_kl, overrefusals, refusals, stopped), axis=-1)


@dataclass(frozen=True)
class AcrossModels:
    """One metric of two arms, a minus b, over several models.

    Attributes:
        models: how many.
        mean: of the differences; `interval`: of that mean, Student's t; None for one model.
        p: exact signed-rank test; 1 where no model differs.
        least_p: the smallest p that so many models can give: 0.25 for three, 0.03 for six.
    """

    models: int
    mean: float
    interval: Interval | None
    p: float
    least_p: float


def across_models(differences: Sequence[float], level: float = 0.95) -> AcrossModels:
    """Whether one arm is better over models, each of which counts once.

    The models are the sample here, not their prompts: what is asked is whether a further model
    would show the same. Wilcoxon's signed-rank test makes no assumption on scale, which rates and
    KLs of different models do not share, beyond differences being as likely up as down; it is exact
    (all 2^m signs) for up to 13 models, ties and zeros included.

    Raises:
        ValueError: no differences, or one that is not finite.

    Source: Wilcoxon 1945 (zeros left out of the ranks); Demsar 2006 recommends it for comparisons
    over data sets; scipy.
    """
    values = np.asarray(differences, dtype=np.float64)
    if values.ndim != 1 or not values.size or not np.isfinite(values).all():
        raise ValueError(f"a summary over models needs finite differences, got {values.tolist()}")
    from scipy.stats import t, wilcoxon

    m, mean = values.size, float(values.mean())
    interval = None
    if m > 1:
        half = float(t.ppf((1 + level) / 2, m - 1)) * float(values.std(ddof=1)) / math.sqrt(m)
        interval = (mean - half, mean + half)
    moved = values[values != 0]
    p = float(wilcoxon(moved).pvalue) if moved.size else 1.0
    return AcrossModels(m, mean, interval, min(1.0, p), min(1.0, 2.0 ** (1 - m)))


def sign_test(wins: int, losses: int) -> float:
    """Two-sided exact p of wins against losses, ties left out; 1 where there are neither.

    For the strict order, which says who is ahead on a model and not by how much.

    Source: Dixon and Mood 1946; scipy.
    """
    if not wins + losses:
        return 1.0
    from scipy.stats import binomtest

    return float(binomtest(wins, wins + losses).pvalue)
