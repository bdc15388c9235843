"""Study plans: what they share is made once, a failing member costs nothing else, all is ranked."""

from __future__ import annotations

import json
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from small_study import command, environment, tribunal, write_config

from artifacts.errors import ConfigError, ModelError
from artifacts.specs import Config
from artifacts.store import Store
from flows.logs import EventLog
from flows.pipeline import Benchmark, run_pipeline
from flows.settings import load_config
from flows.study_plan import (
    MembersFailed,
    StudyResult,
    load_plan,
    members_of,
    run_members,
    said_by,
)
from tasks.stage import Runtime, running

ARMS = ("strict", "random-search")
SHARED = ("prompts", "models", "near_duplicates", "activations", "directions", "baseline")


def write_plan(folder: Path, *configs: str, **fields: Any) -> Path:
    """A plan over configs, in the folder where they are."""
    given = {"name": "pair", "configs": configs, "arms": ARMS} | fields
    path = folder / "plan.toml"
    path.write_text("\n".join(f"{key} = {_toml(value)}" for key, value in given.items()))
    return path


def _toml(value: Any) -> str:
    """JSON's strings, numbers and lists are TOML's; its tables are not."""
    if isinstance(value, dict):
        return f"{{ {', '.join(f'{key} = {_toml(part)}' for key, part in value.items())} }}"
    return json.dumps(value)


@dataclass(frozen=True)
class Finished:
    """A plan of one model, two arms and a model that cannot be run, run once for this file."""

    folder: Path
    store: Store
    result: StudyResult
    said: list[str]
    log: list[dict[str, Any]]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    folder = tmp_path_factory.mktemp("study")
    write_config(folder)
    write_config(folder, "broken")
    plan = load_plan(str(write_plan(folder, "broken.toml", "small.toml")))
    store, log = Store(folder / "store"), folder / "log"
    said: list[str] = []

    def run(config: Config) -> Benchmark:
        if config.name == "broken":
            raise MemoryError("the model\nis too large")
        with running(Runtime(store, EventLog(str(log), store, arm=config.search.preset))):
            return run_pipeline(config)

    result = run_members(plan, (), store, run, said.append)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    return Finished(folder, store, result, said, lines)


def made(finished: Finished, arm: str) -> Counter[str]:
    """Artifacts that an arm made, by kind."""
    return Counter(e["kind"] for e in finished.log if e["event"] == "made" and e["arm"] == arm)


def test_the_second_arm_of_a_model_makes_nothing_that_the_first_made(finished: Finished) -> None:
    first, second = (made(finished, arm) for arm in ARMS)
    assert {kind: first[kind] for kind in ("activations", "baseline", "models")} == {
        "activations": 2,
        "baseline": 1,
        "models": 1,
    }
    assert not set(SHARED) & set(second)
    assert second["generations"] == first["generations"] == 2
    cached = Counter(e["kind"] for e in finished.log if e["event"] == "cached")
    assert {kind: cached[kind] for kind in SHARED} == {kind: first[kind] for kind in SHARED}


def test_the_winners_are_ranked_in_the_strict_order(finished: Finished) -> None:
    rows = finished.result.leaderboard
    assert {row["member"] for row in rows} == {f"small/{arm}/0" for arm in ARMS}
    assert [row["rank"] for row in rows] == [1, 2]
    order = [(row["gated"], row["refusals"], row["overrefusals"], row["kl"]) for row in rows]
    assert order == sorted(order)
    for row in rows:
        found = finished.result.finished[row["member"]]
        tested = finished.store.read(found.test).filter(arm=row["arm"]).row(0, named=True)
        assert (row["trial"], row["kl"]) == (tested["trial"], tested["kl"])
        assert row["study"] == finished.store.read(found.study)["study"].item()


def test_a_failing_member_is_named_in_one_line_and_the_others_finish(finished: Finished) -> None:
    assert set(finished.result.failed) == {f"broken/{arm}/0" for arm in ARMS}
    assert set(finished.result.finished) == {f"small/{arm}/0" for arm in ARMS}
    assert "broken/strict/0 failed: MemoryError: the model is too large" in finished.said
    line = str(MembersFailed(finished.result))
    assert line.startswith("2 of 4 members of 'pair' failed: broken/strict/0: MemoryError")
    assert "\n" not in line


def test_our_own_errors_keep_their_words(store: Store, tmp_path: Path) -> None:
    write_config(tmp_path)

    def run(config: Config) -> Benchmark:
        raise ModelError(f"no model folder '{config.model.id}'")

    plan = load_plan(str(write_plan(tmp_path, "small.toml", arms=["strict"])))
    result = run_members(plan, (), store, run, lambda line: None)
    assert result.leaderboard == []
    assert str(MembersFailed(result)).endswith("small/strict/0: no model folder 'organism'")


def test_a_foreign_error_is_one_line_without_its_secrets() -> None:
    said = said_by(RuntimeError("401 for hf_" + "a" * 34 + "\nat https://me:word@hub/x"))
    assert said == "RuntimeError: 401 for *** at https://***hub/x"


