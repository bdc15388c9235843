"""SQL over the store: documented views, whatever is there, and nothing beyond it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import duckdb
import pytest
from trial_rows import put_study, put_table, response, trial_row, trials

from artifacts.catalog import ask, catalog, fetch, user_query, write_database
from artifacts.errors import DamageWarning, QueryError
from artifacts.schemas import VIEWS
from artifacts.store import Store
from flows.housekeeping import collect, unreachable


@pytest.mark.parametrize("view", sorted(VIEWS))
@pytest.mark.parametrize("filled", [False, True])
def test_every_view_has_exactly_the_documented_columns(
    store: Store, view: str, filled: bool
) -> None:
    if filled:
        put_study(store, trial_row(0), trial_row(1))
    with catalog(store) as connection:
        rows = fetch(connection, f"DESCRIBE {view}").rows
    assert {row[0]: row[1] for row in rows} == {c.name: c.type for c in VIEWS[view]}


@pytest.mark.parametrize("view", sorted(VIEWS))
def test_a_query_finds_every_view_it_names_made(store: Store, view: str) -> None:
    put_study(store, trial_row(0), trial_row(1))
    query = f"SELECT * FROM {view} ORDER BY ALL"
    with catalog(store) as connection:
        assert ask(store, query) == fetch(connection, query)
    with catalog(store, "FROM prompts") as connection, pytest.raises(QueryError):
        fetch(connection, "FROM trials")


@pytest.mark.parametrize(
    ("query", "made"),
    [
        ("FROM main.trials", True),
        ('FROM "main"."trials"', True),
        ("SELECT '--' FROM trials", True),
        ("SELECT p.trials FROM prompts p", False),
        ("-- of the trials\nFROM prompts", False),
    ],
)
def test_only_views_that_a_query_names_are_made(store: Store, query: str, made: bool) -> None:
    with catalog(store, query) as connection:
        names = fetch(connection, "SELECT view_name FROM duckdb_views()").rows
    assert (("trials",) in names) == made


def test_every_column_has_a_meaning() -> None:
    assert all(len(c.meaning) > 5 for columns in VIEWS.values() for c in columns)


def test_trials_and_responses_of_a_study(store: Store) -> None:
    study = put_study(store, trial_row(0, kl=0.3), trial_row(1, kl=0.1))
    found = user_query(store, "SELECT study, trial, rank FROM leaderboard ORDER BY rank").rows
    assert found == ((study, 1, 1), (study, 0, 2))
    found = user_query(store, "SELECT count(*), count(DISTINCT trial) FROM responses").rows
    assert found == ((4, 2),)


def test_a_trial_that_two_artifacts_hold_is_one_row(store: Store) -> None:
    put_study(store, trial_row(0), trial_row(1))
    put_table(store, "generations", trials(trial_row(1)), "e" * 32)
    assert user_query(store, "SELECT count(*) FROM trials").rows == ((2,),)


def test_labels_of_the_study_and_of_another_labeller(store: Store) -> None:
    put_study(store, trial_row(0, responses=[response("harmful", "p0", refused=True)]))
    found = user_query(store, "SELECT labeller, class, refused FROM labels").rows
    assert found == (("heretic-33", "harmful", True),)


def test_an_unfinished_artifact_is_not_seen(store: Store) -> None:
    put_study(store, trial_row(0))
    (store.root / "generations" / ("d" * 32) / "manifest.json").unlink()
    with pytest.warns(DamageWarning, match=": 1;"):
        assert user_query(store, "SELECT count(*) FROM trials").rows == ((0,),)


def test_a_folder_named_like_a_column_changes_nothing(tmp_path: Path) -> None:
    store = Store(tmp_path / "disk=2" / "trial=7")
    put_study(store, trial_row(0), trial_row(1))
    with catalog(store) as connection:
        table = fetch(connection, "SELECT * FROM trials ORDER BY trial")
    assert table.columns == tuple(c.name for c in VIEWS["trials"])
    assert [row["trial"] for row in table.records()] == [0, 1]


@pytest.mark.parametrize("share", [0.5, 1], ids=["cut", "blank"])
def test_a_torn_artifact_is_left_out_of_queries_and_of_the_database(
    store: Store, share: float
) -> None:
    put_study(store, trial_row(0))
    put_table(store, "generations", trials(trial_row(1)), "e" * 32)
    assert user_query(store, "SELECT list(trial ORDER BY trial) FROM trials").rows == (([0, 1],),)
    data = store.folder("generations", "e" * 32) / "data.parquet"
    data.write_bytes(bytes(int(data.stat().st_size * share)))
    with pytest.warns(DamageWarning, match="^damaged artifacts left out: 1; see: tribunal store"):
        assert user_query(store, "SELECT list(trial) FROM trials").rows == (([0],),)
    with pytest.warns(DamageWarning):
        path = write_database(store)
    connection = duckdb.connect(str(path), read_only=True)
    assert connection.sql("SELECT list(trial) FROM trials").fetchall() == [([0],)]


@pytest.mark.filterwarnings("error")
def test_a_whole_store_warns_of_nothing(store: Store) -> None:
    user_query(store, "SELECT 1")
    put_study(store, trial_row(0))
    user_query(store, "SELECT count(*) FROM trials")
    write_database(store)


def test_a_torn_manifest_is_left_out_and_told(store: Store) -> None:
    put_study(store, trial_row(0))
    put_table(store, "generations", trials(trial_row(1)), "e" * 32)
    (store.folder("generations", "e" * 32) / "manifest.json").write_text("{")
    with pytest.warns(DamageWarning, match=": 1;"):
        assert user_query(store, "SELECT list(trial) FROM trials").rows == (([0],),)


REFUSED = [
    "CREATE TABLE t AS SELECT 1",
    "INSERT INTO artifacts VALUES (1)",
    "DROP VIEW trials",
    "COPY (SELECT 1) TO 'out.csv'",
    "ATTACH 'other.duckdb'",
    "INSTALL httpfs",
    "LOAD httpfs",
    "SET memory_limit = '100GB'",
    "PRAGMA database_list",
    "SELECT 1; SELECT 2",
    "",
    "SELEC 1",
    "SELECT * FROM nowhere",
    "SELECT * FROM read_text('/etc/hostname')",
    "SELECT * FROM read_csv('/etc/passwd')",
    "SELECT * FROM '/etc/passwd'",
    "SELECT * FROM glob('/etc/*')",
    "SELECT * FROM read_parquet('https://example.org/x.parquet')",
    "EXPORT DATABASE 'x'",
    "CALL pragma_version()",
    "EXPLAIN ANALYZE CREATE TABLE t AS SELECT 1",
    "EXPLAIN SELECT 1",
]


@pytest.mark.parametrize("sql", REFUSED)
def test_sql_is_read_only_and_stays_in_the_store(
    store: Store, sql: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_study(store, trial_row(0))
    monkeypatch.chdir(tmp_path)
    before = sorted(p for p in tmp_path.rglob("*"))
    with pytest.raises(QueryError) as caught:
        user_query(store, sql)
    assert "\n" not in str(caught.value)
    assert sorted(p for p in tmp_path.rglob("*")) == before


@pytest.mark.parametrize("how", ["", "EXPLAIN ANALYZE "])
def test_a_copy_into_the_store_is_refused_too(store: Store, how: str) -> None:
    put_study(store, trial_row(0))
    with pytest.raises(QueryError):
        user_query(store, f"{how}COPY (SELECT 1) TO '{store.root}/x.parquet'")
    assert not (store.root / "x.parquet").exists()


def test_a_query_without_end_is_stopped(store: Store) -> None:
    endless = "SELECT count(*) FROM range(1000000000) a, range(1000000000) b"
    with pytest.raises(QueryError, match=r"stopped after 0\.3 seconds"):
        user_query(store, endless, time_limit=0.3)


def test_the_database_file_works_from_anywhere(store: Store, tmp_path: Path) -> None:
    put_study(store, trial_row(0), trial_row(1))
    path = write_database(store)
    code = (
        "import duckdb, sys\n"
        f"print(duckdb.connect({str(path)!r}, read_only=True)"
        ".sql('SELECT count(*) FROM leaderboard').fetchall()[0][0])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    assert done.stdout == "2\n"
    assert duckdb.connect(str(path), read_only=True).sql("FROM trials").fetchall()


def test_a_killed_write_of_the_database_leaves_only_what_gc_frees(store: Store) -> None:
    code = (
        "import os, sys\n"
        "from artifacts.catalog import write_database\n"
        "from artifacts.store import Store\n"
        "sys.addaudithook(lambda event, _: event == 'os.rename' and os.kill(os.getpid(), 9))\n"
        f"write_database(Store({str(store.root)!r}))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == -9
    (left,) = [place for place in unreachable(store) if place.why == "leftover"]
    assert left.bytes > 0
    assert not (store.root / "tribunal.duckdb").exists()
    assert write_database(store)
    assert len(list(collect(store, [left]))) == 1
    assert [path.name for path in store.root.iterdir() if path.is_file()] == ["tribunal.duckdb"]
    assert unreachable(store) == []
