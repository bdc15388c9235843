"""A study plan: models x arms x seeds, each member a benchmark, their winners ranked together.

Members run one after another, the arms of a model beside each other, so that the store answers for
what they share. A member that fails is reported and costs the others nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import polars as pl
from pydantic import AfterValidator, Field, ValidationError

from artifacts.catalog import rank_frame
from artifacts.errors import ConfigError, TribunalError, one_line
from artifacts.specs import Config, ExplicitSpec, Name, ParameterSet, Seed, Spec
from artifacts.store import Store
from flows.display import CONTROLS
from flows.pipeline import Benchmark, run_pipeline, title
from flows.settings import explain, find_file, load_config, read_toml, shipped
from flows.study_statistics import (
    StatisticsSpec,
    budgets,
    matched,
    models_as_sample,
    with_standing,
)
from tasks.stage import Reporter, Runtime, Silent, planning, running

COLUMNS = (
    "rank", "member", "study", "arm", "trial", "n_harmful", "refusals", "n_harmless",
    "n_borderline", "overrefusals", "kl", "gated", "gate_reason", "unedited_refusals",
    "unedited_overrefusals", "prompts",
)  # fmt: skip


Row = dict[str, Any]


def _distinct(values: tuple[Any, ...]) -> tuple[Any, ...]:
    if len(set(values)) < len(values):
        raise ValueError("one of them is listed twice")
    return values


class GivenSet(ParameterSet):
    """One trial's parameters, and the preset that says all else: directions, edit, judging."""

    preset: str = "strict"

    def under(self, name: str) -> ExplicitSpec:
        """The set as an arm of this name."""
        given = self.model_dump(exclude={"preset"})
        return ExplicitSpec(name=name, parameters=ParameterSet(**given))


class StudyPlan(Spec):
    """Which benchmarks belong together: every config with every arm and every seed."""

    name: Name
    configs: Annotated[tuple[str, ...], Field(min_length=1), AfterValidator(_distinct)] = Field(
        description="shipped names, or TOML files; a relative path starts at the plan's folder"
    )
    arms: Annotated[tuple[str, ...], Field(min_length=1), AfterValidator(_distinct)] = Field(
        description="presets, or names of explicit sets"
    )
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1), AfterValidator(_distinct)] = Field(
        (0,), description="of the searches; an explicit set is judged once, with the first of them"
    )
    sets: Mapping[Name, GivenSet] = Field({}, description="explicit sets: trials without a search")
    statistics: StatisticsSpec = StatisticsSpec()


@dataclass(frozen=True)
class Member:
    """One benchmark of a plan."""

    name: str
    config: Config


@dataclass(frozen=True)
class StudyResult:
    """What came of a plan: the members that finished, their ranking, and why the others did not.

    Attributes:
        leaderboard: COLUMNS, and what `study_statistics.with_standing` adds.
        matched, across_models, budget: rows of `flows.study_statistics`.
    """

    name: str
    finished: Mapping[str, Benchmark]
    leaderboard: list[Row]
    failed: Mapping[str, Exception]
    matched: list[Row] = field(default_factory=list)
    across_models: list[Row] = field(default_factory=list)
    budget: list[Row] = field(default_factory=list)


class MembersFailed(TribunalError):
    """Some members of a plan failed; `result` holds what the others made."""

    def __init__(self, result: StudyResult) -> None:
        reasons = "; ".join(f"{name}: {said_by(error)}" for name, error in result.failed.items())
        count = f"{len(result.failed)} of {len(result.failed) + len(result.finished)}"
        super().__init__(f"{count} members of '{result.name}' failed: {reasons}")
        self.result = result


def load_plan(name: str) -> StudyPlan:
    """The plan of a shipped name or a TOML path.

    Raises:
        ConfigError: no such plan, an unknown key, a wrong type or value.
    """
    known = shipped("studies")
    file = find_file(name, known)
    if file is None:
        raise ConfigError.unknown("study", name, known)
    try:
        plan = StudyPlan.model_validate(read_toml(file))
    except ValidationError as error:
        raise explain(error, name, StudyPlan) from error
    return plan.model_copy(update={"configs": [_beside(file, c) for c in plan.configs]})


def _beside(file: Path, config: str) -> str:
    return str(file.parent / config) if config.endswith(".toml") else config


