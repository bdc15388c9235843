"""Attention heads that are silenced while a model runs, each row of a batch with its own.

Two ablations (arXiv 2410.13708), both a scaling by epsilon, 0 included:

- `ua`, Undifferentiated Attention: the head's query is scaled, so every visible position gets the
  same weight. It is scaled where attention receives it, after bias, norm and rotation: a norm of
  queries would undo a scaled weight, and a bias would keep the scores apart. A sliding window stays
  (uniform within it), and so does a sink (gpt-oss): it keeps its own logit, and the positions
  share the rest evenly.
- `sc`, Scaling Contribution: the head's part of what enters the output projection is scaled. With
  grouped keys and values it is still one query head's output.

Layers without softmax attention (linear attention, convolution) have no such heads.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, eager_mask, sdpa_mask

from artifacts.errors import ModelError
from tasks.models.anatomy import ATTENTION
from tasks.models.grouped_attention import grouped, grouped_attention

if TYPE_CHECKING:
    from tasks.models.loading import LoadedModel

Ablation = Literal["ua", "sc"]
HEADLESS = {"linear_attention", "conv"}  # kinds of layers
_SCALE = "tribunal_query_scale"  # attribute of an attention module: () -> Tensor [rows, heads]
_NAMES = {"sdpa": "tribunal_heads_sdpa", "eager": "tribunal_heads_eager"}
_QUERY_MAPS = ("q_proj", "q_b_proj", "qkv_proj", "query_key_value")
_QUERY_SIZES = ("qk_head_dim", "head_dim", "head_size")


class Head(NamedTuple):
    """A query head, both numbers from 0."""

    layer: int
    head: int


@dataclass(frozen=True)
class HeadLayer:
    """A layer's attention: `writer` [d, n_heads * size] reads the heads' outputs side by side."""

    layer: int
    attention: nn.Module
    writer: nn.Module
    n_heads: int
    size: int

    @property
    def heads(self) -> list[Head]:
        """Its heads in order."""
        return [Head(self.layer, head) for head in range(self.n_heads)]

    def parameters(self, how: Ablation) -> int:
        """How many parameters of the model an ablation of one head amounts to changing.

        `sc`: its columns of the output projection; `ua`: its rows of the map that makes queries,
        with their biases.
        """
        if how == "sc":
            return int(self.writer.out_features) * self.size  # type: ignore[arg-type]
        maps = (getattr(self.attention, name, None) for name in _QUERY_MAPS)
        sizes = (getattr(self.attention, name, None) for name in _QUERY_SIZES)
        found, size = next(filter(None, maps), None), next(filter(None, sizes), None)
        if found is None or size is None:
            raise _unknown(self.attention)
        return int(size) * (int(found.in_features) + (found.bias is not None))


class HeadScales:
    """What each row of the next forward passes multiplies each head with.

    `table` [variants, layers, heads]: epsilon where a variant silences a head, else 1.
    """

    def __init__(self, table: Tensor) -> None:
        self._table = table
        self.touched = [int(n) for n in (table != 1).any(2).any(0).nonzero()[:, 0]]
        self.choose(None)

    def choose(self, rows: Tensor | None) -> None:
        """The variant of each row, int64 [rows]; None: every row has the first."""
        self._now = self._table[:1] if rows is None else self._table[rows.to(self._table.device)]

    def of(self, layer: int) -> Tensor:
        """Scales [rows or 1, heads] of one layer."""
        return self._now[:, layer]


def head_layers(loaded: LoadedModel) -> list[HeadLayer]:
    """The layers that have heads, in order.

    Raises:
        ModelError: the output projection does not divide into the config's heads, or no layer has
            any.
    """
    config = loaded.model.config.get_text_config()
    n_heads = int(config.num_attention_heads)
    kinds = getattr(config, "layer_types", None) or [None] * len(loaded.anatomy.layers)
    found = []
    for number, (layer, kind) in enumerate(zip(loaded.anatomy.layers, kinds, strict=True)):
        if kind in HEADLESS:
            continue
        writer = loaded.anatomy.writers[number][ATTENTION].module
        width = getattr(writer, "in_features", None)
        if not isinstance(width, int) or width % n_heads:
            raise _unknown(writer)
        owner = next(m for m in layer.modules() if any(c is writer for c in m.children()))
        found.append(HeadLayer(number, owner, writer, n_heads, width // n_heads))
    if not found:
        raise ModelError(f"no layer of '{loaded.anatomy.architecture}' has attention heads")
    return found


def scale_table(
    loaded: LoadedModel, groups: Sequence[Collection[Head]], epsilon: float
) -> HeadScales:
    """Scales of one variant for each group of silenced heads.

    Raises:
        ValueError: a group names a head that the model does not have.
    """
    layers = head_layers(loaded)
    known = {head for layer in layers for head in layer.heads}
    table = torch.ones(len(groups), len(loaded.anatomy.layers), layers[0].n_heads)
    for variant, group in enumerate(groups):
        for head in group:
            if head not in known:
                raise ValueError(f"the model has no head {head.head} in layer {head.layer}")
            table[variant, head.layer, head.head] = epsilon
    return HeadScales(table.to(loaded.device))


@contextmanager
def ablated(loaded: LoadedModel, how: Ablation, scales: HeadScales) -> Iterator[None]:
    """Within the block, forward passes multiply queries (`ua`) or heads' outputs (`sc`).

    Raises:
        ModelError: `ua` cannot reach the queries of this architecture.
    """
    layers = [layer for layer in head_layers(loaded) if layer.layer in scales.touched]
    with ExitStack() as stack:
        if how == "sc":
            stack.enter_context(grouped(loaded.model))
            for layer in layers:
                hook = _scaling_input(layer, scales)
                handle = layer.writer.register_forward_pre_hook(hook)
                stack.callback(handle.remove)
        else:
            _scale_queries(loaded, layers, scales, stack)
        yield


def _scaling_input(layer: HeadLayer, scales: HeadScales) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        parts = args[0].unflatten(-1, (layer.n_heads, layer.size))
        scale = scales.of(layer.layer).to(parts)
        return ((parts * scale[:, None, :, None]).flatten(-2), *args[1:])

    return hook


def _scale_queries(
    loaded: LoadedModel, layers: Sequence[HeadLayer], scales: HeadScales, stack: ExitStack
) -> None:
    name, config = loaded.anatomy.architecture, loaded.model.config.get_text_config()
    if name == "FalconForCausalLM":
        if getattr(config, "alibi", False):
            raise ModelError(
                "Falcon with ALiBi: its position bias would keep attention from being uniform; "
                "use ablation 'sc' alone"
            )
        wrap = _falcon_queries
    elif name == "GPTJForCausalLM":
        wrap = _gptj_queries
    else:
        stack.enter_context(_by_name(loaded.model, layers))
        wrap = None
    for layer in layers:
        of_layer = _reader(scales, layer.layer)
        if wrap is None:
            setattr(layer.attention, _SCALE, of_layer)
            stack.callback(delattr, layer.attention, _SCALE)
        else:
            method, replacement = wrap(layer.attention, of_layer)
            setattr(layer.attention, method, replacement)
            stack.callback(delattr, layer.attention, method)


def _reader(scales: HeadScales, layer: int) -> Callable[[], Tensor]:
    return lambda: scales.of(layer)


def _falcon_queries(module: Any, scale: Callable[[], Tensor]) -> tuple[str, Callable[..., Any]]:
    """Queries [rows, tokens, heads, size] before their rotation, which a scalar passes."""
    split = module._split_heads

    def replacement(fused: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = split(fused)
        return query * scale().to(query)[:, None, :, None], key, value

    return "_split_heads", replacement


def _gptj_queries(module: Any, scale: Callable[[], Tensor]) -> tuple[str, Callable[..., Any]]:
    attend = module._attn

    def replacement(query: Tensor, *args: Any, **kwargs: Any) -> Any:
        return attend(query * scale().to(query)[:, :, None, None], *args, **kwargs)

    return "_attn", replacement


@contextmanager
def _by_name(model: Any, layers: Sequence[HeadLayer]) -> Iterator[None]:
    """Put our functions in place of those that the config names."""
    configs = list({id(c): c for c in (model.config, model.config.get_text_config())}.values())
    before = [config._attn_implementation for config in configs]
    own = [sys.modules[type(layer.attention).__module__] for layer in layers]
    if before[-1] not in _NAMES or not all(hasattr(m, "eager_attention_forward") for m in own):
        raise ModelError(
            f"the queries of '{type(model).__name__}' with attention '{before[-1]}' cannot be "
            "scaled; use ablation 'sc' alone"
        )
    try:
        for config, name in zip(configs, before, strict=True):
            config._attn_implementation = _NAMES.get(name, name)
        yield
    finally:
        for config, name in zip(configs, before, strict=True):
            config._attn_implementation = name


def _scaled(module: nn.Module, query: Tensor) -> Tensor:
    """The query [rows, heads, tokens, size], scaled where the module says so."""
    scale = getattr(module, _SCALE, None)
    return query if scale is None else query * scale().to(query)[:, :, None, None]


def _fused_attention(module: nn.Module, query: Tensor, *args: Any, **kwargs: Any) -> Any:
    attend = grouped_attention if query.device.type == "cpu" else sdpa_attention_forward
    return attend(module, _scaled(module, query), *args, **kwargs)


def _eager_attention(module: nn.Module, query: Tensor, *args: Any, **kwargs: Any) -> Any:
    attend = sys.modules[type(module).__module__].eager_attention_forward
    return attend(module, _scaled(module, query), *args, **kwargs)


AttentionInterface.register(_NAMES["sdpa"], _fused_attention)
AttentionInterface.register(_NAMES["eager"], _eager_attention)
AttentionMaskInterface.register(_NAMES["sdpa"], sdpa_mask)
AttentionMaskInterface.register(_NAMES["eager"], eager_mask)


def _unknown(module: nn.Module) -> ModelError:
    return ModelError(f"the heads of '{type(module).__name__}' cannot be told apart")
