"""The process that runs one SELECT of a user: reads the task, answers in JSON lines, and ends."""

from __future__ import annotations

import json
import resource
import sys
import warnings
from typing import Any

import duckdb

from artifacts.catalog import catalog, first_line, lock_down
from artifacts.errors import TribunalError
from artifacts.store import Store

MEMORY_LIMIT = 4 * 2**30  # bytes of data of this process, twice what DuckDB counts itself
BATCH = 1024  # rows


def main() -> None:
    _bound_memory()
    task = json.loads(sys.stdin.read())
    try:
        store = Store(task["store"])
        with warnings.catch_warnings(record=True) as damage, catalog(store) as connection:
            lock_down(connection, store)
            _say({"ready": [str(warning.message) for warning in damage]})
            sys.stdout.flush()
            connection.execute(task["sql"])
            names = [item[0] for item in connection.description or ()]
            while rows := connection.fetchmany(BATCH):
                for row in rows:
                    _say(row)
        _say({"columns": names})
    except (MemoryError, duckdb.OutOfMemoryException):
        _say({"error": "the query needs more memory than it may use; ask for less"})
    except duckdb.IOException as error:
        _say({"error": f"{first_line(error)}; see: tribunal store verify"})
    except (duckdb.Error, TribunalError) as error:
        _say({"error": first_line(error)})
    except (TypeError, ValueError) as error:
        _say({"error": f"the answer cannot be shown ({first_line(error)}); cast it to VARCHAR"})


def _bound_memory() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = MEMORY_LIMIT if hard == resource.RLIM_INFINITY else min(hard, MEMORY_LIMIT)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))


def _say(what: Any) -> None:
    print(json.dumps(what, default=_text))  # noqa: T201


def _text(value: Any) -> str:
    """A value that JSON does not have; bytes as escapes, without Python's quotes."""
    return repr(value)[2:-1] if isinstance(value, bytes) else str(value)


if __name__ == "__main__":
    main()
