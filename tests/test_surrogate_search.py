"""Proposals from a model: what is alike lies close, what racing hides is not read."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.distributions import FloatDistribution
from test_sampler import LAYERS, explored, outcome, preset

from artifacts.specs import COMPONENTS, SearchSpec
from tasks.sampler import Trial, distributions, propose
from tasks.surrogate_search import candidates, effects, overrefusals_known

SPEC = preset("strict")
SPACE = distributions(SPEC.space, LAYERS)
TENT = {
    "max_weight": 1.0,
    "max_weight_position": 3.0,
    "min_weight": 0.5,
    "min_weight_distance": 4.0,
}


def edit(**changes: Any) -> dict[str, Any]:
    plain = {
        f"{component}_{name}": value for component in COMPONENTS for name, value in TENT.items()
    }
    shared = {"direction_scope": "global", "direction_method": "mean", "direction_index": 4.0}
    return {**plain, **shared, **changes}


def distance(one: dict[str, Any], other: dict[str, Any], space: Any = SPACE) -> float:
    columns = {name: np.array([one[name], other[name]]) for name in one}
    first, second = effects(columns, space, LAYERS)
    return float(np.linalg.norm(first - second))


def test_what_does_the_same_is_the_same() -> None:
    """Where nothing is edited, or the direction is every layer's own, parameters are dead."""
    off = edit(attn_o_proj_max_weight=0.0)
    assert distance(off, edit(attn_o_proj_max_weight=0.0, attn_o_proj_max_weight_position=6.0)) == 0
    own = edit(direction_scope="per layer")
    assert distance(own, edit(direction_scope="per layer", direction_index=1.0)) == 0
    assert distance(edit(), edit(direction_index=1.0)) == pytest.approx(3 / 7)


def test_a_full_edit_is_at_distance_one_from_none_for_each_component() -> None:
    level = {f"{c}_min_weight": 1.0 for c in COMPONENTS}
    level |= {f"{c}_min_weight_distance": 7.0 for c in COMPONENTS}
    none = {f"{c}_max_weight": 0.0 for c in COMPONENTS}
    assert distance(edit(**level), edit(**none)) == pytest.approx(math.sqrt(2))
    assert distance(edit(**level), edit(**level, attn_o_proj_max_weight=0.0)) == pytest.approx(1)


def test_two_choices_are_at_distance_one_and_a_dead_blend_is_nowhere() -> None:
    search = preset("iconoclast")
    space = distributions(search.space, LAYERS)
    mean, median = (edit(direction_method=name, direction_blend=0.2) for name in ("mean", "median"))
    assert distance(mean, median, space) == pytest.approx(1)
    assert distance(mean, {**mean, "direction_blend": 0.9}, space) == 0
    hybrid = edit(direction_method="hybrid", direction_blend=0.2)
    assert distance(hybrid, {**hybrid, "direction_blend": 0.9}, space) == pytest.approx(0.7)


@pytest.mark.parametrize("name", ["strict", "heretic-main", "iconoclast"])
def test_candidates_lie_in_the_space_and_most_around_a_centre_near_it(name: str) -> None:
    space = distributions(preset(name).space, LAYERS)
    ((centre, _),) = explored(preset(name, sampler="random"), 1)
    columns = {key: np.array([centre[key]]) for key in space}
    found = candidates(space, columns, np.random.default_rng(0))
    for key, dimension in space.items():
        if isinstance(dimension, FloatDistribution):
            assert found[key].min() >= dimension.low
            assert found[key].max() <= dimension.high
        else:
            assert set(found[key]) <= set(dimension.choices)
    near = found["direction_index"][-100:] == np.clip(
        centre["direction_index"], space["direction_index"].low, space["direction_index"].high
    )
    assert 0.4 < near.mean() < 0.8


def told(dice: random.Random, search: SearchSpec, generations: int) -> list[Trial]:
    """A search against a make-believe judge."""
    trials: list[Trial] = []
    for generation in range(generations):
        for found in asked(search, trials, generation):
            weight = float(found["attn_o_proj_max_weight"] or 0)
            refusals = max(0, round(20 - 18 * weight + dice.gauss(0, 2)))
            over = dice.choice([0, 0, 0, 2])
            trials.append((found, outcome(refusals, over, 0.01 * (weight + dice.random()))))
    return trials


def asked(search: SearchSpec, trials: list[Trial], generation: int) -> list[dict[str, Any]]:
    return propose(search, LAYERS, trials, generation=generation, count=4, seed=3)


@settings(max_examples=5, deadline=None)
@given(st.integers(0, 1000))
def test_overrefusals_that_racing_hides_are_not_read(seed: int) -> None:
    dice, search = random.Random(seed), preset("strict", startup=4, generation=4, best_group=3)
    trials = told(dice, search, 8)
    heard = overrefusals_known([values for _, values in trials], 4, 3)
    assert 0 < heard.sum() < len(trials), "nobody was far enough behind"
    hidden = [
        (p, v if known else (*v[:2], float(dice.randrange(9)), v[3]))
        for (p, v), known in zip(trials, heard, strict=True)
    ]
    assert asked(search, hidden, 8) == asked(search, trials, 8)


def test_overrefusals_that_are_heard_are_read() -> None:
    """The negative twin."""
    search = preset("strict", startup=4, generation=4, best_group=3)
    trials = told(random.Random(1), search, 5)
    best = min(range(len(trials)), key=lambda number: trials[number][1])
    refused_more = [
        (p, (*v[:2], 40.0, v[3]) if number == best else v) for number, (p, v) in enumerate(trials)
    ]
    assert asked(search, refused_more, 5) != asked(search, trials, 5)


def test_the_first_generation_hides_nothing() -> None:
    worse = [outcome(n, 0, 0.1 * n) for n in range(8)]
    assert overrefusals_known(worse, 8, 2).all()
    assert overrefusals_known(worse, 4, 2).tolist() == [True] * 4 + [False] * 4


def test_a_long_history_is_cut_to_what_is_near_the_best() -> None:
    search = preset("strict", startup=4)
    trials = explored(search, 400)
    bad = [(p, outcome(64, 0, 9.0)) for p, _ in explored(search, 40)]
    assert asked(search, [*trials, *bad], 50) != asked(search, trials[:300], 50)
    assert len(asked(search, [*trials, *bad], 50)) == 4


def test_another_objective_is_refused_with_the_way_out() -> None:
    with pytest.raises(ValueError, match=r"objective 'heretic'; set search.objective='strict'"):
        preset("strict", objective="heretic")
