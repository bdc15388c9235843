"""Mixtures of experts: where one edit of the sum is exact, where it is not, and what biases do.

That hooks and baked weights agree for every architecture and normalisation is held in
test_anatomy; here every expert is edited by hand, and each rule has a case in which it fails.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from tiny_models import HIDDEN, LAYERS, MIXTURES, VOCAB, each, tiny_model, token_ids
from torch import Tensor, nn

from artifacts.errors import ModelError
from tasks.models.anatomy import Anatomy, Experts, anatomy
from tasks.models.baking import bake
from tasks.models.decoding import decode
from tasks.models.editing import Edit, applied, build_edit, edited_places
from tasks.models.loading import LoadedModel
from tasks.models.terms import SummedHook
from tasks.numerics.edit import OutputEdit, RowNormalization, edited_weight

NORMALIZATIONS: tuple[RowNormalization, ...] = ("none", "pre", "full")
every_mixture = pytest.mark.parametrize("name", each(MIXTURES))
every_normalization = pytest.mark.parametrize("normalization", NORMALIZATIONS)


def recipe(seed: int = 0, lam: float = 0.9) -> tuple[dict[str, Tensor], dict[str, list[float]]]:
    """A direction and a weight for the MLP component of every layer."""
    generator = torch.Generator().manual_seed(seed)
    vectors = nn.functional.normalize(torch.randn(LAYERS, HIDDEN, generator=generator), dim=-1)
    return {"mlp_down_proj": vectors}, {"mlp_down_proj": [lam] * LAYERS}


def uneven(name: str) -> tuple[Any, Anatomy]:
    """A model whose experts' rows have norms of very different sizes."""
    model = tiny_model(name)
    body = anatomy(model)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for mixture in mixtures(body):
            sizes = torch.randn(4, HIDDEN, 1, generator=generator).mul(0.7).exp()
            mixture.weight.mul_(sizes)
    return model, body


def mixtures(body: Anatomy) -> list[Experts]:
    writers = [layer["mlp_down_proj"] for layer in body.writers]
    return [writer for writer in writers if isinstance(writer, Experts)]


def logits(model: Any, tokens: Tensor) -> Tensor:
    with torch.inference_mode():
        found: Tensor = model(tokens).logits
    return found


def edited_logits(model: Any, body: Anatomy, edits: Sequence[Edit], rows: Any = None) -> Tensor:
    with applied(body, edits) as editor:
        editor.rows = None if rows is None else torch.as_tensor(rows)
        return logits(model, token_ids(rows=4))


def edited_by_hand(name: str, normalization: RowNormalization) -> Tensor:
    """The logits once every expert of the state dict is edited as the published tools do."""
    model, _ = uneven(name)
    (vectors,), (lams,) = (each.values() for each in recipe())
    state = model.state_dict()
    for key, stored in state.items():
        if not key.endswith(("down_proj", "down_proj.weight", "feed_forward.w2.weight")):
            continue
        layer = int(key.split(".layers.")[1].split(".")[0])
        v, lam = vectors[layer], lams[layer]
        for matrix in stored if stored.dim() == 3 else [stored]:
            turned = matrix.T if name == "gpt-oss" else matrix
            turned.copy_(edited_weight(turned.clone(), v, lam, normalization))
    return logits(model, token_ids(rows=4))


@every_normalization
@every_mixture
def test_the_edit_is_that_of_every_experts_matrix(
    name: str, normalization: RowNormalization
) -> None:
    model, body = uneven(name)
    edit = build_edit(body, *recipe(), normalization, "module")
    by_hooks = edited_logits(model, body, [edit])
    torch.testing.assert_close(by_hooks, edited_by_hand(name, normalization), rtol=1e-4, atol=1e-5)
    assert (by_hooks - logits(model, token_ids(rows=4))).abs().max() > 1e-2


@every_mixture
def test_without_row_norms_one_operation_serves_all_experts(name: str) -> None:
    _, body = uneven(name)
    shapes = {
        normalization: {
            made[0].a.shape
            for place, made in build_edit(body, *recipe(), normalization, "module").modules.items()
            if isinstance(body.writers[place[0]][place[1]], Experts)
        }
        for normalization in NORMALIZATIONS
    }
    assert shapes == {"none": {(HIDDEN,)}, "pre": {(4, HIDDEN)}, "full": {(4, HIDDEN)}}


