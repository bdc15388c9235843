"""The processor's matrix-multiply peak, and how much of it a trial needs.

The floor of a trial's arithmetic is 2 FLOP per weight and token: every token of a prompt and every
produced one but the last passes the layers, and every produced token is chosen by the output head.
Attention between tokens is left out (below 2 % here). What an engine saves by not computing counts
as speed, so its share of the peak can exceed that of its own multiplications.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch
from safetensors import safe_open

DTYPES = ("float32", "bfloat16")


def matmul_peak(
    dtype: str, *, size: int = 1024, device: str = "cpu", seconds: float = 1.5
) -> float:
    """The best of repeated square products, in FLOP/s, with as many threads as torch has.

    Laid out as in a model: the other way round is slower where bfloat16 is not native.
    """
    kind = getattr(torch, dtype)
    a, b = (torch.randn(size, size, device=device).to(kind) for _ in range(2))
    best, spent, times = float("inf"), 0.0, 0
    while spent < seconds or times < 3:
        _wait(device)
        started = time.perf_counter()
        torch.nn.functional.linear(a, b)
        _wait(device)
        took = time.perf_counter() - started
        best, spent, times = min(best, took), spent + took, times + 1
    return 2 * size**3 / best


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def matmul_weights(folder: Path) -> tuple[int, int]:
    """Weights of the layers' matrices, and of the output head, of a stored model."""
    layers = head = embedding = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as stored:
            for name in stored.keys():  # noqa: SIM118 - it is no mapping
                shape = stored.get_slice(name).get_shape()
                if len(shape) != 2:
                    continue
                if "embed" in name:
                    embedding = shape[0] * shape[1]
                elif "lm_head" in name:
                    head = shape[0] * shape[1]
                else:
                    layers += shape[0] * shape[1]
    return layers, head or embedding


def trial_flops(
    weights: tuple[int, int], prompt_tokens: int, produced: float, responses: int
) -> float:
    """FLOP of a trial: `produced` tokens in `responses` rows after `prompt_tokens` tokens."""
    layers, head = weights
    return 2.0 * (layers * (prompt_tokens + produced - responses) + head * produced)
