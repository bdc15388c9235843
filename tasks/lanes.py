"""Workers side by side: Prefect's task runners, one lane for each device.

A lane is a task runner with a single worker, which keeps its loaded model from one call to the
next. Lanes of processes are task runners of their own because a pool breaks as a whole when one of
its processes is killed: here a death costs the call that died, and only that lane starts again.
Dask does the same by itself, so its lanes share one task runner.

Prefect's task runs ask a Prefect server whether it speaks their version. Where none is configured,
one is started for the length of the run: on loopback, in memory, and gone with this process however
it ends. So are the processes of lanes: each reads from a pipe that only this process can close.
"""

from __future__ import annotations

import builtins
import logging
import multiprocessing
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import BrokenExecutor
from contextlib import ExitStack, contextmanager, suppress
from contextvars import Context, copy_context
from dataclasses import asdict, dataclass, field, replace
from multiprocessing.connection import Connection
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast
from urllib.parse import urlsplit

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.context import FlowRunContext
from prefect.events.clients import NullEventsClient
from prefect.events.worker import EventsWorker
from prefect.futures import PrefectFuture
from prefect.settings import PREFECT_API_URL, PREFECT_LOGGING_TO_API_ENABLED, temporary_settings
from prefect.task_runners import ProcessPoolTaskRunner, TaskRunner, ThreadPoolTaskRunner

from artifacts.errors import ConfigError, WorkerError
from artifacts.store import Ref, Store
from tasks.prefect_mirror import Opaque
from tasks.probe import close_models
from tasks.stage import Reporter, Runtime, Silent, Stage, current, running

if TYPE_CHECKING:
    from prefect_dask.task_runners import DaskTaskRunner

Kind = Literal["threads", "processes", "dask"]

QUIET = {"PREFECT_LOGGING_LEVEL": "CRITICAL", "PREFECT_LOGGING_TO_API_ENABLED": "false"}
DEATHS = 3  # of workers that had a call, before the call is given up
PATIENCE = 30.0  # seconds for a Dask scheduler to have a worker


@dataclass(frozen=True)
class Place:
    """Where a worker's model lies. `slot` tells apart the models that share a device."""

    device: str | None
    slot: int = 0


def places_on(devices: Sequence[str | None]) -> tuple[Place, ...]:
    """A place per worker; devices may repeat."""
    return tuple(Place(device, devices[:n].count(device)) for n, device in enumerate(devices))


class WorkerLog(Silent):
    """A worker's reporter: what it says goes to its task run's log."""

    def said(self, line: str) -> None:
        get_run_logger().info(line)


class Stoppable(WorkerLog):
    """The reporter of a worker that is a thread: it ends the call when the run has ended."""

    def __init__(self) -> None:
        self.stopped = threading.Event()

    def advanced(self, done: int, total: int) -> None:
        if self.stopped.is_set():
            raise WorkerError("the run has ended")


@dataclass(frozen=True)
class Site:
    """What a worker must know of the run, small enough to go with every call.

    `places` holds the worker's own; or, where Dask chooses the worker, that of every worker by its
    number; or none, and the worker takes what its own machine has.
    """

    store: str
    quota: int | None
    device_map: str | None
    rows: int
    threads: int = 0  # of torch, where a worker shares its process; 0: as its environment says
    places: tuple[Place, ...] = ()
    reporter: Reporter = field(default_factory=WorkerLog)

    def place(self) -> Place:
        """The worker's own place, asked for on the worker."""
        if len(self.places) == 1:
            return self.places[0]
        if self.places:
            from distributed import get_worker

            return self.places[int(get_worker().name)]
        return Place(os.environ.get("TRIBUNAL_DEVICE"))

    def runtime(self) -> Runtime:
        """The run as this worker sees it, asked for on the worker."""
        place, store = self.place(), Store(self.store, self.quota)
        return Runtime(
            store, self.reporter, place.device, self.device_map, self.rows, slot=place.slot
        )


