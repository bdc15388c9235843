"""The model of a run: found, loaded in the first precision that works, and described.

The description's content, not the place it was loaded from, is what later artifacts depend on.
"""

from __future__ import annotations

import gc
import sys
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

import polars as pl

from artifacts.errors import ModelError
from artifacts.keys import Json, digest
from artifacts.schemas import MODELS, polars_schema
from artifacts.specs import ModelSpec
from artifacts.store import Ref
from tasks.models.identity import ModelIdentity, resolve
from tasks.stage import Made, current, stage

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tasks.models.loading import LoadedModel

PREFIX_PROMPTS = 100  # per class, for response-prefix detection, as HERETIC 1.4.0 does


@dataclass(frozen=True)
class Card:
    """What a run needs to know of its model without loading it."""

    dtype: str
    n_layers: int
    hidden_size: int
    system_prompt: str | None
    response_prefix: str


def model_identity(spec: ModelSpec) -> Json:
    """What of a model spec counts: content or revision, precision and addressing; not its path."""
    found = _resolved(spec)
    counts = spec.model_dump(mode="json", exclude={"id", "revision"})
    return {**counts, "content": found.digest}


@stage(
    "models",
    version=1,
    identify={"spec": model_identity},
    label=lambda spec, **_: f"model {spec.id}",
    work=lambda **_: 1,
)
def probe_model(*, spec: ModelSpec, harmful: Ref, harmless: Ref) -> Made:
    """Load the model, find its precision and the prefix all its responses share.

    Raises:
        ModelError: it cannot be loaded, edited or prompted.
    """
    loaded = open_model(spec, spec.dtype)
    found = _resolved(spec)
    row = {
        "identity": found.digest,
        "architecture": type(loaded.model).__name__,
        "dtype": loaded.dtype,
        "quantization": spec.quantization,
        "n_layers": len(loaded.anatomy.layers),
        "hidden_size": loaded.anatomy.hidden_size,
        "vocabulary": loaded.model.get_output_embeddings().weight.shape[0],
        "system_prompt": spec.system_prompt,
        "response_prefix": _response_prefix(loaded, spec, [harmless, harmful]),
    }
    return Made(pl.DataFrame([row], schema=polars_schema(MODELS)))


def _resolved(spec: ModelSpec) -> ModelIdentity:
    """The model behind a spec; what it resolves to is fixed for the life of the process."""
    asked = (spec.id, spec.revision)
    if asked not in _identities:
        _identities[asked] = resolve(*asked)
    return _identities[asked]


_identities: dict[tuple[str, str | None], ModelIdentity] = {}


def read_card(model: Ref) -> Card:
    """The card of a probed model."""
    row = current().store.read(model).row(0, named=True)
    return Card(**{name: row[name] for name in Card.__dataclass_fields__})


def open_model(spec: ModelSpec, dtypes: Sequence[str]) -> LoadedModel:
    """The model of a spec, which this process keeps: one per device and slot.

    Workers in other processes give their devices back first, so that no device holds two models.
    """
    runtime = current()
    place = (runtime.device, runtime.slot)
    wanted = digest([model_identity(spec), runtime.device_map, list(dtypes)])
    with _loading:  # loading changes torch's default dtype, for all threads
        kept, loaded = _open.get(place, ("", None))
        if loaded is None or kept != wanted:
            if runtime.workers is not None:
                runtime.workers.rest()
            _open.pop(place, None)
            loaded = None  # two models may be more than the device holds
            _free_memory()
            runtime.reporter.said(f"loading {spec.id}")
            loaded = _load(spec, dtypes)
            _open[place] = (wanted, loaded)
    return loaded


def _load(spec: ModelSpec, dtypes: Sequence[str]) -> LoadedModel:
    from tasks.models.loading import load

    runtime, found = current(), _resolved(spec)
    return load(
        found.source,
        revision=found.revision,
        dtypes=tuple(dtypes),
        quantization=spec.quantization,
        trust_remote_code=spec.trust_remote_code,
        device=runtime.device,
        device_map=runtime.device_map,
    )


def close_models() -> None:
    """Let go of every model of this process, and of the memory they took on GPUs."""
    _open.clear()
    _free_memory()


def _free_memory() -> None:
    """Give back what dropped models took."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


_open: dict[tuple[str | None, int], tuple[str, LoadedModel]] = {}
_loading = threading.Lock()


def encode_prompts(
    loaded: LoadedModel, card: Card, prompts: pl.DataFrame, new_tokens: int = 0
) -> list[list[int]]:
    """Tokens of every prompt: chat template, generation prompt and response prefix.

    Raises:
        ModelError: a prompt and `new_tokens` more do not fit into the model's positions.
    """
    from tasks.models.rendering import encode, render

    rendered = [
        render(loaded.tokenizer, text, system or card.system_prompt, card.response_prefix)
        for text, system in prompts.select("text", "system_prompt").iter_rows()
    ]
    tokens = encode(loaded.tokenizer, rendered)
    longest = max(map(len, tokens))
    room = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None)
    if room is not None and longest + new_tokens > room:
        raise ModelError(
            f"a prompt of {longest} tokens and {new_tokens} new ones exceed the model's {room} "
            "positions; shorten the prompts or judging.max_new_tokens"
        )
    return tokens


def _response_prefix(loaded: LoadedModel, spec: ModelSpec, sets: list[Ref]) -> str:
    if spec.response_prefix is not None:
        return spec.response_prefix
    from tasks.models.decoding import decode
    from tasks.models.rendering import detect_response_prefix, encode, render

    runtime = current()
    prompts = [
        render(loaded.tokenizer, text, system or spec.system_prompt, "")
        for ref in sets
        for text, system in runtime.store.read(ref, ["text", "system_prompt"])
        .head(PREFIX_PROMPTS)
        .iter_rows()
    ]

    def respond(rendered: Sequence[str]) -> list[str]:
        tokens = encode(loaded.tokenizer, rendered)
        answer = decode(loaded, tokens, max_new_tokens=32, rows=runtime.rows)[0]
        texts: list[str] = loaded.tokenizer.batch_decode(answer.tokens, skip_special_tokens=False)
        return texts

    prefix: str = detect_response_prefix(prompts, respond)
    return prefix
