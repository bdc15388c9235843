"""What a flow run says in Prefect's UI while it runs: a line per artifact, a bar for the search."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any
from uuid import UUID

import httpx
from prefect import get_run_logger
from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.exceptions import PrefectException

from artifacts.places import size_text
from artifacts.store import Ref, Store
from flows.logs import manifest_if_there
from flows.progress import duration

EVERY = 10.0  # seconds between two updates of the bar; one takes about 10 ms


class FlowLog:
    """Progress as lines of the flow run's log."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._log = get_run_logger()

    def started(self, label: str, work: int) -> None:
        self._log.info("making %s", label)

    def advanced(self, done: int, total: int) -> None: ...

    def finished(self, label: str, ref: Ref, seconds: float, cached: bool) -> None:
        how = "cached" if cached else "made"
        found = manifest_if_there(self._store, ref)
        size = size_text(found.bytes) if found else "of unknown size"
        place = f"{ref.kind}/{ref.key[:8]}"
        self._log.info("%s: %s in %.1f s, %s (%s)", label, how, seconds, size, place)

    def said(self, line: str) -> None:
        self._log.info(line)


class SearchBar:
    """The search as a progress artifact of the flow run: trials judged, time left.

    Args:
        key: key of the artifact: lowercase letters, digits, dashes.
        generations: trials of every generation of the search, by its label.
        every: seconds between two updates.
    """

    def __init__(self, key: str, generations: Mapping[str, int], every: float = EVERY) -> None:
        self._key, self._generations, self._every = key, generations, every
        self._total = sum(generations.values())
        self._judged = 0.0  # trials that were judged or found
        self._found = 0  # those of them that earlier runs judged
        self._running = 0  # trials of the running generation
        self._since = self._updated = 0.0  # when the first one began; when the bar last moved
        self._artifact: UUID | None = None
        self._log = get_run_logger()

    def started(self, label: str, work: int) -> None:
        self._running = self._generations.get(label, 0)
        if self._running and self._artifact is None:
            self._since = self._since or time.monotonic()
            percent, words = self._percent(self._judged), self._words(self._judged)
            self._send(lambda: create_progress_artifact(percent, self._key, words))

    def advanced(self, done: int, total: int) -> None:
        if self._running and time.monotonic() - self._updated > self._every:
            self._move(self._running * done / max(total, 1))

    def finished(self, label: str, ref: Ref, seconds: float, cached: bool) -> None:
        trials = self._generations.get(label, 0)
        if not trials:  # a part of the running generation, say
            return
        self._running = 0
        self._judged += trials
        self._found += trials if cached else 0
        over = self._judged == self._total
        if over or (time.monotonic() - self._updated > self._every):
            self._move()

    def said(self, line: str) -> None: ...

    def _move(self, running: float = 0.0) -> None:
        """Update the artifact, if there is one: a search without a new trial has none."""
        artifact, judged = self._artifact, self._judged + running
        if artifact is not None:
            percent, words = self._percent(judged), self._words(judged)
            self._send(lambda: update_progress_artifact(artifact, percent, words))

    def _percent(self, judged: float) -> float:
        return 100 * judged / self._total

    def _words(self, judged: float) -> str:
        new = judged - self._found
        said = f"{int(judged)} of {self._total} trials judged"
        if new <= 0 or judged == self._total:
            return said
        seconds = (time.monotonic() - self._since) * (self._total - judged) / new
        return f"{said}, {duration(seconds)} left"

    def _send(self, call: Callable[[], Any]) -> None:
        """Tell the server; one that cannot be reached costs the bar, not the run."""
        try:
            self._artifact = call()
        except (httpx.HTTPError, PrefectException) as error:
            self._log.warning("the progress bar stands still: %s", type(error).__name__)
        self._updated = time.monotonic()
