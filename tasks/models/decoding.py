"""Greedy decoding of many prompts under many edits: the hot path of a study.

The tokens are exactly those of `model.generate(do_sample=False)` without penalties. What differs
is the cost: one prefill gives the first-token logits and the first token, rows of several edits
share a batch, keys and values are written in place, and a row that has ended leaves the batch.
Prompts are prefilled in slices of `SLICE_TOKENS` tokens, because a batch that is large enough to
decode well has prompt activations that no processor cache holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from artifacts.errors import ModelError
from tasks.models.batching import by_length, pad_left, require_tokens
from tasks.models.editing import Edit, Editor, applied
from tasks.models.row_cache import RowCache, compaction, row_cache

if TYPE_CHECKING:
    from tasks.models.loading import LoadedModel

Progress = Callable[[int, int], None]

SLICE_TOKENS = 2048
UNUSED = -1  # in the table of produced tokens: this row had ended before


@dataclass(frozen=True)
class Request:
    """One response to decode: under which edit, after which tokens, of how many at most."""

    edit: int
    tokens: Sequence[int]
    limit: int


@dataclass(frozen=True)
class Response:
    """New tokens without the end-of-sequence token, and whether there was one."""

    tokens: list[int]
    ended: bool


@dataclass(frozen=True)
class Decoded:
    """What one edit answered, in the order of the prompts.

    Attributes:
        tokens: new tokens per prompt, without the end-of-sequence token.
        ended: whether the response ended by itself within `max_new_tokens`.
        first_logits: float32 [prompts, vocabulary] on the CPU, raw logits of the first new token.
    """

    tokens: list[list[int]]
    ended: list[bool]
    first_logits: Tensor


def decode(
    loaded: LoadedModel,
    prompts: Sequence[Sequence[int]],
    edits: Sequence[Edit] = (),
    *,
    max_new_tokens: int,
    rows: int,
    on_progress: Progress | None = None,
) -> list[Decoded]:
    """Decode every prompt under every edit; no edits means the model as it is.

    Args:
        loaded: the model; its generation settings other than end-of-sequence ids do not count.
        prompts: token lists, rendered and encoded.
        edits: one `Decoded` each, in this order.
        max_new_tokens: longest response, in tokens, an end-of-sequence token included.
        rows: (prompt, edit) pairs per batch; changes cost and memory, not tokens.
        on_progress: called with (pairs done, pairs in all).

    Raises:
        ModelError: an empty prompt, or logits that are not finite; names the prompt's index.
        ValueError: `rows` or `max_new_tokens` below 1.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, not {max_new_tokens}")
    require_tokens(prompts, rows)
    variants, vocabulary = max(len(edits), 1), loaded.model.config.get_text_config().vocab_size
    decoded = [
        Decoded([[] for _ in prompts], [False] * len(prompts), logits)
        for logits in torch.empty(variants, len(prompts), vocabulary)
    ]
    pairs = [(variant, i) for (i,) in by_length(prompts, 1) for variant in range(variants)]
    requests = [Request(variant, prompts[i], max_new_tokens) for variant, i in pairs]
    done = 0
    with torch.inference_mode(), _editing(loaded, edits) as editor:
        for start in range(0, len(pairs), rows):
            batch = Batch(loaded, editor if variants > 1 else None, requests[start : start + rows])
            with _naming_prompts(pairs[start : start + rows], variants):
                logits = batch.prefill()
                responses = batch.run(logits)
            places = zip(pairs[start : start + rows], responses, logits.float().cpu(), strict=True)
            for (variant, index), response, first in places:
                decoded[variant].tokens[index] = response.tokens
                decoded[variant].ended[index] = response.ended
                decoded[variant].first_logits[index] = first
            done += len(responses)
            if on_progress is not None:
                on_progress(done, len(pairs))
    return decoded


def eos_ids(loaded: LoadedModel) -> list[int]:
    """Every token that ends a response: the generation settings' and the tokenizer's, sorted."""
    configured = getattr(loaded.model.generation_config, "eos_token_id", None)
    ids = set(configured if isinstance(configured, list | tuple) else [configured])
    ids.add(getattr(loaded.tokenizer, "eos_token_id", None))
    return sorted(int(token) for token in ids if token is not None)


def _editing(loaded: LoadedModel, edits: Sequence[Edit]) -> Any:
    return applied(loaded.anatomy, edits) if edits else nullcontext()


class NotFinite(Exception):
    """Logits of a row are not finite: its place in its batch and the new token's number."""

    def __init__(self, row: int, step: int) -> None:
        super().__init__(row, step)
        self.row, self.step = row, step


@contextmanager
def _naming_prompts(pairs: Sequence[tuple[int, int]], variants: int) -> Iterator[None]:
    try:
        yield
    except NotFinite as error:
        variant, index = pairs[error.row]
        raise not_finite(index, error.step, variant if variants > 1 else None) from error


def not_finite(prompt: int, step: int, edit: int | None = None) -> ModelError:
    """The error of logits that are not finite."""
    return ModelError(
        f"logits of prompt {prompt} are not finite at new token {step}"
        + (f" under edit {edit}" if edit is not None else "")
        + "; try dtype 'float32' or a smaller edit"
    )


