"""Where each architecture writes to its residual stream.

An edit needs to know four things about a model: its layers, the linear maps whose outputs join the
residual stream, the norm such an output may pass before it joins, and how that norm stores its
gain. Guessing these from module names finds the wrong norm sooner or later (the
`post_attention_layernorm` of Llama comes after the sum, that of Gemma 2 before it), so they stand
in one table, one row per architecture, and an architecture that has no row is an error.

A mixture of experts writes through many linear maps at once: those of the experts, stored as one
tensor, and perhaps one of a shared expert. Every one of them belongs to the layer's MLP component.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from artifacts.errors import ModelError

ATTENTION = "attn_o_proj"
MLP = "mlp_down_proj"
COMPONENTS = (ATTENTION, MLP)


@dataclass(frozen=True)
class Writer:
    """A linear map [d, inputs] whose output joins the residual stream.

    `norm` is what the output passes before it joins (None: it joins as it is). The gain of that
    norm is `norm.weight + gain_offset`: Gemma stores gain - 1.
    """

    module: nn.Module
    norm: nn.Module | None = None
    gain_offset: float = 0.0

    @property
    def parts(self) -> tuple[Writer, ...]:
        """The writers that make up this one, each with a weight of its own."""
        return (self,)

    @property
    def matrices(self) -> Sequence[Tensor]:
        """Every matrix [d, inputs] of the weight: one here, one per expert in a mixture."""
        return (self.weight,)

    @property
    def weight(self) -> Tensor:
        """The weight [d, inputs] in floating point; one that bitsandbytes packed is unpacked.

        Raises ModelError for weights packed otherwise.
        """
        stored = self._stored
        if not self.quantized:
            return stored.detach()
        if not (hasattr(stored, "quant_state") or hasattr(stored, "SCB")):  # of 4 and of 8 bits
            raise self._packed()
        from transformers.integrations.bitsandbytes import dequantize_bnb_weight

        dense: Tensor = dequantize_bnb_weight(stored, getattr(self.module, "state", None))
        return dense.detach()

    @property
    def quantized(self) -> bool:
        """Whether the weight is stored packed, so that it can be read but not written."""
        stored = self._stored
        floating = stored.is_floating_point() and stored.dtype.itemsize > 1  # not one of FP8
        return hasattr(stored, "quant_state") or not floating

    @property
    def device(self) -> torch.device:
        """Where the weight is."""
        return self._stored.device

    def _packed(self) -> ModelError:
        return ModelError(
            f"module '{type(self.module).__name__}' holds weights of {self._stored.dtype} that "
            "cannot be read; use a checkpoint in bfloat16"
        )

    @property
    def _stored(self) -> Tensor:
        weight = getattr(self.module, "weight", None)
        if not isinstance(weight, Tensor):
            raise ModelError(f"module '{type(self.module).__name__}' has no weight to edit")
        return weight

    @property
    def bias(self) -> Tensor | None:
        """The bias [d], or None."""
        bias = getattr(self.module, "bias", None)
        return bias.detach() if isinstance(bias, Tensor) else None

    @property
    def gain(self) -> Tensor | None:
        """The norm's gain [d] in float32, or None where no norm follows."""
        if self.norm is None:
            return None
        weight = self.norm.weight
        if not isinstance(weight, Tensor):
            raise ModelError(f"norm '{type(self.norm).__name__}' has no gain")
        return weight.detach().float() + self.gain_offset


