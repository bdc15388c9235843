"""Organisms of other architectures: the shipped one's language, prompts and training, other layers.

    python benchmarks/organisms.py [--kinds qwen3 olmo2] [--folder FOLDER]     # minutes each

What a sampler finds on one small Llama may be that Llama's. These are as large and went through the
same two phases: Qwen3 normalises queries and keys, OLMo 2 what its sublayers write, so that edits
are made in another frame. Beside each folder lies a config, KIND.toml, that runs the organism's
protocol on it. What the model does unedited is in its measured.json.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import mid_model
from torch import nn
from transformers import (
    Olmo2Config,
    Olmo2ForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from flows.settings import shipped
from tasks.organism import training

KINDS: dict[str, tuple[Any, Any]] = {
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "olmo2": (Olmo2Config, Olmo2ForCausalLM),
}
FOLDER = mid_model.CACHE / "organisms"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--folder", type=Path, default=FOLDER)
    options = parser.parse_args()
    for kind in options.kinds:
        config = obtain(kind, options.folder)
        measured = json.loads((options.folder / kind / mid_model.MEASURED).read_text())
        print(json.dumps({"config": str(config), **measured}))


def obtain(kind: str, folder: Path = FOLDER) -> Path:
    """The config that runs an organism of this kind, which is trained if it is not there."""
    own, config = folder / kind, folder / f"{kind}.toml"
    if not (own / mid_model.MEASURED).exists():
        training.train(
            own,
            build=lambda tokenizer: new(kind, tokenizer),
            autocast=False,
            on_progress=mid_model.tell(),
        )
        found = mid_model.measure(own)
        (own / mid_model.MEASURED).write_text(json.dumps(found, indent=1) + "\n")
    text = shipped("configs")["organism"].read_text()
    text = text.replace('id = "organism"', f"id = {json.dumps(str(own))}")
    config.write_text(text.replace('name = "organism"', f'name = "organism-{kind}"'))
    return config


def new(kind: str, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """A random model of this kind in the organism's shape."""
    make_config, make_model = KINDS[kind]
    shape = training.new_model(tokenizer).config.to_dict()
    names = (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
        "num_key_value_heads max_position_embeddings initializer_range tie_word_embeddings "
        "eos_token_id pad_token_id"
    )
    config = make_config(
        **{name: shape[name] for name in names.split()}, head_dim=32, bos_token_id=None
    )
    model: PreTrainedModel = make_model(config)
    nn.init.normal_(model.get_input_embeddings().weight, std=training.EMBEDDING_STD)
    return model


if __name__ == "__main__":
    main()
