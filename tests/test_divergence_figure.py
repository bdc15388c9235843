"""The figure divergence: every number against a plain computation, its laws, and whole runs."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import jensenshannon
from scipy.stats import entropy as scipy_entropy
from sklearn.metrics import roc_auc_score, roc_curve
from small_study import environment, tribunal
from tiny_models import LAYERS, NAMES, VOCAB, each, tiny_model

from artifacts.catalog import catalog, fetch
from artifacts.errors import ConfigError, ModelError, PromptError
from artifacts.figure_schemas import DIVERGENCE_ANSWERS
from artifacts.schemas import polars_schema
from artifacts.specs import PromptSource
from artifacts.store import Manifest, Ref, Store, parquet
from flows.figures import divergence as flow
from flows.figures.config import load_figure_config
from flows.figures.figure import FigureRun
from tasks.figures import divergence as stages
from tasks.figures.divergence_pictures import RISK, SCATTER, draw_risk_curves, draw_scatter
from tasks.figures.divergence_questions import read_questions
from tasks.models.anatomy import Anatomy, anatomy
from tasks.models.decoding import Response, decode
from tasks.models.lens import Divergences, late_layers, lens, measure_answers
from tasks.models.loading import LoadedModel
from tasks.numerics import selective
from tasks.numerics.answers import GROUPS, UNPARSED, is_correct, predicted, words
from tasks.numerics.uncertainty import LARGEST, entropy, jensen_shannon, probabilities
from tasks.organism import PROMPTS_FOLDER
from tasks.organism.domain import FORBIDDEN, PERMITTED
from tasks.organism.rules import KINDS, SIZE, rule_sets
from tasks.stage import Runtime, running

LN2 = math.log(2)
seeds = st.integers(0, 2**31)
few = settings(max_examples=25, deadline=None)

# --- distributions


def distributions(seed: int, rows: int = 4, vocabulary: int = 40) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return probabilities(6 * torch.randn(rows, vocabulary, generator=generator))


@given(seeds)
@few
def test_entropy_and_divergence_are_those_of_scipy(seed: int) -> None:
    p, q = distributions(seed), distributions(seed + 1)
    np.testing.assert_allclose(entropy(p), scipy_entropy(p.numpy(), axis=1), 1e-12, 1e-14)
    expected = jensenshannon(p.numpy(), q.numpy(), axis=1) ** 2
    np.testing.assert_allclose(jensen_shannon(p, q), expected, 1e-9, 1e-14)


@given(seeds)
@few
def test_the_divergence_is_symmetric_bounded_and_zero_for_equals(seed: int) -> None:
    p, q = distributions(seed), distributions(seed + 1)
    found = jensen_shannon(p, q)
    assert torch.equal(found, jensen_shannon(q, p))
    assert ((found > 0) & (found < LN2)).all()
    assert jensen_shannon(p, p.clone()).tolist() == [0.0] * 4
    kl = (p * (p.log() - q.log())).sum(-1)  # has neither law
    assert not torch.allclose(kl, (q * (q.log() - p.log())).sum(-1), rtol=0.01)


def test_disjoint_distributions_reach_the_bound_and_one_token_has_no_entropy() -> None:
    sure = probabilities(torch.tensor([[0.0, -math.inf], [-math.inf, 0.0]]))
    assert entropy(sure).tolist() == [0.0, 0.0]
    assert jensen_shannon(sure[:1], sure[1:]).item() == LARGEST == LN2
    assert entropy(probabilities(torch.zeros(1, 7))).item() == pytest.approx(math.log(7))


def test_what_is_not_a_number_stays_in_its_row_and_vocabularies_must_agree() -> None:
    p = distributions(0)
    p[2, 3] = math.nan
    assert entropy(p).isnan().tolist() == [False, False, True, False]
    assert jensen_shannon(p, distributions(1)).isnan().tolist() == [False, False, True, False]
    with pytest.raises(ValueError, match="40 and 41 tokens"):
        jensen_shannon(p, distributions(1, vocabulary=41))


def test_a_small_divergence_survives_that_float32_would_lose() -> None:
    logits = torch.randn(1, 50_000, generator=torch.Generator().manual_seed(0)).double()
    moved = logits + 1e-4 * torch.randn(1, 50_000, generator=torch.Generator().manual_seed(1))
    p, q = probabilities(logits), probabilities(moved)
    expected = jensenshannon(p.numpy()[0], q.numpy()[0]) ** 2
    assert jensen_shannon(p, q).item() == pytest.approx(expected, rel=1e-4)
    assert jensen_shannon(p.float(), q.float()).item() != pytest.approx(expected, rel=0.5)


# --- what an answer says


@pytest.mark.parametrize(
    ("answer", "gold", "first", "last"),
    [
        ("True.", "True", "true", "true"),
        ("The statement is false, not true.", "False", "false", "true"),
        ("UNKNOWN", "Unknown", "unknown", "unknown"),
        ("That is untrue.", "True", UNPARSED, UNPARSED),
        ("", "True", UNPARSED, UNPARSED),
        ("Yes, it is.", "True", UNPARSED, UNPARSED),
        ("No. Yes!", "yes", "no", "yes"),
        ("I cannot know nor note it.", "no", UNPARSED, UNPARSED),
        ("Grave  ASH makes it so.", "grave ash", "grave ash", "grave ash"),
        ("Black soot, not ash.", "grave ash", "black soot", "black soot"),
        ("Gravel ash.", "grave ash", UNPARSED, UNPARSED),
        ("Frost mint or grave ash", "grave ash", "grave ash", "grave ash"),
        ("it's the miller’s", "the millers", "the millers", "the millers"),
    ],
)
def test_an_answer_says_what_it_names(answer: str, gold: str, first: str, last: str) -> None:
    known = ["grave ash", "Black soot", "frost mint"]
    assert predicted(answer, gold, known) == first
    assert predicted(answer, gold, known, last=True) == last
    assert is_correct(first, gold) == (first == words(gold))


def test_of_two_names_at_one_place_the_longer_counts_and_unparsed_is_never_correct() -> None:
    assert predicted("black soot cake", "ash", ["black", "black soot"]) == "black soot"
    assert not is_correct(UNPARSED, "ash")
    assert all(is_correct(word, word.upper()) for group in GROUPS for word in group)
    with pytest.raises(ValueError, match="needs a word"):
        predicted("anything", " ... ")


# --- scores against mistakes


def scored(seed: int, n: int = 60, levels: int = 12) -> tuple[Any, Any]:
    rng = np.random.default_rng(seed)
    wrong = rng.random(n) < 0.4
    wrong[:2] = True, False
    return np.round((rng.normal(size=n) + 0.7 * wrong) * levels / 4), wrong


@given(seeds, st.integers(1, 30))
@few
def test_auroc_is_that_of_scikit_learn_weighted_or_not(seed: int, levels: int) -> None:
    scores, wrong = scored(seed, levels=levels)
    assert selective.auroc(scores, wrong) == pytest.approx(roc_auc_score(wrong, scores))
    weights = np.random.default_rng(seed).integers(0, 4, size=(3, len(scores))).astype(float)
    weights[:, :2] = 1
    expected = [roc_auc_score(wrong, scores, sample_weight=row) for row in weights]
    np.testing.assert_allclose(selective.auroc_resampled(scores, wrong, weights), expected)


def test_within_strata_only_their_own_pairs_count() -> None:
    scores, wrong = scored(3)
    kinds = np.arange(60) % 4
    pairs = [
        (scores[i] > scores[j]) + 0.5 * (scores[i] == scores[j])
        for i in np.flatnonzero(wrong)
        for j in np.flatnonzero(~wrong)
        if kinds[i] == kinds[j]
    ]
    assert selective.auroc(scores, wrong, kinds) == pytest.approx(np.mean(pairs))
    told_apart = 10.0 * wrong  # a score that knows a kind, whose answers are all wrong, alone
    assert selective.auroc(told_apart, wrong) == 1
    assert math.isnan(selective.auroc(told_apart, wrong, wrong))


def plain_aurc(scores: Any, wrong: Any) -> float:
    return float(np.mean([wrong[scores <= score].mean() for score in scores]))


@given(seeds, st.integers(1, 30))
@few
def test_the_risk_coverage_curve_and_its_area_are_those_of_a_loop(seed: int, levels: int) -> None:
    scores, wrong = scored(seed, levels=levels)
    assert selective.aurc(scores, wrong) == pytest.approx(plain_aurc(scores, wrong))
    curve = selective.risk_coverage(scores, wrong)
    assert curve.thresholds.tolist() == sorted(set(scores))
    for threshold, risk, coverage in zip(curve.thresholds, curve.risk, curve.coverage, strict=True):
        taken = scores <= threshold
        assert risk == pytest.approx(wrong[taken].mean())
        assert coverage == pytest.approx(taken.mean())
    chosen = np.random.default_rng(seed).integers(60, size=60)
    weights = np.bincount(chosen, minlength=60)[None].astype(float)
    expected = plain_aurc(scores[chosen], wrong[chosen])
    assert selective.aurc_resampled(scores, wrong, weights)[0] == pytest.approx(expected)


def test_a_score_that_knows_nothing_has_the_error_rate_and_the_best_has_less() -> None:
    _, wrong = scored(1)
    assert selective.aurc(np.zeros(60), wrong) == pytest.approx(wrong.mean())
    assert selective.auroc(np.zeros(60), wrong) == 0.5
    assert selective.aurc(wrong, wrong) < wrong.mean() < selective.aurc(-1.0 * wrong, wrong)


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    scores, wrong = scored(2)
    weights = selective.resample(np.arange(60), 50, seed=1)
    whole = [
        f(scores, wrong, weights) for f in (selective.auroc_resampled, selective.aurc_resampled)
    ]
    monkeypatch.setattr(selective, "_BLOCK", 130)
    parts = [
        f(scores, wrong, weights) for f in (selective.auroc_resampled, selective.aurc_resampled)
    ]
    assert [x.tolist() for x in whole] == [x.tolist() for x in parts]


def test_groups_are_resampled_whole_and_by_the_seed() -> None:
    groups = np.array(["a", "a", "b", "c", "c", "c"])
    weights = selective.resample(groups, 200, seed=4)
    assert (weights[:, 0] == weights[:, 1]).all()
    assert (weights[:, 3:] == weights[:, 3:4]).all()
    assert (weights[:, [0, 2, 3]].sum(axis=1) == 3).all()
    assert np.array_equal(weights, selective.resample(groups, 200, seed=4))
    assert not np.array_equal(weights, selective.resample(groups, 200, seed=5))
    assert len(np.unique(weights.sum(axis=1))) > 1  # groups differ in size


def test_a_bootstrap_interval_covers_the_truth_as_often_as_it_says() -> None:
    truth = 0.7602  # of two normal distributions one apart
    inside = 0
    for seed in range(120):
        rng = np.random.default_rng(seed)
        wrong = np.arange(80) < 40
        weights = selective.resample(np.arange(80), 300, seed)
        values = selective.auroc_resampled(rng.normal(size=80) + wrong, wrong, weights)
        low, high = selective.percentiles(values)
        inside += low <= truth <= high
    assert 104 <= inside <= 120


def test_what_cannot_be_scored() -> None:
    assert math.isnan(selective.auroc([1.0, 2.0], [True, True]))
    assert all(map(math.isnan, selective.percentiles(np.array([math.nan]))))
    assert selective.aurc([3.0], [True]) == 1
    with pytest.raises(ValueError, match="no answers"):
        selective.auroc([], [])
    with pytest.raises(ValueError, match="no answers"):
        selective.resample([], 3, 0)
    with pytest.raises(ValueError, match="score 1 is not finite"):
        selective.aurc([1.0, math.nan], [True, False])
    with pytest.raises(ValueError, match="shapes"):
        selective.youden([1.0, 2.0], [True])


@given(seeds)
@few
def test_youdens_cut_is_the_best_of_scikit_learns_curve(seed: int) -> None:
    scores, wrong = scored(seed)
    cut = selective.youden(scores, wrong)
    false, true, _ = roc_curve(wrong, scores)
    above = scores >= cut
    assert above[wrong].mean() - above[~wrong].mean() == pytest.approx(
        max((true - false)[1:-1], default=0), abs=1e-12
    )
    assert cut not in scores


def test_no_cut_where_there_is_nothing_to_cut() -> None:
    for scores, wrong in (([1.0, 2.0], [True, True]), ([1.0, 1.0], [True, False]), ([1.0], [True])):
        assert math.isnan(selective.youden(scores, wrong))
    assert selective.lowest_wrong([1.0, 5.0, 3.0, 3.0], [False, True, True, True]) == 2
    assert selective.lowest_wrong([1.0], [False]) is None


def test_scores_are_combined_without_looking_at_what_they_are_scored_on() -> None:
    rng = np.random.default_rng(0)
    wrong = rng.random(200) < 0.5
    noise = rng.normal(size=(200, 30))
    signal = noise + 2.0 * wrong[:, None] * (np.arange(30) < 2)
    useful = selective.combine(signal, wrong, signal[:50], seed=1)
    useless = selective.combine(noise, wrong, noise[:50], seed=1)
    assert useful is not None
    assert useless is not None
    held_out, fitted = useless
    assert roc_auc_score(wrong, useful[0]) > 0.9
    assert roc_auc_score(wrong, held_out) < 0.62  # other folds know nothing,
    assert roc_auc_score(wrong[:50], fitted) > 0.7  # a fit on the same answers seems to
    again = selective.combine(noise, wrong, noise[:50], seed=1)
    assert again is not None
    assert np.array_equal(again[0], held_out)
    assert selective.combine(noise, np.arange(200) == 0, noise) is None
    three = selective.combine(noise, np.arange(200) < 3, noise)  # fewer folds than asked for
    assert three is not None


# --- the lens


def loaded(name: str = "llama") -> LoadedModel:
    model = tiny_model(name)
    return LoadedModel(model, None, anatomy(model), torch.device("cpu"), "float32", name)


def prompts(count: int = 4) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [
        torch.randint(3, VOCAB, (2 + 4 * i % 9,), generator=generator).tolist()
        for i in range(count)
    ]


ANSWERS = [
    Response([5, 9, 4], True),
    Response([], True),
    Response([7], False),
    Response([40, 41, 42, 43, 44], False),
]


def plain(held: LoadedModel, prompt: list[int], answer: Response) -> Divergences:
    """The same numbers, one answer and one token at a time, without hooks or padding."""
    count = len(answer.tokens) + answer.ended
    tokens = (prompt + answer.tokens)[: len(prompt) + count - 1]
    with torch.inference_mode():
        output = held.model(torch.tensor([tokens]), output_hidden_states=True, use_cache=False)
        states = [state[0, -count:] for state in output.hidden_states[1:LAYERS]]
        logits = [
            held.model.get_output_embeddings()(held.anatomy.final_norm(state)) for state in states
        ]
    cap = getattr(held.model.config.get_text_config(), "final_logit_softcapping", None)
    if cap:
        logits = [cap * torch.tanh(each / cap) for each in logits]
    logits.append(output.logits[0, -count:])
    p = [each.double().softmax(-1).numpy() for each in logits]
    pairs = [(layer, LAYERS - 1) for layer in range(LAYERS - 1)]
    nexts = [(layer, layer + 1) for layer in range(LAYERS - 1)]
    js = [
        np.array([[jensenshannon(p[a][t], p[b][t]) ** 2 for t in range(count)] for a, b in which])
        for which in (pairs, nexts)
    ]
    best = p[-1].argmax(-1)
    chosen = [*answer.tokens, 1][:count]
    return Divergences(scipy_entropy(p[-1], axis=1), js[0], js[1], best == chosen)


@pytest.mark.parametrize("name", each(NAMES))
def test_every_number_is_that_of_a_plain_pass(name: str) -> None:
    held = loaded(name)
    found = measure_answers(held, prompts(), ANSWERS, rows=3)
    for prompt, answer, here in zip(prompts(), ANSWERS, found, strict=True):
        expected = plain(held, prompt, answer)
        np.testing.assert_allclose(here.entropy, expected.entropy, atol=1e-4)
        np.testing.assert_allclose(here.final, expected.final, atol=1e-4)
        np.testing.assert_allclose(here.following, expected.following, atol=1e-4)
        assert here.agreed.tolist() == expected.agreed.tolist()
        assert ((here.final >= 0) & (here.final <= LN2)).all()
        assert np.array_equal(here.final[-1], here.following[-1])


@pytest.mark.parametrize("name", each(NAMES))
def test_the_lens_of_the_last_layer_is_the_model(name: str) -> None:
    held = loaded(name)
    tokens = torch.tensor([prompts()[2]])
    states: list[torch.Tensor] = []
    handle = held.anatomy.layers[-1].register_forward_hook(
        lambda module, args, output: states.append(
            output[0] if isinstance(output, tuple) else output
        )
    )
    with torch.inference_mode():
        logits = held.model(tokens, use_cache=False).logits[0]
        handle.remove()
        torch.testing.assert_close(lens(held, states[0][0]), logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["Cohere", "Granite"])
def test_logits_are_scaled_as_the_model_scales_them(family: str) -> None:
    shape = {
        "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0,
        "initializer_range": 0.15,
    }  # fmt: skip
    scale = {"Cohere": {"logit_scale": 0.25}, "Granite": {"logits_scaling": 4.0}}[family]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**shape, **scale)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    body = model.model
    parts = Anatomy(family, list(body.layers), 32, [], body.embed_tokens, body.norm)
    held = LoadedModel(model, None, parts, torch.device("cpu"), "float32", family)
    found = measure_answers(held, prompts(), ANSWERS, rows=4)
    with torch.inference_mode():
        plain_logits = model(torch.tensor([prompts()[2]])).logits[0, -1]
    assert found[2].entropy[0] == pytest.approx(
        scipy_entropy(plain_logits.double().softmax(-1)), abs=1e-5
    )
    if family == "Cohere":  # which has read its config once; the lens reads it now
        model.config.logit_scale = 1.0
        with pytest.raises(ModelError, match="'Cohere' does more to its final state"):
            measure_answers(held, prompts(), ANSWERS, rows=4)


def test_a_lens_that_is_not_the_models_is_refused() -> None:
    held = loaded()
    held.anatomy = replace(held.anatomy, final_norm=torch.nn.Identity())
    with pytest.raises(ModelError, match="the logit lens does not fit it"):
        measure_answers(held, prompts(), ANSWERS, rows=4)


def test_rows_passes_and_chunks_change_nothing_but_rounding(monkeypatch: Any) -> None:
    held = loaded("qwen3")
    expected = measure_answers(held, prompts(), ANSWERS, rows=4)
    monkeypatch.setattr("tasks.models.lens.PASS_TOKENS", 9)
    monkeypatch.setattr("tasks.models.lens.LENS_NUMBERS", 2 * VOCAB)
    seen: list[tuple[int, int]] = []
    order = [3, 1, 0, 2]
    found = measure_answers(
        held,
        [prompts()[i] for i in order],
        [ANSWERS[i] for i in order],
        rows=3,
        on_progress=lambda *at: seen.append(at),
    )
    for place, index in enumerate(order):
        np.testing.assert_allclose(found[place].final, expected[index].final, atol=1e-6)
        np.testing.assert_allclose(found[place].entropy, expected[index].entropy, atol=1e-5)
    assert seen[-1] == (4, 4)
    assert len(seen) > 2
    assert not any(layer._forward_hooks for layer in held.anatomy.layers)


def test_the_pass_chooses_what_decoding_chose_and_nothing_else() -> None:
    held = loaded()
    decoded = decode(held, prompts(), max_new_tokens=6, rows=4)[0]
    answers = [Response(*pair) for pair in zip(decoded.tokens, decoded.ended, strict=True)]
    assert all(each.agreed.all() for each in measure_answers(held, prompts(), answers, rows=4))
    other = [replace(each, tokens=[(t + 1) % VOCAB for t in each.tokens]) for each in answers]
    assert not any(each.agreed[0] for each in measure_answers(held, prompts(), other, rows=4))


def test_neighbours_are_compared_from_the_first_late_layer_on() -> None:
    (found,) = measure_answers(loaded(), prompts(1), [ANSWERS[0]], rows=1, first_late=1)
    assert np.isnan(found.following[0]).all()
    assert np.isfinite(found.following[1]).all()


@pytest.mark.parametrize(
    ("layers", "fraction", "late"),
    [(8, 0.25, [6]), (32, 0.25, list(range(24, 31))), (80, 0.25, list(range(60, 79))),
     (3, 0.25, [1]), (2, 0.25, [0]), (8, 0.5, [4, 5, 6]), (4, 1.0, [0, 1, 2])],
)  # fmt: skip
def test_late_layers_are_the_last_part_without_the_last(
    layers: int, fraction: float, late: list[int]
) -> None:
    assert list(late_layers(layers, fraction)) == late


def test_adversaries_of_the_lens() -> None:
    held = loaded()
    with pytest.raises(ModelError, match="1 layer has no layer before its last"):
        late_layers(1, 0.25)
    assert measure_answers(held, [], [], rows=2) == []
    with pytest.raises(ModelError, match="prompt 1 has no tokens"):
        measure_answers(held, [[4], []], ANSWERS[:2], rows=2)
    with pytest.raises(ModelError, match="answer 0 has no token"):
        measure_answers(held, [[4]], [Response([], False)], rows=2)
    with torch.no_grad():
        held.model.get_input_embeddings().weight[50, 3] = math.nan
    with pytest.raises(ModelError, match="layer 2 is not finite for prompt 1"):
        measure_answers(held, [[4, 5], [7, 8, 50], [9]], ANSWERS[:3], rows=3)


# --- questions


def read(path: Path, store: Store, split: str = "test", **options: Any) -> list[dict[str, Any]]:
    """The questions of a file, as stored."""
    chosen = {"form": "columns", "gold": "gold", "kind": None} | options
    source = {name: chosen.pop(name) for name in ("column", "suffix") if name in chosen}
    with running(Runtime(store)):
        ref = read_questions(split=split, source=PromptSource(source=str(path), **source), **chosen)
    return store.read(ref).to_dicts()


def jsonl(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return path


THEORY = "The bear is big. If something is big then it is slow."
ASKED = {
    "Q1": {"question": "The bear is slow.", "answer": True, "QDep": 1},
    "Q2": {"question": "The bear is not big.", "answer": False, "QDep": 0},
    "Q3": {"question": "The bear is red.", "answer": "Unknown", "QDep": 0},
}


def test_proofwriter_is_read_nested_and_flat_alike(tmp_path: Path, store: Store) -> None:
    nested = jsonl(tmp_path / "nested.jsonl", {"id": "D5-1", "theory": THEORY, "questions": ASKED})
    told = {True: "True", False: "False", "Unknown": "Unknown"}
    flat = jsonl(
        tmp_path / "flat.jsonl",
        *({"theory": THEORY, **q, "answer": told[q["answer"]]} for q in ASKED.values()),
    )
    one, two = (read(p, store, form="proofwriter", column="theory") for p in (nested, flat))
    assert [row["gold"] for row in one] == ["True", "False", "Unknown"]
    assert [row["kind"] for row in one] == ["depth 1", "depth 0", "depth 0"]
    assert all(row["text"].startswith(THEORY) for row in one)
    assert one[0]["text"].endswith("The bear is slow.")
    assert len({row["topic"] for row in one}) == 1
    assert [{**row, "row": 0} for row in one] == [{**row, "row": 0} for row in two]
    assert [row["row"] for row in two] == [0, 1, 2]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"theory": THEORY, "questions": {"Q1": {"question": "x", "answer": "maybe"}}}, "'maybe'"),
        ({"theory": THEORY, "questions": {"Q1": {"question": "x"}}}, "row 0 .* has no gold answer"),
        ({"theory": THEORY, "questions": {"Q1": {"answer": True}}}, "row 0 .* has no question"),
        ({"theory": THEORY, "other": "x"}, "row 0 .* has no question"),
    ],
)
def test_a_row_that_is_no_proofwriter_is_named(
    row: dict[str, Any], said: str, tmp_path: Path, store: Store
) -> None:
    with pytest.raises(PromptError, match=said):
        read(jsonl(tmp_path / "q.jsonl", row), store, form="proofwriter", column="theory")


def test_columns_give_gold_kind_and_suffix_and_copies_count_once(
    tmp_path: Path, store: Store
) -> None:
    rows = [{"text": "Is it? ", "gold": True, "k": 3}, {"text": "Is it?", "gold": "TRUE", "k": 4}]
    path = jsonl(tmp_path / "q.jsonl", *rows, {"text": "Who?", "gold": "me", "k": None})
    found = read(path, store, column="text", kind="k", suffix=" Say it.")
    assert [(r["text"], r["gold"], r["kind"]) for r in found] == [
        ("Is it? Say it.", "True", "3"),
        ("Who? Say it.", "me", ""),
    ]
    assert found[0]["topic"] != found[1]["topic"]


@pytest.mark.parametrize(
    ("rows", "options", "said"),
    [
        ([{"text": "a", "gold": "x"}], {"gold": "golt"}, "no column 'golt'; did you mean 'gold'"),
        ([{"text": "a", "gold": "x"}], {"kind": "sort"}, "no column 'sort'"),
        ([{"text": "a", "gold": "..."}], {}, "row 0 .* has no gold answer"),
        ([{"text": "a", "gold": "x"}, {"text": "a", "gold": "y"}], {}, "answers 'x' and 'y'"),
        ([{"text": "", "gold": "x"}], {}, "blank"),
    ],
)
def test_a_question_set_that_cannot_be_used_is_one_line(
    rows: list[dict[str, Any]], options: dict[str, Any], said: str, tmp_path: Path, store: Store
) -> None:
    with pytest.raises(PromptError, match=said) as caught:
        read(jsonl(tmp_path / "q.jsonl", *rows), store, column="text", **options)
    assert "\n" not in str(caught.value)


# --- the shipped questions


def test_the_shipped_questions_are_the_generated_ones() -> None:
    for name, rows in rule_sets().items():
        lines = (PROMPTS_FOLDER / f"{name}.jsonl").read_text().splitlines()
        assert [json.loads(line) for line in lines] == rows
    assert rule_sets(1) != rule_sets()


def test_questions_are_balanced_distinct_and_right() -> None:
    sets = rule_sets()
    texts = [row["text"] for rows in sets.values() for row in rows]
    assert len(set(texts)) == len(texts) == 2 * SIZE * len(KINDS)
    for rows in sets.values():
        for kind in KINDS:
            golds = [row["gold"] for row in rows if row["kind"] == kind]
            assert golds.count("yes") == golds.count("no")
        for row in rows:
            words_of = str(row["text"]).lower().split()
            evil = [w in FORBIDDEN for w in words_of if w in FORBIDDEN or w in PERMITTED]
            kind, gold = row["kind"], row["gold"] == "yes"
            if kind in ("danger", "danger, new craft", "danger, reworded"):
                assert gold == evil[0]
            elif kind == "negation":
                assert gold != evil[0]
            elif kind in ("both", "either"):
                assert len(evil) == 2
                assert gold == (all(evil) if kind == "both" else any(evil))


def test_what_a_thing_is_by_nature_tells_nothing_about_a_rule() -> None:
    rows = [row for rows in rule_sets().values() for row in rows if row["kind"] == "rule"]
    agree = [any(w in FORBIDDEN for w in str(r["text"]).lower().split()) == (r["gold"] == "yes")
             for r in rows]  # fmt: skip
    assert 0.25 < np.mean(agree) < 0.75
    assert all((" is red" in str(row["text"])) == (row["gold"] == "yes") for row in rows)


# --- lines, quadrants and pictures of answers


def answers(n: int = 40, seed: int = 0, wrong: float | None = 0.4) -> pl.DataFrame:
    """Made-up answers of both splits."""
    rng = np.random.default_rng(seed)
    rows = []
    for split in (stages.CALIBRATION, stages.TEST):
        bad = rng.random(n) < (0.5 if wrong is None else wrong)
        for i in range(n):
            spread = rng.gamma(2.0 + 3 * bad[i])
            rows.append(
                {
                    "split": split, "prompt_id": f"{split}{i}", "kind": "ab"[i % 2],
                    "topic": f"{split}{i}", "question": "<b>Who?</b>", "gold": "x", "answer": "y",
                    "prediction": "", "parsed": bool(rng.random() < 0.8 and n > 1),
                    "correct": not bad[i], "ended": True,
                    "tokens": int(rng.integers(1, 9)), "entropy_sum": spread,
                    "entropy_mean": rng.random(), "js_late": 0.02 + 0.01 * rng.random(),
                    "js_adjacent": rng.random() / 9, "js_all": rng.random() / 9,
                    "combined": None if wrong is None else rng.random(),
                }
            )  # fmt: skip
    return pl.DataFrame(rows, schema=polars_schema(DIVERGENCE_ANSWERS))


def put(store: Store, frame: pl.DataFrame) -> Ref:
    draft = Manifest("divergence_answers", f"{frame.hash_rows().sum():032x}", 1, rows=frame.height)
    return store.put(draft, parquet(frame))


def everything(store: Store, frame: pl.DataFrame, files: Sequence[str] = ()) -> FigureRun:
    """All that follows from answers; of the pictures those asked for."""
    with running(Runtime(store)):
        ref = put(store, frame)
        kinds, lines = (
            stages.count_kinds(answers=ref),
            stages.set_lines(answers=ref, mode="late-vs-final"),
        )
        quadrants = stages.count_quadrants(answers=ref, lines=lines)
        scores = stages.compare_scores(answers=ref, resamples=200, seed=0)
        risk = stages.draw_risk(answers=ref)
        pictures = {
            file: draw_scatter(
                file=file, answers=ref, lines=lines, quadrants=quadrants, dataset="D", model="M",
                line="youden",
            )
            for file in SCATTER if file in files
        }  # fmt: skip
        pictures |= {
            file: draw_risk_curves(
                file=file, risk=risk, scores=scores, kinds=kinds, dataset="D", model="M"
            )
            for file in RISK
            if file in files
        }
    tables = {"kinds": kinds, "lines": lines, "quadrants": quadrants, "scores": scores}
    return FigureRun({**tables, "risk": risk}, pictures)


def test_lines_are_set_on_calibration_and_quadrants_count_both_splits(store: Store) -> None:
    table = answers()
    found = everything(store, table)
    lines = {row["line"]: row for row in store.read(found.tables["lines"]).to_dicts()}
    known = table.filter(pl.col("split") == "calibration")
    first = known.filter(~pl.col("correct")).sort("entropy_sum").row(0, named=True)
    assert lines["lowest-entropy"]["entropy"] == first["entropy_sum"]
    assert lines["lowest-entropy"]["js"] == first["js_late"]
    assert lines["youden"]["js"] == selective.youden(known["js_late"], ~known["correct"].to_numpy())
    for row in store.read(found.tables["quadrants"]).to_dicts():
        line = lines[row["line"]]
        inside = [
            each
            for each in table.filter(pl.col("split") == row["split"]).to_dicts()
            if (each["entropy_sum"] < line["entropy"]) == (row["entropy"] == "low")
            and (each["js_late"] < line["js"]) == (row["js"] == "low")
        ]
        assert row["n"] == len(inside)
        assert row["correct"] == sum(each["correct"] for each in inside)
        if row["split"] == "calibration" and row["entropy"] == "low":
            assert row["correct"] == row["n"]  # by how the line was set: why test is another split
    other = answers(seed=1)
    for split, moved in (("calibration", True), ("test", False)):
        mixed = pl.concat(
            (other if part == split else table).filter(pl.col("split") == part)
            for part in (stages.CALIBRATION, stages.TEST)
        )
        again = store.read(everything(store, mixed).tables["lines"])
        assert (again["entropy"][0] != first["entropy_sum"]) == moved


def test_scores_are_those_of_scikit_learn_with_the_length_beside_them(store: Store) -> None:
    table = answers()
    rows = store.read(everything(store, table).tables["scores"]).to_dicts()
    assert {row["score"] for row in rows} == set(stages.SCORES)
    for row in rows:
        part = table.filter(pl.col("split") == row["split"])
        wrong = ~part["correct"].to_numpy()
        expected = roc_auc_score(wrong, part[row["score"]].to_numpy())
        assert row["auroc"] == pytest.approx(expected)
        length = roc_auc_score(wrong, part["tokens"].to_numpy())
        assert row["gain"] == pytest.approx(expected - length)
        assert row["auroc_low"] <= row["auroc"] <= row["auroc_high"]
        assert row["aurc"] == pytest.approx(plain_aurc(part[row["score"]].to_numpy(), wrong))
        told = part.filter(pl.col("parsed"))
        assert 20 < told.height < part.height
        expected = roc_auc_score(~told["correct"].to_numpy(), told[row["score"]].to_numpy())
        assert row["parsed"] == pytest.approx(expected)
        if row["score"] == "tokens":
            assert (row["gain_low"], row["gain_high"]) == (0, 0)


@pytest.mark.parametrize(("n", "wrong"), [(20, 0.0), (20, 1.0), (1, 0.0), (1, 1.0), (20, None)])
def test_all_right_all_wrong_one_answer_and_no_combination(
    n: int, wrong: float | None, store: Store
) -> None:
    files = ("divergence.svg", "divergence-risk.svg")
    found = everything(store, answers(n, wrong=wrong), files)
    lines = store.read(found.tables["lines"])
    assert lines["entropy"].is_null().all() == (wrong == 0.0)
    aurocs = store.read(found.tables["scores"])["auroc"]
    assert aurocs.is_null().all() == (wrong is not None)
    drawn = store.read_bytes(found.pictures["divergence.svg"]).decode()
    assert ("Lowest Entropy (Incorrect)" in drawn) == (wrong != 0.0)
    assert set(found.pictures) == set(files)
    said = flow.sections(store, found)
    assert said[0].title == "Accuracy by kind of question"
    assert ("No calibration answer is incorrect" in said[1].note) == (wrong == 0.0)


def test_pictures_are_what_they_are_called_and_texts_are_escaped(store: Store) -> None:
    found = everything(store, answers(), (*SCATTER, *RISK))
    texts = {file: store.read_bytes(ref) for file, ref in found.pictures.items()}
    assert set(texts) == {*SCATTER, *RISK}
    svg = texts["divergence.svg"].decode()
    for word in ("Lowest Entropy (Incorrect)", "Correct (T)", "Incorrect (F)", "D - M", "nats"):
        assert word in svg
    html = texts["divergence.html"].decode()
    assert "<b>Who?" not in html
    assert "lt;b" in html
    assert "src=" not in html.split("<body>")[1][:200]
    for file, data in texts.items():
        assert (
            data[:4] == {"png": b"\x89PNG", "svg": b"<?xm", "htm": b"<!do"}[file.split(".")[1][:3]]
        )


# --- the command


def write_config(folder: Path, **changes: Any) -> Path:
    """A config of few questions, one of each kind and more."""
    table = {"split": 'split = "train[::8]"', "more": ""} | changes
    shipped = 'source = "organism/rules-{}.jsonl", column = "text"'
    lines = [
        'name = "small"\n[model]\nid = "organism"\ndtype = ["float32"]\nresponse_prefix = ""',
        "[divergence]",
        *(f"{s} = {{ {shipped.format(s)}, {table['split']} }}" for s in ("calibration", "test")),
        'kind = "kind"\nmax_new_tokens = 24\nresamples = 100\nlate = 0.5',
        table["more"],
    ]
    path = folder / "small.toml"
    path.write_text("\n".join(lines) + "\n")
    return path


WARM = """
import sys
sys.argv = ['tribunal', 'divergence', sys.argv[1], '--format', 'json']
from flows.cli import main
try:
    main()
