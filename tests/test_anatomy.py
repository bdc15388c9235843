"""The anatomy table and the edits it carries, on a tiny model of every architecture."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch
from tiny_models import (
    BIASED,
    HIDDEN,
    LAYERS,
    MIXTURES,
    NAMES,
    NORMED,
    each,
    lfm2_with_biases,
    tiny_model,
    token_ids,
)
from torch import Tensor, nn

from artifacts.errors import ModelError
from tasks.models.anatomy import COMPONENTS, SUPPORTED, Anatomy, Experts, Writer, anatomy, hidden
from tasks.models.baking import bake
from tasks.models.editing import Edit, Frame, applied, build_edit
from tasks.numerics.edit import RowNormalization

every_model = pytest.mark.parametrize("name", each(NAMES))
every_normalization = pytest.mark.parametrize("normalization", ["none", "pre", "full"])


@dataclass(frozen=True)
class Recipe:
    """The arguments of an edit, for hooks and for weights alike."""

    vectors: Mapping[str, Tensor]
    weights: Mapping[str, Sequence[float]]
    normalization: RowNormalization = "none"
    frame: Frame = "module"

    def build(self, body: Anatomy) -> Edit:
        return build_edit(body, self.vectors, self.weights, self.normalization, self.frame)

    def bake(self, body: Anatomy) -> None:
        bake(body, self.vectors, self.weights, self.normalization, self.frame)


def recipe(seed: int = 0, weight: float | None = None, **options: Any) -> Recipe:
    """Random directions; `weight` everywhere, or by default a kernel that spares a layer."""
    generator = torch.Generator().manual_seed(seed)

    def directions() -> Tensor:
        drawn = torch.randn(LAYERS, HIDDEN, generator=generator)
        return nn.functional.normalize(drawn, dim=-1)

    vectors = {component: directions() for component in COMPONENTS}
    uneven = {"attn_o_proj": [0.0, 0.7, 1.3], "mlp_down_proj": [1.1, 0.4, 0.9]}
    weights = uneven if weight is None else dict.fromkeys(COMPONENTS, [weight] * LAYERS)
    return Recipe(vectors, weights, **options)


@cache
def unedited(name: str) -> tuple[Any, Anatomy]:
    """A shared model, for tests that never write its weights."""
    model = tiny_model(name)
    return model, anatomy(model)


def logits(model: Any, tokens: Tensor) -> Tensor:
    with torch.inference_mode():
        found: Tensor = model(tokens).logits
    return found


def edited_logits(name: str, tokens: Tensor, edits: Sequence[Edit], rows: Any = None) -> Tensor:
    model, body = unedited(name)
    with applied(body, edits) as editor:
        editor.rows = None if rows is None else torch.as_tensor(rows)
        return logits(model, tokens)


# The table


@every_model
def test_every_architecture_has_a_row(name: str) -> None:
    model, body = unedited(name)
    assert len(body.layers) == len(body.writers) == LAYERS
    assert body.hidden_size == HIDDEN
    assert body.embedding is model.get_input_embeddings()
    for writers in body.writers:
        assert tuple(writers) == COMPONENTS
        for part in (part for writer in writers.values() for part in writer.parts):
            assert part.weight.shape[-2] == HIDDEN
            assert all(matrix.shape == part.weight.shape[-2:] for matrix in part.matrices)


@every_model
def test_a_mixture_is_one_writer_of_many_matrices(name: str) -> None:
    writers = [layer["mlp_down_proj"] for layer in unedited(name)[1].writers]
    mixtures = [writer for writer in writers if isinstance(writer, Experts)]
    assert bool(mixtures) == (name in MIXTURES)
    assert all(len(writer.matrices) == 4 for writer in mixtures)


def test_every_row_has_a_tiny_model() -> None:
    assert {unedited(name)[1].architecture for name in NAMES} == set(SUPPORTED)


@every_model
def test_norms_and_biases_are_found_where_they_are(name: str) -> None:
    writers = [writer for layer in unedited(name)[1].writers for writer in layer.values()]
    assert all((writer.norm is not None) == (name in NORMED) for writer in writers)
    assert any(writer.bias is not None for writer in writers) == (name in BIASED)


def test_an_unknown_architecture_is_named_with_the_known_ones() -> None:
    with pytest.raises(ModelError, match=r"'Linear' is not supported; known: .*LlamaForCausalLM"):
        anatomy(nn.Linear(2, 2))


def test_an_lfm_whose_padding_would_leak_is_refused() -> None:
    with pytest.raises(ModelError, match="'Lfm2ForCausalLM' with conv_bias = true is not"):
        anatomy(lfm2_with_biases())


def test_it_would_leak() -> None:
    """The refusal's reason: a masked token before the prompt changes the logits after it."""
    model, tokens = lfm2_with_biases(), token_ids(rows=1)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.int64), tokens], dim=1)
    mask = (torch.arange(padded.shape[1]) >= 3).long()[None]
    with torch.inference_mode():
        beside = model(padded, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0))
    assert (beside.logits[:, -1] - logits(model, tokens)[:, -1]).abs().max() > 1e-3


