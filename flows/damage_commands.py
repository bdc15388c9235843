"""`tribunal damage`: the KL along whole responses; `tribunal capability`: tasks of lm-eval."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from flows import display
from flows.options import PairOption, StudyOption, TableOrJson, TrialArgument, open_store

if TYPE_CHECKING:
    from artifacts.store import Store
    from tasks.stored_trials import StoredTrial

Rows = Sequence[Mapping[str, Any]]

SomeTrial = Annotated[
    str | None,
    typer.Argument(
        metavar="[TRIAL]",
        help="number, STUDY/NUMBER, or 'winner'; default: the winner and its fellow candidates",
    ),
]
TasksOption = Annotated[
    str, typer.Option("--tasks", metavar="NAME[,NAME]", help="lm-eval's names of the tasks")
]
LimitOption = Annotated[
    int | None, typer.Option("--limit", min=1, help="documents per task; default: all")
]
ShotsOption = Annotated[
    int | None, typer.Option("--shots", min=0, help="examples in each prompt; default: the task's")
]
ChatOption = Annotated[
    bool, typer.Option("--chat", help="put every document through the chat template")
]
IncludeOption = Annotated[
    Path | None,
    typer.Option("--include", metavar="DIR", help="a folder of task files of your own"),
]


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.command(
        epilog="Examples: tribunal damage; tribunal damage winner; "
        "tribunal damage organism/17 --format json"
    )(damage)
    app.command(
        epilog="Examples: tribunal capability winner --tasks arc_easy,hellaswag --limit 200; "
        "tribunal capability 17 --tasks village --include tasks"
    )(capability)


def damage(
    trial: SomeTrial = None, study: StudyOption = None, form: PairOption = TableOrJson.table
) -> None:
    """How far trials are from the unedited model along its whole responses, not at one token.

    Both models read the unedited model's responses to the harmless search prompts, and their
    next-token distributions are compared at every token.
    """
    from artifacts.catalog import write_database
    from flows import damage as measuring

    store = open_store()
    found = measuring.trials_to_measure(store, trial, study)
    rows = _measured(store, found)
    write_database(store)
    if form is TableOrJson.json:
        typer.echo(json.dumps(display.plain(rows), indent=1))
        return
    out = display.console()
    prompts, tokens = rows[0]["prompts"], rows[0]["tokens"]
    display.heading(
        out, f"{found[0].study}: KL along {prompts} unedited responses, {tokens} tokens"
    )
    columns = ("trial", "first token", "per token (95 %)", "per response", "max", "changed")
    display.print_rows(out, columns, [_cells(row) for row in rows])
    display.heading(out, "Mean KL by place in the response, nats")
    _print_curves(rows)
    told = (
        "KL(unedited || edited), nats, means over prompts; intervals: bootstrap of prompts. First "
        "token: what the ranking uses. Changed: tokens where the edited model's likeliest is "
        "another. * frozen. Per prompt: tribunal sql 'FROM sequence_kl'"
    )
    out.print(Text(told, style="dim"))


def _measured(store: Store, found: Sequence[StoredTrial]) -> list[dict[str, Any]]:
    from flows import damage as measuring
    from flows import results
    from tasks.damage import measure_damage

    with _one_model(store, len(found)):
        made = [measure_damage(stored) for stored in found]
    frozen = results.frozen(store, found[0].study)
    return [measuring.summary(store, ref, frozen) for ref in made]


@contextmanager
def _one_model(store: Store, work: int, bars: bool = True) -> Iterator[None]:
    """Stages run here, on the first device of the settings, with progress."""
    from flows.logs import with_log
    from flows.progress import Progressing
    from flows.settings import Settings
    from tasks.stage import Runtime, running

    settings = Settings.from_environment()
    console = display.console(stderr=True)
    if not bars:
        console = Console(stderr=True, force_terminal=False)
    with Progressing(console, work) as bar:
        reporter = with_log(settings.log, store, bar)
        place = settings.places[0]
        with running(Runtime(store, reporter, place, settings.device_map, settings.rows)):
            yield


def _cells(row: Mapping[str, Any]) -> list[str]:
    low, high = row["kl_mean_interval"]
    return [
        f"{row['trial']}{'*' if row['frozen'] else ''}",
        display.number(row["kl_first"]),
        f"{display.number(row['kl_mean'])} ({display.number(low)}-{display.number(high)})",
        display.number(row["kl_sum"]),
        display.number(row["kl_max"]),
        f"{row['changed']}/{row['tokens']}",
    ]


def _print_curves(rows: Rows) -> None:
    """A line per trial, a column per bin of tokens."""
    widest = max(len(row["curve"]) for row in rows)
    names = ["0", "1", *(f"{2**p}-{2 ** (p + 1) - 1}" for p in range(1, widest - 1))][:widest]
    cells = [
        [str(row["trial"]), *(display.number(value) for value in row["curve"])] for row in rows
    ]
    display.print_rows(display.console(), ("trial", *names), cells)


def capability(
    trial: TrialArgument,
    tasks: TasksOption,
    limit: LimitOption = None,
    shots: ShotsOption = None,
    chat: ChatOption = False,
    include: IncludeOption = None,
    study: StudyOption = None,
    form: PairOption = TableOrJson.table,
) -> None:
    """What an edit costs on tasks of lm-eval: the trial beside the unedited model.

    The edit is applied by hooks, as in a trial. Needs: pip install -e '.[lm-eval]'.
    """
    from artifacts.catalog import write_database
    from flows import damage as measuring
    from tasks.capability import Asked, measure_capability, require_lm_eval, require_tasks

    require_lm_eval()
    asked = Asked(
        tuple(filter(None, (name.strip() for name in tasks.split(",")))),
        limit,
        shots,
        chat,
        str(include) if include else None,
    )
    require_tasks(asked)
    store = open_store()
    (stored,) = measuring.trials_to_measure(store, trial, study)
    with _one_model(store, 2, bars=False):  # lm-eval has its own
        base, edited = (measure_capability(stored, asked, edited=e) for e in (False, True))
        rows = measuring.compare_capabilities(store, base, edited)
    write_database(store)
    if form is TableOrJson.json:
        typer.echo(json.dumps(display.plain(rows), indent=1))
        return
    out = display.console()
    display.heading(out, f"Trial {stored.row['trial']} of {stored.study} on tasks of lm-eval")
    columns = ("task", "metric", "n", "unedited", "edited", "difference (95 %)")
    display.print_rows(out, columns, [_task_cells(row) for row in rows])
    told = (
        "Values ± standard error. Difference: edited - unedited over the same documents; the "
        "interval is Newcombe's for pairs where each counts 0 or 1, else a bootstrap of pairs."
    )
    out.print(Text(told, style="dim"))


def _task_cells(row: Mapping[str, Any]) -> list[str]:
    def value(side: str) -> str:
        error = row[f"{side}_stderr"]
        return f"{row[side]:.3f}" + ("" if error is None else f" ± {error:.3f}")

    change = f"{row['difference']:+.3f}"
    if row["low"] is not None:
        change += f" ({row['low']:+.3f} to {row['high']:+.3f})"
    named = row["metric"] if row["filter"] == "none" else f"{row['metric']} ({row['filter']})"
    return [row["task"], named, str(row["n"]), value("unedited"), value("edited"), change]
