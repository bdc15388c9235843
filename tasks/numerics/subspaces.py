"""Angles between subspaces that two matrices of states span, in degrees, and their resampling.

Generalized Ships (arXiv 2410.13708) compares the intact and the ablated model by the left singular
vectors of their states M [prompts, d], without centring. Cosines near 1 lose half the digits, so
an angle is atan2 of its sine and cosine, both from float64 (Björck and Golub 1973): 1e-9 degrees
are told from 0. `scipy.linalg.subspace_angles` does the same for one pair; here all heads and all
resamples go at once.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

_TOLERANCE = 1e-10  # radians between two steps of an iteration; angles are read to 1e-4 degrees
_STEPS = 200


class Spaces(NamedTuple):
    """Leading singular vectors: `left` [prompts, r], `right` [d, r], orthonormal."""

    left: Array
    right: Array


def leading_spaces(states: NDArray[np.floating], r: int) -> Spaces:
    """The first r singular vectors of states [prompts, d], in float64.

    Raises:
        ValueError: not a matrix, not finite, fewer than r + 1 prompts (r prompts span everything
            there is, so every angle would be 0), or of a rank below r.
    """
    matrix = np.asarray(states, np.float64)
    if matrix.ndim != 2 or len(matrix) <= r or r < 1:
        raise ValueError(f"states of shape {matrix.shape} have no subspace of rank {r} to compare")
    if not np.isfinite(matrix).all():
        raise ValueError("states must be finite")
    left, sizes, right = np.linalg.svd(matrix, full_matrices=False)
    if sizes.size < r or sizes[r - 1] <= sizes[0] * max(matrix.shape) * np.finfo(float).eps:
        raise ValueError(f"states span fewer than {r} dimensions")
    return Spaces(left[:, :r], right[:r].T)


def angle_sum(one: Array, other: Array) -> Array:
    """Sum of the r principal angles between subspaces, degrees, 0 to 90 r.

    Args:
        one, other: [..., n, r], orthonormal columns.

    Returns:
        [...]
    """
    inner = one.mT @ other
    cosines = np.linalg.svd(inner, compute_uv=False)
    sines = np.linalg.svd(other - one @ inner, compute_uv=False)
    # the largest cosine belongs to the smallest sine
    angles = np.arctan2(sines[..., ::-1], np.clip(cosines, 0, None))
    summed: Array = np.degrees(angles.sum(-1))
    return summed


def resample_counts(n: int, resamples: int, seed: int) -> Array:
    """How often each of n prompts is drawn with replacement, [resamples, n]; rows sum to n.

    A draw of fewer than two prompts is drawn again: it spans no subspace.
    """
    generator = np.random.default_rng(seed)
    counts = generator.multinomial(n, np.full(n, 1 / n), size=resamples)
    while n > 1 and (lone := (counts > 0).sum(1) < 2).any():
        counts[lone] = generator.multinomial(n, np.full(n, 1 / n), size=int(lone.sum()))
    return counts.astype(np.float64)


def resampled_spaces(states: NDArray[np.floating], counts: Array, r: int) -> Array:
    """Left singular subspaces of resampled states, [resamples, prompts, r].

    A prompt drawn c times is one row of length sqrt(c): angles between such spaces are those of
    the matrices with the row repeated. Found by iteration on M M^T from the space of all prompts;
    the leading one stands far apart from the rest without centring, so few steps do. Resamples
    that have not settled are solved outright.

    Args:
        states: [prompts, d].
        counts: [resamples, prompts].
    """
    matrix = np.asarray(states, np.float64)
    gram = matrix @ matrix.T
    lengths = np.sqrt(counts)[..., None]
    space = _orthonormal(lengths * leading_spaces(matrix, r).left)
    for _ in range(_STEPS):
        before = space
        space = _orthonormal(lengths * (gram @ (lengths * space)))
        moved = np.abs(space - before @ (before.mT @ space)).max(axis=(1, 2))
        if moved.max() < _TOLERANCE:
            return space
    late = moved >= _TOLERANCE
    scaled = lengths[late] * gram * lengths[late].mT
    space[late] = np.linalg.eigh(scaled)[1][..., -r:]
    return space


def _orthonormal(vectors: Array) -> Array:
    """[..., n, r] with orthonormal columns of the same span."""
    if vectors.shape[-1] == 1:
        norms = np.linalg.norm(vectors, axis=-2, keepdims=True)
        alone: Array = vectors / np.where(norms > 0, norms, 1)
        return alone
    return np.asarray(np.linalg.qr(vectors)[0], np.float64)


def chance_of_top(scores: Array, top: int) -> Array:
    """Fraction of resamples in which each head is among the `top` highest, [heads].

    Of equal scores the lower index comes first.

    Args:
        scores: [resamples, heads].
    """
    order = np.argsort(-scores, axis=1, kind="stable")[:, :top]
    inside = np.zeros(scores.shape)
    np.put_along_axis(inside, order, 1.0, axis=1)
    fraction: Array = inside.mean(0)
    return fraction


def descending_ranks(scores: NDArray[np.floating]) -> NDArray[np.int64]:
    """Ranks from 1, the highest first; of equal scores the lower index comes first."""
    order = np.argsort(-np.asarray(scores, np.float64), kind="stable")
    ranks = np.empty(len(order), np.int64)
    ranks[order] = np.arange(1, len(order) + 1)
    return ranks


def percentile_interval(values: Array, level: float = 0.95) -> tuple[Array, Array]:
    """The middle `level` of resampled values [resamples, ...], low and high."""
    tail = (1 - level) / 2
    low, high = np.quantile(values, [tail, 1 - tail], axis=0)
    return low, high
