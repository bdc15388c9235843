"""`tribunal import` brings other tools' trials and configs in; `tribunal rank --imported` ranks."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from artifacts.errors import ConfigError
from flows import display
from flows.options import Format, PairOption, TableOrJson, open_store

if TYPE_CHECKING:
    from rich.console import Console

    from artifacts.store import Store
    from tasks.peers.configs import Mapped

Rows = Sequence[Mapping[str, Any]]
PathsArgument = Annotated[
    list[Path],
    typer.Argument(
        metavar="PATH",
        help="Optuna journal or SQLite study, reproduce.json, batch_summary.json, or config.toml",
    ),
]
OutOption = Annotated[
    Path | None,
    typer.Option(
        "-o", "--out", metavar="FILE", help="config to write; default: MODEL.toml beside it"
    ),
]
ForceOption = Annotated[bool, typer.Option("--force", help="replace the config if it is there")]
HeldOutOption = Annotated[
    str | None,
    typer.Option(
        "--held-out", metavar="CONFIG", help="whose selection and test prompts a config gets"
    ),
]
TornOption = Annotated[
    bool, typer.Option("--drop-torn", help="read a journal without its torn last line")
]
TopOption = Annotated[int, typer.Option("--top", min=1, help="how many trials to show of a file")]
CONFIG_ENDING = ".toml"


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command(
        "import",
        epilog="Examples: tribunal import checkpoints/Qwen--Qwen3-4B.jsonl; "
        "tribunal import config.toml -o mine.toml; tribunal rank --imported",
    )(import_)


def import_(
    paths: PathsArgument,
    out: OutOption = None,
    force: ForceOption = False,
    held_out: HeldOutOption = None,
    drop_torn: TornOption = False,
    top: TopOption = 10,
    form: PairOption = TableOrJson.table,
) -> None:
    """Bring in what HERETIC or ICONOCLAST wrote: trials into the store, a config as a config here.

    Files are read from a copy and stay as they are. See docs/peers.md.
    """
    configs = [path for path in paths if path.suffix == CONFIG_ENDING]
    files = [path for path in paths if path.suffix != CONFIG_ENDING]
    if not configs and (out or held_out or force):
        raise ConfigError("-o, --force and --held-out are for a config.toml; none is given")
    if len(configs) > 1 and out:
        raise ConfigError(f"-o '{out}' is one file, and {len(configs)} configs are given")
    written = [_converted(path, out, held_out, force) for path in configs]
    found = _imported(files, drop_torn) if files else []
    if form is TableOrJson.json:
        told = [_told(source, target, mapped) for source, target, mapped in written]
        answer = {"trials": found, "configs": told}
        typer.echo(json.dumps(display.plain(answer), indent=1))
        return
    console = display.console()
    for source, target, mapped in written:
        _print_config(console, source, target, mapped)
    _print_files(console, found, top)


def _converted(
    source: Path, out: Path | None, held_out: str | None, force: bool
) -> tuple[Path, Path, Mapped]:
    """A config and where it was written."""
    from flows.peer_configs import convert

    mapped, target = convert(source, out, held_out, force)
    return source, target, mapped


def _imported(files: Sequence[Path], drop_torn: bool) -> list[dict[str, Any]]:
    """The trials of all files; a bad file leaves nothing behind, not even of those before it."""
    from artifacts.catalog import write_database
    from flows.peers import import_file, imported
    from tasks.peers.files import read_peer_file
    from tasks.stage import Runtime, running

    store = open_store()
    for path in files:
        read_peer_file(path, drop_torn=drop_torn)
    with running(Runtime(store)):
        refs = [import_file(path, drop_torn) for path in files]
    write_database(store)
    return [row for ref in dict.fromkeys(refs) for row in imported(store, ref)]


def _told(source: Path, target: Path, mapped: Mapped) -> dict[str, Any]:
    return {
        "source": str(source),
        "config": str(target),
        "tool": mapped.tool,
        "not_mapped": mapped.unmapped,
        "no_meaning": mapped.meaningless,
        "notes": mapped.notes,
    }


def _print_config(out: Console, source: Path, target: Path, mapped: Mapped) -> None:
    display.heading(out, f"{source.name}, a config of {mapped.tool}: written as {target}")
    for note in mapped.notes:
        out.print(Text(f"  {note}"))
    for title, keys in (("not mapped", mapped.unmapped), ("no meaning here", mapped.meaningless)):
        for key, why in keys.items():
            out.print(Text(f"  {title}: {key} ({why})"))
    if not mapped.unmapped:
        out.print(Text("  not mapped: nothing"))
    out.print(Text(f"  next: tribunal plan {target}"), soft_wrap=True)


def _print_files(out: Console, rows: Rows, top: int) -> None:
    """A heading and a ranking per study of a file."""
    for (source, study), group in groupby(rows, key=lambda row: (row["source"], row["study"])):
        trials = list(group)
        first = trials[0]
        version = f" {first['tool_version']}" if first["tool_version"] else ""
        scored = [row for row in trials if row["rank"] is not None]
        display.heading(out, f"{source}: {first['format']} of {first['tool'] or '?'}{version}")
        out.print(Text(f"  study {study or '-'}, model {first['model'] or 'not told'}"))
        unscored = len(trials) - len(scored)
        out.print(Text(f"  {len(scored)} trials scored, {unscored} not (unfinished or failed)"))
        if not scored:
            continue
        shown = scored[:top]
        lacking = ["not held"] if any(row["unmapped"] for row in shown) else []
        columns = ("rank", "trial", "listed", "refusals", "overrefusals", "KL, nats", *lacking)
        display.print_rows(out, columns, [_cells(row)[: len(columns)] for row in shown])
        if any(row["n_from"] == "slice" for row in scored[:top]):
            out.print(Text("counts are among the prompts that its settings ask for", style="dim"))
    if rows:
        said = "trial: the number that the tool prints; listed: on the tool's own list"
        out.print(Text(said, style="dim"))


def _cells(row: Mapping[str, Any]) -> list[str]:
    shown = row["trial"] if row["listed_as"] is None else row["listed_as"]
    return [
        str(row["rank"]),
        "-" if shown is None else str(shown),
        "yes" if row["listed"] else "",
        share(row["refusals"], row["n_harmful"]),
        share(row["overrefusals"], row["n_harmless"]),
        display.number(row["kl"]),
        row["unmapped"] or "",
    ]


def share(count: int | None, of: int | None) -> str:
    """A count of prompts; a dash for what was not counted."""
    if count is None:
        return "-"
    return f"{count}/{'?' if of is None else of}"


def print_beside(store: Store, study: str | None, split: str, top: int, form: Format) -> None:
    """One's own study and all that was imported, in one ranking of rates.

    Raises:
        ConfigError: another split than the search split, or there is nothing to show.
    """
    if split != "search":
        raise ConfigError(f"imported trials were searched, so --split '{split}' has none of them")
    from artifacts.catalog import Table
    from flows.peers import beside
    from flows.results import find_study

    found = beside(store, find_study(store, study) if study else _newest(store))
    table = Table(found.columns, found.rows[:top])
    if form is not Format.table:
        typer.echo(display.as_text(table, form))
        return
    if not table.rows:
        raise ConfigError("nothing is imported yet; start with: tribunal import PATH")
    out = display.console()
    display.heading(out, "Own study and imported trials, by rates in the strict order")
    columns = ("place", "source", "trial", "refusals", "overrefusals", "KL, nats", "gate")
    display.print_rows(
        out,
        columns,
        [
            [
                str(row["place"]),
                _short(str(row["source"])),
                "-" if row["trial"] is None else str(row["trial"]),
                share(row["refusals"], row["n_harmful"]),
                share(row["overrefusals"], row["n_overrefusal"]),
                display.number(row["kl"]),
                "gated" if row["gated"] else "",
            ]
            for row in table.records()
        ],
    )
    said = "prompts differ between sources, so a place across them is no verdict (docs/peers.md)"
    out.print(Text(said, style="dim"))


def _newest(store: Store) -> str | None:
    """The study that was named last; None in a store that has only imports."""
    from flows.results import find_study

    try:
        return find_study(store, None)
    except ConfigError:
        return None


def _short(text: str, length: int = 26) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