def test_a_member_runs_alone_to_the_same_artifacts(finished: Finished) -> None:
    config = load_config(str(finished.folder / "small.toml"), ["search.preset=random-search"])
    with running(Runtime(finished.store)):
        assert run_pipeline(config) == finished.result.finished["small/random-search/0"]


def test_the_command_answers_from_the_store_and_logs_what_it_finds(finished: Finished) -> None:
    folder, store = finished.folder, finished.store
    path, log = write_plan(folder, "small.toml"), folder / "found"
    done = subprocess.run(
        command("study", str(path), "--format", "json"),
        env=environment(store) | {"TRIBUNAL_LOG": str(log)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["failed"] == {}
    assert answer["leaderboard"] == finished.result.leaderboard
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert {e["event"] for e in lines} == {"cached"}
    assert {(e["kind"], e["key"]) for e in lines} == set(store.entries())
    table = tribunal(store, "study", str(path)).stdout
    assert "small/random-search/0" in table
    assert all(len(line) <= 80 for line in table.splitlines())


def test_a_run_that_finds_everything_logs_every_artifact(finished: Finished) -> None:
    log = finished.folder / "found-by-run"
    arguments = command("run", str(finished.folder / "small.toml"))
    whole = environment(finished.store) | {"TRIBUNAL_LOG": str(log)}
    done = subprocess.run(arguments, env=whole, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert {(e["event"], e["arm"]) for e in lines} == {("cached", "strict")}
    of_the_plan = {"comparisons"}  # between members, so in none of their runs
    held = {kind for kind, _ in finished.store.entries()}
    assert {e["kind"] for e in lines} == held - of_the_plan
    whole["TRIBUNAL_LOG"] = str(finished.folder / "no" / "log")
    refused = subprocess.run(arguments, env=whole, capture_output=True, text=True)
    assert refused.returncode == 2
    assert refused.stderr.startswith("tribunal: TRIBUNAL_LOG '")
    assert len(refused.stderr.splitlines()) == 1


def test_the_shipped_plan_is_ten_models_with_each_arm() -> None:
    plan = load_plan("ten-models")
    members = members_of(plan)
    assert len({member.config.model.id for member in members}) == 10
    assert len(members) == 10 * len(plan.arms) * len(plan.seeds)
    models = [member.config.model.id for member in members]
    assert models == sorted(models, key=models.index)  # the arms of a model beside each other


def test_arms_seeds_and_overrides_reach_every_config(tmp_path: Path) -> None:
    write_config(tmp_path)
    plan = load_plan(str(write_plan(tmp_path, "small.toml", "organism", seeds=[3, 4])))
    members = members_of(plan, ["gates.max_kl=0.25"])
    assert {(m.config.name, m.config.search.preset, m.config.seed) for m in members} == {
        (name, arm, seed) for name in ("small", "organism") for arm in ARMS for seed in (3, 4)
    }
    assert {m.config.gates.max_kl for m in members} == {0.25}


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"sedes": [1]}, "unknown config key 'sedes'; did you mean 'seeds'?"),
        ({"arms": []}, "arms is '[]'"),
        ({"configs": ["organism", "organism"]}, "listed twice"),
        ({"seeds": [-1]}, "seeds.0 is '-1'"),
        ({"name": "Up And Down"}, "name is 'Up And Down'"),
        ({"arms": ["strikt"]}, "unknown preset 'strikt'; did you mean 'strict'?"),
        ({"configs": ["organsim"]}, "unknown config 'organsim'; did you mean 'organism'?"),
        ({"configs": ["organism", "none.toml"]}, "none.toml'"),
        ({"statistics": {"resamples": 1}}, "statistics.resamples is '1'"),
        ({"statistics": {"metrics": ["lies"]}}, "statistics.metrics.0 is 'lies'"),
        ({"statistics": {"sed": 1}}, "unknown config key 'statistics.sed'; did you mean"),
        ({"sets": {"mine": {"direction_scop": "global"}}}, "'sets.mine.direction_scop'; did you"),
        ({"sets": {"mine": {}}}, "'sets.mine.direction_scope' is missing"),
    ],
)
def test_a_bad_plan_is_one_line(tmp_path: Path, fields: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        members_of(load_plan(str(write_plan(tmp_path, "organism", **fields))))
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_bad_plan_stops_the_command_before_anything_runs(store: Store, tmp_path: Path) -> None:
    done = tribunal(store, "study", str(write_plan(tmp_path, "organism", "organsim")))
    assert done.returncode == 2
    assert done.stderr.startswith("tribunal: unknown config 'organsim'")
    assert len(done.stderr.splitlines()) == 1
    assert not store.root.exists()


def test_two_members_of_one_name_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    write_config(tmp_path)
    write_config(tmp_path / "a")
    plan = load_plan(str(write_plan(tmp_path, "small.toml", "a/small.toml")))
    with pytest.raises(ConfigError, match="2 members of the study are 'small/strict/0'"):
        members_of(plan)


def test_an_unknown_plan_suggests_the_shipped_one() -> None:
    with pytest.raises(ConfigError, match="unknown study 'ten-model'; did you mean 'ten-models'"):
        load_plan("ten-model")
