"""Jailbreaks told from their hidden states, layer by layer, and answers without those layers.

The method is that of Kadali and Papalexakis 2026 (arXiv 2602.11495), from the paper alone: CP
decomposition of each layer's states, logistic regression on prompt factors, and for each prompt a
bypass of the layers whose jailbreak probability is above a threshold. Ours: only the last tokens of
a prompt are decomposed, which every prompt has and no padding enters; a cap on how many layers are
bypassed; the baselines and controls.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from artifacts.errors import PromptError
from artifacts.figure_schemas import (
    NORMS_ANSWERS,
    NORMS_BYPASS,
    NORMS_DETECTION,
    NORMS_PROBABILITIES,
)
from artifacts.schemas import polars_schema
from artifacts.specs import JudgingSpec, ModelSpec, PromptSource
from artifacts.store import Ref
from tasks.numerics.detection import Metric, fit_classifier, metrics
from tasks.numerics.intervals import bootstrap_mean, clopper_pearson
from tasks.numerics.labels import is_refusal
from tasks.numerics.prompt_factors import decompose, project
from tasks.numerics.quality import degenerate_reason
from tasks.probe import encode_prompts, open_model, read_card
from tasks.prompt_sources import read_cells, read_prompts, source_identity
from tasks.stage import Made, current, stage

Floats = NDArray[np.float64]
Row = dict[str, Any]
_Scores = tuple[str, int, int | None, Floats]  # detector, draw, layer, probabilities
FACTORS, CONTROLLED = "factors", "factors with control"
SHUFFLED, LENGTH = "shuffled labels", "length"
PERMUTATIONS = 20  # of shuffled labels: one alone leans to one side or the other
SUSCEPTIBLE, RANDOM = "susceptible", "random"
RESAMPLES = 1000
OUTCOMES = ("refused", "broken", "answered")


@stage(
    "norms_probabilities",
    version=1,
    ignore=("spec",),  # where the model lies
    identify={"sources": lambda pair: [source_identity(source) for source in pair]},
    label=lambda **_: "jailbreak probabilities by layer",
    work=lambda **_: 4,
)
def detect_jailbreaks(
    *,
    spec: ModelSpec,
    model: Ref,
    fit: Mapping[str, Ref],
    scored: Mapping[str, Ref],
    sources: tuple[PromptSource, PromptSource],
    template_column: str | None,
    positions: int,
    rank: int,
    iterations: int,
    seed: int,
) -> Made:
    """Fit detectors on `fit` and give every prompt of `scored` a probability of being a jailbreak.

    "factors" is fitted on benign prompts and jailbreaks; "factors with control" also on the control
    of `fit`, if there is one, as benign; "length" on nothing but the number of tokens.

    Args:
        sources: of the jailbreaks that are scored and fitted, for `template_column`.

    Raises:
        PromptError: a prompt is fitted on and scored, or templates cannot be told.
        ModelError: a prompt of fewer tokens than `positions`, or a state that is not finite.
    """
    from tasks.models.position_states import last_states

    runtime, card = current(), read_card(model)
    loaded = open_model(spec, [card.dtype])
    tables = {
        role: {name: runtime.store.read(ref) for name, ref in refs.items()}
        for role, refs in (("fit", fit), ("scored", scored))
    }
    _refuse_shared(tables["fit"], tables["scored"])
    every = [(role, name, t) for role, of_role in tables.items() for name, t in of_role.items()]
    encoded = encode_prompts(loaded, card, pl.concat([table for *_, table in every]))
    states = last_states(
        loaded,
        encoded,
        rows=runtime.rows,
        positions=positions,
        on_progress=runtime.reporter.advanced,
    )
    owners = np.array([(role, name) for role, name, table in every for _ in range(table.height)])
    new, kind = owners[:, 0] == "scored", owners[:, 1]
    lengths = np.array([[float(len(prompt))] for prompt in encoded])
    plain = ~new & (kind != "control")
    by_length = fit_classifier(lengths[plain], kind[plain] == "jailbreak")
    found: list[_Scores] = [(LENGTH, 0, None, by_length.probability(lengths[new]))]
    fits = {FACTORS: plain} | ({CONTROLLED: ~new} if "control" in fit else {})
    errors: dict[str, list[float]] = {name: [] for name in fits}
    for layer in range(states.shape[1]):
        for detector, fitted in fits.items():
            factors = decompose(states[fitted, layer], rank, iterations=iterations, seed=seed)
            errors[detector].append(round(factors.error, 4))
            known, unknown = (project(states[which, layer], factors) for which in (fitted, new))
            labels = kind[fitted] == "jailbreak"
            fitted_on = [(detector, 0, labels)]
            if detector == FACTORS:
                generator = np.random.default_rng([seed, layer])
                fitted_on += [
                    (SHUFFLED, draw, generator.permutation(labels)) for draw in range(PERMUTATIONS)
                ]
            found += [
                (name, draw, layer, fit_classifier(known, told).probability(unknown))
                for name, draw, told in fitted_on
            ]
    templates = _templates(template_column, sources, tables)
    prompts = [
        (name, prompt_id, *templates.get(prompt_id, (None, None)))
        for name, table in tables["scored"].items()
        for prompt_id in table["prompt_id"]
    ]
    rows = [
        (detector, draw, layer, name, prompt_id, float(p), template, known_template)
        for detector, draw, layer, probabilities in found
        for (name, prompt_id, template, known_template), p in zip(
            prompts, probabilities, strict=True
        )
    ]
    frame = pl.DataFrame(rows, schema=polars_schema(NORMS_PROBABILITIES), orient="row")
    counts = {name: table.height for name, table in tables["fit"].items()}
    return Made(frame, {"reconstruction_errors": errors, "fitted_on": counts})


@stage("norms_detection", version=1, label=lambda **_: "how well jailbreaks are told")
def score_detectors(*, probabilities: Ref, threshold: float, seed: int) -> Made:
    """AUROC, F1 and FPR at 95 % TPR of every detector and layer on held-out prompts."""
    frame = current().store.read(probabilities)
    rows: list[Row] = []
    for (detector, layer), group in frame.group_by("detector", "layer", maintain_order=True):
        draws = [each for _, each in group.group_by("draw", maintain_order=True)]
        for against in ("benign", "control"):
            for jailbreaks in ("all", "new templates"):
                told = [_told_apart(each, against, jailbreaks) for each in draws]
                sizes = tuple(map(len, told[0]))
                if not all(sizes):
                    continue
                of_draws = [
                    metrics(
                        *pair,
                        threshold=threshold,
                        seed=seed,
                        resamples=RESAMPLES if len(draws) == 1 else 1,
                    )
                    for pair in told
                ]
                rows += [
                    {
                        "detector": detector,
                        "layer": layer,
                        "against": against,
                        "jailbreaks": jailbreaks,
                        "metric": metric,
                        "value": found.value,
                        "low": found.low,
                        "high": found.high,
                        "n_jailbreak": sizes[0],
                        "n_other": sizes[1],
                    }
                    for metric, found in _over_draws(of_draws).items()
                ]
    return Made(pl.DataFrame(rows, schema=polars_schema(NORMS_DETECTION)))


def _told_apart(group: pl.DataFrame, against: str, jailbreaks: str) -> tuple[Floats, Floats]:
    """Scores of the jailbreaks and of what they are told apart from."""
    positive = group.filter(pl.col("class") == "jailbreak")
    if jailbreaks == "new templates":
        positive = positive.filter(~pl.col("fitted_template"))
    negative = group.filter(pl.col("class") == against)
    return positive["probability"].to_numpy(), negative["probability"].to_numpy()


def _over_draws(found: Sequence[Mapping[str, Metric]]) -> Mapping[str, Metric]:
    """One draw's metrics as they are; of several the mean and the middle 95 %."""
    if len(found) == 1:
        return found[0]
    values = {name: [each[name].value for each in found] for name in found[0]}
    return {
        name: Metric(float(np.mean(of)), *map(float, np.quantile(of, [0.025, 0.975])))
        for name, of in values.items()
    }


