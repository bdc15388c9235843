"""Keys and values in memory that is allocated once, for batches that only ever lose rows.

transformers' dynamic cache copies everything it holds at every new token. Greedy decoding knows
its longest length beforehand, so here a token is written into its place and attention reads a
view. Two more things follow: a prompt batch can be prefilled in slices of rows that fit the
processor's caches, and a finished row leaves by having the last live row moved into its place,
which copies one row instead of all of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)


class RowLayer(CacheLayerMixin):  # type: ignore[misc]  # transformers is untyped
    """One layer's keys and values, [rows, heads, positions, head size].

    Until `length` is set the layer is being prefilled: what comes in is stored for the rows that
    begin at `first_row`, right-aligned at `prompt_length`, and handed back behind the `front`
    positions that all rows share. A sliding-window layer is stored whole; the model's mask does
    the sliding.
    """

    is_sliding = False

    def __init__(self, rows: int, prompt_length: int, new_tokens: int) -> None:
        super().__init__()
        self.rows = rows
        self.prompt_length = prompt_length
        self.capacity = prompt_length + new_tokens
        self.front = 0
        self.first_row = 0
        self.length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate zeros: padding that a slice does not reach is masked, but must be finite."""
        _, heads, _, size = key_states.shape
        self.keys = key_states.new_zeros(self.rows, heads, self.capacity, size)
        self.values = value_states.new_zeros(
            self.rows, heads, self.capacity, value_states.shape[-1]
        )
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store new states and return all that the rows of this batch attend to."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        rows, _, count, _ = key_states.shape
        if self.length == 0:
            return self._prefill(key_states, value_states)
        end = self.length + count
        self.keys[:rows, :, self.length : end] = key_states
        self.values[:rows, :, self.length : end] = value_states
        self.length = end
        return self.keys[:rows, :, :end], self.values[:rows, :, :end]

    def _prefill(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        first, end, begin = self.first_row, self.first_row + len(keys), -keys.shape[2]
        places = slice(self.prompt_length + begin, self.prompt_length)
        self.keys[first:end, :, places] = keys
        self.values[first:end, :, places] = values
        if not self.front:
            return keys, values
        shared = slice(0, self.front)
        return (
            torch.cat([self.keys[first:end, :, shared], keys], 2),
            torch.cat([self.values[first:end, :, shared], values], 2),
        )

    def share_front(self, layer: RowLayer) -> None:
        """Begin every row with the positions of `layer`, which has one row."""
        self.front = layer.prompt_length
        if not layer.is_initialized:
            return  # a layer that is left out
        if not self.is_initialized:
            self.lazy_initialization(layer.keys, layer.values)
        self.keys[:, :, : self.front] = layer.keys[:, :, : self.front]
        self.values[:, :, : self.front] = layer.values[:, :, : self.front]

    def get_seq_length(self) -> int:
        """Positions that a new token finds; none but the front while prefilling."""
        return self.length or self.front

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of what the next `update` returns."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """Positions that fit."""
        return self.capacity

    def copy_rows(self, source: RowLayer, rows: Tensor, first: int, front: int) -> None:
        """Make the rows from `first` on the prompts of rows `rows` of another layer.

        The `front` positions stay at the left, the others at the right end of the prompt.
        """
        if not source.is_initialized:
            return
        if not self.is_initialized:
            self.lazy_initialization(source.keys, source.values)
        width, rows = source.prompt_length, rows.to(source.keys.device)
        begin = self.prompt_length - (width - front)
        for ours, theirs in ((self.keys, source.keys), (self.values, source.values)):
            found, target = theirs[rows, :, :width], ours[first : first + len(rows)]
            target[:, :, :front] = found[:, :, :front]
            target[:, :, begin : self.prompt_length] = found[:, :, front:]

    def move(self, source: Tensor, target: Tensor) -> None:
        """Copy rows `source` over rows `target`, on whichever device this layer is."""
        if not self.is_initialized:
            return
        source, target = source.to(self.keys.device), target.to(self.keys.device)
        self.keys[target] = self.keys[source]
        self.values[target] = self.values[source]


class RowCache(Cache):  # type: ignore[misc]  # transformers is untyped
    """A `RowLayer` per layer of the model."""

    def share_front(self, cache: RowCache) -> None:
        """Begin every row with what the one row of `cache` holds."""
        for layer, shared in zip(self.layers, cache.layers, strict=True):
            layer.share_front(shared)

    def copy_rows(
        self, source: RowCache, rows: Tensor, *, first: int, front: int, layers: slice
    ) -> None:
        """`RowLayer.copy_rows` of some layers."""
        pairs = list(zip(self.layers, source.layers, strict=True))
        for layer, other in pairs[layers]:
            layer.copy_rows(other, rows, first, front)

    def prefill_from(self, first_row: int) -> None:
        """Say which rows the next prompt slice fills: those that begin at `first_row`."""
        for layer in self.layers:
            layer.first_row = first_row

    def end_prefill(self) -> None:
        """From now on every forward pass appends its tokens to the first rows."""
        for layer in self.layers:
            layer.length = layer.prompt_length

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Make row i what row `beam_idx[i]` was; copies only rows that change place.

        Sources must not be among the rows that are overwritten: `compaction` sees to that.
        """
        target = (beam_idx != torch.arange(len(beam_idx), device=beam_idx.device)).nonzero()[:, 0]
        source = beam_idx[target]
        for layer in self.layers:
            layer.move(source, target)


def compaction(alive: Tensor) -> Tensor:
    """Where the rows of a batch without its finished ones come from, moving as few as possible.

    Args:
        alive: bool [rows].

    Returns:
        int64 [number alive]: i itself where row i is alive, else a live row from the end.
    """
    count = int(alive.sum())
    order = torch.arange(count, device=alive.device)
    order[~alive[:count]] = alive[count:].nonzero()[:, 0] + count
    return order


def row_cache(config: Any, rows: int, prompt_length: int, new_tokens: int) -> Any:
    """A `RowCache` if the model's state is plain attention, else transformers' own cache.

    Recurrent, indexed and shared states (Qwen3.5, Gemma 3n) keep transformers' layers: slower,
    prefilled in one piece, and the same tokens.
    """
    cache = DynamicCache(config=config)
    plain = {DynamicLayer, DynamicSlidingWindowLayer}
    if not cache.layers or {type(layer) for layer in cache.layers} - plain:
        return cache
    return RowCache(layers=[RowLayer(rows, prompt_length, new_tokens) for _ in cache.layers])
