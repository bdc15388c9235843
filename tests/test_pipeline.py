"""The main job on a small study: what it makes, that it repeats, and what it refuses."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest
from small_study import digests, environment, trial_table, tribunal, write_config

from artifacts.catalog import catalog, fetch, user_query
from artifacts.errors import ModelError, PromptError, TestSplitSpent
from artifacts.store import Store
from flows.pipeline import Benchmark, run_pipeline, split_of
from flows.settings import load_config
from tasks.locked_test import refuse_other_trials
from tasks.models.identity import ORGANISM
from tasks.stage import Runtime, Silent, planning, running
from tasks.trials import open_court, read_trials, trial_of


@pytest.fixture(scope="module")
def config_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tmp_path_factory.mktemp("config"))


class Watch(Silent):
    """Keeps what it was told of each artifact's progress."""

    def __init__(self) -> None:
        self.told: dict[str, list[tuple[int, int]]] = {}
        self._now: list[tuple[int, int]] = []

    def started(self, label: str, work: int) -> None:
        self._now = self.told.setdefault(label, [])

    def advanced(self, done: int, total: int) -> None:
        self._now.append((done, total))


WATCH = Watch()  # of the study below


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, config_path: Path) -> tuple[Store, Benchmark]:
    """One finished study, shared and not changed by the tests below."""
    store = Store(tmp_path_factory.mktemp("small") / "store")
    with running(Runtime(store, WATCH)):
        return store, run_pipeline(load_config(str(config_path)))


def run(store: Store, path: Path, *overrides: str) -> Benchmark:
    with running(Runtime(store)):
        return run_pipeline(load_config(str(path), overrides))


def test_every_trial_is_ranked_and_every_response_is_stored(small: tuple[Store, Benchmark]) -> None:
    store, found = small
    rows = user_query(store, "SELECT rank, trial FROM leaderboard WHERE split = 'search'").rows
    assert sorted(row[0] for row in rows) == [1, 2, 3, 4]
    assert sorted(row[1] for row in rows) == [0, 1, 2, 3]
    counts = "SELECT split, arm, count(*) FROM responses WHERE study IS NOT NULL GROUP BY ALL"
    per_arm = {(s, a): n for s, a, n in user_query(store, counts).rows}
    assert per_arm == {
        ("search", "strict"): 4 * 24,
        ("selection", "strict"): 2 * 24,
        ("test", "strict"): 24,
        ("test", "unedited"): 24,
        ("test", "identity"): 24,
        ("test", "random-direction"): 24,
    }
    assert all(store.find(ref.kind, ref.key) for ref in found.generations)


@pytest.mark.parametrize("label", ["unedited model, search split", "trials 0-1"])
def test_progress_counts_prompts_and_ends_at_their_number(
    small: tuple[Store, Benchmark], label: str
) -> None:
    told = WATCH.told[label]
    done, totals = [d for d, _ in told], {total for _, total in told}
    assert totals == {24 if label.startswith("unedited") else 48}
    assert done == sorted(done)
    assert done[-1] == max(totals)
    assert len(set(done)) > 1, "it moves while prompts are answered"


def test_the_identity_is_the_unedited_model_to_the_bit(small: tuple[Store, Benchmark]) -> None:
    store, _ = small
    sql = "SELECT kl, kl_max FROM trials WHERE arm IN ('identity', 'unedited')"
    assert set(user_query(store, sql).rows) == {(0.0, 0.0)}
    sql = """SELECT count(*) FROM responses a JOIN responses b USING (prompt_id, split, study)
             WHERE a.arm = 'identity' AND b.arm = 'unedited' AND a.response <> b.response"""
    assert user_query(store, sql).rows == ((0,),)


def test_an_edit_is_not_the_unedited_model(small: tuple[Store, Benchmark]) -> None:
    store, _ = small
    sql = "SELECT min(kl) > 0 FROM trials WHERE arm = 'strict'"
    assert user_query(store, sql).rows == ((True,),)


def test_a_plan_of_a_finished_study_is_cached_and_answers(
    small: tuple[Store, Benchmark], config_path: Path
) -> None:
    store, found = small
    with planning(store) as steps:
        planned = run_pipeline(load_config(str(config_path)))
    assert all(step.cached for step in steps)
    assert planned == found


