"""The figure `norms`: every number against a plain reference, and the command as a whole."""

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
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score, roc_auc_score, roc_curve
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from small_study import environment, tribunal
from tiny_models import HIDDEN, LAYERS, NAMES, VOCAB, each, tiny_model

from artifacts.catalog import catalog, fetch
from artifacts.errors import ConfigError, ModelError, TribunalError
from artifacts.figure_schemas import NORMS_ANSWERS, NORMS_PROBABILITIES, NORMS_PROMPTS
from artifacts.schemas import polars_schema
from artifacts.store import Manifest, Ref, Store, parquet
from flows.figures.config import load_figure_config
from flows.figures.norms import FIGURE
from tasks.figures.norms import compare_states, map_norms
from tasks.figures.norms_detection import (
    random_layers,
    rate_bypass,
    score_detectors,
    susceptible,
)
from tasks.models.anatomy import anatomy, hidden
from tasks.models.bypass import answer_without_layers
from tasks.models.decoding import decode
from tasks.models.loading import LoadedModel
from tasks.models.position_states import last_states, log_norms
from tasks.numerics.detection import fit_classifier, metrics
from tasks.numerics.norm_maps import cell_means, match_lengths, state_differences
from tasks.numerics.prompt_factors import decompose, project
from tasks.organism import card
from tasks.organism.jailbreaks import TEMPLATES, UNSEEN, deed, jailbreak_sets, wrap
from tasks.stage import Runtime, running

ROOT = Path(__file__).parents[1]
NAN = float("nan")


class _Tokenizer:
    eos_token_id = None


def loaded(name: str = "llama") -> LoadedModel:
    model = tiny_model(name)
    return LoadedModel(model, _Tokenizer(), anatomy(model), torch.device("cpu"), "float32", name)


def prompts(count: int = 6, least: int = 1) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [
        torch.randint(3, VOCAB, (least + 4 * i % 9,), generator=generator).tolist()
        for i in range(count)
    ]


def states_of(held: LoadedModel, prompt: list[int]) -> np.ndarray:
    """[L + 1, tokens, hidden] in float64, by one unpadded pass; the last before the final norm."""
    last: list[torch.Tensor] = []
    handle = held.anatomy.layers[-1].register_forward_hook(
        lambda module, args, output: last.append(hidden(output))
    )
    with torch.inference_mode():
        output = held.model(torch.tensor([prompt]), output_hidden_states=True, use_cache=False)
    handle.remove()
    every = [*output.hidden_states[:-1], last[0]]
    return torch.cat(every).double().numpy()


# --- what is measured in a model


@pytest.mark.parametrize("name", each(NAMES))
def test_log_norms_are_those_of_unpadded_passes(name: str) -> None:
    held = loaded(name)
    found = log_norms(held, prompts(), rows=4, positions=7)
    assert found.shape == (6, LAYERS + 1, 7)
    for prompt, values in zip(prompts(), found, strict=True):
        expected = np.log(np.linalg.norm(states_of(held, prompt), axis=-1))[:, :7]
        np.testing.assert_allclose(values[:, : len(prompt)], expected, atol=2e-5)
        assert np.isnan(values[:, len(prompt) :]).all()


@pytest.mark.parametrize("name", ["gptj", "llama", "mistral"])
def test_neither_batch_nor_order_nor_padding_matters(name: str) -> None:
    held, order = loaded(name), [4, 2, 0, 5, 1, 3]
    alone = log_norms(held, prompts(), rows=1, positions=9)
    mixed = log_norms(held, [prompts()[i] for i in order], rows=6, positions=9)
    np.testing.assert_allclose(mixed, alone[order], atol=2e-5)
    padded = log_norms(held, [[0, 0, *prompts()[2]]], rows=1, positions=11)[0, :, 2:]
    kept = ~np.isnan(alone[2])
    assert not np.allclose(padded[kept], alone[2][kept], atol=1e-3), "a pad that is seen matters"


