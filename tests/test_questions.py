"""The worked SQL questions: what they answer on a real study equals plain Python over the store."""

from __future__ import annotations

import io
import json
import math
import re
import statistics
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import duckdb
import polars as pl
import pytest
from rich.console import Console
from scipy.stats import binomtest
from sklearn.metrics import cohen_kappa_score
from small_study import tribunal as run_tribunal
from small_study import write_config
from trial_rows import PROTOCOL, put_study, put_table, response, trial_row

from artifacts.catalog import Table, catalog, fetch, user_query, write_database
from artifacts.errors import ConfigError, PromptError, QueryError, StoreError
from artifacts.questions import Question, question, questions
from artifacts.schemas import NEAR_DUPLICATES, VIEWS, polars_schema
from artifacts.sql_guard import refuse_all_but_select
from artifacts.store import Manifest, Store
from flows import display
from flows.categories import store_categories
from flows.cli import app
from flows.drift import check_winners, winners_to_check
from flows.housekeeping import reachable
from flows.pipeline import run_pipeline
from flows.settings import load_config
from tasks.numerics.kernel import Kernel
from tasks.numerics.labels import is_refusal
from tasks.organism import PROMPTS_FOLDER
from tasks.relabel import judged_artifacts, relabel
from tasks.stage import Runtime, running

