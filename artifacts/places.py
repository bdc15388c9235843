"""Where a store keeps its files: what a place can do, and a folder of this machine.

A place knows folders of files and nothing of what is in them. An artifact's folder appears in it
whole or not at all, whatever happens to the process that writes it. The other kind of place, a
bucket, is in object_place.py.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol, TextIO

from artifacts.paths import exists

LOCKS, RUNS, QUARANTINE, WORKSHOPS = ".locks", ".runs", ".quarantine", ".tmp"
MANIFEST = "manifest.json"  # the file whose presence makes an artifact's folder complete


class Place(Protocol):
    """Folders of files. Paths are relative, with '/'; faults are OSErrors."""

    location: str
    young: float  # seconds during which an artifact that nothing reaches is not collected

    def folders(self, path: str) -> list[str]:
        """Names of the visible folders in a folder, none if it is missing."""
        ...

    def read(self, path: str) -> bytes:
        """A file's content; FileNotFoundError if it is missing."""
        ...

    def read_many(self, paths: Sequence[str]) -> Iterator[bytes | None]:
        """Content of small files in their order; None for one that is not there."""
        ...

    def sizes(self, path: str) -> dict[str, int]:
        """Bytes of every file below a folder, by its path."""
        ...

    def exists(self, path: str) -> bool:
        """Whether there is a file or a folder."""
        ...

    def url(self, path: str) -> str:
        """What names a file to DuckDB and to people."""
        ...

    def age(self, path: str) -> float:
        """Seconds since a folder was completed; 0 if it is gone."""
        ...

    def data_name(self, name: str, sha256: str) -> str:
        """The file name under which content is published."""
        ...

    def publish(self, path: str, files: Mapping[str, bytes]) -> bool:
        """Let a folder appear with these files, MANIFEST last; False if another was first."""
        ...

    def retire(self, path: str, to: str) -> None:
        """Move a folder out of sight."""
        ...

    def delete(self, path: str) -> None:
        """Remove a folder."""
        ...

    def room(self) -> tuple[int, int] | None:
        """Free and all bytes, None where there is no such limit."""
        ...

    def lock(self, name: str, waiting: Callable[[], None] | None) -> AbstractContextManager[None]:
        """Hold a name; no other process holds it meanwhile, unless this one seems dead."""
        ...

    def abandoned(self) -> list[str]:
        """Private files and folders whose writer is gone."""
        ...

    def register(self) -> AbstractContextManager[Callable[[str], None]]:
        """Be known as a running build; what is called tells which artifacts it uses."""
        ...

    def registered(self) -> list[str]:
        """All that running builds have told."""
        ...

    def longest_build(self) -> float:
        """For how many seconds the longest of the running builds has been running; 0 if none is."""
        ...

    def settled(self, changing: bool) -> AbstractContextManager[None]:
        """Keep others from removing (or, when changing, from starting to use) anything."""
        ...

    @property
    def remote(self) -> bool:
        """Whether DuckDB needs `reader` to reach the files."""
        ...

    def reader(self, sizes: Mapping[str, int]) -> Any:
        """An fsspec file system over the files of `sizes`, by their path, that only reads."""
        ...


