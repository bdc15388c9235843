"""The command line: `tribunal run`, `rank`, `show`, `sql` and the rest.

Answers go to stdout, progress to stderr. A user's mistake is one line and exit code 2, Ctrl-C is
130; `--debug` shows the traceback. What needs torch or Prefect imports it when it is needed.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TextIO

import typer

from artifacts.errors import ConfigError, DamageWarning, ServerError, TestSplitSpent, TribunalError
from artifacts.store import Ref, Store
from flows import (
    compare_commands,
    damage_commands,
    display,
    drift_commands,
    export_commands,
    judge_commands,
    peer_commands,
    reproduce_commands,
    sql_commands,
)
from flows.figures import commands as figure_commands
from flows.logs import with_log
from flows.options import (
    ConfigArgument,
    Format,
    FormatOption,
    PairOption,
    SetOption,
    StudyOption,
    TableOrJson,
    TrialArgument,
    has_server,
    open_store,
    unwatched,
)
from flows.report import commands as report_commands
from flows.settings import Settings, config_names, load_config
from flows.store_commands import store_app
from flows.study_commands import study
from flows.worker_command import worker

if TYPE_CHECKING:
    from rich.console import Console

    from artifacts.specs import Config
    from flows.pipeline import Benchmark
    from tasks.stage import Step

INTERRUPTED = 130  # what typer makes of Ctrl-C

app = typer.Typer(
    name="tribunal",
    help="Put edits of a language model's refusal direction on trial.",
    no_args_is_help=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
    epilog="First steps: tribunal run; tribunal rank; tribunal show 0; "
    "tribunal sql 'SELECT * FROM leaderboard LIMIT 5'",
)
organism_app = typer.Typer(help="The shipped model organism.")
app.add_typer(store_app, name="store")
app.add_typer(organism_app, name="organism")
app.command()(worker)
compare_commands.register(app)
drift_commands.register(app)
export_commands.register(app)
damage_commands.register(app)
sql_commands.register(app)
figure_commands.register(app)
report_commands.register(app)
judge_commands.register(app)
peer_commands.register(app)
reproduce_commands.register(app)
app.command(epilog="Example: tribunal study ten-models --set search.trials=8")(study)


def main() -> None:
    """Entry point: turn errors into one line and an exit code."""
    debug = "--debug" in sys.argv
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    warnings.showwarning = _show_warning
    try:
        code = app(arguments or ["--help"], prog_name="tribunal", standalone_mode=False)
    except TribunalError as error:
        _fail(str(error), error.exit_code, debug)
    except typer.TyperException as error:
        said = error.format_message() if isinstance(error, typer.BadParameter) else str(error)
        _fail(f"{said} (see: tribunal --help)", TribunalError.exit_code, debug)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except Exception as error:
        lost = _lost_server(error)
        if lost is None:
            raise
        _fail(str(lost), lost.exit_code, debug)
    if code == INTERRUPTED:
        line = "interrupted; nothing is lost: the same command goes on from here"
        print(f"tribunal: {line}", file=sys.stderr)  # noqa: T201
    raise SystemExit(code or 0)


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """What a user should know is one line; other warnings keep Python's form."""
    if issubclass(category, DamageWarning):
        said = f"tribunal: {message}\n"
    else:
        said = warnings.formatwarning(message, category, filename, lineno, line)
    (file or sys.stderr).write(said)


def _lost_server(error: Exception) -> ServerError | None:
    """What to say of a Prefect server that cannot be reached, if that is what went wrong."""
    import httpx

    url, asked = os.environ.get("PREFECT_API_URL"), ""
    if isinstance(error, httpx.TransportError):
        with suppress(RuntimeError):  # it does not know its request
            asked = str(error.request.url)
    if url and (asked.startswith(url) or "Failed to reach API" in str(error)):
        return ServerError(
            f"the Prefect server at '{url}' cannot be reached; what is made is stored: start it "
            "and run the same command again, or unset PREFECT_API_URL"
        )
    return None


def _fail(line: str, code: int, debug: bool) -> None:
    """Say what went wrong; with --debug, let the traceback through."""
    if debug:
        raise  # the error that is being handled
    print(f"tribunal: {line}", file=sys.stderr)  # noqa: T201
    raise SystemExit(code) from None


@app.command(epilog="Examples: tribunal run; tribunal run organism --set search.trials=96")
def run(
    config: ConfigArgument = "organism",
    overrides: SetOption = None,
    form: PairOption = TableOrJson.table,
) -> None:
    """Run a benchmark: what is stored is not computed again."""
    from flows.pipeline import check_prompts, run_pipeline
    from tasks.stage import planning

    chosen = load_config(config, overrides or ())
    store = open_store()
    with planning(store) as steps:
        found = run_pipeline(chosen)
    if all(step.cached for step in steps):
        _log_cached(chosen, store, steps)
    else:
        check_prompts(chosen, store)
        found = _execute(chosen, store, sum(step.work for step in steps if not step.cached))
    _report(store, chosen, found, form)


