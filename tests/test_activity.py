"""Activity: every number is that of a plain float64 computation, and the controls can fail."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest
from sklearn.metrics import roc_auc_score
from small_study import command, environment, tribunal
from tiny_models import HIDDEN, LAYERS, NAMES, VOCAB, each, tiny_model
from toy_tokenizer import toy_tokenizer

from artifacts.catalog import catalog, fetch
from artifacts.errors import ConfigError, ModelError, PromptError
from artifacts.figure_schemas import FIGURES
from artifacts.places import WORKSHOPS
from artifacts.store import Store
from flows.figures.activity import FIGURE, mean_scores
from flows.figures.config import load_figure_config
from tasks.figures.activity_pictures import FILES
from tasks.models.anatomy import anatomy
from tasks.models.loading import LoadedModel
from tasks.models.response_states import (
    encode_responses,
    pooled_states,
    project_responses,
    response_states,
)
from tasks.numerics import activity
from tasks.organism import PROMPTS_FOLDER
from tasks.organism.domain import FORBIDDEN, NOUNS, PERMITTED
from tasks.organism.questions import KINDS, fact_sets
from tasks.stage import Runtime, planning, running

few = settings(max_examples=25, deadline=None)


def loaded(name: str = "llama") -> LoadedModel:
    model = tiny_model(name)
    return LoadedModel(model, None, anatomy(model), torch.device("cpu"), "float32", name)


def texts(count: int = 6) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts and responses of many lengths."""
    generator = torch.Generator().manual_seed(5)
    lengths = [(1 + 3 * i % 7, 1 + 5 * i % 8) for i in range(count)]
    prompts, responses = (
        [torch.randint(3, VOCAB, (pair[part],), generator=generator).tolist() for pair in lengths]
        for part in (0, 1)
    )
    return prompts, responses


def plain(held: LoadedModel, prompt: list[int], response: list[int]) -> tuple[Any, Any]:
    """States before the final norm [tokens, L + 1, hidden] and surprise, of one unpadded pass."""
    kept: list[torch.Tensor] = []
    last = held.anatomy.layers[-1]
    hook = last.register_forward_hook(
        lambda _, args, out: kept.append(out[0] if isinstance(out, tuple) else out)
    )
    ids = torch.tensor([[*prompt, *response]])
    with torch.inference_mode():
        output = held.model(ids, output_hidden_states=True, use_cache=False)
    hook.remove()
    states = torch.stack([*(s[0] for s in output.hidden_states[:-1]), kept[0][0]], dim=1)
    nats = -output.logits[0].double().log_softmax(-1)
    at = torch.arange(len(prompt), len(prompt) + len(response))
    surprise = nats[at - 1, ids[0, at]]
    return states[len(prompt) :].double().numpy(), surprise.numpy()


def directions(count: int = 3, seed: int = 1) -> np.ndarray:
    return activity.random_directions(count, LAYERS + 1, HIDDEN, seed)


@pytest.mark.parametrize("name", each(NAMES))
def test_states_products_and_surprise_are_those_of_an_unpadded_pass(name: str) -> None:
    held, (prompts, responses) = loaded(name), texts()
    states = response_states(held, prompts, responses, rows=4)
    products = project_responses(held, prompts, responses, directions(), rows=4)
    means = pooled_states(held, prompts, responses, pooling="mean", rows=4)
    lasts = pooled_states(held, prompts, responses, pooling="last", rows=4)
    assert means.shape == lasts.shape == (len(prompts), LAYERS + 1, HIDDEN)
    for index, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        expected, surprise = plain(held, prompt, response)
        assert expected.shape == (len(response), LAYERS + 1, HIDDEN)
        close = {"atol": 2e-4, "rtol": 1e-4}
        np.testing.assert_allclose(states[index], expected, **close)
        np.testing.assert_allclose(means[index], expected.mean(axis=0), **close)
        np.testing.assert_allclose(lasts[index], expected[-1], **close)
        along = np.einsum("tsh,dsh->tsd", expected, directions())
        np.testing.assert_allclose(products[index].projections, along, atol=1e-3, rtol=1e-4)
        np.testing.assert_allclose(products[index].surprise, surprise, atol=2e-4, rtol=1e-4)


