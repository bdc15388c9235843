"""The SQL of a report: what is shown beside a table is the text that made it, to the letter.

The files of artifacts/sql/report name their values as `$name`. They are put in as literals, so a
reader can copy a text into `tribunal sql` and get the table's rows.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from artifacts.catalog import Table, fetch, query_text

if TYPE_CHECKING:
    import duckdb

Value = str | int | None


class Asked:
    """A query that was run: its text, and its answer as records."""

    def __init__(self, connection: duckdb.DuckDBPyConnection, name: str, **values: Value) -> None:
        self.sql = text_of(name, **values)
        self.table: Table = fetch(connection, self.sql)
        self.records = self.table.records()


def text_of(name: str, **values: Value) -> str:
    """The text of artifacts/sql/report/`name`.sql with its values as literals.

    `$lineage` stands for the text of lineage.sql.

    Raises:
        KeyError: the text names a value that is not given.
    """

    def literal(found: re.Match[str]) -> str:
        if found[1] == "lineage":
            return text_of("lineage", **values)
        value = values[found[1]]
        if value is None:
            return "NULL"
        return str(int(value)) if isinstance(value, int) else "'" + value.replace("'", "''") + "'"

    return re.sub(r"\$([a-z]+)\b", literal, query_text(f"report/{name}"))
