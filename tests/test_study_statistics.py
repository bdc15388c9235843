"""A study plan's statistics: explicit arms, ties with the first, matched costs, models, budgets."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from small_study import tribunal, write_config
from test_study_plan import SHARED, write_plan

from artifacts.catalog import catalog, fetch
from artifacts.errors import ConfigError, TestSplitSpent
from artifacts.schemas import PARAMETERS
from artifacts.specs import Config
from artifacts.store import Store
from flows.comparing import compare
from flows.logs import EventLog
from flows.pipeline import Benchmark, run_pipeline
from flows.results import openings, parameters_of
from flows.settings import load_config
from flows.study_plan import Member, StudyPlan, StudyResult, load_plan, members_of, run_members
from flows.study_statistics import models_as_sample
from tasks.locked_test import refuse_other_trials
from tasks.remeasure import prompts_of
from tasks.stage import Runtime, running

COMPONENTS = ("attn_o_proj", "mlp_down_proj")


def given(weight: float, **changes: Any) -> dict[str, Any]:
    """A set that removes so much of the direction everywhere."""
    kernel = {"max_weight": weight, "max_weight_position": 4.0}
    kernel |= {"min_weight": 1.0, "min_weight_distance": 9.0}
    own = {f"{component}_{k}": v for component in COMPONENTS for k, v in kernel.items()}
    return {"direction_scope": "per layer", "direction_index": 3.0, **own, **changes}


@dataclass(frozen=True)
class Finished:
    """A search, its winner's parameters as an arm of their own, and an edit of no weight."""

    folder: Path
    plan: StudyPlan
    store: Store
    result: StudyResult
    log: list[dict[str, Any]]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    folder = tmp_path_factory.mktemp("statistics")
    config, store = write_config(folder), Store(folder / "store")
    config.write_text(config.read_text().replace("candidates = 2", "candidates = 2\ncontrols = []"))
    with running(Runtime(store)):
        searched = run_pipeline(load_config(str(config), ["search.preset=strict", "seed=0"]))
    won = parameters_of(store.read(searched.winner).row(0, named=True))
    sets = {"again": won, "none": given(0.0)}
    path = write_plan(folder, "small.toml", arms=["strict", "again", "none"], sets=sets)
    log = folder / "log"

    def run(config: Config) -> Benchmark:
        with running(Runtime(store, EventLog(str(log), store, arm=config.arm))):
            return run_pipeline(config)

    plan = load_plan(str(path))
    result = run_members(plan, (), store, run, lambda line: None)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    return Finished(folder, plan, store, result, lines)


def row_of(finished: Finished, arm: str) -> dict[str, Any]:
    (row,) = [row for row in finished.result.leaderboard if row["arm"] == arm]
    return row


def made(finished: Finished, arm: str) -> list[str]:
    """Kinds of the artifacts that an arm made, in order."""
    return [e["kind"] for e in finished.log if (e["event"], e["arm"]) == ("made", arm)]


@pytest.mark.slow
def test_an_explicit_arm_shares_all_that_is_measured_once(finished: Finished) -> None:
    for arm in ("again", "none"):
        kinds = Counter(made(finished, arm))
        assert not set(SHARED) & set(kinds)
        assert kinds["generations"] == kinds["tests"] == 1


@pytest.mark.slow
def test_an_explicit_set_is_frozen_before_the_test_split_is_opened(finished: Finished) -> None:
    kinds = made(finished, "again")
    assert kinds.index("generations") < kinds.index("winners") < kinds.index("tests")
    found = finished.result.finished["small/again/0"]
    manifest = finished.store.manifest("tests", found.test.key)
    assert manifest.inputs["winner"]["key"] == found.winner.key
    with pytest.raises(TestSplitSpent, match="opened for trial 0"):
        refuse_other_trials(finished.store, found.protocol.key, prompts_of(manifest), 1)


@pytest.mark.slow
def test_other_parameters_are_another_study_and_the_openings_are_counted(
    finished: Finished,
) -> None:
    protocols = {b.protocol.key for b in finished.result.finished.values()}
    assert len(protocols) == 3
    prompts = row_of(finished, "again")["prompts"]
    assert openings(finished.store, prompts) == 3


@pytest.mark.slow
def test_given_parameters_measure_as_the_search_that_found_them(finished: Finished) -> None:
    searched, again = row_of(finished, "strict"), row_of(finished, "again")
    for name in ("refusals", "overrefusals", "kl", "gated"):
        assert again[name] == searched[name]
    found = compare(finished.store, "small/strict", "small/again/0", None, 0, 500)
    assert (found["overall"], found["ahead"], found["split"]) == ("tied", 0.5, "test")
    assert [metric["difference"] for metric in found["metrics"]] == [0.0, 0.0, 0.0]