@dataclass(frozen=True)
class Experts(Writer):
    """Linear maps [experts, d, inputs], of which each token passes a few; their sum joins.

    `module` is called with (hidden states [tokens, d], the chosen experts [tokens, k], their
    weights [tokens, k]) and returns the weighted sum [tokens, d]. `shared` is the expert that every
    token passes, if there is one. `transposed`: stored as [experts, inputs, d].
    """

    transposed: bool = False
    shared: Writer | None = None

    @property
    def parts(self) -> tuple[Writer, ...]:
        """The experts that are chosen, and the shared one."""
        return (self,) if self.shared is None else (self, self.shared)

    @property
    def matrices(self) -> Sequence[Tensor]:
        """Each expert's matrix [d, inputs], a view: what is written into it is in the model."""
        return self.weight.unbind(0)

    @property
    def weight(self) -> Tensor:
        """The weights [experts, d, inputs], a view; ModelError for packed ones."""
        if self.quantized:
            raise self._packed()
        stored = self._stored.detach()
        return stored.mT if self.transposed else stored

    @property
    def bias(self) -> Tensor | None:
        """The biases [experts, d], or None."""
        bias = getattr(self.module, "down_proj_bias", None)
        return bias.detach() if isinstance(bias, Tensor) else None

    @property
    def _stored(self) -> Tensor:
        weight = getattr(self.module, "down_proj", None)
        if not isinstance(weight, Tensor) or weight.dim() != 3:
            raise ModelError(
                f"module '{type(self.module).__name__}' does not hold its experts in one tensor"
            )
        return weight


@dataclass(frozen=True)
class Anatomy:
    """The parts of one model that are read or edited.

    The residual entering layer 0 is state 0, the output of layer l is state l + 1; some layers
    return it in a tuple, so read it with `hidden`. `writers[l]` has one writer per component.
    """

    architecture: str
    layers: list[nn.Module]
    hidden_size: int
    writers: list[dict[str, Writer]]
    embedding: nn.Module
    final_norm: nn.Module


def hidden(output: Any) -> Tensor:
    """The hidden states [rows, tokens, d] in what a layer returned."""
    found = output[0] if isinstance(output, tuple) else output
    if not isinstance(found, Tensor):
        raise ModelError(f"a layer returned '{type(found).__name__}', not hidden states")
    return found


@dataclass(frozen=True)
class _Row:
    """Paths of one architecture: `root` from the model, the others from there or from a layer.

    `attention` lists alternatives: a hybrid model's layers differ, and the first that a layer has
    is its own. Likewise `mlp` where a layer has no `experts`.
    """

    root: str = "model"
    embedding: str = "embed_tokens"
    layers: str = "layers"
    final_norm: str = "norm"
    attention: tuple[str, ...] = ("self_attn.o_proj",)
    mlp: str = "mlp.down_proj"
    experts: str | None = None
    shared: str | None = None
    transposed: bool = False
    attention_norm: str | None = None
    mlp_norm: str | None = None
    gain_offset: float = 0.0


_LLAMA = _Row()
_GEMMA = _Row(
    attention_norm="post_attention_layernorm",
    mlp_norm="post_feedforward_layernorm",
    gain_offset=1.0,
)
_GEMMA_VISION = _Row(
    root="model.language_model",
    attention_norm=_GEMMA.attention_norm,
    mlp_norm=_GEMMA.mlp_norm,
    gain_offset=1.0,
)
_OLMO2 = _Row(attention_norm="post_attention_layernorm", mlp_norm="post_feedforward_layernorm")
_LINEAR = ("self_attn.o_proj", "linear_attn.out_proj")
_VISION = _Row(root="model.language_model")
_MIXTRAL = _Row(experts="mlp.experts")
_DEEPSEEK = replace(_MIXTRAL, shared="mlp.shared_experts.down_proj")
_QWEN2_MOE = replace(_MIXTRAL, shared="mlp.shared_expert.down_proj")
_LFM2 = _Row(
    final_norm="embedding_norm",
    attention=("self_attn.out_proj", "conv.out_proj"),
    mlp="feed_forward.w2",
)

