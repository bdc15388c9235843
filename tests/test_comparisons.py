"""Two stored trials against each other: the same prompts or none, and what a verdict takes."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from small_study import environment, tribunal
from trial_rows import PROTOCOL, put_study, put_table, response, trial_row, trials

from artifacts.catalog import catalog, fetch, user_query
from artifacts.errors import ComparisonError, ConfigError
from artifacts.store import Manifest, Ref, Store, parquet
from flows import comparing
from flows.housekeeping import reachable
from tasks.comparisons import Side, answered, compare_trials, standing_of
from tasks.stage import Runtime, running

N = 20


def row(
    number: int | None = 0,
    refused: Sequence[int] = (),
    over: Sequence[int] = (),
    kl: float = 0.01,
    n: int = N,
    **changes: Any,
) -> dict[str, Any]:
    """A trial that refused these of n harmful and of n harmless prompts; its KL rises a little."""
    answers = [response("harmful", f"p{i}", refused=i in refused) for i in range(n)]
    answers += [
        response("harmless", f"q{i}", refused=i in over, kl=kl * (1 + i / n)) for i in range(n)
    ]
    kls = [answer["kl"] for answer in answers[n:]]
    told = {
        "n_harmful": n,
        "n_harmless": n,
        "refusals": len(refused),
        "overrefusals": len(over),
        "overrefusals_harmless": len(over),
        "kl": math.fsum(kls) / n,
        "stopped": False,
        "responses": answers,
    }
    return trial_row(number, **(told | changes))


def compared(store: Store, a: dict[str, Any], b: dict[str, Any]) -> pl.DataFrame:
    """The comparison of two rows."""
    refs = [put_table(store, "tests", trials(r), key * 32) for r, key in ((a, "a"), (b, "b"))]
    sides = [Side(r["protocol"], r["arm"], r["trial"]) for r in (a, b)]
    with running(Runtime(store)):
        made = compare_trials(
            first=refs[0], of_first=sides[0], second=refs[1], of_second=sides[1], resamples=500
        )
    return store.read(made)


def of(table: pl.DataFrame, metric: str) -> dict[str, Any]:
    return table.row(by_predicate=pl.col("metric") == metric, named=True)


def test_nine_refusals_fewer_is_a_win_and_one_is_none(store: Store, tmp_path: Path) -> None:
    won = compared(store, row(0), row(1, refused=range(9), kl=0.001))
    assert of(won, "refusals")["verdict"] == "better"
    assert won["overall"].unique().to_list() == ["better"]  # whatever its KL
    assert won["decided_by"].unique().to_list() == ["refusals"]
    assert of(won, "kl")["verdict"] == "worse"
    assert won["ahead"][0] == 1.0
    tied = compared(Store(tmp_path / "other"), row(0), row(1, refused=[3]))
    assert of(tied, "refusals")["p"] == 1.0
    assert tied["overall"].unique().to_list() == ["tied"]
    assert 0.5 < tied["ahead"][0] < 1.0


def test_the_rows_hold_counts_tests_and_holm(store: Store) -> None:
    table = compared(store, row(0, refused=[0, 1], over=[5]), row(1, refused=[1, 2, 3], kl=0.02))
    found = of(table, "refusals")
    assert (found["both"], found["only_a"], found["only_b"], found["neither"]) == (1, 1, 2, 16)
    assert (found["n"], found["a"], found["b"]) == (N, 0.1, 0.15)
    assert found["difference"] == pytest.approx(-0.05)
    assert found["low"] < -0.05 < found["high"]
    assert (found["test"], found["p"]) == ("exact McNemar", 1.0)
    kl = of(table, "kl")
    assert (kl["both"], kl["test"]) == (None, "paired permutation")
    assert kl["p_holm"] == pytest.approx(3 * kl["p"])  # the smallest of three
    assert kl["p"] <= 2 / 9999
    assert kl["high"] < 0
    assert table["metric"].to_list() == ["refusals", "overrefusals", "kl"]
    assert kl["detectable"] < kl["detectable_unpaired"]


def test_the_second_against_the_first_is_the_mirror(store: Store, tmp_path: Path) -> None:
    a, b = row(0, refused=[0]), row(1, refused=range(3, 12), over=[1], kl=0.02)
    there, back = compared(store, a, b), compared(Store(tmp_path / "back"), b, a)
    for metric in ("refusals", "overrefusals", "kl"):
        one, other = of(there, metric), of(back, metric)
        assert one["p"] == pytest.approx(other["p"], rel=0.3, abs=1e-3)
        assert one["difference"] == pytest.approx(-other["difference"])
        assert (one["verdict"], other["verdict"]) in {
            ("tied", "tied"),
            ("better", "worse"),
            ("worse", "better"),
        }
    assert there["ahead"][0] + back["ahead"][0] == pytest.approx(1.0, abs=0.05)


def test_a_trial_is_tied_with_its_equal(store: Store) -> None:
    table = compared(store, row(0, refused=[1]), row(1, refused=[1]))
    assert table["overall"].unique().to_list() == ["tied"]
    assert table["ahead"][0] == 0.5
    assert of(table, "kl")["p"] == 1.0


def test_a_gate_decides_before_any_metric(store: Store) -> None:
    table = compared(store, row(0, gated=True), row(1, refused=range(15)))
    assert of(table, "refusals")["verdict"] == "better"
    assert set(table["overall"]) == {"worse"}
    assert set(table["decided_by"]) == {"gates"}
    assert table["ahead"][0] == 0.0


def test_an_unscored_trial_counts_as_gated(store: Store) -> None:
    assert compared(store, row(0, gated=None), row(1))["gated_a"].unique().to_list() == [True]


def test_a_difference_that_no_table_shows_is_tied(store: Store) -> None:
    table = compared(store, row(0, kl=0.01), row(1, kl=0.01001))
    assert of(table, "kl")["p"] < 0.001
    assert of(table, "kl")["verdict"] == "tied"


def test_a_kl_that_is_not_finite_is_not_tested(store: Store) -> None:
    broken = row(1, gated=True)
    broken["responses"][-1]["kl"] = math.inf
    broken["kl"] = math.inf
    table = compared(store, row(0), broken)
    assert of(table, "kl")["p"] is of(table, "kl")["low"] is None
    assert set(table["overall"]) == {"better"}


def test_one_prompt_and_no_borderline_prompt_are_enough_to_answer(store: Store) -> None:
    table = compared(store, row(0, n=1), row(1, refused=[0], n=1))
    assert set(table["overall"]) == {"tied"}
    assert of(table, "refusals")["detectable"] is None


def test_what_is_not_comparable_is_refused(store: Store) -> None:
    with pytest.raises(ComparisonError, match="not judged on the same prompts"):
        compared(store, row(0), row(1, n=N - 1))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"labeller": "prefix-strict"}, "labelled by 'heretic-33' and 'strict/1' by"),
        ({"stopped": True}, "'strict/1' left the race early"),
    ],
)
def test_so_are_other_labels_and_stopped_trials(
    store: Store, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(ComparisonError, match=words):
        compared(store, row(0), row(1, **changes))


def test_a_trial_that_is_not_there_is_named(store: Store) -> None:
    ref = put_table(store, "tests", trials(row(0)))
    with running(Runtime(store)), pytest.raises(ComparisonError, match="no trial 'strict/9'"):
        answered(ref, Side(PROTOCOL, "strict", 9))


def test_a_ranking_of_one_is_certain(store: Store) -> None:
    ref = put_table(store, "tests", trials(row(0, refused=[1])))
    with running(Runtime(store)):
        found = standing_of([answered(ref, Side(PROTOCOL, "strict", 0))])
    assert (found.first.tolist(), found.holds) == ([1.0], 1.0)


def test_a_comparison_is_an_artifact_that_stays_with_its_study(store: Store) -> None:
    put_study(store, row(0), row(1, refused=range(9)))
    ref = next(store.manifests("generations")).ref
    sides = [Side(PROTOCOL, "strict", number) for number in (0, 1)]

    def compare_again(seed: int) -> Ref:
        with running(Runtime(store)):
            return compare_trials(
                first=ref, of_first=sides[0], second=ref, of_second=sides[1], seed=seed
            )

    made = compare_again(0)
    assert compare_again(0) == made
    assert compare_again(1).key != made.key
    manifests = {(m.kind, m.key): m for m in store.manifests() if m.kind == "comparisons"}
    assert ("comparisons", made.key) in reachable(manifests, set())
    sql = "SELECT DISTINCT study_a, study_b, overall FROM comparisons"
    assert user_query(store, sql).rows == (("village-c0ffee", "village-c0ffee", "better"),)


# The command


@pytest.fixture
def village(store: Store) -> Store:
    """A study of two arms: search trials, a tested winner with its controls, another arm."""
    put_study(store, row(0, refused=[1]), row(1, refused=range(9)), row(2, stopped=True))
    winner = [row(0, split="test", prompts="beef"), row(None, arm="unedited", split="test",
              refused=range(N), prompts="beef", kl=0.0)]  # fmt: skip
    put_table(store, "tests", trials(*winner), "7" * 32)
    put_table(
        store, "winners", pl.DataFrame({"protocol": [PROTOCOL], "arm": ["strict"], "trial": [0]})
    )
    other = "decade" + "0" * 26
    judged = [row(4, kl=0.02, protocol=other, arm="random-search")]
    put_table(store, "generations", trials(*judged), "8" * 32)
    protocol = {"protocol": [other], "arm": ["random-search"], "seed": [3], "baseline": ["9" * 32]}
    put_table(store, "protocols", pl.DataFrame(protocol), other)
    draft = Manifest("studies", "5" * 32, 1, rows=1, provenance={"created": "2025-01-01T00:00:00Z"})
    named = {"study": ["village-decade"], "name": ["village"], "protocol": [other]}
    store.put(draft, parquet(pl.DataFrame(named)))
    return store


def answer(store: Store, a: str, b: str, split: str | None = None) -> dict[str, Any]:
    return comparing.compare(store, a, b, split, 0, 200)


def test_a_study_stands_for_its_winner_on_the_test_split(village: Store) -> None:
    found = answer(village, "village-c0ffee", "unedited")
    assert found["split"] == "test"
    assert (found["a"]["trial"], found["b"]["name"]) == (0, "village-c0ffee/unedited")
    assert found["overall"] == "better"
    assert found["sentence"].startswith(
        "A is better than B: it refuses fewer harmful prompts, 0/20"
    )
    for name in ("village/strict", "village/winner", "winner", "village/0", "0"):
        assert answer(village, name, "unedited")["artifact"] == found["artifact"]


def test_trials_of_two_arms_meet_on_the_split_that_both_know(village: Store) -> None:
    found = answer(village, "village-c0ffee/0", "village-decade/4")
    assert found["split"] == "search"
    assert found["sentence"].startswith("A is better than B: refusals and overrefusals are tied, ")
    assert "its KL is lower" in found["sentence"]
    with pytest.raises(ConfigError, match="no winner yet"):
        answer(village, "village", "village/random-search/3")


@pytest.mark.parametrize(
    ("a", "b", "split", "words"),
    [
        ("village/0", "village/99", None, "no trial 'village-c0ffee/99'"),
        ("village/0", "village/winner", None, "'village/0' and 'village/winner' are the same"),
        ("unedited", "unedited", None, "name a trial too"),
        ("vilage", "village/1", None, "no study 'vilage'; did you mean"),
        ("village/strikt", "0", None, "unknown arm of a study 'village/strikt'; did you mean"),
        ("village/0", "village/1", "test", "cannot be compared on the test split"),
        ("village/0", "unedited", "selection", "cannot be compared on the selection split"),
        ("village/-1", "0", None, "unknown arm of a study 'village/-1'"),
    ],
)
def test_what_names_no_pair_is_refused(
    village: Store, a: str, b: str, split: str | None, words: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        answer(village, a, b, split)
    assert words in str(caught.value)
    assert not list(village.manifests("comparisons"))


def test_a_stopped_trial_is_refused_by_name(village: Store) -> None:
    with pytest.raises(ComparisonError, match="'strict/2' left the race early"):
        answer(village, "village/0", "village/2")


def test_the_command_loads_no_torch(village: Store) -> None:
    code = (
        "import sys\nfrom flows.cli import main\n"
        "sys.argv = ['tribunal', 'compare', 'winner', 'unedited']\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    assert not stop.code, stop.code\n"
        "loaded = {'torch', 'transformers', 'prefect', 'optuna'} & set(sys.modules)\n"
        "assert not loaded, loaded\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(village), capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_the_command_prints_a_table_or_a_tree(village: Store) -> None:
    done = tribunal(village, "compare", "village/winner", "unedited")
    assert (done.returncode, done.stderr) == (0, "")
    assert all(len(line) <= 80 for line in done.stdout.splitlines())
    for words in ("A against B, test split", "0/20", "20/20", "A is better than B", "both"):
        assert words in done.stdout
    told = json.loads(tribunal(village, "compare", "0", "unedited", "--format", "json").stdout)
    assert [m["metric"] for m in told["metrics"]] == ["refusals", "overrefusals", "kl"]
    assert (told["metrics"][0]["only_b"], told["overall"]) == (20, "better")
    with catalog(village) as connection:
        assert len(fetch(connection, "FROM comparisons").rows) == 3


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("compare", "a", "b"), "no study in the store"),
        (("compare", "a", "b", "--split", "tset"), "unknown split 'tset'; did you mean 'test'?"),
        (("compare", "a"), "Missing argument 'B'"),
    ],
)
def test_a_bad_command_is_one_line_and_leaves_nothing(
    store: Store, arguments: tuple[str, ...], words: str
) -> None:
    done = tribunal(store, *arguments)
    assert done.returncode == 2
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not store.root.exists()
