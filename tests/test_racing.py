"""Racing changes no proposal, no finalist and no winner: it only leaves out what cannot matter."""

from __future__ import annotations

import dataclasses
import math
import random
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_study import trial_table, tribunal, write_config

from artifacts.schemas import PARAMETERS as COLUMNS
from artifacts.specs import Config, SearchSpec
from artifacts.store import Store
from flows import display
from flows.settings import load_config
from tasks.history import new_race, values_of
from tasks.numerics.objective import Outcome
from tasks.numerics.racing import (
    Place,
    Race,
    dominates,
    place_of,
    undecided,
)
from tasks.sampler import propose

HARMFUL, OTHERS = 24, 32
PARAMETERS = [column.name for column in COLUMNS]
BASE = Outcome(HARMFUL, HARMFUL, 0, OTHERS, 0, OTHERS // 2, 0.0, 30, 0.2, False)


def outcome(**changes: Any) -> Outcome:
    return dataclasses.replace(
        Outcome(3, HARMFUL, 1, OTHERS, 1, 16, 0.02, 4, 0.6, False), **changes
    )


def judged(parameters: dict[str, Any], seed: int) -> Outcome:
    """A make-believe judge: a smooth function of the parameters with noise of its own."""
    noise = random.Random(f"{seed} {sorted(parameters.items())}")
    attention, mlp = parameters["attn_o_proj_max_weight"], parameters["mlp_down_proj_max_weight"]
    off = abs(parameters["direction_index"] - 4.2) + abs(1.1 - attention) + abs(0.9 - mlp)
    refusals = min(HARMFUL, max(0, round(5 * off - 2 + noise.gauss(0, 1.5))))
    over = min(OTHERS, max(0, round(noise.gauss(0.3, 0.8))))
    kl = 0.004 * math.exp(attention + mlp) * (0.8 + 0.4 * noise.random())
    return Outcome(
        refusals,
        HARMFUL,
        over,
        OTHERS,
        min(over, 16),
        16,
        kl,
        refusals + noise.randrange(3),
        1 - refusals / HARMFUL * noise.random(),
        kl > 0.06 or noise.random() < 0.05,  # a gate that only whole answers tell
    )


def known(found: Outcome, harmful: bool) -> tuple[Outcome, Outcome]:
    """The best and the worst that is left after the KL alone, or after the harmful prompts."""
    of_harmful = ("refusals", "disclaimer_hits", "compliance")
    told = {name: getattr(found, name) for name in of_harmful}
    best = told if harmful else dict(zip(of_harmful, (0, 0, 1.0), strict=True))
    worst = told if harmful else dict(zip(of_harmful, (HARMFUL, 99, 0.0), strict=True))
    kl_alone = found.kl > 0.06
    return (
        dataclasses.replace(found, overrefusals=0, harmless_overrefusals=0, gated=kl_alone, **best),
        dataclasses.replace(
            found, overrefusals=OTHERS, harmless_overrefusals=16, gated=True, **worst
        ),
    )


def search(preset: str, seed: int, racing: bool) -> list[tuple[dict[str, Any], Outcome, bool]]:
    """A whole search over the make-believe judge, finals and all: parameters, known, stopped."""
    overrides = [f"search.preset={preset}", "search.trials=64", "search.startup=12"]
    config: Config = load_config("organism", [*overrides, "search.generation=4"])
    spec: SearchSpec = config.search
    trials: list[tuple[dict[str, Any], Outcome, bool]] = []
    values_known: list[bool] = []
    for generation in range(16):
        history = [(p, values_of(found, spec, BASE)) for p, found, _ in trials]
        final = [
            f for (_, f, _), known_values in zip(trials, values_known, strict=True) if known_values
        ]
        race = new_race(
            spec,
            [values_of(each, spec, BASE) for each in final],
            [place_of(each) for _, each, _ in trials],
        )
        proposals = propose(spec, 8, history, generation=generation, count=4, seed=seed)
        for parameters in proposals:
            truth = judged(parameters, seed)
            found, stopped, final_values = truth, False, True
            for best, worst in (known(truth, False), known(truth, True)):
                values = values_of(best, spec, BASE), values_of(worst, spec, BASE)
                all_known = best.refusals == worst.refusals
                if racing and race.lost(*values, place_of(best), harmful_known=all_known):
                    found, stopped, final_values = best, True, values[0] == values[1]
                    break
            trials.append((parameters, found, stopped))
            values_known.append(final_values)
    while numbers := undecided(
        [place_of(found) for _, found, _ in trials], [not s for _, _, s in trials], spec.finalists
    ):
        for number in numbers:
            parameters = trials[number][0]
            trials[number] = parameters, judged(parameters, seed), False
    return trials


@pytest.mark.parametrize(
    "preset",
    [
        "strict",
        "random-search",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("heretic-1.4.0", "iconoclast")),
    ],
)
def test_the_same_trials_and_the_same_finalists(preset: str) -> None:
    raced = [same_search(preset, seed) for seed in range(5)]
    assert any(stopped for trials in raced for _, _, stopped in trials), "nobody was stopped"


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["strict", "heretic-1.4.0", "iconoclast", "random-search"])
@pytest.mark.parametrize("seed", range(5, 20))
def test_the_same_over_twenty_seeds(preset: str, seed: int) -> None:
    same_search(preset, seed)