@contextmanager
def recording(body: Anatomy) -> Iterator[tuple[list[Tensor], dict[tuple[int, str], Tensor]]]:
    """States 0..L, and what each writer adds to the stream, of the passes made inside."""
    states: list[Tensor] = []
    added: dict[tuple[int, str], Tensor] = {}

    def keep(place: tuple[int, str]) -> Any:
        # cloned: a parallel Falcon layer adds the attention's output to the MLP's in place
        return lambda module, args, output: added.__setitem__(place, hidden(output).clone())

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        states.append(args[0] if args else kwargs["hidden_states"])

    handles = [body.layers[0].register_forward_pre_hook(enter, with_kwargs=True)]
    for index, layer in enumerate(body.layers):
        handles.append(layer.register_forward_hook(lambda m, a, out: states.append(hidden(out))))
        for component, writer in body.writers[index].items():
            source = joins(layer, writer)
            handles.append(source.register_forward_hook(keep((index, component))))
    try:
        yield states, added
    finally:
        for handle in handles:
            handle.remove()


def joins(layer: nn.Module, writer: Writer) -> nn.Module:
    """The module whose output is added to the stream."""
    if writer.norm is not None:
        return writer.norm
    if not isinstance(writer, Experts):
        return writer.module
    path = next(path for path, module in layer.named_modules() if module is writer.module)
    return layer.get_submodule(path.rpartition(".")[0])


@every_model
def test_a_layer_adds_to_the_stream_what_its_writers_write(name: str) -> None:
    """The sum of both components is the whole difference of two states: none is missed."""
    model, body = unedited(name)
    with recording(body) as (states, added):
        logits(model, token_ids())
    assert len(states) == LAYERS + 1
    for layer in range(LAYERS):
        total = added[layer, "attn_o_proj"] + added[layer, "mlp_down_proj"]
        torch.testing.assert_close(states[layer + 1] - states[layer], total, rtol=1e-4, atol=1e-5)


# Hooks against weights


@every_normalization
@pytest.mark.parametrize(
    ("name", "frame"),
    [(name, "module") for name in NAMES] + [(name, "residual") for name in NORMED],
)
def test_hooks_and_weights_give_the_same_logits(
    name: str, normalization: RowNormalization, frame: Frame
) -> None:
    chosen = recipe(normalization=normalization, frame=frame)
    tokens = token_ids()
    model, body = unedited(name)
    before = logits(model, tokens)
    by_hooks = edited_logits(name, tokens, [chosen.build(body)])
    other = tiny_model(name)
    chosen.bake(anatomy(other))
    torch.testing.assert_close(by_hooks, logits(other, tokens), rtol=1e-4, atol=1e-5)
    assert (by_hooks - before).abs().max() > 1e-2


@every_model
def test_the_frames_differ_exactly_where_a_norm_follows(name: str) -> None:
    _, body = unedited(name)
    tokens = token_ids()
    by_frame = [
        edited_logits(name, tokens, [replace(recipe(), frame=frame).build(body)])
        for frame in ("module", "residual")
    ]
    assert torch.equal(*by_frame) == (name not in NORMED)


@every_model
def test_the_identity_edit_is_the_unedited_model_bit_for_bit(name: str) -> None:
    model, body = unedited(name)
    identity = recipe(weight=0.0).build(body)
    assert identity.modules == {}
    tokens = token_ids()
    assert torch.equal(edited_logits(name, tokens, [identity]), logits(model, tokens))


@every_model
def test_the_residual_frame_keeps_the_direction_out_of_the_stream(name: str) -> None:
    """Weight 1, "none": what a writer without bias adds has no component along its direction."""
    model, body = unedited(name)
    chosen = recipe(weight=1.0, frame="residual")
    assert component_left(model, body, chosen) < 1e-5


