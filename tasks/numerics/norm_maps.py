"""Means of log norms over prompts, by state and token position, and what a length does to them.

Prompts are of different lengths, so a cell is the mean over those that have a token there, and late
cells are means over long prompts only. Where two classes differ in length, their late cells
compare other prompts: `match_lengths` chooses prompts of both classes that are equally long.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class CellMeans:
    """Mean, standard error of the mean and number of prompts of every cell [states, positions].

    The mean is NaN where the count is 0, the error where it is below 2.
    """

    mean: Floats
    error: Floats
    count: NDArray[np.int64]


def cell_means(log_norms: Floats) -> CellMeans:
    """Mean over prompts that have a token at a position.

    V_c[l, t] = mean over prompts of class c with a token at t of ln ||h[l, t]||_2. Source: Kadali
    and Papalexakis 2026 (arXiv 2602.11495); that it is the natural logarithm of the L2 norm is
    inferred from the figure's colour bars.

    Args:
        log_norms: [prompts, states, positions], natural logarithms; NaN where there is no token.

    Raises:
        ValueError: not three-dimensional, no prompts, or an infinite value.
    """
    _require(log_norms)
    there = ~np.isnan(log_norms)
    count = there.sum(axis=0)
    filled = np.where(there, log_norms, 0.0)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = filled.sum(axis=0) / count
        spread = (np.where(there, log_norms - mean, 0.0) ** 2).sum(axis=0)
        error = np.where(count > 1, np.sqrt(spread / (count - 1) / count), np.nan)
    return CellMeans(mean, error, count.astype(np.int64))


def match_lengths(
    one: Sequence[int], two: Sequence[int], width: int = 1, seed: int = 0
) -> tuple[list[int], list[int]]:
    """Indices of equally many prompts of two classes whose lengths have the same histogram.

    In every bin of `width` tokens as many of each class are kept as the rarer one has, chosen at
    random by `seed`; with width 1 the lengths themselves are the same. Classes that share no bin
    give two empty lists.

    Args:
        one: lengths of the first class in tokens.
        two: lengths of the second.

    Raises:
        ValueError: `width` is below 1.
    """
    if width < 1:
        raise ValueError(f"a bin has at least 1 token, not {width}")
    generator = np.random.default_rng(seed)
    bins: tuple[dict[int, list[int]], ...] = (defaultdict(list), defaultdict(list))
    for found, lengths in zip(bins, (one, two), strict=True):
        for index, length in enumerate(lengths):
            found[length // width].append(index)
    chosen: tuple[list[int], list[int]] = ([], [])
    for each in sorted(bins[0].keys() & bins[1].keys()):
        size = min(len(bins[0][each]), len(bins[1][each]))
        for kept, found in zip(chosen, bins, strict=True):
            kept += generator.choice(found[each], size, replace=False).tolist()
    return sorted(chosen[0]), sorted(chosen[1])


def state_differences(
    one: Floats,
    two: Floats,
    shown: NDArray[np.bool_],
    *,
    level: float = 0.95,
    seed: int = 0,
    resamples: int = 1000,
) -> tuple[Floats, Floats, Floats]:
    """Per state, the mean over shown cells of `one`'s map minus `two`'s, and its interval.

    A percentile bootstrap over prompts, within each class: a cell is not independent of its
    neighbours, a prompt is. A cell that no resampled prompt reaches is left out of that resample.

    Args:
        one: [prompts, states, positions], as for `cell_means`.
        two: the same of the other class.
        shown: [states, positions], the cells to average over.

    Returns:
        Difference, low and high end, each [states]; NaN where no cell of a state is shown.

    Raises:
        ValueError: as `cell_means`, or shapes that do not fit.
    """
    for values in (one, two):
        _require(values)
    if one.shape[1:] != two.shape[1:] or shown.shape != one.shape[1:]:
        raise ValueError(f"maps {one.shape[1:]}, {two.shape[1:]} and cells {shown.shape} differ")
    generator = np.random.default_rng(seed)
    single = [np.ones((1, len(values))) for values in (one, two)]
    drawn = [
        generator.multinomial(n, np.full(n, 1 / n), size=resamples).astype(np.float64)
        for n in (len(one), len(two))
    ]
    difference = _averaged(one, two, shown, single)[0]
    tails = (1 - level) / 2, (1 + level) / 2
    resampled = _averaged(one, two, shown, drawn)
    low, high = np.full((2, len(difference)), np.nan)
    known = ~np.isnan(resampled).all(axis=0)
    if known.any():
        low[known], high[known] = np.nanquantile(resampled[:, known], tails, axis=0)
    return difference, low, high


def _averaged(
    one: Floats, two: Floats, shown: NDArray[np.bool_], weights: Sequence[Floats]
) -> Floats:
    """Mean difference over shown cells under weights of prompts, [resamples, states]."""
    first, second = (_weighted(v, w) for v, w in zip((one, two), weights, strict=True))
    cells = np.where(shown, first - second, np.nan)
    there = ~np.isnan(cells)
    with np.errstate(invalid="ignore", divide="ignore"):
        found: Floats = np.where(there, cells, 0.0).sum(axis=-1) / there.sum(axis=-1)
    return found


def _weighted(values: Floats, weights: Floats) -> Floats:
    """Weighted mean over prompts [resamples, states, positions], NaN where the weight is 0."""
    there = (~np.isnan(values)).reshape(len(values), -1)
    flat = np.where(there, values.reshape(len(values), -1), 0.0)
    with np.errstate(invalid="ignore", divide="ignore"):
        means = (weights @ flat) / (weights @ there)
    return means.reshape(len(weights), *values.shape[1:])


def _require(log_norms: Floats) -> None:
    if log_norms.ndim != 3 or not len(log_norms):
        raise ValueError(f"log norms need [prompts, states, positions], got {log_norms.shape}")
    if np.isinf(log_norms).any():
        raise ValueError("a log norm is infinite; a zero state has none and is given as NaN")
