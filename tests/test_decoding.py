"""Decoding is plain greedy decoding, whatever the batch, the padding, the edits and who leaves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import EOS, LAYERS, NAMES, VOCAB, each, tiny_model

from artifacts.errors import ModelError
from tasks.models import decoding
from tasks.models.anatomy import COMPONENTS, anatomy
from tasks.models.baking import bake
from tasks.models.decoding import Decoded, decode, eos_ids
from tasks.models.editing import Edit, build_edit
from tasks.models.loading import LoadedModel
from tasks.models.row_cache import RowCache, compaction, row_cache

NEW = 14
EVERY_FIFTH = list(range(3, VOCAB, 5))  # so many ends that rows leave all the time


def loaded(name: str = "llama", eos: list[int] | int | None = EOS) -> LoadedModel:
    model = tiny_model(name)
    model.generation_config.eos_token_id = eos
    return LoadedModel(model, None, anatomy(model), torch.device("cpu"), "float32", name)


def prompts(count: int = 9, seed: int = 0) -> list[list[int]]:
    """Token lists of 2 to 12 tokens, lengths mixed."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randint(3, VOCAB, (2 + (5 * i + seed) % 11,), generator=generator).tolist()
        for i in range(count)
    ]


def generated(model: Any, prompt: list[int], eos: Any, new: int = NEW) -> list[int]:
    """What transformers' own greedy search answers to one unpadded prompt."""
    model.generation_config.eos_token_id = eos
    ids = torch.tensor([prompt])
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new
    )
    tokens: list[int] = output[0, len(prompt) :].tolist()
    return tokens


def whole(decoded: Decoded, index: int) -> int:
    """Length of a response with its end-of-sequence token."""
    return len(decoded.tokens[index]) + decoded.ended[index]


def some_edit(held: LoadedModel, seed: int, strength: float = 0.8) -> tuple[Edit, dict[str, Any]]:
    """An edit of every module, and the arguments that bake the same into weights."""
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(LAYERS, held.anatomy.hidden_size, generator=generator)
    vectors /= vectors.norm(dim=-1, keepdim=True)
    arguments: dict[str, Any] = {
        "vectors": dict.fromkeys(COMPONENTS, vectors),
        "weights": dict.fromkeys(COMPONENTS, [strength] * LAYERS),
        "row_normalization": "pre",
        "frame": "residual",
    }
    return build_edit(held.anatomy, **arguments), arguments


def staggered_ends(model: Any) -> list[int]:
    """End-of-sequence ids that stop the responses of `model` at different steps."""
    free = [generated(model, prompt, None) for prompt in prompts()]
    return sorted({free[i][i] for i in (1, 4, 7)})


@pytest.mark.parametrize("name", each(NAMES))
def test_tokens_are_those_of_generate(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "SLICE_TOKENS", 24)  # several prefill slices per batch
    held = loaded(name)
    ends = staggered_ends(held.model)
    held.model.generation_config.eos_token_id = ends
    (decoded,) = decode(held, prompts(), max_new_tokens=NEW, rows=6)
    assert len({whole(decoded, i) for i in range(9)}) > 2, "rows must leave at different steps"
    for index, prompt in enumerate(prompts()):
        expected = generated(held.model, prompt, ends)
        ended = expected[-1] in ends
        assert decoded.ended[index] is ended
        assert decoded.tokens[index] == (expected[:-1] if ended else expected)


@pytest.mark.parametrize("name", ["llama-bias", "gemma3", "qwen3.5", "gptneox"])
def test_every_edit_of_a_batch_gives_the_tokens_of_edited_weights(name: str) -> None:
    held = loaded(name, EVERY_FIFTH)
    edits = [some_edit(held, seed) for seed in range(3)]
    together = decode(held, prompts(), [edit for edit, _ in edits], max_new_tokens=NEW, rows=10)
    assert len(together) == 3
    for decoded, (_, arguments) in zip(together, edits, strict=True):
        baked = loaded(name, EVERY_FIFTH)
        bake(baked.anatomy, **arguments)
        for index, prompt in enumerate(prompts()):
            expected = generated(baked.model, prompt, EVERY_FIFTH)
            ended = expected[-1] in EVERY_FIFTH
            assert decoded.tokens[index] == (expected[:-1] if ended else expected)
    assert together[0].tokens != together[1].tokens, "the edits must matter"


