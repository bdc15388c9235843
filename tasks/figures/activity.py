"""Activity scores: questions with true and false answers, states, directions, scores, controls.

Measured are scalar products of every state at every answer token with every direction, the
controls' among them, in one pass; all that follows is arithmetic on them and loads no model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from artifacts.errors import ModelError, PromptError
from artifacts.figure_schemas import (
    ACTIVITY_ANSWERS,
    ACTIVITY_DIRECTIONS,
    ACTIVITY_QUESTIONS,
    ACTIVITY_SCALES,
    ACTIVITY_SCORES,
)
from artifacts.schemas import polars_schema
from artifacts.specs import ModelSpec, PromptSource
from artifacts.store import Ref
from tasks.activations import read_residuals
from tasks.numerics import activity as numerics
from tasks.probe import encode_prompts, open_model, read_card
from tasks.prompt_sources import prompt_id, read_cells, source_identity
from tasks.stage import Made, current, stage

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from tasks.models.loading import LoadedModel

Array = numerics.Array
FORCED = ("true", "false", "odd")
GENERATED = "generated"
RANDOM, SHUFFLED = "random", "shuffled"


@stage(
    "activity_questions",
    version=1,
    ignore=("name",),
    identify={"source": source_identity},
    label=lambda name, **_: f"{name}: questions and answers",
)
def load_questions(
    *, name: str, source: PromptSource, true: str, false: str, odd: str, kind: str
) -> Made:
    """A set of questions; `true`, `false`, `odd`, `kind` name columns, "" is none of the last two.

    Raises:
        PromptError: the source cannot be read as asked, or two answers have the same words.
    """
    named = [("text", source.column or "question"), ("true_answer", true), ("false_answer", false)]
    named += [pair for pair in (("odd_answer", odd), ("kind", kind)) if pair[1]]
    cells = read_cells(source, [column for _, column in named])
    rows = [dict(zip((field for field, _ in named), row, strict=True)) for row in cells]
    for number, row in enumerate(rows):
        row["text"] = source.prefix + row["text"] + source.suffix
        try:
            numerics.verdict("", row["true_answer"], row["false_answer"])
        except ValueError as error:
            raise PromptError(f"question {number} of {name}: {error}") from error
    system = source.system_prompt
    known = {"kind": "question", "odd_answer": None, "system_prompt": system}
    found = [
        known | row | {"question": number, "prompt_id": prompt_id(row["text"], system)}
        for number, row in enumerate(rows)
    ]
    return Made(pl.DataFrame(found, schema=polars_schema(ACTIVITY_QUESTIONS)))


@stage(
    "activity_answers",
    version=1,
    ignore=("name", "spec"),
    label=lambda name, **_: f"{name}: answers as tokens",
    work=lambda **_: 1,
)
def encode_answers(
    *,
    name: str,
    spec: ModelSpec,
    model: Ref,
    questions: Ref,
    conditions: Sequence[str],
    max_new_tokens: int,
) -> Made:
    """Every answer as the tokens that follow its prompt: forced ones, and the model's own.

    Args:
        conditions: which answers: true, false, odd, generated.
        max_new_tokens: of a generated answer; 0 where none is asked for. One that is empty has no
            token to look at and is left out, which the notes count.

    Raises:
        ModelError: an answer has no tokens, or does not fit into the model's positions.
    """
    from tasks.models.rendering import render
    from tasks.models.response_states import encode_responses

    card, table = read_card(model), current().store.read(questions)
    loaded = open_model(spec, [card.dtype])
    rendered = [
        render(loaded.tokenizer, text, system or card.system_prompt, card.response_prefix)
        for text, system in table.select("text", "system_prompt").iter_rows()
    ]
    rows: list[dict[str, Any]] = []
    longest = max_new_tokens
    for condition in (name for name in FORCED if name in conditions):
        texts = table[f"{condition}_answer"].to_list()
        pairs = encode_responses(loaded.tokenizer, rendered, texts)
        longest = max(longest, *(len(answer) for _, answer in pairs))
        rows += [
            _answer(row, condition, text, *tokens)
            for row, text, tokens in zip(table.iter_rows(named=True), texts, pairs, strict=True)
        ]
    prompts = encode_prompts(loaded, card, table, new_tokens=longest)
    empty = 0
    if GENERATED in conditions:
        generated = _generate(loaded, table, prompts, max_new_tokens)
        rows += (whole := [row for row in generated if row["n_tokens"]])
        empty = len(generated) - len(whole)
    return Made(pl.DataFrame(rows, schema=polars_schema(ACTIVITY_ANSWERS)), {"empty": empty})


def _generate(
    loaded: LoadedModel, table: pl.DataFrame, prompts: list[list[int]], max_new_tokens: int
) -> list[dict[str, Any]]:
    from tasks.models.decoding import decode

    runtime = current()
    decoded = decode(
        loaded,
        prompts,
        max_new_tokens=max_new_tokens,
        rows=runtime.rows,
        on_progress=runtime.reporter.advanced,
    )[0]
    texts = loaded.tokenizer.batch_decode(decoded.tokens, skip_special_tokens=True)
    rows = zip(table.iter_rows(named=True), texts, prompts, decoded.tokens, strict=True)
    return [
        _answer(row, GENERATED, text.strip(), prompt, tokens)
        | {"verdict": numerics.verdict(text, row["true_answer"], row["false_answer"])}
        for row, text, prompt, tokens in rows
    ]


def _answer(
    row: dict[str, Any], condition: str, answer: str, prompt: list[int], tokens: list[int]
) -> dict[str, Any]:
    known = {name: row[name] for name in ("question", "kind", "text")}
    return known | {
        "condition": condition,
        "answer": answer,
        "n_tokens": len(tokens),
        "prompt_tokens": " ".join(map(str, prompt)),
        "answer_tokens": " ".join(map(str, tokens)),
    }


@stage(
    "activity_states",
    version=1,
    ignore=("spec",),
    label=lambda **_: "states of the pairs' answers",
    work=lambda **_: 1,
)
def pool_answers(*, spec: ModelSpec, model: Ref, answers: Ref, pooling: str) -> Made:
    """One state per answer and layer: at the answer's last token, or the mean over its tokens.

    Raises:
        ModelError: a residual is not finite.
    """
    from tasks.models.response_states import pooled_states

    runtime, table = current(), current().store.read(answers)
    states = pooled_states(
        open_model(spec, [read_card(model).dtype]),
        _tokens(table, "prompt_tokens"),
        _tokens(table, "answer_tokens"),
        pooling="last" if pooling == "last" else "mean",
        rows=runtime.rows,
        on_progress=runtime.reporter.advanced,
    )
    n_answers, n_states, hidden = states.shape
    frame = pl.DataFrame(
        {
            "question": np.repeat(table["question"].to_numpy(), n_states),
            "condition": np.repeat(table["condition"].to_numpy(), n_states).tolist(),
            "state": np.tile(np.arange(n_states), n_answers),
            "vector": pl.Series(states.reshape(-1, hidden), dtype=pl.Array(pl.Float32, hidden)),
        }
    )
    return Made(frame)


@stage("activity_directions", version=1, label=lambda **_: "directions from pairs, and controls")
def fit_pair_directions(*, states: Ref, recipe: numerics.Recipe, draws: int, seed: int) -> Made:
    """The direction of every state from false answers minus true ones, and its controls.

    `recipe` comes first, then the other recipes: whether another one would have found what it did
    not. Shuffled ones come from the same answers by the same recipe, their labels and pairs drawn.

    Raises:
        PromptError: fewer than two pairs.
    """
    frame = current().store.read(states)
    n_states = frame["state"].n_unique()
    false, true = (_vectors(frame, name, n_states) for name in ("false", "true"))
    try:
        found: list[tuple[str, numerics.PairDirections]] = [
            (name, numerics.pair_directions(false, true, recipe=name, seed=seed))
            for name in sorted(numerics.RECIPES, key=lambda name: name != recipe)
        ]
    except ValueError as error:
        raise PromptError(f"no direction from the pairs: {error}") from error
    for draw in range(draws):
        mixed = numerics.shuffled_pairs(false, true, seed=seed + draw)
        found.append((SHUFFLED, numerics.pair_directions(*mixed, recipe=recipe, seed=seed + draw)))
    rows = [
        {
            "direction": name,
            "draw": max(number - len(numerics.RECIPES), 0),
            "state": state,
            "explained": one.explained[state],
            "fitted_right": one.right[state] / len(false),
            "vector": one.vectors[state].tolist(),
        }
        for number, (name, one) in enumerate(found)
        for state in range(n_states)
    ]
    return _directions(rows, draws, seed)


@stage("activity_directions", version=1, label=lambda **_: "the refusal direction, and controls")
def take_refusal_directions(
    *, directions: Ref, harmful: Ref, harmless: Ref, draws: int, seed: int
) -> Made:
    """The difference of means of every state as the store has it, and its controls.

    Shuffled ones are differences of means of the same residuals, their classes drawn.
    """
    frame = current().store.read(directions).filter(pl.col("role") == "mean").sort("state")
    bad, good = read_residuals(harmful).astype(float), read_residuals(harmless).astype(float)
    vectors = [numerics.unit_rows(np.array(frame["vector"].to_list()))]
    for draw in range(draws):
        one, other = numerics.shuffled_pairs(bad, good, seed=seed + draw)
        vectors.append(numerics.unit_rows(one.mean(axis=0) - other.mean(axis=0)))
    rows = [
        {
            "direction": SHUFFLED if number else "refusal",
            "draw": max(number - 1, 0),
            "state": state,
            "vector": vector.tolist(),
        }
        for number, one in enumerate(vectors)
        for state, vector in enumerate(one)
    ]
    return _directions(rows, draws, seed)


def _directions(rows: list[dict[str, Any]], draws: int, seed: int) -> Made:
    """The table with random directions added, sorted: the one asked for, shuffled, random."""
    n_states = max(row["state"] for row in rows) + 1
    random = numerics.random_directions(draws, n_states, len(rows[0]["vector"]), seed)
    rows += [
        {"direction": RANDOM, "draw": draw, "state": state, "vector": random[draw, state].tolist()}
        for draw in range(draws)
        for state in range(n_states)
    ]
    return Made(pl.DataFrame(rows, schema=polars_schema(ACTIVITY_DIRECTIONS)))


@stage(
    "activity_projections",
    version=1,
    ignore=("name", "spec"),
    label=lambda name, **_: f"{name}: activity along the directions",
    work=lambda **_: 1,
)
def project_answers(
    *, name: str, spec: ModelSpec, model: Ref, answers: Ref, directions: Ref
) -> Made:
    """Scalar products of every state at every answer token with every direction.

    Raises:
        ModelError: a residual is not finite.
    """
    from tasks.models.response_states import project_responses

    runtime, table = current(), current().store.read(answers)
    vectors = _direction_array(runtime.store.read(directions))
    loaded, tokens = open_model(spec, [read_card(model).dtype]), _tokens(table, "answer_tokens")
    found = project_responses(
        loaded,
        _tokens(table, "prompt_tokens"),
        tokens,
        vectors,
        rows=runtime.rows,
        on_progress=runtime.reporter.advanced,
    )
    n_directions, n_states, _ = vectors.shape
    lengths = [len(row) for row in tokens]
    products = np.concatenate([one.projections for one in found]).reshape(-1, n_directions)
    pieces = [loaded.tokenizer.decode([token]) for row in tokens for token in row]

    def per_row(values: Any) -> NDArray[Any]:
        return np.repeat(np.asarray(values), n_states)

    frame = pl.DataFrame(
        {
            "question": per_row(np.repeat(table["question"].to_numpy(), lengths)),
            "condition": per_row(np.repeat(table["condition"].to_numpy(), lengths)).tolist(),
            "position": per_row(np.concatenate([np.arange(n) for n in lengths])),
            "token": [piece for piece in pieces for _ in range(n_states)],
            "surprise": per_row(np.concatenate([one.surprise for one in found])),
            "state": np.tile(np.arange(n_states), sum(lengths)),
            "projections": pl.Series(
                products.astype(np.float32), dtype=pl.Array(pl.Float32, n_directions)
            ),
        }
    )
    return Made(frame)


@stage("activity_scales", version=1, label=lambda **_: "zero and unit from neutral text")
def scale_neutral(*, projections: Ref, directions: Ref) -> Made:
    """Mean and standard deviation of every direction's projections over neutral text.

    Raises:
        PromptError: the neutral set has fewer than two tokens.
    """
    products = products_of(current().store.read(projections))
    try:
        mean, deviation = numerics.neutral_scale(products)
    except ValueError as error:
        raise PromptError(f"no scale from the neutral set: {error}") from error
    frame = current().store.read(directions, ["direction", "draw", "state"])
    return Made(
        frame.with_columns(
            n_tokens=pl.lit(len(products), pl.Int64),
            mean=pl.Series(mean.T.ravel()),
            deviation=pl.Series(deviation.T.ravel()),
        ).select(list(polars_schema(ACTIVITY_SCALES)))
    )


@stage("activity_scores", version=1, label=lambda **_: "activity scores")
def score_answers(*, projections: Ref, scales: Ref, answers: Ref) -> Made:
    """The score of the direction that was asked for, per question, answer, token and state.

    Raises:
        ModelError: no state has a scale, so nothing can be scored.
    """
    store = current().store
    frame, scale = store.read(projections), _first(store.read(scales))
    kinds = store.read(answers, ["question", "kind"]).unique()
    products = products_of(frame)[..., 0]
    scores = numerics.activity_scores(products, scale["mean"], scale["deviation"])
    if np.isnan(scores).all():
        raise ModelError("no state has a score: the direction, or neutral text along it, is nil")
    found = frame.drop("projections").with_columns(
        projection=pl.Series(products.ravel()),
        score=pl.Series(scores.ravel()).fill_nan(None),
    )
    return Made(
        found.join(kinds, on="question", how="left", maintain_order="left").select(
            list(polars_schema(ACTIVITY_SCORES))
        )
    )


def _tokens(table: pl.DataFrame, column: str) -> list[list[int]]:
    return [[int(token) for token in text.split()] for text in table[column]]


def _vectors(frame: pl.DataFrame, condition: str, n_states: int) -> Array:
    """States [answers, states, hidden] of a condition, by question."""
    chosen = frame.filter(pl.col("condition") == condition).sort("question", "state")
    flat = chosen["vector"].to_numpy()
    found: Array = flat.reshape(-1, n_states, flat.shape[-1]).astype(np.float64)
    return found


def _direction_array(frame: pl.DataFrame) -> Array:
    """Vectors [directions, states, hidden] in the table's order."""
    n_states = frame["state"].n_unique()
    flat = np.array(frame["vector"].to_list(), dtype=np.float64)
    return flat.reshape(-1, n_states, flat.shape[-1])


def products_of(frame: pl.DataFrame) -> Array:
    """Projections [tokens, states, directions] in the table's order."""
    flat = frame["projections"].to_numpy()
    n_states = frame["state"].n_unique()
    found: Array = flat.reshape(-1, n_states, flat.shape[-1]).astype(np.float64)
    return found


def _first(scales: pl.DataFrame) -> dict[str, Array]:
    """Mean and deviation per state of the direction that was asked for."""
    own = scales.filter(pl.col("direction") == scales["direction"][0]).sort("state")
    return {name: own[name].to_numpy() for name in ("mean", "deviation")}
