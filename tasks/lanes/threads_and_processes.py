"""Lanes of one worker each: a thread of this process, or a process of its own."""

from __future__ import annotations

import builtins
import multiprocessing
import os
import signal
import threading
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any, Protocol

from prefect.task_runners import ProcessPoolTaskRunner, TaskRunner, ThreadPoolTaskRunner

from tasks.lanes.calls import Place, Stoppable, WorkerLog


class Lane(Protocol):
    """A worker, or one of several that share a task runner."""

    @property
    def places(self) -> tuple[Place, ...]:
        """Its own place; or those of all workers of a cluster."""
        ...

    @property
    def reporter(self) -> WorkerLog:
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
