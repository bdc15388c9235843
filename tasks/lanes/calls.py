"""A call of a stage as it travels to a worker, and what the worker does with it."""

from __future__ import annotations

import os
import threading
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE

from artifacts.errors import WorkerError
from artifacts.store import Ref, Store
from tasks.prefect_mirror import Opaque
from tasks.stage import Runtime, Silent, Stage, running


@dataclass(frozen=True)
class Place:
    """Where a worker's model lies. `slot` tells apart the models that share a device."""

    device: str | None
    slot: int = 0


def places_on(devices: Sequence[str | None]) -> tuple[Place, ...]:
    """A place per worker; devices may repeat."""
    return tuple(Place(device, devices[:n].count(device)) for n, device in enumerate(devices))


class WorkerLog(Silent):
    """A worker's reporter: what it says goes to its task run's log.

    It keeps what the last call was told of its artifact, for the run that asked: the worker's own
    logs are not the run's.
    """

    seconds, cached = 0.0, False

    def finished(self, label: str, ref: Ref, seconds: float, cached: bool) -> None:
        self.seconds, self.cached = seconds, cached

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
    reporter: WorkerLog = field(default_factory=WorkerLog)

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
    """One call of a stage as a task of a worker: the artifact, and what was told of it."""
    ref, told = _obtain(site.value, *call.value), site.value.reporter
    return {"ref": asdict(ref), "seconds": told.seconds, "cached": told.cached}


def _obtain(site: Site, stage: Stage[Any], arguments: Mapping[str, Any]) -> Ref:
    runtime = site.runtime()
    if site.threads:
        import torch

        torch.set_num_threads(site.threads)
    with _busy[runtime.device, runtime.slot], running(runtime):
        return stage.obtain(arguments)


_busy: defaultdict[tuple[str | None, int], threading.Lock] = defaultdict(threading.Lock)