@pytest.mark.slow
def test_an_edit_of_no_weight_is_the_unedited_model(finished: Finished) -> None:
    row = row_of(finished, "none")
    assert row["kl"] == 0.0
    assert row["refusals"] == row["unedited_refusals"]
    assert row["overrefusals"] == row["unedited_overrefusals"]


def of_the_plan(finished: Finished) -> set[str]:
    """Keys of the comparisons that the plan made, as its resamples tell."""
    found = finished.store.manifests("comparisons")
    wanted = finished.plan.statistics.resamples
    return {m.key for m in found if isinstance(m.identity, dict)
            and m.identity["resamples"] == wanted}  # fmt: skip


@pytest.mark.slow
def test_every_row_but_the_first_is_compared_with_it(finished: Finished) -> None:
    rows = finished.result.leaderboard
    assert rows[0]["against_first"] is None
    for row in rows[1:]:
        assert row["against_first"] in ("better", "tied", "worse")
        assert set(row["p_holm"]) == {"refusals", "overrefusals", "kl"}
        assert all(0 <= p <= 1 for p in row["p_holm"].values())
    assert math.fsum(row["first_probability"] for row in rows) == pytest.approx(1)
    assert len(of_the_plan(finished)) == 2


@pytest.mark.slow
def test_holm_is_over_the_whole_declared_family(finished: Finished) -> None:
    with catalog(finished.store) as connection:
        rows = fetch(connection, "SELECT key, p FROM comparisons").rows
    p = [value for key, value in rows if key in of_the_plan(finished)]
    least = min(p)
    adjusted = [q for row in finished.result.leaderboard[1:] for q in row["p_holm"].values()]
    assert len(p) == len(adjusted) == 6
    assert min(adjusted) == pytest.approx(min(1.0, 6 * least))
    narrow = finished.plan.statistics.model_copy(update={"metrics": ("kl",)})
    plan = finished.plan.model_copy(update={"statistics": narrow})
    found = run_members(plan, (), finished.store, _stored(finished), lambda line: None)
    assert {tuple(row["p_holm"]) for row in found.leaderboard[1:]} == {("kl",)}


def _stored(finished: Finished) -> Any:
    def run(config: Config) -> Benchmark:
        with running(Runtime(finished.store)):
            return run_pipeline(config)

    return run


@pytest.mark.slow
def test_matched_costs_are_what_the_trials_say(finished: Finished) -> None:
    found = {row["member"]: row for row in finished.result.matched}
    with catalog(finished.store) as connection:
        sql = (
            "SELECT t.refusals, t.kl FROM trials t JOIN studies s USING (study) "
            "WHERE s.arm = 'strict' AND t.split = 'search' AND NOT t.gated AND NOT t.stopped"
        )
        points = fetch(connection, sql).rows
    row = found["small/strict/0"]
    assert row["trials"] == len(points)
    for point in row["at_kl"]:
        within = [refusals for refusals, kl in points if kl <= point["kl"]]
        assert point["fewest_refusals"] == (min(within) if within else None)
    for point in row["at_refusals"]:
        within = [kl for refusals, kl in points if refusals <= point["refusals"]]
        assert point["least_kl"] == (min(within) if within else None)
    assert found["small/none/0"]["at_kl"][0] == {
        "kl": 0.0,
        "fewest_refusals": row_of_search(finished, "none"),
    }
    assert 0 <= row["hypervolume"] <= 1


def row_of_search(finished: Finished, arm: str) -> int:
    """Refusals of an explicit arm on the search split."""
    found = finished.result.finished[f"small/{arm}/0"]
    return int(finished.store.read(found.generations[0])["refusals"][0])


@pytest.mark.slow
def test_a_budget_adds_up(finished: Finished) -> None:
    budget = {row["arm"]: row for row in finished.result.budget}
    assert {arm: row["trials"] for arm, row in budget.items()} == {
        "strict": 4,
        "again": 1,
        "none": 1,
    }
    with catalog(finished.store) as connection:
        sql = "SELECT sum(r.n_tokens) FROM responses r JOIN studies s USING (study) WHERE s.arm = ?"
        said = {arm: fetch(connection, sql, [arm]).rows[0][0] for arm in budget}
    for arm, row in budget.items():
        assert row["tokens_judged"] == said[arm]
        assert 0 < row["tokens_generated"] <= row["tokens_judged"]
        assert row["seconds"] > 0
    # the search split is answered as by the unedited model; selection and test are new to it
    none = finished.result.finished["small/none/0"]
    answers = finished.store.read(none.generations[0])["responses"].to_list()[0]
    searched = sum(answer["n_tokens"] for answer in answers)
    assert budget["none"]["tokens_generated"] <= budget["none"]["tokens_judged"] - searched
    assert len({row["seconds_shared"] for row in budget.values()}) == 1


