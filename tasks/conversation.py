"""A conversation with a study's model, edited as a trial asks or as it is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tasks.probe import Card, open_model, read_card
from tasks.stored_trials import StoredTrial

if TYPE_CHECKING:
    import torch

    from tasks.models.editing import Edit
    from tasks.models.loading import LoadedModel


@dataclass(frozen=True)
class Manner:
    """How it answers: temperature 0 is greedy; the longest reply, in tokens; seed of what is
    drawn."""

    temperature: float = 0.0
    max_new_tokens: int = 256
    seed: int = 0


@dataclass
class Conversation:
    """What was said so far, with the model that answers."""

    loaded: LoadedModel
    card: Card
    edit: Edit | None
    manner: Manner
    generator: torch.Generator
    messages: list[dict[str, str]] = field(default_factory=list)

    def reset(self) -> None:
        """Forget what was said."""
        self.messages.clear()

    def say(self, text: str) -> Iterator[str]:
        """The reply to a turn, piece by piece.

        What was said stays; of a reply that is broken off, its beginning. Nothing stays of a turn
        that failed before there was any.

        Raises:
            ModelError: the conversation no longer fits the model, or its logits are not finite.
        """
        from tasks.models.chatting import pieces, reply_tokens
        from tasks.models.rendering import encode, render_turns, user

        said = [*self.messages, user(text)]
        prefix = self.card.response_prefix
        rendered = render_turns(self.loaded.tokenizer, said, self.card.system_prompt, prefix)
        (prompt,) = encode(self.loaded.tokenizer, [rendered])
        tokens = reply_tokens(
            self.loaded,
            prompt,
            self.edit,
            max_new_tokens=self.manner.max_new_tokens,
            temperature=self.manner.temperature,
            generator=self.generator,
        )
        reply, whole = "", False
        try:
            for piece in pieces(self.loaded, tokens):
                reply += piece
                yield piece
            whole = True
        finally:
            if reply or whole:
                self.messages = [*said, {"role": "assistant", "content": prefix + reply}]


def open_conversation(stored: StoredTrial, edited: bool, manner: Manner) -> Conversation:
    """Load a study's model, in the precision of the study, and make the trial's edit.

    Raises:
        ModelError: the model cannot be loaded, or is not the study's any more.
    """
    import torch

    card = read_card(stored.materials["model"])
    if edited:
        court, _ = stored.court()
        loaded, edit = court.bench.loaded, court.edit_of(stored.trial.parameters)
    else:
        loaded, edit = open_model(stored.spec, [card.dtype]), None
    generator = torch.Generator().manual_seed(manner.seed)
    return Conversation(loaded, card, edit, manner, generator)
