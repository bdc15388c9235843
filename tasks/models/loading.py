"""Loading a model in the first precision in which it computes finite logits.

A checkpoint's own dtype is tried first. Some machines cannot run it and some models overflow in
it, and both show only in a forward pass, so each attempt ends with one token through the model.
Weights come from safetensors files alone: nothing that is loaded can run code, unless the config
trusts the repository's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    BitsAndBytesConfig,
    FineGrainedFP8Config,
    Mxfp4Config,
)
from transformers.utils import logging as transformers_logging

from artifacts.errors import ModelError
from tasks.models.anatomy import Anatomy, anatomy
from tasks.models.identity import local_folder

FAILURES = (
    OSError,
    ValueError,
    TypeError,
    AttributeError,  # how transformers meets a dtype it does not know
    RuntimeError,
    ImportError,
    KeyError,
    SafetensorError,
)


@dataclass
class LoadedModel:
    """A model in evaluation mode, ready to be read, edited and decoded.

    Attributes:
        device: where token ids go.
        dtype: what the weights were loaded in, such as "bfloat16".
        source: the folder or hub id it came from.
        kept: what users of the model keep beside it; goes when the model goes.
    """

    model: Any
    tokenizer: Any
    anatomy: Anatomy
    device: torch.device
    dtype: str
    source: str
    kept: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)


def load(
    source: str,
    *,
    revision: str | None = None,
    dtypes: Sequence[str] = ("auto", "bfloat16", "float32"),
    quantization: str = "none",
    trust_remote_code: bool = False,
    device: str | torch.device | None = None,
    device_map: str | None = None,
    progress: Callable[[str], None] | None = None,
) -> LoadedModel:
    """Load a model and its tokenizer, falling back from dtype to dtype.

    A multimodal model is loaded whole or, where transformers can, as its text tower alone; it is
    given text only. A checkpoint stored in MXFP4 or FP8 is unpacked: edits read its weights.

    Args:
        source: 'organism', a folder, or a hub id.
        revision: commit, branch or tag on the hub.
        dtypes: tried in this order; "auto" is the checkpoint's own.
        quantization: "none" or "bnb-4bit" (needs bitsandbytes).
        trust_remote_code: run the repository's own code.
        device: None is the first GPU, or the CPU without one.
        device_map: spread over devices as accelerate does, instead of `device`.
        progress: called with one line per attempt.

    Raises:
        ModelError: one line with why each dtype failed, or what is missing and the way out.
    """
    folder = local_folder(source)
    if folder is not None:
        require_files(folder)
    where = str(folder or source)
    options = {"revision": revision or "main", "trust_remote_code": trust_remote_code}
    target = usable_device(device)
    placement = {"device_map": device_map} if device_map else _placement(quantization, target)
    reasons: dict[str, str] = {}
    with quiet():
        config, tokenizer = _config_and_tokenizer(where, options)
        options |= placement
        for dtype in dtypes:
            if progress is not None:
                progress(f"loading {source} in {dtype}")
            model, reason = _attempt(
                _auto_class(config),
                where,
                dtype,
                options | _quantized(config, quantization, dtype),
                target,
            )
            if model is not None:
                return LoadedModel(
                    model, tokenizer, anatomy(model), model.device, _name(model.dtype), source
                )
            reasons[dtype] = reason
    raise ModelError(f"cannot load '{source}': {_summary(reasons)}")


def usable_device(asked: str | torch.device | None) -> torch.device:
    """The asked device, tried with one number; None: the first GPU, or the CPU without one."""
    try:
        device = torch.device(asked or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(
            f"device '{asked}' cannot be used: {first_line(error)}; set TRIBUNAL_DEVICE to cpu"
        ) from error
    return device


def require_files(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise ModelError(f"folder '{folder}' has no config.json; save it with save_pretrained")
    if not any(folder.glob("*.safetensors")):
        raise ModelError(
            f"folder '{folder}' has no .safetensors weights (pickled ones are not loaded); "
            "save them again with save_pretrained"
        )


def _config_and_tokenizer(source: str, options: dict[str, Any]) -> tuple[Any, Any]:
    """Both; the configuration is read first because its errors are the clearer ones."""
    try:
        config = AutoConfig.from_pretrained(source, **options)
        return config, AutoTokenizer.from_pretrained(source, **options)
    except FAILURES as error:
        raise _unreadable(source, error) from error


def _unreadable(source: str, error: Exception) -> ModelError:
    if "trust_remote_code" in str(error):
        return ModelError(
            f"'{source}' needs code from its own repository; "
            "read that code, then set model.trust_remote_code = true"
        )
    if Path(source).is_dir():
        return ModelError(
            f"cannot read the configuration or tokenizer in '{source}': {first_line(error)}"
        )
    return ModelError(
        f"cannot read '{source}': {first_line(error)}; give model.id a local folder, "
        "or check the hub id, the connection and (for a gated model) HF_TOKEN"
    )


def _auto_class(config: Any) -> Any:
    """What loads a model of `config`: a language model, else one that also takes images."""
    known = type(config)
    if known in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and known not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return AutoModelForImageTextToText
    return AutoModelForCausalLM


def _placement(quantization: str, device: torch.device) -> dict[str, Any]:
    """Quantised weights are made on the device; others are moved there after loading."""
    return {"device_map": {"": str(device)}} if quantization != "none" else {}


def _quantized(config: Any, quantization: str, dtype: str) -> dict[str, Any]:
    """How to pack the weights, or how to unpack a checkpoint that comes in MXFP4 or FP8."""
    stored = getattr(config, "quantization_config", None) or {}
    method = stored.get("quant_method") if isinstance(stored, dict) else stored.quant_method
    unpack = {"mxfp4": Mxfp4Config, "fp8": FineGrainedFP8Config}.get(str(method))
    if quantization == "none":
        return {} if unpack is None else {"quantization_config": unpack(dequantize=True)}
    if quantization != "bnb-4bit":
        raise ModelError(f"unknown quantization '{quantization}'; known: bnb-4bit, none")
    if unpack is not None:
        raise ModelError(
            f"the checkpoint is stored in {method} already; set model.quantization = 'none'"
        )
    compute = torch.bfloat16 if dtype == "auto" else getattr(torch, dtype)
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
    )
    return {"quantization_config": config}


def _attempt(
    auto_class: Any, source: str, dtype: str, options: dict[str, Any], device: torch.device
) -> tuple[Any, str]:
    """(model, "") or (None, why not)."""
    try:
        model, report = auto_class.from_pretrained(
            source, dtype=dtype, use_safetensors=True, output_loading_info=True, **options
        )
        missing = sorted(report["missing_keys"])
        if missing:  # transformers fills these with random numbers
            return None, f"the weights lack {len(missing)} tensors, such as '{missing[0]}'"
        if "device_map" not in options:
            model.to(device)
        return (model, "") if _computes(model) else (None, "logits are not finite")
    except FAILURES as error:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return None, first_line(error)


@torch.inference_mode()
def _computes(model: Any) -> bool:
    """Whether one token gives finite logits; -inf is allowed, models mask unused ids with it."""
    model.requires_grad_(False)
    ids = torch.tensor([[model.config.get_text_config().bos_token_id or 0]], device=model.device)
    best = model(input_ids=ids, use_cache=False).logits.max()
    return bool(torch.isfinite(best))


@contextmanager
def quiet() -> Iterator[None]:
    """Hold back transformers' bars and warnings: what matters here becomes an error of ours."""
    verbosity, bars = (
        transformers_logging.get_verbosity(),
        transformers_logging.is_progress_bar_enabled(),
    )
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _summary(reasons: dict[str, str]) -> str:
    if len(set(reasons.values())) == 1:
        return f"{next(iter(reasons.values()))} (tried {', '.join(reasons)})"
    return "; ".join(f"{dtype}: {reason}" for dtype, reason in reasons.items())