def test_a_zero_state_has_no_logarithm_and_a_broken_one_is_named() -> None:
    held = loaded()
    weight = held.model.get_input_embeddings().weight
    with torch.no_grad():
        weight[50] = 0.0
    found = log_norms(held, [[4, 50, 7]], rows=1, positions=5)[0]
    assert np.isnan(found[0]).tolist() == [False, True, False, True, True]
    assert not np.isnan(found[1:, :3]).any(), "later states are not zero"
    with torch.no_grad():
        weight[50, 3] = NAN
    with pytest.raises(ModelError, match="prompt 1 is not finite at state 0, position 1"):
        log_norms(held, [[4, 5, 6, 7], [4, 50]], rows=2, positions=5)
    with pytest.raises(ModelError, match="prompt 0 is not finite at state 0"):
        last_states(held, [[4, 50]], rows=2, positions=2)


@pytest.mark.parametrize("name", each(("llama", "gptj", "mistral", "qwen3", "gemma3", "falcon")))
def test_last_states_are_what_leaves_each_layer_at_the_last_tokens(name: str) -> None:
    held, asked = loaded(name), prompts(least=4)
    found = last_states(held, asked, rows=3, positions=3)
    assert found.shape == (6, LAYERS, 3, HIDDEN)
    for prompt, values in zip(asked, found, strict=True):
        np.testing.assert_allclose(values, states_of(held, prompt)[1:, -3:], atol=1e-4, rtol=1e-4)


def test_a_prompt_too_short_to_decompose_is_refused_with_the_way_out() -> None:
    with pytest.raises(ModelError, match=r"prompt 1 has 2 tokens.*lower norms\.positions"):
        last_states(loaded(), [[4, 5, 6], [4, 5]], rows=2, positions=3)
    for call in (last_states, log_norms):
        with pytest.raises(ValueError, match="positions must be at least 1"):
            call(loaded(), [[4]], rows=1, positions=0)
        with pytest.raises(ModelError, match="prompt 0 has no tokens"):
            call(loaded(), [[]], rows=1, positions=1)
        assert len(call(loaded(), [], rows=1, positions=1)) == 0


# --- answers without layers


def without(held: LoadedModel, prompt: list[int], left_out: set[int], tokens: int) -> list[int]:
    """Greedy answer by whole passes without a cache through a model that lacks the layers."""
    handles = [
        held.anatomy.layers[layer].register_forward_hook(
            lambda module, args, kwargs, output: (
                (args[0] if args else kwargs["hidden_states"], *output[1:])
                if isinstance(output, tuple)
                else (args[0] if args else kwargs["hidden_states"])
            ),
            with_kwargs=True,
        )
        for layer in left_out
    ]
    said: list[int] = []
    with torch.inference_mode():
        while len(said) < tokens:
            logits = held.model(torch.tensor([prompt + said]), use_cache=False).logits
            said.append(int(logits[0, -1].argmax()))
            if said[-1] == held.model.generation_config.eos_token_id:
                said.pop()
                break
    for handle in handles:
        handle.remove()
    return said


SETS: list[set[int]] = [set(), {0}, {1, 2}, {2}, {0, 1, 2}, {1}]


@pytest.mark.parametrize("name", each(NAMES))
def test_each_prompt_is_answered_without_its_own_layers(name: str) -> None:
    held = loaded(name)
    found = answer_without_layers(held, prompts(), SETS, max_new_tokens=6, rows=4)
    expected = [without(held, p, s, 6) for p, s in zip(prompts(), SETS, strict=True)]
    assert [response.tokens for response in found] == expected
    assert not any(layer._forward_hooks for layer in held.anatomy.layers)


def test_no_layers_left_out_is_the_model_and_some_are_not() -> None:
    held = loaded()
    plain = decode(held, prompts(), max_new_tokens=8, rows=3)[0].tokens
    none = answer_without_layers(held, prompts(), [()] * 6, max_new_tokens=8, rows=4)
    assert [response.tokens for response in none] == plain
    some = answer_without_layers(held, prompts(), [(0,)] * 6, max_new_tokens=8, rows=4)
    assert [response.tokens for response in some] != plain


def test_layers_that_are_not_there_are_refused() -> None:
    with pytest.raises(ValueError, match="layer 3 is none of the model's 3"):
        answer_without_layers(loaded(), [[4]], [[3]], max_new_tokens=1, rows=1)
    with pytest.raises(ValueError, match="2 prompts need as many sets"):
        answer_without_layers(loaded(), [[4], [5]], [[0]], max_new_tokens=1, rows=1)
    with pytest.raises(ValueError, match="max_new_tokens"):
        answer_without_layers(loaded(), [[4]], [[0]], max_new_tokens=0, rows=1)


