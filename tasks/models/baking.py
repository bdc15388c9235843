"""Edits written into a model's weights, for export.

A trial never does this (tasks.models.editing). An exported model must carry its edit itself, and
the tests hold both against each other: the same logits from hooks and from weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from artifacts.errors import ModelError
from tasks.models.anatomy import Anatomy
from tasks.models.editing import Edit, Frame, Place, edited_places, matrix_edits
from tasks.numerics.edit import RowNormalization, edited_weight
from tasks.numerics.low_rank import weight_after


def bake(
    anatomy: Anatomy,
    vectors: Mapping[str, Tensor],
    weights: Mapping[str, Sequence[float]],
    row_normalization: RowNormalization,
    frame: Frame,
) -> None:
    """Write the edit that `build_edit` would make of the same arguments into the weights, in place.

    Computed in float32, stored in the weights' dtype; biases stay. Raises ModelError for quantised
    weights, before anything is written.
    """
    places = list(edited_places(anatomy, vectors, weights, frame))
    require_writable(anatomy, [place for place, *_ in places])
    with torch.no_grad():
        for _, writer, v, lam in places:
            for matrix in writer.matrices:
                matrix.copy_(edited_weight(matrix, v, lam, row_normalization))


def bake_edit(anatomy: Anatomy, edit: Edit) -> None:
    """Write an edit that a trial ran as hooks into the weights, in place.

    Computed in float32, stored in the weights' dtype; biases stay. Raises ModelError for quantised
    weights, before anything is written.
    """
    require_writable(anatomy, edit.modules)
    with torch.no_grad():
        for (layer, component), edits in edit.modules.items():
            for matrix, output_edit in matrix_edits(anatomy.writers[layer][component], edits):
                matrix.copy_(weight_after(matrix, output_edit))


def require_writable(anatomy: Anatomy, places: Iterable[Place]) -> None:
    """Refuse weights that are stored packed.

    Raises:
        ModelError: naming the first.
    """
    for layer, component in places:
        if anatomy.writers[layer][component].quantized:
            raise ModelError(
                f"layer {layer}, {component}: a quantised weight cannot be written; load the model "
                "with quantization 'none' to export it"
            )
