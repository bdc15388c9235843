"""A quantity along the tokens of a response, in one line: its ends, its size, its coarse course."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Course:
    """What is kept of a quantity along a response, in its unit.

    Attributes:
        first: at the first token.
        sum, mean, max: over all tokens.
        max_at: the first token where it is largest, from 0.
        curve: mean over tokens 0, 1, 2-3, 4-7, 8-15, ...: bins double, since responses begin alike
            and their ends are few.
    """

    first: float
    sum: float
    mean: float
    max: float
    max_at: int
    curve: tuple[float, ...]


def course(values: NDArray[np.float64]) -> Course:
    """The course of a quantity along one response.

    Args:
        values: [tokens], without NaN.

    Raises:
        ValueError: no tokens, or a NaN.
    """
    if values.ndim != 1 or not values.size or np.isnan(values).any():
        raise ValueError(f"a course needs numbers along tokens, got shape {values.shape}")
    return Course(
        first=float(values[0]),
        sum=float(values.sum()),
        mean=float(values.mean()),
        max=float(values.max()),
        max_at=int(values.argmax()),
        curve=tuple(float(values[a:b].mean()) for a, b in bins(values.size)),
    )


def bins(tokens: int) -> list[tuple[int, int]]:
    """Bounds [from, to) of a curve's bins over a response of so many tokens; the last may be cut.

    `to` is not past the end.
    """
    edges = [0, *(2**power for power in range(tokens.bit_length()) if 2**power < tokens), tokens]
    return list(itertools.pairwise(edges))
