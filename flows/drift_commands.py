"""`tribunal rebenchmark` measures frozen winners again; `tribunal drift` shows what was found."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from flows import display
from flows.options import (
    Format,
    FormatOption,
    PairOption,
    TableOrJson,
    has_server,
    open_store,
    unwatched,
)

if TYPE_CHECKING:
    from rich.console import Console

    from artifacts.store import Store
    from flows.drift import Outcome

Rows = Sequence[Mapping[str, Any]]

StudiesArgument = Annotated[
    list[str] | None,
    typer.Argument(metavar="STUDY", help="default: every study with a tested winner"),
]
ForceOption = Annotated[
    bool, typer.Option("--force", help="measure again although nothing changed")
]
OccasionOption = Annotated[
    str | None,
    typer.Option("--occasion", metavar="WORDS", help="why; implies --force; default: the time"),
]
StudyArgument = Annotated[str | None, typer.Argument(metavar="STUDY", help="default: every study")]
AllOption = Annotated[
    bool, typer.Option("--all", help="every comparison, not the last of each study only")
]


# Numbers count from 0 for every winner, so the newest winner of a study comes before the number.
LAST = """
    SELECT d.key
    FROM drift d
    LEFT JOIN artifacts w ON w.kind = 'winners' AND w.key = d.winner
    QUALIFY dense_rank() OVER (
        PARTITION BY d.study
        ORDER BY w.created DESC NULLS LAST, d.winner DESC, d.number DESC, d.key DESC
    ) = 1
