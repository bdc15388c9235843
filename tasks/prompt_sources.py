"""Prompt sets out of whatever holds them: hub data sets, folders, and plain files.

A prompt set decides every number after it, so nothing here is lenient: a slice that runs past the
end, a blank cell or a byte that is no text is an error that says where, never a shorter set. What
identifies a source is its content (or hub revision), never where it lies, and is known without
loading it. `datasets` is imported only by sources that need it.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import logging
import os
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from artifacts.errors import PromptError, did_you_mean
from artifacts.keys import Json
from artifacts.paths import exists
from artifacts.specs import PromptSource
from tasks.organism import PROMPTS_FOLDER

if TYPE_CHECKING:
    from datasets import Dataset

_SPLIT = re.compile(r"(\w[\w.-]*)(?:\[(-?\d{1,18}%?)?:(-?\d{1,18}%?)?(?::(\d{1,18}))?\])?")
_HUB_ID = re.compile(r"\w[\w.-]{0,95}(/\w[\w.-]{0,95})?")  # the hub's own limit
_ORGANISM = re.compile(r"organism/([\w.-]+\.jsonl)")
_COMMIT = re.compile(r"[0-9a-f]{40}")
LONGEST_PROMPT = 1_000_000  # characters
LARGEST_FILE = 4 * 2**30  # bytes


@dataclass(frozen=True)
class Prompt:
    """One prompt: the user's turn, with prefix and suffix, and where it came from.

    `row` counts from 0 in the whole source (for .txt, among lines that are not blank), so a slice
    does not renumber. `system_prompt` is None where the model's own is to be used.
    """

    prompt_id: str
    row: int
    text: str
    system_prompt: str | None


@dataclass(frozen=True)
class PromptSet:
    """The distinct prompts of one source in its order, and how many copies were dropped."""

    prompts: list[Prompt]
    duplicates: int
    resolved: str


@dataclass(frozen=True)
class _Table:
    """A source before slicing. `cells` gives one column's cells of some rows."""

    name: str
    resolved: str
    columns: Sequence[str]
    height: int
    cells: Callable[[str, range], list[Any]]


def read_prompts(source: PromptSource, base: Path | None = None) -> PromptSet:
    """The prompts of a source, normalised (Unicode NFC, stripped), exact duplicates dropped.

    The split is `NAME`, `NAME[FROM:TO]` or `NAME[FROM:TO:STEP]`; bounds may be negative (from the
    end) or percentages. A step takes every nth row, which stratifies a source that is sorted by
    category. Plain files hold one split, so their NAME is free.

    Args:
        source: what to read.
        base: folder that relative paths start from; default: the working directory.

    Raises:
        PromptError: no such source, split or column; a slice past the end; no prompts; a cell
            that is blank or no text; bytes that are not UTF-8; a hub out of reach.
    """
    name, *bounds = _parse_split(source.split)
    table = _open(source, str(name), base)
    rows = _rows(source.split, bounds, table)
    column = _column(source.column, table)
    cells = _texts(table, column, rows)
    found: dict[str, Prompt] = {}
    for row, cell in zip(rows, cells, strict=True):
        prompt = _prompt(source, row, cell)
        found.setdefault(prompt.prompt_id, prompt)
    return PromptSet(list(found.values()), len(cells) - len(found), table.resolved)


def read_cells(
    source: PromptSource, columns: Sequence[str], base: Path | None = None
) -> list[tuple[str, ...]]:
    """Some text columns of the rows that a source's split asks for; nothing is dropped.

    Raises:
        PromptError: as `read_prompts`, for every one of these columns.
    """
    name, *bounds = _parse_split(source.split)
    table = _open(source, str(name), base)
    rows = _rows(source.split, bounds, table)
    found = [_texts(table, _column(column, table), rows) for column in columns]
    return list(zip(*found, strict=True))


def read_values(
    source: PromptSource,
    columns: Sequence[str],
    optional: Sequence[str] = (),
    base: Path | None = None,
) -> list[tuple[int, dict[str, Any]]]:
    """Number and cells, as they are, of the rows that a source's split asks for.

    Columns of `optional` that the source lacks are in no row.

    Raises:
        PromptError: no such source, split or column; a slice past the end.
    """
    name, *bounds = _parse_split(source.split)
    table = _open(source, str(name), base)
    rows = _rows(source.split, bounds, table)
    wanted = [_column(column, table) for column in columns]
    wanted += [column for column in optional if column in table.columns]
    cells = zip(*(table.cells(column, rows) for column in wanted), strict=True)
    return [
        (row, dict(zip(wanted, each, strict=True))) for row, each in zip(rows, cells, strict=True)
    ]


