"""Selection: the best trials by search meet new prompts, and one is frozen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import polars as pl

from artifacts.catalog import rank_frame
from artifacts.schemas import WINNER, polars_schema
from artifacts.specs import Config
from artifacts.store import Ref
from tasks.stage import Made, current, stage
from tasks.trials import Trial, open_court, prompts_digest, read_trials, to_frame, trial_of


@stage(
    "selections",
    version=1,
    identify={"config": lambda config: {"candidates": config.selection.candidates}},
    label=lambda **_: "selection",
    work=lambda config, **_: 1 + config.selection.candidates,
)
def select_trials(
    *,
    config: Config,
    generations: Sequence[Ref],
    protocol: Ref,
    materials: Mapping[str, Ref],
    prompts: Mapping[str, Ref],
) -> Made:
    """Judge the best trials of the search on the selection split."""
    best = rank_frame(read_trials(generations)).head(config.selection.candidates)
    court, _ = open_court("selection", config, protocol, materials, prompts)
    return Made(to_frame(court.judge([trial_of(row) for row in best.to_dicts()])))


@stage(
    "winners",
    version=1,
    ignore=("selection",),  # the first freeze of a study stands, whatever is selected later
    label=lambda **_: "winner",
)
def freeze_winner(*, protocol: Ref, test_prompts: Mapping[str, Ref], selection: Ref) -> Made:
    """Freeze the best trial of the selection split, once per study and test split.

    The selection is not part of the key: a study extended later keeps its frozen trial, because
    its test split may be opened for one trial only.
    """
    ranked = rank_frame(read_trials([selection]))
    frozen = ranked.head(1).with_columns(
        candidates=pl.lit(ranked.height, pl.Int64), prompts=pl.lit(prompts_digest(test_prompts))
    )
    schema = pl.Schema(polars_schema(WINNER))
    frame = frozen.select(schema.names()).cast(schema)
    return Made(frame, {"selection": selection.key})


def frozen_trial(winner: Ref) -> Trial:
    """The trial that is frozen."""
    return trial_of(current().store.read(winner).row(0, named=True))