"""


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.command(
        epilog="Examples: tribunal rebenchmark; tribunal rebenchmark organism --force; "
        "tribunal rebenchmark --occasion 'new driver' --format json"
    )(rebenchmark)
    app.command(
        epilog="Examples: tribunal drift; tribunal drift organism --all; "
        "tribunal drift --format csv"
    )(drift)


def rebenchmark(
    studies: StudiesArgument = None,
    force: ForceOption = False,
    occasion: OccasionOption = None,
    form: PairOption = TableOrJson.table,
) -> None:
    """Measure frozen winners again where something changed; exit code 1 if one does not hold.

    What counts as a change: the model, test or selection prompts, the labeller, or a library.
    A winner does not hold when it lost its place, tripped a gate, or could not be measured.
    """
    outcomes = _execute(open_store(), studies or None, force, occasion)
    if form is TableOrJson.json:
        typer.echo(json.dumps(display.plain([_as_data(o) for o in outcomes]), indent=1))
    else:
        _print_outcomes(display.console(), outcomes)
    if not all(outcome.holds for outcome in outcomes):
        raise typer.Exit(1)


def _execute(
    store: Store, studies: list[str] | None, force: bool, occasion: str | None
) -> Sequence[Outcome]:
    """Through Prefect if a server is configured, else in this process."""
    from flows.drift import winners_to_check

    winners = winners_to_check(store, studies)
    if has_server():
        from flows.rebenchmark import rebenchmark as flow

        with unwatched():
            state = flow([w.study for w in winners], force, occasion, return_state=True)
            found: Any = state.result(raise_on_failure=False)
        if isinstance(found, BaseException):
            raise found
        outcomes: Sequence[Outcome] = found
        return outcomes
    from artifacts.catalog import write_database
    from flows.drift import check_winners, occasion_of, work_of
    from flows.logs import with_log
    from flows.progress import Progressing
    from flows.settings import Settings

    settings = Settings.from_environment()
    with Progressing(display.console(stderr=True), work_of(store, winners)) as bar:
        reporter = with_log(settings.log, store, bar)
        with settings.running(store, reporter):
            outcomes = check_winners(winners, occasion_of(force, occasion))
    write_database(store)
    return outcomes


def drift(
    study: StudyArgument = None,
    history: AllOption = False,
    form: FormatOption = Format.table,
) -> None:
    """What became of frozen winners: before, after, difference, cause; newest first."""
    from artifacts.catalog import ask
    from artifacts.errors import ConfigError
    from flows.results import find_study

    store = open_store()
    name = None if study is None else find_study(store, study)
    shown = "SELECT key FROM drift" if history else LAST
    sql = f"SELECT * FROM drift WHERE study = coalesce($1, study) AND key IN ({shown})"
    table = ask(store, sql, [name])
    if not table.rows:
        which = f"of study '{name}'" if name else f"in the store '{store.location}'"
        raise ConfigError(f"no drift {which} yet; compare with: tribunal rebenchmark")
    if form is not Format.table:
        typer.echo(display.as_text(table, form))
        return
    out = display.console()
    for rows in _by_comparison(table.records()):
        _print_comparison(out, str(rows[0]["study"]), rows)


def _by_comparison(rows: Rows) -> Iterable[Rows]:
    """The rows of each comparison, in their order."""
    found: dict[tuple[Any, Any], list[Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault((row["study"], row["key"]), []).append(row)
    return found.values()


def _as_data(outcome: Outcome) -> dict[str, Any]:
    told = {"study": outcome.study, "verdict": outcome.verdict, "holds": outcome.holds}
    if outcome.error or outcome.drift is None:
        return told | {"error": outcome.error}
    shared = {name: outcome.winner[name] for name in SHARED}
    own = [{k: v for k, v in row.items() if k not in SHARED} for row in outcome.rows]
    return told | shared | {"new": outcome.news, "artifact": outcome.drift.key, "metrics": own}


SHARED = (
    *("protocol", "number", "measured", "place_before", "place_after", "candidates"),
    *("gated_before", "gated_after", "gate_reason", "cause", "verdict"),
)


def _print_outcomes(out: Console, outcomes: Sequence[Outcome]) -> None:
    for outcome in outcomes:
        if outcome.error:
            display.heading(out, f"{outcome.study}: not measured")
            out.print(Text(f"  {outcome.error}"))
        else:
            _print_comparison(out, outcome.study, outcome.rows)
    hold = sum(outcome.holds for outcome in outcomes)
    out.print(f"\n{hold} of {len(outcomes)} winners hold")


def _print_comparison(out: Console, study: str, rows: Rows) -> None:
    """One comparison: its verdict and cause, then a line per metric."""
    found = rows[0]
    display.heading(out, f"{study}, trial {found['trial']}: {found['verdict']}")
    if "created" in found:
        out.print(Text(f"  compared {found['created']}, number {found['number']}"))
    out.print(
        Text(f"  cause: {found['cause'] or 'nothing changed, so nothing was measured again'}")
    )
    place = f"{found['place_before']} before, {found['place_after']} now"
    out.print(Text(f"  place among {found['candidates']} candidates: {place}"))
    if found["gate_reason"]:
        since = "already before" if found["gated_before"] else "tripped"
        out.print(Text(f"  gate {since}: {found['gate_reason']}"))
    if found["measured"]:
        columns = ("arm", "metric", "before", "after", "difference (95 %)", "change")
        display.print_rows(out, columns, [_cells(row) for row in rows])


def _cells(row: Mapping[str, Any]) -> list[str]:
    return [
        row["arm"],
        row["metric"],
        _value(row, row["before"], row["n_before"]),
        _value(row, row["after"], row["n_after"]),
        _difference(row),
        row["change"],
    ]


def _value(row: Mapping[str, Any], value: float, prompts: int) -> str:
    """A rate as a count of prompts; any other metric as a number."""
    counted = row["metric"] in ("refusals", "overrefusals", "degenerate")
    return f"{round(value * prompts)}/{prompts}" if counted else display.number(value)


def _difference(row: Mapping[str, Any]) -> str:
    if row["difference"] is None:
        return "-"
    change = f"{row['difference']:+.3g}"
    if row["low"] is None:
        return change
    return f"{change} ({row['low']:+.3g} to {row['high']:+.3g})"
