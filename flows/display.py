"""Tables and texts for the terminal, at most 80 columns wide; no number is computed here."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table as Grid
from rich.text import Text

from artifacts.catalog import Table
from artifacts.specs import COMPONENTS

WIDTH = 80
WRAPPED = 30  # characters: the least width of a column of sentences
CONTROLS = ("unedited", "identity", "random-direction", "over-edit")
Row = Mapping[str, Any]


def console(stderr: bool = False) -> Console:
    """A console of at most 80 columns, without colours where the output is not a terminal."""
    made = Console(stderr=stderr, highlight=False, soft_wrap=False)
    made.width = min(made.width, WIDTH)
    return made


@contextmanager
def counting(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar with the time left, on a terminal only; what is yielded takes done and total."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    out = console(stderr=True)
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=out, transient=True, disable=not out.is_terminal) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """Say what is waited for: with the seconds on a terminal, as a line elsewhere. On stderr."""
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    out = console(stderr=True)
    if not out.is_terminal:
        out.print(what, markup=False, soft_wrap=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=out, transient=True, disable=not out.is_terminal) as bar:
        bar.add_task(what, total=None)
        yield


def as_text(table: Table, form: str) -> str:
    """A query's answer as JSON or CSV."""
    if form == "json":
        return json.dumps([plain(record) for record in table.records()], indent=1, default=str)
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(table.columns)
    writer.writerows(table.rows)
    return buffer.getvalue().rstrip("\n")


def plain(value: Any) -> Any:
    """The value with NaN and infinities as null, for strict JSON."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


def print_query(out: Console, table: Table) -> None:
    """A query's answer as a table; one that is too wide is printed record by record.

    Columns of sentences may be wrapped, down to a readable width; what has no spaces never is.
    """
    cells = [[_cell(value) for value in row] for row in table.rows]
    columns = list(zip(table.columns, *cells, strict=True))
    wrapped = [any(" " in cell for cell in column[1:]) for column in columns]
    widths = [
        min(max(map(len, column)), WRAPPED if wrap else WIDTH + 1)
        for column, wrap in zip(columns, wrapped, strict=True)
    ]
    if sum(widths) + 2 * (len(widths) - 1) <= out.width:
        out.print(_grid(table.columns, cells, wrapped))
    else:
        for number, row in enumerate(cells, 1):
            out.print(Text(f"-- {number} " + "-" * 20, style="dim"))
            pad = max(map(len, table.columns))
            for name, value in zip(table.columns, row, strict=True):
                out.print(Text(f"{name:<{pad}}  {value}"))
    out.print(Text(f"{len(table.rows)} row{'' if len(table.rows) == 1 else 's'}", style="dim"))


STOPPED = "stopped: nothing could hang on its other prompts; ≥: at least so many"


def print_ranking(out: Console, rows: Sequence[Row], frozen: int | None) -> None:
    """The strict ranking: refusals, overrefusals, KL; the frozen trial is starred."""
    if not rows:
        return
    arms = len({row["arm"] for row in rows}) > 1
    names = ["arm"] if arms else []
    grid = _table("", "rank", "trial", *names, "refusals", "overrefusals", "KL, nats", "gate")
    for row in rows:
        star = "*" if row["trial"] == frozen and row["arm"] not in CONTROLS else ""
        grid.add_row(
            star,
            "-" if row["rank"] is None else str(row["rank"]),
            _cell(row["trial"]),
            *([row["arm"]] if arms else []),
            _refusals(row),
            _overrefusals(row),
            number(row["kl"]),
            row["gate_reason"] or ("stopped" if row.get("stopped") else ""),
        )
    out.print(grid)
    if any(row.get("stopped") for row in rows):
        out.print(Text(STOPPED, style="dim"))


def _refusals(row: Row) -> str:
    """Refusals of the harmful prompts; at least so many if not all were answered."""
    some = row.get("stopped") and row.get("answered_harmful") != row["n_harmful"]
    return f"{'≥' if some else ''}{row['refusals']}/{row['n_harmful']}"


def _overrefusals(row: Row) -> str:
    """Overrefusals of all other prompts; at least so many if the trial was stopped."""
    count = row["n_harmless"] + row["n_borderline"]
    return f"{'≥' if row.get('stopped') else ''}{row['overrefusals']}/{count}"


def print_winners(out: Console, rows: Sequence[Row]) -> None:
    """The winners of a study plan, ranked, beside what their unedited models refuse."""
    grid = _table("rank", "member", "trial", "refusals", "overrefusals", "KL, nats", "gate")
    for row in rows:
        refusals = f"{row['refusals']}/{row['n_harmful']} (of {row['unedited_refusals']})"
        judged = row["n_harmless"] + row["n_borderline"]
        overrefusals = f"{row['overrefusals']}/{judged} (of {row['unedited_overrefusals']})"
        grid.add_row(
            str(row["rank"]),
            row["member"],
            str(row["trial"]),
            refusals,
            overrefusals,
            number(row["kl"]),
            row["gate_reason"] or "",
        )
    out.print(grid)


def print_test(out: Console, rows: Sequence[Row]) -> None:
    """Metrics with 95 % intervals, a line per arm (or per split)."""
    label = "arm" if len({row["arm"] for row in rows}) > 1 else "split"
    grid = _table(label, "refusals", "overrefusals", "KL, nats", left=1)
    for row in rows:
        low, high = row["kl_interval"]
        grid.add_row(
            row[label],
            f"{_refusals(row)} ({_percent(row['refusals_interval'])})",
            f"{_overrefusals(row)} ({_percent(row['overrefusals_interval'])})",
            f"{number(row['kl'])} ({_bounds(low, high)})",
        )
    out.print(grid)
    out.print(
        Text(
            "in brackets: 95 % intervals; of rates in %, Clopper-Pearson; of KL, bootstrap",
            style="dim",
        )
    )
    for row in rows:
        if row["gated"]:
            out.print(Text(f"{row[label]} is gated: {row['gate_reason']}"))
        if row.get("stopped"):
            out.print(Text(f"{row[label]}: {STOPPED}"))


def print_audit(out: Console, audit: Row) -> None:
    """An export's three measurements, and how far it is from its trial."""
    grid = _table("", "refusals", "overrefusals", "KL, nats", "responses changed", left=1)
    of = audit["responses"]
    for name, key, changed in (
        ("unedited model", "unedited", None),
        ("trial, by the study", "stored", None),
        ("trial, now", "now", audit["changed_since"]),
        ("as exported", "exported", audit["changed"]),
    ):
        row = audit[key]
        grid.add_row(
            name,
            f"{row['refusals']}/{row['n_harmful']}",
            f"{row['overrefusals']}/{row['n_harmless'] + row['n_borderline']}",
            f"{row['kl']:.6g}",
            "" if changed is None else f"{changed}/{of}",
        )
    out.print(grid)
    far = f"first tokens lie {audit['kl_to_trial']:.3g} nats from the trial's"
    out.print(Text(far + (", which is float32 rounding" if audit["exact"] else "")))


