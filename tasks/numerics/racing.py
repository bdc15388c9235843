"""Which trials can no longer matter.

TPE looks at which trials are in its best group and at nothing else of the rest, and the ranking is
lexicographic. So a trial that enough judged ones are ahead of, whatever it has still to answer, is
lost: stopping it changes no later proposal and no finalist. The sampler is done with a trial also
when nothing that is still to come can change its values. Source: design, "The trial engine".
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
        places: what the ranking sorts by, of every trial that was judged to its end.
        best_group: trials ahead of it, for the sampler, with which a trial is lost.
        finalists: trials ranked before it with which a trial is lost.
    """

    values: Sequence[Values]
    places: Sequence[Place]
    best_group: int
    finalists: int

    def lost(self, values: Values, worst: Values, place: Place) -> bool:
        """Whether a trial is lost whose values end between these and whose place is no better.

        It must also be off the Pareto front of refusals, overrefusals and KL, whatever comes.
        """
        if sum(other < place for other in self.places) < self.finalists:
            return False
        passed = (other[1:] for other in self.places if not other[0])
        if not place[0] and not any(dominates(other, place[1:]) for other in passed):
            return False
        ahead = sum(dominates(other, values) for other in self.values)
        return values == worst or ahead >= self.best_group


def dominates(one: Sequence[float], other: Sequence[float]) -> bool:
    """Whether minimised values are no worse in all and better in one. Ties dominate nothing."""
    return one != other and all(a <= b for a, b in zip(one, other, strict=True))


def place_of(outcome: Outcome) -> Place:
    """What the strict ranking sorts by; a KL that is not finite counts as gated and sorts last."""
    finite = math.isfinite(outcome.kl)
    kl = outcome.kl if finite else math.inf
    return outcome.gated or not finite, outcome.refusals, outcome.overrefusals, kl
