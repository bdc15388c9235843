"""Residuals at the last prompt position, one forward pass per prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from artifacts.errors import ModelError
from tasks.models.batching import by_length, pad_left, require_tokens
from tasks.models.state_hooks import every_state

if TYPE_CHECKING:
    from tasks.models.loading import LoadedModel


def capture_residuals(
    loaded: LoadedModel,
    prompts: Sequence[Sequence[int]],
    *,
    rows: int,
    on_progress: Callable[[int, int], None] | None = None,
) -> npt.NDArray[np.float32]:
    """Residual stream of every prompt at its last token.

    float32 whatever the model computes in: float16 overflows where residual norms reach 27,601.
    The same prompts and the same `rows` give the same bits; another `rows` changes rounding only.

    Args:
        loaded: the model, unedited.
        prompts: token lists, rendered and encoded up to where the response begins.
        rows: prompts per forward pass.
        on_progress: called with (prompts done, prompts in all).

    Returns:
        [prompts, L + 1 states, hidden size] in the order of `prompts`. State 0 is what enters
        layer 0, state l + 1 what leaves layer l, before any final norm.

    Raises:
        ModelError: an empty prompt, or a residual that is not finite; names prompt and state.
        ValueError: `rows` below 1.
    """
    require_tokens(prompts, rows)
    layers = loaded.anatomy.layers
    shape = (len(prompts), len(layers) + 1, loaded.anatomy.hidden_size)
    residuals = np.empty(shape, dtype=np.float32)
    done = 0
    with torch.inference_mode(), _last_position(layers) as states:
        for batch in by_length(prompts, rows):
            states.clear()
            _forward(loaded, [prompts[index] for index in batch])
            residuals[batch] = torch.stack(states, dim=1).numpy()
            _require_finite(residuals[batch], batch)
            done += len(batch)
            if on_progress is not None:
                on_progress(done, len(prompts))
    return residuals


def _forward(loaded: LoadedModel, prompts: Sequence[Sequence[int]]) -> None:
    ids, mask, positions = pad_left(prompts, loaded.device)
    loaded.model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions,
        use_cache=False,
        logits_to_keep=1,
    )


@contextmanager
def _last_position(layers: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """A list that each forward pass extends by its states, float32 [rows, hidden] on the CPU."""
    states: list[Tensor] = []

    def keep(state: Tensor) -> None:
        # a copy: a view would keep every position of every state alive
        states.append(state[:, -1].to("cpu", torch.float32, copy=True))

    with every_state(layers, keep):
        yield states


def _require_finite(residuals: npt.NDArray[np.float32], batch: Sequence[int]) -> None:
    """The float64 sum is finite exactly if every float32 in it is, and costs one pass."""
    broken = np.argwhere(~np.isfinite(residuals.sum(axis=-1, dtype=np.float64)))
    if len(broken):
        row, state = broken[0]
        raise ModelError(
            f"the residual of prompt {batch[row]} is not finite at state {state}; "
            "try dtype 'bfloat16' or 'float32'"
        )
