"""A study plan on a Prefect server: what is shown while it runs, and how a failure ends it."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest
from prefect_stack import ROOT, Stack
from small_study import command, write_config

from artifacts.store import Store

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A server on which a plan of one good and one broken model ran once, as a command."""
    home = tmp_path_factory.mktemp("stack")
    good, broken = write_config(home), write_config(home, "broken")
    broken.write_text(broken.read_text().replace('id = "organism"', 'id = "./nowhere"'))
    plan = home / "plan.toml"
    names = json.dumps([broken.name, good.name])
    plan.write_text(f'name = "pair"\nconfigs = {names}\narms = ["strict"]\n')
    found = Stack(home)
    with found.server():
        done = subprocess.run(
            command("study", str(plan), "--format", "json"),
            env=found.environment,
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        (home / "code").write_text(str(done.returncode))
        (home / "out").write_text(done.stdout)
        (home / "err").write_text(done.stderr)
        yield found


def runs(stack: Stack) -> dict[str, dict[str, Any]]:
    """Every flow run, by its name."""
    return {run["name"]: run for run in stack.ask("POST", "/flow_runs/filter", {"limit": 50})}


def shown(stack: Stack, kind: str) -> dict[str, dict[str, Any]]:
    """The artifacts of a type in Prefect's UI, by key."""
    found = stack.ask("POST", "/artifacts/filter", {"limit": 50})
    return {a["key"]: a for a in found if a["type"] == kind}


def lines(stack: Stack, run: dict[str, Any]) -> list[str]:
    """What a flow run logged, its tasks included."""
    wanted = {"logs": {"flow_run_id": {"any_": [run["id"]]}}, "limit": 200}
    return [entry["message"] for entry in stack.ask("POST", "/logs/filter", wanted)]


def test_the_command_answers_what_finished_and_names_what_did_not(stack: Stack) -> None:
    assert (stack.home / "code").read_text() == "2"
    answer = json.loads((stack.home / "out").read_text())
    assert [row["member"] for row in answer["leaderboard"]] == ["small/strict/0"]
    assert list(answer["failed"]) == ["broken/strict/0"]
    last = (stack.home / "err").read_text().splitlines()[-1]
    assert last.startswith("tribunal: 1 of 2 members of 'pair' failed: broken/strict/0: no model")


def test_the_run_is_failed_and_says_which_member(stack: Stack) -> None:
    found = runs(stack)
    states = {name: run["state_type"] for name, run in found.items()}
    assert states == {"pair": "FAILED", "broken/strict/0": "FAILED", "small/strict/0": "COMPLETED"}
    assert "1 of 2 members of 'pair' failed: broken/strict/0" in found["pair"]["state"]["message"]


def test_the_ranking_is_a_table_that_tells_what_is_missing(stack: Stack) -> None:
    table = shown(stack, "table")["pair-study"]
    assert [row["member"] for row in json.loads(table["data"])] == ["small/strict/0"]
    assert "- broken/strict/0 failed: no model folder" in table["description"]


def test_a_search_is_a_bar_that_ends_full_and_belongs_to_its_run(stack: Stack) -> None:
    bars = shown(stack, "progress")
    assert set(bars) == {"small-progress"}  # nothing was judged of the broken model
    bar = bars["small-progress"]
    assert float(bar["data"]) == 100.0
    assert bar["description"] == "4 of 4 trials judged"
    assert bar["flow_run_id"] == runs(stack)["small/strict/0"]["id"]


def test_the_flow_log_has_seconds_and_bytes(stack: Stack) -> None:
    said = lines(stack, runs(stack)["small/strict/0"])
    made = [line for line in said if line.startswith("trials 0-1: made in ")]
    assert len(made) == 1
    assert " s, " in made[0]
    assert " kB (generations/" in made[0]
    assert any(line.endswith(" found in the store") for line in said)


def test_the_event_log_has_every_artifact_with_its_flow_run(stack: Stack) -> None:
    events = [json.loads(line) for line in (stack.home / "events.jsonl").read_text().splitlines()]
    own = runs(stack)["small/strict/0"]["id"]
    mine = [e for e in events if e["flow_run"] == own and e["event"] != "said"]
    assert {(e["kind"], e["key"]) for e in mine} == set(Store(stack.store).entries())
    # the prompts were made by the broken member's run and are the store's answer to this one
    assert {e["event"] for e in mine if e["kind"] == "prompts"} == {"cached"}
    assert {e["event"] for e in mine if e["kind"] == "generations"} == {"made"}
