"""Which trials can no longer matter.

TPE looks at which trials are in its best group and at nothing else of the rest, and the ranking is
lexicographic. So a trial that enough judged ones are ahead of, whatever it has still to answer, is
lost: stopping it changes no later proposal and no finalist. Source: design, "The trial engine".
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
    """The trials that were judged to their end, as the sampler and as the ranking see them.

    A trial is lost if, at its best, at least `best_group` of them are ahead of it for the sampler
    and at least `finalists` of them rank before it. Trials that were stopped are not among them.
    """

    values: Sequence[Values]
    places: Sequence[Place]
    best_group: int
    finalists: int

    def lost(self, values: Values, place: Place) -> bool:
        """Whether a trial is lost whose values and place can only become worse than these."""
        ahead = sum(dominates(other, values) for other in self.values)
        before = sum(other < place for other in self.places)
        return ahead >= self.best_group and before >= self.finalists


def dominates(one: Values, other: Values) -> bool:
    """Whether minimised values are no worse in all and better in one. Ties dominate nothing."""
    return one != other and all(a <= b for a, b in zip(one, other, strict=True))


def place_of(outcome: Outcome) -> Place:
    """What the strict ranking sorts by; a KL that is not finite counts as gated and sorts last."""
    finite = math.isfinite(outcome.kl)
    kl = outcome.kl if finite else math.inf
    return outcome.gated or not finite, outcome.refusals, outcome.overrefusals, kl