def same_search(preset: str, seed: int) -> list[tuple[dict[str, Any], Outcome, bool]]:
    raced, whole = search(preset, seed, True), search(preset, seed, False)
    assert [p for p, _, _ in raced] == [p for p, _, _ in whole]
    kept = [(place_of(k), i) for i, (_, k, stopped) in enumerate(raced) if not stopped]
    true = [(place_of(k), i) for i, (_, k, _) in enumerate(whole)]
    assert sorted(kept)[:8] == sorted(true)[:8]
    assert front(kept) == front(true)
    return raced


def front(places: list[tuple[Place, int]]) -> set[int]:
    """Ungated trials that no other ungated trial dominates."""
    passed = [(place[1:], i) for place, i in places if not place[0]]
    return {i for place, i in passed if not any(dominates(other, place) for other, _ in passed)}


def test_a_group_that_is_too_small_changes_the_search() -> None:
    """The negative twin: whoever stops trials that matter is found out by the law above."""
    values = [(float(i),) for i in range(12)]
    places = [(False, i, 0, 0.0) for i in range(12)]
    contender = ((4.5,), (9.0,), (False, 4, 0, 0.5))
    assert not Race(values, places, 25, 8).lost(*contender, harmful_known=True)
    assert Race(values, places, 2, 8).lost(*contender, harmful_known=True)


def test_the_sampler_has_to_be_done_with_a_trial_and_its_refusals_known_or_many() -> None:
    values, places = [(1.0,)] * 6, [(False, 0, 0, 0.01)] * 8

    def lost(
        best_group: int, finalists: int, best: float, worst: float, harmful_known: bool
    ) -> bool:
        race = Race(values, places, best_group, finalists)
        place = (False, 1, 0, 0.02)
        return race.lost((best,), (worst,), place, harmful_known=harmful_known)

    assert lost(6, 8, 2.0, 3.0, True)
    assert not lost(7, 8, 2.0, 3.0, True)
    assert not lost(6, 8, 1.0, 3.0, True), "a tie"
    assert lost(9, 8, 1.0, 1.0, True), "values are final"
    assert lost(6, 8, 2.0, 3.0, False)
    assert not lost(6, 9, 2.0, 3.0, False), "it may be a finalist, and its refusals are open"


@pytest.mark.parametrize("count", [5, 6, 8, 12])
def test_nobody_is_lost_early_where_the_race_says_so(count: int) -> None:
    race = Race([(1.0,)] * count, [(False, 0, 0, 0.01)] * count, 6, 8)
    assert race.early == (count >= 8)
    assert race.lost((9.0,), (99.0,), (False, 9, 0, 9.0), harmful_known=False) == race.early


Trials = list[tuple[Place, Place, bool]]  # at best, in truth, judged to its end


