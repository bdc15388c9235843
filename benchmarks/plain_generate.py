"""Seconds per trial on the organism: our judge against plain `generate` on edited weights.

    python benchmarks/plain_generate.py [--trials 4] [--rows 512]

Both answer the same 128 harmful, 128 harmless and 64 borderline search prompts with at most 64 new
tokens, in float32, and both give the first-token logits. The plain way bakes the edit into the
weights, generates in batches of 128, and runs the harmless prompts again for the KL. The tokens of
both are compared; a difference is an error.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable

import torch

from tasks.models.anatomy import anatomy
from tasks.models.baking import bake
from tasks.models.batching import pad_left
from tasks.models.decoding import decode
from tasks.models.editing import build_edit
from tasks.models.loading import LoadedModel, load
from tasks.models.rendering import encode, render
from tasks.numerics.kernel import Kernel
from tasks.organism.card import prompts

CLASSES = ("harmful", "harmless", "borderline")
NEW_TOKENS = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--trials", type=int, default=4)
    parser.add_argument("--rows", type=int, default=512)
    options = parser.parse_args()
    loaded = load("organism", dtypes=("float32",), device="cpu")
    texts = [record["text"] for name in CLASSES for record in prompts(f"{name}-search")]
    tokens = encode(loaded.tokenizer, [render(loaded.tokenizer, text) for text in texts])
    generator = torch.Generator().manual_seed(0)
    ours, plain = [], []
    for _ in range(options.trials):
        layers, hidden = len(loaded.anatomy.layers), loaded.anatomy.hidden_size
        vector = torch.nn.functional.normalize(torch.randn(hidden, generator=generator), dim=0)
        vectors = dict.fromkeys(("attn_o_proj", "mlp_down_proj"), vector.expand(layers, hidden))
        weights = dict.fromkeys(vectors, Kernel(1.0, 4.0, 0.5, 4.0).weights(layers))

        def judge(vectors=vectors, weights=weights) -> list[list[int]]:  # type: ignore[no-untyped-def]
            edit = build_edit(loaded.anatomy, vectors, weights, "none", "residual")
            return decode(loaded, tokens, [edit], max_new_tokens=NEW_TOKENS, rows=options.rows)[
                0
            ].tokens

        def generate(vectors=vectors, weights=weights) -> list[list[int]]:  # type: ignore[no-untyped-def]
            model = copy.deepcopy(loaded.model)
            bake(anatomy(model), vectors, weights, "none", "residual")
            return plain_generate(model, loaded, tokens)

        seconds, answers = timed(judge)
        ours.append(seconds)
        seconds, expected = timed(generate)
        plain.append(seconds)
        if answers != expected:
            raise SystemExit("the tokens differ")
    print(f"ours   {min(ours):.2f} s per trial (best of {len(ours)}), {len(tokens)} prompts")
    print(f"plain  {min(plain):.2f} s per trial; ratio {min(plain) / min(ours):.2f}")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; same tokens")


def plain_generate(
    model: torch.nn.Module, loaded: LoadedModel, tokens: list[list[int]]
) -> list[list[int]]:
    """Greedy generation in batches of 128, then the harmless prompts again for their logits."""
    end, found = loaded.tokenizer.eos_token_id, []
    with torch.inference_mode():
        for first in range(0, len(tokens), 128):
            ids, mask, _ = pad_left(tokens[first : first + 128], loaded.device)
            out = model.generate(  # type: ignore[operator]
                input_ids=ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False
            )
            found += [row[ids.shape[1] :].tolist() for row in out]
        ids, mask, _ = pad_left(tokens[128:256], loaded.device)
        model(input_ids=ids, attention_mask=mask, logits_to_keep=1)
    return [row[: row.index(end)] if end in row else row for row in found]


def timed(work: Callable[[], list[list[int]]]) -> tuple[float, list[list[int]]]:
    started = time.perf_counter()
    answer = work()
    return time.perf_counter() - started, answer


if __name__ == "__main__":
    main()
