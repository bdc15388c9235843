"""DuckDB over the store: documented views, the rankings of artifacts/sql, and users' own SQL.

Views are laid over the Parquet files in memory at every start (milliseconds), so they always show
what the store holds and no database file can be locked or go stale. `write_database` leaves the
same views in a file for any DuckDB client.
"""

from __future__ import annotations

import json
import shutil
import uuid
import warnings
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import duckdb

from artifacts.errors import DamageWarning, QueryError, StoreError
from artifacts.figure_schemas import FIGURES
from artifacts.peer_schemas import published_view
from artifacts.places import WORKSHOPS
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
def catalog(store: Store) -> Iterator[duckdb.DuckDBPyConnection]:
    """A connection with every view, trusted: for our own queries."""
    connection = duckdb.connect(":memory:")
    try:
        _create_views(connection, store, glob=False)
        yield connection
    finally:
        connection.close()


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


def write_database(store: Store) -> Path | None:
    """Write `<store>/tribunal.duckdb`, holding the views only, for any DuckDB client.

    None for a store in object storage, where a client needs its own means to read the files.

    Raises:
        StoreError: it cannot be written.
    """
    if store.place.remote:
        return None
    final = store.root / "tribunal.duckdb"
    workshop = store.root / WORKSHOPS / f"tribunal-duckdb-{uuid.uuid4().hex}"
    with store.lock("tribunal", "duckdb"):  # whose name makes the workshop ours, and a leftover
        try:
            workshop.mkdir(parents=True)
            with closing(duckdb.connect(str(workshop / final.name))) as connection:
                _create_views(connection, store, glob=True)
            (workshop / final.name).replace(final)
        except (OSError, duckdb.IOException) as error:
            said = first_line(error)
            raise StoreError(
                f"cannot write '{final}' ({said}); all artifacts are stored"
            ) from error
        finally:
            shutil.rmtree(workshop, ignore_errors=True)
    return final


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


def _create_views(connection: duckdb.DuckDBPyConnection, store: Store, glob: bool) -> None:
    """All views; with `glob`, such that they also show what is put later.

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
    for kind, columns in TABLES.items():
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
    connection.execute(query_text("views"))
    connection.execute(published_view())
    for kind in FIGURES:
        connection.execute(f"CREATE VIEW {kind} AS FROM stored_{kind}")
    for view, query in (("ranking", "rank"), ("pareto", "pareto"), ("leaderboard", "leaderboard")):
        connection.execute(f"CREATE VIEW {view} AS {query_text(query)}")
    if torn > 0:
        said = f"damaged artifacts left out: {torn}; see: tribunal store verify"
        warnings.warn(said, DamageWarning, stacklevel=2)


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