_TABLE: Mapping[str, _Row] = {
    "LlamaForCausalLM": _LLAMA,
    "MistralForCausalLM": _LLAMA,
    "Qwen2ForCausalLM": _LLAMA,
    "Qwen3ForCausalLM": _LLAMA,
    "Qwen3_5ForCausalLM": _Row(attention=_LINEAR),
    "Qwen3_5MoeForCausalLM": replace(_QWEN2_MOE, attention=_LINEAR),
    "Qwen3NextForCausalLM": replace(_QWEN2_MOE, attention=_LINEAR),
    "Qwen2MoeForCausalLM": _QWEN2_MOE,
    "Qwen3MoeForCausalLM": _MIXTRAL,
    "MixtralForCausalLM": _MIXTRAL,
    "OlmoeForCausalLM": _MIXTRAL,
    "PhimoeForCausalLM": _MIXTRAL,
    "FlexOlmoForCausalLM": replace(_OLMO2, experts="mlp.experts"),
    "DeepseekV3ForCausalLM": _DEEPSEEK,
    "Glm4MoeForCausalLM": _DEEPSEEK,
    "GptOssForCausalLM": replace(_MIXTRAL, transposed=True),
    "Lfm2ForCausalLM": _LFM2,
    "Lfm2MoeForCausalLM": replace(_LFM2, experts="feed_forward.experts"),
    "Mistral3ForConditionalGeneration": _VISION,
    "Qwen2_5_VLForConditionalGeneration": _VISION,
    "Qwen3VLForConditionalGeneration": _VISION,
    "Qwen3VLMoeForConditionalGeneration": replace(_VISION, experts="mlp.experts"),
    "Phi3ForCausalLM": _LLAMA,
    "StableLmForCausalLM": _LLAMA,
    "Gemma2ForCausalLM": _GEMMA,
    "Gemma3ForCausalLM": _GEMMA,
    "Gemma3ForConditionalGeneration": _GEMMA_VISION,
    "Olmo2ForCausalLM": _OLMO2,
    "FalconForCausalLM": _Row(
        root="transformer",
        embedding="word_embeddings",
        layers="h",
        final_norm="ln_f",
        attention=("self_attention.dense",),
        mlp="mlp.dense_4h_to_h",
    ),
    "GPTJForCausalLM": _Row(
        root="transformer",
        embedding="wte",
        layers="h",
        final_norm="ln_f",
        attention=("attn.out_proj",),
        mlp="mlp.fc_out",
    ),
    "GPTNeoXForCausalLM": _Row(
        root="gpt_neox",
        embedding="embed_in",
        final_norm="final_layer_norm",
        attention=("attention.dense",),
        mlp="mlp.dense_4h_to_h",
    ),
}

SUPPORTED = tuple(sorted(_TABLE))


def anatomy(model: nn.Module) -> Anatomy:
    """The anatomy of a causal language model, or of a multimodal model's text tower.

    Raises ModelError for a class that is not in the table, and for an LFM whose convolutions have
    biases: those turn masked padding into states, so a prompt's answer would depend on its batch.
    """
    name = type(model).__name__
    if name not in _TABLE:
        raise ModelError(f"architecture '{name}' is not supported; known: {', '.join(SUPPORTED)}")
    row = _TABLE[name]
    config: Any = model.config
    config = config.get_text_config()
    if getattr(config, "conv_bias", False):
        raise ModelError(f"architecture '{name}' with conv_bias = true is not supported")
    root = model.get_submodule(row.root)
    layers = [layer for _, layer in root.get_submodule(row.layers).named_children()]
    return Anatomy(
        architecture=name,
        layers=layers,
        hidden_size=int(config.hidden_size),
        writers=[_writers(layer, row) for layer in layers],
        embedding=root.get_submodule(row.embedding),
        final_norm=root.get_submodule(row.final_norm),
    )


def _writers(layer: nn.Module, row: _Row) -> dict[str, Writer]:
    names = {name for name, _ in layer.named_modules()}
    attention = next((path for path in row.attention if path in names), row.attention[0])
    module, norm = layer.get_submodule(attention), _norm(layer, row.attention_norm)
    return {
        ATTENTION: Writer(module, norm, row.gain_offset),
        MLP: _experts(layer, row) if row.experts in names else _mlp(layer, row, row.mlp),
    }


def _mlp(layer: nn.Module, row: _Row, path: str) -> Writer:
    return Writer(layer.get_submodule(path), _norm(layer, row.mlp_norm), row.gain_offset)


def _experts(layer: nn.Module, row: _Row) -> Experts:
    plain = _mlp(layer, row, row.experts or "")
    shared = None if row.shared is None else _mlp(layer, row, row.shared)
    return Experts(plain.module, plain.norm, plain.gain_offset, row.transposed, shared)


def _norm(layer: nn.Module, path: str | None) -> nn.Module | None:
    return None if path is None else layer.get_submodule(path)
