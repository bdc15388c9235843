"""`tribunal compare`: two trials on the same prompts, with paired tests and a verdict."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from artifacts.errors import ConfigError
from flows import display
from flows.options import PairOption, TableOrJson, open_store

if TYPE_CHECKING:
    from rich.console import Console

Row = Mapping[str, Any]

SideArgument = "STUDY/NUMBER, STUDY/winner, a study, NAME/ARM, or 'unedited'"
AArgument = Annotated[str, typer.Argument(metavar="A", help=SideArgument)]
BArgument = Annotated[str, typer.Argument(metavar="B", help="likewise")]
SplitOption = Annotated[
    str | None,
    typer.Option("--split", help="test, selection or search; default: the first that both have"),
]
SeedOption = Annotated[int, typer.Option("--seed", min=0, help="of what is drawn at random")]
ResamplesOption = Annotated[
    int, typer.Option("--resamples", min=100, max=1_000_000, help="of the prompts")
]


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command(
        epilog="Examples: tribunal compare organism unedited; tribunal compare organism/17 "
        "organism/winner; tribunal compare organism/strict organism/random-search --format json"
    )(compare)


def compare(
    a: AArgument,
    b: BArgument,
    split: SplitOption = None,
    seed: SeedOption = 0,
    resamples: ResamplesOption = 2000,
    form: PairOption = TableOrJson.table,
) -> None:
    """Compare two trials prompt by prompt: paired tests, intervals, better, tied or worse.

    A study stands for its winner. Nothing is measured: what is stored is read.
    """
    from flows import comparing

    if split is not None and split not in comparing.SPLITS:
        raise ConfigError.unknown("split", split, comparing.SPLITS)
    store, shown = open_store(), display.console(stderr=True).is_terminal
    with display.waiting("comparing") if shown else nullcontext():
        answer = comparing.compare(store, a, b, split, seed, resamples)
    if form is TableOrJson.json:
        typer.echo(json.dumps(display.plain(answer), indent=1))
        return
    print_comparison(display.console(), answer)


def print_comparison(out: Console, answer: Row) -> None:
    """Who is compared, the metrics, the paired tables, what could have been found, the verdict."""
    from flows.comparing import CHOSE, NAMES

    display.heading(out, f"A against B, {answer['split']} split")
    for side in ("a", "b"):
        told = answer[side]
        gated = ", gated" if told["gated"] else ""
        out.print(Text(f"  {side.upper()}  {told['name']}, arm {told['arm']}{gated}"))
    out.print()
    columns = ("metric", "A", "B", "A - B (95 %)", "p by Holm", "A is")
    display.print_rows(out, columns, [_cells(row) for row in answer["metrics"]])
    display.heading(out, "Paired: prompts refused under")
    rates = [row for row in answer["metrics"] if row["both"] is not None]
    shown = [
        [row["metric"], *(str(row[cell]) for cell in ("both", "only_a", "only_b", "neither"))]
        for row in rates
    ]
    display.print_rows(out, ("", "both", "A only", "B only", "neither"), shown)
    display.heading(out, "Least difference found with 80 % power, one test at 5 %")
    found = [
        [
            NAMES[row["metric"]],
            *(_amount(row, row[d]) for d in ("detectable", "detectable_unpaired")),
        ]
        for row in answer["metrics"]
    ]
    display.print_rows(out, ("", "paired", "unpaired"), found)
    display.heading(out, "Verdict")
    out.print(Text(answer["sentence"]))
    share = f"{100 * answer['ahead']:.0f} % of {answer['resamples']} resamples of the prompts"
    out.print(Text(f"By the strict order A is ahead of B in {share}."))
    if answer["split"] in CHOSE:
        out.print(Text(CHOSE[answer["split"]], style="dim"))
    out.print(
        Text(
            "rates: exact McNemar, Newcombe's interval; KL: paired permutation, bootstrap; "
            "docs/statistics.md",
            style="dim",
        )
    )


def _cells(row: Row) -> list[str]:
    from flows.comparing import NAMES, counts, p_text

    rate = row["both"] is not None
    values = [counts(row, s) if rate else display.number(row[s]) for s in ("a", "b")]
    name = NAMES[row["metric"]] + ("" if rate else ", nats")
    return [name, *values, _interval(row), p_text(row["p_holm"]), row["verdict"]]


def _interval(row: Row) -> str:
    if row["difference"] is None:
        return "-"
    if row["both"] is not None:
        low, middle, high = (100 * row[name] for name in ("low", "difference", "high"))
        return f"{middle:+.1f} % ({low:+.1f} to {high:+.1f})"
    return f"{row['difference']:+.2g} ({row['low']:+.2g} to {row['high']:+.2g})"


def _amount(row: Row, value: float | None) -> str:
    """A difference in the unit of its metric."""
    if value is None:
        return "none"
    return f"{100 * value:.1f} points" if row["both"] is not None else f"{value:.2g} nats"