def columns_of(source: PromptSource, base: Path | None = None) -> list[str]:
    """The columns that a source has.

    Raises:
        PromptError: no such source or split.
    """
    name, *_ = _parse_split(source.split)
    return list(_open(source, str(name), base).columns)


def source_identity(source: PromptSource, base: Path | None = None) -> dict[str, Json]:
    """What of a source counts in an artifact's key: every field, with content in place of a path.

    A hub id stands for itself with its revision, so only a pinned commit identifies its content.

    Raises:
        PromptError: no such file or folder, or it cannot be read.
    """
    identity: dict[str, Json] = source.model_dump(mode="json")
    path = _local_path(source.source, base)
    if path is not None:
        identity["source"] = {"sha256": content_digest(path)}
    return identity


def prompt_id(text: str, system_prompt: str | None) -> str:
    """16 hexadecimal digits that identify a prompt by its NFC text and system prompt."""
    parts = [_nfc(text), None if system_prompt is None else _nfc(system_prompt)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _prompt(source: PromptSource, row: int, cell: str) -> Prompt:
    text = _nfc(source.prefix + cell + source.suffix)
    return Prompt(prompt_id(text, source.system_prompt), row, text, source.system_prompt)


def _nfc(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def _parse_split(split: str) -> tuple[str | None, ...]:
    match = _SPLIT.fullmatch(split)
    if match is None or int(match[4] or 1) == 0:
        raise PromptError(
            f"split '{split}' is not understood; write train, train[:400], train[80:100], "
            "train[-50:], train[:10%] or train[::5]"
        )
    return match.groups()


def _rows(split: str, bounds: Sequence[str | None], table: _Table) -> range:
    """The rows a split asks for, as numbers from 0."""
    start, stop, step = bounds
    first = 0 if start is None else _bound(start, table.height)
    end = table.height if stop is None else _bound(stop, table.height)
    if first is None or end is None:
        raise PromptError(
            f"split '{split}' goes beyond the rows of {table.name}, which has {table.height}"
        )
    rows = range(first, end, int(step or 1))
    if not rows:
        raise PromptError(
            f"split '{split}' of {table.name}, which has {table.height} rows, is empty"
        )
    return rows


def _bound(text: str, height: int) -> int | None:
    """One bound of a slice, None beyond the rows; percentages round as `datasets` does."""
    number, whole = (int(text[:-1]), 100) if text.endswith("%") else (int(text), height)
    if abs(number) > whole:
        return None
    value = round(height * number / (whole or 1))
    return value + height if text.startswith("-") else value


def _column(asked: str | None, table: _Table) -> str:
    if asked is None:
        if len(table.columns) == 1:
            return table.columns[0]
        if "text" not in table.columns:
            names = ", ".join(table.columns)
            raise PromptError(f"{table.name} has several columns, so give `column`: {names}")
        return "text"
    if asked not in table.columns:
        hint = did_you_mean(asked, table.columns)
        raise PromptError(f"{table.name} has no column '{asked}'{hint}")
    return asked


def _texts(table: _Table, column: str, rows: range) -> list[str]:
    """The stripped cells of a column, all of which must hold text."""
    cells = table.cells(column, rows)
    faults = {row: fault for row, cell in zip(rows, cells, strict=True) if (fault := _fault(cell))}
    if faults:
        row, fault = next(iter(faults.items()))
        raise PromptError(
            f"{len(faults)} of {len(cells)} cells of column '{column}' of {table.name} "
            f"are no prompts; the first is row {row}: {fault}"
        )
    return [_nfc(cell).strip() for cell in cells]


def _fault(cell: object) -> str | None:
    if cell is None:
        return "missing"
    if not isinstance(cell, str):
        return f"a {type(cell).__name__}, not text"
    if not cell.strip():
        return "blank"
    if len(cell) > LONGEST_PROMPT:
        return f"{len(cell):,} characters, more than {LONGEST_PROMPT:,}"
    if "\0" in cell:
        return "a NUL character, as UTF-16 has"
    # A JSON escape can name half of a surrogate pair, which no tokenizer can encode.
    return "half a surrogate pair" if any("\ud800" <= char <= "\udfff" for char in cell) else None


def _open(source: PromptSource, split: str, base: Path | None) -> _Table:
    path = _local_path(source.source, base)
    if path is None:
        return _from_hub(source, split)
    if path.is_dir():
        return _from_folder(path, source, split)
    return _from_file(path)


def _local_path(text: str, base: Path | None) -> Path | None:
    """The file or folder a source names; None for a hub id. What exists locally wins."""
    if match := _ORGANISM.fullmatch(text):
        return _shipped(match[1])
    path = (base or Path()) / os.path.expanduser(text)
    if text and exists(path):
        if not path.is_file() and not path.is_dir():
            raise PromptError(f"'{text}' is neither a file nor a folder; give one of them")
        return path
    if path.suffix in _FILES or not _HUB_ID.fullmatch(text):
        raise PromptError(f"no file or folder '{text}'")
    return None


def _shipped(name: str) -> Path:
    path = PROMPTS_FOLDER / name
    if not path.is_file():
        known = [file.name for file in PROMPTS_FOLDER.glob("*.jsonl")]
        raise PromptError(f"no shipped prompt set 'organism/{name}'{did_you_mean(name, known)}")
    return path


def content_digest(path: Path) -> str:
    """SHA-256 of a file, or of the names and contents of a folder's files (hidden ones aside)."""
    try:
        if path.is_file():
            return _file_digest(path)
        found = [file for file in path.rglob("*") if not file.is_dir()]
        files = {file.relative_to(path): file for file in found}
        lines = [
            f"{name.as_posix()}\0{_file_digest(file)}\n"
            for name, file in sorted(files.items())
            if not any(part.startswith(".") for part in name.parts)
        ]
    except OSError as error:
        raise PromptError(f"cannot read '{path}': {error.strerror}") from error
    return hashlib.sha256("".join(lines).encode("utf-8", "surrogateescape")).hexdigest()


def _file_digest(file: Path) -> str:
    if not file.is_file():  # a pipe or a device may never end; a link may lead nowhere
        raise PromptError(f"'{file}' is no regular file; take it out of the folder")
    if file.stat().st_size > LARGEST_FILE:
        raise PromptError(f"'{file}' is larger than {LARGEST_FILE >> 30} GiB; split it")
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _from_file(path: Path) -> _Table:
    name = f"'{path.name}'"
    if path.suffix not in _FILES:
        raise PromptError(f"{name} is of no known type; known: {', '.join(_FILES)}")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise PromptError(f"cannot read '{path}': {error.strerror}") from error
    resolved = f"{path.name} sha256:{hashlib.sha256(data).hexdigest()}"
    if path.suffix == ".parquet":
        return _from_parquet(data, name, resolved)
    rows = [_as_row(row, number, name) for number, row in enumerate(_parse(path, data))]
    columns = list(dict.fromkeys(column for row in rows for column in row))
    return _Table(name, resolved, columns, len(rows), lambda c, n: [rows[i].get(c) for i in n])


def _from_parquet(data: bytes, name: str, resolved: str) -> _Table:
    import polars as pl

    try:
        frame = pl.read_parquet(io.BytesIO(data))
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
        raise PromptError(f"{name} is no Parquet file: {_one_line(error)}") from error
    return _Table(
        name, resolved, frame.columns, frame.height, lambda c, n: frame[c].gather(list(n)).to_list()
    )


def _parse(path: Path, data: bytes) -> Sequence[object]:
    """The rows of a text file."""
    try:
        return _TEXT_FILES[path.suffix](data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise PromptError(
            f"'{path.name}' is not UTF-8: byte 0x{data[error.start]:02x} in line {line}"
        ) from error
    except (ValueError, csv.Error, RecursionError) as error:
        raise PromptError(f"'{path.name}' is no {path.suffix} file: {_one_line(error)}") from error


def _as_row(row: object, number: int, name: str) -> Mapping[str, object]:
    """A row as cells by column; a bare string is a row of one column, text."""
    if isinstance(row, str):
        return {"text": row}
    if not isinstance(row, dict):
        raise PromptError(
            f"row {number} of {name} is a {type(row).__name__}, not an object or text"
        )
    return row


def _txt_rows(text: str) -> Sequence[object]:
    # Not splitlines(): a prompt may hold U+2028 or a form feed.
    return [line for line in text.split("\n") if line.strip()]


def _csv_rows(text: str) -> Sequence[object]:
    lines = csv.reader(io.StringIO(text, newline=""), strict=True)
    header = next(lines, [])
    twice = [name for name in header if header.count(name) > 1]
    if twice:
        raise csv.Error(f"it has the column '{twice[0]}' twice")
    rows = []
    for cells in lines:
        if len(cells) > len(header):  # an unquoted comma would cut a prompt short
            raise csv.Error(f"line {lines.line_num} has more cells than the header")
        if cells:
            rows.append(dict(zip_longest(header, cells)))  # a short row lacks cells, not columns
    return rows


def _jsonl_rows(text: str) -> Sequence[object]:
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                rows.append(json.loads(line, object_pairs_hook=_object))
            except (ValueError, RecursionError) as error:
                said = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
                raise ValueError(f"{said} (line {number} of the file)") from error
    return rows


def _json_rows(text: str) -> Sequence[object]:
    rows = json.loads(text, object_pairs_hook=_object)
    if not isinstance(rows, list):
        raise ValueError("it holds no list")
    return rows


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """A JSON object, of which no key may be given twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"an object has the key '{twice}' twice")
    return found


_TEXT_FILES: Mapping[str, Callable[[str], Sequence[object]]] = {
    ".csv": _csv_rows,
    ".jsonl": _jsonl_rows,
    ".json": _json_rows,
    ".txt": _txt_rows,
}
_FILES = (".parquet", *_TEXT_FILES)


def _from_folder(path: Path, source: PromptSource, split: str) -> _Table:
    """A folder written by `save_to_disk`, or a downloaded hub repository."""
    name, resolved = f"'{path.name}'", f"{path.name} sha256:{content_digest(path)}"
    own, splits = path / split, path / "dataset_dict.json"
    if (own / "state.json").is_file():
        return _table(_load_from_disk(own), name, resolved)
    if splits.is_file():
        known = [folder.parent.name for folder in path.glob("*/state.json")]
        raise PromptError(f"{name} has no split '{split}'{did_you_mean(split, known)}")
    if not (path / "state.json").is_file():
        return _table(_load_dataset(str(path.absolute()), source, split), name, resolved)
    data = _load_from_disk(path)
    if data.split is not None and split not in ("all", str(data.split)):
        raise PromptError(f"{name} holds the split '{data.split}', not '{split}'")
    return _table(data, name, resolved)


def _from_hub(source: PromptSource, split: str) -> _Table:
    data = _load_dataset(source.source, source, split)
    commit = _loaded_commit(data)
    asked = source.revision or ""
    # Where the hub cannot serve a revision, `datasets` answers with whichever one it has cached.
    if _COMMIT.fullmatch(asked) and commit not in (asked, None):
        raise PromptError(
            f"revision '{asked}' of data set '{source.source}' cannot be had from the hub, and "
            f"the copy in the cache is of revision '{commit}'"
        )
    return _table(data, f"'{source.source}'", f"{source.source}@{commit or asked or 'main'}")


def _loaded_commit(data: Dataset) -> str | None:
    """The commit a data set was made from, which `datasets` names its cache folder after."""
    folders = [Path(file["filename"]).parent.name for file in data.cache_files]
    return next((name for name in folders if _COMMIT.fullmatch(name)), None)


def _table(data: Dataset, name: str, resolved: str) -> _Table:
    def cells(column: str, rows: range) -> list[Any]:
        picked: dict[str, list[Any]] = data.select_columns([column]).select(rows).to_dict()
        return picked[column]

    return _Table(name, resolved, data.column_names, len(data), cells)


def _load_from_disk(folder: Path) -> Dataset:
    import datasets

    try:
        return datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PromptError(f"cannot read data set '{folder.name}': {_one_line(error)}") from error


def _load_dataset(path: str, source: PromptSource, split: str) -> Dataset:
    import datasets
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # its HTTP client's

    try:
        with _quiet():
            return datasets.load_dataset(
                path, name=source.config, split=split, revision=source.revision
            )
    except (
        OSError,
        ValueError,
        RuntimeError,
        HTTPError,
        datasets.exceptions.DatasetsError,
    ) as error:
        raise _not_loaded(source, split, error) from error


def _not_loaded(source: PromptSource, split: str, error: Exception) -> PromptError:
    """Why a data set could not be loaded, and the way out, in one line and without a token."""
    asked = {"config": source.config, "revision": source.revision, "split": split}
    details = ", ".join(f"{key} '{value}'" for key, value in asked.items() if value)
    line = f"cannot load data set '{source.source}' ({details}): {_one_line(error)}"
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    if not offline and not isinstance(error, ConnectionError):
        return PromptError(f"{line}; if it is gated or private, set HF_TOKEN")
    remedy = "unset HF_HUB_OFFLINE" if offline else "connect"
    return PromptError(
        f"{line}; it comes from the Hugging Face hub, so {remedy}, or give a local copy as its "
        f"source: a folder that `hf download` or `save_to_disk` wrote, or a {', '.join(_FILES)} "
        "file"
    )


def _one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(".")


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the libraries' bars and retry lines off a terminal that shows ours; then as before."""
    import datasets.utils as of_datasets
    import huggingface_hub.utils as of_hub

    shown = [it for it in (of_datasets, of_hub) if not it.are_progress_bars_disabled()]
    verbosity = of_hub.logging.get_verbosity()
    of_hub.logging.set_verbosity(logging.ERROR)
    for library in shown:
        library.disable_progress_bars()
    try:
        yield
    finally:
        of_hub.logging.set_verbosity(verbosity)
        for library in shown:
            library.enable_progress_bars()
