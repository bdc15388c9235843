"""Prefect's process worker, except that a stop is not a loss: its runs go back to the queue.

Prefect's own worker, told to stop, kills the processes of its flow runs and leaves the runs Running
for ever. This one takes no new run, lets the runs that it has finish for a while, stops the rest
(SIGTERM, then SIGKILL, to the whole process group of each) and reschedules them, so that the next
worker of the pool goes on from the artifacts that are stored.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Iterable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, cast
from uuid import UUID

import anyio
import httpx
import typer
from prefect.client.orchestration import PrefectClient, get_client
from prefect.settings import (
    PREFECT_WORKER_WEBSERVER_HOST,
    PREFECT_WORKER_WEBSERVER_PORT,
    get_current_settings,
    temporary_settings,
)
from prefect.states import AwaitingRetry, Cancelled
from prefect.workers.process import ProcessJobConfiguration, ProcessWorker, ProcessWorkerResult

from artifacts.errors import ConfigError

if TYPE_CHECKING:
    from anyio.abc import TaskStatus
    from prefect.client.schemas.objects import FlowRun, State

OBEDIENCE = 15.0  # seconds that a flow run has to end itself after SIGTERM
POLL = 0.1
LOOPBACK = "127.0.0.1"


class HandingBackWorker(ProcessWorker):
    """A process worker that reschedules the runs which its own end interrupts."""

    def __init__(self, finish_within: float, **options: Any) -> None:
        super().__init__(**options)
        self._finish_within = finish_within
        self._processes: dict[UUID, int | None] = {}

    @classmethod
    def __dispatch_key__(cls) -> str:
        return "process, handing back"  # a name of its own: it does not replace Prefect's

    async def run(
        self,
        flow_run: FlowRun,
        configuration: ProcessJobConfiguration,
        task_status: TaskStatus[int] | None = None,
    ) -> ProcessWorkerResult:
        """Run a flow run to its end, and know its process meanwhile."""
        self._processes[flow_run.id] = None
        noted = _Noted(self._processes, flow_run.id, task_status)
        try:
            return await super().run(flow_run, configuration, cast("TaskStatus[int]", noted))
        finally:
            self._processes.pop(flow_run.id, None)

    async def teardown(self, *exc_info: Any) -> None:
        """Finish or stop the runs, end the worker, and reschedule what was stopped."""
        stopped = await self._finish_or_stop()
        try:
            await super().teardown(*exc_info)
        finally:
            await hand_back(stopped)

    async def _finish_or_stop(self) -> list[UUID]:
        """The flow runs that had to be stopped."""
        await self._idle(self._finish_within)
        stopped = dict(self._processes)
        for how in (signal.SIGTERM, signal.SIGKILL):
            for pid in (pid or self._processes.get(run) for run, pid in stopped.items()):
                if pid:
                    with suppress(ProcessLookupError):
                        os.killpg(pid, how)  # SIGKILL also takes what a run left behind
            await self._idle(OBEDIENCE)
        return list(stopped)

    async def _idle(self, patience: float) -> None:
        """Wait until no run is left, for so many seconds at most."""
        with anyio.move_on_after(patience):
            while self._processes or self._submitting_flow_run_ids:
                await anyio.sleep(POLL)


class _Noted:
    """The status of a starting run, which also notes the process."""

    def __init__(
        self, processes: dict[UUID, int | None], run: UUID, status: TaskStatus[int] | None
    ) -> None:
        self._processes, self._run, self._status = processes, run, status

    def started(self, pid: int) -> None:
        self._processes[self._run] = pid
        if self._status is not None:
            self._status.started(pid)


async def hand_back(runs: Iterable[UUID]) -> None:
    """Reschedule flow runs whose processes were stopped; one being cancelled is cancelled."""
    async with get_client() as client:
        for run in runs:
            try:
                await _hand_back(client, run)
            except httpx.HTTPError as error:
                typer.echo(f"flow run '{run}' could not be rescheduled ({error!r})", err=True)


async def _hand_back(client: PrefectClient, run: UUID) -> None:
    state = (await client.read_flow_run(run)).state
    if state is None or not state.is_final() or state.is_crashed():
        typer.echo(f"flow run '{run}' goes back to the queue")
        await client.set_flow_run_state(run, _next(state), force=True)


def _next(state: State[Any] | None) -> State[Any]:
    """The state of a run whose worker was stopped."""
    if state is not None and state.is_cancelling():
        return Cancelled(message="cancelled; then its worker was stopped")
    return AwaitingRetry(message="its worker was stopped; what is stored is not computed again")


def health_address() -> tuple[str, int]:
    """Where the worker's health is answered: as set, else on loopback and, if need be, a free port.

    Raises:
        ConfigError: the address that is set cannot be used.
    """
    web = get_current_settings().worker.webserver
    host = web.host if "host" in web.model_fields_set else LOOPBACK
    try:
        return host, _bound(host, web.port)
    except OSError as error:
        if "port" not in web.model_fields_set:
            with suppress(OSError):
                return host, _bound(host, 0)
        raise ConfigError(
            f"the worker's health cannot be answered on '{host}:{web.port}' ({error.strerror}); "
            "set PREFECT_WORKER_WEBSERVER_HOST and PREFECT_WORKER_WEBSERVER_PORT to another one"
        ) from error


def _bound(host: str, port: int) -> int:
    """The port that a server gets which asks for `port`; 0 asks for a free one."""
    family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind) as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does
        tried.bind(address)
        return int(tried.getsockname()[1])


async def work(pool: str, name: str | None, limit: int | None, finish_within: float) -> None:
    """Be a worker of a pool until SIGTERM or SIGINT; a second one ends the process at once.

    Raises:
        ConfigError: no server is configured, the name is not one, or the address for health that
            is set cannot be used.
    """
    settings = get_current_settings()
    if not settings.api.url:
        raise ConfigError("a worker needs PREFECT_API_URL, as in http://127.0.0.1:4200/api")
    if name and set(name) & set("/%"):
        raise ConfigError(f"the name of a worker has neither / nor %, not '{name}'")
    host, port = health_address()
    typer.echo(f"health: http://{host}:{port}/health")
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None

    def stop() -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_DFL)
        typer.echo(f"stopping: flow runs have {finish_within:g} s to finish")
        task.cancel()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    worker = HandingBackWorker(
        finish_within,
        work_pool_name=pool,
        name=name,
        limit=limit,
        heartbeat_interval_seconds=int(settings.worker.heartbeat_seconds),
    )
    web = {PREFECT_WORKER_WEBSERVER_HOST: host, PREFECT_WORKER_WEBSERVER_PORT: port}
    with suppress(asyncio.CancelledError), temporary_settings(web):
        await worker.start(with_healthcheck=True, printer=typer.echo)
