"""Two judged trials held against each other, prompt by prompt: one table, a row per metric.

Only what is stored is read: no model is loaded and no split is opened. Both must have answered the
same prompts to the end, so that every prompt is its own control.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from artifacts.errors import ComparisonError
from artifacts.schemas import COMPARISONS, RESPONSE, polars_schema
from artifacts.store import Ref
from tasks.drift import JUDGED_ON, RESOLUTION
from tasks.numerics import paired, power
from tasks.numerics.rankings import Standing, standing
from tasks.stage import Made, current, stage

Row = dict[str, Any]
Prompt = tuple[str, str]  # class and prompt_id
Values = NDArray[np.float64]

METRICS = ("refusals", "overrefusals", "kl")  # in the strict order
MCNEMAR, PERMUTATION = "exact McNemar", "paired permutation"
GATES = "gates"
SEED, RESAMPLES = 0, 2000


@dataclass(frozen=True)
class Side:
    """Which row of an artifact of judged trials, or (arm "unedited") a whole baseline."""

    protocol: str
    arm: str
    trial: int | None

    @property
    def name(self) -> str:
        return self.arm if self.trial is None else f"{self.arm}/{self.trial}"


@dataclass(frozen=True)
class Answered:
    """One side's responses by prompt, and what the ranking knows besides."""

    side: Side
    split: str
    gated: bool
    labeller: str | None
    responses: Mapping[Prompt, Row]

    def values(self, metric: str, prompts: Sequence[Prompt]) -> Values:
        """A metric's value per prompt, 0 or 1 or nats."""
        value = JUDGED_ON[metric][1]
        return np.array([value(self.responses[prompt]) for prompt in prompts], dtype=np.float64)


@stage(
    "comparisons",
    version=1,
    identify={"of_first": asdict, "of_second": asdict},
    label=lambda of_first, of_second, **_: f"{of_first.name} against {of_second.name}",
)
def compare_trials(
    *,
    first: Ref,
    of_first: Side,
    second: Ref,
    of_second: Side,
    seed: int = SEED,
    resamples: int = RESAMPLES,
) -> Made:
    """The first against the second, metric by metric.

    Args:
        first, second: artifacts of judged trials, or a baseline.
        of_first, of_second: which of their trials.
        seed, resamples: of the bootstraps and of permutations that are too many to list.

    Raises:
        ComparisonError: they did not answer the same prompts, or were not labelled alike.
    """
    a, b = answered(first, of_first), answered(second, of_second)
    prompts = shared_prompts(a, b)
    found = [
        measured(metric, a.values(metric, part), b.values(metric, part), seed, resamples)
        for metric, part in ((m, prompts_of(m, prompts)) for m in METRICS)
        if part
    ]
    adjust(found)
    overall, decided_by = overall_of(found, (a.gated, b.gated))
    shared = {
        **{f"{name}_a": value for name, value in asdict(of_first).items()},
        **{f"{name}_b": value for name, value in asdict(of_second).items()},
        "split": a.split,
        "gated_a": a.gated,
        "gated_b": b.gated,
        "overall": overall,
        "decided_by": decided_by,
        "ahead": ahead(a, b, seed, resamples),
    }
    frame = pl.DataFrame([shared | row for row in found], schema=polars_schema(COMPARISONS))
    return Made(frame, {"overall": overall})


def answered(ref: Ref, side: Side) -> Answered:
    """What one side answered.

    Raises:
        ComparisonError: the artifact has no such trial, or it left prompts unanswered.
    """
    store = current().store
    if ref.kind == "baseline":
        rows = store.read(ref, [column.name for column in RESPONSE]).to_dicts()
        return Answered(side, "search", False, None, _by_prompt(rows))
    own = (pl.col("arm") == side.arm) & pl.col("trial").eq_missing(side.trial)
    found = store.read(ref).filter(own).to_dicts()
    if not found:
        raise ComparisonError(f"no trial '{side.name}' in '{ref.kind}/{ref.key}'")
    row = found[0]
    if row.get("stopped"):
        raise ComparisonError(
            f"trial '{side.name}' left the race early, so some prompts have no answer of it; "
            "compare trials that have a rank, or run its study with search.racing=false"
        )
    gated = row["gated"] is not False  # an unscored trial counts as gated
    return Answered(side, row["split"], gated, row["labeller"], _by_prompt(row["responses"]))


def _by_prompt(rows: Sequence[Row]) -> dict[Prompt, Row]:
    return {(row["class"], row["prompt_id"]): row for row in rows}