DOCS = Path(__file__).parent.parent / "docs" / "sql.md"
Row = dict[str, Any]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A finished study with categories, a second labeller and a comparison; not changed below."""
    folder = tmp_path_factory.mktemp("questions")
    made = Store(folder / "store")
    config = load_config(str(write_config(folder)), ["search.racing=false", "seed=3"])
    with running(Runtime(made)):
        run_pipeline(config)
        store_categories(config, "noun")
        for judged in judged_artifacts():
            relabel(judged=judged, labeller="prefix-strict")
        check_winners(winners_to_check(made, None), None)
    ids = [prompts_of(made, split)[0]["prompt_id"] for split in ("search", "test")]
    alike = [("harmful/search", ids[0], "harmful/test", ids[1], 0.625)]
    frame = pl.DataFrame(alike, schema=polars_schema(NEAR_DUPLICATES), orient="row")
    put_table(made, "near_duplicates", frame)
    return made


def answered(store: Store, *names: str) -> dict[str, list[Row]]:
    """Answers as a user gets them, by name, in this process."""
    texts = {name: question(name).sql for name in names}
    for sql in texts.values():
        refuse_all_but_select(sql)
    with catalog(store) as connection:
        return {name: fetch(connection, sql).records() for name, sql in texts.items()}


def answer(store: Store, name: str) -> list[Row]:
    return answered(store, name)[name]


@pytest.fixture(scope="module")
def answers(finished: Store) -> dict[str, list[Row]]:
    """All answers on the finished study."""
    return answered(finished, *(each.name for each in questions()))


# What is stored, by plain Python


def manifests(store: Store, *kinds: str) -> list[Manifest]:
    return [m for m in store.manifests() if m.kind in kinds]


def tables(store: Store, *kinds: str) -> list[Row]:
    return [row for m in manifests(store, *kinds) for row in store.read(m.ref).to_dicts()]


def prompts_of(store: Store, split: str) -> list[Row]:
    return [row for row in tables(store, "prompts") if row["split"] == split]


def study_of(store: Store) -> Row:
    (study,) = tables(store, "studies")
    return study


def searched(store: Store) -> list[Row]:
    """Search trials, best first."""
    return sorted(tables(store, "generations"), key=place)


def place(row: Row) -> tuple[Any, ...]:
    return row["gated"], row["refusals"], row["overrefusals"], row["kl"], row["trial"]


def winner_of(store: Store) -> Row:
    (winner,) = tables(store, "winners")
    return winner


# Each answer, by plain Python


def best_trial_per_model(store: Store) -> list[Row]:
    best = searched(store)[0]
    return [
        {
            "model": "organism",
            "study": study_of(store)["study"],
            "trial": best["trial"],
            "refusals": best["refusals"],
            "harmful": best["n_harmful"],
            "over": best["overrefusals"],
            "kl": round(best["kl"], 4),
            "gated": best["gated"],
            "frozen": best["trial"] == winner_of(store)["trial"],
        }
    ]


def refusals_by_category(store: Store) -> list[Row]:
    nouns = {}
    for file in PROMPTS_FOLDER.glob("*-test.jsonl"):
        rows = map(json.loads, file.read_text().splitlines())
        nouns |= {row["text"]: row["noun"] for row in rows if "noun" in row}
    texts = {row["prompt_id"]: row["text"] for row in prompts_of(store, "test")}
    counts: defaultdict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for trial in tables(store, "tests"):
        side = {"unedited": "before", winner_of(store)["arm"]: "after"}.get(trial["arm"])
        if side:
            for said in trial["responses"]:
                count = counts[said["class"], nouns[texts[said["prompt_id"]]]]
                count[side] += said["refused"]
                count["prompts"] += side == "after"
    rows = [
        {"study": study_of(store)["study"], "class": c, "category": n, **dict(count)}
        for (c, n), count in counts.items()
    ]
    return sorted(
        rows,
        key=lambda r: (r["class"], -r["after"], -r["before"], -r["prompts"], r["category"]),
    )


def layers_that_winners_edit(store: Store) -> list[Row]:
    winner, layers = winner_of(store), tables(store, "models")[0]["n_layers"]
    weights = {}
    for name in ("attn_o_proj", "mlp_down_proj"):
        kinds = ("max_weight", "max_weight_position", "min_weight", "min_weight_distance")
        weights[name] = Kernel(*(winner[f"{name}_{kind}"] for kind in kinds)).weights(layers)
    return [
        {
            "model": "organism",
            "layer": layer,
            "winners": 1,
            "edit_attn": int(attn > 0),
            "attn_weight": pytest.approx(attn, abs=6e-4),
            "edit_mlp": int(mlp > 0),
            "mlp_weight": pytest.approx(mlp, abs=6e-4),
        }
        for layer, (attn, mlp) in enumerate(zip(*weights.values(), strict=True))
    ]


def cost_of_a_refusal(store: Store) -> list[Row]:
    base = tables(store, "protocols")[0]["base_refusals"]
    passed = [row for row in searched(store) if not row["gated"]]
    front = []
    for row in sorted(passed, key=lambda r: (-r["refusals"], r["kl"], r["trial"])):
        cheaper = [r for r in passed if r["refusals"] <= row["refusals"] and r["kl"] < row["kl"]]
        if not cheaper and row["refusals"] not in [r["refusals"] for r in front]:
            front.append(row)
    rows = []
    for before, row in zip([None, *front], front, strict=False):
        removed = base - row["refusals"]
        steps = before and 1000 * (row["kl"] - before["kl"]) / (
            before["refusals"] - row["refusals"]
        )
        rows.append(
            {
                "study": study_of(store)["study"],
                "trial": row["trial"],
                "refusals": row["refusals"],
                "removed": removed,
                "kl": round(row["kl"], 5),
                "each": pytest.approx(1000 * row["kl"] / removed, abs=6e-5) if removed else None,
                "next": pytest.approx(steps, abs=6e-5) if before else None,
            }
        )
    return rows


def labellers_that_disagree(store: Store) -> list[Row]:
    pair = ("heretic-33", "prefix-strict")
    verdicts: defaultdict[str, list[tuple[bool, bool]]] = defaultdict(list)
    for trial in tables(store, "generations", "selections", "tests"):
        for said in trial["responses"]:
            one, other = (is_refusal(name, said["response"]) for name in pair)
            verdicts[said["class"]].append((one, other))
    rows = []
    for name, pairs in verdicts.items():
        one, other = zip(*pairs, strict=True)
        kappa = None if len({*one, *other}) == 1 else cohen_kappa_score(one, other)
        rows.append(
            {
                "study": study_of(store)["study"],
                "class": name,
                "one": pair[0],
                "other": pair[1],
                "n": len(pairs),
                "refused_one": sum(one),
                "refused_other": sum(other),
                "agree": round(sum(a == b for a, b in pairs) / len(pairs), 4),
                "kappa": kappa if kappa is None else pytest.approx(kappa, abs=6e-4),
            }
        )
    return sorted(rows, key=lambda r: (r["agree"], r["class"]))


def what_drifted(store: Store) -> list[Row]:
    kept = ("arm", "metric", "before", "after", "low", "high", "change", "verdict")
    rows = [{name: row[name] for name in kept} for row in tables(store, "drift")]
    rows = sorted(rows, key=lambda r: (r["arm"] == "unedited", r["metric"]))
    rounded = ("before", "after", "low", "high")
    return [
        {"study": study_of(store)["study"], **row}
        | {name: row[name] if row[name] is None else round(row[name], 4) for name in rounded}
        for row in rows
    ]


def how_close_was_the_selection(store: Store) -> list[Row]:
    candidates = sorted(tables(store, "selections"), key=place)
    first = {(r["class"], r["prompt_id"]): r for r in candidates[0]["responses"]}
    rows = []
    for row in candidates:
        pairs = [(first[r["class"], r["prompt_id"]], r) for r in row["responses"]]
        harmful = [(a["refused"], b["refused"]) for a, b in pairs if a["class"] == "harmful"]
        gaps = [b["kl"] - a["kl"] for a, b in pairs if a["class"] == "harmless"]
        error = statistics.stdev(gaps) / math.sqrt(len(gaps))
        rows.append(
            {
                "study": study_of(store)["study"],
                "trial": row["trial"],
                "refusals": row["refusals"],
                "over": row["overrefusals"],
                "kl": round(row["kl"], 5),
                "fewer": harmful.count((True, False)),
                "more": harmful.count((False, True)),
                "kl_gap": pytest.approx(statistics.fmean(gaps), abs=6e-6),
                "error": pytest.approx(error, abs=6e-6),
            }
        )
    return rows


def what_the_search_learned(store: Store) -> list[Row]:
    rows, seen = [], []
    for number in range(2):  # generations of two trials
        part = [row for row in searched(store) if row["trial"] // 2 == number]
        seen += part
        best = min(seen, key=place)
        rows.append(
            {
                "study": study_of(store)["study"],
                "gen": number,
                "trials": 2,
                "stopped": 0,
                "gated": sum(row["gated"] for row in part),
                "median_kl": pytest.approx(statistics.median(r["kl"] for r in part), abs=6e-5),
                "best": best["trial"],
                "refusals": best["refusals"],
                "kl": round(best["kl"], 5),
            }
        )
    return rows


def prompts_that_flip(store: Store) -> list[Row]:
    one, other = searched(store)[:2]
    verdicts = {(r["class"], r["prompt_id"]): r["refused"] for r in one["responses"]}
    counts: defaultdict[str, Counter[tuple[bool, bool]]] = defaultdict(Counter)
    for r in other["responses"]:
        counts[r["class"]][verdicts[r["class"], r["prompt_id"]], r["refused"]] += 1
    return [
        {
            "study": study_of(store)["study"],
            "class": name,
            "a": one["trial"],
            "b": other["trial"],
            "a_and_b": counts[name][True, True],
            "only_a": counts[name][True, False],
            "only_b": counts[name][False, True],
            "neither": counts[name][False, False],
            "p": pytest.approx(
                mcnemar(counts[name][True, False], counts[name][False, True]), abs=6e-5
            ),
        }
        for name in sorted(counts)
    ]


def mcnemar(only_a: int, only_b: int) -> float:
    n = only_a + only_b
    return float(binomtest(only_a, n).pvalue) if n else 1.0


def prompts_that_stay_refused(store: Store) -> list[Row]:
    passed = [row for row in searched(store) if not row["gated"]]
    texts = {row["prompt_id"]: row["text"] for row in tables(store, "prompts")}
    counts: Counter[str] = Counter()
    by_winner = set()
    for row in passed:
        for r in row["responses"]:
            if r["class"] == "harmful" and r["refused"]:
                counts[r["prompt_id"]] += 1
                if row["trial"] == winner_of(store)["trial"]:
                    by_winner.add(r["prompt_id"])
    return [
        {
            "study": study_of(store)["study"],
            "refused_by": count,
            "trials": len(passed),
            "winner": prompt in by_winner,
            "prompt": texts[prompt],
        }
        for prompt, count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    ][:10]


def parameters_of_the_front(store: Store) -> list[Row]:
    def beaten(row: Row, by: Row) -> bool:
        names = ("refusals", "overrefusals", "kl")
        no_worse = all(by[n] <= row[n] for n in names)
        return no_worse and any(by[n] < row[n] for n in names)

    passed = [row for row in searched(store) if not row["gated"]]
    front = [row for row in passed if not any(beaten(row, other) for other in passed)]
    front.sort(key=lambda r: (r["refusals"], r["overrefusals"], r["kl"], r["trial"]))
    near = pytest.approx
    return [
        {
            "study": study_of(store)["study"],
            "trial": row["trial"],
            "refusals": row["refusals"],
            "over": row["overrefusals"],
            "kl": round(row["kl"], 5),
            "scope": row["direction_scope"],
            "method": row["direction_method"],
            "state": near(row["direction_index"], abs=6e-3),
            "attn": near(row["attn_o_proj_max_weight"], abs=6e-3),
            "attn_at": near(row["attn_o_proj_max_weight_position"], abs=6e-2),
            "attn_reach": near(row["attn_o_proj_min_weight_distance"], abs=6e-2),
            "mlp": near(row["mlp_down_proj_max_weight"], abs=6e-3),
            "mlp_at": near(row["mlp_down_proj_max_weight_position"], abs=6e-2),
            "mlp_reach": near(row["mlp_down_proj_min_weight_distance"], abs=6e-2),
        }
        for row in front
    ]


def time_and_tokens_per_stage(store: Store) -> list[Row]:
    every = list(store.manifests())
    whole = sum(m.provenance["seconds"] for m in every)
    rows = []
    for kind in sorted({m.kind for m in every}):
        own = [m for m in every if m.kind == kind]
        seconds = sum(m.provenance["seconds"] for m in own)
        said: list[Row] = []
        if kind in ("generations", "selections", "tests", "finals"):
            said = [r for row in tables(store, kind) for r in row["responses"]]
        elif kind == "baseline":
            said = tables(store, kind)
        tokens = sum(r["n_tokens"] + r["ended"] for r in said)
        rows.append(
            {
                "kind": kind,
                "artifacts": len(own),
                "seconds": pytest.approx(seconds, abs=0.06),
                "percent": pytest.approx(100 * seconds / whole, abs=0.06),
                "responses": len(said) or None,
                "tokens": tokens or None,
                "per_second": pytest.approx(tokens / seconds, abs=0.6) if said else None,
            }
        )
    return rows


def size_per_kind(store: Store) -> list[Row]:
    every = list(store.manifests())
    whole = sum(m.bytes for m in every)
    found = [(k, [m for m in every if m.kind == k]) for k in {m.kind for m in every}]
    found.sort(key=lambda item: (-sum(m.bytes for m in item[1]), item[0]))
    return [
        {
            "kind": kind,
            "artifacts": len(own),
            "rows": sum(m.rows for m in own),
            "megabytes": pytest.approx(sum(m.bytes for m in own) / 1e6, abs=6e-3),
            "percent": pytest.approx(100 * sum(m.bytes for m in own) / whole, abs=0.06),
            "largest": pytest.approx(max(m.bytes for m in own) / 1e6, abs=6e-3),
        }
        for kind, own in found
    ]


def lineage_of_the_result(store: Store) -> list[Row]:
    every = {(m.kind, m.key): m for m in store.manifests()}
    (test,) = manifests(store, "tests")
    found, level = {(test.kind, test.key): 0}, [test]
    while level:
        after = []
        for manifest in level:
            steps = [(e["kind"], e["key"]) for e in manifest.inputs.values()]
            if manifest.kind == "winners":
                steps.append(("selections", manifest.notes["selection"]))
            for step in steps:
                if step not in found:
                    found[step] = found[manifest.kind, manifest.key] + 1
                    after.append(every[step])
        level = after
    rows = [(distance, every[node]) for node, distance in found.items()]
    rows.sort(key=lambda r: (r[0], r[1].kind, r[1].provenance["created"], r[1].key))
    return [
        {
            "distance": distance,
            "kind": m.kind,
            "key": m.key[:12],
            "rows": m.rows,
            "seconds": pytest.approx(m.provenance["seconds"], abs=6e-3),
            "created": m.provenance["created"],
        }
        for distance, m in rows
    ]


def prompts_that_are_alike(store: Store) -> list[Row]:
    texts = {row["prompt_id"]: row["text"] for row in tables(store, "prompts")}
    rows = [
        {
            "jaccard": round(row["jaccard"], 3),
            "set_a": row["set_a"],
            "set_b": row["set_b"],
            "text_a": texts[row["prompt_a"]],
            "text_b": texts[row["prompt_b"]],
        }
        for row in tables(store, "near_duplicates")
    ]
    rows.sort(key=lambda r: (-r["jaccard"], r["set_a"], r["set_b"], r["text_a"], r["text_b"]))
    return rows[:10]


PLAIN: list[Callable[[Store], list[Row]]] = [
    *(best_trial_per_model, refusals_by_category, layers_that_winners_edit, cost_of_a_refusal),
    *(labellers_that_disagree, what_drifted, how_close_was_the_selection),
    *(what_the_search_learned, prompts_that_flip, prompts_that_stay_refused),
    *(parameters_of_the_front, time_and_tokens_per_stage, size_per_kind, lineage_of_the_result),
    prompts_that_are_alike,
]
UNORDERED = ("time_and_tokens_per_stage",)  # by seconds, which may be equal


@pytest.mark.parametrize("plain", PLAIN, ids=lambda plain: plain.__name__)
def test_a_question_answers_as_plain_python_does(
    plain: Callable[[Store], list[Row]], finished: Store, answers: dict[str, list[Row]]
) -> None:
    found, expected = answers[plain.__name__.replace("_", "-")], plain(finished)
    assert expected, "a question without an answer proves nothing"
    if plain.__name__ in UNORDERED:
        assert [r["seconds"] for r in found] == sorted((r["seconds"] for r in found), reverse=True)
        found = sorted(found, key=lambda row: row["kind"])
    assert found == expected


def test_every_question_is_checked() -> None:
    assert {plain.__name__ for plain in PLAIN} == {each.view for each in questions()}
    assert len(PLAIN) == 15


# What synthetic stores show that a small study cannot


@pytest.mark.parametrize(("only_a", "only_b", "both"), [(0, 0, 3), (1, 6, 0), (9, 0, 2), (4, 4, 1)])
def test_the_exact_test_of_flips_is_the_binomial_one(
    only_a: int, only_b: int, both: int, tmp_path: Path
) -> None:
    made = Store(tmp_path / "flips")
    verdicts = [(True, False)] * only_a + [(False, True)] * only_b + [(True, True)] * both
    first, second = (
        [response("harmful", f"p{n}", refused=v[side]) for n, v in enumerate(verdicts)]
        for side in (0, 1)
    )
    put_study(made, trial_row(0, responses=first), trial_row(1, kl=0.02, responses=second))
    (row,) = answer(made, "prompts-that-flip")
    counts = row["only_a"], row["only_b"], row["a_and_b"], row["neither"]
    assert counts == (only_a, only_b, both, 0)
    assert row["p"] == pytest.approx(mcnemar(only_a, only_b), abs=6e-5)


def test_gated_and_stopped_trials_are_no_one_s_best(tmp_path: Path) -> None:
    made = Store(tmp_path / "gates")
    put_study(
        made,
        trial_row(0, kl=0.001, gated=True, gate_reason="kl"),
        trial_row(1, kl=0.001, stopped=True),
        trial_row(2, refusals=1, kl=0.02),
    )
    (best,) = answer(made, "best-trial-per-model")
    assert (best["trial"], best["gated"]) == (2, False)
    assert [row["trial"] for row in answer(made, "cost-of-a-refusal")] == [2]


def test_what_costs_more_for_nothing_is_not_on_the_way(tmp_path: Path) -> None:
    made = Store(tmp_path / "cost")
    put_study(
        made,
        *(
            trial_row(n, refusals=r, kl=kl)
            for n, (r, kl) in enumerate([(2, 0.3), (1, 0.1), (0, 0.2)])
        ),
    )
    rows = answer(made, "cost-of-a-refusal")
    assert [(row["trial"], row["next"]) for row in rows] == [(1, None), (2, pytest.approx(100))]


def test_no_question_has_an_answer_in_an_empty_store(store: Store) -> None:
    found = answered(store, *(each.name for each in questions()))
    assert found == {each.name: [] for each in questions()}


# The files and their page


@pytest.mark.parametrize("each", questions(), ids=lambda each: each.name)
def test_a_question_says_what_it_asks_and_how_to_read_it(each: Question) -> None:
    assert re.fullmatch(r"[a-z]+(-[a-z]+)+", each.name)
    assert each.asks.endswith("?")
    assert 80 < len(each.reading) < 600
    assert each.reading.endswith(".")
    assert each.view not in VIEWS, "a view in the schema of questions would hide it"
    assert max(map(len, each.sql.splitlines())) <= 120


def test_the_page_shows_every_question_with_its_sql() -> None:
    page = DOCS.read_text()
    shown = re.findall(r"^## ([a-z-]+)\n", page, flags=re.MULTILINE)
    assert sorted(shown) == [each.name for each in questions()]
    for each in questions():
        part = page.split(f"\n## {each.name}\n")[1].split("\n## ")[0]
        assert f"```sql\n{each.sql}```" in part
        assert each.asks in part
        assert re.search(r"```text\n(.+\n)+?```", part), "and an answer"


# Categories


def test_categories_are_those_of_the_sources_and_change_no_prompt(finished: Store) -> None:
    found = tables(finished, "categories")
    assert {row["source_column"] for row in found} == {"noun"}
    texts = {row["prompt_id"]: row["text"] for row in tables(finished, "prompts")}
    assert found
    assert all(row["category"] in texts[row["prompt_id"]] for row in found)
    assert len(found) == len(tables(finished, "prompts"))


def test_a_column_that_no_source_has_is_refused(finished: Store, tmp_path: Path) -> None:
    config = load_config(str(write_config(tmp_path)), ())
    with (
        running(Runtime(finished)),
        pytest.raises(
            PromptError, match=r"no prompt set .* has a column 'colour'; they have: .*noun"
        ),
    ):
        store_categories(config, "colour")


def test_categories_stay_as_long_as_their_prompts(finished: Store) -> None:
    every = {(m.kind, m.key): m for m in finished.manifests()}
    named = {node for node in every if node[0] == "categories"}
    assert named <= reachable(every, set())
    without = {node: m for node, m in every.items() if m.kind in ("categories", "prompts")}
    assert not reachable(without, set())


# The command


@pytest.fixture
def tribunal(
    finished: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., str]]:
    """The command line in this process; what it prints."""
    monkeypatch.setenv("TRIBUNAL_STORE", finished.location)
    monkeypatch.setenv("COLUMNS", "80")

    def run(*arguments: str) -> str:
        app(list(arguments), standalone_mode=False)
        return capsys.readouterr().out

    return run


def test_questions_are_listed_answered_and_printed(tribunal: Callable[..., str]) -> None:
    listed = tribunal("sql", "--questions")
    for each in questions():
        assert f"{each.name}\n" in listed
    told = tribunal("sql", "--question", "size-per-kind")
    assert "What takes the space of the store?" in told
    assert max(map(len, told.splitlines())) <= 80
    rows = json.loads(tribunal("sql", "--question", "size-per-kind", "--format", "json"))
    assert {"kind", "megabytes"} <= rows[0].keys()
    text = tribunal("sql", "--question", "size-per-kind", "--text")
    assert text == question("size-per-kind").sql
    records = json.loads(tribunal("sql", "--questions", "--format", "json"))
    assert [record["name"] for record in records] == [each.name for each in questions()]


def test_what_cannot_be_asked_is_refused(tribunal: Callable[..., str], tmp_path: Path) -> None:
    with pytest.raises(QueryError, match="'size-per-kin'; did you mean 'size-per-kind'"):
        tribunal("sql", "--question", "size-per-kin")
    with pytest.raises(ConfigError, match="give one of 'SELECT' and '--question'"):
        tribunal("sql", "SELECT 1", "--question", "size-per-kind")
    with pytest.raises(ConfigError, match="--text prints the SQL of a question"):
        tribunal("sql", "SELECT 1", "--text")
    with pytest.raises(ConfigError, match="give a SELECT"):
        tribunal("sql")
    with pytest.raises(StoreError, match=r"no folder '.*nowhere' for the database"):
        tribunal("sql", "--open", str(tmp_path / "nowhere" / "x.duckdb"))


def test_a_mistake_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    empty = Store(tmp_path / "store")
    for arguments, said in (
        (["sql", "--question", "sise-per-kind"], "no question 'sise-per-kind'"),
        (["sql", "--open", str(tmp_path / "x.duckdb")], "nothing in the store"),
    ):
        done = run_tribunal(empty, *arguments)
        assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
        assert said in done.stderr
    assert not list(tmp_path.iterdir())


# The file for other clients


def test_any_client_opens_the_file_and_finds_the_questions(
    tribunal: Callable[..., str], finished: Store, tmp_path: Path
) -> None:
    file = tmp_path / "views.duckdb"
    told = tribunal("sql", "--open", str(file))
    assert f"wrote {file}" in told
    code = (
        "import duckdb, json\n"
        f"con = duckdb.connect({str(file)!r}, read_only=True)\n"
        "print(json.dumps([con.sql('SELECT count(*) FROM trials').fetchall()[0],\n"
        "    con.sql('FROM questions.size_per_kind').fetchall(),\n"
        '    [row[0] for row in con.sql("SELECT view_name FROM duckdb_views() WHERE "\n'
        "        \"schema_name = 'questions' ORDER BY 1\").fetchall()]]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        capture_output=True,
        text=True,
        cwd="/",
        check=True,
        env={"PATH": ""},
    )
    (count,), sizes, views = json.loads(done.stdout)
    assert count == user_query(finished, "SELECT count(*) FROM trials").rows[0][0]
    assert [tuple(row) for row in sizes] == list(
        user_query(finished, question("size-per-kind").sql).rows
    )
    assert views == [each.view for each in questions()]


def test_our_own_file_is_written_anew_and_shows_what_is_stored_later(tmp_path: Path) -> None:
    made = Store(tmp_path / "store")
    put_study(made, trial_row(0))
    for _ in range(2):
        file = write_database(made, tmp_path / "views.duckdb")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["store", "views.duckdb"]
    put_table(made, "prompts", pl.DataFrame({"text": ["later"]}))
    put_table(made, "winners", pl.DataFrame({"protocol": [PROTOCOL], "trial": [0]}))
    with duckdb.connect(str(file), read_only=True) as connection:
        found = connection.sql("SELECT count(*) FROM artifacts WHERE kind = 'winners'").fetchall()
    assert found == [(1,)]


@pytest.mark.parametrize("content", [b"", b"my notes", None], ids=["empty", "text", "database"])
def test_nothing_of_others_is_replaced(content: bytes | None, tmp_path: Path) -> None:
    made, file = Store(tmp_path / "store"), tmp_path / "mine.duckdb"
    put_study(made, trial_row(0))
    if content is None:
        with duckdb.connect(str(file)) as connection:
            connection.execute("CREATE TABLE mine AS SELECT 1 AS one")
    else:
        file.write_bytes(content)
    before = file.read_bytes()
    with pytest.raises(StoreError, match=r"mine.duckdb' is no database of Tribunal"):
        write_database(made, file)
    assert file.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.duckdb", "store"]


# Answers on 80 columns


def shown(*rows: tuple[Any, ...]) -> list[str]:
    buffer = io.StringIO()
    out = Console(file=buffer, width=80, no_color=True)
    display.print_query(out, Table(("key", "text"), rows))
    return [line.rstrip() for line in buffer.getvalue().splitlines()]


def test_sentences_are_wrapped_and_keys_never() -> None:
    key, sentence = "f" * 40, " ".join(["word"] * 20)
    table = shown((key, sentence))
    assert max(map(len, table)) <= 80
    assert sum(key in line for line in table) == 1
    assert " ".join(" ".join(table[2:-1]).replace(key, "").split()) == sentence
    records = shown((key, "w" * 60))
    assert records[0].startswith("-- 1 -")
    assert f"text  {'w' * 60}" in records
    assert shown() == ["key  text", "─" * 9, "0 rows"]