def test_decoding_leaves_no_edit_behind() -> None:
    held = loaded()
    before = decode(held, prompts(), max_new_tokens=4, rows=4)[0]
    edited = decode(held, prompts(), [some_edit(held, 0)[0]], max_new_tokens=4, rows=4)[0]
    after = decode(held, prompts(), max_new_tokens=4, rows=4)[0]
    assert not torch.equal(before.first_logits, edited.first_logits)
    assert torch.equal(before.first_logits, after.first_logits)


def test_the_identity_edit_is_the_unedited_model_bit_for_bit() -> None:
    held = loaded()
    plain = decode(held, prompts(), max_new_tokens=5, rows=4)[0]
    edited = decode(held, prompts(), [Edit({})], max_new_tokens=5, rows=4)[0]
    assert torch.equal(plain.first_logits, edited.first_logits)
    assert plain.tokens == edited.tokens


def test_first_logits_are_the_raw_ones_of_the_prompts_last_token() -> None:
    held = loaded()
    decoded = decode(held, prompts(), max_new_tokens=1, rows=4)[0]
    assert decoded.first_logits.dtype == torch.float32
    for index, prompt in enumerate(prompts()):
        with torch.inference_mode():
            expected = held.model(torch.tensor([prompt])).logits[0, -1]
        torch.testing.assert_close(decoded.first_logits[index], expected, atol=1e-5, rtol=1e-5)


@given(
    rows=st.integers(1, 12),
    slice_tokens=st.integers(1, 60),
    count=st.integers(1, 9),
    seed=st.integers(0, 5),
)
@settings(max_examples=15, deadline=None)
def test_batching_changes_nothing(rows: int, slice_tokens: int, count: int, seed: int) -> None:
    held = loaded("llama", EVERY_FIFTH)
    edits = [some_edit(held, 0)[0], Edit({})]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoding, "SLICE_TOKENS", slice_tokens)
        batched = decode(held, prompts(count, seed), edits, max_new_tokens=6, rows=rows)
    for edit, decoded in zip(edits, batched, strict=True):
        alone = [
            decode(held, [prompt], [edit], max_new_tokens=6, rows=1)[0]
            for prompt in prompts(count, seed)
        ]
        assert decoded.tokens == [one.tokens[0] for one in alone]
        assert decoded.ended == [one.ended[0] for one in alone]
        logits = torch.cat([one.first_logits for one in alone])
        torch.testing.assert_close(decoded.first_logits, logits, atol=1e-5, rtol=1e-5)


def test_the_same_call_gives_the_same_bits() -> None:
    held = loaded()
    one, two = (decode(held, prompts(), max_new_tokens=6, rows=4)[0] for _ in range(2))
    assert torch.equal(one.first_logits, two.first_logits)
    assert one.tokens == two.tokens


def test_generation_settings_other_than_ends_do_not_count() -> None:
    held = loaded()
    plain = decode(held, prompts(), max_new_tokens=8, rows=9)[0]
    held.model.generation_config.update(
        do_sample=True, temperature=3.0, repetition_penalty=5.0, no_repeat_ngram_size=1
    )
    assert decode(held, prompts(), max_new_tokens=8, rows=9)[0].tokens == plain.tokens


@pytest.mark.parametrize(
    ("configured", "of_tokenizer", "expected"),
    [(4, None, [4]), ([7, 4], 5, [4, 5, 7]), (None, 5, [5]), (None, None, [])],
)
def test_every_end_of_sequence_id_counts(
    configured: Any, of_tokenizer: int | None, expected: list[int]
) -> None:
    class Tokenizer:
        eos_token_id = of_tokenizer

    held = loaded(eos=configured)
    held.tokenizer = Tokenizer()
    assert eos_ids(held) == expected


