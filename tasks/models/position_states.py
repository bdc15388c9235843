"""Hidden states at every position of a prompt, reduced as soon as a layer has made them.

What is kept of a state [rows, tokens, hidden] is one number per token, or the last few tokens:
holding every position of every layer of a batch would take hundreds of times as much.
"""

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

Progress = Callable[[int, int], None]
Reduce = Callable[[Tensor], Tensor]


def log_norms(
    loaded: LoadedModel,
    prompts: Sequence[Sequence[int]],
    *,
    rows: int,
    positions: int,
    on_progress: Progress | None = None,
) -> npt.NDArray[np.float64]:
    """Natural logarithm of the L2 norm of the residual stream, at each token of each prompt.

    The norm is taken in float32 whatever the model computes in, since squares overflow float16.
    The same prompts and `rows` give the same bits; other rows or padding change rounding only.

    Args:
        loaded: the model, unedited.
        prompts: token lists, rendered and encoded up to where the response begins.
        rows: prompts per forward pass.
        positions: first so many tokens of a prompt; position 0 is its first.
        on_progress: called with (prompts done, prompts in all).

    Returns:
        [prompts, L + 1 states, positions]. State 0 is what enters layer 0, state l + 1 what leaves
        layer l, before any final norm. NaN where a prompt has no such token, and where a state is
        the zero vector, which has no logarithm.

    Raises:
        ModelError: an empty prompt, or a state that is not finite; names prompt, state, position.
        ValueError: `rows` or `positions` below 1.
    """
    _require_positions(positions)
    shape = (len(prompts), len(loaded.anatomy.layers) + 1, positions)
    found = np.full(shape, np.nan)

    def take(batch: Sequence[int], states: npt.NDArray[np.float32]) -> None:
        for row, index in zip(states, batch, strict=True):
            own = row[:, row.shape[1] - len(prompts[index]) :][:, :positions]
            _require_finite(own, index)
            with np.errstate(divide="ignore"):
                logs = np.log(own.astype(np.float64))
            found[index, :, : own.shape[1]] = np.where(own > 0, logs, np.nan)

    _each_batch(loaded, prompts, rows, _norm, take, on_progress)
    return found


def last_states(
    loaded: LoadedModel,
    prompts: Sequence[Sequence[int]],
    *,
    rows: int,
    positions: int,
    on_progress: Progress | None = None,
) -> npt.NDArray[np.float32]:
    """What leaves every layer at the last tokens of each prompt.

    Args:
        positions: how many tokens, counted from the end; every prompt must have as many.

    Returns:
        [prompts, L layers, positions, hidden size]; the last position is the prompt's last token.

    Raises:
        ModelError: a prompt of fewer tokens, or a state that is not finite; names the prompt.
        ValueError: `rows` or `positions` below 1.
    """
    _require_positions(positions)
    require_tokens(prompts, rows)
    for index, prompt in enumerate(prompts):
        if len(prompt) < positions:
            raise ModelError(
                f"prompt {index} has {len(prompt)} tokens, fewer than the {positions} positions "
                "asked for; lower norms.positions"
            )
    layers = len(loaded.anatomy.layers)
    shape = (len(prompts), layers, positions, loaded.anatomy.hidden_size)
    found = np.empty(shape, dtype=np.float32)

    def take(batch: Sequence[int], states: npt.NDArray[np.float32]) -> None:
        for row, index in zip(states, batch, strict=True):
            _require_finite(row.sum(axis=-1, dtype=np.float64), index)
        found[list(batch)] = states[:, 1:]

    def tail(state: Tensor) -> Tensor:
        return state[:, -positions:]

    _each_batch(loaded, prompts, rows, tail, take, on_progress)
    return found


def _norm(state: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(state.float(), dim=-1)
    return norms


def _each_batch(
    loaded: LoadedModel,
    prompts: Sequence[Sequence[int]],
    rows: int,
    reduce: Reduce,
    take: Callable[[Sequence[int], npt.NDArray[np.float32]], None],
    on_progress: Progress | None,
) -> None:
    """Hand `take` the prompts of each batch and their reduced states [rows, states, ...]."""
    require_tokens(prompts, rows)
    done = 0
    with torch.inference_mode(), _reduced(loaded.anatomy.layers, reduce) as states:
        for batch in by_length(prompts, rows):
            states.clear()
            ids, mask, positions = pad_left([prompts[index] for index in batch], loaded.device)
            loaded.model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                use_cache=False,
                logits_to_keep=1,
            )
            take(batch, torch.stack(states, dim=1).numpy())
            done += len(batch)
            if on_progress is not None:
                on_progress(done, len(prompts))


@contextmanager
def _reduced(layers: Sequence[nn.Module], reduce: Reduce) -> Iterator[list[Tensor]]:
    """A list that each forward pass extends by its reduced states, float32 on the CPU."""
    states: list[Tensor] = []

    def keep(state: Tensor) -> None:
        states.append(reduce(state).to("cpu", torch.float32, copy=True))

    with every_state(layers, keep):
        yield states


def _require_finite(values: npt.NDArray[np.floating], prompt: int) -> None:
    """Refuse NaN and infinity in [states, positions]."""
    broken = np.argwhere(~np.isfinite(values))
    if len(broken):
        state, position = broken[0]
        raise ModelError(
            f"the hidden state of prompt {prompt} is not finite at state {state}, position "
            f"{position} of those kept; try dtype 'bfloat16' or 'float32'"
        )


def _require_positions(positions: int) -> None:
    if positions < 1:
        raise ValueError(f"positions must be at least 1, not {positions}")