@pytest.mark.parametrize("normalization", ["pre", "full"])
def test_with_row_norms_one_operation_on_the_sum_is_another_edit(
    normalization: RowNormalization,
) -> None:
    """Were the experts' operations averaged, as an edit of the sum would have to."""
    model, body = uneven("mixtral")
    edit = build_edit(body, *recipe(), normalization, "module")
    mean = Edit({place: (averaged(made[0]),) for place, made in edit.modules.items()})
    of_sum = edited_logits(model, body, [mean])
    assert (of_sum - edited_by_hand("mixtral", normalization)).abs().max() > 1e-2


def averaged(edit: OutputEdit) -> OutputEdit:
    return OutputEdit(edit.a.mean(0), edit.b.mean(0), None if edit.s is None else edit.s.mean(0))


def test_an_edit_that_took_biases_along_would_be_another(monkeypatch: pytest.MonkeyPatch) -> None:
    model, body = uneven("gpt-oss")
    edit = build_edit(body, *recipe(), "none", "module")
    exact = edited_by_hand("gpt-oss", "none")
    torch.testing.assert_close(edited_logits(model, body, [edit]), exact, rtol=1e-4, atol=1e-5)
    monkeypatch.setattr(SummedHook, "leave", SummedHook.__mro__[1].leave)
    assert (edited_logits(model, body, [edit]) - exact).abs().max() > 1e-2


def test_a_forgotten_shared_expert_would_be_another_edit() -> None:
    model, body = uneven("qwen2-moe")
    edit = build_edit(body, *recipe(), "none", "module")
    assert {len(made) for made in edit.modules.values()} == {2}
    zero = torch.zeros(HIDDEN)
    without = {place: (made[0], OutputEdit(zero, zero)) for place, made in edit.modules.items()}
    exact = edited_by_hand("qwen2-moe", "none")
    assert (edited_logits(model, body, [Edit(without)]) - exact).abs().max() > 1e-2


def test_a_place_comes_once_for_each_weight_it_has() -> None:
    _, body = uneven("deepseek-v3")
    found = [
        (place, tuple(writer.weight.shape))
        for place, writer, _, _ in edited_places(body, *recipe(), "module")
    ]
    dense, routed, shared = (HIDDEN, 48), (4, HIDDEN, 24), (HIDDEN, 24)
    layers = [(0, dense), (1, routed), (1, shared), (2, routed), (2, shared)]
    assert found == [((layer, "mlp_down_proj"), shape) for layer, shape in layers]


# Rows of a batch


@pytest.mark.parametrize("name", ["mixtral", "gpt-oss", "qwen2-moe"])
def test_rows_left_alone_pass_the_edit_of_a_sum_bit_for_bit(name: str) -> None:
    model, body = uneven(name)
    edits = [build_edit(body, *recipe(), "none", "module"), Edit({})]
    edited = edited_logits(model, body, edits, [1, 0, 1, 0])
    plain = logits(model, token_ids(rows=4))
    assert torch.equal(edited[[0, 2]], plain[[0, 2]])
    assert (edited[[1, 3]] - plain[[1, 3]]).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["mixtral", "gpt-oss", "qwen2-moe"])
def test_rows_left_alone_beside_an_edit_per_expert_differ_by_rounding(name: str) -> None:
    model, body = uneven(name)
    edits = [build_edit(body, *recipe(), "full", "module"), Edit({})]
    edited = edited_logits(model, body, edits, [1, 0, 1, 0])
    plain = logits(model, token_ids(rows=4))
    torch.testing.assert_close(edited[[0, 2]], plain[[0, 2]], rtol=1e-5, atol=1e-5)


@every_mixture
def test_edits_of_every_kind_share_a_batch(name: str) -> None:
    model, body = uneven(name)
    edits = [
        build_edit(body, *recipe(seed), how, "module") for seed, how in enumerate(NORMALIZATIONS)
    ]
    together = edited_logits(model, body, [*edits, Edit({})], [2, 3, 0, 1])
    for row, index in enumerate([2, 3, 0, 1]):
        alone = edited_logits(model, body, [[*edits, Edit({})][index]])[row]
        torch.testing.assert_close(together[row], alone, rtol=1e-4, atol=1e-5)


def test_several_edits_need_to_know_their_rows() -> None:
    model, body = uneven("mixtral")
    for normalization in NORMALIZATIONS:
        edit = build_edit(body, *recipe(), normalization, "module")
        with pytest.raises(ValueError, match="2 edits are applied but no row says"):
            edited_logits(model, body, [edit, edit])