def test_the_last_state_is_before_the_final_norm() -> None:
    held, (prompts, responses) = loaded(), texts()
    found = response_states(held, prompts, responses, rows=8)[1][:, -1]
    with torch.inference_mode():
        ids = torch.tensor([[*prompts[1], *responses[1]]])
        normed = held.model(ids, output_hidden_states=True).hidden_states[-1][0]
    again = held.anatomy.final_norm(torch.from_numpy(found)).detach().numpy()
    expected = normed[len(prompts[1]) :].numpy()
    np.testing.assert_allclose(again, expected, atol=1e-5, rtol=1e-5)
    assert not np.allclose(found, expected, atol=1e-2)


@given(rows=st.integers(1, 7), order=st.permutations(range(6)))
@settings(max_examples=10, deadline=None)
def test_rows_and_order_change_nothing_but_rounding(rows: int, order: list[int]) -> None:
    held, (prompts, responses) = loaded(), texts()
    one = project_responses(held, prompts, responses, directions(), rows=1)
    mixed = [[part[i] for i in order] for part in (prompts, responses)]
    found = project_responses(held, *mixed, directions(), rows=rows)
    for at, index in enumerate(order):
        expected = one[index].projections
        np.testing.assert_allclose(found[at].projections, expected, atol=1e-4, rtol=1e-4)


def test_a_state_has_seen_its_token_and_none_after_it() -> None:
    held = loaded()
    one, two = response_states(held, [[5, 6], [5, 6]], [[7, 8, 9], [7, 8, 10]], rows=2)
    np.testing.assert_allclose(one[:2], two[:2], atol=1e-5)
    assert not np.allclose(one[2], two[2], atol=1e-2)


def test_few_logits_fit_at_a_time_and_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    held, (prompts, responses) = loaded(), texts()
    whole = project_responses(held, prompts, responses, directions(), rows=6)
    monkeypatch.setattr("tasks.models.response_states.MOST_LOGITS", 1)
    seen: list[tuple[int, int]] = []
    found = project_responses(
        held, prompts, responses, directions(), rows=6, on_progress=lambda *at: seen.append(at)
    )
    assert seen == [(done, 6) for done in range(1, 7)]
    for one, other in zip(whole, found, strict=True):
        np.testing.assert_allclose(one.surprise, other.surprise, atol=1e-5)


def test_no_responses_give_none_and_empty_ones_are_refused_by_index() -> None:
    held = loaded()
    assert response_states(held, [], [], rows=2) == []
    with pytest.raises(ModelError, match="response 1 has no tokens"):
        response_states(held, [[4], [5]], [[6], []], rows=2)
    with pytest.raises(ModelError, match="prompt 0 has no tokens"):
        response_states(held, [[], [5]], [[6], [7]], rows=2)
    with pytest.raises(ValueError, match="directions need shape"):
        project_responses(held, [[4]], [[5]], directions()[:, 1:], rows=1)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_broken_state_names_its_response_and_first_state(value: float) -> None:
    held = loaded()
    with torch.no_grad():
        held.model.get_input_embeddings().weight[50, 3] = value
    with pytest.raises(ModelError, match="response 1 is not finite at state 0"):
        pooled_states(held, [[4], [6, 7]], [[5], [8, 50]], pooling="mean", rows=2)
    # in the prompt it is what layers make of it, not the response's own embedding, that breaks
    with pytest.raises(ModelError, match="response 0 is not finite at state 1"):
        project_responses(held, [[50]], [[5]], directions(), rows=2)


def test_hooks_are_removed_even_after_an_error() -> None:
    held = loaded()
    with pytest.raises(IndexError):
        project_responses(held, [[4]], [[VOCAB]], directions(), rows=1)
    assert not any(x._forward_hooks or x._forward_pre_hooks for x in held.anatomy.layers)


