"""Frozen winners measured again: on a real study, by the command line, and on a Prefect server."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from prefect_stack import Stack, wait_until
from small_study import SIZES, digests, environment, tribunal, write_config

from artifacts.catalog import user_query
from artifacts.specs import Config
from artifacts.store import Store
from flows.drift import Outcome, check_winners, config_of, winners_to_check
from flows.pipeline import run_pipeline
from flows.settings import load_config
from tasks import remeasure
from tasks.models.identity import ORGANISM
from tasks.organism import PROMPTS_FOLDER
from tasks.remeasure import Frozen
from tasks.stage import Runtime, running

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Village:
    """A finished study whose model and test prompts lie where a test can change them."""

    folder: Path
    store: Store

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def prompts(self) -> Path:
        return self.folder / "harmful-test.jsonl"

    def check(self, occasion: str | None = None, **versions: str) -> Outcome:
        """Hold the winner against this installation, or one with other versions."""
        now = {**remeasure.environment(), **versions}
        with running(Runtime(self.store)):
            winners = winners_to_check(self.store, ["village"])
            (found,) = check_winners(winners, occasion, now)
        return found

    def rebenchmark(self, *words: str) -> subprocess.CompletedProcess[str]:
        return tribunal(self.store, "rebenchmark", *words)


def write_village(folder: Path, name: str = "village") -> Path:
    """A small study's config, its model and its harmful test prompts copied beside it."""
    shutil.copytree(ORGANISM, folder / "model")
    lines = (PROMPTS_FOLDER / "harmful-test.jsonl").read_text().splitlines()[: SIZES["test"]]
    (folder / "harmful-test.jsonl").write_text("\n".join(lines) + "\n")
    path = write_config(folder, name)
    text = path.read_text().replace("organism/harmful-test.jsonl", "harmful-test.jsonl")
    text = text.replace("[gates]", "[gates]\nmax_kl = 0.05")
    # A winner of TPE's, for it loses its place, or passes no gate, under the noises of the tests.
    text = text.replace("[search]", '[search]\nsampler = "tpe"')
    path.write_text(text.replace('id = "organism"', 'id = "./model"'))
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Village:
    """The study, run once; its store is copied for every test."""
    folder = tmp_path_factory.mktemp("village")
    store = Store(folder / "store")
    with running(Runtime(store)):
        run_pipeline(load_config(str(write_village(folder))))
    return Village(folder, store)


@pytest.fixture
def village(finished: Village, tmp_path: Path) -> Village:
    """The study in a store of the test's own."""
    shutil.copytree(finished.store.root, tmp_path / "store")
    return Village(finished.folder, Store(tmp_path / "store"))


@contextmanager
def changed(file: Path, change: Callable[[Path], None]) -> Iterator[None]:
    """A file with other content for a while."""
    before = file.read_bytes()
    try:
        change(file)
        yield
    finally:
        file.write_bytes(before)


def noise(size: float) -> Callable[[Path], None]:
    """Adds seeded noise to every matrix of a model's weights."""

    def add(file: Path) -> None:
        import torch
        from safetensors.torch import load_file, save_file

        def noisy(weights: torch.Tensor) -> torch.Tensor:
            seeded = torch.Generator().manual_seed(0)
            drawn = size * torch.randn(weights.shape, generator=seeded)
            return weights + drawn if weights.ndim == 2 else weights

        found = {name: noisy(weights) for name, weights in load_file(file).items()}
        save_file(found, file, metadata={"format": "pt"})

    return add


def told(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """The one study of a JSON answer."""
    (found,) = json.loads(done.stdout)
    return dict(found)


def numbers(found: Outcome) -> list[tuple[Any, ...]]:
    return [(row["arm"], row["metric"], row["before"], row["after"]) for row in found.rows]


def test_where_nothing_changed_nothing_is_measured_and_no_torch_is_loaded(village: Village) -> None:
    script = (
        "import sys; from flows.cli import app\n"
        "for _ in range(2):\n"
        "    app(['rebenchmark', '--format', 'json'], standalone_mode=False)\n"
        "assert not {'torch', 'transformers', 'prefect', 'optuna'} & set(sys.modules)\n"
    )
    before = digests(village.store)
    whole = environment(village.store)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=whole)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('"verdict": "unchanged"') == 2
    assert done.stdout.count('"new": true') == 1
    added = digests(village.store).keys() - before.keys()
    assert {name.split("/")[0] for name in added} == {"drift"}
    assert len(added) == 1


