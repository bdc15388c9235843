"""States at every token of a response, forced or generated, after its prompt.

All responses of a batch end in its last column, so the tokens that count are its last columns. A
hook reduces each state as it appears (to scalar products with directions, or to one vector per
response): whole states of many long responses would be gigabytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from artifacts.errors import ModelError
from tasks.models.batching import by_length, pad_left, require_tokens
from tasks.models.rendering import encode
from tasks.models.state_hooks import every_state

if TYPE_CHECKING:
    from tasks.models.loading import LoadedModel

Tokens = Sequence[Sequence[int]]
Progress = Callable[[int, int], None]
# (state number, states [rows, tokens, hidden] float32, 1 where a token is of the response)
Reduce = Callable[[int, Tensor, Tensor], Tensor]
Pooling = Literal["last", "mean"]

MOST_LOGITS = 2**26  # of a forward pass, 256 MB of float32


@dataclass(frozen=True)
class Projected:
    """One response: scalar products of its states, and how unexpected its tokens were.

    Attributes:
        projections: float64 [tokens, states, directions].
        surprise: float64 [tokens], -ln of the probability the model gave the token, nats.
    """

    projections: npt.NDArray[np.float64]
    surprise: npt.NDArray[np.float64]


def encode_responses(
    tokenizer: Any, rendered: Sequence[str], responses: Sequence[str]
) -> list[tuple[list[int], list[int]]]:
    """Tokens of prompts and of the responses that follow them.

    Both are encoded as one text, as a model would have written it, and split where they part from
    the prompt alone. A token that spans the boundary is the response's.

    Raises:
        ModelError: a response has no tokens; names it by its index.
    """
    alone = encode(tokenizer, rendered)
    whole = encode(tokenizer, [p + r for p, r in zip(rendered, responses, strict=True)])
    found = []
    for index, (prompt, both) in enumerate(zip(alone, whole, strict=True)):
        shared = next(
            (at for at, pair in enumerate(zip(prompt, both, strict=False)) if pair[0] != pair[1]),
            min(len(prompt), len(both)),
        )
        if shared == len(both):
            raise ModelError(f"response {index} has no tokens")
        found.append((both[:shared], both[shared:]))
    return found


def response_states(
    loaded: LoadedModel,
    prompts: Tokens,
    responses: Tokens,
    *,
    rows: int,
    on_progress: Progress | None = None,
) -> list[npt.NDArray[np.float32]]:
    """Residual stream at every response token: [tokens, L + 1 states, hidden] per response.

    The state at a token has seen that token. State 0 is what enters layer 0, state l + 1 what
    leaves layer l, before any final norm. Large: for the other functions' tests and for few texts.

    Raises as `project_responses` does.
    """
    found: dict[int, npt.NDArray[np.float32]] = {}
    walk = _walk(loaded, prompts, responses, lambda _, states, mask: states, rows, on_progress)
    for batch, states, _ in walk:
        stacked = torch.stack(states, dim=2).numpy()
        for row, index in enumerate(batch):
            found[index] = stacked[row, -len(responses[index]) :].copy()
    return [found[index] for index in range(len(responses))]


def pooled_states(
    loaded: LoadedModel,
    prompts: Tokens,
    responses: Tokens,
    *,
    pooling: Pooling,
    rows: int,
    on_progress: Progress | None = None,
) -> npt.NDArray[np.float32]:
    """One vector per response and state: [responses, L + 1 states, hidden].

    Args:
        pooling: "last": at the last response token; "mean": mean over the response's tokens.

    Raises as `project_responses` does.
    """

    def reduce(_: int, states: Tensor, mask: Tensor) -> Tensor:
        if pooling == "last":
            return states[:, -1].clone()
        weights = mask.to(states.dtype)[..., None]
        return torch.where(mask[..., None] > 0, states, 0.0).sum(1) / weights.sum(1)

    shape = (len(responses), len(loaded.anatomy.layers) + 1, loaded.anatomy.hidden_size)
    found = np.empty(shape, dtype=np.float32)
    for batch, states, _ in _walk(loaded, prompts, responses, reduce, rows, on_progress):
        found[batch] = torch.stack(states, dim=1).numpy()
    return found


def project_responses(
    loaded: LoadedModel,
    prompts: Tokens,
    responses: Tokens,
    directions: npt.NDArray[np.floating],
    *,
    rows: int,
    on_progress: Progress | None = None,
) -> list[Projected]:
    """Scalar products of the states at every response token with the directions of their state.

    Args:
        loaded: the model, unedited.
        prompts, responses: token lists; a response follows its prompt.
        directions: [directions, L + 1 states, hidden].
        rows: responses per forward pass; fewer where the vocabulary's logits would not fit.
        on_progress: called with (responses done, responses in all).

    Raises:
        ModelError: an empty prompt or response, or a state that is not finite; names both.
        ValueError: `rows` below 1, or directions of another shape.
    """
    shape = (len(loaded.anatomy.layers) + 1, loaded.anatomy.hidden_size)
    if directions.ndim != 3 or directions.shape[1:] != shape:
        raise ValueError(f"directions need shape [directions, {shape}], got {directions.shape}")
    along = [
        torch.from_numpy(np.ascontiguousarray(d.T)).double() for d in directions.swapaxes(0, 1)
    ]

    def reduce(state: int, states: Tensor, mask: Tensor) -> Tensor:
        return states.cpu().double() @ along[state]

    found: dict[int, Projected] = {}
    walk = _walk(loaded, prompts, responses, reduce, rows, on_progress, surprise=True)
    for batch, products, surprise in walk:
        stacked = torch.stack(products, dim=2).numpy()
        for row, index in enumerate(batch):
            length = len(responses[index])
            found[index] = Projected(
                stacked[row, -length:].copy(), surprise[row, -length:].double().numpy()
            )
    return [found[index] for index in range(len(responses))]


def _walk(
    loaded: LoadedModel,
    prompts: Tokens,
    responses: Tokens,
    reduce: Reduce,
    rows: int,
    on_progress: Progress | None,
    surprise: bool = False,
) -> Iterator[tuple[list[int], list[Tensor], Tensor]]:
    """Per batch: the responses' numbers, every state reduced, and the surprise [rows, tokens]."""
    _require(prompts, responses, rows)
    texts = [[*prompt, *response] for prompt, response in zip(prompts, responses, strict=True)]
    if surprise and texts:
        rows = min(rows, _affordable(loaded, max(map(len, responses))))
    done = 0
    for batch in by_length(texts, rows):
        lengths = torch.tensor([len(responses[index]) for index in batch])
        longest = int(lengths.max())
        mask = (torch.arange(longest) >= longest - lengths[:, None]).to(loaded.device)
        with torch.inference_mode(), _reduced(loaded.anatomy.layers, mask, reduce) as states:
            ids, attention, positions = pad_left([texts[index] for index in batch], loaded.device)
            output = loaded.model(
                input_ids=ids,
                attention_mask=attention,
                position_ids=positions,
                use_cache=False,
                logits_to_keep=longest + 1 if surprise else 1,
            )
            nats = _surprise(output.logits, ids, longest) if surprise else torch.empty(0)
            kept = [state.to("cpu") for state in states]
        _require_finite(kept, batch, lengths)
        yield batch, kept, nats
        done += len(batch)
        if on_progress is not None:
            on_progress(done, len(texts))


