"""Optuna as a pure function: what was tried and what came of it, in; what to try next, out.

A study that lives in a database cannot be replayed, resumed elsewhere or shared without a server.
Here a study exists only for the length of a call: the trials so far are told to a fresh one, whose
random state comes from the seed and the generation alone. The same history thus gives the same
proposals on any machine, after any interruption, and a search can be a chain of artifacts.
Retelling costs a fraction of a millisecond per trial.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.samplers import BaseSampler, RandomSampler, TPESampler

from artifacts.schemas import PARAMETERS
from artifacts.specs import COMPONENTS, KernelSpace, Range, SearchSpace, SearchSpec
from tasks.numerics.objective import n_objectives
from tasks.numerics.racing import LARGEST_BEST_GROUP

Parameters = dict[str, float | str | None]
Trial = tuple[Mapping[str, float | str | None], Sequence[float]]

NAMES = tuple(column.name for column in PARAMETERS)


def propose(
    search: SearchSpec,
    n_layers: int,
    history: Sequence[Trial],
    *,
    generation: int,
    count: int,
    seed: int,
) -> list[Parameters]:
    """The next `count` trials, as flat dicts with every key of the trial table's parameters.

    `history` holds the parameters and objective values (minimised, no NaN) of all earlier trials,
    in their order, which TPE weighs them by. Deterministic in (seed, generation, history); within
    the generation, each proposal keeps away from those before it. Positions, distances and
    direction_index are in layers, 0 to n_layers - 1; min_weight is a fraction of max_weight.
    A max_weight sampled below zero is zero, so a range that starts below it can turn a component
    off. Raises ValueError for values that are NaN or parameters outside the space.
    """
    dimensions = distributions(search.space, n_layers)
    foreseen = _foreseen(search, len(history), count)
    study = _retold(search, dimensions, history, _sampler(search, seed, generation))
    if search.warm_start == "sweep":
        for point in sweep(dimensions, search.startup)[len(history) :]:
            study.enqueue_trial(point)
    points = [study.ask(dimensions).params for _ in range(count - foreseen)]
    if foreseen:
        from tasks.surrogate_search import foresee

        points += foresee(
            search,
            dimensions,
            n_layers,
            history,
            count=foreseen,
            state=_random_state(seed, generation),
        )
    return [_complete(point) for point in points]


def _foreseen(search: SearchSpec, told: int, count: int) -> int:
    """How many of the next `count` trials a model of those told proposes: all after the start."""
    if search.sampler != "gp" or not told:
        return 0
    return min(count, max(0, told + count - search.startup))


def distributions(space: SearchSpace, n_layers: int) -> dict[str, BaseDistribution]:
    """The sampled parameters and their ranges, in layers, for a model of `n_layers` layers.

    The space is the same for every trial, as in the published methods: direction_index is sampled
    also where each layer uses its own direction. With `per_component_direction` the first
    component follows the shared direction and each other one draws its own.
    """
    last = n_layers - 1
    dimensions = _direction_dimensions("", space)
    dimensions["direction_index"] = _layers(space.direction_index, last)
    for component in COMPONENTS:
        dimensions |= _kernel_dimensions(component, getattr(space, component), last)
    for component in COMPONENTS[1:] if space.per_component_direction else ():
        dimensions |= _direction_dimensions(f"{component}_", space)
    return dimensions


def sweep(dimensions: Mapping[str, BaseDistribution], points: int) -> list[dict[str, Any]]:
    """Plain difference-of-means edits from states spread evenly over the range of the space.

    Each removes one direction from all layers the space lets a kernel reach, at weight 1. The last
    state comes first and every other one after it, so that a search shorter than the sweep has
    still seen the whole range.
    """
    index = dimensions["direction_index"]
    states = np.linspace(index.high, index.low, points).tolist()
    plain = {name: _plain(name, dimension) for name, dimension in dimensions.items()}
    return [{**plain, "direction_index": state} for state in states[::2] + states[1::2]]


def _plain(name: str, dimension: BaseDistribution) -> float | str:
    """The value of a plain edit: whole, level and as wide as the space allows."""
    if isinstance(dimension, CategoricalDistribution):
        plain = [choice for choice in dimension.choices if choice in ("global", "mean")]
        return str([*plain, dimension.choices[0]][0])
    low, high = dimension.low, dimension.high
    if name.endswith("_max_weight"):
        return float(min(max(1.0, low), high))
    return float(high if "min_weight" in name else (low + high) / 2)


def _retold(
    search: SearchSpec,
    dimensions: dict[str, BaseDistribution],
    history: Sequence[Trial],
    sampler: BaseSampler,
) -> optuna.Study:
    """A study in memory that has seen `history`, and nothing else."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        sampler=sampler, directions=["minimize"] * n_objectives(search.objective)
    )
    for parameters, values in history if search.sampler != "gp" else ():
        tried = {name: parameters[name] for name in dimensions}
        study.add_trial(
            optuna.trial.create_trial(params=tried, distributions=dimensions, values=values)
        )
    return study