@pytest.mark.parametrize("name", NORMED)
def test_the_module_frame_leaves_part_of_the_direction_in_the_stream(name: str) -> None:
    model, body = unedited(name)
    assert component_left(model, body, recipe(weight=1.0, frame="module")) > 1e-2


def component_left(model: Any, body: Anatomy, chosen: Recipe) -> float:
    """Largest |v.(what is added, less the biases)| / |what is added|, over layers and tokens."""
    edited = applied(body, [chosen.build(body)])
    with edited, recording(body) as (_, added), biases(body) as of_experts:
        logits(model, token_ids())
    shares: list[float] = []
    for (layer, component), output in added.items():
        writer = body.writers[layer][component]
        written = output
        if writer.norm is None and writer.bias is not None:
            of_mixture = isinstance(writer, Experts)
            bias = of_experts[layer].view(output.shape) if of_mixture else writer.bias
            written = output - bias
        along = written @ chosen.vectors[component][layer]
        shares.append(float((along.abs() / written.norm(dim=-1)).max()))
    return max(shares)


@contextmanager
def biases(body: Anatomy) -> Iterator[dict[int, Tensor]]:
    """What the biases of a layer's experts add, [rows * tokens, d], in the pass made inside."""
    found: dict[int, Tensor] = {}

    def keep(layer: int, bias: Tensor) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            found[layer] = (bias[args[1]] * args[2][..., None]).sum(1)

        return hook

    handles = [
        writer.module.register_forward_hook(keep(layer, writer.bias))
        for layer, writers in enumerate(body.writers)
        if isinstance(writer := writers["mlp_down_proj"], Experts) and writer.bias is not None
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


# Several edits in one batch


MIXED = (
    recipe(1),
    recipe(2, normalization="full"),
    recipe(3, weight=0.0),
    recipe(4, weight=1.2, normalization="pre"),
)


@every_model
def test_rows_of_several_edits_equal_one_edit_at_a_time(name: str) -> None:
    _, body = unedited(name)
    edits = [chosen.build(body) for chosen in MIXED]
    tokens = token_ids(rows=8)
    rows = [3, 0, 2, 1, 1, 2, 0, 3]
    together = edited_logits(name, tokens, edits, rows)
    for row, index in enumerate(rows):
        alone = edited_logits(name, tokens, [edits[index]])[row]
        torch.testing.assert_close(together[row], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "falcon", "gptneox"])
def test_rows_of_the_identity_pass_hooks_bit_for_bit(name: str) -> None:
    """Also where a bias is folded into the hook, which others of the batch need."""
    model, body = unedited(name)
    edits = [recipe(normalization="full").build(body), Edit({})]
    tokens = token_ids()
    edited = edited_logits(name, tokens, edits, [1, 0, 1, 0])
    plain = logits(model, tokens)
    assert torch.equal(edited[[0, 2]], plain[[0, 2]])
    assert not torch.allclose(edited[[1, 3]], plain[[1, 3]], atol=1e-2)


def test_the_edit_of_one_row_never_changes_another() -> None:
    _, body = unedited("llama-bias")
    edits = [chosen.build(body) for chosen in MIXED]
    tokens = token_ids()
    before = edited_logits("llama-bias", tokens, edits, [0, 1, 2, 3])
    after = edited_logits("llama-bias", tokens, edits, [0, 1, 2, 1])
    assert torch.equal(before[:3], after[:3])
    assert not torch.allclose(before[3], after[3], atol=1e-2)


def test_rows_may_change_between_passes() -> None:
    """As when finished rows leave the batch."""
    model, body = unedited("llama")
    edits = [chosen.build(body) for chosen in MIXED]
    tokens = token_ids()
    with applied(body, edits) as editor:
        editor.rows = torch.tensor([0, 1, 2, 3])
        four = logits(model, tokens)
        editor.rows = torch.tensor([1, 3])
        two = logits(model, tokens[[1, 3]])
    torch.testing.assert_close(two, four[[1, 3]], rtol=1e-4, atol=1e-5)


def test_rows_must_be_named_when_there_are_several_edits() -> None:
    _, body = unedited("llama")
    edits = [recipe(1).build(body), recipe(2).build(body)]
    with pytest.raises(ValueError, match="2 edits are applied but no row says"):
        edited_logits("llama", token_ids(), edits)


