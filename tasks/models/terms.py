"""Edits of one module as it runs: what its forward hook does to the rows of a batch.

A linear map is edited at its output. A mixture of experts is edited once, at its summed output,
where the edit is the same operation for every expert, as it is without row normalisation; the
experts' biases are kept out of it by the routing weights that the module is called with. With row
normalisation every expert has an operation of its own, so each (token, expert) pair is run as a
token of its own, edited, and the pairs are summed here: every expert computes what it would have
computed, and no weight is touched.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from artifacts.errors import ModelError
from tasks.models.anatomy import Experts, Writer
from tasks.numerics.edit import OutputEdit


@dataclass(frozen=True)
class Terms:
    """Edits of one module's biased output: y' = scale * y + shift + (read.y) write.

    Each is [edits, ..., d], where the axis between, if any, is that of the experts; `scale` and
    `shift` are None where they would be all ones and all zeros. The bias is folded in, so a row
    that is left alone is times 1 plus 0 and stays the same bit for bit. Products and sums run along
    d only, so no row depends on its neighbours.
    """

    read: Tensor
    write: Tensor
    scale: Tensor | None
    shift: Tensor | None

    def __call__(self, y: Tensor) -> Tensor:
        """Edit `y` [rows, tokens, ..., d]."""
        amount = (y * self.read).sum(-1, keepdim=True)
        base = y if self.scale is None else y * self.scale
        if self.shift is not None:
            base = base + self.shift
        return torch.addcmul(base, amount, self.write)

    def of(self, *index: Tensor) -> Terms:
        """The terms at `index` of the leading axes."""
        scale = None if self.scale is None else self.scale[index]
        shift = None if self.shift is None else self.shift[index]
        return Terms(self.read[index], self.write[index], scale, shift)

    def shared(self, weights: Tensor) -> Terms:
        """The terms of an output that has been multiplied with `weights` [..., 1]."""
        shift = None if self.shift is None else self.shift * weights
        return Terms(self.read, self.write, self.scale, shift)


def _terms(edits: Sequence[OutputEdit | None], bias: Tensor | None) -> Terms:
    """The terms of one module under each of `edits`; None is an edit that leaves it alone.

    `bias` is [d], or [experts, d] where an edit has an operation per expert.
    """
    made = [edit for edit in edits if edit is not None]
    shape = max((edit.a.shape for edit in made), key=len)
    zeros, ones = made[0].a.new_zeros(shape), made[0].a.new_ones(shape)
    read = torch.stack([zeros if edit is None else edit.a.expand(shape) for edit in edits])
    b = torch.stack([zeros if edit is None else edit.b.expand(shape) for edit in edits])
    scales = [None if edit is None else edit.s for edit in edits]
    s = torch.stack([ones if scale is None else scale.expand(shape) for scale in scales])
    write = s * b
    shift = None
    if bias is not None:
        bias = bias.to(s)
        shift = (1 - s) * bias - (read * bias).sum(-1, keepdim=True) * write
    scaled = any(scale is not None for scale in scales)
    return Terms(read, write, s if scaled else None, shift)


class Hook:
    """Edits the output of one linear map, under one edit or a batch of several."""

    def __init__(self, edits: Sequence[OutputEdit | None], bias: Tensor | None) -> None:
        self.terms = _terms(edits, bias)
        self.choose(torch.zeros(1, dtype=torch.int64) if len(edits) == 1 else None)

    def choose(self, rows: Tensor | None) -> None:
        """Say which edit each row of the next forward passes carries, int64 [rows].

        One row stands for all of them where there is one edit; None takes the choice back.
        """
        self._rows = None if rows is None else rows.to(self.terms.read.device)
        self._of_rows = self.terms if self._rows is None else self._look_up(self._rows)

    def attach(self, module: nn.Module) -> list[Any]:
        """Hook into the module; returns the handles that undo it."""
        return [module.register_forward_hook(self.leave)]

    def leave(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        """The edited output, [rows, tokens, d] or [rows * tokens, d], in the output's dtype."""
        edited = self._of_rows(self._by_row(output.float()))
        return edited.view(output.shape).to(output.dtype)

    def _look_up(self, rows: Tensor) -> Terms:
        return self.terms.of(rows[:, None])

    @property
    def _edits(self) -> Tensor:
        """The edit of each row, [rows]."""
        if self._rows is None:
            count = len(self.terms.read)
            raise ValueError(f"{count} edits are applied but no row says which it carries")
        return self._rows

    def _by_row(self, values: Tensor) -> Tensor:
        """[rows, tokens, n] of that or of [rows * tokens, n]."""
        rows = len(self._edits)
        return values if values.dim() == 3 else values.reshape(rows, -1, values.shape[-1])


class SummedHook(Hook):
    """Edits the summed output of experts with biases, by an edit that is one for all of them.

    The sum holds sum_e w_e bias_e, which no edit of a weight touches. Its part of read.y is a
    number per expert, and the module is told which experts a token passes and their weights w.
    """

    def __init__(self, edits: Sequence[OutputEdit | None], bias: Tensor) -> None:
        super().__init__(edits, None)
        self.of_bias = self.terms.read @ bias.to(self.terms.read).T  # [edits, experts]

    def leave(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        """The edited sum [rows * tokens, d], in the output's dtype."""
        _, index, weights = (self._by_row(arg) for arg in _call(module, args))
        unread = (self.of_bias[self._edits[:, None, None], index] * weights).sum(-1, keepdim=True)
        edited = self._of_rows(self._by_row(output.float())) - unread * self._of_rows.write
        return edited.view(output.shape).to(output.dtype)


class EachHook(Hook):
    """Edits what every expert adds, by an edit that differs from expert to expert.

    Moves k outputs per token instead of one; the experts' own work is the same.
    """

    def attach(self, module: nn.Module) -> list[Any]:
        """Hook into the way in too."""
        return [module.register_forward_pre_hook(self.enter), *super().attach(module)]

    def enter(self, module: nn.Module, args: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Every token k times, each time with one of its k experts."""
        hidden, self._index, self._weights = _call(module, args)
        pairs = hidden.repeat_interleave(self._index.shape[-1], dim=0)
        return pairs, self._index.reshape(-1, 1), self._weights.reshape(-1, 1)

    def leave(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        """The edited sum [rows * tokens, d] of what the pairs give, in their dtype."""
        index, weights = self._by_row(self._index), self._by_row(self._weights)
        of_pairs = self.terms.of(self._edits[:, None, None], index).shared(
            weights[..., None].float()
        )
        edited = of_pairs(output.float().view(*index.shape, -1)).sum(-2)
        return edited.view(len(self._index), -1).to(output.dtype)

    def _look_up(self, rows: Tensor) -> Terms:
        return self.terms  # per token, once its experts are known: per row would be gigabytes


def hook(writer: Writer, edits: Sequence[OutputEdit | None]) -> Hook:
    """The hook that edits what `writer` writes; an edit that is None leaves it alone."""
    if not isinstance(writer, Experts):
        return Hook(edits, writer.bias)
    if any(edit is not None and edit.a.dim() > 1 for edit in edits):
        return EachHook(edits, writer.bias)
    return Hook(edits, None) if writer.bias is None else SummedHook(edits, writer.bias)


def _call(module: nn.Module, args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """A mixture's hidden states [tokens, d], experts [tokens, k] and their weights [tokens, k]."""
    if len(args) != 3 or any(arg.dim() != 2 for arg in args):
        raise ModelError(
            f"module '{type(module).__name__}' is not called with tokens, experts and weights; "
            "its experts cannot be edited"
        )
    hidden, index, weights = args
    return hidden, index, weights
