"""What the fault tests share: the undisturbed study, victims to kill, and what must still hold."""

from __future__ import annotations

import json
import os
import random
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import polars as pl
import psutil
import pytest
from small_study import digests, environment, trial_table

from artifacts.catalog import catalog, fetch
from artifacts.store import MANIFEST, Store
from flows.pipeline import run_pipeline
from flows.settings import load_config
from tasks.stage import planning

ROOT = Path(__file__).parent.parent.parent
PATIENCE = 600.0  # seconds; only a broken test ever waits this long
# kill -9 at random moments, 100 in all: of runs by the command line, and on a Prefect server
RUN_KILLS, SERVER_KILLS, WORKER_KILLS, FLOW_RUN_KILLS = 73, 15, 4, 8
Place = tuple[str, str]  # kind and key
MOUNTED = f"tribunal-faults-{os.getpid()}"  # the source of our mounts, for whoever tidies up


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    returncode: int
    stdout: str
    stderr: str


@dataclass
class Victim:
    """A process that the launcher forked; held by a handle, so a later process is never hit."""

    pid: int
    output: Path
    errors: Path
    _connection: socket.socket
    _handle: int
    _code: int | None = None

    def kill(self) -> None:
        """kill -9, wherever it is."""
        self.send(signal.SIGKILL)

    def send(self, what: signal.Signals) -> None:
        """Send a signal; nothing happens if it has ended."""
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._handle, what)

    def ended(self) -> bool:
        """Whether it has come to its end."""
        return bool(self._code is not None or _readable(self._handle))

    def wait(self) -> Done:
        """Its end; a victim of kill -9 has code -9."""
        if self._code is None:
            self._connection.settimeout(PATIENCE)
            self._code = int(_line(self._connection))
            self._connection.close()
            os.close(self._handle)
        return Done(self._code, self.output.read_text(), self.errors.read_text())


class Launcher:
    """Runs `tribunal` in forks of a process that has imported everything.

    Args:
        folder: where sockets and outputs lie.
        first: a whole study that the first fork runs: its store and the command's arguments.
        settings: environment of every command, beside what the small study needs.
        imports: modules that everything starts from.
    """

    def __init__(
        self,
        folder: Path,
        first: tuple[Store, Sequence[str]],
        settings: Mapping[str, str] = MappingProxyType({}),
        imports: Sequence[str] = ("flows.cli", "flows.pipeline", "tasks.models.loading"),
    ) -> None:
        self.folder, self._number, self._settings = folder, 0, settings
        self._socket = folder / "socket"
        self._lock = threading.Lock()
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).parent / "launcher.py"), str(self._socket)],
            env=environment(first[0]) | {"PYTHONPATH": str(ROOT)} | settings,
            cwd=ROOT,
            stdin=subprocess.PIPE,
        )
        files = {"count_to": str(folder / "writes"), "modules_to": str(folder / "modules")}
        order = self._order(first[0], first[1]) | files | {"imports": imports}
        assert self._process.stdin
        self._process.stdin.write(json.dumps(order).encode() + b"\n")
        self._process.stdin.flush()
        wait_until(lambda: self._process.poll() is not None or self._socket.exists())

    @property
    def writes(self) -> int:
        """Writes of the first study into its store."""
        return int((self.folder / "writes").read_text())

    def close(self) -> None:
        """End the launcher; processes that it forked go on."""
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait(PATIENCE)

    def _order(self, store: Store, arguments: Sequence[str]) -> dict[str, Any]:
        with self._lock:
            self._number += 1
            name = self.folder / f"command-{self._number}"
        return {
            "arguments": list(arguments),
            "environment": environment(store) | self._settings,
            "output": str(name.with_suffix(".out")),
            "errors": str(name.with_suffix(".err")),
        }

    def start(self, store: Store, *arguments: str, last_write: int | None = None) -> Victim:
        """Start a command; with `last_write`, it kills itself just before that write."""
        order = self._order(store, arguments)
        if last_write is not None:
            order["last_write"] = last_write
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(PATIENCE)
        connection.connect(str(self._socket))
        connection.sendall(json.dumps(order).encode() + b"\n")
        pid = int(_line(connection))
        handle = os.pidfd_open(pid)
        connection.sendall(b".")
        return Victim(pid, Path(order["output"]), Path(order["errors"]), connection, handle)

    def run(self, store: Store, *arguments: str) -> Done:
        """Run a command to its end."""
        return self.start(store, *arguments).wait()


@dataclass(frozen=True)
class Whole:
    """A study that nothing disturbed, and how it came to be."""

    store: Store
    config: Path
    places: tuple[Place, ...]  # its artifacts, in the order in which they are made
    seconds: tuple[float, ...]  # that each of them took
    writes: int  # of the whole run into its store
    digests: dict[str, str]
    trials: pl.DataFrame
    ranking: str

    @property
    def kinds(self) -> list[str]:
        return sorted({kind for kind, _ in self.places})


def read_whole(store: Store, config: Path, launcher: Launcher) -> Whole:
    """All that an undisturbed run must be compared with."""
    with planning(store) as steps:
        run_pipeline(load_config(str(config)))
    places = tuple((step.kind, step.key) for step in steps)
    seconds = tuple(float(store.manifest(*p).provenance["seconds"]) for p in places)
    ranked = launcher.run(store, "rank", "--format", "csv").stdout
    return Whole(
        store,
        config,
        places,
        seconds,
        launcher.writes,
        digests(store),
        trial_table(store),
        ranked,
    )