def test_another_library_is_a_cause_and_the_same_numbers_are_unchanged(village: Village) -> None:
    first = village.check()
    found = village.check(torch="2.99.0")
    assert (found.verdict, found.news, found.winner["measured"]) == ("unchanged", True, True)
    assert str(found.winner["cause"]).endswith("-> 2.99.0")
    assert str(found.winner["cause"]).startswith("torch ")
    assert numbers(found) == numbers(first)
    held = digests(village.store)
    again = village.check(torch="2.99.0")
    assert (again.drift, again.news) == (found.drift, False)
    assert digests(village.store) == held
    back = village.check()
    assert (back.news, back.winner["measured"], back.winner["cause"]) == (True, False, None)


def test_what_is_measured_again_is_what_the_study_measured_to_the_bit(village: Village) -> None:
    village.check(occasion="look")
    for split in ("test", "selection"):
        columns = "arm, trial, prompts, refusals, overrefusals, kl, kl_max, directions, gate_reason"
        arms = "split = $$" + split + "$$ AND arm IN ('strict', 'unedited')"
        again = f"SELECT {columns} FROM remeasured WHERE {arms} ORDER BY ALL"
        rows = user_query(village.store, again).rows
        assert rows == user_query(village.store, again.replace("remeasured", "trials")).rows
        assert len(rows) == 2


def test_measuring_on_demand_is_once_per_occasion(village: Village) -> None:
    first, again = village.check("new driver"), village.check("new driver")
    assert first.winner["cause"] == "on demand: new driver"
    assert (first.news, again.news) == (True, False)
    assert first.drift == again.drift
    assert first.winner["measured"]
    forced = told(village.rebenchmark("--force", "--format", "json"))
    assert forced["new"]
    assert forced["cause"].startswith("on demand: 20")
    assert [metric["difference"] for metric in forced["metrics"]] == [0.0] * 9
    kinds = [kind for kind, _ in village.store.entries()]
    assert (kinds.count("retests"), kinds.count("reselections"), kinds.count("drift")) == (2, 2, 2)


def test_a_changed_model_drifts_by_intervals_and_fails_where_the_winner_does_not_hold(
    village: Village,
) -> None:
    file = village.model / "model.safetensors"
    with changed(file, noise(0.02)):
        lost = village.rebenchmark("--format", "json")
    with changed(file, noise(0.1)):
        gated = village.rebenchmark()
        stored = tribunal(village.store, "drift", "village")
    found = told(lost)
    assert lost.returncode == 1, lost.stderr
    assert found["cause"].startswith("model content ")
    assert (found["verdict"], found["place_before"], found["place_after"]) == (
        "lost its place",
        1,
        2,
    )
    for row in found["metrics"]:
        assert row["low"] <= row["difference"] <= row["high"]
        assert row["n_paired"] == row["n_before"] == row["n_after"]
    assert gated.returncode == 1
    assert "gate tripped: test: kl" in gated.stdout
    assert "0 of 1 winners hold" in gated.stdout
    assert "gate tripped: test: kl" in stored.stdout
    assert max(map(len, (gated.stdout + stored.stdout).splitlines())) <= 80
    assert village.rebenchmark().returncode == 0  # the old model is back


def replaced(count: int) -> Callable[[Path], None]:
    """Puts other words into the first `count` prompts of a file."""

    def edit(file: Path) -> None:
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        for line in lines[:count]:
            line["text"] = "Please " + line["text"]
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))

    return edit


@pytest.mark.parametrize(("count", "paired"), [(2, 6), (8, 0)])
def test_changed_test_prompts_are_counted_and_paired_where_they_can_be(
    village: Village, count: int, paired: int
) -> None:
    with changed(village.prompts, replaced(count)):
        found = village.check()
    assert found.winner["cause"] == f"test prompts: {count} new, {count} gone"
    (row,) = [r for r in found.rows if (r["arm"], r["metric"]) == ("strict", "refusals")]
    assert (row["n_before"], row["n_after"], row["n_paired"]) == (8, 8, paired)
    assert row["low"] <= row["difference"] <= row["high"]
    assert row["change"] != "unchanged"  # other prompts, though the count may be the same
    assert village.check().winner["cause"] is None


def test_a_config_of_other_test_prompts_opens_none_of_them(
    village: Village, monkeypatch: pytest.MonkeyPatch
) -> None:
    def config_of_a_run_that_died(frozen: Frozen) -> Config:
        config = config_of(frozen)
        unused = config.prompts.harmful.test.model_copy(update={"split": "train[:6]"})
        harmful = config.prompts.harmful.model_copy(update={"test": unused})
        prompts = config.prompts.model_copy(update={"harmful": harmful})
        return config.model_copy(update={"prompts": prompts})

    monkeypatch.setattr("flows.drift.config_of", config_of_a_run_that_died)
    found = village.check()
    assert (found.verdict, found.winner["cause"]) == ("unchanged", None)