class LocalPlace:
    """A folder. Locks are flocks, which the kernel releases when their holder dies."""

    young = 3600.0

    def __init__(self, root: Path) -> None:
        self.root = root
        self.location = str(root)
        self._was_there = exists(root)

    def folders(self, path: str) -> list[str]:
        try:
            entries = list((self.root / path).iterdir())
        except FileNotFoundError:
            return []
        return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))

    def read(self, path: str) -> bytes:
        return (self.root / path).read_bytes()

    def read_many(self, paths: Sequence[str]) -> Iterator[bytes | None]:
        for path in paths:
            try:
                yield self.read(path)
            except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
                yield None

    def sizes(self, path: str) -> dict[str, int]:
        found = {}
        for folder, _, names in os.walk(self.root / path):
            for name in names:
                file = Path(folder, name)
                with suppress(FileNotFoundError):  # removed meanwhile
                    found[file.relative_to(self.root).as_posix()] = file.stat().st_size
        return found

    def exists(self, path: str) -> bool:
        return (self.root / path).exists()

    def url(self, path: str) -> str:
        return str(self.root / path)

    def age(self, path: str) -> float:
        try:
            return time.time() - (self.root / path).stat().st_mtime
        except FileNotFoundError:
            return 0.0

    def data_name(self, name: str, sha256: str) -> str:
        return name

    def publish(self, path: str, files: Mapping[str, bytes]) -> bool:
        """Written to a private folder, synced, and renamed into place."""
        final = self.root / path
        workshop = self._hidden(WORKSHOPS) / f"{path.replace('/', '-')}-{uuid.uuid4().hex}"
        try:
            workshop.mkdir(parents=True)
            for name, content in files.items():
                _write_synced(workshop / name, content)
            final.parent.mkdir(parents=True, exist_ok=True)
            workshop.rename(final)
            _sync_folder(final.parent)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                return False
            raise
        finally:
            shutil.rmtree(workshop, ignore_errors=True)
        return True

    def retire(self, path: str, to: str) -> None:
        (self.root / to).parent.mkdir(parents=True, exist_ok=True)
        (self.root / path).rename(self.root / to)

    def delete(self, path: str) -> None:
        """By way of a rename, so that no half of it is ever seen in its place."""
        place = self.root / path
        if not place.is_dir():
            place.unlink(missing_ok=True)
            return
        doomed = self._hidden(WORKSHOPS) / f"doomed-{uuid.uuid4().hex}"
        doomed.parent.mkdir(exist_ok=True)
        place.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)  # what is left of it is abandoned

    def room(self) -> tuple[int, int] | None:
        existing = next(p for p in (self.root, *self.root.parents) if p.exists())
        usage = shutil.disk_usage(existing)
        return usage.free, usage.total

    @contextmanager
    def lock(self, name: str, waiting: Callable[[], None] | None = None) -> Iterator[None]:
        path = self._hidden(LOCKS) / name
        with _open_locked(path, waiting):
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
                self._tidy(LOCKS)

    def abandoned(self) -> list[str]:
        """Quarantine, and workshops of artifacts that nobody holds the lock of."""
        found = [f"{QUARANTINE}/{name}" for name in self.folders(QUARANTINE)]
        for name in self.folders(WORKSHOPS):
            if not _is_locked(self._hidden(LOCKS) / name.rpartition("-")[0]):
                found.append(f"{WORKSHOPS}/{name}")
        return sorted(found)

    @contextmanager
    def register(self) -> Iterator[Callable[[str], None]]:
        with _open_locked(self._hidden(RUNS) / run_name(), None) as file:

            def tell(line: str) -> None:
                file.write(line + "\n")
                file.flush()

            try:
                yield tell
            finally:
                Path(file.name).unlink(missing_ok=True)
                self._tidy(RUNS)

    def registered(self) -> list[str]:
        told: list[str] = []
        for file in self._runs():
            if _is_locked(file):
                with suppress(FileNotFoundError):  # it ended just now
                    told += file.read_text().splitlines()
            else:
                file.unlink(missing_ok=True)  # its run died
        return told

    def longest_build(self) -> float:
        return longest([file.name for file in self._runs() if _is_locked(file)])

    def _runs(self) -> list[Path]:
        try:
            return sorted(self._hidden(RUNS).iterdir())
        except FileNotFoundError:
            return []

    @contextmanager
    def settled(self, changing: bool) -> Iterator[None]:
        handle = _lock_folder(self._hidden(RUNS), fcntl.LOCK_EX if changing else fcntl.LOCK_SH)
        try:
            yield
        finally:
            os.close(handle)
            self._tidy(RUNS)

    @property
    def remote(self) -> bool:
        return False

    def reader(self, sizes: Mapping[str, int]) -> Any:
        raise NotImplementedError("DuckDB reads a folder by itself")

    def _hidden(self, name: str) -> Path:
        return self.root / name

    def _tidy(self, name: str) -> None:
        """Leave no empty folder behind; one that is in use again stays, or was there before us."""
        with suppress(OSError):
            self._hidden(name).rmdir()
            if not self._was_there:
                self.root.rmdir()


def run_name() -> str:
    """A name for a running build, which tells since when it runs."""
    return f"{time.time_ns()}-{uuid.uuid4().hex}"


def longest(runs: Sequence[str]) -> float:
    """For how many seconds the longest of some running builds has been running."""
    begun = [int(name.partition("-")[0]) for name in runs]
    return (time.time_ns() - min(begun)) / 1e9 if begun else 0.0


def size_text(n_bytes: float) -> str:
    """Bytes with a unit."""
    for unit in ("B", "kB", "MB", "GB"):
        if n_bytes < 1000:
            return f"{n_bytes:.3g} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.3g} TB"


def _open_locked(path: Path, waiting: Callable[[], None] | None) -> TextIO:
    """Open and lock a file that its holders remove: what was locked must still be what is there."""
    while True:
        _make_folder(path.parent)
        try:
            file = path.open("w")
        except FileNotFoundError:
            continue  # the folder was tidied away
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if waiting:
                waiting()
            fcntl.flock(file, fcntl.LOCK_EX)
        with suppress(FileNotFoundError):
            if path.stat().st_ino == os.fstat(file.fileno()).st_ino:
                return file
        file.close()


def _lock_folder(path: Path, how: int) -> int:
    """A handle of a locked folder; what was locked must still be what is there."""
    while True:
        _make_folder(path)
        with suppress(FileNotFoundError):
            handle = os.open(path, os.O_RDONLY)
            fcntl.flock(handle, how)
            if path.stat().st_ino == os.fstat(handle).st_ino:
                return handle
            os.close(handle)


def _make_folder(path: Path) -> None:
    """Others may tidy it, or its parents, away in the midst of it."""
    for _ in range(100):
        with suppress(FileExistsError, FileNotFoundError):
            path.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            return
    path.mkdir(parents=True, exist_ok=True)


def _is_locked(path: Path) -> bool:
    try:
        file = path.open()
    except FileNotFoundError:
        return False
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _write_synced(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
