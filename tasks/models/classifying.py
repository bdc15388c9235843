"""Sequence classifiers: a text, or a pair of texts, in; the probability of one of its labels out.

Any sequence-classification model of transformers will do, from safetensors only and without code of
its own. Batches are padded on the right, where encoders and decoders alike expect it: a decoder's
answer is read at its last token that is no padding.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from artifacts.errors import ModelError
from tasks.models.identity import local_folder
from tasks.models.loading import FAILURES, first_line, quiet, require_files, usable_device

Text = str | tuple[str, str]
Inputs = dict[str, list[int]]  # names of the model's inputs, one number per token
TOKENS = 8192  # of a batch, padding included
ENDLESS = 10**6  # what tokenizers that know no limit say exceeds this
COUNT_FROM_PADDING = ("roberta", "camembert", "mpnet", "longformer", "data2vec-text")


class Score(NamedTuple):
    """Probability of the label, 0-1, and whether the text had to be cut to fit."""

    value: float
    truncated: bool


@dataclass(frozen=True)
class SequenceClassifier:
    """A loaded classifier.

    Attributes:
        room: longest input, in tokens.
        padding: the token that fills rows.
        independent: each label has a probability of its own (a sigmoid); else they share one.
        inputs: what the model takes of what its tokenizer gives, the attention mask aside.
    """

    model: Any
    tokenizer: Any
    device: torch.device
    room: int
    padding: int
    independent: bool
    inputs: tuple[str, ...]


def label_names(source: str, revision: str | None = None) -> tuple[str, ...]:
    """What a classifier calls its outputs, in their order; no weights are loaded.

    Raises:
        ModelError: its configuration cannot be read, or it needs code of its own.
    """
    config = _config(source, revision)
    names: dict[int, str] = config.id2label
    return tuple(str(names[index]) for index in sorted(names))


def load_classifier(
    source: str,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    device: str | None = None,
) -> SequenceClassifier:
    """Load a classifier and its tokenizer.

    Args:
        source: a folder or hub id.
        revision: commit on the hub.
        dtype: "auto" is the checkpoint's own.
        device: None is the first GPU, or the CPU without one.

    Raises:
        ModelError: it is no sequence classifier, lacks weights, or cannot be read.
    """
    folder = local_folder(source)
    if folder is not None:
        require_files(folder)
    where, options = str(folder or source), _options(revision)
    target = usable_device(device)
    config = _config(source, revision)
    with quiet():
        try:
            tokenizer = AutoTokenizer.from_pretrained(where, **options)
            model, report = AutoModelForSequenceClassification.from_pretrained(
                where, dtype=dtype, use_safetensors=True, output_loading_info=True, **options
            )
        except FAILURES as error:
            raise _unusable(source, error) from error
    missing = sorted(report["missing_keys"])
    if missing:  # transformers fills these with random numbers, a judge's head among them
        raise ModelError(
            f"'{source}' is no trained sequence classifier: its weights lack {len(missing)} "
            f"tensors, such as '{missing[0]}'"
        )
    tokenizer.truncation_side = "right"  # a refusal shows at the beginning
    padding = _padding(model.config, tokenizer)
    model.config.get_text_config().pad_token_id = padding
    model.config.use_cache = False
    alone = config.num_labels == 1 or config.problem_type == "multi_label_classification"
    model.to(target).eval().requires_grad_(False)
    taken = inspect.signature(model.forward).parameters
    types = "token_type_ids" in taken and "token_type_ids" in tokenizer.model_input_names
    return SequenceClassifier(
        model,
        tokenizer,
        target,
        room=_room(model.config, tokenizer),
        padding=padding,
        independent=alone,
        inputs=("input_ids", "token_type_ids") if types else ("input_ids",),
    )


def scores(
    classifier: SequenceClassifier, texts: Sequence[Text], label: int, rows: int = 512
) -> Iterator[tuple[int, Score]]:
    """The score of every text, by its index, batch by batch, longest first.

    Longest first: what does not fit into memory fails at once, and the time left is overestimated
    rather than under. Batches hold at most `rows` rows and TOKENS tokens. What a text is batched
    with changes its score by rounding only.

    Raises:
        ModelError: a score is not finite.
    """
    encoded = [_encode(classifier, text) for text in texts]
    lengths = [part["input_ids"] for part, _ in encoded]
    for batch in _batches(lengths, rows):
        values = _probabilities(classifier, [encoded[index][0] for index in batch], label)
        for index, value in zip(batch, values, strict=True):
            yield index, Score(value, encoded[index][1])


def _batches(tokens: Sequence[Sequence[int]], rows: int) -> Iterator[list[int]]:
    """Indices, the longest first, in batches that fit."""
    order = sorted(range(len(tokens)), key=lambda index: -len(tokens[index]))
    while order:
        size = max(1, min(rows, TOKENS // len(tokens[order[0]])))
        yield order[:size]
        order = order[size:]


def _encode(classifier: SequenceClassifier, text: Text) -> tuple[Inputs, bool]:
    """A text's inputs, token by token, and whether it was cut. No text is one padding token."""
    parts = (text,) if isinstance(text, str) else text
    with quiet():  # transformers warns of each text that is too long
        found = classifier.tokenizer(*parts)
        cut = len(found["input_ids"]) > classifier.room
        if cut:
            options = {"truncation": True, "max_length": classifier.room}
            found = classifier.tokenizer(*parts, **options)
    filler = {"input_ids": classifier.padding, "token_type_ids": 0}
    return {name: found[name] or [filler[name]] for name in classifier.inputs}, cut


