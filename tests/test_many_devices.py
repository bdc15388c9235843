"""Many workers: the same artifacts, and a worker that dies costs what it had in hand only."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import polars as pl
import psutil
import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings
from small_study import command, digests, environment, tribunal, write_config

from artifacts.errors import WorkerError
from artifacts.store import Ref, Store
from tasks.lanes.dask_cluster import DEATHS
from tasks.lanes.dispatch import Kind, Lanes
from tasks.lanes.prefect_server import TemporaryServer
from tasks.stage import Made, Runtime, Silent, running, stage

pytestmark = [pytest.mark.slow, pytest.mark.faults]

CALLS = 4


@stage("pieces", version=1, ignore=("log", "deaths"), label=lambda number, **_: f"piece {number}")
def piece(*, number: int, log: str, deaths: int) -> Made:
    """A piece of work that notes its start; number 1 kills its process for so many times."""
    line = f"{number}\n"
    with open(log, "a") as file:
        file.write(line)
    if number == 1 and Path(log).read_text().count(line) <= deaths:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(1)
    return Made(pl.DataFrame({"n": [number], "process": [os.getpid()]}))


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with TemporaryServer() as started:
        yield started.url


class Heard(Silent):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.steps: list[tuple[int, int]] = []
        self.parts: list[tuple[str, bool]] = []

    def finished(self, label: str, ref: Ref, seconds: float, cached: bool) -> None:
        self.parts.append((label, cached))

    def said(self, line: str) -> None:
        self.lines.append(line)

    def advanced(self, done: int, total: int) -> None:
        self.steps.append((done, total))


def pieces(store: Store, server: str, kind: Kind, deaths: int = 0) -> tuple[list[int], Heard]:
    """The processes that made the pieces, and what was reported."""
    heard = Heard()
    log = str(store.root.parent / "log")
    calls = [{"number": n, "log": log, "deaths": deaths} for n in range(CALLS)]
    with (
        temporary_settings({PREFECT_API_URL: server}),
        Lanes(kind, ["cpu", "cpu"]) as lanes,
        running(Runtime(store, heard)),
    ):
        found = lanes.obtain(piece, calls)
    frames = [store.read(ref) for ref in found]
    assert [frame["n"][0] for frame in frames] == list(range(CALLS))
    return [frame["process"][0] for frame in frames], heard


def starts(store: Store) -> list[int]:
    """How often each piece was begun."""
    begun = (store.root.parent / "log").read_text().split()
    return [begun.count(str(number)) for number in range(CALLS)]


@pytest.mark.parametrize("kind", ["processes", "dask"])
def test_workers_are_kept_and_share_the_work(store: Store, server: str, kind: Kind) -> None:
    made_by, heard = pieces(store, server, kind)
    assert len(set(made_by)) == 2
    assert os.getpid() not in made_by
    assert starts(store) == [1] * CALLS
    assert heard.steps == [(n + 1, CALLS) for n in range(CALLS)]
    parts = [f"piece {n}, part {n + 1} of {CALLS}" for n in range(CALLS)]
    assert sorted(heard.parts) == [(part, False) for part in parts]
    assert pieces(store, server, kind)[1].parts == [(part, True) for part in parts]
    assert not any(map(psutil.pid_exists, made_by))


@pytest.mark.parametrize("kind", ["processes", "dask"])
def test_a_killed_worker_costs_its_own_piece_only(store: Store, server: str, kind: Kind) -> None:
    _, heard = pieces(store, server, kind, deaths=1)
    assert starts(store) == [1, 2, 1, 1]
    assert [line for line in heard.lines if "died at piece 1" in line] or kind == "dask"


@pytest.mark.parametrize("kind", ["processes", "dask"])
def test_workers_that_always_die_are_one_line_and_others_are_kept(
    store: Store, server: str, kind: Kind
) -> None:
    with pytest.raises(
        WorkerError, match=r"^the workers that judged piece 1 died 3 times"
    ) as found:
        pieces(store, server, kind, deaths=99)
    assert "\n" not in str(found.value)
    assert starts(store)[1] in (DEATHS, DEATHS + 1)  # Dask counts those it allows
    kept = len(list(store.entries()))
    assert kept >= 1
    pieces(store, server, kind)
    assert sum(starts(store)) <= DEATHS + 1 + CALLS + 1  # what was finished is not begun again


def test_an_unreachable_server_ends_the_run(store: Store) -> None:
    with pytest.raises((WorkerError, RuntimeError)):
        pieces(store, "http://127.0.0.1:9/api", "processes")
    assert not list(store.entries())


@pytest.fixture(scope="module")
def config_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tmp_path_factory.mktemp("config"))


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, config_path: Path) -> Store:
    """The small study by a single worker."""
    store = Store(tmp_path_factory.mktemp("alone") / "store")
    done = tribunal(store, "run", str(config_path))
    assert done.returncode == 0, done.stderr
    assert not list(store.manifests("shards"))
    return store


def by_workers(store: Store, kind: Kind, workers: int, home: Path) -> dict[str, str]:
    """The environment of a command whose trials are judged by several workers."""
    return environment(store) | {
        "TRIBUNAL_RUNNER": kind,
        "TRIBUNAL_WORKERS": str(workers),
        "PREFECT_HOME": str(home),
    }


@pytest.mark.parametrize(
    ("kind", "workers"),
    [("threads", 2), ("processes", 2), ("processes", 4), ("dask", 2), ("dask", 4)],
)
def test_the_artifacts_are_those_of_a_single_worker(
    alone: Store, config_path: Path, store: Store, kind: Kind, workers: int, tmp_path: Path
) -> None:
    done = subprocess.run(
        command("run", str(config_path), "--format", "json"),
        env=by_workers(store, kind, workers, tmp_path) | {"TRIBUNAL_LOG": str(tmp_path / "log")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["leaderboard"]
    assert not [line for line in done.stderr.splitlines() if " | " in line]  # no foreign log
    found = digests(store)
    shards = {name for name in found if name.startswith("shards/")}
    assert len(shards) == 4  # two generations of two trials
    log = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    made = [f"{e['kind']}/{e['key']}" for e in log if e["event"] == "made"]
    assert sorted(made) == sorted(found)  # a line for each
    assert {name: found[name] for name in found.keys() - shards} == digests(alone)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_no_process_outlives_the_run(
    config_path: Path, store: Store, tmp_path: Path, how: signal.Signals
) -> None:
    process = subprocess.Popen(
        command("run", str(config_path)),
        env=by_workers(store, "processes", 2, tmp_path),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    family: list[psutil.Process] = []
    while len(family) < 3 and process.poll() is None:  # the server and two workers
        family = psutil.Process(process.pid).children(recursive=True)
        time.sleep(0.2)
    process.send_signal(how)
    _, errors = process.communicate()
    assert process.returncode == (130 if how is signal.SIGINT else -signal.SIGKILL)
    assert "Traceback" not in errors
    _, left = psutil.wait_procs(family, timeout=60)
    assert not left
