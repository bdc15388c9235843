"""How many tokens a pass should have on this machine: measured once per model and machine.

On a processor a pass that leaves the caches is slower than two that fit; on a GPU it is the other
way round. A short timing decides. It changes cost and never a token, so it is kept beside the
user's other caches, not among the artifacts.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from tasks.models.loading import LoadedModel

SIZES = (512, 1024, 2048, 4096, 8192, 16384, 32768)  # tokens
WIDTH = 32  # tokens of a row: about a prompt
SECONDS = 2.0  # for the whole probe, if the smallest size leaves any
MARGIN = 1.05  # a larger pass must be faster by so much, for it takes more memory
LOGITS_SHARE = 0.125  # of free memory, for the logits of one pass


def tokens_per_pass(loaded: LoadedModel) -> int:
    """The fastest number of tokens for one forward pass; from the cache if it was measured."""
    file, name = cache_file(), _name(loaded)
    known = _read(file)
    if name not in known:
        known[name] = measure(loaded)
        if 2 * known[name] <= _fitting(loaded):  # memory did not decide
            _write(file, known)
    return min(known[name], _fitting(loaded))


def measure(loaded: LoadedModel) -> int:
    """Time forward passes of growing size for as long as they become faster per token."""
    best, rate, left = SIZES[0], 0.0, SECONDS
    for size in SIZES:
        if size > _fitting(loaded):
            break
        seconds = min(_timed(loaded, size) for _ in range(2))
        left -= 2 * seconds
        if size / seconds > MARGIN * rate:
            best, rate = size, size / seconds
        elif loaded.device.type == "cpu":
            break
        if left < 4 * seconds:  # what the next size would take
            break
    return best


def cache_file() -> Path:
    """Where measurements are kept: the user's cache folder."""
    folder = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(folder) / "tribunal" / "chunks.json"


def _fitting(loaded: LoadedModel) -> int:
    """The largest of the sizes whose logits, in float32, take at most their share of memory."""
    from tasks.models.engine import free_memory

    vocabulary = loaded.model.config.get_text_config().vocab_size
    room = LOGITS_SHARE * free_memory(loaded.device) / (4 * vocabulary)
    return max((size for size in SIZES if size <= room), default=SIZES[0])


def _timed(loaded: LoadedModel, tokens: int) -> float:
    ids = torch.ones(tokens // WIDTH, WIDTH, dtype=torch.long, device=loaded.device)
    with torch.inference_mode():
        _wait(loaded.device)
        started = time.perf_counter()
        loaded.model(input_ids=ids, use_cache=False, logits_to_keep=1)
        _wait(loaded.device)
    return time.perf_counter() - started


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _name(loaded: LoadedModel) -> str:
    """What a measurement holds for: shape of the model, precision, device, threads."""
    device = loaded.device
    told = [
        loaded.model.config.to_json_string(),
        loaded.dtype,
        torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor(),
        os.cpu_count(),
        torch.get_num_threads(),
        torch.__version__,
    ]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]


def _read(file: Path) -> dict[str, int]:
    """What is known; a file that cannot be read or is no table of numbers is as good as none."""
    try:
        known = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    valid = isinstance(known, dict) and all(isinstance(v, int) and v > 0 for v in known.values())
    return known if valid else {}


def _write(file: Path, known: dict[str, int]) -> None:
    """Keep what is known, whole or not at all; a folder that cannot be written costs a probe."""
    partial = file.with_suffix(f".{os.getpid()}")
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(known, indent=1) + "\n")
        partial.replace(file)
