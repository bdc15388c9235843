"""Trials as rows: parameters to edits, answers to rows, rows back to trials.

A row alone rebuilds its edit: it holds every parameter, the key of its directions, and how they
are projected is part of its protocol.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import polars as pl

from artifacts.errors import ModelError
from artifacts.keys import digest
from artifacts.schemas import trial_schema
from artifacts.specs import COMPONENTS, Config, DirectionSpec, EditSpec, GatesSpec
from artifacts.store import Ref
from tasks.directions import read_directions
from tasks.hearing import Answers, Lost, answer, hear
from tasks.history import PARAMETER_NAMES
from tasks.judging import Bench, Row, bounds, mean_tokens, metrics, set_up, trial_edit
from tasks.numerics.objective import Outcome
from tasks.probe import open_model, read_card
from tasks.stage import current

if TYPE_CHECKING:
    import torch

    from tasks.models.editing import Edit


TRIAL_KEY = ["protocol", "arm", "trial", "split", "prompts"]


@dataclass(frozen=True)
class Trial:
    """One edit on trial: who asks for it, under which number, with which parameters."""

    arm: str
    number: int | None
    parameters: Mapping[str, Any]


@dataclass(frozen=True)
class Court:
    """All that is needed to judge trials of one study on one split."""

    protocol: str
    split: str
    prompts: str
    bench: Bench
    base_logits: torch.Tensor
    base_mean_tokens: float
    directions: Ref
    direction_spec: DirectionSpec
    edit: EditSpec
    gates: GatesSpec

    def edit_of(self, parameters: Mapping[str, Any]) -> Edit:
        """The edit of a trial's parameters."""
        try:
            vectors = component_directions(self.directions, parameters, self.direction_spec)
            return trial_edit(self.bench, vectors, parameters, self.edit)
        except ValueError as error:
            raise ModelError(f"a trial's edit cannot be made: {error}") from error

    def judge(
        self,
        trials: Sequence[Trial],
        lost: Lost | None = None,
        recalled: Sequence[Mapping[int, Row]] | None = None,
        edits: Sequence[Edit] | None = None,
    ) -> list[Row]:
        """A row per trial; a trial that is `lost` is stopped, and its row says so.

        `recalled`: what each trial answered before, by prompt; `edits`: default: the trials' own.
        """
        hearings = hear(
            self.bench,
            edits or [self.edit_of(trial.parameters) for trial in trials],
            self.base_logits,
            max_kl=self.gates.max_kl,
            lost=lost,
            recalled=recalled,
            on_progress=current().reporter.advanced,
        )
        return [
            self.row(
                trial,
                hearing.rows(),
                hearing.range_of_outcomes(self.gates.max_kl)[0] if hearing.stopped else None,
            )
            for trial, hearing in zip(trials, hearings, strict=True)
        ]

    def row(self, trial: Trial, answers: Sequence[Row], at_best: Outcome | None = None) -> Row:
        """The trial-table row of a trial and its answers; `at_best`: what is known if stopped."""
        found = (
            metrics(answers, self.base_mean_tokens, self.gates)
            if at_best is None
            else bounds(answers, at_best, self.gates)
        )
        return {
            "protocol": self.protocol,
            "arm": trial.arm,
            "trial": trial.number,
            "split": self.split,
            "prompts": self.prompts,
            **found,
            "stopped": at_best is not None,
            "labeller": self.bench.judging.labeller,
            **{name: trial.parameters.get(name) for name in PARAMETER_NAMES},
            "row_normalization": self.edit.row_normalization,
            "frame": self.edit.frame,
            "directions": self.directions.key,
            "responses": answers,
        }


def open_court(
    split: str,
    config: Config,
    protocol: Ref,
    materials: Mapping[str, Ref],
    prompts: Mapping[str, Ref],
) -> tuple[Court, Answers]:
    """A court for one split, and the unedited model's answers there (stored, or given now).

    A search asks for the same one again and again, so that one is kept beside its model. A protocol
    holds all that a court of its search is made of.
    """
    if split != "search":
        return _open_court(split, config, protocol, materials, prompts)
    loaded, runtime = open_model(config.model, [read_card(materials["model"]).dtype]), current()
    name = [protocol.key, prompts_digest(prompts), repr(runtime.engine), runtime.rows]
    if loaded.kept.get("court", ([],))[0] != name:
        court = _open_court(split, config, protocol, materials, prompts)
        loaded.kept["court"] = name, court
    opened: tuple[Court, Answers] = loaded.kept["court"][1]
    return opened


def _open_court(
    split: str,
    config: Config,
    protocol: Ref,
    materials: Mapping[str, Ref],
    prompts: Mapping[str, Ref],
) -> tuple[Court, Answers]:
    bench = set_up(config.model, materials["model"], prompts, config.judging)
    known = materials.get("baseline") if split == "search" else None
    base = read_baseline(known) if known else answer(bench)
    court = Court(
        protocol=protocol.key,
        split=split,
        prompts=prompts_digest(prompts),
        bench=bench,
        base_logits=base.first_logits,
        base_mean_tokens=mean_tokens(base.rows),
        directions=materials["directions"],
        direction_spec=config.directions,
        edit=config.edit,
        gates=config.gates,
    )
    return court, base


def prompts_digest(prompts: Mapping[str, Ref]) -> str:
    """What identifies the prompt sets of a split, whatever they are called."""
    return digest(sorted(ref.digest for ref in prompts.values()))[:12]


def read_baseline(baseline: Ref) -> Answers:
    """The stored answers of the unedited model, read once: nobody writes into them."""
    return _read_baseline(baseline)


@lru_cache(maxsize=2)
def _read_baseline(baseline: Ref) -> Answers:
    import torch

    frame = current().store.read(baseline)
    logits = frame.filter(pl.col("class") == "harmless")["first_logits"].to_list()
    return Answers(frame.drop("first_logits").to_dicts(), torch.tensor(logits))


def component_directions(
    directions: Ref, parameters: Mapping[str, Any], spec: DirectionSpec
) -> dict[str, torch.Tensor]:
    """Each component's direction per layer, [layers, hidden_size]."""
    from tasks.numerics.directions import trial_directions

    states = read_directions(directions)

    def own(component: str, name: str) -> Any:
        value = parameters.get(f"{component}_direction_{name}")
        return parameters[f"direction_{name}"] if value is None else value

    return {
        component: trial_directions(
            states,
            scope=own(component, "scope"),
            index=parameters["direction_index"],
            method=own(component, "method"),
            blend=own(component, "blend"),
            orthogonalize=spec.orthogonalize,
            projection=spec.projection,
            benign_subspace_strength=spec.benign_subspace_strength,
        )
        for component in COMPONENTS
    }


def to_frame(rows: Sequence[Row]) -> pl.DataFrame:
    """Trial rows as a typed table."""
    return pl.DataFrame(list(rows), schema=trial_schema())


def trial_of(row: Mapping[str, Any]) -> Trial:
    """The trial of a stored row."""
    return Trial(row["arm"], row["trial"], {name: row[name] for name in PARAMETER_NAMES})


def read_trials(refs: Sequence[Ref]) -> pl.DataFrame:
    """Trial tables without their responses; of a trial that the finals heard, that row alone."""
    store = current().store
    table = pl.concat([store.read(ref).drop("responses") for ref in refs])
    stopped = pl.col("stopped").fill_null(False)
    ended = table.filter(~stopped)
    left = table.filter(stopped).join(ended, on=TRIAL_KEY, how="anti", nulls_equal=True)
    return pl.concat([ended, left])
