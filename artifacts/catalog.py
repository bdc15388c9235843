"""DuckDB over the store: documented views, the rankings of artifacts/sql, and users' own SQL.

Views are laid over the Parquet files in memory at every start (milliseconds), so they always show
what the store holds and no database file can be locked or go stale. `write_database` leaves the
same views in a file for any DuckDB client.
"""

from __future__ import annotations

import errno
import json
import re
import shutil
import uuid
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import duckdb

from artifacts.errors import DamageWarning, QueryError, StoreError
from artifacts.figure_schemas import FIGURES
from artifacts.peer_schemas import published_view
from artifacts.places import WORKSHOPS
from artifacts.questions import FOLDER, questions
from artifacts.sandbox import run_apart
from artifacts.schemas import NESTED, RESPONSE, TABLES, TRIALS, Column, polars_schema
from artifacts.sql_guard import refuse_all_but_select
from artifacts.store import MANIFEST, Store

if TYPE_CHECKING:
    import polars as pl

MEMORY_LIMIT = "2GB"
TIME_LIMIT = 60.0  # seconds a user's query may run


@dataclass(frozen=True)
class Table:
    """A query's answer."""

    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]

    def records(self) -> list[dict[str, Any]]:
        return [dict(zip(self.columns, row, strict=True)) for row in self.rows]


@contextmanager
def catalog(store: Store, *queries: str) -> Iterator[duckdb.DuckDBPyConnection]:
    """A connection, trusted: for our own queries.

    Args:
        queries: those that will be asked: only the views they name are made; every view if none is
            given. DuckDB opens the files below a view when it is made, so all take four times as
            long as a few.
    """
    connection = duckdb.connect(":memory:")
    try:
        _create_views(connection, store, glob=False, queries=queries)
        yield connection
    finally:
        connection.close()


def ask(store: Store, sql: str, values: Sequence[Any] = ()) -> Table:
    """The answer to one of our own queries.

    Raises:
        QueryError: a file of the store cannot be read.
    """
    with catalog(store, sql) as connection:
        return fetch(connection, sql, values)


def query_text(name: str) -> str:
    """The text of artifacts/sql/`name`.sql."""
    return resources.files("artifacts").joinpath("sql", f"{name}.sql").read_text()


def fetch(connection: duckdb.DuckDBPyConnection, sql: str, values: Sequence[Any] = ()) -> Table:
    """Run one of our own statements and return all its rows.

    Raises:
        QueryError: a file of the store cannot be read.
    """
    try:
        return _fetch(connection, sql, values)
    except duckdb.Error as error:
        raise QueryError(f"{first_line(error)}; see: tribunal store verify") from error


def _fetch(connection: duckdb.DuckDBPyConnection, sql: str, values: Sequence[Any] = ()) -> Table:
    cursor = connection.execute(sql, list(values))
    names = tuple(str(item[0]) for item in cursor.description or ())
    return Table(names, tuple(cursor.fetchall()))


def user_query(store: Store, sql: str, time_limit: float = TIME_LIMIT) -> Table:
    """A user's SELECT: read-only, no file beyond the store, no settings, bounded memory and time.

    Raises:
        QueryError: anything but one SELECT, a refused access, an error, or a limit reached.
    """
    refuse_all_but_select(sql)
    return Table(*run_apart(store.location, sql, time_limit))


def write_database(store: Store, file: Path | None = None) -> Path | None:
    """Write a file of views, which read the store by absolute paths, for any DuckDB client.

    By default `<store>/tribunal.duckdb`, which every run writes anew. Another `file` replaces none
    but one of ours, and has the worked questions in its schema `questions`; to bind those views
    takes about a second, too long for every run.

    None for a store in object storage, where a client needs its own means to read the files.

    Raises:
        StoreError: it cannot be written, or something else is there.
    """
    if store.place.remote:
        return None
    final = store.root / "tribunal.duckdb" if file is None else file.absolute()
    if file is not None:
        _refuse_to_replace(final)
    workshop = store.root / WORKSHOPS / f"tribunal-duckdb-{uuid.uuid4().hex}"
    with store.lock("tribunal", "duckdb"):  # whose name makes the workshop ours, and a leftover
        try:
            workshop.mkdir(parents=True)
            with closing(duckdb.connect(str(workshop / final.name))) as connection:
                _create_views(connection, store, glob=True)
                if file is not None:
                    _create_question_views(connection)
            _move(workshop / final.name, final)
        except (OSError, duckdb.IOException) as error:
            said = first_line(error)
            raise StoreError(
                f"cannot write '{final}' ({said}); all artifacts are stored"
            ) from error
        finally:
            shutil.rmtree(workshop, ignore_errors=True)
    return final


