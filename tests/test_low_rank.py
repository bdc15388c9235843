"""Laws of an edit's change as thin factors: the exact is exact, and a stated error is measured."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_edit import NORMALIZATIONS, case, every_normalization

from tasks.numerics.edit import edited_weight, output_edit
from tasks.numerics.low_rank import Factors, change_factors, relative_error, weight_after


@given(
    seed=st.integers(0, 10_000),
    d=st.integers(2, 30),
    inputs=st.integers(2, 40),
    lam=st.floats(-0.5, 2.5, allow_nan=False),
    normalization=st.sampled_from(NORMALIZATIONS),
)
def test_the_weight_after_an_output_edit_is_the_edited_weight(
    seed: int, d: int, inputs: int, lam: float, normalization: str
) -> None:
    weight, v, _ = case(seed, d, inputs)
    edit = output_edit(weight, v, lam, normalization)  # type: ignore[arg-type]
    expected = edited_weight(weight, v, lam, normalization)  # type: ignore[arg-type]
    torch.testing.assert_close(weight_after(weight, edit), expected, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("normalization", ["none", "pre"])
def test_rank_one_is_exact_without_a_factor_per_row(normalization: str) -> None:
    weight, v, _ = case()
    edit = output_edit(weight, v, 0.9, normalization)  # type: ignore[arg-type]
    exact = change_factors(weight, edit, 0.0, torch.float64)
    assert exact.rank == 1
    assert exact.error < 1e-15
    rounded = change_factors(weight, edit, 0.0, torch.float32)
    assert rounded.rank == 1
    assert 0 < rounded.error < 1e-7


def test_rank_one_is_not_exact_where_rows_keep_their_norms() -> None:
    weight, v, _ = case()
    edit = output_edit(weight, v, 0.9, "full")
    one = change_factors(weight, edit, 0.999, torch.float64)
    assert one.rank == 1
    assert one.error > 0.05


@given(
    seed=st.integers(0, 1000),
    lam=st.floats(0.1, 1.5),
    max_error=st.sampled_from([0.0, 1e-4, 1e-2, 0.1, 0.5]),
)
def test_the_rank_is_the_smallest_within_the_error_and_the_error_is_measured(
    seed: int, lam: float, max_error: float
) -> None:
    weight, v, _ = case(seed)
    edit = output_edit(weight, v, lam, "full")
    found = change_factors(weight, edit, max_error, torch.float64)
    change = weight_after(weight, edit) - weight
    left = torch.linalg.matrix_norm(change - found.b @ found.a) / torch.linalg.matrix_norm(change)
    assert found.error == pytest.approx(float(left), rel=1e-6, abs=1e-14)
    assert found.error <= max_error + 1e-7
    if found.rank > 1:
        singular = torch.linalg.svdvals(change)
        one_less = torch.linalg.vector_norm(singular[found.rank - 1 :])
        assert one_less / torch.linalg.vector_norm(singular) > max_error or max_error == 0


@every_normalization
def test_the_error_counts_the_rounding_of_what_is_stored(normalization: str) -> None:
    weight, v, _ = case()
    edit = output_edit(weight, v, 0.9, normalization)  # type: ignore[arg-type]
    errors = [
        change_factors(weight, edit, 1e-6, dtype).error
        for dtype in (torch.float64, torch.float32, torch.bfloat16)
    ]
    assert errors[0] < 1e-6
    assert errors[1] < 2e-6
    assert 1e-4 < errors[2] < 1e-2


@every_normalization
def test_no_change_has_no_error(normalization: str) -> None:
    weight, v, _ = case()
    edit = output_edit(weight, torch.zeros_like(v), 1.0, normalization)  # type: ignore[arg-type]
    found = change_factors(weight, edit, 1e-3, torch.float32)
    assert found.rank == 1
    assert (
        relative_error([found]) < 1e-6 or normalization == "full"
    )  # whose rounding is all there is
    assert torch.allclose(found.b @ found.a, torch.zeros_like(weight).float(), atol=1e-6)


@pytest.mark.parametrize("max_error", [-0.1, 1.0, float("nan")])
def test_an_error_that_is_no_fraction_is_refused(max_error: float) -> None:
    weight, v, _ = case()
    with pytest.raises(ValueError, match="max_error"):
        change_factors(weight, output_edit(weight, v, 1.0, "none"), max_error, torch.float32)


def test_errors_of_several_changes_add_up_by_their_squares() -> None:
    one = torch.ones(1, 1)
    assert relative_error([Factors(one, one, 9.0, 50.0), Factors(one, one, 16.0, 50.0)]) == 0.5
    assert relative_error([]) == 0.0
