"""Greedy answers while some layers are left out: each prompt may leave out others.

A bypassed layer hands on what it was given, at every token of the prompt and of the answer. The
layer still computes, and its result is dropped row by row: so prompts with different layers share
a batch, and what stands in the cache of a bypassed layer is read by nobody but that layer itself.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from tasks.models.anatomy import hidden
from tasks.models.batching import by_length, require_tokens
from tasks.models.decoding import Batch, NotFinite, Request, Response, not_finite
from tasks.models.editing import Editor

if TYPE_CHECKING:
    from tasks.models.loading import LoadedModel

Progress = Callable[[int, int], None]


def answer_without_layers(
    loaded: LoadedModel,
    prompts: Sequence[Sequence[int]],
    left_out: Sequence[Collection[int]],
    *,
    max_new_tokens: int,
    rows: int,
    on_progress: Progress | None = None,
) -> list[Response]:
    """Answer every prompt with its own layers left out; none left out is the model as it is.

    Args:
        loaded: the model.
        prompts: token lists, rendered and encoded.
        left_out: for each prompt, the layers (from 0) that hand on their input.
        max_new_tokens: longest response, in tokens, an end-of-sequence token included.
        rows: prompts per batch; changes cost and memory, not tokens.
        on_progress: called with (prompts done, prompts in all).

    Raises:
        ModelError: an empty prompt, or logits that are not finite; names the prompt's index.
        ValueError: `rows` or `max_new_tokens` below 1, no layers for a prompt, or one that the
            model does not have.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, not {max_new_tokens}")
    require_tokens(prompts, rows)
    kinds = [frozenset(layers) for layers in left_out]
    if len(kinds) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts need as many sets of layers, not {len(kinds)}")
    depth = len(loaded.anatomy.layers)
    beyond = sorted(layer for layers in kinds for layer in layers if not 0 <= layer < depth)
    if beyond:
        raise ValueError(f"layer {beyond[0]} is none of the model's {depth}")
    known = {kind: number for number, kind in enumerate(dict.fromkeys(kinds))}
    found: dict[int, Response] = {}
    with torch.inference_mode(), _bypassing(loaded, list(known)) as bypass:
        for batch in by_length(prompts, rows):
            requests = [Request(known[kinds[i]], prompts[i], max_new_tokens) for i in batch]
            running = Batch(loaded, cast(Editor, bypass), requests)
            try:
                responses = running.run(running.prefill())
            except NotFinite as error:
                raise not_finite(batch[error.row], error.step) from error
            found |= dict(zip(batch, responses, strict=True))
            if on_progress is not None:
                on_progress(len(found), len(prompts))
    return [found[index] for index in range(len(prompts))]


class _Bypass:
    """Knows which set of layers each row of the next forward pass leaves out."""

    def __init__(self, table: Tensor) -> None:
        self._table = table  # bool [sets, layers]
        self.rows: Tensor | None = None

    def chosen(self, layer: int) -> Tensor:
        """Whether each row leaves this layer out, bool [rows, 1, 1]."""
        return self._table[self.rows, layer][:, None, None]


@contextmanager
def _bypassing(loaded: LoadedModel, kinds: Sequence[frozenset[int]]) -> Iterator[_Bypass]:
    layers = loaded.anatomy.layers
    table = torch.zeros(max(len(kinds), 1), len(layers), dtype=torch.bool, device=loaded.device)
    for row, kind in zip(table, kinds, strict=False):
        row[sorted(kind)] = True
    bypass = _Bypass(table)

    def hook(layer: int) -> Callable[..., Any]:
        def leaving(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
            before = args[0] if args else kwargs["hidden_states"]
            skipped = bypass.chosen(layer).to(before.device)
            after = torch.where(skipped, before, hidden(output))
            return (after, *output[1:]) if isinstance(output, tuple) else after

        return leaving

    handles = [
        layers[layer].register_forward_hook(hook(layer), with_kwargs=True)
        for layer in sorted(frozenset().union(*kinds))
    ]
    try:
        yield bypass
    finally:
        for handle in handles:
            handle.remove()
