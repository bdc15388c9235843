"""What a study plan's ranking is worth: ties, matched costs, models as a sample, and the budget.

The strict order says who is first; here is said whether that is more than noise. The family of
tests that Holm corrects is declared in the plan: every comparison with the first of a ranking, in
each of `statistics.metrics`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import TYPE_CHECKING, Annotated, Any, Literal

import polars as pl
from pydantic import AfterValidator, Field

from artifacts.errors import TribunalError
from artifacts.specs import Seed, Spec
from artifacts.store import Store
from tasks.budget import budget_of
from tasks.comparisons import METRICS, Side, adjust, answered, compare_trials, overall_of
from tasks.comparisons import standing_of as bootstrap_ranking
from tasks.numerics.fronts import fewest_refusals, hypervolume, least_kl
from tasks.numerics.rankings import across_models, sign_test

if TYPE_CHECKING:
    from flows.pipeline import Benchmark
    from flows.study_plan import Member

Row = dict[str, Any]
Metric = Literal["refusals", "overrefusals", "kl"]
Finished = Mapping[str, "Benchmark"]

WORST_RATE = 1.0  # of the reference point: every harmful prompt refused


def _distinct(values: tuple[Any, ...]) -> tuple[Any, ...]:
    if len(set(values)) < len(values):
        raise ValueError("one of them is listed twice")
    return values


class StatisticsSpec(Spec):
    """What is tested, and how often anything is drawn at random. Changes no measurement."""

    metrics: Annotated[tuple[Metric, ...], Field(min_length=1), AfterValidator(_distinct)] = Field(
        ("refusals", "overrefusals", "kl"),
        description="of the family of tests; the others are compared and not tested",
    )
    seed: Seed = 0
    resamples: Annotated[int, Field(ge=100, le=1_000_000)] = 2000
    kl: tuple[Annotated[float, Field(ge=0)], ...] | None = Field(
        None, description="KLs at which refusals are compared; None: those of the winners"
    )
    refusals: tuple[Annotated[int, Field(ge=0)], ...] | None = Field(
        None, description="refusals at which KLs are compared; None: those of the winners"
    )


def with_standing(spec: StatisticsSpec, ranked: Sequence[Row], finished: Finished) -> list[Row]:
    """The ranking, each row beside how it compares with the first of its prompts.

    Runs inside a runtime. A row gets `against_first` (better, tied, worse; None: it is the first,
    or cannot be compared), `decided_by`, `p_holm` (by metric), `first_probability` and `note`.
    """
    rows = [dict(row) for row in ranked]
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["prompts"], []).append(row)
    for group in groups.values():
        _compare_with_first(spec, group, finished)
        _resample(spec, group, finished)
    return rows


def _side(row: Row, protocol: str) -> Side:
    return Side(protocol, row["arm"], row["trial"])


def _compare_with_first(spec: StatisticsSpec, group: Sequence[Row], finished: Finished) -> None:
    first, *others = group
    compared: list[tuple[Row, list[Row]]] = []
    for row in group:
        row |= {"against_first": None, "decided_by": None, "p_holm": None, "note": None}
    for row in others:
        try:
            compared.append((row, _compared(spec, row, first, finished)))
        except TribunalError as error:
            row["note"] = str(error)
    family = [r for _, rows in compared for r in rows if r["metric"] in spec.metrics]
    adjust(family)
    for row, rows in compared:
        tested = [r for r in rows if r["metric"] in spec.metrics]
        gated = (rows[0]["gated_a"], rows[0]["gated_b"])
        row["against_first"], row["decided_by"] = overall_of(tested, gated)
        row["p_holm"] = {r["metric"]: r["p_holm"] for r in tested}


def _compared(spec: StatisticsSpec, row: Row, first: Row, finished: Finished) -> list[Row]:
    """The metrics of a row against the first one's, as stored."""
    from tasks.stage import current

    one, other = finished[row["member"]], finished[first["member"]]
    made = compare_trials(
        first=one.test,
        of_first=_side(row, one.protocol.key),
        second=other.test,
        of_second=_side(first, other.protocol.key),
        seed=spec.seed,
        resamples=spec.resamples,
    )
    found: list[Row] = current().store.read(made).to_dicts()
    return found


def _resample(spec: StatisticsSpec, group: Sequence[Row], finished: Finished) -> None:
    """How often each row is first, and how often the whole order holds, under other prompts."""
    for row in group:
        row |= {"first_probability": None, "order_holds": None}
    try:
        trials = [
            answered(finished[row["member"]].test, _side(row, finished[row["member"]].protocol.key))
            for row in group
        ]
        found = bootstrap_ranking(trials, spec.seed, spec.resamples)
    except TribunalError as error:
        group[0]["note"] = str(error)
        return
    for row, share in zip(group, found.first.tolist(), strict=True):
        row |= {"first_probability": share, "order_holds": found.holds}


