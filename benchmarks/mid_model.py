"""A trained chat model of 46.5 M parameters with the organism's tokenizer, for timings.

    python benchmarks/mid_model.py [--folder FOLDER]      # minutes; nothing if it is there already

What a trial costs depends on how long responses are, and what racing saves on how edits fare: a
random model says neither. Training one of this size from nothing takes over an hour on two cores.
So the organism is *grown*: every unit of it is copied, and what reads the copies is split among
them at random, in unequal shares that sum to one. That keeps the function exactly and lets copies
part when they are trained, which a short refusal phase in float32 then does. Every matrix has its
full size, and a trial meets prompts, refusals and responses like the organism's.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer, LlamaForCausalLM

from tasks.models.decoding import decode
from tasks.models.loading import load, quiet
from tasks.models.rendering import encode, render
from tasks.numerics.labels import is_refusal
from tasks.organism import MODEL_FOLDER, card, training

WIDTH, MLP = 5, 6  # copies of a residual unit and of a head, and of an MLP unit
UNEVENNESS = 0.5  # standard deviation of a copy's share, as a fraction of the even share
PHASE = replace(training.PHASES[1], steps=30, adamw_lr=2e-4)
CACHE = Path("~/.cache/tribunal-benchmarks").expanduser()
DEFAULT = CACHE / "mid-model"
MEASURED = "measured.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, default=DEFAULT)
    folder = obtain(parser.parse_args().folder)
    print(json.dumps({"folder": str(folder), **json.loads((folder / MEASURED).read_text())}))


def obtain(folder: Path = DEFAULT) -> Path:
    """The folder of the model, made if it is not there."""
    if not (folder / MEASURED).exists():
        make(folder)
    return folder


def make(folder: Path, seed: int = 0, phase: training.Phase = PHASE) -> None:
    """Grow the organism, train it on, measure it; write it all to `folder`."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL_FOLDER)
    with quiet():
        small = LlamaForCausalLM.from_pretrained(MODEL_FOLDER, dtype=torch.float32)
    model = grown(small, seed=seed)
    reached = training.refine(model, tokenizer, phase, seed=seed, on_progress=tell())
    training.save(model, tokenizer, folder)
    found = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "final_loss": reached.final_loss,
        **measure(folder),
    }
    (folder / MEASURED).write_text(json.dumps(found, indent=1) + "\n")


def grown(small: LlamaForCausalLM, *, seed: int = 0) -> LlamaForCausalLM:
    """A wider Llama with the same logits as `small`, up to rounding.

    Residual units and heads occur `WIDTH` times, MLP units `MLP` times. A copied unit has the same
    value everywhere, so the root mean square of the residual stays as it is.
    """
    config = small.config
    sizes = {
        "hidden_size": WIDTH * config.hidden_size,
        "num_attention_heads": WIDTH * config.num_attention_heads,
        "num_key_value_heads": WIDTH * config.num_key_value_heads,
        "intermediate_size": MLP * config.intermediate_size,
    }
    large = LlamaForCausalLM(type(config).from_dict(config.to_dict() | sizes))
    dice = torch.Generator().manual_seed(seed)
    state = {
        name: _grown_weight(name, weight.float(), dice)
        for name, weight in small.state_dict().items()
    }
    large.load_state_dict(state)
    return large.eval()


def _grown_weight(name: str, weight: Tensor, dice: torch.Generator) -> Tensor:
    """A weight's copies: rows repeat with the units they write, columns share what they read."""
    if "norm" in name:
        return weight.repeat(WIDTH)
    if "embed_tokens" in name:
        return weight.repeat(1, WIDTH)
    written = MLP if "gate_proj" in name or "up_proj" in name else WIDTH
    read = MLP if "down_proj" in name else WIDTH
    if "lm_head" in name:
        written = 1
    rows = weight.repeat(written, 1)
    uneven = torch.randn(len(rows), read, generator=dice) * UNEVENNESS
    shares = (1 + uneven - uneven.mean(1, keepdim=True)) / read
    return (shares[:, :, None] * rows[:, None, :]).flatten(1)


def measure(folder: Path) -> dict[str, dict[str, float]]:
    """Refusals and response lengths on the search split, unedited, float32, 64 new tokens."""
    loaded = load(str(folder), dtypes=("float32",), device="cpu")
    found = {}
    for name in ("harmful-search", "harmless-search"):
        texts = [record["text"] for record in card.prompts(name)]
        tokens = encode(loaded.tokenizer, [render(loaded.tokenizer, text) for text in texts])
        (answers,) = decode(loaded, tokens, max_new_tokens=card.MAX_NEW_TOKENS, rows=card.ROWS)
        responses = loaded.tokenizer.batch_decode(answers.tokens, skip_special_tokens=True)
        found[name] = {
            "n": len(texts),
            "refused": sum(is_refusal(card.LABELLER, text) for text in responses),
            "right": _right(responses, card.prompts(name)),
            "ended": sum(answers.ended),
            "mean_tokens": round(sum(map(len, answers.tokens)) / len(texts), 2),
        }
    return found


def _right(responses: Sequence[str], records: card.PromptRecords) -> int:
    pairs = zip(records, responses, strict=True)
    return sum(record["ingredient"] in text.lower() for record, text in pairs)


def tell() -> Callable[[str, int, int, float], None]:
    """Says how far a training is."""
    started = time.monotonic()

    def tell(name: str, step: int, steps: int, loss: float) -> None:
        left = (time.monotonic() - started) / step * (steps - step)
        print(f"{name} {step}/{steps}, loss {loss:.3f}, {left:.0f} s left", file=sys.stderr)

    return tell


if __name__ == "__main__":
    main()
