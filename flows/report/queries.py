"""The SQL of a report: what is shown beside a table is the text that made it, to the letter.

The files of artifacts/sql/report name their values as `$name`. They are put in as literals, so a
reader can copy a text into `tribunal sql` and get the table's rows.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from artifacts.catalog import Table, fetch, query_text

if TYPE_CHECKING:
    import duckdb

Value = str | int | Sequence[str] | None


class Asked:
    """A query that was run: its text, and its answer as records."""

    def __init__(self, connection: duckdb.DuckDBPyConnection, name: str, **values: Value) -> None:
        self.sql = text_of(name, **values)
        self.table: Table = fetch(connection, self.sql)
        self.records = self.table.records()


def text_of(name: str, **values: Value) -> str:
    """The text of artifacts/sql/report/`name`.sql with its values as literals.

    `$lineage` stands for the text that the value `lineage` names, lineage.sql by default.

    Raises:
        KeyError: the text names a value that is not given.
    """

    def literal(found: re.Match[str]) -> str:
        if found[1] == "lineage":
            return text_of(str(values.get("lineage", "lineage")), **values)
        return _literal(values[found[1]])

    return re.sub(r"\$([a-z]+)\b", literal, query_text(f"report/{name}"))


def _literal(value: Value) -> str:
    """A value as SQL has it; a list in brackets, for IN."""
    if value is None:
        return "NULL"
    if isinstance(value, int):
        return str(int(value))
    if isinstance(value, str):
        return "'" + value.replace("'", "''") + "'"
    return f"({', '.join(map(_literal, value))})"
