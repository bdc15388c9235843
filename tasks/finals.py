"""The finals: what a race left open is heard to its end, for as long as it can matter.

A search stops a trial once its sampler has learnt all it needs of it, so of many a trial the
overrefusals are not known when it ends. Those that could still be among the first, or on the Pareto
front, are answered here, the best chances first, until nobody who was not heard could be either.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from artifacts.specs import Config
from artifacts.store import Ref
from tasks.judging import Row, outcome
from tasks.numerics.racing import place_of, undecided
from tasks.shards import Case, judge_trials
from tasks.stage import Made, stage
from tasks.trials import read_trials, to_frame, trial_of


@stage(
    "finals",
    version=1,
    ignore=("config",),  # the protocol holds what of it counts
    label=lambda **_: "finals",
    work=lambda config, **_: config.search.finalists if config.search.racing else 0,
)
def judge_finals(
    *,
    generations: Sequence[Ref],
    protocol: Ref,
    config: Config,
    materials: Mapping[str, Ref],
    prompts: Mapping[str, Ref],
) -> Made:
    """Judge to their end all trials of a search that the ranking needs; perhaps none."""
    case = Case(
        whole=True,
        previous=generations[-1],
        protocol=protocol,
        config=config,
        materials=materials,
        prompts=prompts,
    )
    rows = read_trials(generations).sort("trial").to_dicts()
    places, ended = [place_of(outcome(row)) for row in rows], [not row["stopped"] for row in rows]
    heard: dict[int, Row] = {}
    while numbers := undecided(places, ended, config.search.finalists):
        trials = [trial_of(rows[number]) for number in numbers]
        for number, row in zip(numbers, judge_trials(trials, case), strict=True):
            heard[number], places[number], ended[number] = row, place_of(outcome(row)), True
    return Made(to_frame([row for _, row in sorted(heard.items())]))
