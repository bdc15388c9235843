"""Reporters beside the progress: several at once, a tally, and a log that machines read.

The log is one JSON object per line, written by one call that appends, so that the processes of a
host can share the file. What an artifact's line says of it comes from its manifest.
"""

from __future__ import annotations

import json
import os
import sys
from datetime import UTC, datetime
from typing import Any

from artifacts.errors import ConfigError, StoreError
from artifacts.places import size_text
from artifacts.store import Manifest, Ref, Store
from tasks.stage import Reporter

STDERR = "-"
TOLD = ("device", "peak_memory_bytes", "peak_cuda_bytes")  # of what made an artifact


def manifest_if_there(store: Store, ref: Ref) -> Manifest | None:
    """What an artifact says of itself; None if it was lost this very moment.

    A run must not fail for what is told of it; whoever reads the artifact next says what is wrong.
    """
    try:
        return store.manifest(ref.kind, ref.key)
    except StoreError:
        return None


class Reporters:
    """All of these reporters as one."""

    def __init__(self, *reporters: Reporter) -> None:
        self._all = reporters

    def started(self, label: str, work: int) -> None:
        for reporter in self._all:
            reporter.started(label, work)

    def advanced(self, done: int, total: int) -> None:
        for reporter in self._all:
            reporter.advanced(done, total)

    def finished(self, label: str, ref: Ref, seconds: float, cached: bool) -> None:
        for reporter in self._all:
            reporter.finished(label, ref, seconds, cached)

    def said(self, line: str) -> None:
        for reporter in self._all:
            reporter.said(line)


class Tally:
    """How many artifacts a run made and found, and the bytes that it made."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.made = self.cached = self.bytes = 0

    def started(self, label: str, work: int) -> None: ...

    def advanced(self, done: int, total: int) -> None: ...

    def finished(self, label: str, ref: Ref, seconds: float, cached: bool) -> None:
        if cached:
            self.cached += 1
        else:
            self.made += 1
            found = manifest_if_there(self._store, ref)
            self.bytes += found.bytes if found else 0

    def said(self, line: str) -> None: ...

    def line(self) -> str:
        """The tally in words."""
        made = f"{self.made} artifacts made ({size_text(self.bytes)})"
        return f"{made}, {self.cached} found in the store"


class EventLog:
    """A line of JSON per artifact and per thing said.

    Args:
        place: path of the log, or "-" for stderr.
        store: where the artifacts are.
        known: what every line says besides: the config's name, the flow run.

    Raises:
        ConfigError: the log cannot be written.
    """

    def __init__(self, place: str, store: Store, **known: str) -> None:
        self._place = place if place == STDERR else os.path.expanduser(place)
        self._store, self._known = store, known
        try:
            self._append(b"")
        except OSError as error:
            raise ConfigError(f"TRIBUNAL_LOG {self._fault(error)}; name another file") from error

    def started(self, label: str, work: int) -> None: ...

    def advanced(self, done: int, total: int) -> None: ...

    def finished(self, label: str, ref: Ref, seconds: float, cached: bool) -> None:
        found = manifest_if_there(self._store, ref)
        made_by = found.provenance if found else {}
        self._write(
            "cached" if cached else "made",
            kind=ref.kind,
            key=ref.key,
            label=label,
            seconds=round(seconds, 3),
            rows=found.rows if found else None,
            bytes=found.bytes if found else None,
            **{name: made_by[name] for name in TOLD if name in made_by},
        )

    def said(self, line: str) -> None:
        self._write("said", line=line)

    def _write(self, event: str, **facts: Any) -> None:
        time = datetime.now(UTC).isoformat(timespec="milliseconds")
        head = {"time": time, "event": event, "process": os.getpid(), **self._known}
        try:
            self._append(json.dumps(head | facts, ensure_ascii=False).encode(errors="replace"))
        except OSError as error:  # a full disk must not stop the run that the log is about
            print(f"tribunal: a line of the log is lost: {self._fault(error)}", file=sys.stderr)  # noqa: T201

    def _append(self, line: bytes) -> None:
        """Append a line in one write; without one, only make sure that it would go."""
        whole = line + b"\n" if line else b""
        if self._place == STDERR:
            os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, whole)
            return
        file = os.open(self._place, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            if os.write(file, whole) < len(whole):
                raise OSError("the disk is full")
        finally:
            os.close(file)

    def _fault(self, error: OSError) -> str:
        return f"'{self._place}' cannot be written ({(error.strerror or str(error)).lower()})"


def with_log(place: str | None, store: Store, *reporters: Reporter, **known: str) -> Reporter:
    """These reporters as one, with the log of TRIBUNAL_LOG (`place`) if there is one.

    Raises:
        ConfigError: the log cannot be written.
    """
    return Reporters(*reporters, *([EventLog(place, store, **known)] if place else []))
