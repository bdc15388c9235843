"""Safety heads: every number against a plain float64 computation, one prompt and head at a time."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import scipy.linalg
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_study import environment
from test_capture import loaded
from tiny_models import MIXTURES, NAMES, VOCAB, each, tiny_model

from artifacts.catalog import catalog, fetch
from artifacts.errors import ConfigError, ModelError, PromptError
from artifacts.figure_schemas import FIGURES
from artifacts.store import Store
from flows.figures import heads as figure
from flows.figures.config import load_figure_config
from tasks.models.decoding import decode
from tasks.models.head_ablation import Head, ablated, head_layers, scale_table
from tasks.models.head_effects import HeadProbe, answers_without
from tasks.numerics import subspaces
from tasks.numerics.rate_differences import bootstrap_spearman, compare_rates
from tasks.stage import Runtime, running

ROOT = Path(__file__).parent.parent
LENGTHS = (3, 8, 5)
Group = Collection[Head]


def prompts(lengths: Sequence[int] = LENGTHS) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(3, VOCAB, (length,), generator=generator).tolist() for length in lengths]


# --- the plain computation: no batches, no padding, no hooks of ours, float64


def plain_attention(silent: dict[int, list[int]]) -> Any:
    """Attention head by head; a silent head averages what it sees and never uses its query."""

    def attend(module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
        _, heads, count, size = query.shape
        out = torch.zeros(count, heads, value.shape[-1], dtype=value.dtype)
        scaling = kwargs.get("scaling") or size**-0.5
        sinks = getattr(module, "sinks", None)
        seen = torch.ones(count, count, dtype=torch.bool).tril()
        for head in range(heads):
            shared = head * key.shape[1] // heads
            scores = query[0, head] @ key[0, shared].T * scaling
            if kwargs.get("softcap"):
                scores = torch.tanh(scores / kwargs["softcap"]) * kwargs["softcap"]
            if head in silent.get(module.layer_idx, []):
                scores = torch.zeros_like(scores)
            scores = scores.masked_fill(~seen, -torch.inf)
            if sinks is not None:
                scores = torch.cat([scores, sinks[head].expand(count, 1)], 1)
            out[:, head] = torch.softmax(scores, 1)[:, :count] @ value[0, shared]
        return out[None], None

    return attend


@contextmanager
def plainly_uniform(model: Any, name: str, group: Group) -> Iterator[None]:
    silent: dict[int, list[int]] = {}
    for head in group:
        silent.setdefault(head.layer, []).append(head.head)
    attend = plain_attention(silent)
    with pytest.MonkeyPatch.context() as patch:
        if name == "gptj":
            for block in model.transformer.h:
                patch.setattr(
                    block.attn,
                    "_attn",
                    lambda q, k, v, mask, own=block.attn: (
                        attend(own, q, k, v, mask)[0].transpose(1, 2),
                        None,
                    ),
                )
        elif name.startswith("falcon"):

            def fused(q: Any, k: Any, v: Any, **_: Any) -> Any:
                return attend(current[0], q, k, v, None)[0].transpose(1, 2)

            current: list[Any] = [None]
            for block in model.transformer.h:
                block.self_attention.register_forward_pre_hook(
                    lambda module, args: current.__setitem__(0, module)
                )
            patch.setattr(torch.nn.functional, "scaled_dot_product_attention", fused)
        else:
            for config in (model.config, model.config.get_text_config()):
                config._attn_implementation = "eager"
            for layer in head_layers(loaded_as(model)):
                source = sys.modules[type(layer.attention).__module__]
                patch.setattr(source, "eager_attention_forward", attend)
        yield


def loaded_as(model: Any) -> Any:
    held = loaded()
    from tasks.models.anatomy import anatomy

    held.model, held.anatomy = model, anatomy(model)
    return held


def without_columns(model: Any, group: Group, epsilon: float) -> Any:
    """The model with the heads' columns of the output projection scaled: SC by its weights."""
    model = copy.deepcopy(model)
    of = {layer.layer: layer for layer in head_layers(loaded_as(model))}
    with torch.no_grad():
        for head in group:
            size = of[head.layer].writer.weight.shape[1] // of[head.layer].n_heads
            columns = slice(head.head * size, (head.head + 1) * size)
            of[head.layer].writer.weight[:, columns] *= epsilon
    return model


