"""Workers side by side: Prefect's task runners, one lane for each device.

A lane is a task runner with a single worker, which keeps its loaded model from one call to the
next. Lanes of processes are task runners of their own because a pool breaks as a whole when one of
its processes is killed: here a death costs the call that died, and only that lane starts again.
Dask does the same by itself, so its lanes share one task runner.
"""

from __future__ import annotations

import os
import queue
import signal
import sys
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import BrokenExecutor
from contextlib import ExitStack, contextmanager
from contextvars import copy_context
from dataclasses import replace
from types import TracebackType
from typing import Any, Literal

from prefect.futures import PrefectFuture

from artifacts.errors import WorkerError
from artifacts.store import Ref
from tasks.lanes.calls import Site, places_on, work
from tasks.lanes.dask_cluster import DEATHS, Cluster, DaskLane
from tasks.lanes.prefect_server import server_for
from tasks.lanes.threads_and_processes import Lane, ProcessLane, ThreadLane
from tasks.prefect_mirror import Opaque
from tasks.probe import close_models
from tasks.stage import Runtime, Stage, current, running

Kind = Literal["threads", "processes", "dask"]


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
        for number, ref in found.items():
            if ref is not None:
                _tell(runtime, stage, calls, number, ref, 0.0, cached=True)
        if missing:
            self._start()
            with self._ready(runtime, prepare):
                found |= self._made(runtime, stage, calls, missing)
        return [ref for number in range(len(calls)) if (ref := found[number])]

    def _start(self) -> None:
        """Make sure of a Prefect server, once, and make the lanes, which start with a call."""
        if self._lanes:
            return
        mute = self._open.enter_context(server_for(self._context, self._dask))
        if self._kind == "threads":
            self._lanes = [ThreadLane(place) for place in self._places]
        elif self._kind == "processes":
            self._lanes = [ProcessLane(place, self._share, mute) for place in self._places]
        else:
            workers = self._context.run(self._cluster.count) if self._dask else len(self._places)
            self._lanes = [DaskLane(self._cluster) for _ in range(workers)]

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
                answer = future.result()
            except _deaths_of_workers() as error:
                lane.drop()
                deaths[number] += 1
                self._mourn(runtime, lane, stage.label_of(calls[number]), deaths[number], error)
                todo.appendleft(number)
            else:
                made[number] = Ref(**answer.pop("ref"))
                runtime.reporter.advanced(len(calls) - len(missing) + len(made), len(calls))
                _tell(runtime, stage, calls, number, made[number], **answer)
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
            with _undisturbed():
                runner, named = lane.runner(), work.with_options(name=stage.kind)
                future: PrefectFuture[Any] = runner.submit(named, parameters)
            return future

        future = self._context.run(submit)
        future.add_done_callback(lambda _: answers.put((lane, number, future)))


Answers = queue.SimpleQueue[tuple[Lane, int, PrefectFuture[Any]]]


def _tell(
    runtime: Runtime,
    stage: Stage[Any],
    calls: Sequence[Mapping[str, Any]],
    number: int,
    ref: Ref,
    seconds: float,
    cached: bool,
) -> None:
    """Report a call's artifact by a label that tells it from the whole, which may be one call."""
    label = f"{stage.label_of(calls[number])}, part {number + 1} of {len(calls)}"
    runtime.reporter.finished(label, ref, seconds, cached)


def _named(lane: Lane) -> str:
    """A lane's device, in a person's words."""
    return (lane.places[0].device or "the default device") if len(lane.places) == 1 else "dask"


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Hold Ctrl-C back for a moment: amid pydantic's code it would come out as another error.

    Blocking the signal would not do, for another thread would take it for this one.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: held.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if held:
            signal.raise_signal(signal.SIGINT)


def _deaths_of_workers() -> tuple[type[Exception], ...]:
    """What a task runner raises when a worker died."""
    deaths: list[type[Exception]] = [BrokenExecutor]
    if "distributed" in sys.modules:
        from distributed.scheduler import KilledWorker

        deaths.append(KilledWorker)
    return tuple(deaths)
