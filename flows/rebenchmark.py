"""The frozen winners of past studies as a Prefect flow: measured again when something has changed.

Its exit state and its events are made for schedules and automations (docs/rebenchmark.md).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from prefect import State, flow
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.events import emit_event
from prefect.runtime import flow_run
from prefect.states import Completed, Failed

from artifacts.catalog import write_database
from flows.drift import Outcome, check_winners, occasion_of, winners_to_check
from flows.flow_reports import FlowLog
from flows.logs import with_log
from flows.settings import Settings
from tasks.drift import GATED, LOST

EVENT = "tribunal.winner."
COLUMNS = ("study", "trial", "metric", "before", "after", "difference", "low", "high", "change")


@flow(name="rebenchmark", persist_result=False)
def rebenchmark(
    studies: list[str] | None = None, force: bool = False, occasion: str | None = None
) -> State[list[Outcome]]:
    """Measure frozen winners again where something that matters has changed, and say what drifted.

    Args:
        studies: studies by name; none: every study with a tested winner.
        force: measure all of them, although nothing changed.
        occasion: why, kept with the measurement; the same words twice are one measurement.
            Implies `force`; default with `force`: the time.

    Returns:
        Completed, named "Unchanged" where all is as it was; Failed, named "Drifted" where a winner
        lost its place or a gate tripped, or "Unmeasured" where a study could not be measured.

    Raises:
        ConfigError: no such study, or no winner at all.
    """
    settings = Settings.from_environment()
    store = settings.open_store()
    reporter = with_log(settings.log, store, FlowLog(store), flow_run=str(flow_run.id))
    winners = winners_to_check(store, studies)
    with settings.running(store, reporter):
        outcomes = check_winners(winners, occasion_of(force, occasion))
    write_database(store)
    create_table_artifact(table=table_of(outcomes), key="drift", description="# Drift of winners")
    create_markdown_artifact(summary_of(outcomes), key="drift-summary")
    for outcome in outcomes:
        for name, payload in events_of(outcome):
            emit_event(EVENT + name, resource=resource_of(outcome), payload=payload)
    return state_of(outcomes)


def state_of(outcomes: Sequence[Outcome]) -> State[list[Outcome]]:
    """The exit state: what an automation or the exit code of a run goes by."""
    told = list(outcomes)
    broken = [f"{o.study}: {o.verdict}" for o in told if not o.holds]
    if any(o.error is None for o in told if not o.holds):
        return Failed(name="Drifted", message="; ".join(broken), data=told)
    if broken:
        errors = [f"{o.study}: {o.error}" for o in told if o.error]
        return Failed(name="Unmeasured", message="; ".join(errors), data=told)
    if all(o.unchanged for o in told):
        return Completed(name="Unchanged", message=f"winners unchanged: {len(told)}", data=told)
    said = [f"{o.study}: {o.verdict}" for o in told if not o.unchanged]
    return Completed(message="; ".join(said), data=told)


def resource_of(outcome: Outcome) -> dict[str, str]:
    """The study as a resource of events. "news" is false where an earlier run said the same."""
    return {
        "prefect.resource.id": f"tribunal.study.{outcome.study}",
        "prefect.resource.name": outcome.study,
        "tribunal.news": str(outcome.news).lower(),
    }


def events_of(outcome: Outcome) -> list[tuple[str, dict[str, Any]]]:
    """Names, without their common beginning, and payloads of what to tell of a winner."""
    if outcome.error or outcome.drift is None:
        return []
    found = outcome.winner
    names = ("trial", "verdict", "cause", "place_before", "place_after", "candidates")
    payload = {name: found[name] for name in names} | {
        "gate_reason": found["gate_reason"],
        "artifact": f"{outcome.drift.kind}/{outcome.drift.key}",
        "drifted": [metric_of(row) for row in outcome.drifted],
    }
    happened = {
        "lost-place": found["place_after"] > found["place_before"],
        "gated": found["gated_after"] and not found["gated_before"],
        "drifted": bool(outcome.drifted),
    }
    return [(name, payload) for name, true in happened.items() if true]


def metric_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """A metric's numbers, for a payload."""
    names = ("metric", "before", "after", "difference", "low", "high")
    return {name: _finite(row[name]) for name in names}


def table_of(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """The table of Prefect's UI: a row per winner and metric, or per study that failed."""
    rows: list[dict[str, Any]] = []
    for outcome in outcomes:
        told = {"study": outcome.study, "verdict": outcome.verdict}
        if outcome.error:
            rows.append(told | {"cause": outcome.error})
        for row in outcome.rows:
            shown = {name: _rounded(row[name]) for name in COLUMNS if name in row}
            rows.append(shown | told | {"arm": row["arm"], "cause": row["cause"]})
    return rows


def _rounded(value: Any) -> Any:
    return round(value, 6) if isinstance(value, float) and math.isfinite(value) else _finite(value)


def _finite(value: Any) -> Any:
    """A value as JSON can hold it: an infinite number, as a KL may be, is None."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def summary_of(outcomes: Sequence[Outcome]) -> str:
    """The markdown summary: what changed, and why."""
    hold = sum(outcome.holds for outcome in outcomes)
    lines = [f"# {hold} of {len(outcomes)} winners hold", ""]
    lines += ["| study | trial | verdict | place | cause |", "|---|---|---|---|---|"]
    for outcome in outcomes:
        if outcome.error:
            lines.append(f"| {outcome.study} | | **not measured** | | {_cell(outcome.error)} |")
            continue
        found = outcome.winner
        verdict = found["verdict"]
        shown = f"**{verdict}**" if verdict in (LOST, GATED) else verdict
        place = f"{found['place_before']} → {found['place_after']} of {found['candidates']}"
        cause = _cell(found["cause"] or "nothing changed")
        lines.append(f"| {outcome.study} | {found['trial']} | {shown} | {place} | {cause} |")
    return "\n".join([*lines, "", *_details(outcomes)])


def _details(outcomes: Sequence[Outcome]) -> list[str]:
    """Why a gate failed, and every metric that drifted."""
    found = []
    for outcome in outcomes:
        if not outcome.error and outcome.winner["gate_reason"]:
            found.append(f"- {outcome.study} fails a gate: {outcome.winner['gate_reason']}")
        for row in outcome.drifted:
            change = f"{row['before']:.4g} → {row['after']:.4g}"
            if row["difference"] is not None:
                change += (
                    f", difference {row['difference']:+.4g} "
                    f"({row['low']:+.4g} to {row['high']:+.4g})"
                )
            found.append(f"- {outcome.study} {row['metric']}: {change}")
    return found


def _cell(text: str) -> str:
    """Text that cannot end a cell of a markdown table."""
    return " ".join(text.split()).replace("|", "\\|")