def test_a_second_run_loads_neither_torch_nor_prefect(
    small: tuple[Store, Benchmark], config_path: Path
) -> None:
    script = (
        "import sys; from flows.cli import app\n"
        f"app(['run', {str(config_path)!r}], standalone_mode=False)\n"
        "assert not {'torch', 'transformers', 'prefect', 'optuna'} & set(sys.modules)\n"
    )
    whole = environment(small[0])
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=whole)
    assert done.returncode == 0, done.stderr


def test_a_fresh_store_gives_the_same_tables(
    small: tuple[Store, Benchmark], config_path: Path, store: Store
) -> None:
    run(store, config_path)
    assert digests(store) == digests(small[0])
    assert trial_table(store).equals(trial_table(small[0]), null_equal=True)


def test_an_extension_keeps_every_trial_and_the_frozen_one(config_path: Path, store: Store) -> None:
    first = run(store, config_path, "search.trials=3")
    second = run(store, config_path, "search.trials=6")
    assert second.generations[0] == first.generations[0]
    assert second.protocol == first.protocol
    assert second.winner == first.winner
    assert second.test == first.test
    with catalog(store) as connection:
        sql = "SELECT trial FROM trials WHERE split = 'search' ORDER BY trial"
        assert [row[0] for row in fetch(connection, sql).rows] == list(range(6))


def test_a_cut_generation_holds_the_first_trials_of_the_whole_one(
    config_path: Path, store: Store
) -> None:
    cut = run(store, config_path, "search.trials=3").generations[1]
    whole = run(store, config_path, "search.trials=4").generations[1]
    with running(Runtime(store)):
        assert read_trials([cut]).equals(read_trials([whole]).head(1), null_equal=True)


@pytest.mark.parametrize("size", [1, 3])
def test_any_generation_size_repeats_itself(config_path: Path, tmp_path: Path, size: int) -> None:
    stores = [Store(tmp_path / name) for name in ("one", "two")]
    for store in stores:
        run(store, config_path, f"search.generation={size}")
    assert digests(stores[0]) == digests(stores[1])


def test_a_changed_seed_changes_the_trials(
    small: tuple[Store, Benchmark], config_path: Path, store: Store
) -> None:
    with running(Runtime(small[0])):
        first = read_trials(small[1].generations)
    other = run(store, config_path, "seed=1")
    with running(Runtime(store)):
        asked = read_trials(other.generations)
    names = ["trial", "direction_index", "mlp_down_proj_max_weight"]
    assert not asked.select(names).equals(first.select(names))


def test_the_test_split_is_spent(small: tuple[Store, Benchmark]) -> None:
    store, found = small
    prompts = split_of(found.prompts, "test")
    frozen = store.manifest(found.test.kind, found.test.key).notes["trial"]
    refuse_other_trials(store, found.protocol.key, prompts, frozen)
    refuse_other_trials(store, found.protocol.key, split_of(found.prompts, "search"), frozen + 1)
    with pytest.raises(TestSplitSpent, match=f"opened for trial {frozen} on .* '{frozen + 1}'"):
        refuse_other_trials(store, found.protocol.key, prompts, frozen + 1)


def test_a_row_alone_rebuilds_its_edit(small: tuple[Store, Benchmark], config_path: Path) -> None:
    store, found = small
    config = load_config(str(config_path))
    materials = {"model": found.model, "directions": found.directions, "baseline": found.baseline}
    with running(Runtime(store)):
        stored = store.read(found.generations[1]).to_dicts()[-1]
        prompts = split_of(found.prompts, "search")
        court, _ = open_court("search", config, found.protocol, materials, prompts)
        trial = trial_of(stored)
        again = court.judge([trial])[0]
        assert again == stored
        moved = trial.parameters | {"attn_o_proj_max_weight": 0.0}
        assert court.judge([replace(trial, parameters=moved)])[0] != stored


def test_activations_are_computed_per_prompt(
    small: tuple[Store, Benchmark], config_path: Path, store: Store
) -> None:
    run(store, config_path)
    more = run(store, config_path, 'prompts.harmful.direction.split="train[:50]"')
    made = {
        name: store.manifest(ref.kind, ref.key).notes["computed"]
        for name, ref in more.activations.items()
    }
    assert made == {"harmful": 10, "harmless": 40}


def test_the_same_prompt_in_two_splits_is_refused(config_path: Path, store: Store) -> None:
    same = 'prompts.harmful.test.source="organism/harmful-search.jsonl"'
    with pytest.raises(PromptError, match="8 prompts are in both 'harmful/search'"):
        run(store, config_path, same)