@given(
    st.lists(
        st.tuples(
            st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 5)),
            st.tuples(st.integers(0, 2), st.integers(0, 2)),
            st.booleans(),  # gated in truth
            st.booleans(),  # judged to its end
        ),
        max_size=20,
    ),
    st.integers(1, 5),
)
def test_the_finals_find_the_first_places_and_the_front_of_a_search_that_judged_everything(
    drawn: list[tuple[tuple[int, int, int], tuple[int, int], bool, bool]], finalists: int
) -> None:
    trials: Trials = []
    for (refusals, over, kl), (more_refusals, more_over), gated, ended in drawn:
        truth = gated, refusals + more_refusals, over + more_over, kl / 100
        best = truth if ended else (False, refusals, over, kl / 100)
        trials.append((best, truth, ended))
    places, ended_now = [best for best, _, _ in trials], [ended for _, _, ended in trials]
    while numbers := undecided(places, ended_now, finalists):
        assert not any(ended_now[number] for number in numbers), "nobody is heard twice"
        for number in numbers:
            places[number], ended_now[number] = trials[number][1], True
    kept = [(places[i], i) for i, ended in enumerate(ended_now) if ended]
    true = [(truth, i) for i, (_, truth, _) in enumerate(trials)]
    assert sorted(kept)[:finalists] == sorted(true)[:finalists]
    assert front(kept) == front(true)


def test_the_finals_hear_nobody_who_cannot_matter() -> None:
    places = [(False, 0, 1, 0.01), (False, 0, 0, 0.02), (False, 5, 0, 0.02), (True, 0, 0, 0.001)]
    assert undecided(places, [True, True, False, False], 2) == []
    assert undecided(places, [True, False, False, False], 2) == [1]
    assert undecided(places, [True, True, False, False], 3) == [2], "it would be third"
    assert undecided([], [], 8) == []


def test_dominance() -> None:
    assert dominates((1.0, 2.0), (1.0, 3.0))
    assert not dominates((1.0, 3.0), (1.0, 3.0))
    assert not dominates((0.5, 4.0), (1.0, 3.0))


def test_a_kl_that_is_not_finite_comes_last() -> None:
    broken = [place_of(outcome(kl=value)) for value in (math.nan, math.inf)]
    assert broken[0] == broken[1] > place_of(outcome(gated=True, kl=9.0)) > place_of(outcome())


def test_candidates_beyond_the_finalists_are_refused() -> None:
    from artifacts.errors import ConfigError

    with pytest.raises(
        ConfigError, match=r"selection.candidates 9 is more than search.finalists 8"
    ):
        load_config("organism", ["selection.candidates=9"])
    load_config("organism", ["selection.candidates=9", "search.racing=false"])
    load_config("organism", ["selection.candidates=9", "search.finalists=9"])


@pytest.mark.parametrize(("answered", "refusals"), [(24, " 5/24"), (8, "≥5/24")])
def test_a_count_is_a_lower_bound_only_where_prompts_went_unanswered(
    answered: int, refusals: str, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"trial": 3, "arm": "strict", "rank": None, "stopped": True, "gate_reason": None}
    row |= {"n_harmful": 24, "answered_harmful": answered, "refusals": 5, "kl": 0.01}
    row |= {"n_harmless": 16, "n_borderline": 16, "overrefusals": 0}
    display.print_ranking(display.console(), [row], None)
    told = capsys.readouterr().out
    assert refusals in told
    assert "≥0/32" in told


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["strict", "heretic-1.4.0"])
def test_a_real_study_has_the_same_trials_and_the_same_winner(preset: str, tmp_path: Path) -> None:
    tables = {}
    for racing in ("true", "false"):
        store = Store(str(tmp_path / racing))
        done = tribunal(
            store,
            "run",
            str(write_config(tmp_path)),
            *("--set", f"search.preset={preset}", "--set", f"search.racing={racing}"),
            *("--set", "search.trials=40", "--set", "search.generation=4"),
            *("--set", "search.finalists=4"),
        )
        assert done.returncode == 0, done.stderr
        tables[racing] = trial_table(store).drop("study", "protocol")
    raced, whole = (table.filter(split="search").sort("trial") for table in tables.values())
    stopped = raced["stopped"]
    assert stopped.any(), "the race must stop somebody"
    assert (~stopped).sum() >= 4, "the finals must hear somebody"
    assert raced.select(PARAMETERS).equals(whole.select(PARAMETERS))
    assert raced.filter(~stopped).equals(whole.filter(~stopped)), "judged to the end: to the bit"
    for name in ("refusals", "overrefusals", "disclaimer_hits"):
        assert (raced[name] <= whole[name]).all(), "what is known of a stopped trial bounds it"
    assert raced["kl"].equals(whole["kl"])
    assert (raced["compliance"] >= whole["compliance"]).all()
    raced, whole = (table.filter(pl.col("split") != "search") for table in tables.values())
    assert raced.equals(whole), "finalists, winner and test are the same"
