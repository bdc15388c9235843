"""The diagram as code: prompts, activations, directions, search, finals, selection, test, ranking.

Each line asks for one artifact. The same lines run inside a Prefect flow (`flows.benchmark`), run
without Prefect (the command line when no server is configured), and list a plan.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from artifacts.specs import CLASSES, Config, PromptSource, SearchSpec
from artifacts.store import Ref, Store
from tasks.activations import cache_activations
from tasks.baseline import measure_baseline
from tasks.directions import compute_directions
from tasks.explicit import fix_parameters, judge_explicit
from tasks.finals import judge_finals
from tasks.leaderboard import draw_trials, rank_trials
from tasks.locked_test import measure_test
from tasks.probe import probe_model
from tasks.prompts import check_sources, compare_splits, load_prompts
from tasks.selection import freeze_winner, select_trials
from tasks.shards import trial_numbers
from tasks.stage import planning
from tasks.study import fix_protocol, judge_generation, name_study


@dataclass(frozen=True)
class Prepared:
    """References to everything that a config's trials are judged with."""

    prompts: dict[str, Ref]
    near_duplicates: Ref
    model: Ref
    activations: dict[str, Ref]
    directions: Ref
    baseline: Ref
    protocol: Ref

    @property
    def materials(self) -> dict[str, Ref]:
        """What a search starts from, by role."""
        return {"model": self.model, "directions": self.directions, "baseline": self.baseline}

    @property
    def search(self) -> dict[str, Ref]:
        """The search prompts, by class."""
        return split_of(self.prompts, "search")


@dataclass(frozen=True)
class Benchmark(Prepared):
    """References to everything a run made or found."""

    study: Ref
    generations: tuple[Ref, ...]
    finals: Ref
    selection: Ref
    winner: Ref
    test: Ref
    leaderboard: Ref
    figure: Ref


def prepare(config: Config) -> Prepared:
    """Ask for all that comes before a config's first trial, in the order of the diagram."""
    prompts = _prompts(config)
    near_duplicates = compare_splits(prompts=prompts)
    harmful, harmless = prompts["harmful/direction"], prompts["harmless/direction"]
    model = probe_model(spec=config.model, harmful=harmful, harmless=harmless)
    activations = {
        name: cache_activations(name=name, spec=config.model, model=model, prompts=part)
        for name, part in (("harmful", harmful), ("harmless", harmless))
    }
    directions = compute_directions(
        **activations,
        winsorization=config.directions.winsorization,
        benign_subspace_rank=config.directions.benign_subspace_rank,
    )
    search = split_of(prompts, "search")
    baseline = measure_baseline(
        spec=config.model, model=model, prompts=search, judging=config.judging
    )
    materials = {"model": model, "directions": directions, "baseline": baseline}
    fix = fix_parameters if config.explicit else fix_protocol
    protocol = fix(config=config, materials=materials, prompts=search)
    return Prepared(prompts, near_duplicates, model, activations, directions, baseline, protocol)


def run_pipeline(config: Config) -> Benchmark:
    """Ask for every artifact of a config, in the order of the diagram."""
    made = prepare(config)
    prompts, search, protocol = made.prompts, made.search, made.protocol
    materials = made.materials
    study = name_study(config=config, protocol=protocol)
    generations = _generations(config, protocol, materials, search)
    finals = judge_finals(
        generations=generations,
        protocol=protocol,
        config=config,
        materials=materials,
        prompts=search,
    )
    selection = select_trials(
        config=config,
        generations=[*generations, finals],
        protocol=protocol,
        materials=materials,
        prompts=split_of(prompts, "selection"),
    )
    test_prompts = split_of(prompts, "test")
    winner = freeze_winner(protocol=protocol, test_prompts=test_prompts, selection=selection)
    test = measure_test(
        config=config, winner=winner, protocol=protocol, materials=materials, prompts=test_prompts
    )
    leaderboard = rank_trials(generations=[*generations, finals], selection=selection, test=test)
    figure = draw_trials(leaderboard=leaderboard)
    return Benchmark(
        **vars(made),
        study=study,
        generations=tuple(generations),
        finals=finals,
        selection=selection,
        winner=winner,
        test=test,
        leaderboard=leaderboard,
        figure=figure,
    )


def _generations(
    config: Config, protocol: Ref, materials: dict[str, Ref], search: dict[str, Ref]
) -> list[Ref]:
    """The chain of the search; of an explicit trial, that trial alone."""
    if config.explicit:
        one = judge_explicit(protocol=protocol, config=config, materials=materials, prompts=search)
        return [one]
    generations: list[Ref] = []
    for number, count in enumerate(generation_sizes(config.search)):
        generation = judge_generation(
            number=number,
            count=count,
            previous=generations[-1] if generations else None,
            protocol=protocol,
            config=config,
            materials=materials,
            prompts=search,
        )
        generations.append(generation)
    return generations


def sources(config: Config) -> Iterator[tuple[str, str, PromptSource]]:
    """Class, split and source of every prompt set of a config."""
    for prompt_class in CLASSES:
        splits = getattr(config.prompts, prompt_class)
        for split in type(splits).model_fields if splits else ():
            yield prompt_class, split, getattr(splits, split)


def check_prompts(config: Config, store: Store) -> None:
    """Read every prompt set unless all are stored, so that a bad last one leaves nothing behind.

    Raises:
        PromptError: a source cannot be read as asked, or the same prompt is in two splits.
    """
    with planning(store) as steps:
        compare_splits(prompts=_prompts(config))
    if not all(step.cached for step in steps):
        check_sources(sources(config))


def _prompts(config: Config) -> dict[str, Ref]:
    """Every prompt set, by class and split."""
    return {
        f"{prompt_class}/{split}": load_prompts(
            prompt_class=prompt_class, split=split, source=source
        )
        for prompt_class, split, source in sources(config)
    }


def split_of(prompts: dict[str, Ref], split: str) -> dict[str, Ref]:
    """The prompt sets of one split, by class."""
    named = (name.split("/") for name in prompts)
    return {c: prompts[f"{c}/{s}"] for c, s in named if s == split}


def title(config: Config) -> str:
    """A person's words for the benchmark of a config: its name, arm and seed."""
    return f"{config.name}/{config.arm}/{config.seed}"


def generation_labels(config: Config) -> dict[str, int]:
    """Trials of each generation, by its label."""
    if config.explicit:
        return {f"trial 0, {config.arm}": 1}
    search = config.search
    sizes = enumerate(generation_sizes(search))
    return {trial_numbers(number * search.generation, count): count for number, count in sizes}


def generation_sizes(search: SearchSpec) -> Iterator[int]:
    """Trials of each generation; the last one may be smaller."""
    for first in range(0, search.trials, search.generation):
        yield min(search.generation, search.trials - first)