def test_prompts_in_another_order_are_the_same_prompts(village: Village) -> None:
    def reverse(file: Path) -> None:
        file.write_text("\n".join(file.read_text().splitlines()[::-1]) + "\n")

    with changed(village.prompts, reverse):
        found = village.check()
    assert (found.verdict, found.winner["cause"], found.winner["measured"]) == (
        "unchanged",
        None,
        False,
    )


def test_a_study_that_cannot_be_measured_stops_no_other(village: Village, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    with running(Runtime(village.store)):
        run_pipeline(load_config(str(write_village(other, "abbey")), ["seed=1"]))
    shutil.rmtree(other / "model")
    done = village.rebenchmark("--format", "json")
    assert done.returncode == 1
    gone, held = json.loads(done.stdout)
    assert gone["study"].startswith("abbey-")
    assert gone["verdict"] == "not measured"
    assert "no model folder" in gone["error"]
    assert (held["verdict"], held["holds"]) == ("unchanged", True)
    alone = village.rebenchmark("village")
    assert alone.returncode == 0
    assert "abbey" not in alone.stdout


@pytest.fixture(scope="module")
def stack(finished: Village, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A Prefect server whose store holds the study."""
    home = tmp_path_factory.mktemp("stack")
    shutil.copytree(finished.store.root, home / "store")
    made = Stack(home)
    with made.server():
        yield made


def rebenchmark_on(stack: Stack, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "flows", "rebenchmark", *words]
    return subprocess.run(command, env=stack.environment, capture_output=True, text=True)


def last_run(stack: Stack) -> dict[str, Any]:
    body = {"sort": "START_TIME_DESC", "limit": 1}
    (run,) = stack.ask("POST", "/flow_runs/filter", body)
    return dict(run)


def events(stack: Stack) -> list[dict[str, Any]]:
    """What the server knows of winners."""
    wanted = {"filter": {"event": {"prefix": ["tribunal.winner."]}}, "limit": 50}
    found: list[dict[str, Any]] = stack.ask("POST", "/events/filter", wanted)["events"]
    return found


def shown(stack: Stack, key: str) -> Any:
    """The data of an artifact of Prefect's UI."""
    return stack.ask("GET", f"/artifacts/{key}/latest")["data"]


def test_a_server_shows_drift_emits_events_and_names_the_exit_state(
    stack: Stack, finished: Village
) -> None:
    done = rebenchmark_on(stack, "--format", "json")
    assert done.returncode == 0, done.stderr
    assert told(done)["verdict"] == "unchanged"
    run = last_run(stack)
    assert (run["state_type"], run["state_name"]) == ("COMPLETED", "Unchanged")
    assert "1 of 1 winners hold" in shown(stack, "drift-summary")

    with changed(finished.model / "model.safetensors", noise(0.1)):
        done = rebenchmark_on(stack, "--format", "json")
    assert done.returncode == 1, done.stderr
    study = told(done)["study"]
    run = last_run(stack)
    assert (run["state_type"], run["state_name"]) == ("FAILED", "Drifted")
    assert study in run["state"]["message"]
    rows = json.loads(shown(stack, "drift"))
    assert {row["verdict"] for row in rows} == {"gated"}
    assert "model content" in shown(stack, "drift-summary")

    def known() -> list[dict[str, Any]] | None:
        found = events(stack)
        return found if len(found) >= 2 else None

    found = {event["event"]: event for event in wait_until("the events", known)}
    assert set(found) == {"tribunal.winner.gated", "tribunal.winner.drifted"}
    gated = found["tribunal.winner.gated"]
    assert gated["resource"]["prefect.resource.id"] == f"tribunal.study.{study}"
    assert gated["resource"]["tribunal.news"] == "true"
    assert gated["payload"]["cause"].startswith("model content ")
    assert gated["payload"]["gate_reason"].startswith("test: kl")
    of_run = {related["prefect.resource.id"] for related in gated["related"]}
    assert f"prefect.flow-run.{run['id']}" in of_run


def test_a_study_that_cannot_be_measured_has_a_state_of_its_own(
    stack: Stack, finished: Village
) -> None:
    moved = finished.folder / "elsewhere"
    finished.model.rename(moved)
    try:
        done = rebenchmark_on(stack)
    finally:
        moved.rename(finished.model)
    assert done.returncode == 1
    assert "no model folder" in done.stdout
    run = last_run(stack)
    assert (run["state_type"], run["state_name"]) == ("FAILED", "Unmeasured")


def test_the_documented_automation_is_taken_by_a_server(stack: Stack, tmp_path: Path) -> None:
    text = (Path(__file__).parent.parent / "docs" / "rebenchmark.md").read_text()
    (tmp_path / "automation.yaml").write_text(text.split("```yaml\n")[1].split("```")[0])
    stack.prefect("automation", "create", "--from-file", str(tmp_path / "automation.yaml"))
    (made,) = stack.ask("POST", "/automations/filter", {})
    assert "does not hold" in made["name"]