@pytest.mark.parametrize("wrong", [-1, 2])
def test_rows_that_name_no_edit_are_refused(wrong: int) -> None:
    _, body = unedited("llama")
    edits = [recipe(1).build(body), recipe(2).build(body)]
    with pytest.raises(ValueError, match="name none of the 2 edits"):
        edited_logits("llama", token_ids(), edits, [0, 0, 0, wrong])


@pytest.mark.parametrize("edits", [[], [Edit({})], [Edit({}), Edit({})]])
def test_no_edits_are_the_unedited_model(edits: list[Edit]) -> None:
    model, _ = unedited("llama")
    tokens = token_ids()
    assert torch.equal(edited_logits("llama", tokens, edits), logits(model, tokens))


def test_hooks_are_gone_after_an_error() -> None:
    model, body = unedited("llama")
    with pytest.raises(KeyError), applied(body, [recipe().build(body)]):
        raise KeyError
    assert not any(module._forward_hooks for module in model.modules())


def test_an_edited_model_decodes_with_a_cache_as_without() -> None:
    model, body = unedited("llama-bias")
    edits = [chosen.build(body) for chosen in MIXED]
    tokens = token_ids(length=6)
    with applied(body, edits) as editor, torch.inference_mode():
        editor.rows = torch.arange(4)
        whole = model(tokens).logits[:, -1]
        cache_of_five = model(tokens[:, :5], use_cache=True).past_key_values
        stepped = model(tokens[:, 5:], past_key_values=cache_of_five).logits[:, -1]
    torch.testing.assert_close(stepped, whole, rtol=1e-4, atol=1e-5)


# Precision and refusals


def test_a_bfloat16_model_keeps_its_dtype_and_loses_the_direction() -> None:
    model = tiny_model("llama").bfloat16()
    body = anatomy(model)
    with applied(body, [recipe(weight=1.0).build(body)]), recording(body) as (_, added):
        assert logits(model, token_ids()).dtype == torch.bfloat16
    chosen = recipe(weight=1.0)
    for (layer, component), output in added.items():
        assert output.dtype == torch.bfloat16
        along = output.float() @ chosen.vectors[component][layer]
        assert (along.abs() / output.float().norm(dim=-1)).max() < 2**-8


def test_directions_that_do_not_fit_the_model_are_refused() -> None:
    _, body = unedited("llama")
    chosen = recipe()
    short = {component: v[:-1] for component, v in chosen.vectors.items()}
    with pytest.raises(ValueError, match="do not fit a model of 3 layers and hidden size 32"):
        replace(chosen, vectors=short).build(body)


def test_a_direction_that_is_not_finite_is_refused_where_it_is_used() -> None:
    _, body = unedited("llama")
    chosen = recipe()
    chosen.vectors["attn_o_proj"][0, 0] = torch.nan  # weight 0 there
    chosen.build(body)
    chosen.vectors["attn_o_proj"][1, 0] = torch.nan
    with pytest.raises(ValueError, match="direction of layer 1, attn_o_proj, is not finite"):
        chosen.build(body)


def test_an_unknown_frame_is_refused() -> None:
    _, body = unedited("llama")
    with pytest.raises(ValueError, match="'stream' is none of module, residual"):
        recipe(frame="stream").build(body)


class PackedLinear(nn.Linear):
    """A weight stored as integers, as quantised modules store theirs."""

    def __init__(self) -> None:
        super().__init__(HIDDEN, HIDDEN)
        self.weight = nn.Parameter(self.weight.to(torch.uint8), requires_grad=False)


def test_quantised_weights_are_not_baked_and_nothing_else_is_either() -> None:
    model = tiny_model("llama")
    body = anatomy(model)
    body.writers[2]["mlp_down_proj"] = replace(
        body.writers[2]["mlp_down_proj"], module=PackedLinear()
    )
    tokens = token_ids()
    before = logits(model, tokens)
    with pytest.raises(ModelError, match="layer 2, mlp_down_proj: a quantised weight"):
        recipe().bake(body)
    assert torch.equal(logits(model, tokens), before)


def test_packed_weights_that_cannot_be_read_are_named() -> None:
    _, body = unedited("llama")
    spoilt = replace(body, writers=[dict.fromkeys(COMPONENTS, Writer(PackedLinear()))] * LAYERS)
    with pytest.raises(
        ModelError, match=r"'PackedLinear' holds weights of torch.uint8 that cannot"
    ):
        recipe(normalization="pre").build(spoilt)
