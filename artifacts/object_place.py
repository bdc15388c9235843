"""A place in object storage, through fsspec: s3://bucket/folder, gs://, memory://.

Nothing can be renamed there, so a folder's data goes up under a name made of its content, and the
folder becomes complete when its manifest is created, which the storage lets only one writer do.
Nothing can be locked either: a lock is a leased object that its holder keeps rewriting; one that
stands still for LEASE seconds, by the watcher's own steady clock, belongs to nobody. If two believe
that they hold one, a computation is wasted and nothing else: only one of them completes the folder.
"""

from __future__ import annotations

import json
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from artifacts.errors import StoreError
from artifacts.places import LOCKS, MANIFEST, QUARANTINE, RUNS, longest, run_name

LEASE = 45.0  # seconds without a sign of life after which a lock is free
RENEWAL = 10.0  # seconds between signs of life
DAY = 24 * 3600.0  # seconds after which a silent run counts as dead


class ObjectPlace:
    """A prefix of a bucket, or of whatever else fsspec reaches by a URL."""

    young = DAY
    lease = LEASE
    renewal = RENEWAL

    def __init__(self, url: str) -> None:
        self.location = url.rstrip("/")
        self._protocol = url.split("://")[0]
        if "@" in urlsplit(url).netloc:
            raise StoreError("a store's URL holds no credentials; give them in the environment")
        if not url.partition("://")[2].strip("/"):
            raise StoreError(f"a store's URL names a bucket, as in s3://bucket, unlike '{url}'")
        if self._protocol in ("http", "https"):
            raise StoreError(f"a store cannot be on '{self._protocol}://', which only reads")
        self._fs, self._faults = _open(self._protocol)
        self._base: str = self._fs._strip_protocol(self.location)
        self._ahead: float | None = None  # seconds of the storage's clock before ours

    def folders(self, path: str) -> list[str]:
        names = [PurePosixPath(e["name"]).name for e in self._list(path) if _is_folder(e)]
        return sorted(name for name in names if not name.startswith("."))

    def read(self, path: str) -> bytes:
        with self._told():
            content: bytes = self._fs.cat_file(self._at(path))
        return content

    def read_many(self, paths: Sequence[str]) -> Iterator[bytes | None]:
        if not paths:
            return  # fsspec takes an empty list for a missing file
        with self._told():
            found = self._fs.cat([self._at(path) for path in paths], on_error="return")
        for path in paths:
            content = found[self._at(path)]
            if isinstance(content, Exception) and not isinstance(content, FileNotFoundError):
                with self._told():
                    raise content
            yield content if isinstance(content, bytes) else None

    def sizes(self, path: str) -> dict[str, int]:
        try:
            with self._told():
                files = self._fs.find(self._at(path), detail=True).values()
        except FileNotFoundError:
            return {}
        start = len(self._at("")) + 1
        return {file["name"][start:]: int(file["size"]) for file in files}

    def exists(self, path: str) -> bool:
        return bool(self._list(path))

    def url(self, path: str) -> str:
        return f"{self.location}/{path}"

    def age(self, path: str) -> float:
        """By the storage's own clock; 0 for what is gone."""
        try:
            with self._told():
                files = self._fs.find(self._at(path))
                newest = max((self._modified(file) for file in files), default=None)
        except FileNotFoundError:
            return 0.0
        return 0.0 if newest is None else self._now() - newest

    def data_name(self, name: str, sha256: str) -> str:
        """Two writers whose content differs must not overwrite each other's data."""
        stem, dot, suffix = name.partition(".")
        return f"{stem}-{sha256[:16]}{dot}{suffix}"

    def publish(self, path: str, files: Mapping[str, bytes]) -> bool:
        """Data first; then MANIFEST, if nobody else has created it."""
        with self._told():
            for name in files.keys() - {MANIFEST}:
                self._fs.pipe_file(self._at(f"{path}/{name}"), files[name])
            return self._create(f"{path}/{MANIFEST}", files[MANIFEST])

    def retire(self, path: str, to: str) -> None:
        """MANIFEST goes first: without it the folder is nobody's artifact."""
        with self._told():
            for name in self._files(path):
                self._fs.mv(self._at(f"{path}/{name}"), self._at(f"{to}/{name}"))

    def delete(self, path: str) -> None:
        with self._told():
            for name in self._files(path):
                self._fs.rm_file(self._at(f"{path}/{name}" if name else path))

    def room(self) -> tuple[int, int] | None:
        return None

    @contextmanager
    def lock(self, name: str, waiting: Callable[[], None] | None = None) -> Iterator[None]:
        path, owner = f"{LOCKS}/{name}", uuid.uuid4().hex
        self._acquire(path, owner, waiting)
        released = threading.Event()
        renewing = threading.Thread(target=self._renew, args=(path, owner, released), daemon=True)
        renewing.start()
        try:
            yield
        finally:
            released.set()
            renewing.join()
            with suppress(OSError):  # a lease that cannot be returned runs out
                if self._holder(path).get("owner") == owner:
                    self.delete(path)

    def abandoned(self) -> list[str]:
        aside = [f"{QUARANTINE}/{name}" for name in self.folders(QUARANTINE)]
        leases = [f"{kind}/{name}" for kind in (RUNS, LOCKS) for name in self._files(kind)]
        return aside + [path for path in leases if self.age(path) > DAY]

    @contextmanager
    def register(self) -> Iterator[Callable[[str], None]]:
        path, told = f"{RUNS}/{run_name()}", dict[str, None]()

        def tell(line: str) -> None:
            if line not in told:
                told[line] = None
                with self._told():
                    self._fs.pipe_file(self._at(path), "\n".join(told).encode())

        try:
            yield tell
        finally:
            with suppress(OSError):  # what cannot be removed is silent from now on
                if told:
                    self.delete(path)

    def registered(self) -> list[str]:
        told: list[str] = []
        for name in self._live():
            with suppress(FileNotFoundError):  # it ended just now
                told += self.read(f"{RUNS}/{name}").decode().splitlines()
        return told

    def longest_build(self) -> float:
        return longest(self._live())

    def _live(self) -> list[str]:
        return [name for name in self._files(RUNS) if self.age(f"{RUNS}/{name}") <= DAY]

    @contextmanager
    def settled(self, changing: bool) -> Iterator[None]:
        """No lock spans a bucket: what is removed there has been unused for long (housekeeping)."""
        yield

    @property
    def remote(self) -> bool:
        return True

    def reader(self, sizes: Mapping[str, int]) -> Any:
        from artifacts.object_reader import ObjectReader

        return ObjectReader(self._fs, {self._at(path): size for path, size in sizes.items()})

    def _modified(self, file: str) -> float:
        seconds: float = self._fs.modified(file).timestamp()
        return seconds

    def _now(self) -> float:
        """The storage's time: no two clocks are compared."""
        if self._ahead is None:
            sign = self._at(f"{LOCKS}/clock-{uuid.uuid4().hex}")
            with self._told():
                self._fs.pipe_file(sign, b"now")
                self._ahead = self._modified(sign) - time.time()
                self._fs.rm_file(sign)
        return time.time() + self._ahead

    def _at(self, path: str) -> str:
        return f"{self._base}/{path}" if path else self._base

    def _list(self, path: str) -> list[dict[str, Any]]:
        try:
            with self._told():
                listed: list[dict[str, Any]] = self._fs.ls(self._at(path), detail=True)
        except FileNotFoundError:
            return []
        return listed

    def _files(self, path: str) -> list[str]:
        """Files of a folder, MANIFEST first; '' if the path is itself a file."""
        try:
            with self._told():
                found = self._fs.find(self._at(path))
        except FileNotFoundError:
            return []
        names = [name.removeprefix(self._at(path)).lstrip("/") for name in found]
        return sorted(names, key=lambda name: (name != MANIFEST, name))

    def _create(self, path: str, content: bytes) -> bool:
        try:
            self._fs.pipe_file(self._at(path), content, mode="create")
        except FileExistsError:
            return False
        return True

    def _acquire(self, path: str, owner: str, waiting: Callable[[], None] | None) -> None:
        seen, since = None, time.monotonic()
        pause = 0.05
        while not self._claim(path, owner):
            if waiting:
                waiting()
                waiting = None
            sign = self._holder(path)
            if sign != seen:
                seen, since = sign, time.monotonic()
            elif time.monotonic() - since > self.lease:
                with suppress(FileNotFoundError):
                    self.delete(path)
            time.sleep(pause)
            pause = min(2 * pause, 1.0)

    def _claim(self, path: str, owner: str) -> bool:
        with self._told():
            return self._create(path, _sign(owner, 0))

    def _renew(self, path: str, owner: str, released: threading.Event) -> None:
        """Signs of life until the lock is released. A missed one costs nothing but a renewal."""
        beat = 0
        while not released.wait(self.renewal):
            beat += 1
            with suppress(OSError), self._told():
                if self._holder(path).get("owner") == owner:
                    self._fs.pipe_file(self._at(path), _sign(owner, beat))

    def _holder(self, path: str) -> dict[str, Any]:
        try:
            found: dict[str, Any] = json.loads(self.read(path))
        except (FileNotFoundError, ValueError):
            return {}
        return found

    @contextmanager
    def _told(self) -> Iterator[None]:
        """What the storage's client raises, as an OSError."""
        try:
            yield
        except self._faults as error:
            raise OSError(" ".join(str(error).split())) from error


def _open(protocol: str) -> tuple[Any, tuple[type[Exception], ...]]:
    """The file system of a protocol, and what it raises beside OSError."""
    import fsspec

    try:
        found = fsspec.filesystem(protocol, use_listings_cache=False, skip_instance_cache=True)
    except ImportError as error:
        raise StoreError(
            f"a store on '{protocol}://' needs its client: pip install 'tribunal[s3]' for s3; "
            f"{error}"
        ) from error
    except ValueError as error:
        raise StoreError(f"a store cannot be on '{protocol}://': {error}") from error
    faults: tuple[type[Exception], ...] = (NotImplementedError,)
    if protocol in ("s3", "s3a"):
        from botocore.exceptions import BotoCoreError

        faults += (BotoCoreError,)
    return found, faults


def _is_folder(entry: Mapping[str, Any]) -> bool:
    return bool(entry["type"] == "directory")


def _sign(owner: str, beat: int) -> bytes:
    return json.dumps({"owner": owner, "beat": beat}).encode()
