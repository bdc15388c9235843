"""Tiny random models of every architecture of the anatomy table, and token inputs for them.

Weights are large enough for logits to differ between prompts, and gains and biases are random too,
so that a norm's gain or a bias that is forgotten shows in the logits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

VOCAB = 96
HIDDEN = 32
LAYERS = 3
EOS = 1

_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 2,
    "eos_token_id": EOS,
    "pad_token_id": 0,
    "initializer_range": 0.15,
}
_FALCON: dict[str, Any] = {
    name: value
    for name, value in _SHAPE.items()
    if name not in {"num_key_value_heads", "intermediate_size"}
} | {"ffn_hidden_size": 48, "alibi": False}
_GPTJ: dict[str, Any] = {
    "vocab_size": VOCAB,
    "n_embd": HIDDEN,
    "n_layer": LAYERS,
    "n_head": 4,
    "n_positions": 128,
    "rotary_dim": 4,
    "bos_token_id": 2,
    "eos_token_id": EOS,
    "pad_token_id": 0,
    "initializer_range": 0.15,
}
_GEMMA3: dict[str, Any] = _SHAPE | {"head_dim": 8, "sliding_window": 64}
_VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
_QWEN35: dict[str, Any] = _SHAPE | {
    "head_dim": 8,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "linear_attention", "full_attention"],
}
_MOE: dict[str, Any] = _SHAPE | {
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
}
_DEEPSEEK: dict[str, Any] = _MOE | {
    "n_routed_experts": 4,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 2.5,
}
_LATENT: dict[str, Any] = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
}
_LFM2: dict[str, Any] = {
    "block_auto_adjust_ff_dim": False,
    "layer_types": ["conv", "full_attention", "conv"],
}
_GPT_OSS: dict[str, Any] = _MOE | {
    "intermediate_size": 24,
    "head_dim": 8,
    "sliding_window": 64,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
}
_ROPE3: dict[str, Any] = {
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
}
_QWEN_EYE: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "depth": 1,
    "num_heads": 2,
    "out_hidden_size": HIDDEN,
    "patch_size": 8,
}

_MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: _make("Llama", _SHAPE),
    "llama-bias": lambda: _make("Llama", _SHAPE, attention_bias=True, mlp_bias=True),
    "mistral": lambda: _make("Mistral", _SHAPE, sliding_window=64),
    "qwen2": lambda: _make("Qwen2", _SHAPE),
    "qwen3": lambda: _make("Qwen3", _SHAPE, head_dim=8),
    "qwen3.5": lambda: transformers.Qwen3_5ForCausalLM(transformers.Qwen3_5TextConfig(**_QWEN35)),
    "qwen3.5-moe": lambda: transformers.Qwen3_5MoeForCausalLM(
        transformers.Qwen3_5MoeTextConfig(
            **_QWEN35 | _MOE, shared_expert_intermediate_size=24, norm_topk_prob=False
        )
    ),
    "qwen3-next": lambda: _make(
        "Qwen3Next", _QWEN35 | _MOE, shared_expert_intermediate_size=24, mlp_only_layers=[1]
    ),
    "qwen2-moe": lambda: _make(
        "Qwen2Moe", _MOE, shared_expert_intermediate_size=24, norm_topk_prob=False
    ),
    "qwen3-moe": lambda: _make("Qwen3Moe", _MOE, head_dim=8, mlp_only_layers=[0]),
    "mixtral": lambda: _make("Mixtral", _MOE),
    "olmoe": lambda: _make("Olmoe", _MOE),
    "phimoe": lambda: _make("Phimoe", _MOE, attention_bias=True),
    "flex-olmo": lambda: _make("FlexOlmo", _MOE),
    "deepseek-v3": lambda: _make("DeepseekV3", _DEEPSEEK | _LATENT),
    "glm4-moe": lambda: _make("Glm4Moe", _DEEPSEEK, head_dim=8),
    "gpt-oss": lambda: _make("GptOss", _GPT_OSS),
    "lfm2": lambda: _make("Lfm2", _SHAPE, **_LFM2),
    "lfm2-moe": lambda: _make("Lfm2Moe", _MOE, **_LFM2, num_dense_layers=1),
    "phi3": lambda: _make("Phi3", _SHAPE, sliding_window=None),
    "stablelm": lambda: _make("StableLm", _SHAPE),
    "stablelm-parallel": lambda: _make("StableLm", _SHAPE, use_parallel_residual=True),
    "gemma2": lambda: _make("Gemma2", _SHAPE, head_dim=8, sliding_window=64),
    "gemma3": lambda: transformers.Gemma3ForCausalLM(
        transformers.Gemma3TextConfig(**_SHAPE, head_dim=8, sliding_window=64)
    ),
    "gemma3-vision": lambda: transformers.Gemma3ForConditionalGeneration(
        transformers.Gemma3Config(text_config=_GEMMA3, vision_config=_VISION, mm_tokens_per_image=4)
    ),
    "mistral3": lambda: transformers.Mistral3ForConditionalGeneration(
        transformers.Mistral3Config(
            text_config=_SHAPE | {"model_type": "mistral", "head_dim": 8},
            vision_config=_VISION | {"model_type": "pixtral"},
        )
    ),
    "qwen2.5-vl": lambda: transformers.Qwen2_5_VLForConditionalGeneration(
        transformers.Qwen2_5_VLConfig(text_config=_SHAPE | _ROPE3, vision_config=_QWEN_EYE)
    ),
    "qwen3-vl": lambda: transformers.Qwen3VLForConditionalGeneration(
        transformers.Qwen3VLConfig(
            text_config=_SHAPE | _ROPE3 | {"head_dim": 8},
            vision_config=_QWEN_EYE | {"deepstack_visual_indexes": [0]},
        )
    ),
    "qwen3-vl-moe": lambda: transformers.Qwen3VLMoeForConditionalGeneration(
        transformers.Qwen3VLMoeConfig(
            text_config=_MOE | _ROPE3 | {"head_dim": 8},
            vision_config=_QWEN_EYE | {"deepstack_visual_indexes": [0]},
        )
    ),
    "olmo2": lambda: _make("Olmo2", _SHAPE),
    "falcon": lambda: _make("Falcon", _FALCON, parallel_attn=False, multi_query=False, bias=True),
    "falcon-parallel": lambda: _make("Falcon", _FALCON, parallel_attn=True, multi_query=True),
    "falcon-new": lambda: _make("Falcon", _FALCON, new_decoder_architecture=True, num_kv_heads=2),
    "gptj": lambda: transformers.GPTJForCausalLM(transformers.GPTJConfig(**_GPTJ)),
    "gptneox": lambda: _make("GPTNeoX", _SHAPE, use_parallel_residual=True),
    "gptneox-sequential": lambda: _make("GPTNeoX", _SHAPE, use_parallel_residual=False),
}

NAMES = tuple(_MODELS)
NORMED = (
    "gemma2",
    "gemma3",
    "gemma3-vision",
    "olmo2",
    "flex-olmo",
)  # normalise what a sublayer adds to the residual stream
MIXTURES = (
    "qwen3.5-moe",
    "qwen3-next",
    "qwen2-moe",
    "qwen3-moe",
    "mixtral",
    "olmoe",
    "phimoe",
    "qwen3-vl-moe",
    "flex-olmo",
    "deepseek-v3",
    "glm4-moe",
    "gpt-oss",
    "lfm2-moe",
)
COMMON = {  # one of each kind; the others are relatives of theirs and run in the slow suite
    "llama",
    "llama-bias",
    "mistral",
    "qwen3",
    "qwen3.5",
    "mixtral",
    "gpt-oss",
    "deepseek-v3",
    "lfm2",
    "phi3",
    "stablelm",
    "gemma2",
    "gemma3",
    "gemma3-vision",
    "olmo2",
    "falcon",
    "falcon-parallel",
    "gptj",
    "gptneox",
}
BIASED = ("llama-bias", "gpt-oss", "phimoe", "falcon", "gptj", "gptneox", "gptneox-sequential")


def each(names: Sequence[str]) -> list[Any]:
    """Parameters of a test: relatives of common architectures are marked slow."""
    slow = pytest.mark.slow
    return [name if name in COMMON else pytest.param(name, marks=slow) for name in names]


def tiny_model(name: str, seed: int = 0) -> Any:
    """A float32 model of `name` in evaluation mode; equal seeds give equal weights."""
    return _randomized(_MODELS[name], seed)


def lfm2_with_biases() -> Any:
    """A model in which padding leaks into what is answered."""
    return _randomized(lambda: _make("Lfm2", _SHAPE, **_LFM2, conv_bias=True), 0)


def gpt_oss_in_blocks() -> Any:
    """A model whose experts' inputs come in blocks of 32, as MXFP4 stores them."""
    return _randomized(lambda: _make("GptOss", _GPT_OSS | {"intermediate_size": 64}), 0)


def qwen35_with_eyes() -> Any:
    """A multimodal model whose text tower transformers can load alone."""
    config = transformers.Qwen3_5Config(text_config=_QWEN35, vision_config=_QWEN_EYE)
    return _randomized(lambda: transformers.Qwen3_5ForConditionalGeneration(config), 0)


def _randomized(make: Callable[[], Any], seed: int) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make()
        with torch.no_grad():
            for path, parameter in model.named_parameters():
                if parameter.dim() == 1 or path.endswith("proj_bias"):
                    parameter.add_(0.3 * torch.randn_like(parameter))
    return model.float().eval()


def token_ids(rows: int = 4, length: int = 7, seed: int = 0) -> Tensor:
    """Random token ids [rows, length] without the special ones."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (rows, length), generator=generator)


def _make(family: str, shape: dict[str, Any], **options: Any) -> Any:
    config = getattr(transformers, f"{family}Config")(**(shape | options))
    return getattr(transformers, f"{family}ForCausalLM")(config)