@dataclass
class Watch:
    """What was seen in a store: an artifact that was there once must stay as it was."""

    whole: Whole
    store: Store
    seen: dict[Place, bytes] = field(default_factory=dict)

    def check(self) -> int:
        """Every artifact verifies, none was made again, no trial is there twice."""
        for kind, key in self.store.entries():
            assert self.store.find(kind, key), f"{kind}/{key} is not whole"
            told = (self.store.folder(kind, key) / MANIFEST).read_bytes()
            assert self.seen.setdefault((kind, key), told) == told, f"{kind}/{key} was made again"
        lost = set(self.seen) - set(self.store.entries())
        assert not lost, f"lost: {lost}"
        assert repeated_trials(self.store) == 0
        return len(self.seen)

    def now_making(self) -> str:
        """Kind of the first artifact that is not there."""
        there = set(self.store.entries())
        missing = [kind for kind, key in self.whole.places if (kind, key) not in there]
        return missing[0] if missing else "results"


def repeated_trials(store: Store) -> int:
    """Trials that lie in more than one row of one split."""
    with catalog(store) as connection:
        sql = (
            "SELECT count(*) FROM (SELECT 1 FROM trials "
            "GROUP BY protocol, split, prompts, arm, trial HAVING count(*) > 1)"
        )
        return int(fetch(connection, sql).rows[0][0])


def assert_same(whole: Whole, store: Store, launcher: Launcher) -> None:
    """The study ended as if nothing had happened: same artifacts, trials and ranking."""
    assert digests(store) == whole.digests
    assert trial_table(store).equals(whole.trials, null_equal=True)
    assert launcher.run(store, "rank", "--format", "csv").stdout == whole.ranking


def assert_tidy(whole: Whole, store: Store, launcher: Launcher) -> None:
    """After `gc` nothing is in the store but the study, its database file, and empty locks."""
    day = time.time() - 86400
    for path in store.root.rglob("*"):
        if any(part.startswith(".") for part in path.relative_to(store.root).parts):
            os.utime(path, (day, day))  # so that no leftover counts as a running build's
    done = launcher.run(store, "store", "gc", "--yes")
    assert done.returncode == 0, done.stderr
    kept = {store.folder(*place) for place in whole.places}
    files = {p for p in store.root.rglob("*") if p.parent not in kept and _holds_bytes(p)}
    assert {path.name for path in files} <= {"tribunal.duckdb"}, files
    assert digests(store) == whole.digests


def _holds_bytes(path: Path) -> bool:
    return path.is_file() and path.stat().st_size > 0


def artifacts_in(store: Store) -> int:
    """How many artifacts there are; cheap enough to ask all the time."""
    return sum(1 for _ in store.entries())


def wait_until(happened: object, every: float = 0.002) -> None:
    """Wait for `happened()`, a callable, to be true."""
    assert callable(happened)
    deadline = time.monotonic() + PATIENCE
    while not happened():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(every)


def processes_on(store: Store) -> list[psutil.Process]:
    """Processes whose environment names this store."""
    wanted = ("TRIBUNAL_STORE", str(store.root))
    found = []
    for process in psutil.process_iter():
        try:
            if wanted in process.environ().items() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def copy_store(whole: Whole, place: Path) -> Store:
    """A store of one's own with the finished study in it."""
    shutil.copytree(whole.store.root, place)
    return Store(place)


@contextmanager
def tmpfs(place: Path, limits: str) -> Iterator[Path]:
    """A small file system of its own, mounted at `place`."""
    place.mkdir(parents=True, exist_ok=True)
    mount("-t", "tmpfs", "-o", limits, MOUNTED, str(place))
    try:
        yield place
    finally:
        unmount(place)


def mount(*arguments: str) -> None:
    """mount(8); without the right to mount, the test is skipped."""
    done = subprocess.run(["mount", *arguments], capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"this test mounts file systems, which needs root: {done.stderr.strip()}")


def unmount(place: Path) -> None:
    """Unmount at once; processes that still use it keep it until they end."""
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def unmount_leftovers() -> None:
    """Undo the mounts of tests that were killed before they could."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        source = line.partition(" - ")[2].split()[1]
        name, _, pid = source.rpartition("-")
        if name == MOUNTED.rpartition("-")[0] and not psutil.pid_exists(int(pid)):
            unmount(Path(line.split()[4].encode().decode("unicode_escape")))


def needs(tool: str) -> str:
    """Path of a tool; where it is not installed, the test is skipped."""
    path = shutil.which(tool)
    if path is None:
        pytest.skip(f"this test needs {tool}: apt-get install {tool}")
    return path


def one_line(done: Done | subprocess.CompletedProcess[str]) -> str:
    """The line of a command that failed as a user should see it: exit code 2, no traceback."""
    assert done.returncode == 2, done.stderr + done.stdout
    assert "Traceback" not in done.stderr + done.stdout
    said = [line for line in done.stderr.splitlines() if line.startswith("tribunal: ")]
    assert len(said) == 1, done.stderr
    assert done.stderr.splitlines()[-1] == said[0]
    return said[0]


def histogram(phases: Sequence[str]) -> str:
    """Kinds with counts, most frequent first."""
    return ", ".join(f"{kind} {count}" for kind, count in Counter(phases).most_common())


def spread(dice: random.Random, whole: Whole, count: int) -> list[int]:
    """Positions in the chain of artifacts, ascending: every kind is as likely as any other."""
    kinds = [*(kind for kind, _ in whole.places), "results"]
    chosen = dice.sample(sorted(set(kinds)), count)
    return sorted(dice.choice([n for n, kind in enumerate(kinds) if kind == c]) for c in chosen)


def _line(connection: socket.socket) -> str:
    """One line, byte by byte: what follows it stays unread."""
    text = b""
    while not text.endswith(b"\n"):
        piece = connection.recv(1)
        assert piece, "the launcher died"
        text += piece
    return text.decode()


def _readable(handle: int) -> bool:
    return bool(select.select([handle], [], [], 0)[0])
