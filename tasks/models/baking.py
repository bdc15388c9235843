"""Edits written into a model's weights, for export.

A trial never does this (tasks.models.editing). An exported model must carry its edit itself, and
the tests hold both against each other: the same logits from hooks and from weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from artifacts.errors import ModelError
from tasks.models.anatomy import Anatomy
from tasks.models.editing import Frame, edited_places
from tasks.numerics.edit import RowNormalization, edited_weight


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
    for (layer, component), writer, _, _ in places:
        if writer.quantized:
            raise ModelError(
                f"layer {layer}, {component}: a quantised weight cannot be written; load the model "
                "with quantization 'none' to export it"
            )
    with torch.no_grad():
        for _, writer, v, lam in places:
            for matrix in writer.matrices:
                matrix.copy_(edited_weight(matrix, v, lam, row_normalization))