class Batch:
    """Requests decoded together, from prompt to last token.

    Row i of every per-row tensor belongs to request `order[i]`; rows change place when one leaves.
    Prompts lie right-aligned in `width` places, apart from `front` tokens that all share, which
    lie at the left.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        editor: Editor | None,
        requests: Sequence[Request],
        *,
        width: int | None = None,
        front: int = 0,
    ) -> None:
        self.loaded, self.editor = loaded, editor
        self.prompts = [request.tokens for request in requests]
        self.width = width or max(map(len, self.prompts))
        limits = [request.limit for request in requests]
        self.room = max(limits)
        self.limits = self._tensor(limits)
        self.variants = self._tensor([request.edit for request in requests])
        self.positions = self._tensor([len(prompt) for prompt in self.prompts])[:, None]
        self.order = torch.arange(len(requests), device=loaded.device)
        self.eos = self._tensor(eos_ids(loaded))
        self.produced = self.order.new_full((len(requests), self.room), UNUSED)
        places = torch.arange(self.width + self.room, device=loaded.device)
        self.mask = prompt_mask(places, self.positions, self.width, front)

    def _tensor(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=self.loaded.device)

    def prefill(self) -> Tensor:
        """Fill the cache; return the logits [rows, vocabulary] that follow the prompts."""
        self.cache = row_cache(self.loaded.model.config, len(self.prompts), self.width, self.room)
        sliced = isinstance(self.cache, RowCache)
        step = max(SLICE_TOKENS // self.width, 1) if sliced else len(self.prompts)
        parts = []
        for first in range(0, len(self.prompts), step):
            if sliced:
                self.cache.prefill_from(first)
            parts.append(self._prefill_slice(first, first + step))
        if sliced:
            self.cache.end_prefill()
        self._carry(self.variants)
        return torch.cat(parts)

    def run(self, logits: Tensor) -> list[Response]:
        """One forward pass per token until every row has ended; responses by request."""
        return self._run(self._best(logits, 0))

    def resume(self, cache: RowCache, tokens: Tensor) -> list[Response]:
        """The same, from the prompts' keys and values and the first token of each response."""
        self.cache = cache
        self._carry(self.variants)
        return self._run(tokens)

    def _run(self, tokens: Tensor) -> list[Response]:
        for step in range(self.room):
            self.produced[self.order, step] = tokens
            tokens = self._drop_ended(tokens, step)
            if not len(tokens):
                break
            tokens = self._best(self._next_logits(tokens), step + 1)
        return self._responses()

    def _next_logits(self, tokens: Tensor) -> Tensor:
        """Append one token per live row; return the logits that follow, [live rows, vocabulary]."""
        self.width += 1
        mask = self.mask[:, : self.width]
        logits = self._forward(tokens[:, None], mask, self.positions)
        self.positions += 1
        return logits

    def _responses(self) -> list[Response]:
        """What every request was answered, in the requests' order."""
        eos, found = set(self.eos.tolist()), []
        for row in self.produced.tolist():
            tokens = [token for token in row if token != UNUSED]
            ended = tokens[-1] in eos
            found.append(Response(tokens[:-1] if ended else tokens, ended))
        return found

    def _prefill_slice(self, first: int, end: int) -> Tensor:
        ids, mask, positions = pad_left(self.prompts[first:end], self.loaded.device)
        self._carry(self.variants[first:end])
        return self._forward(ids, mask, positions)

    def _carry(self, variants: Tensor) -> None:
        """Tell the hooks which edit each row of the coming forward passes carries."""
        if self.editor is not None:
            self.editor.rows = variants

    def _forward(self, ids: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        output = self.loaded.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: Tensor = output.logits[:, -1]
        return logits

    def _drop_ended(self, tokens: Tensor, step: int) -> Tensor:
        """Forget rows that are at their end; return the tokens of those that go on."""
        alive = ~torch.isin(tokens, self.eos) & (self.limits > step + 1)
        if bool(alive.all()):
            return tokens
        keep = compaction(alive)
        if not len(keep):
            return tokens[keep]
        self.cache.reorder_cache(keep)
        self.order, self.variants = self.order[keep], self.variants[keep]
        self.positions, self.mask = self.positions[keep], self.mask[keep]
        self.limits = self.limits[keep]
        self._carry(self.variants)
        return tokens[keep]

    def _best(self, logits: Tensor, step: int) -> Tensor:
        """The most likely token of each live row. The largest logit is NaN if any is."""
        best, tokens = logits.max(-1)
        finite = torch.isfinite(best)
        if not bool(finite.all()):
            raise NotFinite(int(self.order[int((~finite).nonzero()[0])]), step)
        return tokens


def prompt_mask(places: Tensor, lengths: Tensor, width: int, front: int) -> Tensor:
    """Which places a row attends to, int64 [rows, places]: its prompt, and all from `width` on."""
    return ((places < front) | (places >= width - (lengths - front))).long()