def _log_cached(config: Config, store: Store, steps: list[Step]) -> None:
    """Log a run that found everything: its artifacts were looked up by the plan."""
    known = {"config": config.name, "arm": config.arm}
    log = with_log(Settings.from_environment().log, store, **known)
    for step in steps:
        log.finished(step.label, Ref(step.kind, step.key, ""), 0.0, cached=True)


def _execute(config: Config, store: Store, work: int) -> Benchmark:
    """Run what is missing: through Prefect if a server is configured, else in this process."""
    if has_server():
        from flows.benchmark import benchmark

        with unwatched():
            return benchmark(config)
    from flows.in_process import run_here

    return run_here(config, store, work)


def _report(store: Store, config: Config, found: Benchmark, form: TableOrJson) -> None:
    from flows import results

    study = str(store.read(found.study)["study"][0])
    winner = store.read(found.winner).row(0, named=True)
    ranked = results.leaderboard_rows(store, found.leaderboard, study)
    tested = results.rows_on_test(store, study, winner["prompts"])
    pairs = results.response_pairs(store, study, "test", winner["trial"], 3, winner["prompts"])
    if form is TableOrJson.json:
        answer = {
            "study": study,
            "protocol": found.protocol.key,
            "winner": {"trial": winner["trial"], "parameters": results.parameters_of(winner)},
            "test": tested,
            "leaderboard": ranked,
            "responses": pairs,
            "artifacts": asdict(found),
        }
        typer.echo(json.dumps(display.plain(answer), indent=1))
        return
    out = display.console()
    trials = len(ranked)
    display.heading(out, f"Leaderboard of {study}: {trials} trials, search split (* frozen)")
    display.print_ranking(out, ranked[:10], winner["trial"])
    display.heading(out, f"Winner: trial {winner['trial']}")
    if tested[0]["gated"]:
        out.print("No trial passed the gates on the selection split, or this one fails them now.")
    display.print_parameters(out, results.parameters_of(winner), tested[0])
    display.heading(out, "Test split, opened for the winner only")
    display.print_test(out, tested)
    opened = results.openings(store, winner["prompts"])
    if opened > 1:
        out.print(f"These test prompts have been opened for {opened} protocols of this store.")
    _say_if_outrun(out, store, found, winner["trial"])
    display.heading(out, "Responses on the test split, before and after the edit")
    display.print_pairs(out, pairs)
    display.heading(out, "Next")
    out.print(f"  tribunal show {study}/{winner['trial']}   all of the winner")
    out.print(f"  tribunal rank --study {study} --top {trials}   the whole ranking")
    out.print("  tribunal sql --schema   tables and columns to query")
    out.print(f"  figure: {store.data_url(found.figure)}", soft_wrap=True)


def _say_if_outrun(out: Console, store: Store, found: Benchmark, frozen: int) -> None:
    """Tell when a later trial leads the selection, but the test split is spent."""
    from artifacts.catalog import rank_frame

    leader = rank_frame(store.read(found.selection).drop("responses"))["trial"][0]
    if leader != frozen:
        out.print(
            f"Trial {leader} now leads the selection. The test split of this study was opened for "
            f"trial {frozen} and stays with it; only new test prompts can test another one."
        )


@app.command(epilog="Example: tribunal plan organism --set search.trials=96")
def plan(
    config: ConfigArgument = "organism",
    overrides: SetOption = None,
    form: FormatOption = Format.table,
) -> None:
    """List every artifact of a config, cached or missing, in the order of the DAG."""
    from artifacts.catalog import Table
    from flows.pipeline import run_pipeline
    from tasks.stage import planning

    with planning(open_store()) as steps:
        run_pipeline(load_config(config, overrides or ()))
    rows = tuple(
        (step.kind, step.label, "cached" if step.cached else "missing", step.key or None)
        for step in steps
    )
    table = Table(("kind", "artifact", "state", "key"), rows)
    if form is not Format.table:
        typer.echo(display.as_text(table, form))
        return
    out = display.console()
    shown = [[k, label, state, (key or "-")[:12]] for k, label, state, key in rows]
    display.print_rows(out, table.columns, shown)
    cached = sum(step.cached for step in steps)
    out.print(f"{cached} of {len(steps)} artifacts are cached; a '-' key waits for its inputs")


@app.command(epilog="Example: tribunal why directions organism --set directions.winsorization=0.99")
def why(
    kind: Annotated[str, typer.Argument(metavar="KIND", help="kind of artifact, 'directions'")],
    config: ConfigArgument = "organism",
    overrides: SetOption = None,
) -> None:
    """Say why an artifact would be computed: what differs from the nearest cached one."""
    from flows.explain import explain
    from flows.pipeline import run_pipeline
    from tasks.stage import planning

    store = open_store()
    with planning(store) as steps:
        run_pipeline(load_config(config, overrides or ()))
    kinds = sorted({step.kind for step in steps})
    if kind not in kinds:
        raise ConfigError.unknown("kind of artifact", kind, kinds)
    for line in explain(store, steps, kind):
        typer.echo(line)