def plain_pass(model: Any, prompt: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Log probabilities [vocabulary] and last normed state [d] of one prompt alone."""
    kept: list[torch.Tensor] = []
    norm = loaded_as(model).anatomy.final_norm
    handle = norm.register_forward_hook(lambda module, args, output: kept.append(output[0, -1]))
    with torch.no_grad():
        logits = model(torch.tensor([list(prompt)]), use_cache=False).logits[0, -1]
    handle.remove()
    return torch.log_softmax(logits.double(), 0), kept[0].double()


def reference(name: str, how: str, group: Group) -> tuple[list[torch.Tensor], np.ndarray]:
    """Log probabilities and states of every prompt with the group silenced entirely."""
    model = tiny_model(name).double()
    if name in MIXTURES:
        model.set_experts_implementation("eager")  # the grouped product knows no float64
    if how == "sc":
        model = without_columns(model, group, 0.0)
        found = [plain_pass(model, prompt) for prompt in prompts()]
    else:
        with plainly_uniform(model, name, group):
            found = [plain_pass(model, prompt) for prompt in prompts()]
    return [log for log, _ in found], np.stack([state.numpy() for _, state in found])


def plain_kl(base: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> np.ndarray:
    return np.array([float((p.exp() * (p - q)).sum()) for p, q in zip(base, other, strict=True)])


def plain_angle(base: np.ndarray, other: np.ndarray, r: int, side: str = "left") -> float:
    spaces = []
    for states in (base, other):
        u, _, v = np.linalg.svd(states.astype(np.float64), full_matrices=False)
        spaces.append(u[:, :r] if side == "left" else v[:r].T)
    return float(np.degrees(scipy.linalg.subspace_angles(*spaces).sum()))


@pytest.mark.parametrize("how", ["ua", "sc"])
@pytest.mark.parametrize("name", each(NAMES))
def test_every_head_is_the_plain_computation(name: str, how: Any) -> None:
    probe = HeadProbe(loaded(name), prompts(), how, 0.0, rows=9)
    found = probe.without(probe.heads)
    base_logs, base_states = reference(name, how, [])
    np.testing.assert_allclose(probe.intact, base_states, atol=2e-4, rtol=1e-3)
    chosen = [probe.heads[1], probe.heads[-2]]
    moved = 0.0
    for head in chosen:
        place = probe.heads.index(head)
        logs, states = reference(name, how, [head])
        expected = plain_kl(base_logs, logs)
        np.testing.assert_allclose(found.kl[place], expected, atol=2e-5, rtol=2e-3)
        spaces = [subspaces.leading_spaces(each, 1) for each in (probe.intact, found.states[place])]
        for side in ("left", "right"):
            ours = subspaces.angle_sum(getattr(spaces[0], side), getattr(spaces[1], side))
            assert ours == pytest.approx(plain_angle(base_states, states, 1, side), abs=2e-3)
        moved = max(moved, float(expected.max()))
    assert moved > 3e-4, "silencing a head changes something"


@pytest.mark.parametrize("how", ["ua", "sc"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gptj"])
def test_a_head_joins_a_group(name: str, how: Any) -> None:
    group = [Head(1, 0), Head(0, 3)]
    candidates = [Head(2, 1), Head(0, 1), Head(1, 2)]
    found = HeadProbe(loaded(name), prompts(), how, 0.0, rows=64).without(candidates, group)
    base, _ = reference(name, how, [])
    for place, head in enumerate(candidates):
        logs, states = reference(name, how, [*group, head])
        np.testing.assert_allclose(found.kl[place], plain_kl(base, logs), atol=2e-5, rtol=2e-3)
        np.testing.assert_allclose(found.states[place], states, atol=2e-4, rtol=1e-3)
    alone, _ = reference(name, how, [candidates[0]])
    assert not np.allclose(found.kl[0], plain_kl(base, alone), rtol=1e-2), "the group counts"


@pytest.mark.parametrize("name", ["qwen2", "llama-bias", "qwen3", "gemma2", "gpt-oss"])
def test_a_small_epsilon_is_nearly_zero_and_one_is_nothing(name: str) -> None:
    kl = {
        epsilon: HeadProbe(loaded(name), prompts(), "ua", epsilon, rows=64)
        .without([Head(0, 0), Head(1, 3)])
        .kl
        for epsilon in (0.0, 1e-5, 0.5, 1.0)
    }
    np.testing.assert_allclose(kl[1e-5], kl[0.0], rtol=1e-2, atol=1e-6)
    np.testing.assert_allclose(kl[1.0], 0, atol=1e-9)
    assert kl[0.0].max() > 1e-3
    assert not np.allclose(kl[0.5], kl[0.0], rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize(("name", "epsilon"), [("qwen3", 0.1), ("qwen2", 1e-5)])
def test_scaling_weights_of_queries_would_not_do(name: str, epsilon: float) -> None:
    """The trap: a norm undoes a scaled weight, and a bias keeps attention from being uniform."""
    model, head = tiny_model(name).double(), Head(1, 2)
    base, _ = reference(name, "ua", [])
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight[16:24] *= epsilon
    naive = plain_kl(base, [plain_pass(model, prompt)[0] for prompt in prompts()])
    ours = HeadProbe(loaded(name), prompts(), "ua", epsilon, rows=64).without([head]).kl[0]
    assert not np.allclose(naive, ours, rtol=0.05, atol=1e-6)
    if name == "qwen3":
        assert naive.max() < ours.max() / 100


@given(rows=st.integers(1, 40), order=st.permutations(range(len(LENGTHS))))
@settings(max_examples=12, deadline=None)
def test_rows_and_order_change_rounding_alone(rows: int, order: list[int]) -> None:
    held, chosen = loaded("qwen3"), [Head(2, 3), Head(0, 1)]
    expected = HeadProbe(held, prompts(), "ua", 0.0, rows=64).without(chosen)
    found = HeadProbe(held, [prompts()[i] for i in order], "ua", 0.0, rows=rows).without(chosen)
    np.testing.assert_allclose(found.kl, expected.kl[:, order], atol=1e-6, rtol=1e-4)
    np.testing.assert_allclose(found.states, expected.states[:, order], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gptj", "falcon"])
@pytest.mark.parametrize("how", ["ua", "sc"])
def test_the_model_is_left_as_it_was(name: str, how: Any) -> None:
    held = loaded(name)
    config = held.model.config.get_text_config()
    before, logits = config._attn_implementation, plain_pass(held.model, prompts()[0])[0]
    scales = scale_table(held, [[Head(0, 0), Head(2, 2)]], 0.0)
    with suppress(ZeroDivisionError), ablated(held, how, scales):
        assert not torch.allclose(plain_pass(held.model, prompts()[0])[0], logits, atol=1e-3)
        assert 1 / 0
    assert config._attn_implementation == before
    assert torch.equal(plain_pass(held.model, prompts()[0])[0], logits)


# --- answers


@pytest.mark.parametrize("rows", [1, 5, 64])
def test_answers_without_columns_are_those_of_edited_weights(rows: int) -> None:
    held, groups = loaded("llama"), [[], [Head(0, 1), Head(2, 0)], [Head(1, 3)]]
    found = answers_without(held, prompts(), groups, "sc", 0.0, max_new_tokens=6, rows=rows)
    for group, answers in zip(groups, found, strict=True):
        edited = loaded_as(without_columns(held.model, group, 0.0))
        expected = decode(edited, prompts(), max_new_tokens=6, rows=8)[0]
        assert answers == expected.tokens
    assert found[0] != found[1]


@pytest.mark.parametrize("name", ["qwen3", "gptj", "falcon", "gemma2"])
def test_uniform_heads_stay_uniform_while_answering(name: str) -> None:
    group = [Head(0, 1), Head(1, 0), Head(2, 3)]
    found = answers_without(
        loaded(name), prompts((4, 6)), [group], "ua", 0.0, max_new_tokens=4, rows=8
    )[0]
    model, eos = tiny_model(name).double(), 1
    with plainly_uniform(model, name, group):
        for prompt, answer in zip(prompts((4, 6)), found, strict=True):
            for step in range(4):
                best = int(plain_pass(model, [*prompt, *answer[:step]])[0].argmax())
                assert best == (answer[step] if step < len(answer) else eos)
                if best == eos:
                    break


# --- adversaries


def test_what_cannot_be_measured_is_refused() -> None:
    held = loaded()
    with pytest.raises(ValueError, match="there are none"):
        HeadProbe(held, [], "ua", 0.0, rows=4)
    with pytest.raises(ModelError, match="prompt 1 has no tokens"):
        HeadProbe(held, [[5], []], "ua", 0.0, rows=4)
    with pytest.raises(ValueError, match="no head 4 in layer 0"):
        scale_table(held, [[Head(0, 4)]], 0.0)
    with pytest.raises(ValueError, match="max_new_tokens"):
        answers_without(held, [[5]], [[]], "ua", 0.0, max_new_tokens=0, rows=4)
    assert answers_without(held, [], [[]], "ua", 0.0, max_new_tokens=2, rows=4) == [[]]


def test_a_broken_model_names_prompt_and_head() -> None:
    held = loaded()
    with torch.no_grad():
        held.model.get_input_embeddings().weight[50, 3] = float("nan")
    with pytest.raises(ModelError, match="prompt 1 with the intact model"):
        HeadProbe(held, [[4, 5, 6], [7, 50]], "sc", 0.0, rows=4)
    probe = HeadProbe(loaded(), prompts(), "sc", float("nan"), rows=4)
    with pytest.raises(ModelError, match="head 2 of layer 1 silenced"):
        probe.without([Head(1, 2)])


def test_attention_that_cannot_be_uniform_is_refused() -> None:
    held = loaded("falcon")
    held.model.config.alibi = True
    with pytest.raises(ModelError, match="ALiBi"):
        HeadProbe(held, prompts(), "ua", 0.0, rows=4)
    other = loaded("llama")
    other.model.config._attn_implementation = "flex_attention"
    with pytest.raises(ModelError, match="'LlamaForCausalLM' with attention 'flex_attention'"):
        HeadProbe(other, prompts(), "ua", 0.0, rows=4)


def test_layers_without_attention_have_no_heads() -> None:
    assert [layer.layer for layer in head_layers(loaded("lfm2"))] == [1]
    assert [layer.layer for layer in head_layers(loaded("qwen3.5"))] == [2]
    held = loaded("lfm2")
    held.model.config.layer_types = ["conv"] * 3
    with pytest.raises(ModelError, match="no layer of"):
        head_layers(held)


@pytest.mark.parametrize("name", each(NAMES))
def test_parameters_are_those_of_queries_and_columns(name: str) -> None:
    held = loaded(name)
    for layer in head_layers(held):
        assert layer.parameters("sc") == layer.writer.weight.numel() // layer.n_heads
        attention: Any = layer.attention
        if name.startswith(("qwen3.5", "qwen3-next")):
            expected = attention.q_proj.weight.numel() // 2 // layer.n_heads  # the rest are gates
        elif getattr(attention, "q_proj", None) is not None:
            maps = attention.q_proj.parameters()
            expected = sum(each.numel() for each in maps) // layer.n_heads
        elif hasattr(attention, "q_b_proj"):
            expected = attention.q_b_proj.weight.numel() // layer.n_heads
        else:  # queries, keys and values in one map: hidden size 32, 4 heads of 8
            fused = getattr(attention, "qkv_proj", None) or attention.query_key_value
            expected = 8 * 32 + (0 if fused.bias is None else 8)
        assert layer.parameters("ua") == expected


# --- angles


def states(n: int = 6, d: int = 9, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, d)) + 1.5


@pytest.mark.parametrize("r", [1, 2, 4])
def test_angles_are_scipys(r: int) -> None:
    spaces = [subspaces.leading_spaces(states(seed=seed), r) for seed in (1, 2, 3)]
    found = subspaces.angle_sum(spaces[0].left, np.stack([s.left for s in spaces]))
    for place, other in enumerate(spaces):
        expected = scipy.linalg.subspace_angles(spaces[0].left, other.left).sum()
        assert found[place] == pytest.approx(np.degrees(expected), abs=1e-5)
    assert found[0] == pytest.approx(0, abs=1e-10)
    assert found[1] > 0.1


@given(st.floats(1e-12, 1.5))
@settings(max_examples=40)
def test_a_small_angle_keeps_its_digits(angle: float) -> None:
    one = np.array([[1.0], [0.0], [0.0]])
    other = np.array([[np.cos(angle)], [np.sin(angle)], [0.0]])
    assert subspaces.angle_sum(one, other) == pytest.approx(np.degrees(angle), rel=1e-6)


def test_left_is_blind_to_a_common_rotation_and_right_is_not() -> None:
    matrix = states()
    rotation = scipy.stats.ortho_group.rvs(9, random_state=1)
    one, other = (subspaces.leading_spaces(m, 1) for m in (matrix, matrix @ rotation))
    assert subspaces.angle_sum(one.left, other.left) == pytest.approx(0, abs=1e-6)
    assert subspaces.angle_sum(one.right, other.right) > 5


@pytest.mark.parametrize("r", [1, 3])
def test_resampled_spaces_are_those_of_repeated_rows(r: int) -> None:
    one, other = states(8, seed=1), states(8, seed=2)
    counts = subspaces.resample_counts(8, 20, seed=0)
    counts = counts[(counts > 0).sum(1) > r]
    found = subspaces.angle_sum(
        subspaces.resampled_spaces(one, counts, r), subspaces.resampled_spaces(other, counts, r)
    )
    for place, count in enumerate(counts.astype(int)):
        expected = plain_angle(np.repeat(one, count, 0), np.repeat(other, count, 0), r)
        assert found[place] == pytest.approx(expected, abs=1e-5)
    assert found.std() > 0.1


def test_resamples_that_do_not_settle_are_solved(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = subspaces.resample_counts(8, 10, seed=0)
    settled = subspaces.resampled_spaces(states(8), counts, 2)
    monkeypatch.setattr(subspaces, "_STEPS", 1)
    solved = subspaces.resampled_spaces(states(8), counts, 2)
    np.testing.assert_allclose(subspaces.angle_sum(settled, solved), 0, atol=1e-5)


def test_counts_are_draws_with_replacement_and_repeat() -> None:
    counts = subspaces.resample_counts(3, 500, seed=1)
    assert (counts.sum(1) == 3).all()
    assert ((counts > 0).sum(1) >= 2).all(), "one prompt alone spans nothing to compare"
    assert (counts == subspaces.resample_counts(3, 500, seed=1)).all()
    assert (counts != subspaces.resample_counts(3, 500, seed=2)).any()
    assert subspaces.resample_counts(1, 2, seed=0).tolist() == [[1], [1]]


@pytest.mark.parametrize(
    "bad",
    [np.zeros((0, 4)), np.ones((1, 4)), np.zeros((5, 4)), np.full((5, 4), np.nan), np.ones(4)],
    ids=["empty", "one prompt", "zero norm", "nan", "not a matrix"],
)
def test_states_without_a_subspace_are_refused(bad: np.ndarray) -> None:
    with pytest.raises(ValueError, match="states"):
        subspaces.leading_spaces(bad, 1)


def test_states_of_too_low_a_rank_are_refused() -> None:
    flat = np.outer(np.arange(1.0, 6.0), np.ones(4))
    subspaces.leading_spaces(flat, 1)
    with pytest.raises(ValueError, match="fewer than 2 dimensions"):
        subspaces.leading_spaces(flat, 2)


def test_chances_and_ranks() -> None:
    scores = np.array([[3.0, 1.0, 2.0], [3.0, 2.0, 1.0], [0.0, 5.0, 1.0], [1.0, 1.0, 1.0]])
    assert subspaces.chance_of_top(scores, 1).tolist() == [0.75, 0.25, 0.0]
    assert subspaces.chance_of_top(scores, 2).tolist() == [0.75, 0.75, 0.5]
    assert subspaces.chance_of_top(scores, 9).tolist() == [1.0, 1.0, 1.0]
    assert subspaces.descending_ranks(np.array([0.5, 2.0, 0.5, 1.0])).tolist() == [3, 1, 4, 2]


# --- rates


def test_rates_are_compared_in_pairs() -> None:
    generator = np.random.default_rng(0)
    intact, chosen = np.ones(40, bool), generator.random(40) < 0.3
    random = generator.random((8, 40)) < 0.9
    found = compare_rates(chosen, intact, random, resamples=4000, seed=0)
    assert found.change.value == pytest.approx(chosen.mean() - 1)
    assert found.random.value == pytest.approx(random.mean())
    assert found.beyond.value == pytest.approx(chosen.mean() - random.mean())
    for contrast in (found.change, found.random, found.beyond):
        assert contrast.low < contrast.value < contrast.high
    drawn = []  # the same in loops
    for _ in range(2000):
        who, which = generator.integers(40, size=40), generator.integers(8, size=8)
        drawn.append(chosen[who].mean() - np.mean([random[d][who].mean() for d in which]))
    expected = np.quantile(drawn, [0.025, 0.975])
    np.testing.assert_allclose(found.beyond[1:], expected, atol=0.03)
    assert found.as_low == pytest.approx(1 / 9), "no random group refuses as little"


def test_a_group_like_any_other_is_not_beyond_chance() -> None:
    random = np.random.default_rng(1).random((12, 60)) < 0.7
    found = compare_rates(random[0], random[1], random, resamples=500, seed=0)
    assert found.beyond.low < 0 < found.beyond.high
    same = compare_rates(random[0], random[0], random[:1], resamples=500, seed=0)
    assert same.change == pytest.approx((0, 0, 0), abs=1e-12)
    assert same.beyond == pytest.approx((0, 0, 0), abs=1e-12)
    assert same.as_low == 1


def test_rates_that_cannot_be_compared_are_refused() -> None:
    ok = np.ones(3, bool)
    for chosen, intact, random in (
        (ok[:0], ok[:0], np.ones((2, 0), bool)),
        (ok, ok[:2], np.ones((2, 3), bool)),
        (ok, ok, np.ones((0, 3), bool)),
        (ok, ok, np.ones((2, 2), bool)),
    ):
        with pytest.raises(ValueError, match=r"rates|random groups"):
            compare_rates(chosen, intact, random, resamples=100, seed=0)


def test_rank_correlation_is_scipys_with_ties() -> None:
    generator = np.random.default_rng(3)
    a = generator.integers(0, 6, 40).astype(float)
    b = a + generator.normal(size=40)
    rho, (low, high) = bootstrap_spearman(a, b, resamples=500, seed=0)
    assert rho == pytest.approx(scipy.stats.spearmanr(a, b).statistic)
    assert low < rho < high
    assert np.isnan(bootstrap_spearman(np.ones(5), b[:5], resamples=100, seed=0)[0])


# --- the command


def write_config(folder: Path, **options: Any) -> Path:
    values = {"group": 2, "draws": 2, "resamples": 100, "max_new_tokens": 4} | options
    lines = ['name = "small"', "[model]", 'id = "organism"', 'dtype = ["float32"]']
    lines += ['response_prefix = ""', "[heads]"]
    lines += [f"{key} = {json.dumps(value)}" for key, value in values.items()]
    sets = {"harmless": "harmless-test", "heldout": "harmful-search"}
    sets |= {"prompts.test": "harmful-test", "prompts.selection": "harmful-selection"}
    for key, name in sets.items():
        lines += [f"[heads.{key}]", f'source = "organism/{name}.jsonl"', 'column = "text"']
        lines += ['split = "train[:6]"']
    path = folder / "small.toml"
    path.write_text("\n".join(lines) + "\n")
    return path


def tribunal(store: Store, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "flows", "heads", *arguments]
    whole = environment(store)
    return subprocess.run(command, capture_output=True, text=True, env=whole, cwd=ROOT)


@pytest.mark.slow
def test_the_command_end_to_end(store: Store, tmp_path: Path) -> None:
    config = str(write_config(tmp_path))
    done = tribunal(store, config, "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert all(len(line) <= 80 for line in done.stdout.splitlines())
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert {*figure.SCORED, *figure.COUNTED, "heads-scores.parquet"} <= written
    for name in figure.SCORED + figure.COUNTED:
        start = {"png": b"\x89PNG", "svg": b"<?xml", "html": b"<!doctype"}[name.split(".")[1]]
        assert (tmp_path / "out" / name).read_bytes().startswith(start)
    scores = pl.read_parquet(tmp_path / "out" / "heads-scores.parquet")
    assert scores.height == 3 * 2 * 8 * 4, "sets x ablations x layers x heads"
    assert scores.select(pl.col("angle_low") <= pl.col("angle_high")).to_series().all()
    best = scores.filter((pl.col("set") == "test") & (pl.col("ablation") == "sc")).sort("angle")
    group = pl.read_parquet(tmp_path / "out" / "heads-group-test-sc.parquet")
    assert group.row(0)[4:6] == best.row(-1)[3:5], "the first of a group is the best alone"
    assert group["angle"].to_list() == sorted(group["angle"])
    answers = pl.read_parquet(tmp_path / "out" / "heads-answers-sc.parquet")
    assert answers.height == 6 * (1 + 3 * 2 + 2 * 2), "intact, greedy groups, random groups"
    with catalog(store) as connection:
        for kind, columns in FIGURES.items():
            if kind.startswith("head_"):
                found = fetch(connection, f"SELECT * FROM {kind}")
                assert found.rows, kind
                assert set(found.columns) == {c.name for c in columns} | {"key"}
        for query in documented_queries():
            assert fetch(connection, query).rows, query
    warm = f"""import sys
sys.argv = ["tribunal", "heads", {config!r}, "--format", "json"]
from flows.cli import main
try:
    main()
except SystemExit as stop:
    assert not stop.code, stop.code
assert not {{"torch", "transformers", "prefect", "matplotlib"}} & set(sys.modules)
"""
    again = subprocess.run(
        [sys.executable, "-c", warm],
        capture_output=True,
        text=True,
        env=environment(store),
        cwd=ROOT,
    )
    assert again.returncode == 0, again.stderr
    answer = json.loads(again.stdout)
    assert answer["figure"] == "heads"
    assert len(answer["sections"]) == 6
    assert all(section["rows"] for section in answer["sections"])


def documented_queries() -> list[str]:
    text = (ROOT / "docs" / "figures-heads.md").read_text()
    return [part.split("```")[0] for part in text.split("```sql\n")[1:]]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("heads.epsilon=1.5", "heads.epsilon"),
        ("heads.rank=0", "heads.rank"),
        ('heads.ablations=["ua", "ua"]', "listed twice"),
        ("heads.draw=3", "draw"),
    ],
)
def test_a_bad_config_is_one_line(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as found:
        load_figure_config(str(write_config(tmp_path)), "heads", [override])
    assert "\n" not in str(found.value)


def test_a_harmful_set_is_not_called_harmless(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    config.write_text(config.read_text().replace("heads.prompts.test", "heads.prompts.harmless"))
    with pytest.raises(ConfigError, match="give it another name"):
        load_figure_config(str(config), "heads")


def test_prompts_that_are_scored_are_not_held_out(store: Store, tmp_path: Path) -> None:
    path = str(write_config(tmp_path))
    same = 'heads.heldout.source="organism/harmful-test.jsonl"'
    config = load_figure_config(path, "heads", [same])
    with running(Runtime(store)), pytest.raises(PromptError, match="6 prompts are in both"):
        figure.run(config)


def test_one_prompt_has_no_angle(store: Store, tmp_path: Path) -> None:
    path = str(write_config(tmp_path))
    config = load_figure_config(path, "heads", ['heads.prompts.test.split="train[:1]"'])
    with running(Runtime(store)), pytest.raises(PromptError, match="'test' has 1 prompts"):
        figure.run(config)