@pytest.mark.parametrize("name", ["mixtral", "gpt-oss"])
@every_normalization
def test_prompts_of_a_batch_answer_as_alone_although_each_is_routed_on_its_own(
    name: str, normalization: RowNormalization
) -> None:
    model, body = uneven(name)
    model.generation_config.eos_token_id = list(range(3, VOCAB, 5))
    held = LoadedModel(model, None, body, torch.device("cpu"), "float32", name)
    edits = [build_edit(body, *recipe(seed), normalization, "module") for seed in (0, 1)]
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in (2, 9, 5, 7)]
    together = decode(held, prompts, edits, max_new_tokens=8, rows=8)
    for edit, decoded in zip(edits, together, strict=True):
        alone = [decode(held, [one], [edit], max_new_tokens=8, rows=1)[0] for one in prompts]
        assert decoded.tokens == [one.tokens[0] for one in alone]
    assert together[0].tokens != together[1].tokens


# Implementations and precision


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@every_normalization
def test_every_implementation_of_the_experts_gives_the_same(
    implementation: str, normalization: RowNormalization
) -> None:
    model, body = uneven("gpt-oss")
    model.set_experts_implementation(implementation)
    edit = build_edit(body, *recipe(), normalization, "module")
    exact = edited_by_hand("gpt-oss", normalization)
    torch.testing.assert_close(edited_logits(model, body, [edit]), exact, rtol=1e-4, atol=1e-5)


@every_normalization
def test_a_bfloat16_mixture_keeps_its_dtype(normalization: RowNormalization) -> None:
    model, body = uneven("gpt-oss")
    exact = edited_logits(model, body, [build_edit(body, *recipe(), normalization, "module")])
    model.bfloat16()
    edit = build_edit(body, *recipe(), normalization, "module")
    found = edited_logits(model, body, [edit])
    assert found.dtype == torch.bfloat16
    assert (found.float() - exact).abs().mean() < 0.1 * exact.abs().mean()


def test_experts_are_baked_where_they_are_stored() -> None:
    """Through the view of a transposed tensor; gate, up and biases stay."""
    model, body = uneven("gpt-oss")
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    bake(body, *recipe(), "full", "module")
    changed = {name for name, now in model.named_parameters() if not torch.equal(now, before[name])}
    assert changed == {f"model.layers.{i}.mlp.experts.down_proj" for i in range(LAYERS)}


# What is refused


def swapped(change: Callable[[nn.Module], None]) -> Anatomy:
    _, body = uneven("mixtral")
    for mixture in mixtures(body):
        change(mixture.module)
    return body


def packed(module: nn.Module) -> None:
    del module.down_proj
    stored = torch.zeros(4, HIDDEN, 12, dtype=torch.uint8)
    module.down_proj = nn.Parameter(stored, requires_grad=False)


def halved(module: nn.Module) -> None:
    stored = torch.zeros(4, HIDDEN, 24).to(torch.float8_e4m3fn)
    module.down_proj = nn.Parameter(stored, requires_grad=False)


def apart(module: nn.Module) -> None:
    del module.down_proj


@pytest.mark.parametrize("spoil", [packed, halved])
def test_packed_experts_are_neither_read_nor_baked(spoil: Callable[[nn.Module], None]) -> None:
    body = swapped(spoil)
    with pytest.raises(ModelError, match=r"'MixtralExperts' holds weights of torch\..*bfloat16"):
        build_edit(body, *recipe(), "pre", "module")
    with pytest.raises(ModelError, match="layer 0, mlp_down_proj: a quantised weight"):
        bake(body, *recipe(), "pre", "module")


def test_experts_in_tensors_of_their_own_are_refused() -> None:
    with pytest.raises(ModelError, match="'MixtralExperts' does not hold its experts in one"):
        build_edit(swapped(apart), *recipe(), "none", "module")


@pytest.mark.parametrize("normalization", ["none", "pre"])
def test_a_mixture_that_is_called_otherwise_is_refused(normalization: RowNormalization) -> None:
    model, body = uneven("gpt-oss")
    edit = build_edit(body, *recipe(), normalization, "module")
    routing = {"top_k_index": torch.zeros(3, 2).long(), "top_k_weights": torch.ones(3, 2)}
    with applied(body, [edit]), pytest.raises(ModelError, match="is not called with tokens"):
        mixtures(body)[0].module(torch.zeros(3, HIDDEN), **routing)
    assert not any(module._forward_hooks for module in model.modules())