@stage(
    "norms_answers",
    version=1,
    ignore=("spec",),  # where the model lies
    label=lambda **_: "answers without susceptible layers",
    work=lambda **_: 6,
)
def answer_bypassed(
    *,
    spec: ModelSpec,
    model: Ref,
    prompts: Mapping[str, Ref],
    probabilities: Ref,
    detector: str,
    threshold: float,
    at_most: tuple[int, ...],
    judging: JudgingSpec,
    seed: int,
) -> Made:
    """Answers of every prompt: unedited, without susceptible layers, without random ones.

    Raises:
        ModelError: prompts and answers do not fit into the model's positions.
    """
    from tasks.models.bypass import answer_without_layers

    runtime, card = current(), read_card(model)
    loaded = open_model(spec, [card.dtype])
    table = pl.concat(
        [
            runtime.store.read(ref).with_columns(pl.lit(name).alias("class"))
            for name, ref in prompts.items()
        ]
    )
    encoded = encode_prompts(loaded, card, table, judging.max_new_tokens)
    frame = runtime.store.read(probabilities).filter(pl.col("detector") == detector)
    layers = _layers_of(frame)
    asked = list(table.select("class", "prompt_id").iter_rows())
    arms = _arms([layers[key] for key in asked], asked, threshold, at_most, seed)
    wanted = list(dict.fromkeys((i, kind) for _, _, kinds in arms for i, kind in enumerate(kinds)))
    responses = answer_without_layers(
        loaded,
        [encoded[i] for i, _ in wanted],
        [kind for _, kind in wanted],
        max_new_tokens=judging.max_new_tokens,
        rows=runtime.rows,
        on_progress=runtime.reporter.advanced,
    )
    told = {}
    for each, response in zip(wanted, responses, strict=True):
        text = loaded.tokenizer.decode(response.tokens, skip_special_tokens=True)
        broken = degenerate_reason(text, response.tokens, response.ended)
        told[each] = (text, is_refusal(judging.labeller, text), broken)
    rows = [
        (arm, most, *asked[i], ",".join(map(str, sorted(kind))), *told[i, kind])
        for arm, most, kinds in arms
        for i, kind in enumerate(kinds)
    ]
    return Made(pl.DataFrame(rows, schema=polars_schema(NORMS_ANSWERS), orient="row"))


