"""Edits of a running model: forward hooks that change what modules write to the residual stream.

The weights stay as they are, so a trial costs two matrix-vector products per edited module to make
and O(d) per token to run, nothing has to be undone, and rows of one batch can carry different
edits. A module that an edit leaves alone gets no hook: the identity edit is the unedited model, bit
for bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from tasks.models.anatomy import Anatomy, Experts, Writer
from tasks.models.terms import Hook, hook
from tasks.numerics.edit import OutputEdit, RowNormalization, output_edit, stream_direction

Frame = Literal["module", "residual"]
Place = tuple[int, str]  # layer, component


@dataclass(frozen=True)
class Edit:
    """One trial's edit: operations per edited (layer, component), on their modules' devices.

    One operation for each part of the place's writer, in the order of `Writer.parts`; `a`, `b`, `s`
    are [experts, d] where every expert has its own.
    """

    modules: Mapping[Place, tuple[OutputEdit, ...]]


def build_edit(
    anatomy: Anatomy,
    vectors: Mapping[str, Tensor],
    weights: Mapping[str, Sequence[float]],
    row_normalization: RowNormalization,
    frame: Frame,
) -> Edit:
    """The edit that takes `vectors` out of what each layer's components write.

    `vectors[component]` [L, d]: unit directions in residual space; `weights[component]`: L numbers,
    0 for a layer that is not edited. `frame` "module" removes the direction from the module's
    output as the published methods do; "residual" removes it from what reaches the stream, which
    differs where a norm follows. Raises ValueError for a wrong shape or a direction that is not
    finite.
    """
    modules: dict[Place, tuple[OutputEdit, ...]] = {}
    for place, writer, v, lam in edited_places(anatomy, vectors, weights, frame):
        made = _output_edit(writer, v, lam, row_normalization)
        modules[place] = (*modules.get(place, ()), made)
    return Edit(modules)


def _output_edit(writer: Writer, v: Tensor, lam: float, how: RowNormalization) -> OutputEdit:
    """The operation that edits what `writer` writes, experts one at a time to spare memory.

    Without row normalisation it does not depend on the weight, and is one for all experts.
    """
    if how == "none" or not isinstance(writer, Experts):
        return output_edit(writer.matrices[0], v, lam, how)
    each = [output_edit(matrix, v, lam, how) for matrix in writer.matrices]
    scales = [edit.s for edit in each if edit.s is not None]
    return OutputEdit(
        torch.stack([edit.a for edit in each]),
        torch.stack([edit.b for edit in each]),
        torch.stack(scales) if scales else None,
    )


def edited_places(
    anatomy: Anatomy,
    vectors: Mapping[str, Tensor],
    weights: Mapping[str, Sequence[float]],
    frame: Frame,
) -> Iterator[tuple[Place, Writer, Tensor, float]]:
    """Every (layer, component) of weight other than 0, its writer, output direction and weight.

    A place comes once for each part of its writer: twice where a shared expert stands beside the
    others. Each part has a weight of its own, [d, inputs] or [experts, d, inputs]. Arguments and
    errors are those of `build_edit`.
    """
    if frame not in ("module", "residual"):
        raise ValueError(f"frame '{frame}' is none of module, residual")
    shape = (len(anatomy.layers), anatomy.hidden_size)
    for component, lams in weights.items():
        directions = vectors[component]
        if tuple(directions.shape) != shape or len(lams) != shape[0]:
            raise ValueError(
                f"{component}: directions {tuple(directions.shape)} and {len(lams)} weights do not "
                f"fit a model of {shape[0]} layers and hidden size {shape[1]}"
            )
        for layer, lam in enumerate(lams):
            if lam == 0:
                continue
            if not torch.isfinite(directions[layer]).all():
                raise ValueError(f"the direction of layer {layer}, {component}, is not finite")
            writer = anatomy.writers[layer][component]
            gain = writer.gain if frame == "residual" else None
            v = directions[layer].to(writer.device, torch.float32)
            u = stream_direction(v, gain)
            for part in writer.parts:
                yield (layer, component), part, u.to(part.device), lam


def matrix_edits(
    writer: Writer, edits: Sequence[OutputEdit]
) -> Iterator[tuple[Tensor, OutputEdit]]:
    """Every matrix [d, inputs] of a place's writer with its own operation, `a`, `b`, `s` [d]."""
    for part, edit in zip(writer.parts, edits, strict=True):
        for number, matrix in enumerate(part.matrices):
            shared = edit.a.ndim == 1
            scale = edit.s if shared or edit.s is None else edit.s[number]
            own = edit if shared else OutputEdit(edit.a[number], edit.b[number], scale)
            yield matrix, own


class Editor:
    """Says which edit each row of the next forward pass carries."""

    def __init__(self, hooks: Sequence[Hook], n_edits: int) -> None:
        self._hooks = hooks
        self._n_edits = n_edits
        self._rows: Tensor | None = None

    @property
    def rows(self) -> Tensor | None:
        """Index into the edits of each row, int64 [batch]; None: every row has the only edit.

        May be set anew before any forward pass. Raises ValueError for an index that names no edit.
        """
        return self._rows

    @rows.setter
    def rows(self, rows: Tensor | None) -> None:
        if rows is not None and rows.numel():
            low, high = int(rows.min()), int(rows.max())
            if low < 0 or high >= self._n_edits:
                raise ValueError(f"rows {low}..{high} name none of the {self._n_edits} edits")
        self._rows = rows
        if self._n_edits > 1:
            for each in self._hooks:
                each.choose(rows)


@contextmanager
def applied(anatomy: Anatomy, edits: Sequence[Edit]) -> Iterator[Editor]:
    """Hook `edits` into the model for the time of the block.

    Every module touched by any edit gets one hook; rows whose edit leaves that module alone pass it
    unchanged. Outputs keep their dtype; the edit is computed in float32.
    """
    hooks = list(_hooks(anatomy, edits))
    editor = Editor([made for _, made in hooks], len(edits))
    handles: list[Any] = []
    try:
        for writer, made in hooks:
            handles += made.attach(writer.module)
        yield editor
    finally:
        for handle in handles:
            handle.remove()


def _hooks(anatomy: Anatomy, edits: Sequence[Edit]) -> Iterator[tuple[Writer, Hook]]:
    for layer, component in sorted({place for edit in edits for place in edit.modules}):
        of_place = [edit.modules.get((layer, component)) for edit in edits]
        for index, part in enumerate(anatomy.writers[layer][component].parts):
            yield part, hook(part, [None if made is None else made[index] for made in of_place])
