"""A model loads in the first precision that computes, says who it is, or says what is missing."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import (
    HIDDEN,
    LAYERS,
    MIXTURES,
    each,
    gpt_oss_in_blocks,
    qwen35_with_eyes,
    tiny_model,
    token_ids,
)
from toy_tokenizer import toy_tokenizer
from transformers.utils import logging as transformers_logging

from artifacts.errors import ModelError
from tasks.models.anatomy import COMPONENTS, anatomy
from tasks.models.baking import bake
from tasks.models.decoding import decode, eos_ids
from tasks.models.editing import applied, build_edit
from tasks.models.identity import folder_digest, local_folder, resolve
from tasks.models.loading import load
from tasks.models.rendering import encode, render

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "toy"
    tiny_model("llama").save_pretrained(folder)
    toy_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(saved, tmp_path / "toy"))


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No hub, and an empty local cache of it."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_folder_loads_ready_for_use(saved: Path) -> None:
    said: list[str] = []
    loaded = load(str(saved), device="cpu", progress=said.append)
    assert (loaded.dtype, loaded.source, loaded.device.type) == ("float32", str(saved), "cpu")
    assert len(loaded.anatomy.layers) == LAYERS
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert said == [f"loading {saved} in auto"]
    prompts = encode(loaded.tokenizer, [render(loaded.tokenizer, "How do I brew a potion?")])
    (decoded,) = decode(loaded, prompts, max_new_tokens=3, rows=1)
    assert decoded.tokens[0]
    assert eos_ids(loaded) == [1]
    expected = tiny_model("llama")(torch.tensor(prompts)).logits[:, -1]
    torch.testing.assert_close(decoded.first_logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_dtypes_are_tried_in_order(saved: Path, dtype: str) -> None:
    loaded = load(str(saved), dtypes=(dtype, "float16"), device="cpu")
    assert loaded.dtype == dtype
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {getattr(torch, dtype)}


def spoil(folder: Path, value: float) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.fill_(value)
    model.save_pretrained(folder)


def test_a_dtype_that_overflows_is_passed_over(folder: Path) -> None:
    spoil(folder, 1e6)  # beyond float16
    said: list[str] = []
    loaded = load(str(folder), dtypes=("float16", "float32"), device="cpu", progress=said.append)
    assert loaded.dtype == "float32"
    assert [line.split()[-1] for line in said] == ["float16", "float32"]


def test_when_no_dtype_works_every_reason_is_told(folder: Path) -> None:
    spoil(folder, float("nan"))
    with pytest.raises(ModelError, match=r"logits are not finite \(tried float16, float32\)"):
        load(str(folder), dtypes=("float16", "float32"), device="cpu")
    with pytest.raises(ModelError, match=r"float32: logits are not finite; floof: .*floof"):
        load(str(folder), dtypes=("float32", "floof"), device="cpu")


def test_weights_that_are_missing_are_not_made_up(folder: Path) -> None:
    model = tiny_model("llama")
    state = {name: t for name, t in model.state_dict().items() if "layers.1.mlp.up" not in name}
    model.save_pretrained(folder, state_dict=state)
    with pytest.raises(ModelError, match=r"weights lack 1 tensors, such as 'model.layers.1.mlp.up"):
        load(str(folder), device="cpu")


def test_tied_embeddings_are_not_missing(folder: Path) -> None:
    tied = tiny_model("gemma3")
    assert tied.config.tie_word_embeddings
    tied.save_pretrained(folder)
    found = load(str(folder), device="cpu").model
    assert found.lm_head.weight is found.get_input_embeddings().weight


MULTIMODAL = ("gemma3-vision", "mistral3", "qwen2.5-vl", "qwen3-vl")


def saved_as(model: Any, folder: Path) -> Path:
    """`model` in place of the folder's own."""
    for weights in folder.glob("*.safetensors"):
        weights.unlink()
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", each([*MIXTURES, *MULTIMODAL, "lfm2", "qwen3.5"]))
def test_what_is_baked_is_saved_and_loaded_again(name: str, folder: Path) -> None:
    """Also where checkpoints store every expert by itself, and where a text tower has eyes."""
    held = load(str(saved_as(tiny_model(name), folder)), device="cpu")
    tokens = token_ids()
    torch.testing.assert_close(held.model(tokens).logits, tiny_model(name)(tokens).logits)
    direction = torch.nn.functional.normalize(torch.ones(LAYERS, HIDDEN), dim=-1)
    recipe: Any = (
        dict.fromkeys(COMPONENTS, direction),
        dict.fromkeys(COMPONENTS, [0.7] * LAYERS),
        "full",
        "residual",
    )
    with applied(held.anatomy, [build_edit(held.anatomy, *recipe)]):
        by_hooks = held.model(tokens).logits
    bake(held.anatomy, *recipe)
    again = load(str(saved_as(held.model, folder)), device="cpu")
    torch.testing.assert_close(again.model(tokens).logits, by_hooks, atol=1e-5, rtol=1e-4)