def _sampler(search: SearchSpec, seed: int, generation: int) -> BaseSampler:
    """The sampler, in the random state of this generation.

    Multivariate is said aloud because Optuna's own default depends on the number of objectives,
    the constant liar because it is what keeps the proposals of a generation apart.
    """
    state = _random_state(seed, generation)
    if search.sampler != "tpe":
        return RandomSampler(seed=state)
    size = search.best_group
    with warnings.catch_warnings():
        # Optuna 5 deprecates `gamma` without another way to fix the size of the best group.
        warnings.filterwarnings("ignore", message="`gamma`", category=FutureWarning)
        return TPESampler(
            n_startup_trials=search.startup,
            n_ei_candidates=search.ei_candidates,
            multivariate=True,
            constant_liar=True,
            gamma=_default_size if size is None else lambda n: min(n, size),
            seed=state,
        )


def _default_size(trials: int) -> int:
    """Optuna's own best group: a tenth of the trials.

    At most 25 also for two objectives, where Optuna knows no bound (the same up to 250 trials): so
    a trial that 25 others are ahead of has missed every best group, however long the search.
    """
    return min(math.ceil(0.1 * trials), LARGEST_BEST_GROUP)


def _random_state(seed: int, generation: int) -> int:
    """32 bits drawn from the pair, whose parts are kept apart: (1, 23) is not (12, 3)."""
    digest = hashlib.sha256(f"sampler:{seed}:{generation}".encode()).digest()
    return int.from_bytes(digest[:4], "big")


def _direction_dimensions(prefix: str, space: SearchSpace) -> dict[str, BaseDistribution]:
    """Scope, method and, where a method uses it, blend."""
    dimensions: dict[str, BaseDistribution] = {
        f"{prefix}direction_scope": CategoricalDistribution(space.direction_scope),
        f"{prefix}direction_method": CategoricalDistribution(space.direction_method),
    }
    if "hybrid" in space.direction_method:
        name = f"{prefix}direction_blend"
        dimensions[name] = FloatDistribution(*space.direction_blend)
    return dimensions


def _kernel_dimensions(
    component: str, space: KernelSpace, last: int
) -> dict[str, BaseDistribution]:
    """The four numbers of a component's kernel.

    The narrowest distance is in layers and the widest a fraction of the model, so on a model of a
    few layers the two may cross: the widest is then the narrowest.
    """
    low, fraction = space.min_weight_distance
    position = f"{component}_max_weight_position"
    return {
        f"{component}_max_weight": FloatDistribution(*space.max_weight),
        position: _layers(space.max_weight_position, last),
        f"{component}_min_weight": FloatDistribution(*space.min_weight),
        f"{component}_min_weight_distance": FloatDistribution(low, max(fraction * last, low)),
    }


def _layers(fractions: Range, last: int) -> FloatDistribution:
    """A range given as fractions of the last layer's index, in layers."""
    low, high = fractions
    return FloatDistribution(low * last, high * last)


def _complete(sampled: Mapping[str, Any]) -> Parameters:
    """Every key of a trial: what was sampled, a blend of 0 if none was, None for what is shared."""
    parameters: Parameters = {name: sampled.get(name) for name in NAMES}
    parameters["direction_blend"] = sampled.get("direction_blend", 0.0)
    for component in COMPONENTS:
        weight = f"{component}_max_weight"
        parameters[weight] = max(0.0, sampled[weight])
    return parameters