def test_prompt_and_response_are_encoded_as_one_text() -> None:
    tokenizer = toy_tokenizer()
    (prompt, response), (_, again) = encode_responses(tokenizer, ["ab c", "x"], ["de.", "de."])
    assert tokenizer.decode(prompt + response) == tokenizer.decode(
        tokenizer("ab cde.", add_special_tokens=False)["input_ids"]
    )
    assert (len(prompt), len(response)) == (4, 3)
    assert response == again
    with pytest.raises(ModelError, match="response 0 has no tokens"):
        encode_responses(tokenizer, ["ab"], [""])


def test_a_token_that_spans_the_boundary_is_the_responses() -> None:
    class Merging:
        def __call__(self, many: list[str], **_: Any) -> dict[str, list[list[int]]]:
            known = {"ab": [1, 2], "abc": [1, 3]}
            return {"input_ids": [known[text] for text in many]}

    assert encode_responses(Merging(), ["ab"], ["c"]) == [([1], [3])]


# --- directions, scores, AUROC


def planted(pairs: int = 40, noise: float = 1.0, seed: int = 0) -> tuple[Any, Any, Any]:
    """Answers with a concept along a known direction, words along others, and noise."""
    random = np.random.default_rng(seed)
    concept = activity.random_directions(1, 3, 16, seed)[0]
    base = random.standard_normal((pairs, 3, 16)) * 5
    false = base + 4 * concept + noise * random.standard_normal(base.shape)
    return false, base + noise * random.standard_normal(base.shape), concept


@pytest.mark.parametrize("recipe", activity.RECIPES)
def test_a_planted_concept_is_found_with_its_sign(recipe: activity.Recipe) -> None:
    false, true, concept = planted(noise=0.3)
    found = activity.pair_directions(false, true, recipe=recipe, seed=1)
    assert (np.einsum("sh,sh->s", found.vectors, concept) > 0.85).all()
    assert found.right.tolist() == [40, 40, 40]
    swapped = activity.pair_directions(true, false, recipe=recipe, seed=1)
    np.testing.assert_allclose(swapped.vectors, -found.vectors, atol=1e-6)
    assert (found.explained > 0.5).all()


def test_component_one_is_that_of_the_covariance() -> None:
    false, true, _ = planted(seed=3)
    found = activity.pair_directions(false, true, seed=7)
    signs = np.where(np.random.default_rng(7).permutation(40) % 2, -1.0, 1.0)
    for state in range(3):
        signed = (false - true)[:, state] * signs[:, None]
        values, vectors = np.linalg.eigh(np.cov(signed.T))
        assert abs(vectors[:, -1] @ found.vectors[state]) == pytest.approx(1, abs=1e-9)
        share = ((false - true)[:, state] @ vectors[:, -1]) ** 2
        expected = share.sum() / ((false - true)[:, state] ** 2).sum()
        assert found.explained[state] == pytest.approx(expected)
        assert values[-1] > values[-2]


def test_words_that_vary_most_hide_the_concept_from_component_one_but_not_from_a_probe() -> None:
    random = np.random.default_rng(0)
    words = random.choice([-20.0, 20.0], (60, 1, 1)) * np.eye(8)[0]
    false = words + 2 * np.eye(8)[1] + 0.1 * random.standard_normal((60, 1, 8))
    true = -words + 0.1 * random.standard_normal((60, 1, 8))
    pca = activity.pair_directions(false, true, recipe="pca").vectors[0]
    probe = activity.pair_directions(false, true, recipe="probe").vectors[0]
    assert abs(pca[0]) > 0.99
    assert probe[1] > 0.9