def test_broken_logits_name_the_prompt() -> None:
    held = loaded()
    with torch.no_grad():
        held.model.get_input_embeddings().weight[50] = NAN
    with pytest.raises(ModelError, match="logits of prompt 1 are not finite at new token 0"):
        answer_without_layers(held, [[4, 5], [50]], [[0], [1]], max_new_tokens=2, rows=2)


# --- maps


def ragged(lengths: list[int], states: int = 3, width: int = 6, seed: int = 0) -> np.ndarray:
    values = np.random.default_rng(seed).normal(size=(len(lengths), states, width))
    for row, length in zip(values, lengths, strict=True):
        row[:, length:] = NAN
    return values


def test_a_cell_is_the_mean_of_the_prompts_that_reach_it() -> None:
    values = ragged([6, 3, 1, 4])
    found = cell_means(values)
    for state in range(3):
        for position in range(6):
            there = [p[state, position] for p in values if not np.isnan(p[state, position])]
            assert found.count[state, position] == len(there)
            if there:
                assert found.mean[state, position] == pytest.approx(sum(there) / len(there))
            if len(there) > 1:
                expected = np.std(there, ddof=1) / np.sqrt(len(there))
                assert found.error[state, position] == pytest.approx(expected)
            else:
                assert np.isnan(found.error[state, position])
    assert not np.allclose(found.mean[:, 4], np.nan_to_num(values)[:, :, 4].mean(axis=0))


def test_maps_of_nothing_one_prompt_and_infinity() -> None:
    with pytest.raises(ValueError, match="got"):
        cell_means(np.zeros((0, 2, 2)))
    with pytest.raises(ValueError, match="infinite"):
        cell_means(np.full((1, 1, 1), -np.inf))
    one = cell_means(ragged([2]))
    assert one.count[0].tolist() == [1, 1, 0, 0, 0, 0]
    assert np.isnan(one.error).all()


