"""Folders and adapters of every architecture: what is loaded again is what was edited."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_anatomy import Recipe, recipe
from tiny_models import NAMES, each, tiny_model, token_ids
from torch import Tensor
from toy_tokenizer import toy_tokenizer

from artifacts.errors import ModelError
from tasks.models import adapters, exporting
from tasks.models.anatomy import anatomy
from tasks.models.baking import bake_edit
from tasks.models.editing import Edit, applied
from tasks.models.loading import LoadedModel, load

every_normalization = pytest.mark.parametrize("normalization", ["none", "pre", "full"])


def held(name: str = "llama", model: Any = None) -> LoadedModel:
    model = model or tiny_model(name)
    tokenizer = toy_tokenizer()
    return LoadedModel(model, tokenizer, anatomy(model), torch.device("cpu"), "float32", name)


@torch.inference_mode()
def logits(loaded: LoadedModel, edit: Edit | None = None) -> Tensor:
    ids = token_ids()
    if edit is None:
        return loaded.model(input_ids=ids).logits.clone()
    with applied(loaded.anatomy, [edit]):
        return loaded.model(input_ids=ids).logits.clone()


def written(loaded: LoadedModel, folder: Path, dtype: str = "float32") -> dict[str, str]:
    """Write; the digests of what was meant."""
    exporting.cast(loaded, dtype)
    meant = exporting.tensor_digests(loaded.model, dtype)
    exporting.write_model(loaded, folder)
    return meant


@pytest.mark.parametrize("name", each(NAMES))
def test_a_written_folder_is_the_edited_model(name: str, tmp_path: Path) -> None:
    before = held(name)
    edit = recipe(normalization="full", frame="residual").build(before.anatomy)
    by_hooks = logits(before, edit)
    bake_edit(before.anatomy, edit)
    meant = written(before, tmp_path)
    again = load(str(tmp_path), dtypes=["float32"])
    exporting.require_same_tensors(exporting.tensor_digests(again.model, "float32"), meant)
    torch.testing.assert_close(logits(again), by_hooks, rtol=1e-4, atol=2e-4)
    assert not torch.allclose(logits(again), logits(held(name)), atol=1e-2)
    assert not list(tmp_path.glob("*.bin"))


@every_normalization
@pytest.mark.parametrize("name", ["llama-bias", "falcon-new", "gemma3-vision", "qwen3.5", "gptj"])
@pytest.mark.parametrize("peft", [True, False])
def test_an_adapter_gives_the_logits_of_the_hooks(
    name: str, normalization: Any, peft: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if peft:
        pytest.importorskip("peft")
    monkeypatch.setattr(adapters, "has_peft", lambda: peft)
    loaded = held(name)
    edit = recipe(normalization=normalization).build(loaded.anatomy)
    by_hooks = logits(loaded, edit)
    made = adapters.adapter_of(loaded, edit, 1e-6, "float32")
    adapters.write_adapter(made, tmp_path, "base", None)
    adapters.require_same_adapter(tmp_path, made)
    assert {f.rank for f in made.values()} == {1} or normalization == "full"
    assert adapters.attach(loaded, tmp_path) == ("peft" if peft else "weights")
    torch.testing.assert_close(logits(loaded), by_hooks, rtol=1e-4, atol=2e-4)


def test_modules_of_different_rank_are_each_scaled_to_their_change(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    loaded = held()
    edit = recipe(normalization="full").build(loaded.anatomy)
    by_hooks = logits(loaded, edit)
    made = adapters.adapter_of(loaded, edit, 3e-2, "float32")
    assert len({factors.rank for factors in made.values()}) > 1, "ranks must differ"
    adapters.write_adapter(made, tmp_path, "base", None)
    adapters.attach(loaded, tmp_path)
    near = (logits(loaded) - by_hooks).abs().mean()
    assert 0 < near < 0.1 * (logits(held()) - by_hooks).abs().mean()


def test_a_layer_that_is_spared_is_in_no_adapter() -> None:
    loaded = held()
    made = adapters.adapter_of(loaded, recipe().build(loaded.anatomy), 1e-3, "float32")
    assert "model.layers.0.self_attn.o_proj" not in made
    assert len(made) == 5


def test_an_edit_of_nothing_makes_no_adapter() -> None:
    loaded = held()
    with pytest.raises(ModelError, match="changes no module"):
        adapters.adapter_of(loaded, recipe(weight=0.0).build(loaded.anatomy), 1e-3, "float32")


def test_tied_embeddings_stay_tied_and_unedited(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.config.tie_word_embeddings = True
    model.tie_weights()
    loaded = held(model=model)
    before = model.get_input_embeddings().weight.clone()
    edit = recipe(normalization="pre").build(loaded.anatomy)
    by_hooks = logits(loaded, edit)
    bake_edit(loaded.anatomy, edit)
    meant = written(loaded, tmp_path)
    again = load(str(tmp_path), dtypes=["float32"])
    exporting.require_same_tensors(exporting.tensor_digests(again.model, "float32"), meant)
    assert torch.equal(again.model.get_input_embeddings().weight, before)
    assert again.model.lm_head.weight.data_ptr() == again.model.model.embed_tokens.weight.data_ptr()
    torch.testing.assert_close(logits(again), by_hooks, rtol=1e-4, atol=2e-4)


def test_biases_are_written_as_they_were(tmp_path: Path) -> None:
    loaded = held("llama-bias")
    before = loaded.model.model.layers[1].self_attn.o_proj.bias.clone()
    bake_edit(loaded.anatomy, recipe(normalization="full").build(loaded.anatomy))
    written(loaded, tmp_path)
    again = load(str(tmp_path), dtypes=["float32"])
    assert torch.equal(again.model.model.layers[1].self_attn.o_proj.bias, before)
    assert before.abs().max() > 0.1


def test_large_models_are_written_in_shards(tmp_path: Path) -> None:
    loaded = held()
    exporting.write_model(loaded, tmp_path, shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert (tmp_path / "model.safetensors.index.json").is_file()
    torch.testing.assert_close(
        logits(load(str(tmp_path), dtypes=["float32"])), logits(loaded), rtol=0, atol=0
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_what_is_stored_in_half_precision_is_known_bit_for_bit(dtype: str, tmp_path: Path) -> None:
    loaded = held()
    meant = written(loaded, tmp_path, dtype)
    wide = load(str(tmp_path), dtypes=["float32"])
    narrow = load(str(tmp_path), dtypes=[dtype])
    for again in (wide, narrow):
        exporting.require_same_tensors(exporting.tensor_digests(again.model, dtype), meant)
    assert exporting.checkpoint_dtype(wide, None, False) == dtype
    assert wide.dtype == "float32"


def test_one_flipped_bit_is_found(tmp_path: Path) -> None:
    loaded = held()
    meant = written(loaded, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.norm.weight"].view(torch.int32)[3] ^= 1
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    again = load(str(tmp_path), dtypes=["float32"])
    found = exporting.tensor_digests(again.model, "float32")
    with pytest.raises(ModelError, match=r"1 of 30 tensors .* 'model\.norm\.weight'"):
        exporting.require_same_tensors(found, meant)


def test_an_adapter_that_was_changed_is_found(tmp_path: Path) -> None:
    loaded = held()
    made = adapters.adapter_of(loaded, recipe().build(loaded.anatomy), 1e-3, "float32")
    adapters.write_adapter(made, tmp_path, "base", None)
    tensors = load_file(tmp_path / adapters.WEIGHTS)
    tensors[next(iter(tensors))].neg_()
    save_file(tensors, tmp_path / adapters.WEIGHTS)
    with pytest.raises(ModelError, match="does not hold what was to be written"):
        adapters.require_same_adapter(tmp_path, made)


def test_an_adapter_for_another_model_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    loaded = held()
    made = adapters.adapter_of(loaded, recipe().build(loaded.anatomy), 1e-3, "float32")
    adapters.write_adapter(made, tmp_path, "base", None)
    with pytest.raises(ModelError, match="PEFT cannot load the adapter"):
        adapters.attach(held("gptneox"), tmp_path)


def test_quantised_weights_make_no_adapter() -> None:
    loaded = held()
    edit = recipe().build(loaded.anatomy)
    linear = loaded.model.model.layers[1].mlp.down_proj
    linear.weight = torch.nn.Parameter(linear.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(ModelError, match="a quantised weight cannot be written"):
        adapters.adapter_of(loaded, edit, 1e-3, "float32")
    with pytest.raises(ModelError, match="a quantised weight cannot be written"):
        bake_edit(loaded.anatomy, edit)


def test_a_released_model_holds_no_numbers() -> None:
    loaded = held()
    exporting.release(loaded)
    assert sum(p.numel() for p in loaded.model.parameters()) == 0


@pytest.mark.parametrize(
    ("one", "other", "both"),
    [
        ("float32", "bfloat16", "float32"),
        ("bfloat16", "bfloat16", "bfloat16"),
        ("float16", "bfloat16", "float32"),
    ],
)
def test_the_wider_dtype_holds_both(one: str, other: str, both: str) -> None:
    assert exporting.wider(one, other) == exporting.wider(other, one) == both


def test_the_recipe_of_the_hooks_and_of_the_weights_are_one() -> None:
    by_edit, by_arguments = held(), held()
    chosen: Recipe = recipe(normalization="full", frame="residual")
    bake_edit(by_edit.anatomy, chosen.build(by_edit.anatomy))
    chosen.bake(by_arguments.anatomy)
    torch.testing.assert_close(logits(by_edit), logits(by_arguments), rtol=1e-5, atol=1e-5)