def _move(made: Path, final: Path) -> None:
    """Rename a file; to another disk by a copy beside the place, so that no half is ever there."""
    try:
        made.replace(final)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        beside = final.with_name(f".{final.name}-{uuid.uuid4().hex}")
        try:
            shutil.copyfile(made, beside)
            beside.replace(final)
        finally:
            beside.unlink(missing_ok=True)


def _refuse_to_replace(file: Path) -> None:
    """Leave alone what is no database of ours, or has no folder to be in.

    Raises:
        StoreError: it is there, or its folder is not.
    """
    if not file.parent.is_dir():
        raise StoreError(f"no folder '{file.parent}' for the database; make it first")
    if file.exists() or file.is_symlink():
        try:
            with closing(duckdb.connect(str(file), read_only=True)) as connection:
                ours = connection.execute(
                    "SELECT count(*) FROM duckdb_views() WHERE view_name = 'stored_generations'"
                ).fetchone() == (1,)
        except duckdb.Error:
            ours = False
        if not ours:
            raise StoreError(f"'{file}' is no database of Tribunal; choose another name")


def _create_question_views(connection: duckdb.DuckDBPyConnection) -> None:
    """The worked questions as views of a schema of their own."""
    connection.execute(f"CREATE SCHEMA {FOLDER}")
    for question in questions():
        connection.execute(f"CREATE VIEW {FOLDER}.{question.view} AS {question.sql}")


def rank_frame(trials: pl.DataFrame) -> pl.DataFrame:
    """The strict ranking (sql/rank.sql) of trials that lie in memory, best first."""
    return _over_trials(
        trials, f"FROM ({query_text('rank')}) ORDER BY study, split, prompts, rank, trial"
    )


def leaderboard_frame(trials: pl.DataFrame) -> pl.DataFrame:
    """The leaderboard (sql/leaderboard.sql) of trials that lie in memory."""
    return _over_trials(
        trials,
        f"WITH ranking AS ({query_text('rank')}), pareto AS ({query_text('pareto')}) "
        + query_text("leaderboard"),
    )


def _over_trials(trials: pl.DataFrame, sql: str) -> pl.DataFrame:
    import polars as pl

    connection = duckdb.connect(":memory:")
    known = polars_schema(TRIALS).items()  # an older table lacks what was added since
    missing = {name: dtype for name, dtype in known if name not in trials.columns}
    trials = trials.with_columns(pl.lit(None, dtype).alias(name) for name, dtype in missing.items())
    try:
        connection.register("rows", trials.to_arrow())
        connection.execute("CREATE VIEW trials AS SELECT protocol AS study, * FROM rows")
        found: pl.DataFrame = connection.sql(sql).pl()
        return found
    finally:
        connection.close()


def _create_views(
    connection: duckdb.DuckDBPyConnection, store: Store, glob: bool, queries: Sequence[str] = ()
) -> None:
    """All views, or those that queries need; with `glob`, such that they also show what is put
    later.

    What is damaged is in none of them, and a warning says so.
    """
    there = 0 if store.place.remote else len(list(store.entries()))  # there, more may be coming
    manifests = list(store.manifests())
    whole = store.whole_data(manifests)
    if store.place.remote:
        sizes = {path: manifest.bytes for manifest, path in whole}
        connection.register_filesystem(store.place.reader(sizes))
    if not (glob and manifests):
        told = [json.dumps(m.__dict__) for m in manifests]
        connection.execute(
            "CREATE TABLE stored_manifests AS SELECT unnest($1::VARCHAR[])::JSON AS m", [told]
        )
    connection.execute(_artifacts_view(store, glob and bool(manifests)))
    torn = max(there, len(manifests)) - len(whole)
    documented = _documented()
    needed = _needed(documented, queries or [*documented, *(f"stored_{kind}" for kind in TABLES)])
    for kind, columns in TABLES.items():
        if f"stored_{kind}" not in needed:
            continue
        own = {m.key: store.place.url(path) for m, path in whole if m.kind == kind}
        files = list(own.values())
        if glob and files:
            files = [str(store.root / kind / "*" / "data.parquet")]
        view = f"CREATE VIEW stored_{kind} AS "
        try:
            connection.execute(view + _stored(kind, columns, files))
        except duckdb.Error:  # one is torn, or was removed
            files = [url for key, url in own.items() if store.find(kind, key)]
            torn += len(own) - len(files)
            connection.execute(view + _stored(kind, columns, files))
    for name, query in documented.items():
        if name in needed:
            connection.execute(f"CREATE VIEW {name} AS {query}")
    if torn > 0:
        said = f"damaged artifacts left out: {torn}; see: tribunal store verify"
        warnings.warn(said, DamageWarning, stacklevel=2)


