"""Activation capture against a bare forward pass over the same tokens, in one run and in turns.

    python benchmarks/capture.py [--model organism] [--rounds 5] [--rows 128]

Both take the 800 direction prompts in the same batches; the bare pass keeps nothing.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from tasks.models.batching import by_length, pad_left
from tasks.models.capture import capture_residuals
from tasks.models.loading import load
from tasks.models.rendering import encode, render
from tasks.organism.card import prompts


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="organism")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=128)
    options = parser.parse_args()
    loaded = load(options.model, dtypes=("float32",), device="cpu")
    texts = [r["text"] for name in ("harmful", "harmless") for r in prompts(f"{name}-direction")]
    tokens = encode(loaded.tokenizer, [render(loaded.tokenizer, text) for text in texts])

    def bare() -> None:
        with torch.inference_mode():
            for batch in by_length(tokens, options.rows):
                ids, mask, positions = pad_left([tokens[i] for i in batch], loaded.device)
                loaded.model(
                    input_ids=ids,
                    attention_mask=mask,
                    position_ids=positions,
                    use_cache=False,
                    logits_to_keep=1,
                )

    def capture() -> None:
        capture_residuals(loaded, tokens, rows=options.rows)

    bare(), capture()
    pairs = [(timed(bare), timed(capture)) for _ in range(options.rounds)]
    ratios = sorted(captured / plain for plain, captured in pairs)
    print(
        f"{len(tokens)} prompts: bare {statistics.median(p for p, _ in pairs):.3f} s, "
        f"capture {statistics.median(c for _, c in pairs):.3f} s; ratio "
        f"{statistics.median(ratios):.3f} ({ratios[0]:.3f}-{ratios[-1]:.3f})"
    )


def timed(work: Callable[[], None]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
