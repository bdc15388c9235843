"""`tribunal report`: a study, or a study plan, as one HTML file.

The file is no artifact: all its numbers are stored, it says what the store holds now (rankings and
openings go on), and it is made again in seconds. So it is written where the user says, whole or not
at all. No store is changed, but for comparisons of a plan's winners that were not made yet.
"""

from __future__ import annotations

import json
import os
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from artifacts.errors import ConfigError
from flows import display
from flows.options import PairOption, SetOption, TableOrJson, open_store

StudyArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="STUDY",
        help="a study's name, or a study plan's name or TOML file; default: the newest study",
    ),
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
    epilog += "; tribunal report --responses 200 --format json"
    app.command(epilog=f"{epilog}; tribunal report plan.toml -o plan.html")(report)


def report(
    study: StudyArgument = None,
    out: OutOption = Path("report.html"),
    responses: ResponsesOption = 20,
    overrides: SetOption = None,
    force: ForceOption = False,
    form: PairOption = TableOrJson.table,
) -> None:
    """Write a study as one HTML file: rankings, plots, responses, statistics, provenance, SQL.

    Of a study plan: its winners ranked together, who is tied with the first, costs. --set is what
    `tribunal study` was given. The file loads nothing from anywhere, and its tables can be read
    without a script.
    """
    refuse_to_replace(out, force)
    if study is not None and is_plan(study):
        text, answer, said = _of_plan(study, overrides or [])
    elif overrides:
        raise ConfigError(f"--set is for study plans; '{overrides[0]}' changes nothing of a study")
    else:
        text, answer, said = _of_study(study, responses)
    written = write_whole(out, text)
    if form is TableOrJson.json:
        told = {"study": answer.pop("study"), "file": str(out), "bytes": written}
        typer.echo(json.dumps(told | answer, indent=1))
        return
    console = display.console()
    console.print(Text(f"wrote {out} ({written / 1e6:.1f} MB): {answer['study']}"), soft_wrap=True)
    console.print(f"  {said}; open it in any browser, no network is needed")


def is_plan(name: str) -> bool:
    """Whether a name is a study plan's: a TOML file, or a shipped one."""
    from flows.settings import shipped

    return name.endswith(".toml") or name in shipped("studies")


def _of_study(name: str | None, responses: int) -> tuple[str, dict[str, Any], str]:
    """The file of a study, what to answer, and what to say."""
    from flows.report.contents import collect
    from flows.report.study_page import page

    with display.counting("report") as advance:
        contents = collect(open_store(), name, responses, advance)
        text = page(contents, advance)
    rows = {split: len(found) for split, found in contents.rankings.items()}
    answer = {"study": contents.name, "rows": rows, "responses": len(contents.pairs)}
    return text, answer, f"{rows['search']} trials, {len(contents.pairs)} responses"


def _of_plan(name: str, overrides: list[str]) -> tuple[str, dict[str, Any], str]:
    """The same of a study plan.

    Raises:
        ConfigError: it is the config of one benchmark, or no plan that is valid and was run.
    """
    from flows.report.plan_contents import collect_plan
    from flows.report.plan_page import plan_page
    from flows.settings import find_file, read_toml, shipped
    from flows.study_plan import load_plan, said_by

    file = find_file(name, shipped("studies"))
    given = read_toml(file) if file else {}
    if "model" in given:
        study = given.get("name", "STUDY")
        raise ConfigError(f"'{name}' is no study plan; its study by name: tribunal report {study}")
    with display.counting("report") as advance:
        contents = collect_plan(open_store(), load_plan(name), overrides, advance)
        text = plan_page(contents, advance)
    missing = {member: said_by(error) for member, error in contents.result.failed.items()}
    finished, total = len(contents.result.finished), len(contents.members)
    answer = {"study": contents.result.name, "finished": finished, "missing": missing}
    return text, answer, f"{finished} of {total} members"


def refuse_to_replace(file: Path, force: bool) -> None:
    """Refuse a place where something else is.

    Raises:
        ConfigError: it is a folder, or a file that is no report and `force` is not given.
    """
    from flows.report.html_file import MARK

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
