"""A trial that is given instead of searched for, as an arm of its own.

Its protocol holds the parameters, so other parameters are another study with another test split
opening. From there on it takes the way of every trial: judged on the search split, frozen by the
selection, and only then met by the test split (tasks/locked_test.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from artifacts.specs import Config
from artifacts.store import Ref
from tasks.history import PARAMETER_NAMES
from tasks.shards import Case, judge_trials
from tasks.stage import Made, stage
from tasks.study import protocol_frame, search_identity
from tasks.trials import Trial, to_frame


def explicit_identity(config: Config) -> dict[str, Any]:
    """What of a config decides an explicit trial, beside the artifacts it starts from."""
    found = search_identity(config)
    del found["search"]
    return found | {"explicit": given(config).model_dump(mode="json")}


def given(config: Config) -> Any:
    """The explicit set of a config that has one."""
    if config.explicit is None:
        raise ValueError(f"config '{config.name}' gives no explicit parameters")
    return config.explicit


@stage("protocols", version=1, identify={"config": explicit_identity}, label=lambda **_: "protocol")
def fix_parameters(
    *, config: Config, materials: Mapping[str, Ref], prompts: Mapping[str, Ref]
) -> Made:
    """All that decides one explicit trial, before it is judged. The key is the study's."""
    key = fix_parameters.key({"config": config, "materials": materials, "prompts": prompts})
    return Made(protocol_frame(key, config, materials))


@stage(
    "generations",
    version=1,
    ignore=("config",),  # the protocol holds what of it counts
    label=lambda config, **_: f"trial 0, {config.arm}",
    work=lambda **_: 1,
)
def judge_explicit(
    *, protocol: Ref, config: Config, materials: Mapping[str, Ref], prompts: Mapping[str, Ref]
) -> Made:
    """Judge the explicit trial on the search split, to its end: it races against nobody."""
    told = given(config).parameters.model_dump(mode="json")
    trial = Trial(config.arm, 0, {name: told[name] for name in PARAMETER_NAMES})
    case = Case(
        whole=False,
        previous=None,
        protocol=protocol,
        config=config.model_copy(
            update={"search": config.search.model_copy(update={"racing": False})}
        ),
        materials=materials,
        prompts=prompts,
    )
    return Made(to_frame(judge_trials([trial], case)))
