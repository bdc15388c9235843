"""A reply, token by token, of a model that may carry an edit by hooks.

Made for one conversation at a time, so it is the plain loop that the batches of
`tasks.models.decoding` are tested against: without a temperature both give the same tokens.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor
from transformers import DynamicCache

from artifacts.errors import ModelError
from tasks.models.decoding import eos_ids
from tasks.models.editing import Edit, applied
from tasks.models.loading import LoadedModel

_CUT = "\N{REPLACEMENT CHARACTER}"  # what half a character decodes to


@torch.inference_mode()
def reply_tokens(
    loaded: LoadedModel,
    prompt: Sequence[int],
    edit: Edit | None = None,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
) -> Iterator[int]:
    """New tokens up to, and without, the first that ends the response; as many as have room.

    Args:
        prompt: a conversation, rendered and encoded.
        temperature: 0 takes the likeliest token, as judging does; else tokens are drawn.
        generator: what they are drawn with, on the CPU.

    Raises:
        ModelError: the prompt leaves no position for a reply, or logits are not finite.
    """
    longest = min(max_new_tokens, _room(loaded, len(prompt)))
    ends, cache = set(eos_ids(loaded)), DynamicCache(config=loaded.model.config)
    ids = torch.tensor([list(prompt)], device=loaded.device)
    with applied(loaded.anatomy, [edit]) if edit else nullcontext():
        for _ in range(longest):
            output = loaded.model(
                input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1
            )
            token = _choose(output.logits[0, -1].float().cpu(), temperature, generator)
            if token in ends:
                return
            yield token
            ids = torch.tensor([[token]], device=loaded.device)


def _room(loaded: LoadedModel, taken: int) -> int:
    """Positions that a prompt of `taken` tokens leaves."""
    positions = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None)
    if positions is None:
        return sys.maxsize
    if taken >= positions:
        raise ModelError(
            f"the conversation takes {taken} tokens, and the model has {positions} positions; "
            "/reset begins anew"
        )
    return int(positions) - taken


def _choose(logits: Tensor, temperature: float, generator: torch.Generator | None) -> int:
    if not bool(torch.isfinite(logits.max())):
        raise ModelError("logits are not finite; try dtype 'float32' or a smaller edit")
    if temperature == 0:
        return int(logits.argmax())
    chances = torch.softmax(logits.double() / temperature, dim=-1)
    return int(torch.multinomial(chances, 1, generator=generator))


def pieces(loaded: LoadedModel, tokens: Iterator[int]) -> Iterator[str]:
    """The text of tokens as it grows; a character of several tokens comes out whole."""
    found: list[int] = []
    shown = whole = ""
    for token in tokens:
        found.append(token)
        whole = loaded.tokenizer.decode(
            found, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        if whole != shown and whole.startswith(shown) and not whole.endswith(_CUT):
            yield whole[len(shown) :]
            shown = whole
    if whole.startswith(shown) and whole != shown:
        yield whole[len(shown) :]
