"""The content-addressed store: `<location>/<kind>/<key>/{data.*, manifest.json}`.

A manifest is present only beside complete data (places.py says how, on a disk and in a bucket).
Reading verifies SHA-256 of data and manifest; what does not verify is set aside in `.quarantine`
and rebuilt by whoever needs it. One process at a time makes a key, as far as the place can tell.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from artifacts.errors import CorruptArtifact, MissingArtifact, StoreError
from artifacts.keys import Json
from artifacts.paths import exists
from artifacts.places import MANIFEST as MANIFEST
from artifacts.places import QUARANTINE, LocalPlace, Place, size_text

if TYPE_CHECKING:
    import polars as pl

SCHEMA_VERSION = 1
ATTEMPTS = 3  # at publishing a key that others publish or lose at the same time
RESERVE = 10**9  # bytes of a disk left free, or a hundredth of it if that is less
RECOUNT = 60.0  # seconds after which what others put counts for the quota


@dataclass(frozen=True)
class Ref:
    """A reference to an artifact: small, JSON-able, and all that flows hand around.

    `digest` is the SHA-256 of the data; it is empty for an artifact that is planned, not made.
    """

    kind: str
    key: str
    digest: str
    rows: int = 0

    @property
    def made(self) -> bool:
        return bool(self.digest)


@dataclass(frozen=True)
class Manifest:
    """What an artifact says of itself. Everything but `provenance` follows from its key."""

    kind: str
    key: str
    version: int
    data: str = "data.parquet"
    sha256: str = ""
    bytes: int = 0
    rows: int = 0
    identity: Json = None
    inputs: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def ref(self) -> Ref:
        return Ref(self.kind, self.key, self.sha256, self.rows)


class Find(Protocol):
    """Looks for an artifact."""

    def __call__(
        self, kind: str, key: str, report: Callable[[str], None] | None = None
    ) -> Ref | None: ...


class Store:
    """Artifacts in one place. Cheap to construct; writes nothing until `put`.

    Args:
        location: a local folder, or a URL that fsspec knows, as in "s3://bucket/folder".
        quota: bytes that all artifacts together may take; None: as many as there is room for.
    """

    def __init__(self, location: Path | str, quota: int | None = None) -> None:
        if set(str(location)) & set("*?[]"):
            raise StoreError(f"a store's name has none of *?[] in it, unlike '{location}'")
        self.place: Place = _place(str(location))
        self.quota = quota
        self._held: tuple[float, int] | None = None  # when all was last counted, and the bytes

    @property
    def location(self) -> str:
        """Path or URL."""
        return self.place.location

    @property
    def root(self) -> Path:
        """The folder of a local store.

        Raises:
            StoreError: the store is in object storage.
        """
        if not isinstance(self.place, LocalPlace):
            raise StoreError(f"'{self.location}' is not a local folder")
        return self.place.root

    def folder(self, kind: str, key: str) -> Path:
        """The folder of an artifact of a local store."""
        return self.root / kind / key

    def data_url(self, ref: Ref) -> str:
        """Path or URL of the artifact's data file."""
        return self.place.url(f"{ref.kind}/{ref.key}/{self.manifest(ref.kind, ref.key).data}")

    def manifest(self, kind: str, key: str) -> Manifest:
        """The manifest, verified against its own digest.

        Raises:
            MissingArtifact: there is none.
            CorruptArtifact: it is torn or altered.
            StoreError: it cannot be read, now at least.
        """
        try:
            raw = self.place.read(f"{kind}/{key}/{MANIFEST}")
        except (FileNotFoundError, NotADirectoryError) as error:
            raise MissingArtifact(f"no artifact '{kind}/{key}' in '{self.location}'") from error
        except IsADirectoryError as error:
            raise CorruptArtifact(f"'{kind}/{key}' has a folder for a manifest") from error
        except OSError as error:
            raise self._unreadable(error) from error
        return _parse_manifest(raw, kind, key)

    def check(self, kind: str, key: str) -> Manifest:
        """The manifest of an artifact whose data was read and agrees with it.

        Raises:
            MissingArtifact: there is no such artifact.
            CorruptArtifact: data or manifest are not what was written.
            StoreError: it cannot be read, now at least.
        """
        manifest = self.manifest(kind, key)
        self._content(manifest)
        return manifest

    def _content(self, manifest: Manifest) -> bytes:
        named = f"'{manifest.kind}/{manifest.key}'"
        try:
            content = self.place.read(f"{manifest.kind}/{manifest.key}/{manifest.data}")
        except (FileNotFoundError, IsADirectoryError) as error:
            raise CorruptArtifact(f"{named} has lost its {manifest.data}") from error
        except OSError as error:
            raise self._unreadable(error) from error
        if hashlib.sha256(content).hexdigest() != manifest.sha256:
            raise CorruptArtifact(f"{named}: {manifest.data} is not what was written")
        return content

    def find(self, kind: str, key: str, report: Callable[[str], None] | None = None) -> Ref | None:
        """The artifact if it is there and whole; a corrupt one is reported and is not there.

        Raises:
            StoreError: that cannot be told, because the place cannot be read, now at least.
        """
        try:
            return self.check(kind, key).ref
        except (MissingArtifact, CorruptArtifact) as error:
            if report and self._is_there(kind, key):
                report(f"{error}; it will be rebuilt")
            return None

    def _is_there(self, kind: str, key: str) -> bool:
        try:
            return self.place.exists(f"{kind}/{key}")
        except OSError as error:
            raise self._unreadable(error) from error

    def read(self, ref: Ref, columns: list[str] | None = None) -> pl.DataFrame:
        """The artifact's table, verified.

        Raises:
            CorruptArtifact: the bytes changed since the reference was taken.
        """
        import polars as pl

        return pl.read_parquet(io.BytesIO(self.read_bytes(ref)), columns=columns)

    def read_bytes(self, ref: Ref) -> bytes:
        """The artifact's data, verified.

        Raises:
            CorruptArtifact: the bytes changed since the reference was taken.
        """
        manifest = self.manifest(ref.kind, ref.key)
        content = self._content(manifest)
        if manifest.sha256 != ref.digest:
            raise CorruptArtifact(f"'{ref.kind}/{ref.key}' was replaced by other content")
        return content

    def put(self, draft: Manifest, content: bytes) -> Ref:
        """Complete the manifest of `draft` and publish it with its data.

        A whole artifact that is already in its place stays, and is the answer; anything else there
        is set aside first.

        Raises:
            StoreError: the store is full or cannot be written.
        """
        sha256 = hashlib.sha256(content).hexdigest()
        name = self.place.data_name(draft.data, sha256)
        manifest = replace(draft, data=name, sha256=sha256, bytes=len(content))
        files = {name: content, MANIFEST: _render_manifest(manifest)}
        with self._writing():
            for _ in range(ATTEMPTS):
                path = f"{draft.kind}/{draft.key}"
                try:
                    return self.check(draft.kind, draft.key).ref
                except CorruptArtifact:
                    self.set_aside(draft.kind, draft.key)
                except MissingArtifact:
                    if self._is_half(path):
                        self.set_aside(draft.kind, draft.key)
                self._make_sure_of_room(len(content))
                if self.place.publish(path, files):
                    self._count(len(content))
                    return manifest.ref
        raise StoreError(f"'{draft.kind}/{draft.key}' in '{self.location}' keeps changing")

    def _is_half(self, path: str) -> bool:
        """Whether a folder has no manifest, which in a bucket it may be about to get.

        The folder is looked for first: one that others publish meanwhile has its manifest then.
        """
        there = not self.place.remote and self.place.exists(path)
        return there and not self.place.exists(f"{path}/{MANIFEST}")

    def set_aside(self, kind: str, key: str) -> None:
        """Move an artifact that does not verify into quarantine, for a person to look at.

        Raises:
            StoreError: the store cannot be written.
        """
        with self._writing(), suppress(FileNotFoundError):  # somebody else has done it
            self.place.retire(f"{kind}/{key}", f"{QUARANTINE}/{kind}-{key}-{time.time_ns()}")

    def delete(self, path: str) -> None:
        """Remove the folder of an artifact or of a leftover.

        Raises:
            StoreError: the store cannot be written.
        """
        with self._writing():
            self.place.delete(path)

    @contextmanager
    def lock(
        self, kind: str, key: str, waiting: Callable[[], None] | None = None
    ) -> Iterator[None]:
        """Hold the right to make one key. It is free again when the holder dies.

        Raises:
            StoreError: the store cannot be written.
        """
        with ExitStack() as held:
            with self._writing():
                held.enter_context(self.place.lock(f"{kind}-{key}", waiting))
            yield

    def entries(self) -> Iterator[tuple[str, str]]:
        """Every (kind, key) that has a folder, in a stable order."""
        try:
            for kind in self.place.folders(""):
                for key in self.place.folders(kind):
                    yield kind, key
        except OSError as error:
            raise self._unreadable(error) from error

    def manifests(self, kind: str | None = None) -> Iterator[Manifest]:
        """Every readable manifest, of a kind if one is given; `verify` names the others."""
        wanted = [entry for entry in self.entries() if kind in (None, entry[0])]
        paths = [f"{found}/{key}/{MANIFEST}" for found, key in wanted]
        try:
            raws = list(self.place.read_many(paths))
        except OSError as error:
            raise self._unreadable(error) from error
        for (found, key), raw in zip(wanted, raws, strict=True):
            if raw is not None:
                with suppress(CorruptArtifact):
                    yield _parse_manifest(raw, found, key)

    def whole_data(self, manifests: Iterable[Manifest]) -> list[tuple[Manifest, str]]:
        """Manifests with the path of their data; data of another size than written is left out."""
        sizes = self.place.sizes("")
        named = ((m, f"{m.kind}/{m.key}/{m.data}") for m in manifests)
        return [(m, path) for m, path in named if sizes.get(path) == m.bytes]

    def lineage(self, kind: str, key: str) -> list[Manifest]:
        """The artifact and everything it was made from, nearest first, each once."""
        found: dict[str, Manifest] = {}
        todo = [(kind, key)]
        while todo:
            step = todo.pop(0)
            if step[1] not in found:
                manifest = self.manifest(*step)
                found[step[1]] = manifest
                todo += [(entry["kind"], entry["key"]) for entry in manifest.inputs.values()]
        return list(found.values())

    @contextmanager
    def building(self) -> Iterator[Find]:
        """Be a running build: nothing that it looks for is collected while it runs.

        Yields `find`, to be used instead of the store's own.
        """
        with ExitStack() as held:
            try:
                tell = held.enter_context(self.place.register())
            except OSError:  # nothing can be removed either from what cannot be written
                tell = None

            def find(
                kind: str, key: str, report: Callable[[str], None] | None = None
            ) -> Ref | None:
                if tell is None:
                    return self.find(kind, key, report)
                with self._writing(), self.place.settled(changing=False):
                    tell(f"{kind}/{key}")
                    return self.find(kind, key, report)

            yield find

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Keep builds from beginning to use anything, as far as the place can.

        Raises:
            StoreError: the store cannot be written.
        """
        with self._writing(), self.place.settled(changing=True):
            yield

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise self._unwritable(error) from error

    def _make_sure_of_room(self, wanted: int) -> None:
        """Refuse what would fill the quota or the disk, while there is still room to say so."""
        room = self.place.room()
        if room and room[0] - min(RESERVE, room[1] // 100) < wanted:
            raise OSError(errno.ENOSPC, f"{size_text(room[0])} free, {size_text(wanted)} needed")
        if self.quota is None:
            return
        now = time.monotonic()
        if self._held is None or now - self._held[0] > RECOUNT:
            self._held = now, sum(manifest.bytes for manifest in self.manifests())
        held = self._held[1] + wanted
        if held > self.quota:
            raise StoreError(
                f"the quota of the store '{self.location}' is {size_text(self.quota)}, and "
                f"{size_text(held)} would be held; free some (tribunal store gc) or raise "
                "TRIBUNAL_QUOTA"
            )

    def _count(self, written: int) -> None:
        """What was written since the store was last counted counts too."""
        if self._held is not None:
            self._held = self._held[0], self._held[1] + written

    def _unreadable(self, error: OSError) -> StoreError:
        return StoreError(f"cannot read '{self.location}' ({_reason(error)})")

    def _unwritable(self, error: OSError) -> StoreError:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return StoreError(
                f"no space left for the store '{self.location}' ({_reason(error)}); free some "
                "(tribunal store gc) or set TRIBUNAL_STORE to another disk"
            )
        return StoreError(
            f"cannot write to the store '{self.location}' ({_reason(error)}); "
            "set TRIBUNAL_STORE to a place that can be written"
        )


def _place(location: str) -> Place:
    """The place of a path or URL.

    Raises:
        StoreError: there can be no store.
    """
    if "://" in location and not location.startswith("file://"):
        from artifacts.object_place import ObjectPlace

        return ObjectPlace(location)
    root = Path(os.path.expanduser(location.removeprefix("file://"))).absolute()
    if exists(root) and not root.is_dir():
        raise StoreError(f"the store '{root}' is not a folder; set TRIBUNAL_STORE to one")
    return LocalPlace(root)


def _reason(error: OSError) -> str:
    return error.strerror.lower() if error.strerror else str(error)


def parquet(frame: pl.DataFrame) -> bytes:
    """A table as the bytes of a Parquet file; equal tables give equal bytes."""
    buffer = io.BytesIO()
    frame.write_parquet(buffer, compression="zstd")
    return buffer.getvalue()


def _render_manifest(manifest: Manifest) -> bytes:
    body = {"schema": SCHEMA_VERSION, **manifest.__dict__}
    sealed = {**body, "seal": _seal(body)}
    return json.dumps(sealed, indent=1, ensure_ascii=False).encode()


def _parse_manifest(raw: bytes, kind: str, key: str) -> Manifest:
    try:
        body = json.loads(raw)
        seal, schema = body.pop("seal"), body.get("schema")
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise CorruptArtifact(f"'{kind}/{key}' has a torn {MANIFEST}") from error
    if (
        seal != _seal(body)
        or schema != SCHEMA_VERSION
        or (body["kind"], body["key"]) != (kind, key)
    ):
        raise CorruptArtifact(f"'{kind}/{key}' has an altered {MANIFEST}")
    body.pop("schema")
    manifest = Manifest(**body)
    if _render_manifest(manifest) != raw:
        raise CorruptArtifact(f"'{kind}/{key}' has an altered {MANIFEST}")
    return manifest


def _seal(body: Mapping[str, Any]) -> str:
    """A manifest's digest of itself, so that a flipped byte in it is noticed too."""
    text = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