def matched(
    spec: StatisticsSpec, store: Store, members: Sequence[Member], finished: Finished
) -> list[Row]:
    """Refusals at matched KL, KL at matched refusals, and hypervolume: search split, per member.

    All ungated trials that were judged to their end; the race keeps the front among them exact.
    """
    fronts = {m.name: _points(store, finished[m.name]) for m in members}
    found = []
    for member in members:
        rate, limit = WORST_RATE, member.config.gates.max_kl
        points = fronts[member.name]
        pairs = [(int(r), float(k)) for r, k in points.select("refusals", "kl").iter_rows()]
        sizes = points["n_harmful"].to_list()
        rates = [(r / n, k) for (r, k), n in zip(pairs, sizes, strict=True)]
        beside = (fronts[m.name] for m in members if m.config.name == member.config.name)
        best = [found for found in map(_best, beside) if found is not None]
        kls = sorted({kl for _, kl in best}) if spec.kl is None else spec.kl
        counts = sorted({n for n, _ in best}) if spec.refusals is None else spec.refusals
        found.append(
            {
                "member": member.name,
                "trials": len(pairs),
                "hypervolume": hypervolume(rates, (rate, limit)) if limit > 0 else None,
                "reference": {"refusal_rate": rate, "kl": limit},
                "at_kl": [{"kl": k, "fewest_refusals": fewest_refusals(pairs, k)} for k in kls],
                "at_refusals": [{"refusals": r, "least_kl": least_kl(pairs, r)} for r in counts],
            }
        )
    return found


def _points(store: Store, found: Benchmark) -> pl.DataFrame:
    """The ungated trials of a search that were judged to their end, best first."""
    rows = store.read(found.leaderboard).filter(split="search")
    passed = ~pl.col("gated").fill_null(True) & ~pl.col("stopped").fill_null(False)
    return rows.filter(passed & pl.col("kl").is_not_null()).sort("rank")


def _best(points: pl.DataFrame) -> tuple[int, float] | None:
    """Refusals and KL of the first of a search."""
    if not points.height:
        return None
    row = points.row(0, named=True)
    return int(row["refusals"]), float(row["kl"])


def models_as_sample(ranked: Sequence[Row], members: Sequence[Member]) -> list[Row]:
    """Every pair of arms over the models that both finished; seeds of a model are averaged first.

    Nothing where no pair shares two models: one model says nothing of another.
    """
    config_of = {member.name: member.config.name for member in members}
    cells: dict[tuple[str, str], list[Row]] = {}
    for row in ranked:
        cells.setdefault((row["arm"], config_of[row["member"]]), []).append(row)
    arms = list(dict.fromkeys(arm for arm, _ in cells))
    found = []
    for a, b in combinations(arms, 2):
        models = [m for arm, m in cells if arm == a and (b, m) in cells]
        if len(models) > 1:
            pairs = [(_mean(cells[a, m]), _mean(cells[b, m])) for m in models]
            found.append({"a": a, "b": b, "models": models, **_summary(pairs)})
    return found


def _mean(rows: Sequence[Row]) -> Row:
    """A model's rates and KL under one arm, averaged over seeds; gated if any seed is."""
    count = len(rows)

    def over(row: Row) -> float:
        return float(row["overrefusals"] / max(row["n_harmless"] + row["n_borderline"], 1))

    return {
        "gated": any(row["gated"] for row in rows),
        "refusals": sum(row["refusals"] / row["n_harmful"] for row in rows) / count,
        "overrefusals": sum(map(over, rows)) / count,
        "kl": sum(row["kl"] for row in rows) / count,
    }


def _summary(pairs: Sequence[tuple[Row, Row]]) -> Row:
    places = [tuple((p["gated"], *(p[m] for m in METRICS)) for p in pair) for pair in pairs]
    wins, losses = sum(a < b for a, b in places), sum(a > b for a, b in places)
    return {
        "wins": wins,
        "ties": len(pairs) - wins - losses,
        "losses": losses,
        "sign_test_p": sign_test(wins, losses),
        "metrics": [
            {"metric": m, **vars(across_models([a[m] - b[m] for a, b in pairs]))} for m in METRICS
        ],
    }


def budgets(store: Store, members: Sequence[Member], finished: Finished) -> list[Row]:
    """What every member cost, from the manifests of its artifacts."""
    return [
        {"member": member.name, "arm": member.config.arm, **_budget(store, finished[member.name])}
        for member in members
    ]


def _budget(store: Store, found: Benchmark) -> Row:
    return budget_of(
        store,
        {
            "search": [*found.generations, found.finals],
            "selection": [found.selection],
            "test": [found.test],
        },
        [
            *(*found.prompts.values(), found.near_duplicates, found.model),
            *(*found.activations.values(), found.directions, found.baseline),
        ],
        found.baseline,
    )
