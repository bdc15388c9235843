"""The figure `activity`: its artifacts in order, and what they say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import polars as pl

from artifacts.errors import ConfigError
from artifacts.figure_specs import ActivitySpec, FigureConfig
from artifacts.specs import PromptSource
from artifacts.store import Ref, Store
from flows.figures.figure import Figure, FigureRun, Section
from tasks.activations import cache_activations
from tasks.directions import compute_directions
from tasks.figures.activity import (
    ALL,
    FORCED,
    GENERATED,
    compare_answers,
    encode_answers,
    fit_pair_directions,
    load_questions,
    pool_answers,
    project_answers,
    scale_neutral,
    score_answers,
    take_refusal_directions,
)
from tasks.figures.activity_pictures import FILES, NAMES, draw_activity
from tasks.probe import probe_model
from tasks.prompts import compare_splits, load_prompts

CONDITIONS = ("false", "true", "odd", GENERATED)


def run(config: FigureConfig) -> FigureRun:
    """Ask for every artifact of the figure."""
    spec = _spec(config)
    forced = [name for name in FORCED if name != "odd" or spec.odd]
    questions = _questions("questions", spec, spec.questions)
    neutral = _questions("neutral", spec, spec.neutral)
    model = probe_model(spec=config.model, harmful=questions, harmless=questions)
    directions = _directions(config, spec, model, {"neutral": neutral, "questions": questions})

    def projected(name: str, asked: Ref, conditions: Sequence[str]) -> tuple[Ref, Ref]:
        answers = _answers(name, config, model, asked, conditions)
        found = project_answers(
            name=name, spec=config.model, model=model, answers=answers, directions=directions
        )
        return answers, found

    _, calm = projected("neutral", neutral, list(spec.neutral_answers))
    answers, products = projected("questions", questions, [*forced, GENERATED])
    scales = scale_neutral(projections=calm, directions=directions)
    scores = score_answers(projections=products, scales=scales, answers=answers)
    layers = compare_answers(
        projections=products,
        scales=scales,
        answers=answers,
        pooling=spec.pooling,
        resamples=spec.resamples,
        seed=config.seed,
    )
    pictures = {
        file: draw_activity(
            scores=scores,
            answers=answers,
            layers=layers,
            file=file,
            example=spec.example,
            direction=spec.direction,
            recipe=spec.recipe,
            pooling=spec.pooling,
        )
        for file in FILES
    }
    tables = {
        "layers": layers,
        "scores": scores,
        "answers": answers,
        "scales": scales,
        "directions": directions,
    }
    return FigureRun(tables, pictures)


def _spec(config: FigureConfig) -> ActivitySpec:
    if config.activity is None:
        raise ConfigError("the config has no table [activity]")
    return config.activity


def _questions(name: str, spec: ActivitySpec, source: PromptSource) -> Ref:
    columns = {"true": spec.true, "false": spec.false, "odd": spec.odd, "kind": spec.kind}
    return load_questions(name=name, source=source, **columns)


def _answers(
    name: str, config: FigureConfig, model: Ref, questions: Ref, conditions: Sequence[str]
) -> Ref:
    return encode_answers(
        name=name,
        spec=config.model,
        model=model,
        questions=questions,
        conditions=list(conditions),
        max_new_tokens=_spec(config).max_new_tokens if GENERATED in conditions else 0,
    )


def _directions(
    config: FigureConfig, spec: ActivitySpec, model: Ref, scored: Mapping[str, Ref]
) -> Ref:
    """The direction asked for, from prompts that are in none of the sets scored."""
    draws, seed = spec.draws, config.seed
    if spec.direction == "pairs" and spec.pairs is not None:
        pairs = _questions("pairs", spec, spec.pairs)
        compare_splits(prompts={"pairs": pairs, **scored})
        answers = _answers("pairs", config, model, pairs, ["true", "false"])
        states = pool_answers(spec=config.model, model=model, answers=answers, pooling=spec.pooling)
        return fit_pair_directions(states=states, recipe=spec.recipe, draws=draws, seed=seed)
    sources = {"harmful": spec.harmful, "harmless": spec.harmless}
    sets = {
        name: load_prompts(prompt_class=name, split="direction", source=source)
        for name, source in sources.items()
        if source is not None
    }
    compare_splits(prompts={**sets, **scored})
    cached = {
        name: cache_activations(name=f"{name}/direction", spec=config.model, model=model, prompts=p)
        for name, p in sets.items()
    }
    found = compute_directions(**cached, winsorization=1.0, benign_subspace_rank=0)
    return take_refusal_directions(directions=found, **cached, draws=draws, seed=seed)


def sections(store: Store, found: FigureRun) -> Sequence[Section]:
    """What a finished run says."""
    layers = store.read(found.tables["layers"]).filter(pl.col("kind") == ALL)
    answers = store.read(found.tables["answers"], ["question", "condition", "verdict"])
    scores = store.read(
        found.tables["scores"], ["question", "condition", "position", "state", "score"]
    )
    return [_by_layer(layers), _controls(layers), _conditions(scores, answers)]


def _by_layer(layers: pl.DataFrame) -> Section:
    """The direction itself, state by state."""
    name = layers.filter(~pl.col("direction").is_in(["surprise", "random", "shuffled"]))
    own = name.filter((pl.col("higher") == "false") & (pl.col("lower") == "true")).sort("state")
    rows = [
        {
            "layer": _layer(row["state"]),
            "right": None if row["right"] is None else f"{row['right']:.0f}/{row['n']}",
            "pairs 95 %": _interval(row, "accuracy"),
            "AUROC": row["auroc"],
            "AUROC 95 %": _interval(row, "auroc"),
        }
        for row in own.iter_rows(named=True)
    ]
    return Section(
        "Held-out questions: false against true, layer by layer",
        rows,
        "right: pairs whose false answer lies further along the direction (Clopper-Pearson). AUROC "
        "of answers' mean scores (bootstrap over questions). Direction: RepE, arXiv 2310.01405, "
        "unless the config says otherwise; the score's scale is ours.",
    )


def _controls(layers: pl.DataFrame) -> Section:
    """What else tells the answers apart, and what the direction should not."""
    rows = []
    for (direction, higher, lower), group in layers.group_by(
        ["direction", "higher", "lower"], maintain_order=True
    ):
        if lower == "true" and higher == "false" and direction not in _WORDS:
            continue  # the table above
        if direction in ("random", "shuffled") and (higher, lower) != ("false", "true"):
            continue
        best = group.drop_nulls("auroc").sort("auroc", descending=True, maintain_order=True)
        if not best.height:
            continue
        row = best.row(0, named=True)
        rows.append(
            {
                "control": _WORDS.get(str(direction), "direction"),
                "compares": f"{higher} > {lower}",
                "best layer": _layer(row["state"]),
                "pairs": row["accuracy"],
                "AUROC": row["auroc"],
                "95 %": _interval(row, "auroc"),
            }
        )
    return Section(
        "Controls, each at its own best layer",
        rows,
        "odd: true but unusual; a direction of truth leaves odd > true at 0.5. surprise: mean "
        "-ln p of the tokens, no direction. Of random and shuffled directions the mean over draws, "
        "and the range of 95 % of them.",
    )


_WORDS = {"random": "random", "shuffled": "shuffled labels", "surprise": "surprise"}


def _conditions(scores: pl.DataFrame, answers: pl.DataFrame) -> Section:
    """The mean score of each condition; what is forced and what is generated stay apart."""
    from tasks.numerics.intervals import bootstrap_mean

    own = scores.filter(pl.col("state") > 0).group_by("question", "condition")
    means = own.agg(pl.col("score").mean()).sort("question", "condition")
    table = means.join(answers, on=["question", "condition"], how="left")
    rows = []
    for condition in CONDITIONS:
        part = table.filter(pl.col("condition") == condition)
        for verdict in ("true", "false", "neither") if condition == GENERATED else (None,):
            values = part if verdict is None else part.filter(pl.col("verdict") == verdict)
            if part.height:
                rows.append(_condition(condition, verdict, values["score"], bootstrap_mean))
    return Section(
        "Mean score over layers and tokens, by condition",
        rows,
        "forced: the model reads an answer; generated: it wrote it, greedily. A forced false "
        "answer and a generated false one (a lie or an error) are different conditions.",
    )


def _condition(
    condition: str, verdict: str | None, values: pl.Series, interval: Any
) -> dict[str, Any]:
    low, high = interval(values.to_numpy()) if values.len() else (None, None)
    return {
        "answer": NAMES[condition] if verdict is None else f"generated, {verdict}",
        "n": values.len(),
        "mean score": values.mean(),
        "95 %": None if low is None else f"{low:.2f} to {high:.2f}",
    }


def _layer(state: int | None) -> str:
    return "-" if state is None else "emb" if state == 0 else str(state - 1)


def _interval(row: Mapping[str, Any], name: str) -> str | None:
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    return None if low is None else f"{low:.2f} to {high:.2f}"


FIGURE = Figure("activity", run, sections)
