"""Attention over grouped heads is transformers' own, to float32 rounding."""

from __future__ import annotations

from contextlib import suppress
from types import SimpleNamespace

import pytest
import torch
from test_decoding import loaded
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from tasks.models import grouped_attention as module
from tasks.models.grouped_attention import NAME, grouped, grouped_attention


def inputs(heads: int, groups: int, queries: int, keys: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(heads + queries)
    shapes = ((3, heads, queries, 8), (3, groups, keys, 8), (3, groups, keys, 8))
    query, key, value = (torch.randn(shape, generator=generator) for shape in shapes)
    mask = torch.ones(3, 1, queries, keys, dtype=torch.bool).tril(keys - queries)
    mask[1, :, :, :2] = False  # padding
    return query, key, value, mask


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize(("queries", "keys"), [(1, 7), (5, 9), (7, 7)])
@pytest.mark.parametrize("scaling", [None, 0.3])
def test_it_is_the_fused_function(
    heads: int, groups: int, queries: int, keys: int, scaling: float | None
) -> None:
    query, key, value, mask = inputs(heads, groups, queries, keys)
    owner = SimpleNamespace(num_key_value_groups=heads // groups)
    ours, _ = grouped_attention(owner, query, key, value, mask, scaling=scaling)
    theirs, _ = sdpa_attention_forward(owner, query, key, value, mask, scaling=scaling)
    seen = mask.any(-1)[:, 0]  # a query that sees nothing is padding: its output is anybody's
    torch.testing.assert_close(ours[seen], theirs[seen], atol=2e-6, rtol=1e-5)
    looking_elsewhere, _ = grouped_attention(owner, query, key, value, mask.flip(-1))
    assert not torch.allclose(looking_elsewhere[seen], theirs[seen], atol=1e-2)


def test_long_sequences_and_other_masks_stay_with_the_fused_kernel(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    query, key, value, mask = inputs(4, 2, 5, 9)
    owner = SimpleNamespace(num_key_value_groups=2, is_causal=False)
    monkeypatch.setattr(module, "sdpa_attention_forward", lambda *_, **__: ("fused", None))
    assert grouped_attention(owner, query, key, value, None)[0] == "fused"
    assert grouped_attention(owner, query, key, value, mask.float())[0] == "fused"
    assert grouped_attention(owner, query, key, value, mask, dropout=0.1)[0] == "fused"
    assert grouped_attention(owner, query, key, value, mask)[0] != "fused"
    monkeypatch.setattr(module, "LONGEST", 8)
    assert grouped_attention(owner, query, key, value, mask)[0] == "fused"


def test_it_is_in_force_within_its_block_only() -> None:
    model = loaded().model
    model.config._attn_implementation = "sdpa"
    with suppress(ZeroDivisionError), grouped(model):
        assert model.config._attn_implementation == NAME
        assert 1 / 0
    assert model.config._attn_implementation == "sdpa"
    model.config._attn_implementation = "eager"
    with grouped(model):
        assert model.config._attn_implementation == "eager"
    other = loaded("falcon-parallel").model
    before = other.config._attn_implementation
    with grouped(other):
        assert other.config._attn_implementation == before
