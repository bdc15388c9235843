"""An edit from elsewhere, rebuilt on a config's model and judged on its search prompts.

The test split stays shut. What a source leaves out is searched among a stated number of points: a
grid over one parameter, a scrambled Halton sequence over several; all other parameters stay as the
source says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import polars as pl

from artifacts.errors import PeerError
from artifacts.schemas import PEERS, RESPONSE, polars_schema
from artifacts.specs import Config, SearchSpace
from artifacts.store import Ref
from tasks.stage import Made, stage
from tasks.trials import Trial, open_court

ARM = "reproduction"
Parameters = Mapping[str, Any]


@stage(
    "reproductions",
    version=1,
    ignore=("config",),  # the protocol holds what of it counts
    label=lambda source, **_: f"reproduction of {source['source']}",
    work=lambda points, **_: len(points),
)
def judge_reproduction(
    *,
    source: Mapping[str, Any],
    points: Sequence[Parameters],
    searched: Sequence[str],
    protocol: Ref,
    config: Config,
    materials: Mapping[str, Ref],
    prompts: Mapping[str, Ref],
) -> Made:
    """Every point's edit on the search split, beside what the source says of its own.

    Args:
        source: name, tool, trial and numbers, by the columns `source_...`.
        points: whole parameters; one, unless some were searched.
        searched: the parameters that differ between points.
        protocol: what decides how they are judged.
        config: of the protocol.
        materials: of the protocol.
        prompts: the search prompts.
    """
    court, _ = open_court("search", config, protocol, materials, prompts)
    trials = [Trial(ARM, number, point) for number, point in enumerate(points)]
    shared = {
        **source,
        "searched": ", ".join(searched) or None,
        "points": len(points),
    }
    rows = [{**shared, "point": number, **row} for number, row in enumerate(court.judge(trials))]
    responses = pl.List(pl.Struct(polars_schema(RESPONSE)))
    schema = {**polars_schema(PEERS["reproductions"]), "responses": responses}
    return Made(pl.DataFrame(rows, schema=schema))


def points_of(
    known: Parameters, missing: Sequence[str], space: SearchSpace, n_layers: int, count: int
) -> list[dict[str, Any]]:
    """Whole parameters: `known`, with what is missing from `count` points of a search space.

    The same call gives the same points. An index that only some scopes use is searched for all.

    Raises:
        PeerError: a parameter that no search space has.
    """
    if not missing:
        return [dict(known)]
    ranges = [_range_of(name, space, n_layers) for name in missing]
    return [
        {**known, **dict(zip(missing, values, strict=True))}
        for values in zip(*_columns(ranges, count), strict=True)
    ]


def _columns(ranges: Sequence[Any], count: int) -> list[list[Any]]:
    """Each parameter's values, in the order of the points."""
    import numpy as np
    from scipy.stats import qmc

    if len(ranges) == 1:
        shares = np.linspace(0.0, 1.0, count)[:, None] if count > 1 else np.array([[0.5]])
    else:
        shares = qmc.Halton(len(ranges), scramble=True, seed=0).random(count)
    return [_scaled(each, shares[:, column]) for column, each in enumerate(ranges)]


def _scaled(each: tuple[float, float] | Sequence[str], shares: Any) -> list[Any]:
    """Shares 0-1 as values of a range, or as choices of a list."""
    if isinstance(each, tuple):
        low, high = each
        return [low + float(share) * (high - low) for share in shares]
    last = len(each) - 1
    return [each[min(int(share * len(each)), last)] for share in shares]


def _range_of(name: str, space: SearchSpace, n_layers: int) -> tuple[float, float] | list[str]:
    """A parameter's range in layers, or its choices.

    Raises:
        PeerError: there is none.
    """
    from tasks.sampler import distributions

    choices = {"direction_scope": space.direction_scope, "direction_method": space.direction_method}
    if name in choices:
        return list(choices[name])
    if name.endswith("direction_blend"):
        return space.direction_blend
    dimension: Any = distributions(space, n_layers).get(name)
    if dimension is None:
        raise PeerError(f"'{name}' cannot be searched; give it in the source")
    return max(0.0, float(dimension.low)), float(dimension.high)
