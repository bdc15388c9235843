"""What users' SQL may say: one SELECT over the store's views, and nothing that reads or does more.

DuckDB itself is asked for the parse tree, so no comment, quoting or Unicode trick can hide a word.
What its own settings forget is refused here: a CTE may hold an INSERT or a COPY, a table function
may read files, settings and logs, and a scalar function may tell where secrets lie.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import duckdb

from artifacts.errors import QueryError

LONGEST = 20_000  # characters; far longer texts overflow DuckDB's parser, which ends the process
READ_ONLY = "only one SELECT at a time; the store is read-only to SQL"
QUERY_NODES = frozenset({"SELECT_NODE", "SET_OPERATION_NODE", "RECURSIVE_CTE_NODE", "CTE_NODE"})
TABLE_FUNCTIONS = frozenset({"range", "generate_series", "unnest"})
SYSTEM_TABLES = ("duckdb_", "pg_", "sqlite_", "pragma_")
SHOWN = frozenset({"", '"tables"'})  # what SHOW may list besides the columns of a view
REFUSED_FUNCTIONS = frozenset(
    {
        "current_setting",
        "getvariable",
        "json_deserialize_sql",
        "nextval",
        "setseed",
        "setval",
        "sleep_ms",
        "write_log",
    }
)


def refuse_all_but_select(sql: str) -> None:
    """Pass exactly one SELECT (or DESCRIBE, SUMMARIZE, SHOW TABLES, VALUES, FROM) over views.

    Raises:
        QueryError: it is anything else, or too long or nested too deeply to be looked through.
    """
    if len(sql) > LONGEST:
        raise QueryError(f"a query has at most {LONGEST} characters, not '{len(sql)}'")
    statements = _parsed(sql)
    if len(statements) != 1:
        raise QueryError(READ_ONLY)
    for node in _nodes(statements):
        _look_at(node)


def _parsed(sql: str) -> list[Any]:
    connection = duckdb.connect(":memory:")
    try:
        row = connection.execute("SELECT json_serialize_sql(?::VARCHAR)", [sql]).fetchone()
        answer = json.loads(row[0]) if row else {}
    except duckdb.InvalidInputException as error:  # a lone surrogate, from bytes that are no UTF-8
        raise QueryError("the query is no Unicode text; write it in UTF-8") from error
    except RecursionError as error:
        raise QueryError("the query is nested too deeply; use WITH") from error
    finally:
        connection.close()
    if answer["error"]:
        is_syntax = answer["error_type"] == "parser"
        said = " ".join(answer["error_message"].split())
        raise QueryError(f"Parser Error: {said}" if is_syntax else READ_ONLY)
    statements: list[Any] = answer["statements"]
    return statements


def _nodes(tree: Any) -> Iterator[dict[str, Any]]:
    """Every object of a JSON tree."""
    todo = [tree]
    while todo:
        item = todo.pop()
        if isinstance(item, dict):
            yield item
            todo += item.values()
        elif isinstance(item, list):
            todo += item


def _look_at(node: dict[str, Any]) -> None:
    kind = node.get("type")
    if "cte_map" in node and kind not in QUERY_NODES:
        raise QueryError(READ_ONLY)
    if kind == "TABLE_FUNCTION":
        name = node["function"]["function_name"].lower()
        if name not in TABLE_FUNCTIONS:
            known = ", ".join(sorted(TABLE_FUNCTIONS))
            raise QueryError(f"table function '{name}' is refused; known: {known}, and the views")
    elif node.get("class") == "FUNCTION" and node["function_name"].lower() in REFUSED_FUNCTIONS:
        raise QueryError(f"function '{node['function_name']}' is refused; query the views")
    elif kind == "BASE_TABLE":
        _look_at_table(node["qualified_name"]["path"])
    elif kind == "SHOW_REF" and node["table_name"] not in SHOWN:
        _look_at_table([node["table_name"]])


def _look_at_table(path: list[str]) -> None:
    """A table is a plain word: no file, URL or system table, nor another database's."""
    name = path[-1]
    if len(path) > 1 or not name.isidentifier() or name.lower().startswith(SYSTEM_TABLES):
        raise QueryError(f"'{'.'.join(path)}' is no view; see: tribunal sql --schema")
