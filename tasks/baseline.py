"""The unedited model on the search split: what every trial is compared with."""

from __future__ import annotations

from collections.abc import Mapping

import polars as pl

from artifacts.schemas import BASELINE, polars_schema
from artifacts.specs import JudgingSpec, ModelSpec
from artifacts.store import Ref
from tasks.hearing import answer
from tasks.judging import set_up
from tasks.stage import Made, current, stage


@stage(
    "baseline",
    version=2,
    ignore=("spec",),
    label=lambda **_: "unedited model, search split",
    work=lambda **_: 1,
)
def measure_baseline(
    *, spec: ModelSpec, model: Ref, prompts: Mapping[str, Ref], judging: JudgingSpec
) -> Made:
    """The unedited model's answers, with the raw logits of their first token."""
    answers = answer(set_up(spec, model, prompts, judging), None, current().reporter.advanced)
    logits = iter(answers.first_logits.tolist())
    rows = [
        row | {"first_logits": next(logits) if row["class"] == "harmless" else None}
        for row in answers.rows
    ]
    return Made(pl.DataFrame(rows, schema=polars_schema(BASELINE)))
