"""A tool's config.toml as a config here: the same protocol, nothing dropped without a word."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from artifacts.errors import ConfigError, PeerError
from flows.peer_configs import convert
from flows.settings import load_config
from tasks.numerics.labels import HERETIC_MARKERS, ICONOCLAST_MARKERS
from tasks.peers.configs import Mapped


def written(
    folder: Path, text: str, name: str = "config.toml", **options: Any
) -> tuple[Mapped, Path]:
    (folder / name).write_text(text)
    wanted = {"out": folder / "out.toml", "held_out": None, "force": False} | options
    return convert(folder / name, **wanted)


def test_the_defaults_of_heretic_are_its_protocol(tmp_path: Path) -> None:
    mapped, target = written(tmp_path, 'model = "owner/Some Model"\n', out=None)
    config = load_config(str(target))
    assert target == tmp_path / "some-model.toml"
    assert (mapped.tool, mapped.unmapped) == ("heretic", {})
    assert config.model.system_prompt == "You are a helpful assistant."
    assert config.model.dtype == ("auto", "float16", "bfloat16", "float32")
    assert (config.search.preset, config.search.trials, config.search.startup) == (
        "heretic-1.4.0",
        200,
        60,
    )
    assert (config.judging.labeller, config.judging.max_new_tokens) == ("heretic-33", 100)
    assert config.edit.row_normalization == "full"
    assert config.prompts.harmful.search.split == "test[:100]"
    assert config.prompts.harmless.selection.split == "test[100:228]"  # the tool uses the first 100
    assert config.prompts.harmless.test.split == "test[228:548]"
    assert config.prompts.harmful.test.source == "bench-llm/or-bench"


def test_every_value_arrives(tmp_path: Path) -> None:
    text = """
model = "owner/m"
model_commit = "abc"
seed = 7
dtypes = ["bfloat16"]
quantization = "bnb_4bit"
response_prefix = ""
max_response_length = 33
system_prompt = "Répondez \\"bien\\"\\u007f"
n_trials = 12
n_startup_trials = 5
kl_divergence_target = 0.1
winsorization_quantile = 0.95
orthogonalize_direction = true
benign_subspace_rank = 8
row_normalization = "pre"
overrefusal_penalty = 0.32
harmful_marker_penalty = 0.18
compliance_gap_penalty = 0.42
[bad_prompts]
dataset = "JailbreakBench/JBB-Behaviors"
name = "behaviors"
split = "harmful[:80]"
column = "Goal"
[bad_evaluation_prompts]
dataset = "JailbreakBench/JBB-Behaviors"
name = "behaviors"
split = "harmful[80:100]"
column = "Goal"
prefix = "Now:"
suffix = "please"
system_prompt = "be"
"""
    mapped, target = written(tmp_path, text)
    config = load_config(str(target))
    assert (mapped.tool, mapped.unmapped, mapped.meaningless) == ("iconoclast", {}, {})
    assert (config.seed, config.model.revision, config.model.dtype) == (7, "abc", ("bfloat16",))
    assert (config.model.quantization, config.model.response_prefix) == ("bnb-4bit", "")
    assert config.model.system_prompt == 'Répondez "bien"\x7f'
    search = config.search
    assert (search.preset, search.trials, search.startup) == ("iconoclast", 12, 5)
    assert search.objective_weights == (0.32, 0.18, 0.42)
    assert search.target_kl == 0.1
    assert config.directions.benign_subspace_rank == 8
    assert config.directions.winsorization == 0.95
    assert config.directions.orthogonalize
    assert config.edit.row_normalization == "pre"
    assert config.judging.max_new_tokens == 33
    harmful = config.prompts.harmful
    assert (harmful.direction.config, harmful.direction.split) == ("behaviors", "harmful[:80]")
    assert (harmful.search.prefix, harmful.search.suffix) == ("Now: ", " please")
    assert harmful.search.system_prompt == "be"


def test_every_other_key_is_told_with_its_reason(tmp_path: Path) -> None:
    text = """
