"""A study of the shipped organism that takes seconds: few prompts, few trials, short responses."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import polars as pl

from artifacts.catalog import catalog, fetch
from artifacts.store import Store

SIZES = {"direction": 40, "search": 8, "selection": 8, "test": 8}


def write_config(folder: Path, name: str = "small") -> Path:
    """The study's config file."""
    lines = [
        f'name = "{name}"',
        '[model]\nid = "organism"\ndtype = ["float32"]',
        "[search]\ntrials = 4\ngeneration = 2\nstartup = 2",
        "[judging]\nmax_new_tokens = 12",
        "[selection]\ncandidates = 2",
        "[gates]\nmax_length_ratio = 10.0\nmax_degenerate = 1.0",
    ]
    for prompt_class in ("harmful", "harmless", "borderline"):
        lines.append(f"[prompts.{prompt_class}]")
        for split, size in SIZES.items():
            if (prompt_class, split) != ("borderline", "direction"):
                source = f"organism/{prompt_class}-{split}.jsonl"
                place = f'source = "{source}", column = "text", split = "train[:{size}]"'
                lines.append(f"{split} = {{ {place} }}")
    path = folder / f"{name}.toml"
    path.write_text("\n".join(lines) + "\n")
    return path


def environment(store: Store) -> dict[str, str]:
    """The environment of a command on a store: one thread, no hub, no Prefect server."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "TRIBUNAL_"))}
    return kept | {
        "TRIBUNAL_STORE": store.location,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "COLUMNS": "80",
    }


def tribunal(store: Store, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command line to its end."""
    whole = environment(store)
    return subprocess.run(command(*arguments), capture_output=True, text=True, env=whole)


def command(*arguments: str) -> list[str]:
    """The command line as a process."""
    return [sys.executable, "-m", "flows", *arguments]


def digests(store: Store) -> dict[str, str]:
    """Content of every artifact, by kind and key."""
    return {f"{m.kind}/{m.key}": m.sha256 for m in store.manifests()}


def trial_table(store: Store) -> pl.DataFrame:
    """Every judged trial with all its columns, in a fixed order."""
    with catalog(store) as connection:
        table = fetch(connection, "SELECT * FROM trials ORDER BY split, arm, trial")
    return pl.DataFrame(table.records(), infer_schema_length=None)
