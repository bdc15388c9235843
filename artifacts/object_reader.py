"""What DuckDB reads of object storage: files that never change.

DuckDB asks for the size of a file and for its last bytes many times over; answered one by one,
each would be a request. Sizes are known beforehand here, small files are fetched together and once,
of large ones only what is asked for and their ends are. No other file can be opened, nor any
be written.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

from fsspec import AbstractFileSystem

SMALL = 4 * 2**20  # bytes of a file that is fetched with the others
TOGETHER = 256 * 2**20  # bytes of all that is fetched beforehand
END = 256 * 2**10  # bytes at the end of a larger one, where Parquet keeps its index
EPOCH = datetime.fromtimestamp(0, UTC)  # a content-addressed file has no other time


class ObjectReader(AbstractFileSystem):  # type: ignore[misc]
    """Some files of another file system, read-only."""

    cachable = False

    def __init__(self, fs: Any, sizes: Mapping[str, int]) -> None:
        super().__init__()
        self.protocol = fs.protocol
        self._fs, self._sizes = fs, dict(sizes)
        self._content: dict[str, bytes] = {}  # whole files, and the ends of large ones
        self._fetched = False  # whether the small ones are

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

    def open(self, path: str, mode: str = "rb", **_: Any) -> io.BufferedIOBase:
        if mode != "rb":
            raise PermissionError(f"'{path}' is only read here")
        name = self.info(path)["name"]
        if self._sizes[name] > SMALL:
            return io.BufferedReader(_LargeFile(self._read, name, self._sizes[name]), END)
        if name not in self._content:
            self._fetch(name)
        return io.BytesIO(self._content[name])

    def _read(self, name: str, start: int, end: int) -> bytes:
        """Bytes of a large file; its last ones are kept."""
        size = self._sizes[name]
        if end < size or start < size - END:
            found: bytes = self._fs.cat_file(name, start=start, end=end)
            return found
        if name not in self._content:
            self._content[name] = self._fs.cat_file(name, start=size - END, end=size)
        return self._content[name][start - size :]

    def _fetch(self, name: str) -> None:
        """The file, and with the first one all that are small."""
        wanted = [name]
        if not self._fetched:
            self._fetched = True
            room = TOGETHER
            for other, size in self._sizes.items():
                room -= size if size <= SMALL else 0
                if size <= SMALL and room >= 0 and other != name:
                    wanted.append(other)
        self._content |= self._fs.cat(wanted)


class _LargeFile(io.RawIOBase):
    """A file that is read in ranges."""

    def __init__(self, read: Callable[[str, int, int], bytes], name: str, size: int) -> None:
        self._read, self._name, self._size, self._position = read, name, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = max(0, start + offset)
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        end = min(self._position + len(buffer), self._size)
        if self._position >= end:
            return 0
        content = self._read(self._name, self._position, end)
        buffer[: len(content)] = content
        self._position += len(content)
        return len(content)
