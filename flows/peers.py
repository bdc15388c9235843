"""What other tools found: imported, ranked, beside one's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from artifacts.catalog import Table, catalog, fetch, query_text
from artifacts.store import Ref, Store
from tasks.peers.importing import import_trials

SHOWN = (
    "source, format, tool, tool_version, study, model, trial, listed_as, state, rank, listed, "
    "refusals, n_harmful, base_refusals, overrefusals, n_harmless, n_from, kl, unmapped"
)
Row = dict[str, Any]


def import_file(path: Path, drop_torn: bool) -> Ref:
    """The artifact of a file's trials; stages have to run."""
    return import_trials(path=path, drop_torn=drop_torn)


def imported(store: Store, ref: Ref | None = None) -> list[Row]:
    """Imported trials, of one artifact or of all, each file's best first."""
    with catalog(store) as connection:
        return fetch(
            connection,
            f"SELECT {SHOWN} FROM imported_trials WHERE key = coalesce($1, key) "
            "ORDER BY created, source, key, study, rank NULLS LAST, trial",
            [ref.key if ref else None],
        ).records()


def beside(store: Store, study: str | None) -> Table:
    """One's own study and every imported file by the strict order of rates (sql/beside.sql)."""
    with catalog(store) as connection:
        return fetch(connection, query_text("beside"), [study])