@app.command(epilog="Example: tribunal rank --study organism --top 5 --format json")
def rank(
    study: StudyOption = None,
    top: Annotated[int, typer.Option("--top", min=1, help="how many")] = 20,
    split: Annotated[str, typer.Option("--split", help="search, selection or test")] = "search",
    imported: Annotated[
        bool, typer.Option("--imported", help="with what tribunal import brought in, by rates")
    ] = False,
    form: FormatOption = Format.table,
) -> None:
    """The strict ranking: refusals, then overrefusals, then KL; gated trials last."""
    from artifacts.specs import SPLITS
    from flows import results

    if split not in SPLITS[1:]:
        raise ConfigError.unknown("split", split, SPLITS[1:])
    store = open_store()
    if imported:
        peer_commands.print_beside(store, study, split, top, form)
        return
    name = results.find_study(store, study)
    table = results.ranking(store, name, split, top)
    if form is not Format.table:
        typer.echo(display.as_text(table, form))
        return
    out = display.console()
    display.heading(out, f"{name}, {split} split")
    display.print_ranking(out, table.records(), results.frozen(store, name))


@app.command(epilog="Examples: tribunal show 17; tribunal show organism/17 --format json")
def show(
    trial: TrialArgument,
    study: StudyOption = None,
    samples: Annotated[int, typer.Option("--samples", min=0, help="responses to show")] = 3,
    form: PairOption = TableOrJson.table,
) -> None:
    """One trial: parameters, metrics per split with 95 % intervals, gates, responses."""
    from flows import results

    store = open_store()
    name, number = results.find_trial(store, trial, study)
    rows = results.trial_rows(store, name, number)
    pairs = results.response_pairs(store, name, str(rows[-1]["split"]), number, samples)
    parameters = results.parameters_of(rows[0])
    if form is TableOrJson.json:
        answer = {
            "study": name,
            "trial": number,
            "parameters": parameters,
            "splits": rows,
            "responses": pairs,
        }
        typer.echo(json.dumps(display.plain(answer), indent=1))
        return
    out = display.console()
    display.heading(out, f"Trial {number} of {name}, arm {rows[0]['arm']}")
    display.print_parameters(out, parameters, rows[0])
    display.heading(out, f"Metrics per split, labeller {rows[0]['labeller']}")
    display.print_test(out, rows)
    display.print_details(out, rows)
    if pairs:
        display.heading(out, f"Responses, {rows[-1]['split']} split")
        display.print_pairs(out, pairs)


@app.command(epilog="Example: tribunal test organism/17")
def test(trial: TrialArgument, study: StudyOption = None) -> None:  # noqa: PT028 - a command
    """The test split's result of a study's frozen trial; any other trial is refused."""
    from flows import results

    store = open_store()
    name, number = results.find_trial(store, trial, study)
    results.trial_rows(store, name, number)
    frozen = results.frozen(store, name)
    if number != frozen:
        raise TestSplitSpent(
            f"the test split of '{name}' belongs to trial {frozen}, which was frozen by the "
            f"selection split before it was opened; trial '{number}' cannot be tested on it. "
            "Only new test prompts in the config can test another trial"
        )
    display.print_test(display.console(), results.rows_on_test(store, name))


@app.command()
def configs() -> None:
    """List the shipped configs."""
    for name in config_names():
        typer.echo(name)


@app.command()
def version() -> None:
    """Print the version."""
    from importlib.metadata import version as installed

    typer.echo(f"tribunal {installed('tribunal')}")


@organism_app.command("train")
def organism_train(
    folder: Annotated[Path, typer.Option("--out", help="where to write the model")] = Path(
        "organism"
    ),
    seed: Annotated[int, typer.Option("--seed", help="seed of data and weights")] = 0,
) -> None:
    """Rebuild the model organism from its seed (at most 3 minutes on two cores)."""
    from flows.progress import Progressing
    from tasks.organism.training import PHASES, train

    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"'{folder}' is not empty; choose another folder with --out")
    with Progressing(display.console(stderr=True), sum(phase.steps for phase in PHASES)) as bar:
        train(folder, seed=seed, on_progress=bar.stepped)
    typer.echo(f"wrote {folder}")


@organism_app.command("check")
def organism_check() -> None:
    """Measure the shipped organism again and compare with its card; exit code 1 if it differs."""
    from tasks.organism.card import check

    differences = check()
    for line in differences:
        typer.echo(line)
    if differences:
        raise typer.Exit(1)
    typer.echo("the card's measurements hold")


if __name__ == "__main__":
    main()