@torch.inference_mode()
def _probabilities(
    classifier: SequenceClassifier, rows: Sequence[Inputs], label: int
) -> list[float]:
    """Probability of the label for each row of one batch."""
    inputs = {
        name: _pad_right([row[name] for row in rows], classifier.padding * (name == "input_ids"))
        for name in rows[0]
    }
    inputs["attention_mask"] = _pad_right([[1] * len(row["input_ids"]) for row in rows], 0)
    placed = {name: values.to(classifier.device) for name, values in inputs.items()}
    logits = classifier.model(**placed).logits.double()
    found = torch.sigmoid(logits) if classifier.independent else torch.softmax(logits, dim=-1)
    chosen: list[float] = found[:, label].tolist()
    if not all(map(_is_probability, chosen)):
        raise ModelError("the classifier's scores are not finite; try --dtype float32")
    return chosen


def _is_probability(value: float) -> bool:
    return 0.0 <= value <= 1.0  # false for NaN


def _pad_right(rows: Sequence[list[int]], filler: int) -> Tensor:
    """Rows of numbers as one int64 rectangle [rows, width]."""
    return torch.tensor(list(itertools.zip_longest(*rows, fillvalue=filler))).T.contiguous()


def _config(source: str, revision: str | None) -> Any:
    where = str(local_folder(source) or source)
    try:
        with quiet():
            return AutoConfig.from_pretrained(where, **_options(revision))
    except FAILURES as error:
        raise _unusable(source, error) from error


def _options(revision: str | None) -> dict[str, Any]:
    return {"revision": revision or "main", "trust_remote_code": False}


def _unusable(source: str, error: Exception) -> ModelError:
    if "trust_remote_code" in str(error):
        return ModelError(
            f"'{source}' needs code from its own repository, which judges never run; "
            "choose another classifier"
        )
    return ModelError(
        f"cannot load the classifier '{source}': {first_line(error)}; give a folder or hub id of "
        "a sequence-classification model with safetensors weights"
    )


def _padding(config: Any, tokenizer: Any) -> int:
    """The padding token: the model's own, else the tokenizer's, else its end token, else 0."""
    own = config.get_text_config().pad_token_id
    known = (own, tokenizer.pad_token_id, tokenizer.eos_token_id)
    return int(next((token for token in known if token is not None), 0))


def _room(config: Any, tokenizer: Any) -> int:
    """The longest input that both the model's positions and its tokenizer allow, in tokens."""
    text = config.get_text_config()
    positions = getattr(text, "max_position_embeddings", None) or ENDLESS
    if any(name in text.model_type for name in COUNT_FROM_PADDING):
        positions -= (text.pad_token_id or 0) + 1  # positions before the first are never used
    return int(min(positions, tokenizer.model_max_length, ENDLESS))
