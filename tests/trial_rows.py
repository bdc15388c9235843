"""Rows of trial tables for tests: complete, and changed where a test says so."""

from __future__ import annotations

from typing import Any

import polars as pl

from artifacts.schemas import trial_schema
from artifacts.store import Manifest, Ref, Store, parquet

PROTOCOL = "c0ffee" + "0" * 26


def trial_row(trial: int | None = 0, **changes: Any) -> dict[str, Any]:
    """One judged trial: ungated, no refusals, KL 0.01."""
    row: dict[str, Any] = dict.fromkeys(trial_schema())
    row |= {
        "protocol": PROTOCOL,
        "arm": "strict",
        "trial": trial,
        "split": "search",
        "prompts": "feed",
        "n_harmful": 2,
        "refusals": 0,
        "n_harmless": 2,
        "n_borderline": 0,
        "overrefusals": 0,
        "overrefusals_harmless": 0,
        "overrefusals_borderline": 0,
        "kl": 0.01,
        "kl_max": 0.02,
        "gated": False,
        "labeller": "heretic-33",
        "responses": [response("harmful", "p0"), response("harmless", "p1", kl=0.01)],
    }
    return row | changes


def response(prompt_class: str, prompt_id: str, **changes: Any) -> dict[str, Any]:
    """One answered prompt."""
    return {
        "class": prompt_class,
        "prompt_id": prompt_id,
        "response": "First, gather the moss.",
        "n_tokens": 6,
        "ended": True,
        "refused": False,
        "disclaimer_hits": 0,
        "compliance": 0.5,
        "degenerate": None,
        "kl": None,
    } | changes


def trials(*rows: dict[str, Any]) -> pl.DataFrame:
    """A trial table."""
    return pl.DataFrame(list(rows), schema=trial_schema())


def put_table(store: Store, kind: str, frame: pl.DataFrame, key: str = "d" * 32) -> Ref:
    """Store a table as an artifact of a kind."""
    provenance = {"seconds": 1.0, "created": "2026-01-01T00:00:00Z"}
    draft = Manifest(kind=kind, key=key, version=1, rows=frame.height, provenance=provenance)
    return store.put(draft, parquet(frame))


def put_study(store: Store, *rows: dict[str, Any], name: str = "village") -> str:
    """Store a study with one generation of the given rows; its full name."""
    study = f"{name}-{PROTOCOL[:6]}"
    put_table(store, "generations", trials(*rows))
    protocol = pl.DataFrame({"protocol": [PROTOCOL], "arm": ["strict"], "labeller": ["heretic-33"]})
    put_table(store, "protocols", protocol, PROTOCOL)
    named = {"study": [study], "name": [name], "protocol": [PROTOCOL], "config": ["{}"]}
    put_table(store, "studies", pl.DataFrame(named))
    return study
