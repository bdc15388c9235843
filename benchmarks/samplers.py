"""How well the presets search: equal budgets, the same judge, many seeds.

    python benchmarks/samplers.py [--configs organism MINE.toml] [--arms strict random-search ...]
                                  [--seeds 10] [--trials 48] [--prompts 64] [--store FOLDER]
                                  [--format table]

Every arm searches every model once per seed, with the same prompts, labeller, token limit and
number of trials; presets keep their own space, edit, sampler and objective, and start with as many
random trials, as a share of their budget, as they do when released. The search uses the first 64
harmful, 64 harmless and 32 borderline prompts, half of what the organism has (--prompts 128: all),
selection and test all of theirs; a response has 16 tokens. The first arm is held against each other
one, seed by seed: by the first place of the search split, and by the winner on the test split, both
in the strict order (gates, refusals, overrefusals, KL). A tie is a tie in all of them.

It asks how good the trials are, not how long they take, so it may run in company; what is stored is
not run again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import mid_model
import polars as pl
from scipy.stats import binomtest

from artifacts.store import Store
from flows.in_process import run_here
from flows.pipeline import Benchmark, run_pipeline
from flows.settings import load_config
from tasks.stage import planning

ARMS = ("strict", "heretic-1.4.0", "iconoclast-benchmark", "random-search")
STARTUP = {"heretic-1.4.0": 60 / 200, "iconoclast-benchmark": 4 / 48, "strict": 8 / 48}
SAME = (
    "judging.labeller=heretic-33",
    "judging.max_new_tokens=16",  # tells refusals of these models, which answer in 17 to 37 tokens
    "selection.controls=[]",
)
STORE = mid_model.CACHE / "samplers"
Place = tuple[bool, int, int, float]
Json = dict[str, Any]


@dataclass(frozen=True)
class Found:
    """What one arm found of one model with one seed."""

    search: Place  # first place of the search split
    test: Place  # the winner on the test split
    kl_at_zero: float | None  # least KL of a trial that passed the gates and refused nothing


def main() -> None:
    options = parse_options()
    found: dict[tuple[str, str, int], Found] = {}
    store = Store(options.store)
    members = list(product(options.configs, range(options.seeds), options.arms))
    for number, (config, seed, arm) in enumerate(members, 1):
        say(f"{config}, {arm}, seed {seed}: {number} of {len(members)}")
        found[config, arm, seed] = search(store, config, arm, seed, options)
    asked = {name: getattr(options, name) for name in ("trials", "seeds", "prompts")}
    said = {**asked, "models": list(tell(found, options))}
    print(json.dumps(said) if options.format == "json" else table(said))


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--configs", nargs="+", default=["organism"])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), help="the first against the rest")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--trials", type=int, default=48)
    parser.add_argument("--prompts", type=int, default=64, help="harmful ones of the search")
    parser.add_argument("--store", type=Path, default=STORE)
    parser.add_argument("--format", choices=["table", "json"], default="table")
    return parser.parse_args()


def search(store: Store, config: str, arm: str, seed: int, options: argparse.Namespace) -> Found:
    """One search to its end, selection and test included."""
    own = [f"search.preset={arm}", f"seed={seed}", f"search.trials={options.trials}"]
    own += [f"search.startup={round(STARTUP[arm] * options.trials)}"] if arm in STARTUP else []
    shares = {"harmful": options.prompts, "harmless": options.prompts}
    for name, n in {**shares, "borderline": options.prompts // 2}.items():
        own.append(f"prompts.{name}.search.split=train[:{n}]")
    chosen = load_config(config, (*own, *SAME))
    with planning(store) as steps:
        planned = run_pipeline(chosen)
    work = sum(step.work for step in steps if not step.cached)
    return look(store, planned if not work else run_here(chosen, store, work))


def look(store: Store, made: Benchmark) -> Found:
    board = store.read(made.leaderboard)
    searched = board.filter((pl.col("split") == "search") & pl.col("rank").is_not_null())
    tested = board.filter((pl.col("split") == "test") & (pl.col("arm") != "unedited"))
    clean = searched.filter((pl.col("refusals") == 0) & ~pl.col("gated"))["kl"].to_list()
    return Found(
        place(searched.sort("rank").row(0, named=True)),
        place(tested.sort("rank").row(0, named=True)),
        min(clean, default=None),
    )


def place(row: Mapping[str, Any]) -> Place:
    return row["gated"], row["refusals"], row["overrefusals"], row["kl"]


def tell(
    found: Mapping[tuple[str, str, int], Found], options: argparse.Namespace
) -> Iterator[Json]:
    """Per model and arm: what it reached, and how the first arm did against it."""
    ours, seeds = options.arms[0], range(options.seeds)
    for config, arm in product(options.configs, options.arms):
        own = [found[config, arm, seed] for seed in seeds]
        kls = [each.kl_at_zero for each in own if each.kl_at_zero is not None]
        row: Json = {
            "model": Path(config).stem,
            "arm": arm,
            "median_kl_at_zero_refusals": statistics.median(kls) if kls else None,
            "seeds_with_zero_refusals": len(kls),
            "median_refusals": statistics.median(each.search[1] for each in own),
        }
        for split in ("search", "test") if arm != ours else ():
            pairs = [
                (getattr(found[config, ours, seed], split), getattr(each, split))
                for seed, each in zip(seeds, own, strict=True)
            ]
            row[split] = against(pairs)
        yield row


def against(pairs: Sequence[tuple[Place, Place]]) -> Json:
    """Wins, ties and losses of the first of each pair; the p-value is an exact sign test's."""
    wins = sum(one < other for one, other in pairs)
    losses = sum(one > other for one, other in pairs)
    decided = wins + losses
    p = float(binomtest(wins, decided).pvalue) if decided else 1.0
    return {"wins": wins, "ties": len(pairs) - decided, "losses": losses, "p": p}


def table(said: Json) -> str:
    """The same for people."""
    lines = [
        f"{said['trials']} trials, {said['seeds']} seeds, {said['prompts']} harmful prompts; "
        "wins-ties-losses of the first arm (exact sign test)",
        "",
        "| model | arm | median KL at 0 refusals (seeds) | search split | test split |",
        "|---|---|---|---|---|",
    ]
    for row in said["models"]:
        kl, n = row["median_kl_at_zero_refusals"], row["seeds_with_zero_refusals"]
        cells = [
            row["model"],
            row["arm"],
            f"{'-' if kl is None else f'{kl:.4f}'} ({n})",
            *(score(row[split]) if split in row else "" for split in ("search", "test")),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def score(held: Mapping[str, Any]) -> str:
    return f"{held['wins']}-{held['ties']}-{held['losses']} (p {held['p']:.3f})"


def say(line: str) -> None:
    print(line, file=sys.stderr)


if __name__ == "__main__":
    main()
