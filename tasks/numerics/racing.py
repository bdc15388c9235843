"""Which trials can no longer matter to a search, and which of them have to be heard after it.

TPE looks at which trials are in its best group and at nothing else of the rest, so a trial that
enough others are ahead of, whatever it has still to answer, is lost for the search; so is one whose
values nothing that is still to come can change. A Gaussian process reads the refusals of every
trial, and the overrefusals of those that not enough others are ahead of. A trial that is lost may
still matter to the ranking. That is settled once the search is over, best chances first, and few
trials are then heard to their end.
Source: design, "The trial engine".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tasks.numerics.objective import Outcome

LARGEST_BEST_GROUP = 25  # of TPE where a search fixes none

Values = tuple[float, ...]
Place = tuple[bool, int, int, float]


@dataclass(frozen=True)
class Race:
    """What a newcomer races against.

    Attributes:
        values: what the sampler minimises, of every trial whose values are final.
        places: what the ranking sorts by, of every trial, at best.
        best_group: trials ahead of it, for the sampler, with which a trial is lost.
        finalists: trials that the ranking needs.
        reads_refusals: whether the sampler reads every trial's refusals, also of those behind.
    """

    values: Sequence[Values]
    places: Sequence[Place]
    best_group: int
    finalists: int
    reads_refusals: bool = False

    @property
    def early(self) -> bool:
        """Whether a trial can be lost before its refusals are known."""
        enough = len(self.places) >= self.finalists and len(self.values) >= self.best_group
        return enough and not self.reads_refusals

    def lost(self, values: Values, worst: Values, place: Place, *, harmful_known: bool) -> bool:
        """Whether a trial is lost whose values end between these and whose place is no better.

        Before its refusals are known it must also be behind the finalists so far: else it would
        be heard again after the search, which costs more than it spares.
        """
        if not harmful_known and (
            self.reads_refusals or sum(other < place for other in self.places) < self.finalists
        ):
            return False
        ahead = sum(dominates(other, values) for other in self.values)
        return values == worst or ahead >= self.best_group


def undecided(places: Sequence[Place], ended: Sequence[bool], finalists: int) -> list[int]:
    """Trials to hear to their end before the ranking's first `finalists` and its front are known.

    Args:
        places: what the ranking sorts by, of every trial, at best.
        ended: whether a trial was judged to its end, so that its place is known.
        finalists: places to fill.

    Returns:
        Numbers of trials. Ask again with what they turned out to be, until there are none: then
        the first places, and the Pareto front of refusals, overrefusals and KL, are exactly those
        of a search that judged everything. For a trial's place is never better than its best, so
        nobody who was not heard can come before one who was and is ahead of that.
    """
    order = sorted(range(len(places)), key=lambda number: (places[number], number))
    first = [number for number in order[:finalists] if not ended[number]]
    return first or [number for number in _front(places, order) if not ended[number]]


def _front(places: Sequence[Place], order: Sequence[int]) -> list[int]:
    """Trials that passed the gates and that none of the others dominates, in the order given.

    The order is by place, so whatever dominates a trial comes before it.
    """
    front: list[int] = []
    for number in order:
        gated, *own = places[number]
        if not gated and not any(dominates(places[other][1:], own) for other in front):
            front.append(number)
    return front


def dominates(one: Sequence[float], other: Sequence[float]) -> bool:
    """Whether minimised values are no worse in all and better in one. Ties dominate nothing."""
    pairs = list(zip(one, other, strict=True))
    return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)


def place_of(outcome: Outcome) -> Place:
    """What the strict ranking sorts by; a KL that is not finite counts as gated and sorts last."""
    finite = math.isfinite(outcome.kl)
    kl = outcome.kl if finite else math.inf
    return outcome.gated or not finite, outcome.refusals, outcome.overrefusals, kl