@task(task_run_name="{label}", cache_policy=NO_CACHE, persist_result=False)
def work(label: str, call: Opaque, site: Opaque) -> dict[str, Any]:
    """One call of a stage as a task of a worker."""
    return asdict(_obtain(site.value, *call.value))


def _obtain(site: Site, stage: Stage[Any], arguments: Mapping[str, Any]) -> Ref:
    runtime = site.runtime()
    if site.threads:
        import torch

        torch.set_num_threads(site.threads)
    with _busy[runtime.device, runtime.slot], running(runtime):
        return stage.obtain(arguments)


_busy: defaultdict[tuple[str | None, int], threading.Lock] = defaultdict(threading.Lock)


class Lane(Protocol):
    """A worker, or one of several that share a task runner."""

    @property
    def places(self) -> tuple[Place, ...]:
        """Its own place; or those of all workers of a cluster."""
        ...

    @property
    def reporter(self) -> Reporter:
        """What its calls report to."""
        ...

    def runner(self) -> TaskRunner[Any]:
        """The task runner, started if it is not."""
        ...

    def close(self) -> None:
        """Free the device. Nothing is running."""
        ...

    def drop(self) -> None:
        """Free the device at once, whatever is running."""
        ...


class ThreadLane:
    """A thread of this process."""

    def __init__(self, place: Place) -> None:
        self.places, self.reporter = (place,), Stoppable()
        self._runner: ThreadPoolTaskRunner[Any] | None = None

    def runner(self) -> TaskRunner[Any]:
        if self._runner is None:
            self._runner = ThreadPoolTaskRunner(max_workers=1).__enter__()
        return self._runner

    def close(self) -> None:
        if self._runner is not None:
            self._runner.__exit__(None, None, None)
            self._runner = None

    def drop(self) -> None:
        self.reporter.stopped.set()
        self.close()


class ProcessLane:
    """A process that dies when its tether is cut, which the end of this process does too."""

    def __init__(self, place: Place, share: int, mute: bool) -> None:
        self.places, self.reporter = (place,), WorkerLog()
        self._share, self._mute = share, mute
        self._runner: ProcessPoolTaskRunner | None = None
        self._tether: Connection | None = None

    def runner(self) -> TaskRunner[Any]:
        if self._runner is None:
            end, self._tether = multiprocessing.Pipe(duplex=False)
            self._runner = ProcessPoolTaskRunner(
                max_workers=1,
                subprocess_message_processor_factories=[lambda: _drop] if self._mute else [],
                initializer=_become_worker,
                initargs=(end, self._share),
            ).__enter__()
        return self._runner

    def close(self) -> None:
        if self._runner is not None:
            self._runner.__exit__(None, None, None)
        self.drop()

    def drop(self) -> None:
        """Cut the tether; the runner is left as it is, for its end would wait for its worker."""
        if self._tether is not None:
            self._tether.close()
        self._runner = self._tether = None


def _drop(message_type: str, message_payload: Any) -> None:
    """What a worker tells Prefect goes nowhere."""


