"""Stopped in mid-run: a worker hands its runs back, a server is waited for, silence is a crash."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from prefect_stack import BIN, PATIENCE, ROOT, Stack, descendants, stop, wait_until
from small_study import digests, tribunal, write_config

from artifacts.store import Store

pytestmark = [pytest.mark.slow, pytest.mark.faults]

LONGER = "search.trials=8"  # long enough to be stopped in the middle


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A server that was set up twice, which must do what once does."""
    found = Stack(tmp_path_factory.mktemp("stack"), {"PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30"})
    with found.server():
        for _ in range(2):
            found.set_up()
        yield found


@pytest.fixture(scope="module")
def config_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tmp_path_factory.mktemp("config"))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, config_path: Path) -> dict[str, str]:
    """Digests of the study when nothing stops it."""
    store = Store(tmp_path_factory.mktemp("undisturbed") / "store")
    done = tribunal(store, "run", str(config_path), "--set", LONGER)
    assert done.returncode == 0, done.stderr
    return digests(store)


def begin(stack: Stack, config_path: Path, store: Store) -> str:
    """Submit the study and wait until it is in the middle; the run."""
    run = stack.submit("benchmark/adhoc", config=str(config_path), overrides=[LONGER])
    wait_until("a generation", lambda: any(kind == "generations" for kind, _ in store.entries()))
    return run


def alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Those that still run, zombies left out."""
    return [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def test_a_stopped_worker_hands_its_run_back_and_the_next_one_finishes_it(
    stack: Stack, config_path: Path, undisturbed: dict[str, str], store: Store
) -> None:
    place = {"TRIBUNAL_STORE": str(store.root)}
    with stack.worker("hasty", "--finish-within", "0", **place) as worker:
        run = begin(stack, config_path, store)
        family = descendants(worker.pid)
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(PATIENCE) == 0
        assert family
        assert not alive(family)
    found = stack.ask("GET", f"/flow_runs/{run}")
    assert (found["state_type"], found["state_name"]) == ("SCHEDULED", "AwaitingRetry")
    whole = {f"{kind}/{key}": store.check(kind, key).sha256 for kind, key in store.entries()}
    assert whole
    assert whole.items() < undisturbed.items()
    with stack.worker("next", **place):
        assert stack.wait_state(run, "COMPLETED", "FAILED", "CRASHED") == "COMPLETED"
    assert digests(store) == undisturbed


def test_a_run_outlives_its_server_and_finishes_while_its_worker_stops(
    stack: Stack, config_path: Path, undisturbed: dict[str, str], store: Store
) -> None:
    place = {"TRIBUNAL_STORE": str(store.root)}
    with stack.worker("patient", "--finish-within", "300", **place) as worker:
        run = begin(stack, config_path, store)
        stack.restart_server()
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(PATIENCE) == 0
        assert stack.state(run) == "COMPLETED"
    assert digests(store) == undisturbed


def test_a_run_that_falls_silent_is_crashed_by_the_automation(
    stack: Stack, config_path: Path, store: Store, tmp_path: Path
) -> None:
    shipped = (ROOT / "deploy" / "automations.yaml").read_text()
    assert [a["name"] for a in stack.ask("POST", "/automations/filter", {})] == [
        "Crash silent runs"
    ]
    sooner = tmp_path / "automations.yaml"
    sooner.write_text(
        shipped.replace("within: 600", "within: 40").replace("Crash silent runs", "Sooner")
    )
    stack.prefect("automation", "create", "--from-file", str(sooner))
    pool = ("--pool", "tribunal", "--type", "process")
    place = {"TRIBUNAL_STORE": str(store.root)}
    worker = stack.start("stock", BIN / "prefect", "worker", "start", *pool, **place)
    run = begin(stack, config_path, store)
    family = descendants(worker.pid)
    assert stop(worker) == 0
    assert not alive(family)
    assert stack.state(run) == "RUNNING"  # which is why Tribunal has a worker of its own
    assert stack.wait_state(run, "CRASHED", "COMPLETED") == "CRASHED"
