"""Every head silenced in turn: rows of partial passes against one full forward pass per head.

    python benchmarks/heads.py [--model organism] [--prompts 64] [--ablation ua] [--rounds 3]

Both take the same prompts in batches of as many tokens and give the same numbers (the largest
difference of any KL is printed). They take turns; run nothing else meanwhile.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch

from tasks.models.batching import by_length, pad_left
from tasks.models.head_ablation import ablated, scale_table
from tasks.models.head_effects import TOKENS, HeadProbe
from tasks.models.loading import load
from tasks.models.rendering import encode, render
from tasks.numerics.divergence import first_token_kl
from tasks.organism.card import prompts


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="organism")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--ablation", choices=("ua", "sc"), default="ua")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    loaded = load(options.model, dtypes=("float32",), device="cpu")
    texts = [row["text"] for row in prompts("harmful-search")[: options.prompts]]
    tokens = encode(loaded.tokenizer, [render(loaded.tokenizer, text) for text in texts])
    how = options.ablation

    def partial() -> np.ndarray:
        probe = HeadProbe(loaded, tokens, how, 0.0, rows=512)
        return probe.without(probe.heads).kl

    def full() -> np.ndarray:
        """One pass of the whole model per head, in batches of the same number of tokens."""
        heads = HeadProbe(loaded, tokens[:1], how, 0.0, rows=1).heads
        rows = max(1, TOKENS // max(map(len, tokens)))
        kl = np.empty((len(heads), len(tokens)))
        for batch in by_length(tokens, rows):
            ids, mask, positions = pad_left([tokens[i] for i in batch], loaded.device)
            given = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
            given |= {"use_cache": False, "logits_to_keep": 1}

            def logits(
                group: list[tuple[int, int]], given: dict[str, object] = given
            ) -> torch.Tensor:
                scales = scale_table(loaded, [group], 0.0)
                with torch.inference_mode(), ablated(loaded, how, scales):
                    return loaded.model(**given).logits[:, -1]

            base = logits([])
            for place, head in enumerate(heads):
                kl[place, batch] = first_token_kl(base, logits([head])).numpy()
        return kl

    one, other = partial(), full()
    off = float(np.abs(one - other).max())
    pairs = [(timed(full), timed(partial)) for _ in range(options.rounds)]
    ratios = sorted(whole / part for whole, part in pairs)
    print(
        f"{len(tokens)} prompts, ablation {how}, {torch.get_num_threads()} threads: full "
        f"{statistics.median(w for w, _ in pairs):.2f} s, partial "
        f"{statistics.median(p for _, p in pairs):.2f} s; full / partial "
        f"{statistics.median(ratios):.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f}); a KL of up "
        f"to {one.max():.2g} nats differs by {off:.1e} at most"
    )


def timed(work: Callable[[], object]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


if __name__ == "__main__":
    main()