def _require(prompts: Tokens, responses: Tokens, rows: int) -> None:
    require_tokens(prompts, rows)
    for index, response in enumerate(responses):
        if not response:
            raise ModelError(f"response {index} has no tokens")


def _affordable(loaded: LoadedModel, longest: int) -> int:
    """Rows whose logits at the response's tokens fit."""
    vocabulary = loaded.model.get_output_embeddings().weight.shape[0]
    return max(int(MOST_LOGITS // ((longest + 1) * vocabulary)), 1)


def _surprise(logits: Tensor, ids: Tensor, longest: int) -> Tensor:
    """-ln p of the last `longest` tokens, float32 [rows, longest] on the CPU, in nats."""
    before = logits[:, -longest - 1 : -1].float()
    asked = ids[:, -longest:, None]
    return (before.logsumexp(-1) - before.gather(-1, asked)[..., 0]).cpu()


@contextmanager
def _reduced(layers: Sequence[nn.Module], mask: Tensor, reduce: Reduce) -> Iterator[list[Tensor]]:
    """A list that a forward pass fills with its states, each reduced."""
    states: list[Tensor] = []

    def keep(state: Tensor) -> None:
        last = state[:, -mask.shape[1] :].float()
        states.append(reduce(len(states), last, mask.to(last.device)).clone())

    with every_state(layers, keep):
        yield states


def _require_finite(states: list[Tensor], batch: Sequence[int], lengths: Tensor) -> None:
    """Columns of padding or of the prompt do not count."""
    for number, state in enumerate(states):
        for row, index in enumerate(batch):
            own = state[row, -int(lengths[row]) :] if state.ndim == 3 else state[row]
            if not bool(torch.isfinite(own).all()):
                raise ModelError(
                    f"the residual of response {index} is not finite at state {number}; "
                    "try dtype 'bfloat16' or 'float32'"
                )
