"""Captured residuals are those of the plain forward pass, whatever the batch and the padding."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import HIDDEN, LAYERS, NAMES, VOCAB, each, tiny_model

from artifacts.errors import ModelError
from tasks.models.anatomy import anatomy
from tasks.models.capture import capture_residuals
from tasks.models.loading import LoadedModel

# transformers puts the final norm's output, not the last layer's, at the end of hidden_states
LAST = LAYERS


def loaded(name: str = "llama") -> LoadedModel:
    model = tiny_model(name)
    return LoadedModel(model, None, anatomy(model), torch.device("cpu"), "float32", name)


def prompts(count: int = 7) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [
        torch.randint(3, VOCAB, (1 + 4 * i % 9,), generator=generator).tolist()
        for i in range(count)
    ]


@pytest.mark.parametrize("name", each(NAMES))
def test_states_are_those_of_an_unpadded_forward_pass(name: str) -> None:
    held = loaded(name)
    residuals = capture_residuals(held, prompts(), rows=3)
    assert residuals.shape == (7, LAYERS + 1, HIDDEN)
    assert residuals.dtype == np.float32
    for prompt, found in zip(prompts(), residuals, strict=True):
        with torch.inference_mode():
            output = held.model(torch.tensor([prompt]), output_hidden_states=True, use_cache=False)
        expected = torch.stack([state[0, -1] for state in output.hidden_states]).numpy()
        np.testing.assert_allclose(found[:LAST], expected[:LAST], atol=1e-5, rtol=1e-5)
        normed = held.anatomy.final_norm(torch.from_numpy(found[LAST])).detach().numpy()
        np.testing.assert_allclose(normed, expected[LAST], atol=1e-5, rtol=1e-5)
        assert not np.allclose(found[LAST], expected[LAST], atol=1e-2), "before the final norm"


@given(rows=st.integers(1, 8), order=st.permutations(range(7)))
@settings(max_examples=15, deadline=None)
def test_rows_and_order_change_nothing_but_rounding(rows: int, order: list[int]) -> None:
    held = loaded()
    expected = capture_residuals(held, prompts(), rows=1)[order]
    found = capture_residuals(held, [prompts()[i] for i in order], rows=rows)
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=1e-5)


def test_the_same_call_gives_the_same_bits() -> None:
    held = loaded()
    one, two = (capture_residuals(held, prompts(), rows=3) for _ in range(2))
    assert one.tobytes() == two.tobytes()


def test_other_tokens_give_other_residuals() -> None:
    residuals = capture_residuals(loaded(), [[5, 6, 7], [8, 6, 7]], rows=2)
    assert np.array_equal(residuals[0, 0], residuals[1, 0]), "state 0 sees the last token alone"
    assert not np.allclose(residuals[0, 1:], residuals[1, 1:], atol=1e-3)


def test_hooks_are_removed_and_bfloat16_comes_out_as_float32() -> None:
    held = loaded()
    held.model.bfloat16()
    assert capture_residuals(held, prompts(), rows=4).dtype == np.float32
    assert not any(
        layer._forward_hooks or layer._forward_pre_hooks for layer in held.anatomy.layers
    )


def test_no_prompts_give_no_rows() -> None:
    assert capture_residuals(loaded(), [], rows=4).shape == (0, LAYERS + 1, HIDDEN)


def test_progress_counts_prompts() -> None:
    seen: list[tuple[int, int]] = []
    capture_residuals(loaded(), prompts(), rows=3, on_progress=lambda *at: seen.append(at))
    assert seen == [(3, 7), (6, 7), (7, 7)]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_broken_residual_names_its_prompt_and_first_state(value: float) -> None:
    held = loaded()
    with torch.no_grad():
        held.model.get_input_embeddings().weight[50, 3] = value
    # prompt 1 is the longest, so it is last in its batch; input order must be restored
    with pytest.raises(ModelError, match="the residual of prompt 1 is not finite at state 0"):
        capture_residuals(held, [[4, 5], [7, 8, 50], [9]], rows=3)
    with pytest.raises(ModelError, match="prompt 0 is not finite at state 1"):
        capture_residuals(held, [[50, 8]], rows=3)


def test_an_empty_prompt_is_refused_by_index() -> None:
    with pytest.raises(ModelError, match="prompt 2 has no tokens"):
        capture_residuals(loaded(), [[4], [5], []], rows=2)