def members_of(plan: StudyPlan, overrides: Sequence[str] = ()) -> list[Member]:
    """Every member of a plan, the members of one model beside each other.

    Args:
        plan: the plan.
        overrides: fields to change in every config, as in "search.trials=96".

    Raises:
        ConfigError: a config or an arm does not exist, or is not valid.
    """
    _refuse_misnamed(plan)
    members = []
    for config, arm in product(plan.configs, plan.arms):
        for found in _of_arm(plan, config, arm, overrides):
            members.append(Member(title(found), found))
    for name, count in Counter(member.name for member in members).items():
        if count > 1:
            raise ConfigError(f"{count} members of the study are '{name}'; give each its own name")
    return members


def _refuse_misnamed(plan: StudyPlan) -> None:
    """A set is an arm under a name of its own."""
    for name in plan.sets:
        if name in shipped("presets") or name in CONTROLS:
            raise ConfigError(f"the set '{name}' has the name of a preset or control; rename it")
        if name not in plan.arms:
            raise ConfigError(f"the set '{name}' is no arm; add it to arms, or leave it out")


def _of_arm(plan: StudyPlan, config: str, arm: str, overrides: Sequence[str]) -> Iterator[Config]:
    """The configs of one arm: a search per seed, or one explicit trial."""
    given = plan.sets.get(arm)
    preset, seeds = (given.preset, plan.seeds[:1]) if given else (arm, plan.seeds)
    for seed in seeds:
        found = load_config(config, (f"search.preset={preset}", f"seed={seed}", *overrides))
        yield found.model_copy(update={"explicit": given.under(arm)}) if given else found


def run_members(
    plan: StudyPlan,
    overrides: Sequence[str],
    store: Store,
    run: Callable[[Config], Benchmark],
    said: Callable[[str], None],
    reporter: Reporter | None = None,
) -> StudyResult:
    """Run every member of a plan with `run`; tell `said` which one it is and if it fails.

    `reporter` is told of the comparisons between winners.

    Raises:
        ConfigError: a member's config is not valid; then none is run.
    """
    finished: dict[str, Benchmark] = {}
    failed: dict[str, Exception] = {}
    members = members_of(plan, overrides)
    for number, member in enumerate(members, 1):
        said(f"{member.name}, {number} of {len(members)}")
        try:
            finished[member.name] = run(member.config)
        except Exception as error:  # noqa: BLE001 - whatever fails a member, the next ones run
            failed[member.name] = error
            said(f"{member.name} failed: {said_by(error)}")
    left = [member for member in members if member.name in finished]
    if not left:
        return StudyResult(plan.name, {}, [], failed)
    with running(Runtime(store, reporter or Silent())):
        ranked = with_standing(plan.statistics, _rank(store, left, finished), finished)
    return StudyResult(
        plan.name,
        finished,
        ranked,
        failed,
        matched=matched(plan.statistics, store, left, finished),
        across_models=models_as_sample(ranked, left),
        budget=budgets(store, left, finished),
    )


def stored_member(config: Config, store: Store) -> Benchmark:
    """What the store holds of a member; runs nothing. A way to `run` for `run_members`.

    Raises:
        ConfigError: it is not finished.
    """
    with planning(store) as steps:
        found = run_pipeline(config)
    missing = sum(not step.cached for step in steps)
    if missing:
        raise ConfigError(f"not run to its end: {missing} of {len(steps)} artifacts are missing")
    return found


def said_by(error: Exception) -> str:
    """An error in one line without secrets; one that is not ours is named."""
    words = one_line(" ".join(str(error).split()))
    return words if isinstance(error, TribunalError) else f"{type(error).__name__}: {words}"


def _rank(store: Store, members: Sequence[Member], finished: Mapping[str, Benchmark]) -> list[Row]:
    """The winners of the members on the test split in the strict order, per set of prompts."""
    rows = pl.concat([_winner(store, member, finished[member.name]) for member in members])
    ranked = rank_frame(rows).drop("study").rename({"study_name": "study"})
    return ranked.select(COLUMNS).to_dicts()


def _winner(store: Store, member: Member, found: Benchmark) -> pl.DataFrame:
    """The row of a member's winner, beside what the unedited model does."""
    tested = store.read(found.test).drop("responses")
    unedited = tested.row(by_predicate=pl.col("arm") == "unedited", named=True)
    study = store.read(found.study, ["study"]).item()
    return tested.filter(arm=member.config.arm).with_columns(
        protocol=pl.lit("all"),  # what rank_frame ranks apart: here nothing but the prompts
        study_name=pl.lit(study),
        member=pl.lit(member.name),
        unedited_refusals=pl.lit(unedited["refusals"]),
        unedited_overrefusals=pl.lit(unedited["overrefusals"]),
    )
