"""What several commands take: forms of an answer, a config, a study, the store, the server."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import Annotated

import typer

from artifacts.store import Store
from flows.settings import Settings


class Format(StrEnum):
    """Forms of an answer."""

    table = "table"
    json = "json"
    csv = "csv"


class TableOrJson(StrEnum):
    """Forms of an answer that is not one table."""

    table = "table"
    json = "json"


TrialArgument = Annotated[
    str, typer.Argument(metavar="TRIAL", help="number, STUDY/NUMBER, or 'winner' for the number")
]
ConfigArgument = Annotated[
    str, typer.Argument(metavar="CONFIG", help="name of a shipped config, or a TOML file")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="change a field: --set search.trials=96"),
]
FormatOption = Annotated[Format, typer.Option("--format", help="how to print the answer")]
PairOption = Annotated[TableOrJson, typer.Option("--format", help="how to print the answer")]
StudyOption = Annotated[
    str | None, typer.Option("--study", metavar="STUDY", help="default: the newest study")
]


def open_store() -> Store:
    """The store of TRIBUNAL_STORE."""
    return Settings.from_environment().open_store()


def has_server() -> bool:
    """Whether commands run through Prefect: a server is configured."""
    return bool(os.environ.get("PREFECT_API_URL"))


@contextmanager
def unwatched() -> Iterator[None]:
    """Let a command's flow runs send no heartbeat: the automation watches those of workers."""
    from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings

    with temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}):
        yield