def _become_worker(end: Connection, share: int) -> None:
    """Set up the process of a lane."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # they mean the run, which cuts the tether
    # Prefect ends a worker it has no use for by exit(), which the pool takes for an answer that it
    # then waits for in vain; a death it notices.
    builtins.exit = os._exit  # type: ignore[assignment]
    os.environ.setdefault("OMP_NUM_THREADS", str(share))
    threading.Thread(target=_die_with, args=(end,), daemon=True).start()


def _die_with(end: Connection) -> None:
    with suppress(EOFError, OSError):
        end.recv()
    os._exit(1)


class DaskLane:
    """One of the workers of a Dask cluster."""

    def __init__(self, cluster: Cluster) -> None:
        self.places, self.reporter, self._cluster = cluster.places, WorkerLog(), cluster

    def runner(self) -> TaskRunner[Any]:
        return self._cluster.runner()

    def close(self) -> None:
        self._cluster.close()

    drop = close


class Cluster:
    """A Dask cluster: of this machine, for the length of the run, or a running one."""

    def __init__(self, address: str | None, places: tuple[Place, ...], share: int) -> None:
        self.address, self.places, self._share = address, places, share
        self._runner: DaskTaskRunner | None = None

    def runner(self) -> DaskTaskRunner:
        """The task runner, connected.

        Raises:
            ConfigError: prefect-dask is not installed.
            WorkerError: no scheduler answers at the address.
        """
        if self._runner is None:
            self._runner = self._connected()
        return self._runner

    def _connected(self) -> DaskTaskRunner:
        try:
            from prefect_dask.task_runners import DaskTaskRunner
        except ImportError as error:
            raise ConfigError(
                "TRIBUNAL_RUNNER is 'dask', which needs: pip install 'tribunal[dask]'"
            ) from error
        import dask

        if self.address:
            runner = DaskTaskRunner(address=self.address)
        else:
            runner = DaskTaskRunner(cluster_kwargs=self._local())
        runner.logger.setLevel(logging.WARNING)
        logging.getLogger("distributed").setLevel(logging.ERROR)
        cast("TaskRunner[Any]", runner).__enter__()
        try:
            with dask.config.set({"distributed.scheduler.allowed-failures": DEATHS}):
                runner.client.wait_for_workers(1, timeout=PATIENCE)
        except OSError as error:  # TimeoutError is one
            raise WorkerError(
                f"no Dask scheduler with a worker answers at '{self.address or '127.0.0.1'}'; "
                "start them, or unset TRIBUNAL_DASK"
            ) from error
        return runner

    def _local(self) -> dict[str, Any]:
        threads = os.environ.get("OMP_NUM_THREADS", str(self._share))
        return {
            "n_workers": len(self.places),
            "threads_per_worker": 1,
            "host": "127.0.0.1",
            "dashboard_address": None,
            "memory_limit": 0,  # a model may take what there is
            "env": {"OMP_NUM_THREADS": threads},
        }

    def count(self) -> int:
        """Workers that the cluster has now."""
        return len(self.runner().client.scheduler_info(n_workers=-1)["workers"])

    def close(self) -> None:
        if self._runner is not None:
            self._runner.__exit__(None, None, None)
            self._runner = None


class Lanes:
    """The workers of one run. Nothing starts before the first call."""

    def __init__(
        self,
        kind: Kind,
        devices: Sequence[str | None],
        *,
        dask: str | None = None,
        device_map: str | None = None,
        rows: int = 512,
    ) -> None:
        places = places_on(devices)
        self._kind, self._dask, self._places = kind, dask, places
        self._device_map, self._rows = device_map, rows
        self._share = max(1, (os.cpu_count() or 1) // len(places)) if places else 1
        self._cluster = Cluster(dask, () if dask else places, self._share)
        self._lanes: list[Lane] = []
        self._open = ExitStack()

    def __enter__(self) -> Lanes:
        # Tasks are submitted from here, outside any other task: what Prefect sends along with them
        # must not hold the arguments of the task that asks for them.
        self._context = copy_context()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for lane in self._lanes:
            lane.close() if error is None else lane.drop()
        self._open.close()

    def count(self) -> int:
        """How many workers there are."""
        if not self._dask:
            return len(self._places)
        self._start()
        return len(self._lanes)

    def rest(self) -> None:
        """Free the devices of this machine, if other processes hold them."""
        if self._kind != "threads" and not self._dask:
            for lane in self._lanes:
                lane.close()

    def obtain(
        self,
        stage: Stage[Any],
        calls: Sequence[Mapping[str, Any]],
        prepare: Callable[[], object] = lambda: None,
    ) -> list[Ref]:
        """The artifacts of the calls, in their order; what is stored is not made again.

        Args:
            stage: the stage that is called.
            calls: its arguments, for every call.
            prepare: what the calls share and what must not run beside them in one process: done
                first for every lane of threads.

        Raises:
            WorkerError: a call's workers died again and again, or there are none.
        """
        runtime = current()
        found = {n: runtime.find(stage.kind, stage.key(call)) for n, call in enumerate(calls)}
        missing = [number for number, ref in found.items() if ref is None]
        if missing:
            self._start()
            with self._ready(runtime, prepare):
                found |= self._made(runtime, stage, calls, missing)
        return [ref for number in range(len(calls)) if (ref := found[number])]

    def _start(self) -> None:
        """Make sure of a Prefect server, once, and make the lanes, which start with a call."""
        if self._lanes:
            return
        mute = self._find_server()
        if self._kind == "threads":
            self._lanes = [ThreadLane(place) for place in self._places]
        elif self._kind == "processes":
            self._lanes = [ProcessLane(place, self._share, mute) for place in self._places]
        else:
            workers = self._context.run(self._cluster.count) if self._dask else len(self._places)
            self._lanes = [DaskLane(self._cluster) for _ in range(workers)]

    def _find_server(self) -> bool:
        """Tell workers where the Prefect server is, and start one if there is none.

        Whether what workers tell Prefect is dropped: it is sent on by a thread that knows only the
        server of the whole process, and would start one of its own.
        """
        url = self._context.run(_server_in_use)
        own = url is None
        if url is None:
            if self._dask and not _is_loopback(self._dask):
                raise ConfigError(
                    f"TRIBUNAL_DASK is '{self._dask}': its workers need a Prefect server that they "
                    "can reach; set PREFECT_API_URL"
                )
            url = self._open.enter_context(TemporaryServer()).url
            self._export(QUIET)
            self._open.enter_context(_silenced())
        self._export({"PREFECT_API_URL": url})
        settings = temporary_settings(
            {PREFECT_API_URL: url} | ({PREFECT_LOGGING_TO_API_ENABLED: False} if own else {})
        )
        self._context.run(settings.__enter__)
        self._open.callback(self._context.run, settings.__exit__, None, None, None)
        in_flow = self._context.run(FlowRunContext.get) is not None
        return not in_flow and Context().run(PREFECT_API_URL.value) != url

    def _export(self, variables: Mapping[str, str]) -> None:
        before = {name: os.environ.get(name) for name in variables}
        os.environ.update(variables)
        self._open.callback(_restore, before)

    @contextmanager
    def _ready(self, runtime: Runtime, prepare: Callable[[], object]) -> Iterator[None]:
        """Load what threads share with this process; or let go of it, where processes do not."""
        if self._kind != "threads":
            close_models()
            yield
            return
        import torch

        before = torch.get_num_threads()
        for place in self._places:
            own = replace(runtime, device=place.device, slot=place.slot, workers=None)
            with running(own):
                prepare()
        yield
        torch.set_num_threads(before)  # the lanes' own number is partly the process's

    def _made(
        self,
        runtime: Runtime,
        stage: Stage[Any],
        calls: Sequence[Mapping[str, Any]],
        missing: Sequence[int],
    ) -> dict[int, Ref]:
        """Give every missing call to a free lane until all are made."""
        threads = self._share if self._kind == "threads" else 0
        site = Site(
            runtime.store.location, runtime.store.quota, self._device_map, self._rows, threads
        )
        free, todo, deaths = deque(self._lanes), deque(missing), Counter[int]()
        answers: Answers = queue.SimpleQueue()
        made: dict[int, Ref] = {}
        while len(made) < len(missing):
            while free and todo:
                self._submit(free.popleft(), todo[0], stage, calls[todo.popleft()], site, answers)
            lane, number, future = answers.get()
            free.append(lane)
            try:
                made[number] = Ref(**future.result())
            except _deaths_of_workers() as error:
                lane.drop()
                deaths[number] += 1
                self._mourn(runtime, lane, stage.label_of(calls[number]), deaths[number], error)
                todo.appendleft(number)
            runtime.reporter.advanced(len(calls) - len(missing) + len(made), len(calls))
        return made

    def _mourn(
        self, runtime: Runtime, lane: Lane, label: str, deaths: int, error: Exception
    ) -> None:
        """Say that a worker died; Dask has tried others by then."""
        if self._kind == "dask" or deaths == DEATHS:
            raise WorkerError(
                f"the workers that judged {label} died {DEATHS} times, the last on "
                f"'{_named(lane)}'; fewer workers (TRIBUNAL_WORKERS) or smaller batches "
                "(TRIBUNAL_ROWS) take less memory"
            ) from error
        runtime.reporter.said(f"the worker on {_named(lane)} died at {label}; starting another")

    def _submit(
        self,
        lane: Lane,
        number: int,
        stage: Stage[Any],
        call: Mapping[str, Any],
        site: Site,
        answers: Answers,
    ) -> None:
        parameters = {
            "label": f"{stage.label_of(call)} on {_named(lane)}",
            "call": Opaque((stage, dict(call))),
            "site": Opaque(replace(site, places=lane.places, reporter=lane.reporter)),
        }

        def submit() -> PrefectFuture[Any]:
            runner = lane.runner()
            with _undisturbed():
                future: PrefectFuture[Any] = runner.submit(
                    work.with_options(name=stage.kind), parameters
                )
            return future

        future = self._context.run(submit)
        future.add_done_callback(lambda _: answers.put((lane, number, future)))


Answers = queue.SimpleQueue[tuple[Lane, int, PrefectFuture[Any]]]


def _named(lane: Lane) -> str:
    """A lane's device, in a person's words."""
    return (lane.places[0].device or "the default device") if len(lane.places) == 1 else "dask"


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Hold Ctrl-C back for a moment: amid pydantic's code it would come out as another error."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _deaths_of_workers() -> tuple[type[Exception], ...]:
    """What a task runner raises when a worker died."""
    deaths: list[type[Exception]] = [BrokenExecutor]
    if "distributed" in sys.modules:
        from distributed.scheduler import KilledWorker

        deaths.append(KilledWorker)
    return tuple(deaths)


def _server_in_use() -> str | None:
    """The Prefect server that this process talks to: a flow run's own, or the configured one."""
    if FlowRunContext.get() is None:
        configured: str | None = PREFECT_API_URL.value()
        return configured
    with get_client(sync_client=True) as client:
        return str(client.api_url)


