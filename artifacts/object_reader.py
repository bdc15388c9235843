"""What DuckDB reads of object storage: files that never change, each fetched whole and once.

DuckDB asks for the size of a file and for its last bytes many times over; answered one by one,
each would be a request. Sizes are known beforehand here, small files are fetched together, and no
other file can be opened, nor any be written.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from fsspec import AbstractFileSystem

SMALL = 4 * 2**20  # bytes of a file that is fetched with the others
TOGETHER = 256 * 2**20  # bytes of all that is fetched beforehand
EPOCH = datetime.fromtimestamp(0, UTC)  # a content-addressed file has no other time


class ObjectReader(AbstractFileSystem):  # type: ignore[misc]
    """Some files of another file system, read-only."""

    cachable = False

    def __init__(self, fs: Any, sizes: Mapping[str, int]) -> None:
        super().__init__()
        self.protocol = fs.protocol
        self._fs, self._sizes = fs, dict(sizes)
        self._content: dict[str, bytes] = {}

    def _strip_protocol(self, path: str) -> str:
        stripped: str = self._fs._strip_protocol(path)
        return stripped

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        name = self._strip_protocol(path)
        if name not in self._sizes:
            raise FileNotFoundError(path)
        return {"name": name, "size": self._sizes[name], "type": "file"}

    def modified(self, path: str) -> datetime:
        return EPOCH

    def glob(self, path: str, **_: Any) -> list[str]:
        name = self._strip_protocol(path)
        return [name] if name in self._sizes else []

    def open(self, path: str, mode: str = "rb", **_: Any) -> io.BytesIO:
        if mode != "rb":
            raise PermissionError(f"'{path}' is only read here")
        name = self.info(path)["name"]
        if name not in self._content:
            self._fetch(name)
        return io.BytesIO(self._content[name])

    def _fetch(self, name: str) -> None:
        """The file, and with the first one all that are small."""
        wanted = [name]
        if not self._content:
            room = TOGETHER
            for other, size in self._sizes.items():
                room -= size if size <= SMALL else 0
                if size <= SMALL and room >= 0 and other != name:
                    wanted.append(other)
        self._content |= self._fs.cat(wanted)
