"""Other tools' trials: read to the letter, ranked as the tool ranks them, refused when damaged."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.trial import TrialState
from peer_files import SETTINGS, attributes, iconoclast, journal, reproduce_json, sqlite

from artifacts.catalog import catalog, fetch, user_query
from artifacts.errors import PeerError
from artifacts.schemas import PEERS, polars_schema
from artifacts.store import Store
from flows.housekeeping import reachable
from flows.peer_commands import import_
from flows.peers import beside, imported
from tasks.peers.files import read_peer_file
from tasks.peers.found import PeerStudy, PeerTrial, count, kernel_of, slice_size
from tasks.peers.importing import import_trials
from tasks.stage import Runtime, running


def bring(store: Store, path: Path, **options: Any) -> list[dict[str, Any]]:
    """Import a file; its trials, best first."""
    with running(Runtime(store)):
        ref = import_trials(path=path, **options)
    return imported(store, ref)


@pytest.mark.parametrize("make", [journal, sqlite], ids=["journal", "sqlite"])
def test_a_study_of_heretic_is_read_to_the_letter(store: Store, tmp_path: Path, make: Any) -> None:
    path = make(tmp_path / "study.jsonl", [attributes(5, 0.125, 1)])
    before = path.read_bytes()
    bring(store, path)
    with catalog(store) as connection:
        (row,) = fetch(connection, "SELECT * FROM imported_trials").records()
    wanted = {
        "tool": "heretic",
        "study": "heretic",
        "model": "owner/model",
        "trial": 0,
        "listed_as": 1,
        "state": "COMPLETE",
        "refusals": 5,
        "n_harmful": 40,
        "base_refusals": 40,
        "overrefusals": None,
        "n_harmless": 100,
        "n_from": "recorded",
        "kl": 0.125,
        "direction_scope": "global",
        "direction_index": 4.75,
        "direction_method": "mean",
        "attn_o_proj_max_weight": 1.25,
        "attn_o_proj_min_weight": 0.4,
        "mlp_down_proj_min_weight_distance": 3.0,
        "row_normalization": "full",
        "unmapped": None,
        "rank": 1,
        "listed": True,
    }
    assert {name: row[name] for name in wanted} == wanted
    assert json.loads(row["objective"]) == [0.5, 0.25]
    assert json.loads(row["attributes"]) == attributes(5, 0.125, 1)
    assert json.loads(row["study_attributes"])["settings"] == SETTINGS
    assert path.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["store", "study.jsonl"]


def test_per_layer_trials_have_no_index(tmp_path: Path) -> None:
    path = journal(tmp_path / "j", [attributes(5, 0.1, direction_index=None)])
    (row,) = read_peer_file(path).studies[0].rows()
    assert (row["direction_scope"], row["direction_index"]) == ("per layer", None)


def test_a_study_of_iconoclast(store: Store, tmp_path: Path) -> None:
    told = [iconoclast(1, 2, 0.5, 1), iconoclast(1, 0, 0.75, 2), iconoclast(2, 0, 0.125, 3)]
    own = SETTINGS | {"benign_subspace_rank": 8}
    rows = bring(store, journal(tmp_path / "j", told, name="iconoclast", settings=own))
    # It lists by refusals, overrefusals, KL, and leaves out what an earlier one beats in the two.
    shown = [(r["listed_as"], r["rank"], r["listed"]) for r in rows]
    assert shown == [(2, 1, True), (1, 2, False), (3, 3, True)]
    assert (rows[0]["tool"], rows[0]["n_harmful"], rows[0]["n_from"]) == ("iconoclast", 40, "slice")
    found = user_query(
        store, "SELECT direction_method, direction_blend, compliance FROM imported_trials LIMIT 1"
    )
    assert found.rows == (("hybrid", 0.25, 0.75),)


def own_list(trials: list[tuple[int, float]]) -> list[int]:
    """What HERETIC 1.4.0 lists: sorted by refusals and KL, each with less KL than all before."""
    order = sorted(range(len(trials)), key=lambda n: trials[n])
    return [n for i, n in enumerate(order) if all(trials[n][1] < trials[m][1] for m in order[:i])]


@settings(max_examples=30)
@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from([0.0, 0.1, 0.2, 0.3])), min_size=1))
def test_the_list_is_the_tools_own(trials: list[tuple[int, float]]) -> None:
    study = PeerStudy(
        "heretic",
        [PeerTrial(n, "COMPLETE", attributes(r, kl, n + 1)) for n, (r, kl) in enumerate(trials)],
    )
    listed, ranked = ranked_in_memory(study)
    assert listed == own_list(trials)
    assert ranked == sorted(range(len(trials)), key=lambda n: trials[n])


def ranked_in_memory(study: PeerStudy) -> tuple[list[int], list[int]]:
    """The view over rows that lie in memory: numbers on the list, and all in their order."""
    import duckdb
    import polars as pl

    from artifacts.catalog import query_text

    of_file = {"source": "s", "format": "journal", "digest": "d"}
    rows = [of_file | row for row in study.rows()]
    frame = pl.DataFrame(rows, schema=polars_schema(PEERS["imports"]))
    text = query_text("views")
    view = text[text.index("CREATE VIEW imported_trials") : text.index("-- Edits of other tools")]
    with duckdb.connect() as connection:
        connection.register("rows", frame.to_arrow())
        connection.execute("CREATE VIEW stored_imports AS SELECT *, 'k' AS key FROM rows")
        connection.execute(
            "CREATE TABLE artifacts AS SELECT 'imports' AS kind, 'k' AS key, '' AS created"
        )
        connection.execute(view)
        found = connection.sql("SELECT trial, listed FROM imported_trials ORDER BY rank").fetchall()
    return [n for n, listed in found if listed], [n for n, _ in found]


def test_what_is_not_finished_has_no_rank(store: Store, tmp_path: Path) -> None:
    told = [attributes(0, 0.1, 1), attributes(9, 0.1, 2), {"index": 3}]
    states = {0: TrialState.PRUNED, 2: TrialState.FAIL}
    rows = bring(store, journal(tmp_path / "j", told, states=states))
    assert [(r["listed_as"], r["state"], r["rank"]) for r in rows] == [
        (2, "COMPLETE", 1),
        (1, "PRUNED", None),
        (3, "FAIL", None),
    ]


@pytest.mark.parametrize("kl", [math.nan, math.inf])
def test_a_kl_that_is_no_number_is_last_and_on_no_list(
    store: Store, tmp_path: Path, kl: float
) -> None:
    told = [attributes(0, kl, 1), attributes(0, 9.0, 2)]
    rows = bring(store, journal(tmp_path / "j", told))
    assert [(r["listed_as"], r["listed"]) for r in rows] == [(2, True), (1, False)]


def test_the_same_file_under_two_names_is_one_import(store: Store, tmp_path: Path) -> None:
    one = journal(tmp_path / "one", [attributes(5, 0.1)])
    two = tmp_path / "two"
    two.write_bytes(one.read_bytes())
    bring(store, one)
    bring(store, two)
    sql = "SELECT list(source) FROM imported_trials"
    assert user_query(store, sql).rows == ((["one"],),)
    (manifest,) = store.manifests("imports")
    assert ("imports", manifest.key) in reachable({("imports", manifest.key): manifest}, set())


def test_reproduce_json_and_its_later_form(tmp_path: Path) -> None:
    path = tmp_path / "reproduce.json"
    path.write_text(json.dumps(reproduce_json()))
    study = read_peer_file(path).studies[0]
    (row,) = study.rows()
    told = (row["tool"], row["tool_version"], row["refusals"], row["n_harmful"], row["kl"])
    assert told == ("heretic", "1.4.0", 3, 40, 0.0625)
    later = reproduce_json(version="3")
    del later["metrics"]
    later["scores"] = [
        {"name": "Keywords", "score": {"value": 0.2, "md_display": "2/10"}, "baseline": None},
        {"name": "KL divergence", "score": {"value": 0.03, "md_display": "0.0300"}},
    ]
    path.write_text(json.dumps(later))
    (row,) = read_peer_file(path).studies[0].rows()
    assert (row["refusals"], row["n_harmful"], row["kl"]) == (2, 10, 0.03)


def test_batch_summary_json(store: Store, tmp_path: Path) -> None:
    path = tmp_path / "batch_summary.json"
    trials = [iconoclast(0, 0, 0.0447, 37), iconoclast(1, 0, 0.01, 4)]
    tree = {"model": "owner/model", "base_metrics": {"refusals": 19}, "pareto_trials": trials}
    path.write_text(json.dumps(tree))
    rows = bring(store, path)
    assert [(r["listed_as"], r["trial"], r["rank"], r["listed"]) for r in rows] == [
        (37, 36, 1, True),
        (4, 3, 2, True),
    ]
    assert {r["base_refusals"] for r in rows} == {19}
    assert {r["n_harmful"] for r in rows} == {None}  # the file does not tell


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "is empty"),
        (b"  \n", "is empty"),
        (b"hello", "not what a known tool writes"),
        (b"[1, 2]", "not what a known tool writes"),
        (b"\x80\x04\x95" + b"x" * 40, "not what a known tool writes"),
        (b"SQLite format 3\0" + b"\0" * 200, "SQLite"),
        (b'{"pareto_trials": []}', "holds no trial"),
        (b'{"pareto_trials": [3]}', "entry 0"),
        (b'{"parameters": {"ara_parameters": {}}}', "another kind (ara_parameters)"),
        (b'{"op_code": 0, "x": 1}\n', "damaged"),
        (b'{"op_code": 77, "worker_id": "a"}\n', "damaged|no trial"),
    ],
)
def test_what_is_none_of_these_is_one_line(tmp_path: Path, data: bytes, says: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(data)
    with pytest.raises(PeerError) as raised:
        read_peer_file(path)
    assert any(part in str(raised.value) for part in says.split("|"))
    assert "'file'" in str(raised.value)


def test_a_torn_last_line_is_told_and_may_be_dropped(tmp_path: Path) -> None:
    path = journal(tmp_path / "j", [attributes(5, 0.1, 1), attributes(6, 0.1, 2)])
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    with pytest.raises(PeerError, match=r"the last line .* is torn.*--drop-torn"):
        read_peer_file(path)
    assert len(read_peer_file(path, drop_torn=True).studies[0].rows()) == 1
    path.write_bytes(whole.rstrip(b"\n"))  # whole JSON, but its end was not written
    with pytest.raises(PeerError, match="torn"):
        read_peer_file(path)


def test_a_damaged_line_within_is_never_dropped(tmp_path: Path) -> None:
    path = journal(tmp_path / "j", [attributes(5, 0.1, 1), attributes(6, 0.1, 2)])
    lines = path.read_bytes().splitlines(keepends=True)
    lines[2] = lines[2][:10] + b"\n"
    path.write_bytes(b"".join(lines))
    with pytest.raises(PeerError, match="line 3 of the journal 'j' is damaged"):
        read_peer_file(path, drop_torn=True)


def test_an_sqlite_file_of_another_program(tmp_path: Path) -> None:
    import sqlite3

    path = tmp_path / "other.db"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE notes (text VARCHAR)")
    with pytest.raises(PeerError, match=r"'other\.db' holds no Optuna study"):
        read_peer_file(path)


def test_attributes_of_the_wrong_kind_are_left_out() -> None:
    told = attributes(5, 0.1, kl_divergence="low", parameters=[1]) | {"refusals": -1}
    (row,) = PeerStudy("heretic", [PeerTrial(0, "COMPLETE", told)]).rows()
    assert (row["kl"], row["refusals"]) == (None, None)
    assert row["unmapped"] == "parameters of no known form"


def test_components_with_directions_of_two_layers_are_not_held() -> None:
    told = iconoclast(0, 0, 0.1) | {
        "component_direction_scopes": {"attn.o_proj": "global", "mlp.down_proj": "global"},
        "component_direction_indices": {"attn.o_proj": 3.0, "mlp.down_proj": 4.0},
        "component_direction_methods": {"attn.o_proj": "mean", "mlp.down_proj": "median"},
        "component_direction_blends": {"attn.o_proj": 0.0, "mlp.down_proj": 0.0},
    }
    (row,) = PeerStudy("iconoclast", [PeerTrial(0, "COMPLETE", told)]).rows()
    assert "directions of layers" in str(row["unmapped"])
    assert row["mlp_down_proj_direction_method"] == "median"
    told["component_direction_indices"]["mlp.down_proj"] = 3.0
    (row,) = PeerStudy("iconoclast", [PeerTrial(0, "COMPLETE", told)]).rows()
    assert (row["unmapped"], row["direction_index"]) == (None, 3.0)


def test_a_weight_below_zero_edits_nothing() -> None:
    """HERETIC's main branch samples such weights and clamps them."""
    found = kernel_of({"max_weight": -0.1, "min_weight": -0.05}, None)
    assert (found["max_weight"], found["min_weight"]) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("split", "size"),
    [("test[:100]", 100), ("harmful[80:100]", 20), ("[:5]", 5), ("train", None), ("t[:9%]", None)],
)
def test_the_size_of_a_slice(split: str, size: int | None) -> None:
    assert slice_size({"split": split}) == size


