"""What silencing heads does to a model: to its next token, its last state, its answers.

One forward pass carries many heads: a row is a prompt and what is silenced in it. It begins at the
layer of its heads, from states that one pass without them recorded, since what lies below is the
same. Greedy groups grow the same way: the pass that is recorded is that of the group so far.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from artifacts.errors import ModelError
from tasks.models.batching import Padded, by_length, pad_left, require_tokens
from tasks.models.decoding import Batch, NotFinite, Request, not_finite
from tasks.models.editing import Editor
from tasks.models.head_ablation import (
    Ablation,
    Head,
    HeadScales,
    ablated,
    head_layers,
    scale_table,
)
from tasks.models.partial_pass import PartialPass
from tasks.numerics.divergence import first_token_kl

if TYPE_CHECKING:
    from tasks.models.loading import LoadedModel

Progress = Callable[[int, int], None]
Group = Sequence[Head]
TOKENS = 2048  # of a forward pass on a processor: more leave its caches


@dataclass(frozen=True)
class Effects:
    """What a candidate does on every prompt.

    Attributes:
        kl: float64 [candidates, prompts], KL(intact || ablated) of the next token, nats.
        states: float32 [candidates, prompts, d], what leaves the final norm at the last token.
    """

    kl: npt.NDArray[np.float64]
    states: npt.NDArray[np.float32]


class HeadProbe:
    """A model and prompts on which heads are silenced one after another.

    Args:
        loaded: the model, unedited.
        prompts: token lists, rendered and encoded up to where the response begins.
        how: the ablation.
        epsilon: what a silenced head is scaled by.
        rows: (prompt, head) pairs per forward pass, at most.

    Raises:
        ModelError: an empty prompt, a model whose heads cannot be reached, logits not finite.
        ValueError: no prompts, or `rows` below 1.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        prompts: Sequence[Sequence[int]],
        how: Ablation,
        epsilon: float,
        *,
        rows: int,
    ) -> None:
        require_tokens(prompts, rows)
        if not prompts:
            raise ValueError("heads are measured on prompts, and there are none")
        self.loaded, self.how, self.epsilon = loaded, how, epsilon
        self.layers = head_layers(loaded)
        self.heads = [head for layer in self.layers for head in layer.heads]
        self._rows = _right_size(loaded, prompts, rows)
        self._partial = PartialPass(loaded.anatomy.layers)
        together = max(1, self._rows // self.layers[0].n_heads)
        self._batches = [
            (batch, pad_left([prompts[i] for i in batch], loaded.device))
            for batch in by_length(prompts, together)
        ]
        self._n_prompts = len(prompts)
        self._logits: list[Tensor] = []  # of the intact model, by batch
        self.intact = self._intact()

    def _intact(self) -> npt.NDArray[np.float32]:
        """Last states [prompts, d] of the intact model, whose logits are kept."""
        states = np.empty((self._n_prompts, self.loaded.anatomy.hidden_size), np.float32)
        with self._silenced([()]):
            for batch, padded in self._batches:
                logits, last = self._forward(padded)
                self._logits.append(logits)
                states[batch] = last.float().cpu().numpy()
                _require_finite(last.float().sum(-1), [("the intact model", i) for i in batch])
        return states

    def without(
        self,
        candidates: Sequence[Head],
        group: Group = (),
        on_progress: Progress | None = None,
    ) -> Effects:
        """What each candidate does when it is silenced together with `group`.

        Raises:
            ModelError: logits that are not finite; names head and prompt.
        """
        shape = (len(candidates), self._n_prompts)
        kl = np.empty(shape)
        states = np.empty((*shape, self.loaded.anatomy.hidden_size), np.float32)
        places = sorted(range(len(candidates)), key=lambda place: candidates[place].layer)
        by_layer = [(k, list(g)) for k, g in groupby(places, lambda p: candidates[p].layer)]
        levels = {layer for layer, _ in by_layer}
        done = 0
        for (batch, padded), intact in zip(self._batches, self._logits, strict=True):
            with self._silenced([group]), self._partial.recorded(levels) as recorded:
                self._forward(padded)
            for layer, of_layer in by_layer:
                room = max(1, self._rows // len(batch))
                for first in range(0, len(of_layer), room):
                    part = of_layer[first : first + room]
                    variants = [(*group, candidates[place]) for place in part]
                    found = self._rows_without(variants, layer, padded, recorded.get(layer))
                    for place, logits, last in zip(part, *found, strict=True):
                        kl[place, batch] = _kl(intact, logits, candidates[place], batch)
                        states[place, batch] = last.float().cpu().numpy()
            done += len(batch)
            if on_progress is not None:
                on_progress(done, self._n_prompts)
        return Effects(kl, states)

    def _rows_without(
        self, variants: Sequence[Group], layer: int, padded: Padded, below: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Logits and last states [variants, prompts, ...] from layer `layer` upwards."""
        count, prompts = len(variants), len(padded.ids)
        many = Padded(*(part.repeat(count, 1) for part in padded))
        states = None if below is None else below.repeat(count, 1, 1)
        rows = torch.arange(count, device=self.loaded.device).repeat_interleave(prompts)
        with (
            self._silenced(variants) as scales,
            self._partial.beginning_at(layer if states is not None else 0, states),
        ):
            scales.choose(rows)
            logits, last = self._forward(many)
        return logits.reshape(count, prompts, -1), last.reshape(count, prompts, -1)

    @contextmanager
    def _silenced(self, groups: Sequence[Group]) -> Iterator[HeadScales]:
        scales = scale_table(self.loaded, groups, self.epsilon)
        with torch.inference_mode(), ablated(self.loaded, self.how, scales):
            yield scales

    def _forward(self, padded: Padded) -> tuple[Tensor, Tensor]:
        """Logits [rows, vocabulary] and normed states [rows, d] of the last position."""
        kept: list[Tensor] = []
        handle = self.loaded.anatomy.final_norm.register_forward_hook(
            lambda module, args, output: kept.append(output[:, -1])
        )
        try:
            output = self.loaded.model(
                input_ids=padded.ids,
                attention_mask=padded.mask,
                position_ids=padded.positions,
                use_cache=False,
                logits_to_keep=1,
            )
        finally:
            handle.remove()
        return output.logits[:, -1], kept[-1]


def answers_without(
    loaded: LoadedModel,
    prompts: Sequence[Sequence[int]],
    groups: Sequence[Collection[Head]],
    how: Ablation,
    epsilon: float,
    *,
    max_new_tokens: int,
    rows: int,
    on_progress: Progress | None = None,
) -> list[list[list[int]]]:
    """Greedy answers [groups][prompts] to every prompt with every group silenced throughout.

    Args:
        groups: heads that are silenced together, in prompt and response; () is the intact model.
        rows: (prompt, group) pairs per batch; changes cost and memory, not tokens.
        on_progress: called with (pairs done, pairs in all).

    Raises:
        ModelError: an empty prompt, or logits that are not finite.
        ValueError: `rows` or `max_new_tokens` below 1.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, not {max_new_tokens}")
    require_tokens(prompts, rows)
    answers: list[list[list[int]]] = [[[] for _ in prompts] for _ in groups]
    pairs = [(g, i) for (i,) in by_length(prompts, 1) for g in range(len(groups))]
    if not pairs:
        return answers
    scales = scale_table(loaded, groups, epsilon)
    hooks: Any = [scales]  # all that an editor asks of a hook is `choose`
    editor = Editor(hooks, len(groups))
    with torch.inference_mode(), ablated(loaded, how, scales):
        for start in range(0, len(pairs), rows):
            part = pairs[start : start + rows]
            requests = [Request(g, prompts[i], max_new_tokens) for g, i in part]
            batch = Batch(loaded, editor, requests)
            try:
                responses = batch.run(batch.prefill())
            except NotFinite as error:
                g, i = part[error.row]
                raise not_finite(i, error.step, g) from error
            for (g, i), response in zip(part, responses, strict=True):
                answers[g][i] = response.tokens
            if on_progress is not None:
                on_progress(start + len(part), len(pairs))
    return answers


def _right_size(loaded: LoadedModel, prompts: Sequence[Sequence[int]], rows: int) -> int:
    """Rows of a pass: `rows`, or on a processor what its caches hold if that is less."""
    if loaded.device.type != "cpu":
        return rows
    return max(1, min(rows, TOKENS // max(map(len, prompts))))


def _kl(intact: Tensor, logits: Tensor, head: Head, batch: Sequence[int]) -> Any:
    """KL(intact || ablated) [prompts] in nats, finite."""
    kl = first_token_kl(intact, logits)
    name = f"head {head.head} of layer {head.layer} silenced"
    _require_finite(kl, [(name, i) for i in batch])
    return kl.cpu().numpy()


def _require_finite(values: Tensor, names: Sequence[tuple[str, int]]) -> None:
    finite = torch.isfinite(values)
    if not bool(finite.all()):
        what, prompt = names[int((~finite).nonzero()[0, 0])]
        raise ModelError(
            f"prompt {prompt} with {what}: the next token is not finite; try dtype 'float32'"
        )
