"""What users' SQL must not do: write, read elsewhere, load, set, take all memory, time or room."""

from __future__ import annotations

import csv
import io
import json
import os
import resource
from pathlib import Path

import polars as pl
import pytest
from trial_rows import put_study, trial_row

from artifacts.catalog import catalog, user_query
from artifacts.errors import QueryError
from artifacts.sandbox_child import MEMORY_LIMIT
from artifacts.sql_guard import LONGEST, refuse_all_but_select
from artifacts.store import Store
from flows.display import as_text

READ_ONLY = "only one SELECT at a time"
NO_VIEW = "is no view; see: tribunal sql --schema"
NO_FUNCTION = "is refused"
SECRET = "not for SQL"

WRITES = [
    "COPY (SELECT 1) TO 'x.csv'",
    "COPY trials TO '{store}/x.parquet'",
    "copy/**/(select 1) to 'x.csv'",
    "-- SELECT 1\nCOPY (SELECT 1) TO 'x.csv'",
    "/* SELECT */ COPY (SELECT 1) TO 'x.csv'",
    "\N{NO-BREAK SPACE}COPY (SELECT 1) TO 'x.csv'",
    "\ufeffCOPY (SELECT 1) TO 'x.csv'",
    "WITH x AS MATERIALIZED (COPY (SELECT 1) TO '{store}/x.parquet') SELECT * FROM x",
    "WITH x AS (INSERT INTO stored_manifests VALUES ('1') RETURNING *) SELECT * FROM x",
    "WITH x AS (DELETE FROM stored_manifests RETURNING *) SELECT * FROM x",
    "WITH x AS (UPDATE stored_manifests SET m = '1' RETURNING *) SELECT * FROM x",
    "SELECT (WITH x AS (DELETE FROM stored_manifests RETURNING 1) SELECT * FROM x)",
    "EXPORT DATABASE 'x'",
    "IMPORT DATABASE 'x'",
    "CREATE TABLE t AS SELECT 1",
    "CREATE TEMP TABLE t AS SELECT 1",
    "CREATE OR REPLACE VIEW trials AS SELECT 1",
    "CREATE MACRO f() AS 1",
    "CREATE SECRET s (TYPE s3)",
    "INSERT INTO stored_manifests VALUES ('1')",
    "UPDATE stored_manifests SET m = '1'",
    "DELETE FROM stored_manifests",
    "TRUNCATE stored_manifests",
    "DROP VIEW trials",
    "ALTER VIEW trials RENAME TO t",
    "ATTACH '{store}/x.duckdb'",
    "ATTACH '{store}/tribunal.duckdb' (READ_WRITE)",
    "EXPLAIN ANALYZE COPY (SELECT 1) TO 'x.csv'",
    "EXPLAIN ANALYZE SELECT 1",
    "PREPARE p AS COPY (SELECT 1) TO 'x.csv'",
    "EXECUTE p",
    "CALL pragma_version()",
    "CHECKPOINT",
    "VACUUM",
    "BEGIN",
    "SELECT 1; COPY (SELECT 1) TO 'x.csv'",
    "SELECT 1; --\nDROP VIEW trials",
    "SELECT 1 /* ; */; SELECT 2",
    "PIVOT trials ON arm USING count(*)",
]
LOADS_AND_SETS = [
    "INSTALL httpfs",
    "LOAD httpfs",
    "FORCE INSTALL spatial FROM community",
    "LOAD '{outside}.duckdb_extension'",
    "UPDATE EXTENSIONS",
    "SET memory_limit = '100GB'",
    "SET GLOBAL lock_configuration = false",
    "SET VARIABLE x = 1",
    "RESET memory_limit",
    "PRAGMA memory_limit = '100GB'",
    "PRAGMA enable_profiling",
    "USE memory",
]
READS = [
    "SELECT * FROM read_text('{outside}')",
    "SELECT * FROM READ_TEXT('{outside}')",
    "SELECT * FROM \"read_text\"('{outside}')",
    "SELECT * FROM main.read_text('{outside}')",
    "SELECT * FROM read_blob('{outside}')",
    "SELECT * FROM read_csv('{outside}')",
    "SELECT * FROM read_csv_auto(['{outside}'])",
    "SELECT * FROM read_json('{outside}')",
    "SELECT * FROM read_ndjson_objects('{outside}')",
    "SELECT * FROM read_parquet('{outside}.parquet')",
    "SELECT * FROM parquet_schema('{outside}.parquet')",
    "SELECT * FROM sniff_csv('{outside}')",
    "SELECT * FROM glob('{outside}*')",
    "SELECT * FROM read_text('{store}/link')",
    "SELECT * FROM read_text('{store}/../secret')",
    "SELECT * FROM read_text('/proc/self/environ')",
    "SELECT * FROM read_text('file://{outside}')",
    "SELECT * FROM read_parquet('https://example.org/x.parquet')",
    "SELECT * FROM query('SELECT * FROM read_text(''{outside}'')')",
    "SELECT * FROM query_table('{outside}.parquet')",
    "SELECT * FROM duckdb_settings()",
    "SELECT * FROM duckdb_secrets()",
    "SELECT * FROM duckdb_extensions()",
    "SELECT * FROM which_secret('s3://x', 's3')",
    "SELECT * FROM json_execute_serialized_sql(json_serialize_sql('SELECT 1'))",
    "SELECT * FROM (SELECT 1) WHERE EXISTS (FROM read_text('{outside}'))",
    "SELECT (SELECT content FROM read_text('{outside}'))",
    "SELECT 1 ORDER BY (SELECT size FROM read_text('{outside}'))",
    "SELECT 1 UNION ALL SELECT size FROM read_text('{outside}')",
    "WITH x AS (FROM read_text('{outside}')) SELECT 1",
    "DESCRIBE SELECT * FROM read_csv('{outside}')",
    "SUMMARIZE SELECT * FROM read_csv('{outside}')",
    "SELECT current_setting('secret_directory')",
    "SELECT Current_Setting('allowed_directories')",
    "SELECT list_transform([1], lambda x: current_setting('temp_directory'))",
    "SELECT write_log('x')",
    "SELECT getvariable('x')",
    "SELECT sleep_ms(100000)",
]
TABLES = [
    "SELECT * FROM '{outside}.parquet'",
    "FROM '{store}/link.parquet'",
    'FROM "{outside}.csv"',
    "FROM 's3://bucket/x.parquet'",
    "FROM 'https://example.org/x.csv'",
    "FROM 'hf://datasets/a/b.parquet'",
    "DESCRIBE '{outside}.parquet'",
    "SHOW memory.main.trials",
    "SHOW DATABASES",
    "FROM duckdb_settings",
    "FROM duckdb_secrets",
    "FROM pg_catalog.pg_settings",
    "FROM information_schema.tables",
    "FROM sqlite_master",
    "FROM trials, memory.stored_trials",
]


