"""A generation's trials, judged side by side: each worker takes a shard of them.

A shard is an artifact of its own, named by its protocol, its prompts and its trials, and never by
who judges it or how many do. So what a worker has finished survives whatever else dies, and the
generation that is put together from shards is, byte for byte, the one that a single worker makes.
Afterwards nothing needs them: `tribunal store gc` frees them.

There are as many shards as workers, of sizes that differ by one at most. Smaller pieces would lose
less when a worker dies, but each sets up its court anew and is one more artifact to free later.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TypedDict

from artifacts.specs import Config
from artifacts.store import Ref
from tasks.history import base_outcome, learn_drafts, race, recall
from tasks.judging import Row
from tasks.probe import open_model, read_card
from tasks.stage import Made, current, stage
from tasks.trials import Trial, open_court, to_frame


class Case(TypedDict):
    """What the trials of a search are judged by, and the generation before them.

    `whole`: judged to their end, whatever a race would say.
    """

    whole: bool
    previous: Ref | None
    protocol: Ref
    config: Config
    materials: Mapping[str, Ref]
    prompts: Mapping[str, Ref]


def trial_numbers(first: int, count: int) -> str:
    """A person's words for `count` trials from `first` on."""
    return f"trial {first}" if count == 1 else f"trials {first}-{first + count - 1}"


def judge_trials(trials: Sequence[Trial], case: Case) -> list[Row]:
    """The rows of trials on the search split, in order: judged by the run's workers, or here."""
    runtime = current()
    if runtime.workers is None:
        return _judge_here(trials, case)
    parts = cut(trials, runtime.workers.count())
    shards = runtime.workers.obtain(
        judge_shard,
        [{"trials": part, **case} for part in parts],
        lambda: open_model(case["config"].model, [read_card(case["materials"]["model"]).dtype]),
    )
    return [row for shard in shards for row in runtime.store.read(shard).to_dicts()]


def cut(trials: Sequence[Trial], parts: int) -> list[tuple[Trial, ...]]:
    """At most `parts` runs of neighbours, none empty, whose sizes differ by one at most."""
    size, larger = divmod(len(trials), parts)
    ends = [number * size + min(number, larger) for number in range(parts + 1)]
    found = [tuple(trials[a:b]) for a, b in pairwise(ends)]
    return [part for part in found if part]


@stage(
    "shards",
    version=3,
    ignore=("config",),  # the protocol holds what of it counts
    identify={"trials": lambda trials: [[t.arm, t.number, dict(t.parameters)] for t in trials]},
    label=lambda trials, **_: trial_numbers(trials[0].number, len(trials)),
    work=lambda trials, **_: len(trials),
)
def judge_shard(
    *,
    trials: Sequence[Trial],
    whole: bool,
    previous: Ref | None,
    protocol: Ref,
    config: Config,
    materials: Mapping[str, Ref],
    prompts: Mapping[str, Ref],
) -> Made:
    """Judge some of a generation's trials."""
    case = Case(
        whole=whole,
        previous=previous,
        protocol=protocol,
        config=config,
        materials=materials,
        prompts=prompts,
    )
    return Made(to_frame(_judge_here(trials, case)))


def _judge_here(trials: Sequence[Trial], case: Case) -> list[Row]:
    previous, config, materials = case["previous"], case["config"], case["materials"]
    court, base = open_court("search", config, case["protocol"], materials, case["prompts"])
    learn_drafts(court.bench, materials["baseline"], previous)
    if case["whole"]:
        numbers = [trial.number for trial in trials]
        return court.judge(trials, recalled=recall(court.bench, previous, numbers))
    return court.judge(trials, race(previous, config.search, base_outcome(base.rows, config.gates)))
