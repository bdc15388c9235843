"""kill -9 of workers, of their flow runs, and of the Prefect server while flows run against it."""

from __future__ import annotations

import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import count
from pathlib import Path

import psutil
import pytest
from fault_tools import (
    FLOW_RUN_KILLS,
    SERVER_KILLS,
    WORKER_KILLS,
    Done,
    Launcher,
    Watch,
    Whole,
    artifacts_in,
    assert_same,
    assert_tidy,
    histogram,
    one_line,
    processes_on,
    spread,
    wait_until,
)
from prefect_stack import BIN, LOOPBACK, Stack, free_port
from small_study import command, environment

from artifacts.store import Store

pytestmark = [pytest.mark.slow, pytest.mark.faults]

RESTARTS = 3  # orderly ones, among the kills
STOP_TIMEOUT = 10  # seconds
ENDED = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")


class Servers:
    """A stack whose server is killed and started again on the same database."""

    def __init__(self, home: Path) -> None:
        self.stack = Stack(home)
        self.start()

    def start(self) -> None:
        place = ("--host", LOOPBACK, "--port", str(self.stack.port))
        self._process = self.stack.start("server", BIN / "prefect", "server", "start", *place)
        self.stack.wait_healthy(self._process)

    def end(self, how: signal.Signals) -> None:
        """As systemd ends it: a server that waits for its clients' connections is killed."""
        self._process.send_signal(how)
        try:
            self._process.wait(STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    found = Servers(tmp_path_factory.mktemp("stack"))
    yield found
    found.end(signal.SIGTERM)


@pytest.fixture(scope="module")
def through_server(
    servers: Servers, config: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Launcher]:
    """Runs `tribunal` through the server: each run a Prefect flow run in a process of its own."""
    folder = tmp_path_factory.mktemp("through")
    settings = {k: v for k, v in servers.stack.environment.items() if k.startswith("PREFECT_")}
    first = (Store(folder / "store"), ["run", str(config)])
    found = Launcher(folder, first, settings)
    yield found
    found.close()


class Lane:
    """One study after another, each run again until it is complete."""

    def __init__(self, whole: Whole, launcher: Launcher, folder: Path) -> None:
        self._whole, self._launcher, self._folder = whole, launcher, folder
        self._enough = threading.Event()
        self.studies: list[Watch] = []
        self.ends: list[Done] = []

    def go(self) -> None:
        while not self._enough.is_set():
            store = Store(self._folder / f"store-{len(self.studies)}")
            self.studies.append(Watch(self._whole, store))
            while not self._run(self.studies[-1]):
                assert len(self.ends) < 10 * SERVER_KILLS, self.ends[-1].stderr
            assert_same(self._whole, store, self._launcher)
            assert_tidy(self._whole, store, self._launcher)

    def _run(self, watch: Watch) -> bool:
        done = self._launcher.run(watch.store, "run", str(self._whole.config))
        self.ends.append(done)
        if done.returncode != 0:
            assert done.returncode == 2, done.stderr
            assert "tribunal: the Prefect server at" in done.stderr, done.stderr
        watch.check()
        return done.returncode == 0

    def stop(self) -> None:
        """Begin no other study."""
        self._enough.set()


def test_flows_outlive_kills_of_their_server(
    whole: Whole,
    servers: Servers,
    through_server: Launcher,
    tmp_path: Path,
    figure: Callable[[str, str], None],
) -> None:
    assert_same(whole, Store(through_server.folder / "store"), through_server)
    lanes = [Lane(whole, through_server, tmp_path / str(number)) for number in range(2)]
    dice, hit, started = random.Random(2), [], time.monotonic()
    ends_of_servers = [signal.SIGKILL] * SERVER_KILLS + [signal.SIGTERM] * RESTARTS
    with ThreadPoolExecutor(len(lanes)) as pool:
        running = [pool.submit(lane.go) for lane in lanes]
        try:
            for how in dice.sample(ends_of_servers, len(ends_of_servers)):
                time.sleep(dice.uniform(0, 3))
                servers.end(how)
                hit += [lane.studies[-1].now_making() for lane in lanes]
                time.sleep(dice.uniform(0, 1))
                servers.start()
        finally:
            for lane in lanes:
                lane.stop()
        for result in running:
            result.result()
    ends = [end for lane in lanes for end in lane.ends]
    failed = [end for end in ends if end.returncode != 0]
    studies = [watch for lane in lanes for watch in lane.studies]
    assert [p for watch in studies for p in processes_on(watch.store)] == []
    seconds = time.monotonic() - started
    figure(
        "kill -9 of the server",
        f"{SERVER_KILLS} kills and {RESTARTS} restarts in {seconds:.0f} s; {len(studies)} studies "
        f"in {len(ends)} runs, {len(failed)} of which ended early; {histogram(hit)}",
    )


def test_a_server_that_is_not_there_is_one_line(store: Store, config: Path) -> None:
    nobody = f"http://{LOOPBACK}:{free_port()}/api"
    done = subprocess.run(
        command("run", str(config)),
        env=environment(store) | {"PREFECT_API_URL": nobody, "PREFECT_HOME": str(store.root)},
        capture_output=True,
        text=True,
    )
    assert f"the Prefect server at '{nobody}' cannot be reached" in one_line(done)


def flow_runs_on(store: Store) -> list[psutil.Process]:
    """Processes of Prefect flow runs that fill this store."""
    found = []
    for process in processes_on(store):
        with suppress(psutil.NoSuchProcess):  # it has just ended
            if "prefect.engine" in process.cmdline():
                found.append(process)
    return found


class Study:
    """A study that a worker is asked to run, in a store of its own, and is not let finish."""

    def __init__(self, stack: Stack, whole: Whole, store: Store, dice: random.Random) -> None:
        self.store, self.watch = store, Watch(whole, store)
        self.states: list[str] = []  # that flow runs to be killed ended in
        self._stack, self._config, self._seconds = stack, str(whole.config), (*whole.seconds, 0.1)
        self._positions, self._dice = spread(dice, whole, 6), dice

    @property
    def over(self) -> bool:
        """Whether there is nothing left to disturb."""
        return not self._positions or self.watch.now_making() == "results"

    def submit(self) -> str:
        """Ask for a run."""
        found = self._stack.ask("GET", "/deployments/name/benchmark/adhoc")
        body = {
            "parameters": {"config": self._config},
            "job_variables": {"env": {"TRIBUNAL_STORE": str(self.store.root)}},
        }
        run = self._stack.ask("POST", f"/deployments/{found['id']}/create_flow_run", body)
        return str(run["id"])

    def wait_for_moment(self) -> None:
        """Wait for a random moment of a random artifact in a flow run's life."""
        position = self._positions.pop(0)
        wait_until(lambda: flow_runs_on(self.store), 0.1)
        wait_until(lambda: artifacts_in(self.store) >= position or not flow_runs_on(self.store))
        time.sleep(self._dice.uniform(0, 0.05 + self._seconds[position]))

    def kill_run(self) -> tuple[int, str]:
        """Kill all its flow runs' processes at once; how many, and what was being made."""
        run = self.submit()
        self.wait_for_moment()
        victims = set()  # by the ids of their flow runs
        for process in flow_runs_on(self.store):
            with suppress(psutil.NoSuchProcess):  # it has just ended
                victims.add(process.environ()["PREFECT__FLOW_RUN_ID"])
                process.kill()
        hit = self.watch.now_making()
        state = self._stack.wait_state(run, *ENDED)  # that of an orphan is told by nobody
        assert state == "COMPLETED" or (state == "CRASHED" and run in victims)
        self.states.append(state)
        self.watch.check()
        return len(victims), hit

    def finish(self, whole: Whole, launcher: Launcher) -> None:
        """Let it end undisturbed and hold it against the study that was not killed."""
        wait_until(lambda: not flow_runs_on(self.store), 0.1)  # orphans come to an end
        assert self._stack.wait_state(self.submit(), *ENDED) == "COMPLETED"
        assert self.watch.check() == len(whole.places)
        assert_same(whole, self.store, launcher)
        assert_tidy(whole, self.store, launcher)
        wait_until(lambda: not processes_on(self.store), 0.1)


class Workers:
    """One worker after another."""

    def __init__(self, stack: Stack) -> None:
        self._stack, self._number = stack, 0
        self.start()

    def start(self) -> None:
        self._number += 1
        web = {
            "PREFECT_WORKER_WEBSERVER_HOST": LOOPBACK,
            "PREFECT_WORKER_WEBSERVER_PORT": str(free_port()),
        }
        name = f"worker-{self._number}"
        self._process = self._stack.start(name, BIN / "tribunal", "worker", "--name", name, **web)

    def end(self, how: signal.Signals) -> None:
        """As systemd ends it: a server that waits for its clients' connections is killed."""
        self._process.send_signal(how)
        try:
            self._process.wait(STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


@pytest.fixture
def workers(servers: Servers) -> Iterator[Workers]:
    servers.stack.set_up()
    found = Workers(servers.stack)
    yield found
    found.end(signal.SIGTERM)


def test_studies_outlive_kills_of_workers_and_of_their_flow_runs(
    whole: Whole,
    launcher: Launcher,
    servers: Servers,
    workers: Workers,
    tmp_path: Path,
    figure: Callable[[str, str], None],
) -> None:
    started, dice, numbers = time.monotonic(), random.Random(3), count()
    hit: list[str] = []
    killed = {"worker": 0, "run": 0}

    def begin() -> Study:
        return Study(servers.stack, whole, Store(tmp_path / f"store-{next(numbers)}"), dice)

    studies = [begin(), begin()]
    every = [*studies]
    with ThreadPoolExecutor(len(studies)) as pool:
        while killed["worker"] < WORKER_KILLS or killed["run"] < FLOW_RUN_KILLS:
            if killed["worker"] * FLOW_RUN_KILLS <= killed["run"] * WORKER_KILLS:
                for study in studies:
                    study.submit()
                studies[0].wait_for_moment()
                workers.end(signal.SIGKILL)
                workers.start()
                hit += [study.watch.now_making() for study in studies]
                killed["worker"] += 1
            else:
                for victims, what in pool.map(Study.kill_run, studies):
                    killed["run"] += victims
                    hit += [what] * victims
            for number, study in enumerate(studies):
                study.watch.check()
                if study.over:
                    study.finish(whole, launcher)
                    studies[number] = begin()
                    every.append(studies[number])
        list(pool.map(lambda study: study.finish(whole, launcher), studies))
    crashed = sum(study.states.count("CRASHED") for study in every)
    assert crashed >= FLOW_RUN_KILLS / 2
    figure(
        "kill -9 of workers and their flow runs",
        f"{killed['worker']} workers and {killed['run']} flow runs in "
        f"{time.monotonic() - started:.0f} s; {len(every)} studies; {histogram(hit)}",
    )