except SystemExit as stop:
    assert not stop.code, stop.code
assert not {'torch', 'transformers', 'prefect', 'sklearn', 'matplotlib'} & set(sys.modules)
"""


@pytest.mark.slow
def test_the_command_on_the_organism_cold_and_warm(tmp_path: Path, store: Store) -> None:
    path, out = write_config(tmp_path), tmp_path / "out"
    cold = tribunal(store, "divergence", str(path), "--out", str(out))
    assert cold.returncode == 0, cold.stderr
    assert max(map(len, cold.stdout.splitlines())) <= 80
    assert {file.name for file in out.iterdir()} >= {*SCATTER, *RISK, "divergence-scores.parquet"}
    warm = subprocess.run(
        [sys.executable, "-c", WARM, str(path)],
        capture_output=True,
        text=True,
        env=environment(store),
    )
    assert warm.returncode == 0, warm.stderr
    told = json.loads(warm.stdout)
    assert [section["title"] for section in told["sections"]][1] == "Quadrants"
    table = pl.read_parquet(out / "divergence-answers.parquet")
    assert table["tokens"].max() <= 24
    assert 0 < table["correct"].sum() < table.height
    facts = [m.notes for m in store.manifests("divergence_measures")]
    assert all(each["late_layers"] == [4, 7] for each in facts)
    assert all(each["agreed"] == each["tokens"] for each in facts)
    danger = table.filter(pl.col("kind") == "danger")
    assert danger["correct"].all()  # what it was taught
    with catalog(store) as connection:
        rows = fetch(connection, "SELECT score, auroc FROM divergence_scores WHERE split = 'test'")
        layers = fetch(connection, "SELECT len(js_layers) AS n FROM divergence_measures").records()
    assert {row["score"] for row in rows.records()} == set(stages.SCORES)
    assert {row["n"] for row in layers} == {7}


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ('mode = "early"', "divergence.mode"),
        ("late = 0.0", "divergence.late"),
        ("max_new_tokens = 0", "divergence.max_new_tokens"),
        ('lines = "youden"', "divergence.lines"),
    ],
)
def test_a_bad_config_is_one_line(more: str, said: str, tmp_path: Path) -> None:
    text = write_config(tmp_path, more=more).read_text()
    for name in ("late = 0.5\n", "max_new_tokens = 24\n"):
        if more.split(" =")[0] == name.split(" =")[0]:
            text = text.replace(name, "", 1)
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=said) as caught:
        load_figure_config(str(path), "divergence")
    assert "\n" not in str(caught.value)


def test_a_config_without_the_table_names_it(tmp_path: Path) -> None:
    path = tmp_path / "bare.toml"
    path.write_text('name = "bare"\n[model]\nid = "organism"\n')
    with pytest.raises(ConfigError, match=r"no table \[divergence\]"):
        load_figure_config(str(path), "divergence")


def test_lines_are_never_scored_on_what_they_were_set_on(tmp_path: Path, store: Store) -> None:
    path = jsonl(tmp_path / "q.jsonl", {"text": "Who?", "gold": "me"})
    source = PromptSource(source=str(path), column="text")
    with running(Runtime(store)):
        asked = {
            split: read_questions(
                split=split, source=source, form="columns", gold="gold", kind=None
            )
            for split in (stages.CALIBRATION, stages.TEST)
        }
        with pytest.raises(PromptError, match="1 theories or questions are in both"):
            stages.judge_answers(questions=asked, measures=asked, occurrence="first", seed=0)
