"""A study plan as a Prefect flow: every member a run of the benchmark flow, one ranking of all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prefect import flow, get_run_logger
from prefect.artifacts import create_table_artifact
from prefect.runtime import flow_run

from artifacts.catalog import write_database
from flows.benchmark import benchmark
from flows.logs import with_log
from flows.settings import Settings
from flows.study_plan import (
    MembersFailed,
    StudyPlan,
    StudyResult,
    load_plan,
    run_members,
    said_by,
)
from tasks.comparisons import METRICS


def run_name() -> str:
    """The plan's name, for the list of runs."""
    plan = flow_run.parameters["plan"]
    return plan if isinstance(plan, str) else str(plan.name)


@flow(name="study", flow_run_name=run_name, persist_result=False)
def study(plan: str | StudyPlan = "ten-models", overrides: list[str] | None = None) -> StudyResult:
    """Run every benchmark of a plan and rank the winners on the test split.

    Args:
        plan: a shipped name, the path of a TOML file, or a whole plan.
        overrides: fields to change in every config, as in "search.trials=96".

    Returns:
        What every member made, and the ranking.

    Raises:
        ConfigError: plan or config are not valid; nothing was run.
        MembersFailed: some members failed; the others are stored and ranked all the same.
    """
    resolved = load_plan(plan) if isinstance(plan, str) else plan
    settings = Settings.from_environment()
    store = settings.open_store()
    log = with_log(settings.log, store, study=resolved.name, flow_run=str(flow_run.id))
    said = get_run_logger().info
    result = run_members(resolved, overrides or (), store, benchmark, said, log)
    if result.finished:
        write_database(store)
    publish(result)
    if result.failed:
        raise MembersFailed(result)
    return result


def publish(result: StudyResult) -> None:
    """Show the ranking in Prefect's UI, and what is missing from it."""
    missing = [f"- {name} failed: {said_by(error)}" for name, error in result.failed.items()]
    said = [f"# Winners of {result.name} on the test split", "", *missing]
    create_table_artifact(
        table=[_cells(row) for row in result.leaderboard],
        key=f"{result.name.replace('.', '-')}-study",
        description="\n".join(said),
    )


def _cells(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of the ranking as cells: the p values a column each."""
    p = {f"p_{metric}": (row["p_holm"] or {}).get(metric) for metric in METRICS}
    return {k: v for k, v in row.items() if k != "p_holm"} | {"kl": round(row["kl"], 6)} | p
