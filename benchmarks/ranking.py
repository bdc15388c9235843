"""Time and memory of the ranking SQL over stores with many trial rows, beside a plain window query.

python benchmarks/ranking.py [--rows 1000000 10000000] [--studies 50] [--repeat 3]

Every question is asked in a process of its own, so its peak memory is its own; the times are the
best of the repetitions, each with a catalog built anew. Processor seconds are of all threads
together, and say more than the clock's where something else runs.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import tempfile
import time

import numpy as np
import polars as pl

from artifacts.catalog import catalog, fetch
from artifacts.schemas import TRIALS, polars_schema
from artifacts.store import Manifest, Store, parquet

GENERATIONS = 10  # artifacts of each study; the last one repeats a tenth of the one before it
PLAIN = """SELECT max(place) FROM (SELECT rank() OVER (
    PARTITION BY protocol ORDER BY refusals, overrefusals, kl) AS place FROM stored_generations)"""
QUESTIONS = {
    "plain window, duplicates kept": PLAIN,
    "`ranking`, whole": "SELECT max(rank) FROM ranking",
    "`ranking`, best 5 of every study": "SELECT study, trial FROM ranking WHERE rank <= 5",
    "`ranking`, one study": "SELECT max(rank) FROM ranking WHERE study = 's-7'",
    "`pareto`, every study": "SELECT count(*) FROM pareto",
    "`leaderboard`, whole": "SELECT max(rank), count(*) FILTER (pareto) FROM leaderboard",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000_000, 10_000_000])
    parser.add_argument("--studies", type=int, default=50)
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    print(
        "| rows | question | best time, s | processor, s | peak memory, GB |\n|---|---|---|---|---|"
    )
    for rows in options.rows:
        with tempfile.TemporaryDirectory() as folder:
            fill(Store(folder), rows, options.studies)
            for name, sql in QUESTIONS.items():
                told = in_new_process(folder, sql, options.repeat)
                print(f"| {rows:,} | {name} | {' | '.join(f'{n:.2f}' for n in told)} |", flush=True)


def in_new_process(folder: str, sql: str, repeat: int) -> tuple[float, float, float]:
    """Best time (s), processor time (s) and peak memory (GB) of a question."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(ask, (folder, sql, repeat))


def ask(folder: str, sql: str, repeat: int) -> tuple[float, float, float]:
    """As `in_new_process`, in this process."""
    times, worked = [], []
    for _ in range(repeat):
        with catalog(Store(folder)) as connection:
            connection.execute("SET enable_progress_bar = false")  # a spawned process shows one
            started, busy = time.perf_counter(), time.process_time()
            fetch(connection, sql)
            times.append(time.perf_counter() - started)
            worked.append(time.process_time() - busy)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    return min(times), min(worked), peak


def fill(store: Store, rows: int, studies: int) -> None:
    """Studies of random trials, a chain of generations each, the last one begun twice."""
    dice = np.random.default_rng(0)
    each = rows // studies
    per = each // GENERATIONS
    for number in range(studies):
        protocol = f"{number:032x}"
        trials = random_trials(dice, protocol, each)
        for generation in range(GENERATIONS):
            first = generation * per - (per // 10 if generation == GENERATIONS - 1 else 0)
            last = each if generation == GENERATIONS - 1 else (generation + 1) * per
            put(store, "generations", f"{number:016x}{generation:016x}", trials[first:last])
        named = {"study": [f"s-{number}"], "name": ["s"], "protocol": [protocol], "config": ["{}"]}
        put(store, "studies", protocol, pl.DataFrame(named))


def random_trials(dice: np.random.Generator, protocol: str, count: int) -> pl.DataFrame:
    """Judged trials of one study, with all columns and no responses."""
    trials = pl.DataFrame(
        {
            "protocol": [protocol] * count,
            "arm": ["strict"] * count,
            "trial": range(count),
            "split": ["search"] * count,
            "prompts": ["5eed"] * count,
            "refusals": dice.integers(0, 128, count),
            "overrefusals": dice.integers(0, 192, count),
            "kl": dice.exponential(0.1, count),
            "gated": dice.random(count) < 0.1,
        }
    )
    missing = {n: t for n, t in polars_schema(TRIALS).items() if n not in trials.columns}
    return trials.with_columns(pl.lit(None, t).alias(n) for n, t in missing.items())


def put(store: Store, kind: str, key: str, frame: pl.DataFrame) -> None:
    draft = Manifest(kind=kind, key=key, version=1, rows=frame.height)
    store.put(draft, parquet(frame))


if __name__ == "__main__":
    main()
