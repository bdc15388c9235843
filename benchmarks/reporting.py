"""What it costs to tell: a log line per artifact, memory marks, and the bar of a search.

python benchmarks/reporting.py          # the bar is measured against a server of its own
"""

from __future__ import annotations

import itertools
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import polars as pl
from prefect import flow
from prefect.testing.utilities import prefect_test_harness

from artifacts.store import Store
from flows.flow_reports import SearchBar
from flows.logs import EventLog
from tasks.stage import Made, Runtime, _peaks, running, stage

TIMES = 300


@stage("numbers", version=1)
def numbers(*, seed: int) -> Made:
    return Made(pl.DataFrame({"n": [seed]}))


def median(call: Callable[[], object], times: int = TIMES) -> float:
    """Median seconds of a call."""
    found = []
    for _ in range(times):
        started = time.perf_counter()
        call()
        found.append(time.perf_counter() - started)
    return statistics.median(found)


@flow
def bars() -> dict[str, float]:
    """Seconds of creating the bar, of moving it, and of a call between two moves."""
    first = SearchBar("bar", {"trials 0-7": 8}, every=0.0)
    started = time.perf_counter()
    first.started("trials 0-7", 8)
    created = time.perf_counter() - started
    moved = median(lambda: first.advanced(3, 8), 50)
    quiet = SearchBar("bar", {"trials 0-7": 8})
    quiet.started("trials 0-7", 8)
    return {
        "create the bar, once per run": created,
        "move the bar, at most every 10 s": moved,
        "a call between two moves": median(lambda: quiet.advanced(3, 8)),
    }


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder) / "store")
        log = EventLog(str(Path(folder) / "log"), store)
        with running(Runtime(store)):
            ref, seeds = numbers(seed=0), itertools.count(1)
            found = {
                "make and store the smallest artifact": median(lambda: numbers(seed=next(seeds))),
                "log an artifact": median(lambda: log.finished("numbers", ref, 0.0, cached=True)),
                "log a line": median(lambda: log.said("loading organism")),
                "read the memory marks": median(_peaks),
            }
    with prefect_test_harness(server_startup_timeout=180):
        found |= bars()
    for what, seconds in found.items():
        print(f"{what:<40} {1e3 * seconds:9.4f} ms")


if __name__ == "__main__":
    main()
