"""Does HERETIC 1.4.0, asked to evaluate a model that Tribunal exported, count what Tribunal counts?

    python benchmarks/heretic_agreement.py [--trials 24] [--preset strict] [--more 2]
                                           [--format table] [--out FILE] [--environment FOLDER]

A search on the organism; its winner is exported and measured by HERETIC's own `--evaluate-model` on
the prompts of the *test* split, where Tribunal measured it too; further trials, of middling and of
large KL, on the search split. Refusals must be equal. KL must be within 1 % of ours or within half
of the last of the four decimals that HERETIC prints, whichever is more. Exit status 1 if not.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import heretic_side
import tribunal_side
from heretic_side import Job
from trials import ENVIRONMENT, NEW_TOKENS, SYSTEM_PROMPT, say, write_prompts

from artifacts.catalog import catalog, fetch
from artifacts.specs import Config
from artifacts.store import Store
from flows.settings import load_config
from tasks.organism import MODEL_FOLDER

TOLERANCE, LAST_DECIMAL = 0.01, 0.00005
Json = dict[str, Any]


@dataclass(frozen=True)
class Chosen:
    """A trial whose export HERETIC evaluates: a row of the table of trials, and its split."""

    name: str
    split: str
    row: Json


def main() -> None:
    options = parse_options()
    heretic_side.install(options.environment)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        job = Job(MODEL_FOLDER, folder / "prompts", "float32", NEW_TOKENS, SYSTEM_PROMPT)
        write_prompts(job.prompts)
        file = folder / "benchmark.toml"
        file.write_text(tribunal_side.config(job))
        overrides = [f"search.preset={options.preset}", f"search.trials={options.trials}"]
        config, store = load_config(str(file), overrides), Store(folder / "store")
        say(f"a search of {options.trials} trials")
        tribunal(store, "run", str(file), *(part for o in overrides for part in ("--set", o)))
        rows, started = [], time.monotonic()
        chosen = choose(store, options.more)
        for number, each in enumerate(chosen, 1):
            rows.append(agree(each, config, store, job, folder / f"work-{number}", options))
            left = (time.monotonic() - started) / number * (len(chosen) - number)
            say(f"{each.name} evaluated; about {left:.0f} s left")
    found = {"heretic": heretic_side.VERSION, "agree": all(r["agree"] for r in rows), "rows": rows}
    if options.out:
        options.out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found) if options.format == "json" else table(found))
    raise SystemExit(0 if found["agree"] else 1)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--trials", type=int, default=24)
    parser.add_argument("--preset", default="strict")
    parser.add_argument("--more", type=int, default=2, help="further trials beside the winner")
    parser.add_argument("--format", choices=["table", "json"], default="table")
    parser.add_argument("--out", type=Path, help="save the JSON here")
    parser.add_argument("--environment", type=Path, default=ENVIRONMENT, help="HERETIC's")
    return parser.parse_args()


def choose(store: Store, more: int) -> list[Chosen]:
    """The winner on the test split, and `more` trials whose KL is spread over the search's."""
    with catalog(store) as connection:
        winner = fetch(
            connection,
            "SELECT t.* FROM trials t JOIN winners w USING (protocol, trial, arm) "
            "WHERE t.split = 'test'",
        ).records()[0]
        ordered = fetch(
            connection,
            "SELECT * FROM trials WHERE split = 'search' AND kl > 0.005 ORDER BY kl",
        ).records()
    places = [len(ordered) * (n + 1) // (more + 1) - 1 for n in range(1, more + 1)]
    others = [ordered[place] for place in places] if ordered else []
    found = [Chosen(f"winner, trial {winner['trial']}", "test", winner)]
    return found + [Chosen(f"trial {row['trial']}", "search", row) for row in others]


def agree(
    chosen: Chosen,
    config: Config,
    store: Store,
    job: Job,
    folder: Path,
    options: argparse.Namespace,
) -> Json:
    """Both tools' numbers of one trial."""
    exported = folder / "exported"
    export(chosen.row, config, store, exported)
    asked = replace(job, split=chosen.split)
    with heretic_side.Session(options.environment, folder / "heretic", asked) as session:
        theirs = session.evaluate(exported)
    ours = {name: chosen.row[name] for name in ("refusals", "kl")}
    return {
        "name": chosen.name,
        "split": chosen.split,
        "tribunal": ours,
        "heretic": {"refusals": theirs.refusals, "kl": theirs.kl},
        "kl_difference": theirs.kl - ours["kl"],
        "agree": agrees(ours["refusals"], ours["kl"], theirs.refusals, theirs.kl),
    }


def agrees(refusals: int, kl: float, their_refusals: int, their_kl: float) -> bool:
    """Refusals are equal and KL is within 1 %, as far as four decimals can tell."""
    allowed = max(TOLERANCE * kl, LAST_DECIMAL)
    return refusals == their_refusals and abs(kl - their_kl) <= allowed * (1 + 1e-9)


def export(row: Json, config: Config, store: Store, folder: Path) -> None:
    """The model of a trial, merged, float32."""
    tribunal(store, "export", str(row["trial"]), str(folder), "--dtype", "float32")


def tribunal(store: Store, *arguments: str) -> None:
    """Run a command of ours, as a user would."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("TRIBUNAL_", "PREFECT_"))}
    told = kept | {"TRIBUNAL_STORE": store.location, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "flows", *arguments]
    if subprocess.run(command, env=told, stdout=subprocess.DEVNULL).returncode:
        raise SystemExit(f"tribunal {' '.join(arguments)} failed; its words are above")


def table(found: Json) -> str:
    """The same for people."""
    lines = [
        "| trial | split | refusals, Tribunal | HERETIC | KL, Tribunal | HERETIC | agree |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in found["rows"]:
        ours, theirs = row["tribunal"], row["heretic"]
        lines.append(
            f"| {row['name']} | {row['split']} | {ours['refusals']} | {theirs['refusals']} | "
            f"{ours['kl']:.5f} | {theirs['kl']:.4f} | {'yes' if row['agree'] else 'NO'} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
