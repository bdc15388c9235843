"""A model as a folder that others load: weights in safetensors files, tokenizer, chat template.

What was written is held against what was meant tensor by tensor, by digests: a folder that answers
alike but holds something else is not the model that was measured.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig

from artifacts.errors import ModelError
from tasks.models.loading import LoadedModel, quiet

SHARD_SIZE = "4GB"
DTYPES = ("float32", "bfloat16", "float16")


def checkpoint_dtype(loaded: LoadedModel, revision: str | None, trust: bool) -> str:
    """The dtype that a checkpoint is stored in, by its configuration; else the one it runs in."""
    with quiet():
        config = AutoConfig.from_pretrained(
            loaded.source, revision=revision or "main", trust_remote_code=trust
        )
    said = getattr(config.get_text_config(), "dtype", None) or getattr(config, "dtype", None)
    name = str(said).removeprefix("torch.")
    return name if name in DTYPES else loaded.dtype


def wider(one: str, other: str) -> str:
    """The dtype that holds every number of both."""
    return str(torch.promote_types(getattr(torch, one), getattr(torch, other))).split(".")[1]


def cast(loaded: LoadedModel, dtype: str) -> None:
    """Turn every floating-point tensor of a loaded model into `dtype`, where it lies."""
    wanted = getattr(torch, dtype)
    for tensor in (*loaded.model.parameters(), *_saved_buffers(loaded.model)):
        if tensor.is_floating_point() and tensor.dtype != wanted:
            tensor.data = tensor.data.to(wanted)
    loaded.dtype = dtype


def _saved_buffers(model: Any) -> list[Tensor]:
    """Buffers that a checkpoint holds; others (rotary frequencies, say) keep their precision."""
    saved = model.state_dict().keys()
    return [buffer for name, buffer in model.named_buffers() if name in saved]


def write_model(loaded: LoadedModel, folder: Path, shard_size: str = SHARD_SIZE) -> None:
    """Write model, generation settings, tokenizer and chat template into a folder.

    Raises:
        ModelError: transformers cannot write it; disk errors come through as they are.
    """
    try:
        with quiet(), file_errors():
            loaded.model.save_pretrained(folder, max_shard_size=shard_size)
            loaded.tokenizer.save_pretrained(folder)
    except ValueError as error:
        raise ModelError(f"cannot write the model: {str(error).splitlines()[0]}") from error


@contextmanager
def file_errors() -> Iterator[None]:
    """Let a full disk be an OSError, which safetensors calls an error of its own."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(str(error)) from error


def tensor_digests(model: Any, dtype: str) -> dict[str, str]:
    """sha256 of shape and bytes, in `dtype`, of every tensor that a checkpoint holds, by name.

    A model that was loaded in a wider dtype gives the digests of what is stored: no bit is lost on
    the way up, nor on the way back.
    """
    wanted = getattr(torch, dtype)
    return {name: _digest(tensor, wanted) for name, tensor in model.state_dict().items()}


def _digest(tensor: Tensor, dtype: torch.dtype) -> str:
    tensor = tensor.to(dtype) if tensor.is_floating_point() else tensor
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}\0".encode())
    content: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    digest.update(content)
    return digest.hexdigest()


def require_same_tensors(written: Mapping[str, str], meant: Mapping[str, str]) -> None:
    """Hold digests of what a folder holds against those of what was to be written.

    Raises:
        ModelError: they differ; names how many, and the first.
    """
    names = sorted(written.keys() | meant.keys())
    wrong = [name for name in names if written.get(name) != meant.get(name)]
    if wrong:
        raise ModelError(
            f"{len(wrong)} of {len(names)} tensors are not what was to be written, "
            f"such as '{wrong[0]}'"
        )


def release(loaded: LoadedModel) -> None:
    """Free the memory of a model's tensors, whoever still holds the model: it is of no more use."""
    for tensor in (*loaded.model.parameters(), *loaded.model.buffers()):
        tensor.data = tensor.data.new_empty(0)
