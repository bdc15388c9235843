"""Searches held against each other at matched cost: refusals at a KL, KL at refusals, hypervolume.

A winner is one point. Two searches may have won at different KLs, and then the better question is
what each had to offer at the other's. Smaller is better in both coordinates.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

Point = tuple[float, float]  # refusals (a count or a rate) and KL, nats


def fewest_refusals(points: Iterable[Point], kl: float) -> float | None:
    """The fewest refusals at a KL of at most `kl`; None: no point has so small a KL."""
    return min((refusals for refusals, own in points if own <= kl), default=None)


def least_kl(points: Iterable[Point], refusals: float) -> float | None:
    """The least KL at no more than so many refusals; None: every point refuses more."""
    return min((own for count, own in points if count <= refusals), default=None)


def hypervolume(points: Sequence[Point], reference: Point) -> float:
    """Area that the points dominate, up to the reference point, as a fraction of its rectangle.

    1 would be no refusal at KL 0; 0: no point is better than the reference in both. Points beyond
    the reference add nothing, nor do points that another one dominates.

    Raises:
        ValueError: a coordinate of the reference is not positive.

    Source: Zitzler and Thiele 1998.
    """
    worst, most = reference
    if not (worst > 0 and most > 0):
        raise ValueError(f"a reference point is positive in both, got {reference}")
    area, reached = 0.0, most
    for refusals, kl in sorted(points):  # ever more refusals: only a smaller KL adds
        if refusals < worst and kl < reached:
            area += (worst - refusals) * (reached - kl)
            reached = kl
    return area / (worst * most)
