"""`tribunal sql`: users' SQL, the worked questions, and a database file for other clients.

`tribunal categories` stores what groups prompts, for questions that ask by category.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.padding import Padding
from rich.text import Text

from artifacts.errors import ConfigError, StoreError
from flows import display
from flows.options import ConfigArgument, Format, FormatOption, SetOption, open_store

if TYPE_CHECKING:
    from artifacts.catalog import Table
    from artifacts.store import Store

DATABASE = Path("tribunal.duckdb")

QueryArgument = Annotated[
    str | None, typer.Argument(metavar="[SELECT]", help="one SELECT; with --open: the file")
]
SchemaOption = Annotated[bool, typer.Option("--schema", help="print views and columns")]
QuestionsOption = Annotated[bool, typer.Option("--questions", help="list the worked questions")]
QuestionOption = Annotated[
    str | None, typer.Option("--question", metavar="NAME", help="answer a worked question")
]
TextOption = Annotated[
    bool, typer.Option("--text", help="with --question: print its SQL instead, to build on")
]
OpenOption = Annotated[
    bool,
    typer.Option("--open", help="write a file of views, ./tribunal.duckdb or the one given"),
]
ColumnOption = Annotated[
    str, typer.Option("--column", help="column of the prompts' sources that holds the category")
]


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.command(
        epilog="Examples: tribunal sql 'SELECT trial, refusals, kl FROM trials ORDER BY kl'; "
        "tribunal sql --question cost-of-a-refusal; tribunal sql --open views.duckdb"
    )(sql)
    app.command(epilog="Example: tribunal categories organism --column noun")(categories)


def sql(
    query: QueryArgument = None,
    schema: SchemaOption = False,
    listed: QuestionsOption = False,
    name: QuestionOption = None,
    text: TextOption = False,
    written: OpenOption = False,
    form: FormatOption = Format.table,
) -> None:
    """Query the store with DuckDB's SQL, read-only."""
    asked = {
        "SELECT": query is not None and not written,
        "--schema": schema,
        "--questions": listed,
        "--question": name is not None,
        "--open": written,
    }
    given = [what for what, is_asked in asked.items() if is_asked]
    if len(given) > 1:
        raise ConfigError(f"give one of '{given[0]}' and '{given[1]}'")
    if text and name is None:
        raise ConfigError("--text prints the SQL of a question; name it with --question")
    if not given:
        raise ConfigError(
            "give a SELECT, --question NAME (--questions lists them), or --schema to see what can "
            "be queried"
        )
    if schema:
        _print_schema(form)
    elif listed:
        _print_questions(form)
    elif written:
        _write(open_store(), Path(query) if query else DATABASE, form)
    elif name is not None:
        _answer(name, text, form)
    elif query is not None:
        from artifacts.catalog import user_query

        _print(user_query(open_store(), query), form)


def _print(table: Table, form: Format) -> None:
    if form is Format.table:
        display.print_query(display.console(), table)
    else:
        typer.echo(display.as_text(table, form))


def _print_schema(form: Format) -> None:
    from artifacts.catalog import Table
    from artifacts.schemas import VIEWS

    rows = tuple((v, c.name, c.type, c.meaning) for v, cols in VIEWS.items() for c in cols)
    if form is not Format.table:
        typer.echo(display.as_text(Table(("view", "column", "type", "meaning"), rows), form))
        return
    out = display.console()
    for view, columns_of in VIEWS.items():
        display.heading(out, view)
        for column in columns_of:
            out.print(f"  {column.name} ({column.type})", style="cyan")
            out.print(Padding(column.meaning, (0, 0, 0, 6)))


def _print_questions(form: Format) -> None:
    from artifacts.catalog import Table
    from artifacts.questions import questions

    rows = tuple((each.name, each.asks, each.reading) for each in questions())
    if form is not Format.table:
        typer.echo(display.as_text(Table(("name", "question", "reading"), rows), form))
        return
    out = display.console()
    for name, asks, _ in rows:
        out.print(Text(name, style="cyan"))
        out.print(Padding(Text(asks), (0, 0, 0, 4)))
    out.print(Text("\nanswered by: tribunal sql --question NAME; explained in docs/sql.md"))


def _answer(name: str, text: bool, form: Format) -> None:
    from artifacts.catalog import user_query
    from artifacts.questions import question

    found = question(name)
    if text:
        typer.echo(found.sql.rstrip("\n"))
        return
    table = user_query(open_store(), found.sql)
    if form is not Format.table:
        typer.echo(display.as_text(table, form))
        return
    out = display.console()
    display.heading(out, found.asks)
    display.print_query(out, table)
    out.print(Text(found.reading, style="dim"))


def _write(store: Store, file: Path, form: Format) -> None:
    """A database file, and how to open it."""
    from artifacts.catalog import Table, write_database

    if store.place.remote:
        raise StoreError(
            f"'{store.location}' is no folder, and a file of views needs one; copy the store to a "
            "disk, or query it with tribunal sql"
        )
    if next(iter(store.entries()), None) is None:
        raise ConfigError(f"nothing in the store '{store.location}' yet; start with: tribunal run")
    with display.waiting(f"writing {file}"):
        path = write_database(store, file)
    assert path is not None
    if form is not Format.table:
        typer.echo(display.as_text(Table(("file", "store"), ((str(path), store.location),)), form))
        return
    for line in _how_to_open(path):
        typer.echo(line)


def _how_to_open(path: Path) -> Sequence[str]:
    return (
        f"wrote {path}",
        "It holds views over the store's files, no data: what is run later shows, and the store",
        "has to stay where it is. Open it read-only, so that several can at a time:",
        f"  duckdb     duckdb -readonly {path}",
        f"  Python     duckdb.connect({str(path)!r}, read_only=True).sql('FROM leaderboard')",
        "  DBeaver    New connection > DuckDB > Path: the file; Driver properties:",
        "             duckdb.read_only = true",
        "then          SHOW TABLES;  FROM leaderboard;  FROM questions.cost_of_a_refusal;",
    )


def categories(
    config: ConfigArgument = "organism",
    column: ColumnOption = "category",
    overrides: SetOption = None,
    form: FormatOption = Format.table,
) -> None:
    """Store the category of every prompt of a config, from a column of the prompts' sources.

    Sets whose source has no such column are left out. No key of a study depends on it.
    """
    from artifacts.catalog import Table
    from flows.categories import store_categories
    from flows.settings import load_config
    from tasks.stage import Runtime, running

    store = open_store()
    with running(Runtime(store)):
        found = store_categories(load_config(config, overrides or ()), column)
    table = Table(("class", "split", "prompts", "categories"), tuple(found))
    _print(table, form)
