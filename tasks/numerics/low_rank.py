"""The change that an edit makes to a weight, as a product of two thin matrices.

An adapter stores W' - W as B A, with B [d, r] and A [r, inputs]. Where an edit has no factor per
row, its change is an outer product and r = 1 is exact. With one, the change is diag(s - 1) W and
an outer product: of full rank as a rule, so a low rank is an approximation with a stated error.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tasks.numerics.edit import OutputEdit


@dataclass(frozen=True)
class Factors:
    """W' - W as `b @ a`: `b` [d, r], `a` [r, inputs].

    `squared_error` and `squared_size` are ||b a - (W' - W)||^2 and ||W' - W||^2 (Frobenius), so
    that errors of several weights add up. `error` is the root of their quotient.
    """

    b: Tensor
    a: Tensor
    squared_error: float
    squared_size: float

    @property
    def rank(self) -> int:
        return int(self.b.shape[1])

    @property
    def error(self) -> float:
        """Relative Frobenius error, a fraction of the change; 0 for no change at all."""
        return relative_error([self])


def relative_error(factors: list[Factors]) -> float:
    """The Frobenius error of several changes together, as a fraction of them."""
    size = sum(f.squared_size for f in factors)
    return float((sum(f.squared_error for f in factors) / size) ** 0.5) if size else 0.0


def weight_after(weight: Tensor, edit: OutputEdit) -> Tensor:
    """The weight [d, inputs] of a module whose output is edited: diag(s) (W + b (a W)).

    `weight` [d, inputs]. In its precision, float32 at least.
    """
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    edited = wide + torch.outer(edit.b.to(wide), edit.a.to(wide) @ wide)
    return edited if edit.s is None else edit.s.to(wide)[:, None] * edited


def change_factors(
    weight: Tensor, edit: OutputEdit, max_error: float, dtype: torch.dtype
) -> Factors:
    """The change of a weight, of the smallest rank whose error is at most `max_error`.

    Rank 1 without a singular value decomposition where the edit has no factor per row. The error is
    measured on the factors as they are returned, in `dtype`, so rounding is part of it; the rank is
    chosen before rounding.

    `weight` [d, inputs]; `max_error` a fraction of the change's Frobenius norm. Raises ValueError
    for one that is not in [0, 1).
    """
    if not 0 <= max_error < 1:
        raise ValueError(f"max_error is at least 0 and below 1, not {max_error}")
    wide = weight.double()
    change = weight_after(wide, edit) - wide
    b, a = _outer(wide, edit) if edit.s is None else _truncated(change, max_error)
    b, a = b.to(dtype).contiguous(), a.to(dtype).contiguous()
    left = change - b.double() @ a.double()
    return Factors(b, a, _squared(left), _squared(change))


def _outer(weight: Tensor, edit: OutputEdit) -> tuple[Tensor, Tensor]:
    return edit.b.to(weight)[:, None], (edit.a.to(weight) @ weight)[None, :]


def _truncated(change: Tensor, max_error: float) -> tuple[Tensor, Tensor]:
    """Factors of the smallest rank, 1 at least; both carry the root of the singular values.

    By the eigenvectors of change change^T [d, d], which take a fraction of the time of a singular
    value decomposition where a weight is much wider than high. They find singular values down to
    1e-8 of the largest, far below what factors in float32 can hold.
    """
    squares, u = torch.linalg.eigh(change @ change.T)
    squares, u = squares.clamp(min=0).flip(0), u.flip(1)
    left = squares.flip(0).cumsum(0).flip(0)  # left[r]: squared error of rank r
    rank = max(1, int((left > max_error**2 * left[0]).sum()))
    rows = u[:, :rank].T @ change
    root = torch.linalg.vector_norm(rows, dim=1).sqrt().clamp(min=torch.finfo(rows.dtype).tiny)
    return u[:, :rank] * root, rows / root[:, None]


def _squared(matrix: Tensor) -> float:
    return float(matrix.square().sum())
