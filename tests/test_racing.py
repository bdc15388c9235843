"""Racing changes no proposal, no finalist and no winner: it only leaves out what cannot matter."""

from __future__ import annotations

import dataclasses
import math
import random
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from small_study import trial_table, tribunal, write_config

from artifacts.schemas import PARAMETERS as COLUMNS
from artifacts.specs import Config, SearchSpec
from artifacts.store import Store
from flows.settings import load_config
from tasks.history import values_of
from tasks.numerics.objective import Outcome
from tasks.numerics.racing import LARGEST_BEST_GROUP, Place, Race, dominates, place_of
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
        kl > 0.06,
    )


def known(found: Outcome, harmful: bool) -> tuple[Outcome, Outcome]:
    """The best and the worst that is left after the KL alone, or after the harmful prompts."""
    of_harmful = ("refusals", "disclaimer_hits", "compliance")
    told = {name: getattr(found, name) for name in of_harmful}
    best = told if harmful else dict(zip(of_harmful, (0, 0, 1.0), strict=True))
    worst = told if harmful else dict(zip(of_harmful, (HARMFUL, 99, 0.0), strict=True))
    return (
        dataclasses.replace(found, overrefusals=0, harmless_overrefusals=0, **best),
        dataclasses.replace(found, overrefusals=OTHERS, harmless_overrefusals=16, **worst),
    )


def search(preset: str, seed: int, racing: bool) -> list[tuple[dict[str, Any], Outcome, bool]]:
    """A whole search over the make-believe judge: parameters, what is known, stopped."""
    overrides = [f"search.preset={preset}", "search.trials=64", "search.startup=12"]
    config: Config = load_config("organism", [*overrides, "search.generation=4"])
    spec: SearchSpec = config.search
    trials: list[tuple[dict[str, Any], Outcome, bool]] = []
    for generation in range(16):
        history = [(p, values_of(found, spec, BASE)) for p, found, _ in trials]
        ended = [found for _, found, stopped in trials if not stopped]
        race = Race(
            [values_of(each, spec, BASE) for each in ended],
            [place_of(each) for each in ended],
            0 if spec.sampler == "random" else spec.best_group or LARGEST_BEST_GROUP,
            spec.finalists,
        )
        proposals = propose(spec, 8, history, generation=generation, count=4, seed=seed)
        for parameters in proposals:
            truth = judged(parameters, seed)
            found, stopped = truth, False
            for best, worst in (known(truth, False), known(truth, True)):
                values = values_of(best, spec, BASE), values_of(worst, spec, BASE)
                if racing and race.lost(*values, place_of(best)):
                    found, stopped = best, True
                    break
            trials.append((parameters, found, stopped))
    return trials


@pytest.mark.parametrize("preset", ["strict", "heretic-1.4.0", "iconoclast", "random-search"])
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
    spec = load_config("organism", ["search.startup=4"]).search
    values = [(float(i),) for i in range(12)]
    places = [(False, i, 0, 0.0) for i in range(12)]
    contender = ((4.5,), (9.0,), (False, 4, 0, 0.5))
    assert not Race(values, places, spec.best_group or 25, 8).lost(*contender)
    assert Race(values, places, 2, 2).lost(*contender)


def test_both_the_sampler_and_the_ranking_have_to_be_done_with_a_trial() -> None:
    values, places = [(1.0,)] * 6, [(False, 0, 0, 0.01)] * 8
    assert Race(values, places, 6, 8).lost((2.0,), (3.0,), (False, 1, 0, 0.02))
    assert not Race(values, places, 7, 8).lost((2.0,), (3.0,), (False, 1, 0, 0.02))
    assert not Race(values, places, 6, 9).lost((2.0,), (3.0,), (False, 1, 0, 0.02))
    assert not Race(values, places, 6, 8).lost((1.0,), (3.0,), (False, 1, 0, 0.02)), "a tie"
    assert not Race(values, places, 6, 8).lost((2.0,), (3.0,), (False, 0, 0, 0.01))
    assert Race(values, places, 9, 8).lost((1.0,), (1.0,), (False, 1, 0, 0.02)), "values are final"
    assert not Race(values, places, 6, 8).lost((2.0,), (3.0,), (False, 1, 0, 0.009)), "on the front"
    assert Race(values, places, 6, 8).lost((2.0,), (3.0,), (True, 1, 0, 0.009)), "gated, so off it"


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
    assert raced.select(PARAMETERS).equals(whole.select(PARAMETERS))
    assert raced.filter(~stopped).equals(whole.filter(~stopped)), "judged to the end: to the bit"
    for name in ("refusals", "overrefusals", "disclaimer_hits"):
        assert (raced[name] <= whole[name]).all(), "what is known of a stopped trial bounds it"
    assert raced["kl"].equals(whole["kl"])
    assert (raced["compliance"] >= whole["compliance"]).all()
    raced, whole = (table.filter(pl.col("split") != "search") for table in tables.values())
    assert raced.equals(whole), "finalists, winner and test are the same"