def test_without_an_end_every_response_has_full_length() -> None:
    decoded = decode(loaded(eos=None), prompts(), max_new_tokens=5, rows=4)[0]
    assert [len(tokens) for tokens in decoded.tokens] == [5] * 9
    assert not any(decoded.ended)


def test_a_response_may_be_empty_and_a_batch_may_end_at_once() -> None:
    decoded = decode(loaded(eos=list(range(VOCAB))), prompts(), max_new_tokens=5, rows=4)[0]
    assert decoded.tokens == [[]] * 9
    assert all(decoded.ended)


def test_an_end_on_the_last_token_counts_as_ended() -> None:
    held = loaded(eos=None)
    (tokens,) = decode(held, [[5, 6, 7]], max_new_tokens=3, rows=1)[0].tokens
    first = tokens.index(tokens[2]) + 1
    held.model.generation_config.eos_token_id = tokens[2]
    decoded = decode(held, [[5, 6, 7]], max_new_tokens=first, rows=1)[0]
    assert decoded.ended == [True]
    assert decoded.tokens == [tokens[: first - 1]]


def test_no_prompts_give_no_answers() -> None:
    (decoded,) = decode(loaded(), [], max_new_tokens=3, rows=4)
    assert not decoded.tokens
    assert not decoded.ended
    assert decoded.first_logits.shape == (0, VOCAB)


def test_progress_counts_pairs_up_to_all() -> None:
    held, seen = loaded(), list[tuple[int, int]]()
    edits = [Edit({}), Edit({})]
    decode(
        held,
        prompts(),
        edits,
        max_new_tokens=2,
        rows=7,
        on_progress=lambda *at: seen.append(at),
    )
    assert seen == [(7, 18), (14, 18), (18, 18)]


def test_nan_logits_are_an_error_that_names_the_prompt() -> None:
    held = loaded()
    with torch.no_grad():
        held.model.get_input_embeddings().weight[50] = float("nan")
    with pytest.raises(ModelError, match=r"logits of prompt 2 are not finite at new token 0;"):
        decode(held, [[5, 6], [7, 8, 9], [5, 50, 4]], max_new_tokens=3, rows=3)
    decode(held, [[5, 6], [7, 8, 9]], max_new_tokens=1, rows=3)


@pytest.mark.parametrize(("rows", "new"), [(0, 3), (3, 0)])
def test_nonsense_sizes_are_refused(rows: int, new: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        decode(loaded(), prompts(), max_new_tokens=new, rows=rows)


def test_an_empty_prompt_is_refused_by_index() -> None:
    with pytest.raises(ModelError, match="prompt 1 has no tokens"):
        decode(loaded(), [[5], []], max_new_tokens=2, rows=2)


@given(alive=st.lists(st.booleans(), min_size=1, max_size=30))
def test_compaction_keeps_exactly_the_live_rows_and_moves_few(alive: list[bool]) -> None:
    kept = compaction(torch.tensor(alive)).tolist()
    assert sorted(kept) == [i for i, lives in enumerate(alive) if lives]
    moved = [i for i, source in enumerate(kept) if source != i]
    assert len(moved) <= alive.count(False)
    assert all(source >= len(kept) for i, source in enumerate(kept) if source != i)


def test_recurrent_models_keep_their_own_cache_and_sliding_ones_do_not_need_it() -> None:
    kinds = {
        name: isinstance(row_cache(tiny_model(name).config, 2, 3, 4), RowCache)
        for name in ("llama", "gemma2", "mistral", "qwen3.5")
    }
    assert kinds == {"llama": True, "gemma2": True, "mistral": True, "qwen3.5": False}


@pytest.mark.parametrize("name", ["mistral", "gemma3"])
def test_a_window_shorter_than_the_text_still_slides(name: str) -> None:
    held = loaded(name, eos=None)
    model = held.model
    plain = decode(held, prompts(), max_new_tokens=NEW, rows=9)[0]
    model.config.sliding_window = 5
    decoded = decode(held, prompts(), max_new_tokens=NEW, rows=9)[0]
    assert decoded.tokens != plain.tokens, "the window must matter"
    for index, prompt in enumerate(prompts()):
        assert decoded.tokens[index] == generated(model, prompt, None)