def test_a_prompt_of_two_classes_is_refused(config_path: Path, store: Store) -> None:
    both = 'prompts.harmless.search.source="organism/harmful-search.jsonl"'
    with pytest.raises(PromptError, match=r"in both 'harmful/search' .* and 'harmless/search'"):
        run(store, config_path, both)


def test_a_prompt_that_does_not_fit_is_refused(config_path: Path, store: Store) -> None:
    with pytest.raises(ModelError, match="exceed the model's 512 positions"):
        run(store, config_path, "judging.max_new_tokens=500")


def test_new_test_prompts_are_a_new_opening_and_old_results_stay(
    config_path: Path, store: Store
) -> None:
    run(store, config_path)
    other = ["prompts.harmful.test.split=train[8:28]", "prompts.harmless.test.split=train[8:28]"]
    run(store, config_path, *other)
    for size, sets in ((8, []), (20, other)):
        words = [x for override in sets for x in ("--set", override)]
        done = tribunal(store, "run", str(config_path), "--format", "json", *words)
        answer = json.loads(done.stdout)
        assert {row["n_harmful"] for row in answer["test"]} == {size}
        assert len(answer["test"]) == 4


def test_the_same_model_from_another_place_is_the_same_study(
    config_path: Path, store: Store, tmp_path: Path
) -> None:
    first = run(store, config_path)
    moved = tmp_path / "moved"
    shutil.copytree(ORGANISM, moved)
    assert run(store, config_path, f"model.id={moved}") == first
    assert user_query(store, "SELECT count(*) FROM trials WHERE split = 'search'").rows == ((4,),)


def test_a_missing_model_is_one_line(config_path: Path, store: Store) -> None:
    with pytest.raises(ModelError, match=r"no model folder '\./nowhere'"):
        run(store, config_path, "model.id=./nowhere")


def test_relabelling_loads_no_model_and_adds_labels(config_path: Path, store: Store) -> None:
    run(store, config_path, "search.trials=2")
    script = (
        "import sys; from flows.cli import app\n"
        "words = ['relabel', '--labeller', 'prefix-strict', '--format', 'json']\n"
        "app(words, standalone_mode=False)\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment(store)
    )
    assert done.returncode == 0, done.stderr
    assert {row["trial"] for row in json.loads(done.stdout)} == {0, 1}
    sql = "SELECT labeller, count(*) FROM labels GROUP BY labeller ORDER BY labeller"
    counts = dict(user_query(store, sql).rows)
    assert counts["prefix-strict"] == counts["heretic-33"] > 0


COMMANDS = [
    ["run", "CONFIG"],
    ["run", "CONFIG", "--format", "json"],
    ["plan", "CONFIG"],
    ["why", "directions", "CONFIG", "--set", "directions.winsorization=0.9"],
    ["rank"],
    ["show", "0"],
    ["store", "ls"],
    ["store", "verify"],
    ["store", "gc"],
    ["sql", "--schema"],
    ["sql", "FROM studies"],
]


@pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)
def test_the_answers_of_the_command_line_fit_80_columns(
    small: tuple[Store, Benchmark], config_path: Path, arguments: list[str]
) -> None:
    store, _ = small
    done = tribunal(store, *[str(config_path) if a == "CONFIG" else a for a in arguments])
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout
    if arguments[:2] not in (["sql", "--schema"], ["sql", "FROM studies"]):
        wide = [x for x in done.stdout.splitlines() if len(x) > 80 and "figure:" not in x]
        assert wide == [] or "json" in arguments


def test_ranks_as_json_hold_the_promised_columns(small: tuple[Store, Benchmark]) -> None:
    rows = json.loads(tribunal(small[0], "rank", "--top", "2", "--format", "json").stdout)
    promised = "rank study arm trial split n_harmful refusals n_harmless overrefusals kl"
    assert [row["rank"] for row in rows] == [1, 2]
    assert set(promised.split()) | {"gated", "gate_reason"} <= set(rows[0])


def test_a_finished_run_as_json(small: tuple[Store, Benchmark], config_path: Path) -> None:
    answer = json.loads(tribunal(small[0], "run", str(config_path), "--format", "json").stdout)
    assert [row["arm"] for row in answer["test"]][:2] == ["strict", "unedited"]
    assert len(answer["leaderboard"]) == 4
    assert len(answer["responses"]) == 3
    assert answer["winner"]["parameters"]["direction_method"] == "mean"