@pytest.fixture
def guarded(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A store with one trial, a secret beside it, and links to the secret inside it."""
    put_study(store, trial_row(0))
    (tmp_path / "secret").write_text(SECRET)
    pl.DataFrame({"secret": [SECRET]}).write_parquet(tmp_path / "secret.parquet")
    pl.DataFrame({"secret": [SECRET]}).write_csv(tmp_path / "secret.csv")
    (store.root / "link").symlink_to(tmp_path / "secret")
    (store.root / "link.parquet").symlink_to(tmp_path / "secret.parquet")
    monkeypatch.chdir(tmp_path)
    return store


def refused(store: Store, sql: str, time_limit: float = 10.0) -> str:
    """The one line with which a query is refused; nothing may have changed on disk."""
    filled = sql.replace("{store}", str(store.root)).replace(
        "{outside}", str(Path("secret").absolute())
    )
    before = listing(store)
    with pytest.raises(QueryError) as caught:
        user_query(store, filled, time_limit)
    assert listing(store) == before
    line = str(caught.value)
    assert "\n" not in line
    assert SECRET not in line
    return line


def listing(store: Store) -> list[tuple[str, int]]:
    files = [path for path in store.root.parent.rglob("*") if path.is_file()]
    return sorted((str(path), path.stat().st_mtime_ns) for path in files)


@pytest.mark.parametrize("sql", WRITES + LOADS_AND_SETS)
def test_nothing_is_written_loaded_or_set(guarded: Store, sql: str) -> None:
    assert READ_ONLY in refused(guarded, sql)


@pytest.mark.parametrize("sql", READS)
def test_functions_that_reach_beyond_the_views_are_refused(guarded: Store, sql: str) -> None:
    assert NO_FUNCTION in refused(guarded, sql)


@pytest.mark.parametrize("sql", TABLES)
def test_only_views_are_tables(guarded: Store, sql: str) -> None:
    assert NO_VIEW in refused(guarded, sql)


@pytest.mark.parametrize(
    "sql",
    [
        "СOPY (SELECT 1) TO 'x.csv'",  # a Cyrillic letter
        "ＣＯＰＹ (SELECT 1) TO 'x.csv'",  # full-width letters
        "SELECT * INTO t FROM trials",
        "SELEC 1",
        "SELECT '",
        "SELECT 1 FROM",
        "SELECT \ud800",
        "",
        ";",
        "SELECT " + "(" * 9_000 + "1" + ")" * 9_000,
        "SELECT * FROM " + "(SELECT * FROM " * 600 + "trials" + ")" * 600,
        "SELECT " + "1," * LONGEST + "1",
    ],
)
def test_what_is_no_select_is_refused_before_it_runs(sql: str) -> None:
    with pytest.raises(QueryError) as caught:
        refuse_all_but_select(sql)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "sql",
    [
        "FROM leaderboard",
        "SELECT study, count(*) FILTER (gated) FROM trials GROUP BY ALL HAVING count(*) > 0",
        "WITH best AS (FROM ranking WHERE rank = 1) SELECT * FROM best JOIN winners USING (study)",
        "WITH RECURSIVE t AS (SELECT 1 AS n UNION ALL SELECT n + 1 FROM t WHERE n < 5) FROM t",
        "SELECT unnest(responses, max_depth := 2) FROM judged",
        "SELECT * FROM generate_series(1, 3) QUALIFY row_number() OVER () = 1",
        "SELECT list_transform([1], lambda x: x + 1), {'a': 1}.a, INTERVAL 1 DAY",
        "DESCRIBE trials",
        "SUMMARIZE trials",
        "SHOW TABLES",
        "VALUES (1), (2);",
        "(SELECT 'COPY (SELECT 1) TO ''x''; read_text' AS text)",
    ],
)
def test_what_only_reads_views_passes(sql: str) -> None:
    refuse_all_but_select(sql)


def test_an_answer_has_the_values_of_the_query(store: Store) -> None:
    sql = (
        "SELECT 1 AS a, 'ü\n' AS a, NULL, true, 'nan'::DOUBLE < 1, [1, 2], DATE '2026-01-01', 2.50"
    )
    table = user_query(store, sql)
    assert table.columns[:2] == ("a", "a")
    assert table.rows == ((1, "ü\n", None, True, False, [1, 2], "2026-01-01", "2.50"),)


def test_values_that_json_lacks_come_as_text_and_no_number_becomes_invalid_json(
    store: Store,
) -> None:
    sql = (
        "SELECT 'nan'::DOUBLE AS n, [1, '-inf'::FLOAT] AS l, {'a': 'nan'::DOUBLE} AS s, 2.50 AS d, "
        "'\\xAAb'::BLOB AS b, TIMESTAMP '2026-01-02 03:04:05' AS t, INTERVAL 1 DAY AS i, "
        "UUID '00000000-0000-0000-0000-000000000000' AS u, MAP {'k': 1} AS m, 2::INT ** 9 AS h"
    )
    table = user_query(store, sql)

    def refuse(constant: str) -> None:
        raise ValueError(constant)

    (row,) = json.loads(as_text(table, "json"), parse_constant=refuse)
    assert row == {
        "n": None,
        "l": [1, None],
        "s": {"a": None},
        "d": "2.50",
        "b": "\\xaab",
        "t": "2026-01-02 03:04:05",
        "i": "1 day, 0:00:00",
        "u": "00000000-0000-0000-0000-000000000000",
        "m": {"k": 1},
        "h": 512.0,
    }
    names, cells = csv.reader(io.StringIO(as_text(table, "csv")))
    told = dict(zip(names, cells, strict=True))
    assert told["n"] == "nan"
    assert told["d"] == "2.50"
    assert told["t"] == row["t"]


def test_a_store_in_the_memory_of_one_process_says_so() -> None:
    with pytest.raises(QueryError, match="SQL needs a folder or a bucket"):
        user_query(Store("memory://x"), "SELECT 1")


def test_python_variables_and_frames_are_no_tables(guarded: Store) -> None:
    frame = pl.DataFrame({"secret": [SECRET]})
    for name in ("frame", "store", "guarded", "sql", "task"):
        assert "does not exist" in refused(guarded, f"SELECT * FROM {name}")
    assert frame.height


def test_behind_the_guard_the_connection_is_locked_down_too(guarded: Store) -> None:
    """The second wall: what DuckDB itself refuses, were a reading function to pass the guard."""
    import duckdb

    from artifacts.catalog import lock_down

    secret = Path("secret").absolute()
    with catalog(guarded) as connection:
        assert connection.execute(f"FROM read_text('{secret}')").fetchall()
        lock_down(connection, guarded)
        for sql in (
            f"FROM read_text('{secret}')",
            f"FROM read_text('{guarded.root}/link')",
            f"FROM read_text('{guarded.root}/../secret')",
            f"COPY (SELECT 1) TO '{secret}'",
            "INSTALL httpfs",
            "SET memory_limit = '100GB'",
        ):
            with pytest.raises(duckdb.Error):
                connection.execute(sql)
        assert connection.execute("SELECT count(*) FROM trials").fetchall() == [(1,)]


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT count(*) FROM range(1000000000) a, range(1000000000) b",
        "WITH RECURSIVE t AS (SELECT 1 AS n UNION ALL SELECT n + 1 FROM t) SELECT max(n) FROM t",
        "SELECT levenshtein(repeat('a', 1000000), repeat('b', 1000000))",  # heeds no interrupt
        "SELECT count(*) FROM " + ", ".join(["range(2)"] * 500),  # never leaves the planner
    ],
)
def test_a_query_without_end_is_stopped(guarded: Store, sql: str) -> None:
    assert refused(guarded, sql, time_limit=0.5).startswith("stopped after 0.5 seconds")


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT range(1000000000)",
        "SELECT repeat('x', 4000000000) || 'x'",
        "SELECT list(range) FROM range(10000000000)",
        "SELECT * FROM range(10000000000) ORDER BY random()",
        "SELECT count(*) FROM (SELECT DISTINCT a.range FROM range(10000000000) a)",
        "WITH RECURSIVE t AS (SELECT repeat('x', 1000000) s UNION ALL SELECT s || s FROM t) FROM t",
        "SELECT * FROM range(100000000)",
        "SELECT repeat('x', 100000000)",
    ],
)
def test_no_query_takes_all_memory_or_all_output(guarded: Store, sql: str) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    line = refused(guarded, sql, time_limit=2.0)
    assert any(why in line for why in ("more memory", "stopped after 2 s", "larger than 64 MB"))
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert kilobytes < 512 * 1024
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 < MEMORY_LIMIT


def test_an_answer_that_is_too_large_is_refused(
    guarded: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("artifacts.sandbox.LARGEST_ANSWER", 2**20)
    assert len(user_query(guarded, "FROM range(100000)").rows) == 100_000
    for sql in ("FROM range(1000000000)", "SELECT repeat('x', 2000000)"):
        assert "add LIMIT, or aggregate" in refused(guarded, sql)


def test_a_process_that_dies_is_one_line_too(
    store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("sys.executable", "/bin/false")
    assert "ended DuckDB" in refused(store, "SELECT 1")


def test_a_secret_of_the_environment_is_out_of_reach(
    guarded: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(os.environ, "HF_TOKEN", SECRET)
    assert "getenv" in refused(guarded, "SELECT getenv('HF_TOKEN')")
