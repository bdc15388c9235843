"""`tribunal report`: a study as one HTML file.

The file is no artifact: all its numbers are stored, it says what the store holds now (rankings and
openings go on), and it is made again in seconds. So it is written where the user says, whole or not
at all, and no store is changed.
"""

from __future__ import annotations

import json
import os
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from artifacts.errors import ConfigError
from flows import display
from flows.options import PairOption, TableOrJson, open_store

StudyArgument = Annotated[
    str | None, typer.Argument(metavar="STUDY", help="default: the newest study")
]
OutOption = Annotated[
    Path, typer.Option("--out", "-o", metavar="FILE", help="the file; a report there is replaced")
]
ResponsesOption = Annotated[
    int, typer.Option("--responses", min=0, max=100_000, help="how many to show of each class")
]
ForceOption = Annotated[
    bool, typer.Option("--force", help="replace a file that is not a report, too")
]


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    epilog = "Examples: tribunal report; tribunal report organism -o organism.html"
    app.command(epilog=f"{epilog}; tribunal report --responses 200 --format json")(report)


def report(
    study: StudyArgument = None,
    out: OutOption = Path("report.html"),
    responses: ResponsesOption = 20,
    force: ForceOption = False,
    form: PairOption = TableOrJson.table,
) -> None:
    """Write a study as one HTML file: rankings, plots, responses, statistics, provenance, SQL.

    The file loads nothing from anywhere, and its tables can be read without a script.
    """
    from flows.report.contents import collect
    from flows.report.page import page

    refuse_to_replace(out, force)
    with display.counting("report") as advance:
        contents = collect(open_store(), study, responses, advance)
        text = page(contents, advance)
    name, written = contents.name, write_whole(out, text)
    if form is TableOrJson.json:
        rows = {split: len(found) for split, found in contents.rankings.items()}
        answer = {"study": name, "file": str(out), "bytes": written, "rows": rows}
        typer.echo(json.dumps(answer | {"responses": len(contents.pairs)}, indent=1))
        return
    console = display.console()
    console.print(Text(f"wrote {out} ({written / 1e6:.1f} MB): {name}"), soft_wrap=True)
    console.print(
        f"  {len(contents.rankings['search'])} trials, {len(contents.pairs)} responses; open it in "
        "any browser, no network is needed"
    )


def refuse_to_replace(file: Path, force: bool) -> None:
    """Refuse a place where something else is.

    Raises:
        ConfigError: it is a folder, or a file that is no report and `force` is not given.
    """
    from flows.report.page import MARK

    try:
        if file.is_dir():
            raise ConfigError(f"--out: '{file}' is a folder; give a file, '{file}/report.html' say")
        if not file.parent.is_dir():
            raise ConfigError(f"--out: there is no folder '{file.parent}'; make it first")
        if force or not file.exists():
            return
        with file.open("rb") as opened:
            start = opened.read(1000)
    except OSError as error:
        said = (error.strerror or str(error)).lower()
        raise ConfigError(f"--out: cannot read '{file}' ({said}); choose another name") from error
    if MARK.encode() not in start:
        raise ConfigError(
            f"--out: '{file}' is there and is no report; choose another name, or --force"
        )


def write_whole(file: Path, text: str) -> int:
    """Write a file that appears whole or not at all; its bytes.

    Raises:
        ConfigError: it cannot be written.
    """
    data = text.encode()
    final = Path(os.path.realpath(file))
    partial = final.with_name(f".{final.name[:200]}.{uuid.uuid4().hex[:8]}.partial")
    try:
        partial.write_bytes(data)
        partial.replace(final)
    except BaseException as error:
        with suppress(OSError):
            partial.unlink()
        if isinstance(error, OSError):
            said = (error.strerror or str(error)).lower()
            raise ConfigError(
                f"--out: cannot write '{file}' ({said}); choose another place"
            ) from error
        raise
    return len(data)
