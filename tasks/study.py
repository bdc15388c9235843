"""The search: a chain of generations, each an artifact that follows from the one before.

Generation g = (protocol, g, digest of generation g-1). So a run that is killed goes on where its
chain ends, more trials lengthen the chain, and neither changes a trial.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import polars as pl

from artifacts.schemas import PROTOCOL, STUDIES, polars_schema
from artifacts.specs import Config
from artifacts.store import Ref
from tasks.history import base_outcome, told
from tasks.judging import mean_tokens, metrics
from tasks.probe import read_card
from tasks.shards import Case, judge_trials, trial_numbers
from tasks.stage import Made, stage
from tasks.trials import Trial, read_baseline, to_frame

DECIDES = ("seed", "directions", "edit", "search", "judging", "gates")


def search_identity(config: Config) -> dict[str, Any]:
    """What of a config decides a search's trials, beside the artifacts it starts from.

    Not `search.trials`: how far the chain goes changes none of its trials.
    """
    found: dict[str, Any] = config.model_dump(mode="json", include=set(DECIDES))
    del found["search"]["trials"]
    return found


@stage("protocols", version=1, identify={"config": search_identity}, label=lambda **_: "protocol")
def fix_protocol(
    *, config: Config, materials: Mapping[str, Ref], prompts: Mapping[str, Ref]
) -> Made:
    """All that decides a search, before its first trial. The artifact's key is the study's."""
    key = fix_protocol.key({"config": config, "materials": materials, "prompts": prompts})
    return Made(protocol_frame(key, config, materials))


def protocol_frame(key: str, config: Config, materials: Mapping[str, Ref]) -> pl.DataFrame:
    """The one row of a protocol of this key."""
    base = read_baseline(materials["baseline"]).rows
    found = metrics(base, mean_tokens(base), config.gates)
    row = {
        "protocol": key,
        "arm": config.arm,
        "seed": config.seed,
        "dtype": read_card(materials["model"]).dtype,
        "labeller": config.judging.labeller,
        "max_new_tokens": config.judging.max_new_tokens,
        "generation_size": config.search.generation,
        **{name: found[name] for name in ("n_harmful", "n_harmless", "n_borderline")},
        "baseline": materials["baseline"].key,
        "base_refusals": found["refusals"],
        "base_overrefusals": found["overrefusals"],
    }
    return pl.DataFrame([row], schema=polars_schema(PROTOCOL))


@stage(
    "studies",
    version=1,
    identify={"config": lambda config: config.name},
    label=lambda config, **_: f"study {config.name}",
)
def name_study(*, config: Config, protocol: Ref) -> Made:
    """A person's name for a protocol."""
    row = {
        "study": f"{config.name}-{protocol.key[:6]}",
        "name": config.name,
        "model": config.model.id,
        "protocol": protocol.key,
        "config": json.dumps(config.model_dump(mode="json"), sort_keys=True),
    }
    return Made(pl.DataFrame([row], schema=polars_schema(STUDIES)))


@stage(
    "generations",
    version=3,
    ignore=("config",),  # the protocol holds what of it counts
    label=lambda number, count, config, **_: trial_numbers(
        number * config.search.generation, count
    ),
    work=lambda count, **_: count,
)
def judge_generation(
    *,
    number: int,
    count: int,
    previous: Ref | None,
    protocol: Ref,
    config: Config,
    materials: Mapping[str, Ref],
    prompts: Mapping[str, Ref],
) -> Made:
    """Ask for `count` trials, edit, judge; the next generation is told."""
    from tasks.sampler import propose

    base = base_outcome(read_baseline(materials["baseline"]).rows, config.gates)
    proposed = propose(
        config.search,
        read_card(materials["model"]).n_layers,
        told(previous, config.search, base),
        generation=number,
        count=count,
        seed=config.seed,
    )
    first = number * config.search.generation
    trials = [
        Trial(config.search.preset, first + offset, parameters)
        for offset, parameters in enumerate(proposed)
    ]
    case = Case(
        whole=False,
        previous=previous,
        protocol=protocol,
        config=config,
        materials=materials,
        prompts=prompts,
    )
    return Made(to_frame(judge_trials(trials, case)))
