"""A stored column: its type, meaning and unit."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Column:
    """One column: DuckDB type, and what it means with its unit."""

    name: str
    type: str
    meaning: str


def columns(text: str) -> tuple[Column, ...]:
    """Columns from lines 'name | TYPE | meaning'."""
    rows = (line.split("|", 2) for line in text.strip().splitlines())
    return tuple(Column(name.strip(), kind.strip(), why.strip()) for name, kind, why in rows)