def _is_loopback(address: str) -> bool:
    return urlsplit(address).hostname in ("127.0.0.1", "localhost", "::1")


@contextmanager
def _silenced() -> Iterator[None]:
    """Without a server to keep them, Prefect's events and log lines are noise on stderr."""
    logger = logging.getLogger("prefect")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    EventsWorker.set_client_override(NullEventsClient)
    try:
        yield
    finally:
        EventsWorker.set_client_override(None)
        logger.setLevel(level)


def _restore(before: Mapping[str, str | None]) -> None:
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


SERVE = """
import os, sys, threading, uvicorn
threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
app = "prefect.server.api.server:create_app"
uvicorn.run(app, factory=True, fd=int(sys.argv[1]), log_level="critical")
"""
IN_MEMORY = "sqlite+aiosqlite:///file::memory:?cache=shared&uri=true&check_same_thread=false"


class TemporaryServer:
    """A Prefect server for one run: on a free port of loopback, its database in memory.

    It takes requests at once and answers them when it is up. It ends when its standard input does,
    so also with this process, however that ends.
    """

    def __enter__(self) -> TemporaryServer:
        with socket.create_server(("127.0.0.1", 0)) as listening:
            self.url = f"http://127.0.0.1:{listening.getsockname()[1]}/api"
            self._process = subprocess.Popen(
                [sys.executable, "-c", SERVE, str(listening.fileno())],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[listening.fileno()],
                start_new_session=True,  # Ctrl-C is not for it
                env=os.environ
                | {
                    "PREFECT_API_DATABASE_CONNECTION_URL": IN_MEMORY,
                    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
                    "PREFECT_SERVER_UI_ENABLED": "false",
                },
            )
        return self

    def __exit__(self, *error: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
