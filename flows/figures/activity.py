"""The figure `activity`: its artifacts in order, and what they say."""

from __future__ import annotations

import math
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
    FORCED,
    GENERATED,
    encode_answers,
    fit_pair_directions,
    load_questions,
    pool_answers,
    project_answers,
    scale_neutral,
    score_answers,
    take_refusal_directions,
)
from tasks.figures.activity_layers import ABOUT_TRUTH, ALL, compare_answers
from tasks.figures.activity_pictures import FILES, NAMES, draw_activity
from tasks.probe import probe_model
from tasks.prompts import compare_splits, load_prompts

FEWEST = 5  # answers of which a mean is given an interval
CONDITIONS = ("false", "true", "odd", GENERATED)


def run(config: FigureConfig) -> FigureRun:
    """Ask for every artifact of the figure."""
    spec = _spec(config)
    forced = [name for name in FORCED if name != "odd" or spec.odd]
    questions = _questions("questions", spec, spec.questions)
    neutral = _questions("neutral", spec, spec.neutral)
    fitted = _fitted(spec)
    compare_splits(prompts={**fitted, "neutral": neutral, "questions": questions})
    model = probe_model(spec=config.model, harmful=questions, harmless=questions)
    directions = _directions(config, spec, model, fitted)

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


def _fitted(spec: ActivitySpec) -> dict[str, Ref]:
    """What the direction comes from: nothing that is scored may be in it."""
    if spec.direction == "pairs" and spec.pairs is not None:
        return {"pairs": _questions("pairs", spec, spec.pairs)}
    sources = {"harmful": spec.harmful, "harmless": spec.harmless}
    return {
        name: load_prompts(prompt_class=name, split="direction", source=source)
        for name, source in sources.items()
        if source is not None
    }


def _directions(
    config: FigureConfig, spec: ActivitySpec, model: Ref, fitted: Mapping[str, Ref]
) -> Ref:
    """The direction asked for and its controls."""
    draws, seed = spec.draws, config.seed
    if spec.direction == "pairs":
        answers = _answers("pairs", config, model, fitted["pairs"], ["true", "false"])
        states = pool_answers(spec=config.model, model=model, answers=answers, pooling=spec.pooling)
        return fit_pair_directions(states=states, recipe=spec.recipe, draws=draws, seed=seed)
    cached = {
        name: cache_activations(name=f"{name}/direction", spec=config.model, model=model, prompts=p)
        for name, p in fitted.items()
    }
    found = compute_directions(**cached, winsorization=1.0, benign_subspace_rank=0)
    return take_refusal_directions(directions=found, **cached, draws=draws, seed=seed)


def sections(store: Store, found: FigureRun) -> Sequence[Section]:
    """What a finished run says."""
    layers = store.read(found.tables["layers"])
    fitted = store.read(found.tables["directions"], ["direction", "state", "fitted_right"])
    answers = store.read(found.tables["answers"], ["question", "condition", "verdict"])
    scores = store.read(
        found.tables["scores"], ["question", "condition", "position", "state", "score"]
    )
    name, state = str(fitted["direction"][0]), _chosen(fitted)
    return [
        _by_layer(layers, name),
        _controls(layers, name, state),
        _conditions(scores, answers),
    ]


def _chosen(fitted: pl.DataFrame) -> int:
    """The state that is looked at more closely, chosen on the fitted pairs alone: the first of the
    best. The middle one for a direction that is from no pairs."""
    own = fitted.filter((pl.col("direction") == fitted["direction"][0]) & (pl.col("state") > 0))
    shares = own.sort("state")["fitted_right"].to_list()
    if None in shares:
        return len(shares) // 2 + 1
    return shares.index(max(shares)) + 1


def _by_layer(layers: pl.DataFrame, name: str) -> Section:
    """The direction itself, state by state."""
    own = layers.filter((pl.col("direction") == name) & (pl.col("kind") == ALL))
    own = own.filter((pl.col("higher") == "false") & (pl.col("lower") == "true")).sort("state")
    rows = [
        {
            "layer": _layer(row["state"]),
            "right": None if row["right"] is None else f"{row['right']:.0f}/{row['n']}",
            "share": row["accuracy"],
            "pairs 95 %": _interval(row, "accuracy"),
            "AUROC": row["auroc"],
            "AUROC 95 %": _interval(row, "auroc"),
        }
        for row in own.iter_rows(named=True)
    ]
    return Section(
        f"Direction '{name}' on held-out questions: false against true, layer by layer",
        rows,
        "right: pairs whose false answer lies further along the direction (Clopper-Pearson). AUROC "
        "of answers' mean scores (bootstrap over questions). 'pca' is RepE's recipe (arXiv "
        "2310.01405); the score's scale is ours.",
    )


def _controls(layers: pl.DataFrame, name: str, state: int) -> Section:
    """At one layer: what else tells the answers apart, and what the direction should not."""
    there = layers.filter((pl.col("state") == state) | pl.col("state").is_null())
    rows = [
        {
            "direction": row["direction"],
            "compares": f"{row['higher']} > {row['lower']}",
            "kind": row["kind"],
            "pairs": row["accuracy"],
            "95 %": _interval(row, "accuracy"),
            "AUROC": row["auroc"],
            "of it 95 %": _interval(row, "auroc"),
        }
        for row in there.iter_rows(named=True)
        if _told(row, name)
    ]
    return Section(
        f"Controls at layer {state - 1}, chosen on the fitted pairs",
        rows,
        "odd: true but unusual; a direction of truth leaves odd > true at 0.5. surprise: mean "
        "-ln p of the tokens, no direction. probe: logistic regression on the same pairs, what a "
        "line could find. random, shuffled (labels and pairs): mean and 95 % range of the draws.",
    )


def _told(row: Mapping[str, Any], name: str) -> bool:
    """Whether a row is short enough news for a terminal; the table has them all."""
    main = row["direction"] in (name, "probe", "surprise")
    about_truth = (row["higher"], row["lower"]) == ABOUT_TRUTH
    return (main and row["kind"] == ALL) or (about_truth and (main or row["kind"] == ALL))


def _conditions(scores: pl.DataFrame, answers: pl.DataFrame) -> Section:
    """The mean score of each condition; what is forced and what is generated stay apart."""
    from tasks.numerics.intervals import bootstrap_mean

    keys = ["question", "condition"]
    table = mean_scores(scores).join(answers, on=keys, how="left", maintain_order="left")
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


def mean_scores(scores: pl.DataFrame) -> pl.DataFrame:
    """Each answer's mean score over layers and tokens, the same whatever order the rows come in:
    polars' own mean adds up as its threads come, and a warm run says what the cold one said."""
    answers = scores.filter(pl.col("state") > 0).group_by("question", "condition").agg("score")
    means = [math.fsum(values) / len(values) for values in answers["score"].to_list()]
    own = answers.with_columns(score=pl.Series(means, dtype=pl.Float64))
    return own.sort("question", "condition")


def _condition(
    condition: str, verdict: str | None, values: pl.Series, interval: Any
) -> dict[str, Any]:
    enough = values.len() >= FEWEST
    low, high = interval(values.to_numpy()) if enough else (None, None)
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
