"""Damage that a first token does not show: the KL along whole responses of the unedited model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import polars as pl

from artifacts.schemas import SEQUENCE_KL, polars_schema
from artifacts.specs import Config
from artifacts.store import Ref
from tasks.numerics.along import course
from tasks.stage import Made, current, stage
from tasks.stored_trials import StoredTrial
from tasks.trials import Court, open_court

if TYPE_CHECKING:
    from tasks.models.decoding import Response

Row = dict[str, Any]


def measure_damage(stored: StoredTrial) -> Ref:
    """The KL along the responses of a stored trial's harmless search prompts, as an artifact."""
    trial = stored.trial
    return trial_sequence_kl(
        config=stored.config.model_copy(update={"model": stored.spec}),
        trial={"arm": trial.arm, "number": trial.number, "parameters": dict(trial.parameters)},
        protocol=stored.protocol,
        materials=stored.materials,
        prompts=stored.prompts,
    )


@stage(
    "sequence_kl",
    version=1,
    ignore=("config",),  # the protocol holds what of it counts
    label=lambda trial, **_: f"trial {trial['number']} along its responses",
    work=lambda **_: 1,
)
def trial_sequence_kl(
    *,
    config: Config,
    trial: Mapping[str, Any],
    protocol: Ref,
    materials: Mapping[str, Ref],
    prompts: Mapping[str, Ref],
) -> Made:
    """KL(unedited || edited) at every token of the unedited model's responses, told per prompt.

    The responses are given again, since a text does not tell its tokens for certain; how many
    differ from the stored baseline's (a tie of two tokens on another device) is in the notes.

    Raises:
        ModelError: the model cannot be loaded, or its logits are not finite.
    """
    from tasks.models.forced import forced_divergences

    court, base = open_court("search", config, protocol, materials, prompts)
    chosen = court.bench.of_class("harmless")
    responses = _unedited_responses(court, chosen)
    found = forced_divergences(
        court.bench.loaded,
        [court.bench.engine.prompts[prompt] for prompt in chosen],
        responses,
        court.edit_of(trial["parameters"]),
        rows=current().rows,
        on_progress=current().reporter.advanced,
    )
    rows = []
    for prompt, forced in zip(chosen, found, strict=True):
        told = course(forced.kl)
        rows.append(
            {
                "protocol": protocol.key,
                "arm": trial["arm"],
                "trial": trial["number"],
                "prompt_id": court.bench.prompts["prompt_id"][prompt],
                "n_tokens": forced.kl.size,
                "kl_first": told.first,
                "kl_sum": told.sum,
                "kl_mean": told.mean,
                "kl_max": told.max,
                "kl_max_at": told.max_at,
                "changed": int(forced.changed.sum()),
                "curve": list(told.curve),
            }
        )
    differ = _differ(court, chosen, responses, base.rows)
    if differ:
        current().reporter.said(f"{differ} of {len(chosen)} responses differ from the stored ones")
    return Made(pl.DataFrame(rows, schema=polars_schema(SEQUENCE_KL)), {"responses_differ": differ})


def _unedited_responses(court: Court, prompts: list[int]) -> list[Response]:
    """What the unedited model answers; kept beside it for the next trial of its study."""
    from tasks.models.decoding import Response, decode

    engine, kept = court.bench.engine, court.bench.loaded.kept
    name = court.protocol, court.prompts
    if kept.get("unedited", (None,))[0] != name:
        (said,) = decode(
            court.bench.loaded,
            [engine.prompts[prompt] for prompt in prompts],
            max_new_tokens=engine.limit,
            rows=current().rows,
        )
        answers = [Response(t, e) for t, e in zip(said.tokens, said.ended, strict=True)]
        kept["unedited"] = name, answers
    found: list[Response] = kept["unedited"][1]
    return found


def _differ(court: Court, prompts: list[int], responses: list[Response], stored: list[Row]) -> int:
    """How many responses are not those of the stored baseline."""
    known = {row["prompt_id"]: row["response"] for row in stored if row["class"] == "harmless"}
    bench = court.bench
    texts = (bench.row(p, response) for p, response in zip(prompts, responses, strict=True))
    return sum(known[row["prompt_id"]] != row["response"] for row in texts)
