"""`tribunal study`: every benchmark of a plan, and their winners ranked together."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from flows import display
from flows.options import PairOption, SetOption, TableOrJson, has_server, open_store, unwatched

if TYPE_CHECKING:
    from artifacts.specs import Config
    from artifacts.store import Store
    from flows.pipeline import Benchmark
    from flows.study_plan import StudyPlan, StudyResult

PlanArgument = Annotated[
    str, typer.Argument(metavar="STUDY", help="name of a shipped study plan, or a TOML file")
]


def study(
    plan: PlanArgument = "ten-models",
    overrides: SetOption = None,
    form: PairOption = TableOrJson.table,
) -> None:
    """Run every config of a study plan with every arm and seed; rank the winners."""
    from flows.study_plan import MembersFailed, load_plan, said_by

    result = _execute(load_plan(plan), overrides or [], open_store())
    if form is TableOrJson.json:
        failed = {name: said_by(error) for name, error in result.failed.items()}
        answer = {"study": result.name, "leaderboard": result.leaderboard, "failed": failed}
        typer.echo(json.dumps(display.plain(answer), indent=1))
    elif result.leaderboard:
        out = display.console()
        display.heading(out, f"Winners of {result.name}, test split")
        display.print_winners(out, result.leaderboard)
    if result.failed:
        raise MembersFailed(result) from next(iter(result.failed.values()))


def _execute(plan: StudyPlan, overrides: list[str], store: Store) -> StudyResult:
    """Through Prefect if a server is configured, else in this process."""
    from flows.study_plan import MembersFailed, run_members

    if has_server():
        from flows.study import study as study_flow

        with unwatched():
            try:
                return study_flow(plan, overrides)
            except MembersFailed as error:
                return error.result
    return run_members(plan, overrides, store, lambda c: _run_here(c, store), _said)


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