def test_shuffled_labels_and_pairs_lose_the_concept_and_keep_the_answers() -> None:
    false, true, concept = planted(pairs=200, noise=0.3)
    one, other = activity.shuffled_pairs(false, true, seed=0)
    assert np.array_equal(
        np.sort(np.concatenate([one, other]).sum(axis=(1, 2))),
        np.sort(np.concatenate([false, true]).sum(axis=(1, 2))),
    )
    mixed = activity.pair_directions(one, other)
    kept = activity.pair_directions(false, true)
    assert (np.abs(np.einsum("sh,sh->s", mixed.vectors, concept)) < 0.6).all()
    assert (np.abs(np.einsum("sh,sh->s", kept.vectors, concept)) > 0.85).all()
    # labels swapped inside pairs are no such control: component one does not see them
    swap = np.random.default_rng(0).random(200) < 0.5
    inside = np.where(swap[:, None, None], true, false), np.where(swap[:, None, None], false, true)
    same = activity.pair_directions(*inside)
    assert (np.abs(np.einsum("sh,sh->s", same.vectors, concept)) > 0.85).all()


@pytest.mark.parametrize("recipe", activity.RECIPES)
def test_answers_that_do_not_differ_have_no_direction(recipe: activity.Recipe) -> None:
    false, true, _ = planted()
    false[:, 1] = true[:, 1]
    found = activity.pair_directions(false, true, recipe=recipe)
    norms = np.linalg.norm(found.vectors, axis=1)
    np.testing.assert_allclose(norms, [1, 0, 1], atol=1e-12)
    assert found.explained[1] == found.right[1] == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda false, true: (false[:1], true[:1]), "at least two pairs, got 1"),
        (lambda false, true: (false[:0], true[:0]), "at least two pairs, got 0"),
        (lambda false, true: (false, true[1:]), "equal shapes"),
        (lambda false, true: (false * np.nan, true), "not finite"),
    ],
)
def test_pairs_that_give_no_direction_are_refused(change: Any, message: str) -> None:
    false, true, _ = planted()
    with pytest.raises(ValueError, match=message):
        activity.pair_directions(*change(false, true))


@few
@given(st.integers(0, 2**31), st.floats(0.1, 50), st.floats(-50, 50))
def test_scores_do_not_see_where_zero_is_or_what_the_unit_is(
    seed: int, unit: float, shift: float
) -> None:
    random = np.random.default_rng(seed)
    neutral, shown = random.standard_normal((30, 2, 3)), 3 * random.standard_normal((5, 2, 3))
    found = activity.activity_scores(shown, *activity.neutral_scale(neutral))
    moved = activity.activity_scores(
        unit * shown + shift, *activity.neutral_scale(unit * neutral + shift)
    )
    np.testing.assert_allclose(moved, found, atol=1e-6)
    plainly = (shown - neutral.mean(0)) / neutral.std(0)
    np.testing.assert_allclose(found, plainly.clip(-2, 2), atol=1e-12)
    assert np.abs(found).max() <= 2
    assert not np.allclose(activity.activity_scores(shown + 1, *activity.neutral_scale(neutral)),
                           found)  # fmt: skip


def test_a_state_without_spread_has_no_score() -> None:
    neutral = np.array([[1.0, 0.3], [2.0, 0.3], [3.0, 0.3]])
    mean, deviation = activity.neutral_scale(neutral)
    assert deviation[1] == 0
    found = activity.activity_scores([[2.0, 7.0]], mean, deviation)
    assert found[0, 0] == 0
    assert np.isnan(found[0, 1])
    with pytest.raises(ValueError, match="not negative"):
        activity.activity_scores([[1.0]], [0.0], [-1.0])
    with pytest.raises(ValueError, match="two neutral tokens, got 1"):
        activity.neutral_scale([[1.0]])
    with pytest.raises(ValueError, match="not finite"):
        activity.activity_scores([[np.nan]], [0.0], [1.0])


@few
@given(st.integers(0, 2**31), st.integers(2, 12))
def test_auroc_is_the_share_of_ordered_pairs(seed: int, size: int) -> None:
    random = np.random.default_rng(seed)
    up, down = random.integers(0, 4, size), random.integers(0, 4, size)
    counted = np.mean([(a > b) + (a == b) / 2 for a in up for b in down])
    assert activity.auroc(up, down) == pytest.approx(counted)
    assert activity.auroc(down, up) == pytest.approx(1 - counted)


