"""`tribunal heads`, `norms`, `activity` and `divergence`: a figure's numbers, then its pictures."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from artifacts.errors import ConfigError
from flows import display
from flows.figures.figure import ABOUT
from flows.options import PairOption, SetOption, TableOrJson, has_server, open_store, unwatched

if TYPE_CHECKING:
    from artifacts.figure_specs import FigureConfig
    from artifacts.store import Store
    from flows.figures.figure import Figure, FigureRun

ConfigArgument = Annotated[
    str, typer.Argument(metavar="CONFIG", help="name of a shipped figure config, or a TOML file")
]
OutOption = Annotated[
    Path | None,
    typer.Option("--out", metavar="FOLDER", help="write pictures (PNG, SVG, HTML) and tables here"),
]


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    for name, about in ABOUT.items():
        epilog = f"Examples: tribunal {name}; tribunal {name} organism --out pictures; "
        epilog += f"tribunal {name} mine.toml --format json"
        app.command(name=name, help=about, epilog=epilog)(_command(name))


def _command(name: str) -> Callable[..., None]:
    def draw(
        config: ConfigArgument = "organism",
        overrides: SetOption = None,
        out: OutOption = None,
        form: PairOption = TableOrJson.table,
    ) -> None:
        from flows.figures.config import load_figure_config
        from flows.figures.figure import figure_named

        chosen, store = load_figure_config(config, name, overrides or ()), open_store()
        if out is not None and out.exists() and not out.is_dir():
            raise ConfigError(f"--out: '{out}' is a file; give a folder")
        figure = figure_named(name)
        found = _execute(figure, chosen, store)
        if out is not None:
            _write(out, name, store, found)
        _report(figure, chosen, store, found, form)

    return draw


def _execute(figure: Figure, config: FigureConfig, store: Store) -> FigureRun:
    """What is stored is not computed again: then no torch is loaded, and no server asked."""
    from flows.figures.config import sources
    from tasks.prompt_sources import read_prompts
    from tasks.stage import planning

    with planning(store) as steps:
        found = figure.run(config)
    missing = [step for step in steps if not step.cached]
    if not missing:
        return found
    for source in sources(getattr(config, figure.name)):
        read_prompts(source)  # a bad last one leaves nothing behind
    if has_server():
        from flows.figures.flow import FLOWS

        with unwatched():
            made: FigureRun = FLOWS[figure.name](config)
        return made
    return _run_here(figure, config, store, sum(step.work for step in missing))


def _run_here(figure: Figure, config: FigureConfig, store: Store, work: int) -> FigureRun:
    from artifacts.catalog import write_database
    from flows.logs import Tally, with_log
    from flows.progress import Progressing
    from flows.settings import Settings

    settings = Settings.from_environment()
    console, tally = display.console(stderr=True), Tally(store)
    with Progressing(console, work) as bar:
        reporter = with_log(settings.log, store, bar, tally, config=config.name)
        with settings.running(store, reporter):
            found = figure.run(config)
    write_database(store)
    console.print(tally.line())
    return found


def _write(folder: Path, name: str, store: Store, found: FigureRun) -> None:
    """Pictures under their own names, tables as Parquet; files of the same name are replaced.

    Raises:
        ConfigError: the folder cannot be written.
    """
    files = {file: store.read_bytes(ref) for file, ref in found.pictures.items()}
    files |= {
        f"{name}-{table}.parquet": store.read_bytes(ref) for table, ref in found.tables.items()
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file, data in files.items():
            partial = folder / f".{file}.partial"
            partial.write_bytes(data)
            partial.replace(folder / file)
    except OSError as error:
        raise ConfigError(f"--out: cannot write '{folder}' ({error.strerror})") from error


def _report(
    figure: Figure, config: FigureConfig, store: Store, found: FigureRun, form: TableOrJson
) -> None:
    sections = figure.sections(store, found)
    if form is TableOrJson.json:
        refs = {**found.tables, **found.pictures}
        answer: Mapping[str, Any] = {
            "figure": figure.name,
            "config": config.name,
            "sections": [
                {"title": s.title, "note": s.note, "rows": list(s.rows)} for s in sections
            ],
            "artifacts": {name: f"{ref.kind}/{ref.key}" for name, ref in refs.items()},
        }
        typer.echo(json.dumps(display.plain(answer), indent=1))
        return
    out = display.console()
    for section in sections:
        display.heading(out, section.title)
        if section.rows:
            rows = [[_cell(value) for value in row.values()] for row in section.rows]
            display.print_rows(out, list(section.rows[0]), rows)
        if section.note:
            out.print(Text(f"  {section.note}"))


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return display.number(value) if isinstance(value, float) else str(value)