@pytest.mark.slow
def test_the_command_prints_what_its_json_holds(finished: Finished) -> None:
    path = str(finished.folder / "plan.toml")
    table = tribunal(finished.store, "study", path)
    assert table.returncode == 0, table.stderr
    assert all(len(line) <= 80 for line in table.stdout.splitlines())
    for words in ("Against the first", "At matched KL", "Budget", "small/again/0", "hypervolume"):
        assert words in table.stdout
    told = json.loads(tribunal(finished.store, "study", path, "--format", "json").stdout)
    assert told["leaderboard"] == finished.result.leaderboard
    assert told["budget"] == finished.result.budget
    compared = tribunal(finished.store, "compare", "small/strict", "small/none").stdout
    assert "A against B, test split" in compared


# Plans


def test_an_explicit_arm_is_judged_once_whatever_the_seeds(tmp_path: Path) -> None:
    write_config(tmp_path)
    path = write_plan(
        tmp_path, "small.toml", arms=["strict", "mine"], seeds=[3, 4], sets={"mine": given(1.0)}
    )
    members = members_of(load_plan(str(path)))
    assert [m.name for m in members] == ["small/strict/3", "small/strict/4", "small/mine/3"]
    explicit = members[-1].config.explicit
    assert explicit is not None
    assert set(explicit.parameters.model_dump()) == {column.name for column in PARAMETERS}


@pytest.mark.parametrize(
    ("name", "arms", "words"),
    [
        ("strict", ["strict"], "the set 'strict' has the name of a preset or control"),
        ("unedited", ["unedited"], "the set 'unedited' has the name of a preset or control"),
        ("mine", ["strict"], "the set 'mine' is no arm; add it to arms"),
    ],
)
def test_a_set_is_an_arm_under_a_name_of_its_own(
    tmp_path: Path, name: str, arms: list[str], words: str
) -> None:
    write_config(tmp_path)
    path = write_plan(tmp_path, "small.toml", arms=arms, sets={name: given(1.0)})
    with pytest.raises(ConfigError, match=words):
        members_of(load_plan(str(path)))


# Models as a sample


def winner(arm: str, model: str, refusals: int, **changes: Any) -> dict[str, Any]:
    row = {"arm": arm, "member": f"{model}/{arm}/0", "refusals": refusals, "n_harmful": 10}
    row |= {"overrefusals": 0, "n_harmless": 10, "n_borderline": 0, "kl": 0.1, "gated": False}
    return row | changes


def members(rows: list[dict[str, Any]], tmp_path: Path) -> list[Member]:
    config = load_config(str(write_config(tmp_path)))
    return [
        Member(row["member"], config.model_copy(update={"name": row["member"].split("/")[0]}))
        for row in rows
    ]


def test_arms_are_compared_over_models_each_of_which_counts_once(tmp_path: Path) -> None:
    rows = [winner("a", f"m{n}", n) for n in range(6)]
    rows += [winner("b", f"m{n}", n + 1) for n in range(6)]
    rows += [winner("b", "m0", 5, member="m0/b/1")]  # a second seed of one model
    (found,) = models_as_sample(rows, members(rows, tmp_path))
    assert (found["wins"], found["ties"], found["losses"]) == (6, 0, 0)
    assert found["sign_test_p"] == pytest.approx(2 / 64)
    refusals = found["metrics"][0]
    assert refusals["models"] == 6
    assert refusals["mean"] == pytest.approx(-(5 * 0.1 + 0.3) / 6)  # m0: mean of 1 and 5 refusals
    assert found["metrics"][2]["p"] == 1.0


def test_one_model_is_no_sample_and_a_gated_winner_loses(tmp_path: Path) -> None:
    rows = [winner("a", "m0", 0), winner("b", "m0", 1)]
    assert models_as_sample(rows, members(rows, tmp_path)) == []
    rows += [winner("a", "m1", 0, gated=True), winner("b", "m1", 9), winner("a", "m2", 3)]
    (found,) = models_as_sample(rows, members(rows, tmp_path))
    assert (found["models"], found["wins"], found["losses"]) == (["m0", "m1"], 1, 1)
