"""Users' SQL in a process of its own, so that whatever a query does, it ends.

DuckDB's memory limit does not count what one expression makes (`range(1e9)` as a list), and an
interrupt waits for the expression to end. A process can be bounded by the kernel and killed. The
parent's half is here; `artifacts.sandbox_child` is the other. They speak JSON lines, so a value
that JSON does not have (a date, a decimal) comes back as text.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import warnings
from contextlib import suppress
from typing import IO, Any

from artifacts.errors import DamageWarning, QueryError

LARGEST_ANSWER = 64 * 2**20  # bytes of JSON
READY = b'{"ready"'  # what the child says when the views stand: what was left out of them
Columns = tuple[str, ...]
Rows = tuple[tuple[Any, ...], ...]


def run_apart(location: str, sql: str, time_limit: float) -> tuple[Columns, Rows]:
    """Columns and rows of a SELECT over the store at `location`.

    Args:
        location: path or URL of the store.
        sql: a SELECT that `sql_guard` has passed.
        time_limit: seconds, from the moment the views stand.

    Raises:
        QueryError: an error of the query, a limit of time, memory or size reached, or a store
            that no other process can see.
    """
    if location.startswith("memory://"):
        raise QueryError(f"'{location}' is in this process alone; SQL needs a folder or a bucket")
    command = [sys.executable, "-P", "-m", "artifacts.sandbox_child"]
    whole = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with subprocess.Popen(
        command,
        env=whole,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,  # DuckDB tells of its own leaks when a process ends early
    ) as child:
        try:
            return _answer(child, json.dumps({"store": location, "sql": sql}), time_limit)
        finally:
            child.kill()


def _answer(child: subprocess.Popen[bytes], task: str, limit: float) -> tuple[Columns, Rows]:
    assert child.stdin
    assert child.stdout
    with suppress(BrokenPipeError), child.stdin:  # one that ended already is told of below
        child.stdin.write(task.encode())
    first = child.stdout.readline()
    if not first.startswith(READY):  # the store could not be read, or the process could not start
        return _parsed([first], child.wait())
    for said in json.loads(first)["ready"]:
        warnings.warn(said, DamageWarning, stacklevel=3)
    expired = threading.Event()

    def stop() -> None:
        expired.set()
        child.kill()

    timer = threading.Timer(limit, stop)
    timer.start()
    try:
        lines = _lines(child.stdout)
        child.wait()
    finally:
        timer.cancel()
    if expired.is_set():
        raise QueryError(f"stopped after {limit:g} seconds; ask for less, or add a condition")
    return _parsed(lines, child.returncode)


def _lines(stream: IO[bytes]) -> list[bytes]:
    content = stream.read(LARGEST_ANSWER + 1)
    if len(content) > LARGEST_ANSWER:
        raise QueryError(
            f"the answer is larger than {LARGEST_ANSWER >> 20} MB; add LIMIT, or aggregate"
        )
    return content.splitlines()


def _parsed(lines: list[bytes], code: int) -> tuple[Columns, Rows]:
    """The last line says how it went: an error, or the columns of the rows before it."""
    try:
        end = json.loads(lines[-1])
    except (IndexError, ValueError) as error:
        raise QueryError(f"the query ended DuckDB (code '{code}'); make it simpler") from error
    if "error" in end:
        raise QueryError(end["error"])
    return tuple(end["columns"]), tuple(tuple(json.loads(line)) for line in lines[:-1])