@stage("norms_bypass", version=1, label=lambda **_: "what bypassing layers does")
def rate_bypass(*, answers: Ref, seed: int) -> Made:
    """Outcomes of prompts that were answered unedited, by arm, with intervals."""
    frame = current().store.read(answers).with_columns(_outcome())
    unedited = frame.filter((pl.col("arm") == "unedited") & (pl.col("outcome") == "answered"))
    rows: list[Row] = []
    for name in frame["class"].unique(maintain_order=True):
        wanted = unedited.filter(pl.col("class") == name)["prompt_id"]
        for most in sorted(set(frame.filter(pl.col("arm") != "unedited")["at_most"])):
            of_arm = {
                arm: frame.filter(
                    (pl.col("class") == name)
                    & (pl.col("at_most") == most)
                    & (pl.col("arm") == arm)
                    & pl.col("prompt_id").is_in(wanted.to_list())
                )
                for arm in (SUSCEPTIBLE, RANDOM)
            }
            rows += _rates(name, most, of_arm, seed)
    return Made(pl.DataFrame(rows, schema=polars_schema(NORMS_BYPASS)))


def susceptible(probabilities: Sequence[float], threshold: float, at_most: int) -> frozenset[int]:
    """The layers above the threshold, the most probable first and (of equals) the lowest."""
    above = [layer for layer, p in enumerate(probabilities) if p > threshold]
    return frozenset(sorted(above, key=lambda layer: -probabilities[layer])[:at_most])


def random_layers(count: int, n_layers: int, seed: int, prompt_id: str) -> frozenset[int]:
    """As many layers at random; what a prompt gets depends on no other prompt."""
    generator = np.random.default_rng([seed, count, int(prompt_id, 16)])
    return frozenset(generator.choice(n_layers, count, replace=False).tolist())