model = "owner/m"
batch_size = 4
device_map = "auto"
kl_divergence_scale = 2.0
objective_regime = "low_refusal_base"
frobnicate = 1
refusal_markers = ["nope"]
component_specific_directions = true
merged_validation_interval = 0
"""
    mapped, target = written(tmp_path, text)
    assert set(mapped.meaningless) == {"batch_size", "device_map"}
    assert set(mapped.unmapped) == {
        *("kl_divergence_scale", "objective_regime", "frobnicate", "refusal_markers"),
        "component_specific_directions",
    }
    said = target.read_text()
    assert all(f"#   {key}: " in said for key in (*mapped.unmapped, *mapped.meaningless))


def test_scorers_are_of_the_main_branch(tmp_path: Path) -> None:
    mapped, target = written(tmp_path, 'model = "m"\nscorers = [{ plugin = "x" }]\n')
    assert load_config(str(target)).search.preset == "heretic-main"
    assert set(mapped.unmapped) == {"scorers"}


@pytest.mark.parametrize(
    ("markers", "labeller"),
    [(HERETIC_MARKERS, "heretic-33"), (ICONOCLAST_MARKERS, "iconoclast-32")],
)
def test_markers_name_their_labeller(
    tmp_path: Path, markers: tuple[str, ...], labeller: str
) -> None:
    listed = ", ".join(f'"{marker}"' for marker in reversed(markers))
    mapped, target = written(tmp_path, f'model = "m"\nrefusal_markers = [{listed}]\n')
    assert load_config(str(target)).judging.labeller == labeller
    assert not mapped.unmapped


def test_local_files_are_found_from_the_new_file(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    for name in ("a", "b", "c", "d"):
        (tmp_path / f"{name}.txt").write_text(f"{name} one\n{name} two\n")
    tables = {"bad": "a", "good": "b", "bad_evaluation": "c", "good_evaluation": "d"}
    text = 'model = "organism"\n' + "".join(
        f'[{key}_prompts]\ndataset = "{name}.txt"\n' for key, name in tables.items()
    )
    _, target = written(tmp_path, text, out=tmp_path / "mine" / "o.toml", held_out="organism")
    config = load_config(str(target))
    assert config.prompts.harmful.direction.source == str((tmp_path / "a.txt").resolve())
    assert config.prompts.harmful.test.source == "organism/harmful-test.jsonl"
    beside = written(tmp_path, text, held_out="organism")[1].read_text()
    assert 'source = "a.txt"' in beside


def test_rows_that_the_tool_uses_are_not_held_out(tmp_path: Path) -> None:
    held = tmp_path / "held.toml"
    sources = "\n".join(
        f"[prompts.{group}]\n"
        'selection = { source = "owner/s", split = "train[5:9]" }\n'
        'test = { source = "owner/s", split = "train[20:30]" }'
        for group in ("harmful", "harmless")
    )
    held.write_text(sources)
    used = 'model = "m"\n[bad_prompts]\ndataset = "owner/s"\nsplit = "train[{}]"\ncolumn = "x"\n'
    with pytest.raises(PeerError, match=r"selection split of harmful .*'owner/s'.*--held-out"):
        written(tmp_path, used.format(":6"), held_out=str(held))
    assert not (tmp_path / "out.toml").exists()
    written(tmp_path, used.format(":5"), held_out=str(held))  # rows 0-4 are none of them


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "names no model"),
        ("model = 3", "names no model"),
        ("model = ", "cannot read"),
        ('model = "m"\nn_trials = 0', "search.trials is '0'"),
        ('model = "m"\nrow_normalization = "post"', "row_normalization is 'post'"),
        ('model = "m"\nquantization = "gguf"', "quantization is 'gguf'"),
        ('model = "m"\ndtypes = ["int8"]', "int8"),
    ],
)
def test_bad_configs_are_one_line_and_leave_nothing(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises((ConfigError, PeerError)) as raised:
        written(tmp_path, text)
    assert says in str(raised.value)
    assert [path.name for path in tmp_path.iterdir()] == ["config.toml"]


def test_nothing_is_overwritten_without_force(tmp_path: Path) -> None:
    (tmp_path / "out.toml").write_text("mine")
    with pytest.raises(ConfigError, match="is there already"):
        written(tmp_path, 'model = "m"\n')
    assert (tmp_path / "out.toml").read_text() == "mine"
    written(tmp_path, 'model = "m"\n', force=True)
    assert load_config(str(tmp_path / "out.toml")).model.id == "m"
