"""Proposals from a model of the trials so far: many candidates, and the most promising is tried.

Candidates come from all over the space and from around the best trials. What is known of a trial is
what a raced search knows of it too: its KL, its refusals, and its overrefusals unless enough trials
were ahead of it for these not to matter. So racing changes no proposal (docs/decisions/009).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution

from artifacts.specs import COMPONENTS, SearchSpec
from tasks.numerics.kernel import kernel_weights
from tasks.numerics.racing import LARGEST_BEST_GROUP, dominates
from tasks.numerics.surrogate import Foresight

Floats = npt.NDArray[np.float64]
Columns = dict[str, npt.NDArray[Any]]  # every parameter's values, [n]
Told = tuple[Mapping[str, Any], Sequence[float]]  # parameters; gated, refusals, overrefusals, KL

EVERYWHERE = 1500  # candidates from the whole space, for each proposal
AROUND = 150  # from around each of the best trials, by each of these steps
STEPS = (0.03, 0.1, 0.3)  # standard deviations, as shares of a range
MOVED = 0.4  # chance of a parameter to be moved
LARGEST_HISTORY = 256  # trials that the model learns from


def foresee(
    search: SearchSpec,
    dimensions: Mapping[str, BaseDistribution],
    n_layers: int,
    history: Sequence[Told],
    *,
    count: int,
    state: int,
) -> list[dict[str, Any]]:
    """The `count` trials that promise most, each as if those before it had come out as foretold.

    `history`: parameters and (gated, refusals, overrefusals, KL) of all earlier trials, in order;
    at least one. `state` seeds the candidates. Deterministic. Raises ValueError for a NaN.
    """
    if any(math.isnan(value) for _, values in history for value in values):
        raise ValueError("a trial's outcome is NaN")
    group = search.best_group or LARGEST_BEST_GROUP
    heard = overrefusals_known([values for _, values in history], search.generation, group)
    order = sorted(range(len(history)), key=lambda number: (*history[number][1], number))
    learnt = _learnt([values for _, values in history], order[:group])
    told = np.array([history[number][1] for number in learnt], dtype=np.float64)
    foresight = Foresight.of(
        effects(_columns([history[n][0] for n in learnt], dimensions), dimensions, n_layers),
        told[:, 1:],
        heard[learnt],
        history[order[0]][1][1:],
    )
    centres = _columns([history[n][0] for n in order[:group]], dimensions)
    dice, found = np.random.default_rng(state), list[dict[str, Any]]()
    for _ in range(count):
        points = candidates(dimensions, centres, dice)
        placed = effects(points, dimensions, n_layers)
        best = int(np.argmax(foresight.improvement(placed)))
        found.append({name: column[best].item() for name, column in points.items()})
        foresight = foresight.believing(placed[best])
    return found


def _learnt(told: Sequence[Sequence[float]], first: Sequence[int]) -> list[int]:
    """The trials to learn from: all, or those of fewest refusals and least KL, and the first."""
    if len(told) <= LARGEST_HISTORY:
        return list(range(len(told)))
    near = sorted(range(len(told)), key=lambda number: (told[number][1], told[number][3], number))
    return sorted({*near[:LARGEST_HISTORY], *first})


def overrefusals_known(
    told: Sequence[Sequence[float]], generation: int, group: int
) -> npt.NDArray[np.bool_]:
    """Of which trials a raced search knows the overrefusals, [n].

    Not of those that `group` trials of earlier generations were ahead of, however little they would
    have overrefused. Those of the first generation have none ahead.
    """
    known = []
    for number, (gated, refusals, _, kl) in enumerate(told):
        earlier = told[: number // generation * generation]
        at_best = (gated, refusals, 0.0, kl)
        known.append(sum(dominates(other, at_best) for other in earlier) < group)
    return np.array(known)


def candidates(
    dimensions: Mapping[str, BaseDistribution],
    centres: Mapping[str, npt.NDArray[Any]],
    dice: np.random.Generator,
) -> Columns:
    """Points of the space: anywhere in it, and around `centres`."""
    n_centres = len(next(iter(centres.values())))
    around = np.repeat(np.arange(n_centres), len(STEPS) * AROUND)
    steps = np.tile(np.repeat(STEPS, AROUND), n_centres)
    return {
        name: np.concatenate(
            [
                _drawn(dimension, EVERYWHERE, dice),
                _moved(dimension, centres[name][around], steps, dice),
            ]
        )
        for name, dimension in dimensions.items()
    }


def _drawn(dimension: BaseDistribution, n: int, dice: np.random.Generator) -> npt.NDArray[Any]:
    """Values of one parameter from its whole range."""
    if isinstance(dimension, CategoricalDistribution):
        return np.array(dimension.choices)[dice.integers(len(dimension.choices), size=n)]
    assert isinstance(dimension, FloatDistribution)
    return dice.uniform(dimension.low, dimension.high, n)


def _moved(
    dimension: BaseDistribution,
    values: npt.NDArray[Any],
    steps: Floats,
    dice: np.random.Generator,
) -> npt.NDArray[Any]:
    """Values of one parameter, some of them moved; a choice is drawn anew as often as a step."""
    drawn = _drawn(dimension, len(values), dice)
    if isinstance(dimension, CategoricalDistribution):
        return np.where(dice.random(len(values)) < steps, drawn, values)
    assert isinstance(dimension, FloatDistribution)
    width = dimension.high - dimension.low
    moves = dice.normal(size=len(values)) * steps * width * (dice.random(len(values)) < MOVED)
    moved: Floats = np.clip(values + moves, dimension.low, dimension.high)
    return moved


def effects(columns: Columns, dimensions: Mapping[str, BaseDistribution], n_layers: int) -> Floats:
    """Where edits lie by what they do, [n, features].

    The weight of every layer and component, over the square root of the layers: an edit of weight 1
    in all layers is at distance 1 from none. Then what decides the direction: its layer, where
    there is one for all, and every choice between methods or scopes as a distance of 1.
    """
    places = [
        kernel_weights(
            np.maximum(columns[f"{component}_max_weight"], 0.0),
            columns[f"{component}_max_weight_position"],
            columns[f"{component}_min_weight"],
            columns[f"{component}_min_weight_distance"],
            n_layers,
        )
        / math.sqrt(n_layers)
        for component in COMPONENTS
    ]
    shared = columns["direction_scope"] == "global"
    index = columns["direction_index"] / max(n_layers - 1, 1)
    features = [np.where(shared, index, 0.5)]
    for name, dimension in dimensions.items():
        if isinstance(dimension, CategoricalDistribution):
            features += [(columns[name] == c) / math.sqrt(2) for c in dimension.choices]
        elif name.endswith("direction_blend"):
            hybrid = columns[name.replace("blend", "method")] == "hybrid"
            features.append(np.where(hybrid, columns[name], 0.0))
    return np.column_stack([*places, *features])


def _columns(points: Sequence[Mapping[str, Any]], names: Iterable[str]) -> Columns:
    return {name: np.array([point[name] for point in points]) for name in names}