def test_a_text_tower_is_loaded_alone_where_transformers_can(folder: Path) -> None:
    whole = qwen35_with_eyes()
    held = load(str(saved_as(whole, folder)), device="cpu")
    assert held.anatomy.architecture == "Qwen3_5ForCausalLM"
    tokens = token_ids()
    torch.testing.assert_close(held.model(tokens).logits, whole(tokens).logits)


def test_a_checkpoint_in_mxfp4_is_unpacked(folder: Path) -> None:
    """gpt-oss as it is published: experts as blocks of 32 four-bit numbers with a scale each."""
    model = gpt_oss_in_blocks().bfloat16()
    saved_as(model, folder)
    state = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for key in [key for key in state if key.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, outputs = state.pop(key).shape
        blocks = (experts, outputs, inputs // 32, 16)
        state[f"{key}_blocks"] = torch.randint(
            0, 256, blocks, dtype=torch.uint8, generator=generator
        )
        state[f"{key}_scales"] = torch.full(blocks[:-1], 124, dtype=torch.uint8)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4"}
    (folder / "config.json").write_text(json.dumps(config))
    held = load(str(folder), device="cpu")
    writer = held.anatomy.writers[0]["mlp_down_proj"]
    assert not writer.quantized
    assert writer.weight.shape == (4, HIDDEN, 64)
    table = {0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0}
    assert set((writer.weight.float().abs() * 8).unique().tolist()) == table
    with pytest.raises(ModelError, match=r"stored in mxfp4 .*quantization = 'none'"):
        load(str(folder), device="cpu", quantization="bnb-4bit")


def test_a_checkpoint_in_fp8_is_unpacked(folder: Path) -> None:
    """As DeepSeek publishes: float8 weights, one scale for each block of them."""
    state = load_file(folder / "model.safetensors")
    for key in [key for key in state if ".layers." in key and state[key].dim() == 2]:
        shape = state[key].shape
        scales = torch.full((shape[0] // 16, shape[1] // 16), 0.5)
        state[f"{key}_scale_inv"] = scales
        state[key] = (state[key] * 2).to(torch.float8_e4m3fn)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [16, 16]}
    (folder / "config.json").write_text(json.dumps(config))
    held = load(str(folder), device="cpu")
    tokens = token_ids()
    exact = tiny_model("llama")
    for writers, others in zip(held.anatomy.writers, anatomy(exact).writers, strict=True):
        for component in COMPONENTS:
            found, expected = writers[component].weight.float(), others[component].weight
            assert (found - expected).abs().max() < 0.07 * expected.abs().max()
    assert (held.model(tokens).logits - exact(tokens).logits).abs().mean() < 0.2


def test_pickled_weights_are_not_loaded(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(tiny_model("llama").state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"no \.safetensors weights.*save_pretrained"):
        load(str(folder), device="cpu")


def test_torn_weights_are_an_error_of_ours(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match="cannot load"):
        load(str(folder), device="cpu")


@pytest.mark.parametrize("text", ["{", "{}", '{"model_type": "never-heard-of"}'])
def test_a_broken_config_is_an_error_of_ours(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(ModelError, match="cannot read"):
        load(str(folder), device="cpu")


def test_a_repositorys_own_code_runs_only_when_trusted(folder: Path) -> None:
    ran = folder / "ran"
    (folder / "config.json").write_text(
        '{"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}'
    )
    (folder / "own.py").write_text(f"open({str(ran)!r}, 'w')\n")
    with pytest.raises(ModelError, match=r"set model[.]trust_remote_code = true"):
        load(str(folder), device="cpu")
    assert not ran.exists()


@pytest.mark.parametrize("name", ["./no/such", "/no/such", "~/no/such", "a/b/c", "a b", ".."])
def test_a_missing_folder_is_not_taken_for_a_hub_id(name: str) -> None:
    if name == "..":
        assert local_folder(name) == Path("..")
        return
    with pytest.raises(ModelError, match="no model folder"):
        load(name)


def test_a_hub_out_of_reach_is_one_line_with_a_way_out(offline: Path) -> None:
    with pytest.raises(ModelError, match="local folder") as caught:
        load("somebody/some-model", device="cpu")
    assert "\n" not in str(caught.value)
    with pytest.raises(ModelError, match=r"pin model[.]revision") as caught:
        resolve("somebody/some-model")
    assert "\n" not in str(caught.value)


def test_unknown_quantization_is_refused(saved: Path) -> None:
    with pytest.raises(ModelError, match="unknown quantization 'x'"):
        load(str(saved), quantization="x", device="cpu")


def test_loading_leaves_transformers_talk_as_it_was(saved: Path) -> None:
    before = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    load(str(saved), device="cpu")
    after = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    assert before == after


def test_a_commit_is_its_own_identity_and_a_branch_is_looked_up(offline: Path) -> None:
    assert resolve("me/model", COMMIT).digest == f"hub:me/model@{COMMIT}"
    ref = offline / "models--me--model" / "refs" / "main"
    ref.parent.mkdir(parents=True)
    ref.write_text(COMMIT)
    assert resolve("me/model") == resolve("me/model", COMMIT)


def test_a_folders_identity_is_its_content_not_its_place(saved: Path, folder: Path) -> None:
    here, there = resolve(str(saved)), resolve(str(folder))
    assert here.digest == there.digest == f"sha256:{folder_digest(saved)}"
    assert here.source != there.source
    assert here.revision is None


@pytest.mark.parametrize("name", ["README.md", "card.json", ".cache/x.json", "run.log", "LICENSE"])
def test_prose_and_hidden_files_do_not_count(folder: Path, name: str) -> None:
    before = folder_digest(folder)
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("{}")
    assert folder_digest(folder) == before


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja", "own.py"]
)
def test_everything_that_computes_counts(folder: Path, name: str) -> None:
    before = folder_digest(folder)
    path = folder / name
    path.write_bytes((path.read_bytes() if path.exists() else b"") + b" ")
    assert folder_digest(folder) != before


def test_names_count_and_boundaries_cannot_shift(tmp_path: Path) -> None:
    digests = set()
    for number, files in enumerate(
        [{"a.json": "xy"}, {"b.json": "xy"}, {"a.json": "x", "b.json": "y"}, {"a.json": "x"}]
    ):
        place = tmp_path / str(number)
        place.mkdir()
        for name, text in files.items():
            (place / name).write_text(text)
        digests.add(folder_digest(place))
    assert len(digests) == 4


def test_a_folder_without_model_files_has_no_identity(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="holds no model files"):
        resolve(str(tmp_path))


def test_the_digest_of_a_known_folder_is_this_one(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert folder_digest(tmp_path) == (
        "bef6acf233bd20dd9e6db488ed06d5f0e0cf0e3730765a3ef7f28c7de705b168"
    )


def test_identity_needs_neither_torch_nor_the_hubs_client(saved: Path) -> None:
    code = (
        "import sys\nfrom tasks.models.identity import resolve\n"
        f"resolve({str(saved)!r}); resolve('me/model', '{COMMIT}')\n"
        "assert not {'torch', 'transformers', 'huggingface_hub'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent)