@pytest.mark.parametrize("value", [True, "3", -1, 2.5, math.nan, math.inf, 10**400, None])
def test_what_is_no_count(value: Any) -> None:
    assert count(value) is None


def test_published_numbers(store: Store) -> None:
    found = user_query(store, "SELECT count(*), count(DISTINCT model) FROM published").rows
    assert found == ((20, 10),)
    sql = "SELECT refusals, n_harmful, overrefusals, n_harmless, kl FROM published "
    where = "WHERE model LIKE '%Llama-3.1-8B%' ORDER BY arm"
    assert user_query(store, sql + where).rows == ((1, 20, 0, 64, 0.1854), (0, 20, 0, 64, 0.0447))
    falcon = user_query(store, "SELECT model FROM published WHERE kl > 0.5 AND arm = 'iconoclast'")
    assert falcon.rows == (("tiiuae/Falcon3-7B-Instruct",),)


def test_beside_orders_by_rates_and_gates_last(store: Store, tmp_path: Path) -> None:
    few = attributes(1, 0.1, 1, n_bad_prompts=4)
    told = [few, attributes(2, 0.1, 2), attributes(0, 0.6, 3)]
    bring(store, journal(tmp_path / "j", told))
    found = beside(store, None).records()
    assert [(r["trial"], r["gated"]) for r in found] == [(2, False), (1, False), (3, True)]


def test_a_bad_file_among_good_ones_leaves_nothing_behind(
    store: Store,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("TRIBUNAL_STORE", store.location)
    good, bad = journal(tmp_path / "good", [attributes(5, 0.1)]), tmp_path / "bad"
    bad.write_text("{}")
    with pytest.raises(PeerError, match="'bad' is not what a known tool writes"):
        import_([good, bad])
    assert not list(store.manifests())
    import_([good])
    assert "yes" in capsys.readouterr().out
    assert len(list(store.manifests("imports"))) == 1