@cache
def _documented() -> Mapping[str, str]:
    """The query of every documented view; each comes after those it is made of."""
    parts = re.split(r"^CREATE VIEW (\w+) AS\b", query_text("views"), flags=re.MULTILINE)
    views = dict(zip(parts[1::2], (text.partition(";\n")[0] for text in parts[2::2]), strict=True))
    views |= {kind: f"FROM stored_{kind}" for kind in FIGURES}
    views["published"] = published_view()
    return views | {
        "ranking": query_text("rank"),
        "pareto": query_text("pareto"),
        "leaderboard": query_text("leaderboard"),
    }


def _needed(documented: Mapping[str, str], queries: Sequence[str]) -> set[str]:
    """Every view and table that queries name, or that those are made of; other words do no harm."""
    words = {name: _words(query) for name, query in documented.items()}
    needed, fresh = set[str](), _words(" ".join(queries))
    while fresh:
        needed |= fresh
        fresh = {word for name in fresh for word in words.get(name, ())} - needed
    return needed


def _words(query: str) -> set[str]:
    """What may name a view: nothing in a line of comment, and no column as in `t.responses`."""
    told = re.sub("^--.*", "", query, flags=re.MULTILINE)
    return set(re.findall(r"(?<![.\w])\w+|(?<=main\.)\w+", told))


def _stored(kind: str, columns: tuple[Column, ...], files: list[str]) -> str:
    """SELECT over a kind's files; its declared columns exist even when it has none."""
    declared = [f"NULL::{c.type} AS {_quoted(c.name)}" for c in columns]
    if kind in NESTED:
        fields = ", ".join(f"{_quoted(c.name)} {c.type}" for c in RESPONSE)
        declared.append(f"NULL::STRUCT({fields})[] AS responses")
    empty = f"SELECT {', '.join(declared)}, NULL::VARCHAR AS key WHERE false"
    if not files:
        return empty
    listed = ", ".join(map(_text, files))
    return (
        f"{empty} UNION ALL BY NAME SELECT * EXCLUDE (filename), "
        "regexp_extract(filename, '([^/]+)/[^/]+$', 1) AS key "
        f"FROM read_parquet([{listed}], union_by_name = true, filename = true, "
        "hive_partitioning = false)"  # a store may lie in a folder named 'disk=2'
    )


def _artifacts_view(store: Store, glob: bool) -> str:
    """A view of every manifest."""
    texts = ("kind", "key", "sha256")
    numbers = ("version", "rows", "bytes")
    trees = ("identity", "inputs", "notes", "provenance")
    fields = ", ".join(
        [f"m->>'{name}' AS {name}" for name in texts]
        + [f"(m->>'{name}')::BIGINT AS {name}" for name in numbers]
        + [f"m->'{name}' AS {name}" for name in trees]
    )
    source = "FROM stored_manifests"
    if glob:
        pattern = _text(str(store.root / "*" / "*" / MANIFEST))
        source = f"SELECT try(decode(content)::JSON) AS m FROM read_blob({pattern})"
    return f"""CREATE VIEW artifacts AS SELECT kind, key, version, rows, bytes, sha256,
        (provenance->>'seconds')::DOUBLE AS seconds, provenance->>'created' AS created,
        identity, inputs, notes, provenance
        FROM (SELECT {fields} FROM ({source}) WHERE m IS NOT NULL)"""


def lock_down(connection: duckdb.DuckDBPyConnection, store: Store) -> None:
    """Take from a connection what a user's query does not need; the views go on working."""
    for setting in (
        f"memory_limit = '{MEMORY_LIMIT}'",
        "temp_directory = ''",
        "python_enable_replacements = false",
        "autoinstall_known_extensions = false",
        "autoload_known_extensions = false",
        f"allowed_directories = [{_text(store.location)}]",
        "enable_external_access = false",
        "lock_configuration = true",
    ):
        connection.execute(f"SET {setting}")


def first_line(error: Exception) -> str:
    """What an error of DuckDB says, without the query it points into."""
    return " ".join(str(error).split("\n\n")[0].split())


def _text(value: str) -> str:
    """A string as an SQL literal."""
    return "'" + value.replace("'", "''") + "'"


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'
