"""`tribunal study`: every benchmark of a plan, and their winners ranked together."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from flows import display
from flows.options import PairOption, SetOption, TableOrJson, has_server, open_store, unwatched

if TYPE_CHECKING:
    from rich.console import Console

    from artifacts.specs import Config
    from artifacts.store import Store
    from flows.pipeline import Benchmark
    from flows.study_plan import StudyPlan, StudyResult

Row = Mapping[str, Any]
METRICS = ("refusals", "overrefusals", "kl")

PlanArgument = Annotated[
    str, typer.Argument(metavar="STUDY", help="name of a shipped study plan, or a TOML file")
]


def study(
    plan: PlanArgument = "ten-models",
    overrides: SetOption = None,
    form: PairOption = TableOrJson.table,
) -> None:
    """Run every config of a study plan with every arm and seed; rank and compare the winners."""
    from flows.study_plan import MembersFailed, load_plan

    result = _execute(load_plan(plan), overrides or [], open_store())
    if form is TableOrJson.json:
        typer.echo(json.dumps(display.plain(as_data(result)), indent=1))
    elif result.leaderboard:
        print_result(display.console(), result)
    if result.failed:
        raise MembersFailed(result) from next(iter(result.failed.values()))


def as_data(result: StudyResult) -> dict[str, Any]:
    """A plan's outcome as one tree."""
    from flows.study_plan import said_by

    return {
        "study": result.name,
        "leaderboard": result.leaderboard,
        "matched": result.matched,
        "across_models": result.across_models,
        "budget": result.budget,
        "failed": {name: said_by(error) for name, error in result.failed.items()},
    }


def print_result(out: Console, result: StudyResult) -> None:
    """The ranking, and the tables that say what it is worth and what it cost."""
    display.heading(out, f"Winners of {result.name}, test split")
    display.print_winners(out, result.leaderboard)
    _print_standing(out, result.leaderboard)
    _print_matched(out, result.matched)
    _print_models(out, result.across_models)
    _print_budget(out, result.budget)


def _print_standing(out: Console, rows: Sequence[Row]) -> None:
    """Which winners are tied with the first, by which test."""
    if len(rows) < 2:
        return
    display.heading(out, "Against the first of the same prompts: paired tests, Holm over all")
    shown = [
        [
            str(row["rank"]),
            row["member"],
            row["against_first"] or ("not compared" if row["note"] else "first"),
            row["decided_by"] or "-",
            *(_p(row, metric) for metric in METRICS),
            _share(row["first_probability"]),
        ]
        for row in rows
    ]
    columns = ("rank", "member", "is", "by", "p refus.", "overref.", "KL", "first")
    display.print_rows(out, columns, shown)
    for row in rows:
        if row["note"]:
            out.print(Text(f"  {row['member']}: {row['note']}"))
    said = "first: how often it is, when the prompts are drawn again"
    if rows[0]["order_holds"] is not None:
        said += f"; the whole order holds in {_share(rows[0]['order_holds'])}"
    out.print(Text(said, style="dim"))


def _p(row: Row, metric: str) -> str:
    from flows.comparing import p_text

    return p_text((row["p_holm"] or {}).get(metric))


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f} %"


def _print_matched(out: Console, rows: Sequence[Row]) -> None:
    """What each search had to offer at the others' KL and refusals."""
    if len(rows) < 2:
        return
    display.heading(out, "At matched KL and at matched refusals: all ungated trials, search split")
    shown = [
        [
            row["member"] if not number else "",
            f"{row['hypervolume']:.4f}" if not number and row["hypervolume"] is not None else "",
            *_matched_cells(row["at_kl"], number, "kl", "fewest_refusals"),
            *_matched_cells(row["at_refusals"], number, "refusals", "least_kl"),
        ]
        for row in rows
        for number in range(max(len(row["at_kl"]), len(row["at_refusals"]), 1))
    ]
    columns = ("member", "hypervolume", "KL <=", "refusals", "refusals <=", "KL")
    display.print_rows(out, columns, shown)
    limit = max(row["reference"]["kl"] for row in rows)
    said = f"hypervolume: of refusal rate and KL, as a fraction of (1, {limit:g} nats); -: none"
    out.print(Text(said, style="dim"))


def _matched_cells(found: Sequence[Row], number: int, at: str, value: str) -> list[str]:
    if number >= len(found):
        return ["", ""]
    point = found[number]
    return [
        "-" if cell is None else display.number(cell) if isinstance(cell, float) else str(cell)
        for cell in (point[at], point[value])
    ]


def _print_models(out: Console, rows: Sequence[Row]) -> None:
    """Every pair of arms over the models of the plan."""
    for row in rows:
        from flows.comparing import p_text

        models = len(row["models"])
        display.heading(out, f"{row['a']} against {row['b']} over {models} models")
        out.print(
            Text(
                f"  strict order: {row['wins']} wins, {row['ties']} ties, {row['losses']} losses; "
                f"sign test p = {p_text(row['sign_test_p'])}"
            )
        )
        shown = [
            [
                m["metric"],
                f"{m['mean']:+.3g}",
                "-" if m["interval"] is None else "{:+.3g} to {:+.3g}".format(*m["interval"]),
                p_text(m["p"]),
                p_text(m["least_p"]),
            ]
            for m in row["metrics"]
        ]
        columns = ("metric", "mean difference", "95 %, Student's t", "signed-rank p", "least p")
        display.print_rows(out, columns, shown)


def _print_budget(out: Console, rows: Sequence[Row]) -> None:
    """What every member cost."""
    display.heading(out, "Budget, from the manifests")
    shown = [
        [
            row["member"],
            f"{row['trials']} ({row['stopped']})",
            f"{row['tokens_judged']:,}",
            f"{row['tokens_generated']:,}",
            f"{row['seconds']:,.1f}",
            f"{row['seconds_shared']:,.1f}",
        ]
        for row in rows
    ]
    columns = ("member", "trials (stopped)", "tokens", "generated", "seconds", "shared")
    display.print_rows(out, columns, shown)


def _execute(plan: StudyPlan, overrides: list[str], store: Store) -> StudyResult:
    """Through Prefect if a server is configured, else in this process."""
    from artifacts.catalog import write_database
    from flows.logs import with_log
    from flows.settings import Settings
    from flows.study_plan import MembersFailed, run_members

    if has_server():
        from flows.study import study as study_flow

        with unwatched():
            try:
                return study_flow(plan, overrides)
            except MembersFailed as error:
                return error.result
    log = with_log(Settings.from_environment().log, store, study=plan.name)
    result = run_members(plan, overrides, store, lambda c: _run_here(c, store), _said, log)
    if result.finished:
        write_database(store)
    return result


def _run_here(config: Config, store: Store) -> Benchmark:
    from flows.in_process import run_here
    from flows.pipeline import check_prompts, run_pipeline
    from tasks.stage import planning

    with planning(store) as steps:
        run_pipeline(config)
    check_prompts(config, store)
    return run_here(config, store, sum(step.work for step in steps if not step.cached))


def _said(line: str) -> None:
    display.console(stderr=True).print(line, markup=False, soft_wrap=True)