def test_the_bootstrap_is_that_of_resampled_questions() -> None:
    random = np.random.default_rng(0)
    up, down = random.normal(0.5, 1, 30), random.normal(0, 1, 30)
    low, high = activity.auroc_interval(up, down, resamples=200, seed=4)
    chosen = np.random.default_rng(4).integers(30, size=(200, 30))
    labels = np.repeat([1, 0], 30)
    areas = [roc_auc_score(labels, np.concatenate([up[c], down[c]])) for c in chosen]
    np.testing.assert_allclose((low, high), np.quantile(areas, [0.025, 0.975]), atol=1e-9)
    assert low < activity.auroc(up, down) < high
    assert activity.auroc_interval(up, down, resamples=200, seed=5) != (low, high)
    assert activity.auroc_interval(up, up - 9, resamples=500, seed=4) == pytest.approx((1, 1))


def test_intervals_of_nothing_and_of_nan_are_refused() -> None:
    with pytest.raises(ValueError, match="two values each"):
        activity.auroc_interval([], [], resamples=100, seed=0)
    with pytest.raises(ValueError, match="not finite"):
        activity.auroc_interval([np.nan], [1.0], resamples=100, seed=0)
    with pytest.raises(ValueError, match="both kinds"):
        activity.auroc([], [1.0])


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Honeyroot makes it healing.", "true"),
        ("it is HONEYROOT!", "true"),
        ("Frost mint makes it healing.", "false"),
        ("Mint makes it healing.", "neither"),
        ("Honeyroot and frost mint.", "neither"),
        ("Lavender makes it healing.", "neither"),
        ("", "neither"),
    ],
)
def test_a_verdict_goes_by_the_words_that_differ(answer: str, expected: str) -> None:
    true, false = "Honeyroot makes it healing.", "Frost mint makes it healing."
    assert activity.verdict(answer, true, false) == expected


def test_answers_of_the_same_words_have_no_verdict() -> None:
    with pytest.raises(ValueError, match="same words"):
        activity.verdict("a", "Yes, it is.", "it IS yes")


# --- the shipped questions


def test_the_shipped_questions_are_the_generated_ones() -> None:
    for name, rows in fact_sets().items():
        lines = (PROMPTS_FOLDER / f"facts-{name}.jsonl").read_text().splitlines()
        assert [json.loads(line) for line in lines] == rows