def _arms(
    probabilities: Sequence[Sequence[float]],
    asked: Sequence[tuple[str, str]],
    threshold: float,
    at_most: Sequence[int],
    seed: int,
) -> list[tuple[str, int, list[frozenset[int]]]]:
    """(arm, cap, the layers each prompt leaves out)."""
    found: list[tuple[str, int, list[frozenset[int]]]] = [
        ("unedited", 0, [frozenset() for _ in asked])
    ]
    for most in dict.fromkeys(at_most):
        chosen = [susceptible(each, threshold, most) for each in probabilities]
        at_random = [
            random_layers(len(kind), len(each), seed, prompt_id)
            for kind, each, (_, prompt_id) in zip(chosen, probabilities, asked, strict=True)
        ]
        found += [(SUSCEPTIBLE, most, chosen), (RANDOM, most, at_random)]
    return found


def _layers_of(frame: pl.DataFrame) -> dict[tuple[str, str], list[float]]:
    """Probabilities by layer of every scored (class, prompt)."""
    found: dict[tuple[str, str], list[float]] = {}
    ordered = frame.sort("layer").select("class", "prompt_id", "probability")
    for name, prompt_id, probability in ordered.iter_rows():
        found.setdefault((name, prompt_id), []).append(probability)
    return found


def _outcome() -> pl.Expr:
    return (
        pl.when(pl.col("degenerate").is_not_null())
        .then(pl.lit("broken"))
        .when(pl.col("refused"))
        .then(pl.lit("refused"))
        .otherwise(pl.lit("answered"))
        .alias("outcome")
    )


def _rates(name: str, most: int, of_arm: Mapping[str, pl.DataFrame], seed: int) -> Iterator[Row]:
    for outcome in OUTCOMES:
        hits = {arm: (t["outcome"] == outcome).to_numpy() for arm, t in of_arm.items()}
        for arm, hit in hits.items():
            low, high = clopper_pearson(int(hit.sum()), len(hit))
            counts = of_arm[arm]["layers"].map_elements(_count, return_dtype=pl.Int64)
            yield {
                "arm": arm,
                "at_most": most,
                "class": name,
                "outcome": outcome,
                "k": int(hit.sum()),
                "n": len(hit),
                "rate": float(hit.mean()) if len(hit) else None,
                "low": low,
                "high": high,
                "mean_layers": counts.mean(),
            }
        more = hits[SUSCEPTIBLE].astype(float) - hits[RANDOM]
        if len(more):
            low, high = bootstrap_mean(more, seed=seed)
            yield {
                "arm": f"{SUSCEPTIBLE} - {RANDOM}",
                "at_most": most,
                "class": name,
                "outcome": outcome,
                "k": None,
                "n": len(more),
                "rate": float(more.mean()),
                "low": low,
                "high": high,
                "mean_layers": None,
            }


def _count(layers: str) -> int:
    return len(layers.split(",")) if layers else 0


def _refuse_shared(fit: Mapping[str, pl.DataFrame], scored: Mapping[str, pl.DataFrame]) -> None:
    """Refuse prompts that would be fitted on and scored."""
    for name, table in fit.items():
        for other, held_out in scored.items():
            same = set(table["prompt_id"]) & set(held_out["prompt_id"])
            if same:
                raise PromptError(
                    f"{len(same)} prompts are in both 'norms.fit_{name}' and 'norms.{other}'; "
                    "choose slices or files that share none"
                )


def _templates(
    column: str | None,
    sources: tuple[PromptSource, PromptSource],
    tables: Mapping[str, Mapping[str, pl.DataFrame]],
) -> dict[str, tuple[str, bool]]:
    """Template of each scored jailbreak, and whether a fitted one has it too."""
    if column is None:
        return {}
    scored, fitted = sources
    known = {name for (name,) in read_cells(fitted, (column,))}
    names = [name for (name,) in read_cells(scored, (column,))]
    if read_prompts(scored).duplicates:
        raise PromptError("norms.template_column needs jailbreaks without duplicates")
    ids = tables["scored"]["jailbreak"]["prompt_id"]
    return {i: (name, name in known) for i, name in zip(ids, names, strict=True)}