def print_parameters(out: Console, parameters: Mapping[str, Any], row: Row) -> None:
    """The parameters of a trial: what is shared, then a line per component."""
    out.print(
        f"direction: {parameters['direction_scope']}, {parameters['direction_method']}, "
        f"index {parameters['direction_index']:.3f}"
        + (
            f", blend {parameters['direction_blend']:.3f}"
            if parameters["direction_method"] == "hybrid"
            else ""
        )
    )
    out.print(f"edit: row normalization {row['row_normalization']}, frame {row['frame']}")
    grid = _table("component", "max weight", "at layer", "min weight", "distance", left=1)
    for component in COMPONENTS:
        peak = parameters[f"{component}_max_weight"]
        grid.add_row(
            component.replace("_", ".", 1),
            f"{peak:.4f}",
            f"{parameters[f'{component}_max_weight_position']:.2f}",
            f"{peak * parameters[f'{component}_min_weight']:.4f}",
            f"{parameters[f'{component}_min_weight_distance']:.2f} layers",
        )
    out.print(grid)
    own = {k: v for k, v in parameters.items() if "_direction_" in k}
    for name, value in own.items():
        out.print(f"  {name}: {_cell(value)}")


def print_details(out: Console, rows: Sequence[Row]) -> None:
    """What the ranking does not use, per split."""
    grid = _table(
        "split", "harmless", "borderline", "KL max", "degenerate", "tokens", "gates", left=1
    )
    for row in rows:
        grid.add_row(
            row["split"],
            f"{row['overrefusals_harmless']}/{row['n_harmless']}",
            f"{row['overrefusals_borderline']}/{row['n_borderline']}",
            number(row["kl_max"]),
            "-" if row["degenerate"] is None else f"{100 * row['degenerate']:.1f} %",
            "-" if row["mean_tokens"] is None else f"{row['mean_tokens']:.1f}",
            "failed" if row["gated"] else "open" if row.get("stopped") else "passed",
        )
    out.print(grid)


def print_pairs(out: Console, pairs: Sequence[Row]) -> None:
    """Prompts with the response before and after the edit. Model output is never markup."""
    for pair in pairs:
        out.print(Text(f"[{pair['class']}] {_short(pair['prompt'])}", style="bold"))
        out.print(Text(f"  before: {_short(pair['before'])}"))
        out.print(Text(f"  after:  {_short(pair['after'])}"))


def print_rows(out: Console, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A plain left-aligned table."""
    out.print(_grid(columns, rows))


def heading(out: Console, text: str) -> None:
    """A section's title."""
    out.print()
    out.print(Text(text, style="bold"))


def number(value: float | None) -> str:
    """Four significant digits; a dash for nothing."""
    if value is None or math.isnan(value):
        return "-"
    return f"{value:.4f}" if 1e-3 <= abs(value) < 100 or value == 0 else f"{value:.2g}"


def _table(*columns: str, left: int = 0) -> Grid:
    grid = Grid(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), show_edge=False)
    for index, name in enumerate(columns):
        grid.add_column(name, justify="left" if index < left or name == "gate" else "right")
    return grid


def _grid(
    columns: Sequence[str], rows: Sequence[Sequence[str]], wrapped: Sequence[bool] | None = None
) -> Grid:
    """A left-aligned table. `wrapped`: which columns may be; default: any."""
    grid = _table(*columns, left=len(columns))
    for column, wrap in zip(grid.columns, wrapped or [True] * len(columns), strict=True):
        column.no_wrap = not wrap
    for row in rows:
        grid.add_row(*(Text(cell) for cell in row))
    return grid


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.6g}"
    return str(value)


def _percent(interval: tuple[float, float]) -> str:
    if math.isnan(interval[0]):
        return "-"
    low, high = (f"{100 * x:.1f}" for x in interval)
    return f"{low}-{high}"


def _bounds(low: float, high: float) -> str:
    """A KL's interval; a dash where there is none."""
    return "-" if math.isnan(low) else f"{_bound(low)}-{_bound(high)}"


def _bound(value: float) -> str:
    """A bound of an interval: three decimals, or what a smaller number needs."""
    return f"{value:.3f}" if value >= 0.01 or value == 0 else number(value)


def _short(text: str, length: int = 220) -> str:
    line = " ".join(text.split())
    return line if len(line) <= length else line[: length - 1] + "…"