PLACES = [
    ({"TRIBUNAL_STORE": "carrier-pigeon://bucket/store"}, "carrier-pigeon"),
    ({"TRIBUNAL_STORE": "/proc/version"}, "is not a folder"),
    ({"TRIBUNAL_STORE": "/proc/store"}, "cannot write to the store"),
    ({"TRIBUNAL_DEVICE": "foo"}, "device 'foo' cannot be used"),
    ({"TRIBUNAL_ROWS": "0"}, "TRIBUNAL_ROWS is '0'"),
]


@pytest.mark.parametrize(("settings", "line"), PLACES, ids=str)
def test_odd_settings_are_one_line(
    config_path: Path, store: Store, settings: dict[str, str], line: str
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "flows", "run", str(config_path)],
        capture_output=True,
        text=True,
        env=environment(store) | settings,
    )
    assert done.returncode == 2
    assert line in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


WRONG = [
    (["run", "--set", "search.preset=[1]"], "unknown preset"),
    (["run", "--set", "search.space.direction_index=[0, 1.5]"], "between 0 and 1"),
    (["run", "--set", "search.space.direction_method=[]"], "direction_method is '[]'"),
    (["run", "--set", "search.space.attn_o_proj=3"], "a table is needed"),
    (["run", "--set", "model.dtype=[]"], "model.dtype is '[]'"),
    (["show", "99"], "no trial '99'"),
    (["show", "x"], "not 'x'"),
    (["rank", "--study", "none"], "no study 'none'"),
    (["rank", "--split", "tset"], "unknown split 'tset'; did you mean 'test'?"),
    (["run", "organsim"], "did you mean 'organism'?"),
    (["run", "--set", "search.trails=3"], "did you mean 'search.trials'?"),
    (["why", "direction", "organism"], "did you mean 'directions'?"),
    (["relabel", "--labeller", "heretic"], "unknown labeller 'heretic'"),
    (["sql", "DROP VIEW trials"], "read-only"),
    (["sql"], "give a SELECT"),
    (["store", "ls", "--lineage", "zzz"], "no keys begin with 'zzz'"),
    (["rnk"], "No such command 'rnk'"),
    (["rank", "--top", "0"], "--top"),
]


@pytest.mark.parametrize(("arguments", "line"), WRONG, ids=str)
def test_bad_input_is_one_line_and_exit_code_2(
    small: tuple[Store, Benchmark], arguments: list[str], line: str
) -> None:
    before = digests(small[0])
    done = tribunal(small[0], *arguments)
    assert done.returncode == 2
    assert line in done.stderr
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert digests(small[0]) == before


def test_another_trial_is_refused_the_test_split(small: tuple[Store, Benchmark]) -> None:
    store, found = small
    frozen = store.manifest(found.test.kind, found.test.key).notes["trial"]
    assert tribunal(store, "test", str(frozen)).returncode == 0
    done = tribunal(store, "test", str((frozen + 1) % 4))
    assert done.returncode == 2
    assert f"belongs to trial {frozen}" in done.stderr


def test_lineage_reaches_the_prompts(small: tuple[Store, Benchmark]) -> None:
    store, found = small
    done = tribunal(store, "store", "ls", "--lineage", found.test.key[:10], "--format", "json")
    kinds = {row["kind"] for row in json.loads(done.stdout)}
    assert {"tests", "winners", "protocols", "directions", "activations", "prompts"} <= kinds


def test_why_names_what_changed(small: tuple[Store, Benchmark], config_path: Path) -> None:
    done = tribunal(
        small[0], "why", "directions", str(config_path), "--set", "directions.winsorization=0.9"
    )
    assert "winsorization: 1.0 -> 0.9" in done.stdout


def test_the_figure_is_a_picture(small: tuple[Store, Benchmark]) -> None:
    store, found = small
    assert store.read_bytes(found.figure).startswith(b"\x89PNG")


def test_parquet_of_activations_has_fixed_size_vectors(small: tuple[Store, Benchmark]) -> None:
    store, found = small
    schema = pl.read_parquet_schema(store.data_url(found.activations["harmful"]))
    assert schema["residual"] == pl.Array(pl.Float32, 128)
