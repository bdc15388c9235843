"""How far an edit moves a model along responses that the unedited model gave.

A first-token KL says nothing of what happens later in a response. Here both models read the same
prompt and the same response, token by token (teacher forcing), and at every token the two next-
token distributions are compared. The edit is applied by hooks, as in a trial. Of both passes only
the last layer's states at the response's places are kept; they become logits a few places at a
time, so that a large vocabulary times a long response never lies in memory at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from artifacts.errors import ModelError
from tasks.models.batching import require_tokens
from tasks.models.decoding import Response
from tasks.models.editing import Edit, applied
from tasks.models.lens import (
    LENS_NUMBERS,
    forced_inputs,
    forced_states,
    lens,
    passes,
    require_same_head,
)
from tasks.numerics.divergence import first_token_kl

if TYPE_CHECKING:
    from tasks.models.loading import LoadedModel

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Forced:
    """One response under an edit, its end-of-sequence token counted where there was one.

    Attributes:
        kl: [tokens] KL(unedited || edited) of the distribution each token was chosen from, nats.
        changed: [tokens] whether the edited model's likeliest token is another.
    """

    kl: Floats
    changed: npt.NDArray[np.bool_]


def forced_divergences(
    loaded: LoadedModel,
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Response],
    edit: Edit,
    *,
    rows: int,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Forced]:
    """KL(unedited || edited) at every token of every response, in the order of the prompts.

    Both models read the same batches, so an edit that does nothing gives exactly 0.

    Args:
        loaded: the model, unedited.
        prompts: token lists, rendered and encoded.
        responses: what the unedited model answered.
        edit: the edit to measure.
        rows: responses per forward pass, at most.
        on_progress: called with (responses done, responses in all).

    Raises:
        ModelError: an empty prompt, a response without a token, logits that are not finite, or a
            model whose logits are not made of its last state as `lens` does.
        ValueError: `rows` below 1, or not one response per prompt.
    """
    require_tokens(prompts, rows)
    inputs, counts = forced_inputs(prompts, responses)
    found: dict[int, Forced] = {}
    with torch.inference_mode():
        for batch in passes(inputs, rows):
            texts, sizes = [inputs[i] for i in batch], [counts[i] for i in batch]
            base = _final_states(loaded, texts, sizes, batch)
            with applied(loaded.anatomy, [edit]):
                edited = _final_states(loaded, texts, sizes, batch)
            kl, changed = _compare(loaded, base, edited)
            owners = np.repeat(batch, sizes)
            broken = owners[np.isnan(kl)]
            if broken.size:
                raise ModelError(
                    f"the KL along response {broken[0]} is not a number; try another dtype"
                )
            for index in batch:
                found[index] = Forced(kl[owners == index], changed[owners == index])
            if on_progress is not None:
                on_progress(len(found), len(inputs))
    return [found[index] for index in range(len(inputs))]


def _final_states(
    loaded: LoadedModel,
    texts: Sequence[Sequence[int]],
    sizes: Sequence[int],
    batch: Sequence[int],
) -> Tensor:
    """The last layer's states [all places, d], row after row."""
    (states,), logits = forced_states(loaded, loaded.anatomy.layers[-1:], texts, sizes)
    require_same_head(loaded, states, logits, sizes, batch)
    return states


def _compare(
    loaded: LoadedModel, base: Tensor, edited: Tensor
) -> tuple[Floats, npt.NDArray[np.bool_]]:
    step = max(1, LENS_NUMBERS // loaded.model.get_output_embeddings().weight.shape[0])
    kls, changes = [], []
    for one, other in zip(torch.split(base, step), torch.split(edited, step), strict=True):
        p, q = lens(loaded, one), lens(loaded, other)
        kls.append(first_token_kl(p, q).cpu())
        changes.append((p.argmax(-1) != q.argmax(-1)).cpu())
    return torch.cat(kls).numpy(), torch.cat(changes).numpy()