def shared_prompts(a: Answered, b: Answered) -> list[Prompt]:
    """The prompts that both answered, in one order.

    Raises:
        ComparisonError: one answered a prompt that the other did not, or the labellers differ.
    """
    if a.labeller and b.labeller and a.labeller != b.labeller:
        raise ComparisonError(
            f"'{a.side.name}' is labelled by '{a.labeller}' and '{b.side.name}' by "
            f"'{b.labeller}'; run both studies with one judging.labeller"
        )
    only_a, only_b = (len(x.responses.keys() - y.responses.keys()) for x, y in ((a, b), (b, a)))
    if only_a or only_b or not a.responses:
        raise ComparisonError(
            f"'{a.side.name}' and '{b.side.name}' were not judged on the same prompts "
            f"({len(a.responses) - only_a} shared, {only_a} and {only_b} only of one); compare "
            "trials of studies with the same prompt sets"
        )
    return sorted(a.responses)


def prompts_of(metric: str, prompts: Sequence[Prompt]) -> list[Prompt]:
    """The prompts that a metric is a mean over."""
    classes = JUDGED_ON[metric][0]
    return [prompt for prompt in prompts if prompt[0] in classes]


def measured(metric: str, a: Values, b: Values, seed: int, resamples: int) -> Row:
    """One metric of both sides: difference, interval, test, and what could have been found."""
    means = [math.fsum(values) / values.size for values in (a, b)]
    found: Row = {"metric": metric, "n": a.size, "a": means[0], "b": means[1]}
    if metric == "kl":
        return found | _kl(a, b, seed, resamples)
    table = paired.paired_table(a, b)
    low, high = paired.rate_interval(a, b)
    n, against = table.n, min(table.only_a, table.only_b) / table.n
    return (
        found
        | asdict(table)
        | {
            "difference": means[0] - means[1],
            "low": low,
            "high": high,
            "test": MCNEMAR,
            "p": paired.mcnemar(table),
            "detectable": power.paired_rate(n, against),
            "detectable_unpaired": power.unpaired_rate(n, means[1]),
        }
    )


def _kl(a: Values, b: Values, seed: int, resamples: int) -> Row:
    if not np.isfinite([a, b]).all():
        return {"test": f"{PERMUTATION}: not of infinite values"}
    low, high = paired.mean_interval(a, b, seed=seed, resamples=resamples)
    of_differences, of_values = paired.spread_of_pairs(a, b)
    return {
        "difference": math.fsum(a - b) / a.size,
        "low": low,
        "high": high,
        "test": PERMUTATION,
        "p": paired.permutation(a, b, seed=seed),
        "detectable": power.paired_mean(a.size, of_differences),
        "detectable_unpaired": power.unpaired_mean(a.size, of_values),
    }


def adjust(rows: Sequence[Row]) -> None:
    """Adjust the p values of one family by Holm, and give each row its verdict, in place."""
    tested = [row for row in rows if row.get("p") is not None]
    for row, adjusted in zip(tested, paired.holm([row["p"] for row in tested]), strict=True):
        row["p_holm"] = adjusted
    for row in rows:
        row["verdict"] = verdict_of(row)


def verdict_of(row: Mapping[str, Any]) -> str:
    """Better, tied or worse, of one metric."""
    if row.get("p_holm") is None:
        return paired.TIED
    return paired.verdict(
        row["difference"],
        (row["low"], row["high"]),
        row["p_holm"],
        resolution=RESOLUTION.get(row["metric"], 0.0),
    )


def overall_of(rows: Sequence[Mapping[str, Any]], gated: tuple[bool, bool]) -> tuple[str, Any]:
    """The verdict of the strict order, and what decided it: a metric, "gates", or None."""
    overall, number = paired.decide([row["verdict"] for row in rows], gated)
    if number is not None:
        return overall, rows[number]["metric"]
    return overall, None if overall == paired.TIED else GATES


def ahead(a: Answered, b: Answered, seed: int, resamples: int) -> float:
    """How often a ranks before b when their prompts are drawn again; a tie counts half."""
    wins_ties = standing_of([a, b], seed, resamples).first[0]
    wins = standing_of([b, a], seed, resamples).first[1]
    return float(wins_ties + wins) / 2


def standing_of(
    trials: Sequence[Answered], seed: int = SEED, resamples: int = RESAMPLES
) -> Standing:
    """How the ranking of trials on the same prompts fares when these are drawn again.

    Raises:
        ComparisonError: they did not answer the same prompts.
    """
    prompts = sorted(trials[0].responses)
    for other in trials[1:]:
        shared_prompts(trials[0], other)

    def table(metric: str, name: str) -> Values:
        part = [prompt for prompt in prompts if prompt[0] == name]
        values = [trial.values(metric, part) for trial in trials]
        return np.array(values).reshape(len(trials), len(part))

    return standing(
        table("refusals", "harmful"),
        [table("overrefusals", name) for name in ("harmless", "borderline")],
        table("kl", "harmless"),
        np.array([trial.gated for trial in trials]),
        seed=seed,
        resamples=resamples,
    )
