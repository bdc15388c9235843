"""Attention over grouped key-value heads as two plain products, without expanding keys and values.

On a processor, at the lengths of a prompt and its response, this takes half the time of the fused
kernel, which is made for long sequences. Each key-value head meets all queries of its group at
once, so nothing is copied.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

NAME = "tribunal_grouped"
LONGEST = 512  # keys; beyond, scores take more memory than the fused kernel's time is worth


def grouped_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention [rows, queries, heads, size] of `query` [rows, heads, queries, size].

    `key`, `value` [rows, key-value heads, keys, size]; `attention_mask`: where to look, bool
    [rows, 1, queries, keys]. Anything else goes to transformers' own function.
    """
    plain = attention_mask is not None and attention_mask.dtype == torch.bool
    if not plain or attention_mask is None or key.shape[2] > LONGEST or _unusual(kwargs):
        found: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
        return found
    rows, heads, queries, size = query.shape
    groups = key.shape[1]
    together = heads // groups
    scale = size**-0.5 if scaling is None else scaling
    packed = (query * scale).reshape(rows, groups, together * queries, size)
    scores = (packed @ key.transpose(2, 3)).view(rows, groups, together, queries, -1)
    hidden = ~attention_mask[:, :, None]
    scores = scores.masked_fill_(hidden, torch.finfo(scores.dtype).min)
    weights = torch.softmax(scores, -1, dtype=torch.float32).to(value.dtype)
    out = weights.view(rows, groups, together * queries, -1) @ value
    return out.view(rows, heads, queries, -1).transpose(1, 2).contiguous(), None


def _unusual(kwargs: dict[str, Any]) -> bool:
    """Arguments whose meaning is the fused function's alone."""
    names = ("position_bias", "cache", "softcap", "s_aux")
    return bool(kwargs.get("dropout")) or any(kwargs.get(name) is not None for name in names)


AttentionInterface.register(NAME, grouped_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


@contextmanager
def grouped(model: Any) -> Iterator[None]:
    """Within the block, a model on a processor that uses the fused kernel uses this instead.

    Models that do not choose their attention by name (Falcon, GPT-J) stay as they are.
    """
    chooses = model.device.type == "cpu" and getattr(model, "_supports_attention_backend", False)
    configs = [
        config
        for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values()
        if chooses and config._attn_implementation == "sdpa"
    ]
    for config in configs:
        config._attn_implementation = NAME
    try:
        yield
    finally:
        for config in configs:
            config._attn_implementation = "sdpa"