@given(
    st.lists(st.integers(1, 9), max_size=12),
    st.lists(st.integers(1, 9), max_size=12),
    st.integers(1, 4),
    st.integers(0, 99),
)
def test_matched_prompts_have_one_histogram_and_as_many_as_can_be(
    one: list[int], two: list[int], width: int, seed: int
) -> None:
    kept = match_lengths(one, two, width, seed)
    assert kept == match_lengths(one, two, width, seed)
    histograms = [
        Counter(lengths[i] // width for i in found)
        for lengths, found in zip((one, two), kept, strict=True)
    ]
    most = Counter(x // width for x in one) & Counter(x // width for x in two)
    assert histograms == [most, most]
    assert all(len(set(found)) == len(found) for found in kept)


def test_matching_is_by_seed_and_needs_a_bin() -> None:
    assert match_lengths([3] * 20, [3] * 5, seed=0) != match_lengths([3] * 20, [3] * 5, seed=1)
    assert match_lengths([1, 2], [3, 4]) == ([], [])
    with pytest.raises(ValueError, match="at least 1 token"):
        match_lengths([1], [1], 0)


def test_a_states_difference_is_over_shown_cells_and_its_interval_over_prompts() -> None:
    one, two = ragged([6] * 30, seed=1) + 0.5, ragged([6, 2, 6, 4] * 10, seed=2)
    shown = np.ones((3, 6), dtype=bool)
    shown[:, 0] = False
    shown[2] = False
    difference, low, high = state_differences(one, two, shown)
    maps = [cell_means(values).mean for values in (one, two)]
    assert difference[:2] == pytest.approx((maps[0] - maps[1])[:2, 1:].mean(axis=1))
    assert np.isnan([difference[2], low[2], high[2]]).all()
    assert (low[:2] < difference[:2]).all()
    assert (difference[:2] < high[:2]).all()
    wide = state_differences(one[:8], two[:8], shown)
    assert (wide[2] - wide[1])[0] > (high - low)[0], "fewer prompts, wider interval"
    same = state_differences(one, one, shown)
    assert same[0][:2] == pytest.approx(0)
    assert (same[1][:2] < 0).all()
    assert (same[2][:2] > 0).all()


# --- factors and detectors


def of_factors(n: int, seed: int, noise: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(7)
    b, c = generator.normal(size=(5, 2)), generator.normal(size=(9, 2))
    other = np.random.default_rng(seed)
    a = other.normal(size=(n, 2))
    return np.einsum("nr,pr,hr->nph", a, b, c) + noise * other.normal(size=(n, 5, 9)), a


def test_a_tensor_of_two_components_is_found_and_noise_is_not() -> None:
    states, _ = of_factors(20, seed=1)
    factors = decompose(states, 2, iterations=500, tolerance=1e-12)
    assert factors.error < 1e-3
    np.testing.assert_allclose(np.linalg.norm(factors.positions, axis=0), 1)
    noisy, _ = of_factors(20, seed=1, noise=2.0)
    assert decompose(noisy, 2).error > 0.3


def test_new_prompts_have_the_least_squares_factors() -> None:
    factors = decompose(of_factors(20, seed=1, noise=0.3)[0], 3)
    new, _ = of_factors(6, seed=2, noise=0.3)
    z = np.stack(
        [
            np.outer(factors.positions[:, r], factors.hidden[:, r]).ravel() * factors.scale
            for r in range(3)
        ],
        axis=1,
    )
    expected = np.stack([np.linalg.lstsq(z, x.ravel(), rcond=None)[0] for x in new])
    np.testing.assert_allclose(project(new, factors), expected, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(project(new[:1], factors)[0], expected[0], rtol=1e-6, atol=1e-9)


def test_factors_are_repeatable_and_do_not_see_the_scale() -> None:
    states, _ = of_factors(12, seed=3, noise=0.1)
    one, two = (project(states, decompose(states, 6, seed=4)) for _ in range(2))
    assert one.tobytes() == two.tobytes()
    big = decompose(1e3 * states, 6, seed=4)
    np.testing.assert_allclose(project(1e3 * states, big), one, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("states", "said"),
    [
        (np.zeros((3, 2, 2)), "zeros"),
        (np.zeros((0, 2, 2)), "got"),
        (np.full((3, 2, 2), NAN), "finite"),
        (np.ones((3, 2)), "got"),
    ],
)
def test_tensors_without_factors_are_refused(states: np.ndarray, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        decompose(states, 1)


def test_factors_fit_their_own_shape_and_one_prompt_will_do() -> None:
    factors = decompose(of_factors(1, seed=1)[0], 1)
    assert 0 <= factors.error < 1
    assert factors.positions.shape == (5, 1)
    with pytest.raises(ValueError, match="do not fit"):
        project(np.ones((2, 4, 9)), factors)
    with pytest.raises(ValueError, match="rank"):
        decompose(of_factors(3, seed=1)[0], 0)


def test_the_classifier_is_scikit_learns() -> None:
    generator = np.random.default_rng(0)
    features = np.concatenate([generator.normal(size=(30, 4)), 1 + generator.normal(size=(12, 4))])
    features[:, 3] = 5.0  # says nothing
    labels = np.arange(42) >= 30
    own = fit_classifier(features, labels).probability(features)
    theirs = make_pipeline(
        StandardScaler(), LogisticRegression(class_weight="balanced", max_iter=1000)
    ).fit(features, labels)
    np.testing.assert_allclose(own, theirs.predict_proba(features)[:, 1], atol=1e-6)
    with pytest.raises(ValueError, match="both classes"):
        fit_classifier(features, np.ones(42, dtype=bool))
    with pytest.raises(ValueError, match="finite"):
        fit_classifier(features * NAN, labels)


scores = st.lists(st.sampled_from([0.0, 0.1, 0.4, 0.5, 0.6, 0.9, 1.0]), min_size=1, max_size=25)


@given(scores, scores)
def test_metrics_are_scikit_learns(positive: list[float], negative: list[float]) -> None:
    found = metrics(np.array(positive), np.array(negative), resamples=20)
    labels = [1] * len(positive) + [0] * len(negative)
    every = np.array(positive + negative)
    assert found["auroc"].value == pytest.approx(roc_auc_score(labels, every))
    assert found["f1"].value == pytest.approx(f1_score(labels, every >= 0.5, zero_division=0))
    fpr, tpr, _ = roc_curve(labels, every, drop_intermediate=False)
    assert found["fpr_at_95_tpr"].value == pytest.approx(fpr[tpr >= 0.95 - 1e-12].min())
    for metric in found.values():
        assert 0 <= metric.low <= metric.high <= 1


def test_intervals_cover_the_value_shrink_with_n_and_repeat() -> None:
    generator = np.random.default_rng(1)
    positive, negative = generator.normal(1, 1, 200), generator.normal(0, 1, 200)
    many, few = metrics(positive, negative), metrics(positive[:20], negative[:20])
    for name in ("auroc", "fpr_at_95_tpr"):
        assert many[name].low < many[name].value < many[name].high
        assert many[name].high - many[name].low < few[name].high - few[name].low
    assert many == metrics(positive, negative)
    assert many != metrics(positive, negative, seed=1)
    drawn = generator.integers(200, size=(300, 2, 200))
    plain = [
        roc_auc_score([1] * 200 + [0] * 200, np.concatenate([positive[i], negative[j]]))
        for i, j in drawn
    ]
    assert many["auroc"].low == pytest.approx(np.quantile(plain, 0.025), abs=0.012)
    assert many["auroc"].high == pytest.approx(np.quantile(plain, 0.975), abs=0.012)


def test_scores_that_separate_tie_or_are_missing() -> None:
    apart = metrics(np.array([0.9, 0.8]), np.array([0.1, 0.2]))
    assert [apart[name].value for name in ("auroc", "f1", "fpr_at_95_tpr")] == [1, 1, 0]
    same = metrics(np.full(5, 0.7), np.full(5, 0.7))
    assert (same["auroc"].value, same["auroc"].low, same["fpr_at_95_tpr"].value) == (0.5, 0.5, 1)
    for broken in (np.array([]), np.array([NAN])):
        with pytest.raises(ValueError, match="finite numbers"):
            metrics(broken, np.array([0.5]))


# --- stages on tables written by hand


def put(store: Store, kind: str, frame: pl.DataFrame) -> Ref:
    draft = Manifest(
        kind=kind,
        key=f"{len(list(store.manifests())):020x}",
        version=1,
        data="data.parquet",
        rows=frame.height,
        identity={},
        inputs={},
        notes={},
        provenance={},
    )
    return store.put(draft, parquet(frame))


def test_susceptible_layers_are_above_the_threshold_and_the_most_probable_first() -> None:
    p = [0.2, 0.9, 0.5, 0.99, 0.9]
    assert susceptible(p, 0.5, 9) == {1, 3, 4}, "0.5 is not above 0.5"
    assert susceptible(p, 0.5, 1) == {3}
    assert susceptible(p, 0.5, 2) == {1, 3}, "of equals, the lower"
    assert susceptible(p, 0.995, 9) == frozenset()


def test_random_layers_are_as_many_and_depend_on_prompt_and_seed_alone() -> None:
    drawn = [random_layers(2, 8, 0, f"{i:016x}") for i in range(40)]
    assert drawn == [random_layers(2, 8, 0, f"{i:016x}") for i in range(40)]
    assert {len(kind) for kind in drawn} == {2}
    assert len(set(drawn)) > 10
    assert drawn != [random_layers(2, 8, 1, f"{i:016x}") for i in range(40)]
    assert random_layers(0, 8, 0, "0") == frozenset()


def answers(arms: dict[str, list[str]]) -> pl.DataFrame:
    rows = [
        (
            arm,
            0 if arm == "unedited" else 1,
            "jailbreak",
            str(i),
            "" if arm == "unedited" else "3",
            "text",
            outcome == "refused",
            "loop" if outcome == "broken" else None,
        )
        for arm, outcomes in arms.items()
        for i, outcome in enumerate(outcomes)
    ]
    return pl.DataFrame(rows, schema=polars_schema(NORMS_ANSWERS), orient="row")


def test_rates_are_of_prompts_that_were_answered_unedited(store: Store) -> None:
    told = {
        "unedited": ["answered"] * 8 + ["refused", "broken"],
        "susceptible": ["refused"] * 6 + ["broken", "answered", "refused", "refused"],
        "random": ["refused"] + ["answered"] * 7 + ["refused", "answered"],
    }
    with running(Runtime(store)):
        frame = store.read(rate_bypass(answers=put(store, "norms_answers", answers(told)), seed=0))
    found = {(r["arm"], r["outcome"]): r for r in frame.iter_rows(named=True)}
    assert [found["susceptible", o]["k"] for o in ("refused", "broken", "answered")] == [6, 1, 1]
    assert found["random", "refused"]["k"] == 1
    assert {r["n"] for r in found.values()} == {8}
    more = found["susceptible - random", "refused"]
    assert more["rate"] == pytest.approx(5 / 8)
    assert 0 < more["low"] < 5 / 8 < more["high"] < 1
    assert found["susceptible", "refused"]["low"] == pytest.approx(0.3491, abs=1e-3)


def test_rates_of_nothing_say_nothing(store: Store) -> None:
    told = {"unedited": ["refused"], "susceptible": ["refused"], "random": ["refused"]}
    with running(Runtime(store)):
        frame = store.read(rate_bypass(answers=put(store, "norms_answers", answers(told)), seed=0))
    assert frame["n"].to_list() == [0] * 6
    assert frame["rate"].is_null().all()
    assert set(zip(frame["low"], frame["high"], strict=True)) == {(0.0, 1.0)}


def test_detectors_are_scored_by_layer_class_and_template(store: Store) -> None:
    generator = np.random.default_rng(0)
    rows: list[tuple[Any, ...]] = []
    for layer in (0, 1):
        for name, centre in (("benign", 0.3), ("control", 0.5), ("jailbreak", 0.5 + 0.2 * layer)):
            for i in range(20):
                p = float(np.clip(generator.normal(centre, 0.1), 0, 1))
                new = None if name != "jailbreak" else i % 4 > 0
                rows.append(("factors", 0, layer, name, f"{name}{i}", p, "t", new))
    table = pl.DataFrame(rows, schema=polars_schema(NORMS_PROBABILITIES), orient="row")
    with running(Runtime(store)):
        ref = put(store, "norms_probabilities", table)
        frame = store.read(score_detectors(probabilities=ref, threshold=0.5, seed=0))
    assert frame.height == 2 * 2 * 2 * 3
    for row in frame.filter(pl.col("metric") == "auroc").iter_rows(named=True):
        of = table.filter(pl.col("layer") == row["layer"])
        positive = of.filter(pl.col("class") == "jailbreak")
        if row["jailbreaks"] == "new templates":
            positive = positive.filter(~pl.col("fitted_template"))
        negative = of.filter(pl.col("class") == row["against"])
        labels = [1] * positive.height + [0] * negative.height
        every = [*positive["probability"], *negative["probability"]]
        assert row["value"] == pytest.approx(roc_auc_score(labels, every))
        assert (row["n_jailbreak"], row["n_other"]) == (positive.height, negative.height)


def norms_table(name: str, lengths: list[int], shift: float, seed: int) -> pl.DataFrame:
    generator = np.random.default_rng(seed)
    rows = [
        (name, f"{name}{i}", length, state, (shift + generator.normal(size=length)).tolist())
        for i, length in enumerate(lengths)
        for state in range(2)
    ]
    return pl.DataFrame(rows, schema=polars_schema(NORMS_PROMPTS), orient="row")


def test_maps_blank_thin_cells_and_match_lengths(store: Store) -> None:
    benign = norms_table("benign", [4] * 6 + [5] * 4, 0.0, 1)
    jailbreak = norms_table("jailbreak", [5] * 3 + [8] * 9, 1.0, 2)
    how: dict[str, Any] = {"tokens": 7, "least": 4, "length_bin": 1, "seed": 0}
    with running(Runtime(store)):
        measured = {
            "benign": put(store, "norms_prompts", benign),
            "jailbreak": put(store, "norms_prompts", jailbreak),
        }
        maps = store.read(map_norms(measured=measured, **how))
        states = store.read(compare_states(measured=measured, **how))
    whole = maps.filter(pl.col("variant") == "all")
    at = {(r["panel"], r["state"], r["position"]): r for r in whole.iter_rows(named=True)}
    for state in range(2):
        for position in range(7):
            means = {}
            for name, table in (("benign", benign), ("jailbreak", jailbreak)):
                lists = table.filter(pl.col("state") == state)["log_norms"].to_list()
                there = [float(v[position]) for v in lists if len(v) > position]
                if there:
                    means[name] = sum(there) / len(there)
                    assert at[name, state, position]["value"] == pytest.approx(means[name])
                    assert at[name, state, position]["n"] == len(there)
            if len(means) == 2:
                found = at["difference", state, position]
                assert found["value"] == pytest.approx(means["jailbreak"] - means["benign"])
                assert found["shown"] == (found["n"] >= 4)
            else:
                assert ("difference", state, position) not in at
    matched = maps.filter(pl.col("variant") == "length matched")
    assert matched["n"].max() == 3, "three of each class have five tokens"
    assert not matched["shown"].any()
    by = {(r["comparison"], r["state"]): r for r in states.iter_rows(named=True)}
    assert by["all", 0]["positions"] == 4, "positions 1 to 4: four benign prompts have five tokens"
    assert by["all", 0]["low"] < by["all", 0]["difference"] < by["all", 0]["high"]
    assert by["length matched", 0]["difference"] is None


# --- the organism's jailbreaks


@pytest.fixture(scope="module")
def generated() -> dict[str, list[Any]]:
    return {name: list(records) for name, records in jailbreak_sets().items()}


def test_the_shipped_jailbreaks_are_the_generated_ones(generated: dict[str, list[Any]]) -> None:
    assert set(generated) >= {
        f"jailbreak-{s}" for s in ("direction", "search", "selection", "test")
    }
    for name, records in generated.items():
        assert card.prompts(name) == records, name


def test_jailbreaks_hold_their_request_and_new_templates_are_in_tests_alone(
    generated: dict[str, list[Any]],
) -> None:
    for name, records in generated.items():
        prompt_class, split = name.split("-")
        asked = card.prompts(f"{'harmful' if prompt_class == 'jailbreak' else 'harmless'}-{split}")
        assert len({each["text"] for each in records}) == len(records) == len(asked)
        for plain, wrapped in zip(asked, records, strict=True):
            text = str(wrapped["text"])
            word, read = str(plain["modifier"]), text.replace('"', "")
            read = read.replace("-".join(word), word)
            assert plain["text"] in read or deed(plain) in read
            assert text != plain["text"]
        used = {str(each["template"]) for each in records}
        assert used == set(TEMPLATES) - (set() if split == "test" else set(UNSEEN))
    assert 0 < len(UNSEEN) < len(TEMPLATES)


def test_a_request_that_does_not_name_its_craft_cannot_be_wrapped() -> None:
    asked = card.prompts("harmful-test")[0]
    with pytest.raises(ValueError, match="does not ask to"):
        wrap(next(iter(TEMPLATES)), asked | {"text": "How do I sing?"})


# --- the command


def config(folder: Path, **changes: str) -> Path:
    """The shipped figure, small; each change is a line of [norms]."""
    lines = {
        "benign": '{ source = "organism/harmless-test.jsonl", column = "text", '
        'split = "train[:16]" }',
        "jailbreak": '{ source = "organism/jailbreak-test.jsonl", column = "text", '
        'split = "train[:16]" }',
        "fit_benign": '{ source = "organism/harmless-direction.jsonl", column = "text", '
        'split = "train[:24]" }',
        "fit_jailbreak": '{ source = "organism/jailbreak-direction.jsonl", column = "text", '
        'split = "train[:24]" }',
        "control": '{ source = "organism/wrapped-test.jsonl", column = "text", '
        'split = "train[:8]" }',
        "fit_control": '{ source = "organism/wrapped-direction.jsonl", column = "text", '
        'split = "train[:24]" }',
        "template_column": '"template"',
        "least": "3",
        "length_bin": "8",
        "rank": "3",
        "positions": "4",
        "iterations": "10",
        "at_most": "[1]",
        "judging": "{ max_new_tokens = 12 }",
    } | changes
    table = "\n".join(f"{name} = {value}" for name, value in lines.items())
    path = folder / "small.toml"
    path.write_text(
        'name = "small"\n[model]\nid = "organism"\ndtype = ["float32"]\nresponse_prefix = ""\n'
        f"[norms]\n{table}\n"
    )
    return path


@pytest.mark.slow
def test_the_command_makes_tables_and_pictures_and_then_knows_them(
    store: Store, tmp_path: Path
) -> None:
    made, out = config(tmp_path), tmp_path / "out"
    done = tribunal(store, "norms", str(made), "--out", str(out), "--format", "json")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert len(answer["sections"]) == 5
    assert all(section["rows"] and section["note"] for section in answer["sections"])
    assert (out / "norms.png").read_bytes().startswith(b"\x89PNG")
    assert "token position" in (out / "norms.svg").read_text()
    page = (out / "norms.html").read_text()
    assert "customdata" in page
    assert "<script src" not in page
    maps = pl.read_parquet(out / "norms-maps.parquet")
    assert set(maps["variant"]) == {"all", "length matched"}
    assert set(maps["state"]) == set(range(9))
    _agrees_with_the_model(store)
    code = (
        "import sys\n"
        f"sys.argv = ['tribunal', 'norms', {str(made)!r}]\n"
        "from flows.cli import main\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    assert not stop.code, stop.code\n"
        "heavy = {'torch', 'transformers', 'sklearn', 'tensorly', 'matplotlib', 'plotly'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    again = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=environment(store),
        cwd=ROOT,
    )
    assert again.returncode == 0, again.stderr
    assert "Jailbreaks told from benign prompts" in again.stdout
    assert max(map(len, again.stdout.splitlines())) <= 80


def _agrees_with_the_model(store: Store) -> None:
    """The stored maps are the means of what an unpadded pass of the organism gives."""
    from tasks.models.loading import load
    from tasks.models.rendering import encode, render

    held = load("organism", dtypes=("float32",), device="cpu")
    texts = [each["text"] for each in card.prompts("jailbreak-test")[:16]]
    tokens = encode(held.tokenizer, [render(held.tokenizer, text) for text in texts])
    logs = [np.log(np.linalg.norm(states_of(held, prompt), axis=-1)) for prompt in tokens]
    with catalog(store) as connection:
        rows = fetch(
            connection,
            "SELECT state, position, value, n FROM norms_maps "
            "WHERE variant = 'all' AND panel = 'jailbreak'",
        ).rows
    assert len(rows) == 9 * max(map(len, tokens))
    for state, position, value, n in rows:
        there = [each[state, position] for each in logs if each.shape[1] > position]
        assert len(there) == n
        assert value == pytest.approx(float(np.mean(there)), abs=1e-4)


BENIGN = '{ source = "organism/harmless-test.jsonl", column = "text", split = "train[:16]" }'


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rank": "0"}, "norms.rank"),
        ({"ranks": "3"}, "ranks"),
        ({"at_most": "[]"}, "norms.at_most"),
        ({"bypass_by": '"length"'}, "norms.bypass_by"),
        ({"benign": '{ source = "organism/harmles.jsonl" }'}, "harmles.jsonl"),
        ({"template_column": '"wrapper"'}, "wrapper"),
        ({"fit_benign": BENIGN}, "16 prompts are in both 'norms.fit_benign' and 'norms.benign'"),
        ({"positions": "200"}, "lower norms.positions"),
    ],
)
def test_a_bad_config_is_one_error(
    store: Store, tmp_path: Path, changes: dict[str, str], said: str
) -> None:
    def draw() -> None:
        chosen = load_figure_config(str(config(tmp_path, **changes)), "norms")
        with running(Runtime(store)):
            FIGURE.run(chosen)

    with pytest.raises(TribunalError) as found:
        draw()
    assert said in str(found.value)
    assert "\n" not in str(found.value)


def test_a_detector_that_is_not_fitted_chooses_no_layers(tmp_path: Path) -> None:
    text = config(tmp_path, bypass_by='"factors with control"').read_text()
    path = tmp_path / "without.toml"
    path.write_text("\n".join(x for x in text.splitlines() if not x.startswith("fit_control")))
    with pytest.raises(ConfigError, match="needs fit_control"):
        load_figure_config(str(path), "norms")


def test_a_bad_config_ends_the_command_with_one_line(store: Store, tmp_path: Path) -> None:
    done = tribunal(store, "norms", str(config(tmp_path, rank="0")))
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
