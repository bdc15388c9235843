"""Stored responses as drafts: what a prompt was answered before.

Trials of a study answer much alike, so what one of them said is a good guess at what the next one
will say. A guess is only ever verified, never trusted: it changes cost and no token.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

LEAST_HIT_RATE = 0.25  # below, passes that verify cost more than the tokens they spare
KEPT = 64  # responses of a prompt that are remembered: the most frequent, the oldest first
MOST = 16  # responses of a prompt that are looked at


class Drafts:
    """Known responses by prompt, an end-of-sequence token included where there was one."""

    def __init__(self) -> None:
        self._known: dict[int, Counter[tuple[int, ...]]] = {}
        self.hit_rate = 1.0

    def learn(self, responses: Iterable[tuple[int, Sequence[int]]]) -> None:
        """Add (prompt, tokens) of one generation; note how many of them were known before."""
        found = [(prompt, tuple(tokens)) for prompt, tokens in responses]
        asked = [(prompt, tokens) for prompt, tokens in found if prompt in self._known]
        if asked:
            hits = sum(tokens in self._known[prompt] for prompt, tokens in asked)
            self.hit_rate = hits / len(asked)
        for prompt, tokens in found:
            if tokens:
                self._known.setdefault(prompt, Counter())[tokens] += 1
        for prompt, known in self._known.items():
            if len(known) > KEPT:
                self._known[prompt] = Counter(dict(known.most_common(KEPT)))

    @property
    def pay(self) -> bool:
        """Whether the last generation said enough that was known for verifying to be worth it."""
        return self.hit_rate >= LEAST_HIT_RATE

    def forget(self) -> None:
        """Know nothing again."""
        self._known.clear()
        self.hit_rate = 1.0

    def copy(self) -> Drafts:
        """Drafts that can learn more without these knowing."""
        twin = Drafts()
        twin._known = {prompt: known.copy() for prompt, known in self._known.items()}
        twin.hit_rate = self.hit_rate
        return twin

    def match(self, prompt: int, begun: Sequence[int]) -> tuple[int, ...] | None:
        """The most frequent known response that goes on from `begun`; ties: the oldest."""
        start, length = tuple(begun), len(begun)
        for tokens, _ in self._known.get(prompt, _NONE).most_common(MOST):
            if len(tokens) > length and tokens[:length] == start:
                return tokens
        return None


_NONE: Counter[tuple[int, ...]] = Counter()