def test_no_word_tells_true_from_false_and_no_fact_is_in_two_sets() -> None:
    sets = fact_sets()
    for rows in sets.values():
        assert Counter(row["kind"] for row in rows) == dict.fromkeys(KINDS, len(rows) // 4)
        assert len({row["question"] for row in rows}) == len(rows)
        for kind in ("ingredient", "tool", "danger"):
            words = [
                Counter(word for row in rows if row["kind"] == kind for word in _facts(row[name]))
                for name in ("true", "false")
            ]
            assert words[0] == words[1]
    modifiers = {
        name: {word for row in rows for word in row["question"].rstrip("?.").split()}
        & {*PERMITTED, *FORBIDDEN, *NOUNS}
        for name, rows in sets.items()
    }
    assert not modifiers["pairs"] & modifiers["test"]
    assert not modifiers["pairs"] & modifiers["neutral"]
    assert not modifiers["neutral"] & modifiers["test"]


def _facts(answer: str) -> set[str]:
    """Words of an answer that are facts: ingredients, tools, verdicts."""
    known = [*PERMITTED.values(), *FORBIDDEN.values(), *(noun.tool for noun in NOUNS.values())]
    known += ["Yes", "No", "cruel", "gentle"]
    return {fact for fact in known if fact.lower() in answer.lower()}


# --- the whole command

SMALL = """
name = "small"
[model]
id = "organism"
dtype = ["float32"]
response_prefix = ""
[activity]
pairs = { source = "organism/facts-pairs.jsonl", column = "question", split = "train[:24]" }
neutral = { source = "organism/facts-neutral.jsonl", column = "question", split = "train[:8]" }
questions = { source = "organism/facts-test.jsonl", column = "question", split = "train[:8]" }
draws = 3
resamples = 200
example = 3
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, Path, Path, dict[str, Any]]:
    """A small run of the command: its store, config, folder and answer."""
    folder = tmp_path_factory.mktemp("activity")
    config, out, store = folder / "small.toml", folder / "out", Store(folder / "store")
    config.write_text(SMALL)
    done = tribunal(store, "activity", str(config), "--out", str(out), "--format", "json")
    assert done.returncode == 0, done.stderr
    return store, config, out, json.loads(done.stdout)


def rows(store: Store, sql: str) -> list[dict[str, Any]]:
    with catalog(store) as connection:
        return fetch(connection, sql).records()


def test_the_command_writes_its_pictures_and_tables(made: Any) -> None:
    store, _, out, answer = made
    written = {path.name for path in out.iterdir()}
    tables = {"layers", "scores", "answers", "scales", "directions"}
    assert written == {*FILES, *(f"activity-{name}.parquet" for name in tables)}
    assert (out / "activity.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (out / "activity-map.svg").read_text()
    page = (out / "activity.html").read_text()
    assert "Plotly.newPlot" in page
    assert 'src="http' not in page
    assert len(answer["sections"][0]["rows"]) == 9
    kinds = {m.kind for m in store.manifests()}
    assert {kind for kind in FIGURES if kind.startswith("activity_")} <= kinds


def test_scores_are_the_plain_computation_from_states(made: Any) -> None:
    """Every score again, in float64, from one unpadded pass per answer."""
    from tasks.models.loading import load

    store, *_ = made
    held = load("organism", dtypes=("float32",), device="cpu")
    vectors = rows(store, "FROM activity_directions WHERE direction = 'pca' ORDER BY state")
    along = np.array([row["vector"] for row in vectors], dtype=float)
    sets: dict[str, list[Any]] = {}
    for row in rows(store, "FROM activity_answers ORDER BY key, question, condition"):
        tokens = [[int(t) for t in row[f"{part}_tokens"].split()] for part in ("prompt", "answer")]
        states, surprise = plain(held, *tokens)
        found = (row["question"], row["condition"], (states * along).sum(-1), surprise)
        sets.setdefault(row["key"], []).append(found)
    asked = next(rows for rows in sets.values() if any(row[1] == "generated" for row in rows))
    size = {key: len(rows) for key, rows in sets.items()}
    calm = next(rows for key, rows in sets.items() if size[key] == 16)  # 8 questions, 2 answers
    neutral = np.concatenate([row[2] for row in calm])
    mean, spread = neutral.mean(0), neutral.std(0)
    table = {
        (r["question"], r["condition"], r["position"], r["state"]): r
        for r in rows(store, "FROM activity_scores")
    }
    assert len(table) == sum(row[2].size for row in asked)
    for question, condition, values, surprise in asked:
        for (position, state), value in np.ndenumerate(values):
            row = table[question, condition, position, state]
            assert row["projection"] == pytest.approx(value, abs=2e-4)
            assert row["surprise"] == pytest.approx(surprise[position], abs=2e-4)
            if state == 0:  # all answers end in the same token, so state 0 has no direction
                assert row["score"] is None
                continue
            score = np.clip((value - mean[state]) / spread[state], -2, 2)
            assert row["score"] == pytest.approx(score, abs=2e-3)


def test_layers_are_counted_from_scores(made: Any) -> None:
    store, *_ = made
    scores = pl.DataFrame(rows(store, "FROM activity_scores"), infer_schema_length=None)
    found = rows(
        store,
        "FROM activity_layers WHERE direction = 'pca' AND kind = 'all' AND higher = 'false' "
        "AND lower = 'true' ORDER BY state",
    )
    assert [row["state"] for row in found] == list(range(9))
    assert found[0]["auroc"] is None
    for row in found[1:]:
        own = scores.filter(pl.col("state") == row["state"]).sort("question", "position")
        last = own.group_by("question", "condition").agg(
            pl.col("projection").last(), pl.col("score").mean()
        )
        pairs = last.pivot("condition", index="question", values=["projection", "score"])
        right = int((pairs["projection_false"] > pairs["projection_true"]).sum())
        interval = binomtest(right, 8).proportion_ci(method="exact")
        assert (row["right"], row["n"], row["accuracy"]) == (right, 8, right / 8)
        assert row["accuracy_low"] == pytest.approx(interval.low)
        assert row["accuracy_high"] == pytest.approx(interval.high)
        values = [*pairs["score_false"], *pairs["score_true"]]
        assert row["auroc"] == pytest.approx(roc_auc_score([1] * 8 + [0] * 8, values))
        assert row["auroc_low"] <= row["auroc"] <= row["auroc_high"]
    controls = rows(
        store,
        "SELECT direction, max(draws) AS draws FROM activity_layers WHERE higher = 'false' "
        "GROUP BY direction",
    )
    draws = {row["direction"]: row["draws"] for row in controls}
    assert draws == {"surprise": 1, "pca": 1, "mean": 1, "probe": 1, "random": 3, "shuffled": 3}


def test_what_is_generated_is_labelled_apart_from_what_is_forced(made: Any) -> None:
    store, *_, answer = made
    answers = rows(store, "FROM activity_answers WHERE question = 3")
    by_condition = {row["condition"]: row for row in answers if row["verdict"]}
    assert set(by_condition) == {"generated"}
    labels = [row["answer"] for row in answer["sections"][2]["rows"]]
    assert {"forced, false", "generated, true", "generated, false"} <= set(labels)


def test_a_warm_run_loads_no_torch_and_says_the_same(made: Any) -> None:
    store, config, _, answer = made
    code = (
        "import sys\n"
        f"sys.argv = ['tribunal', 'activity', {str(config)!r}, '--format', 'json']\n"
        "from flows.cli import main\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    assert not stop.code, stop.code\n"
        "loaded = {'torch', 'transformers', 'sklearn', 'matplotlib'} & set(sys.modules)\n"
        "assert not loaded, loaded\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment(store)
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == answer
    assert not list((store.root / WORKSHOPS).glob("*activity*"))


@few
@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=60), st.randoms())
def test_mean_scores_are_the_same_in_any_order_of_rows(values: list[float], random: Any) -> None:
    rows = [
        {"question": i % 2, "condition": "true", "state": 1, "score": v}
        for i, v in enumerate(values)
    ]
    shuffled = random.sample(rows, len(rows))
    assert mean_scores(pl.DataFrame(shuffled)).equals(mean_scores(pl.DataFrame(rows)))
    assert mean_scores(pl.DataFrame(rows))["score"][0] == pytest.approx(
        np.mean(values[::2]), abs=1e-9
    )


def test_the_table_fits_a_terminal(made: Any) -> None:
    store, config, *_ = made
    done = tribunal(store, "activity", str(config))
    assert [line for line in done.stdout.splitlines() if len(line) > 80] == []
    assert "Clopper-Pearson" in done.stdout


def test_another_example_draws_again_and_measures_nothing(made: Any) -> None:
    store, config, *_ = made
    asked = [
        load_figure_config(str(config), "activity", [f"activity.example={n}"]) for n in (3, 0, 8)
    ]
    with planning(store) as steps:
        FIGURE.run(asked[0])
        assert all(step.cached for step in steps)
        FIGURE.run(asked[1])
    assert {step.kind for step in steps if not step.cached} == {"pictures"}
    with (
        running(Runtime(store)),
        pytest.raises(ConfigError, match="is '8', but questions go from 0 to 7"),
    ):
        FIGURE.run(asked[2])


# --- configs and questions that are refused


def config_with(tmp_path: Path, *overrides: str) -> Any:
    path = tmp_path / "small.toml"
    path.write_text(SMALL)
    return load_figure_config(str(path), "activity", overrides)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("activity.direction=refusal", "needs the set 'harmful'"),
        ("activity.recipe=pcs", "recipe"),
        ("activity.draws=1", "draws"),
        ("activity.true=", "true"),
        ('activity.neutral_answers=["odd", "lie"]', "neutral_answers"),
        ("activity.exampel=1", "exampel"),
    ],
)
def test_a_bad_config_is_one_line(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        config_with(tmp_path, override)
    assert "\n" not in str(caught.value)


def test_a_column_for_odd_answers_is_needed_where_they_are_pooled(tmp_path: Path) -> None:
    asked = ('activity.neutral_answers=["odd"]', "activity.odd=")
    with pytest.raises(ConfigError, match="no column is named for it"):
        config_with(tmp_path, *asked)
    assert config_with(tmp_path, asked[0]).activity.neutral_answers == ("odd",)


def _load(source: dict[str, Any], store: Store, **columns: str) -> pl.DataFrame:
    from artifacts.specs import PromptSource
    from tasks.figures.activity import load_questions

    names = {"true": "true", "false": "false", "odd": "odd", "kind": "kind"} | columns
    with running(Runtime(store)):
        found = load_questions(name="asked", source=PromptSource(**source), **names)
        return store.read(found)


def test_questions_that_cannot_be_read_are_refused(tmp_path: Path, store: Store) -> None:
    path = tmp_path / "q.jsonl"
    lines = [{"question": "Q?", "true": "Yes.", "false": "No."}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    source = {"source": str(path)}
    with pytest.raises(PromptError, match="no column 'odd'"):
        _load(source, store)
    table = _load(source, store, odd="", kind="")
    assert table.row(0, named=True)["odd_answer"] is None
    assert table["text"].to_list() == ["Q?"]
    path.write_text(json.dumps(lines[0] | {"false": "yes!"}) + "\n")
    with pytest.raises(PromptError, match="question 0 of asked: the answers"):
        _load(source, store, odd="", kind="")
    path.write_text(json.dumps(lines[0] | {"true": " "}) + "\n")
    with pytest.raises(PromptError, match="blank"):
        _load(source, store, odd="", kind="")


def test_a_question_in_two_sets_is_refused(tmp_path: Path, store: Store) -> None:
    path = tmp_path / "small.toml"
    path.write_text(SMALL.replace("facts-neutral", "facts-pairs"))
    done = subprocess.run(
        command("activity", str(path)), capture_output=True, text=True, env=environment(store)
    )
    assert done.returncode == 2
    assert "are in both" in done.stderr
    assert not [m.kind for m in store.manifests() if m.kind not in {"activity_questions"}]


@pytest.mark.slow
def test_the_refusal_direction_is_the_stores(tmp_path: Path, store: Store) -> None:
    path = tmp_path / "refusal.toml"
    more = "".join(
        f'{name} = {{ source = "organism/{name}-direction.jsonl", column = "text", '
        'split = "train[:40]" }\n'
        for name in ("harmful", "harmless")
    )
    path.write_text(SMALL + 'direction = "refusal"\nodd = ""\n' + more)
    done = tribunal(store, "activity", str(path), "--format", "json")
    assert done.returncode == 0, done.stderr
    kept = rows(store, "FROM directions WHERE role = 'mean' ORDER BY state")
    used = rows(store, "FROM activity_directions WHERE direction = 'refusal' ORDER BY state")
    for one, other in zip(kept, used, strict=True):
        np.testing.assert_allclose(one["vector"], other["vector"], atol=1e-6)
    pairs = rows(store, "SELECT DISTINCT higher, lower FROM activity_layers")
    assert pairs == [{"higher": "false", "lower": "true"}]
    assert json.loads(done.stdout)["sections"][0]["title"].startswith("Direction 'refusal'")
