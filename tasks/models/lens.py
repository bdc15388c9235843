"""The logit lens on generated answers: what every layer would say next, token by token.

One teacher-forced pass over prompt and answer gives the residual after every layer at the places
that predicted the answer's tokens; hooks keep those places alone. Each layer's residual then goes
through the model's own final norm and output embeddings, in chunks of tokens, so that a vocabulary
of 256,000 times 80 layers never lies in memory at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from artifacts.errors import ModelError
from tasks.models.anatomy import hidden
from tasks.models.batching import by_length, pad_left, require_tokens
from tasks.models.decoding import Response, eos_ids
from tasks.numerics.uncertainty import entropy, jensen_shannon, probabilities

if TYPE_CHECKING:
    from tasks.models.loading import LoadedModel

Floats = npt.NDArray[np.float64]
PASS_TOKENS = 4096  # of a forward pass, padding included
LENS_NUMBERS = 1 << 22  # probabilities of one layer at a time: 32 MiB
ENDED = -1  # in a list of chosen tokens: one of the end-of-sequence tokens


@dataclass(frozen=True)
class Divergences:
    """What an answer's tokens look like from inside, in nats.

    Attributes:
        entropy: [tokens] of the next-token distribution that each token was chosen from.
        final: [layers - 1, tokens] Jensen-Shannon divergence of each layer but the last against
            the last one.
        following: [layers - 1, tokens] of each layer against the next; NaN before `first_late`.
        agreed: [tokens] whether this pass would choose the token too; rounding may decide ties.
    """

    entropy: Floats
    final: Floats
    following: Floats
    agreed: npt.NDArray[np.bool_]

    def part(self, start: int, end: int) -> Divergences:
        """Some of the tokens."""
        here = slice(start, end)
        return Divergences(
            self.entropy[here], self.final[:, here], self.following[:, here], self.agreed[here]
        )


def late_layers(layers: int, fraction: float) -> range:
    """The last `fraction` of a model's layers without the last one; at least one layer.

    Raises:
        ModelError: a model of one layer has none before the last.
    """
    if layers < 2:
        raise ModelError(f"a model of {layers} layer has no layer before its last to compare")
    window = max(2, round(layers * fraction))
    return range(max(0, layers - window), layers - 1)


def lens(loaded: LoadedModel, states: Tensor) -> Tensor:
    """Logits [tokens, vocabulary] of residuals [tokens, d], as if the last layer had left them.

    The model's final norm, output embeddings with their bias, and what some architectures do to
    logits: Cohere's `logit_scale`, Granite's `logits_scaling`, the soft cap of Gemma 2.
    """
    head = loaded.model.get_output_embeddings()
    config = loaded.model.config.get_text_config()
    logits: Tensor = head(loaded.anatomy.final_norm(states))
    if factor := getattr(config, "logit_scale", None):
        logits = logits * factor
    if divisor := getattr(config, "logits_scaling", None):
        logits = logits / divisor
    if cap := getattr(config, "final_logit_softcapping", None):
        logits = torch.tanh(logits / cap) * cap
    return logits


def measure_answers(
    loaded: LoadedModel,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Response],
    *,
    rows: int,
    first_late: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Divergences]:
    """Entropy and divergences at every token of every answer, its end-of-sequence token included.

    Rows and order change rounding only.

    Args:
        loaded: the model, unedited.
        prompts: token lists, rendered and encoded up to where the answer begins.
        answers: what `decode` gave for them.
        rows: answers per forward pass, of at most PASS_TOKENS tokens together.
        first_late: neighbouring layers are compared from this layer on.
        on_progress: called with (answers done, answers in all).

    Raises:
        ModelError: an empty prompt; an answer without a token; a distribution that is not finite,
            with its prompt and layer; or a model whose logits are not those of its last layer by
            `lens`, so that the lens of its other layers would be wrong.
        ValueError: `rows` below 1.
    """
    require_tokens(prompts, rows)
    inputs, counts = forced_inputs(prompts, answers)
    found: dict[int, Divergences] = {}
    with torch.inference_mode():
        for batch in passes(inputs, rows):
            sizes = [counts[index] for index in batch]
            texts = [inputs[index] for index in batch]
            states, logits = forced_states(loaded, loaded.anatomy.layers, texts, sizes)
            require_same_head(loaded, states[-1], logits, sizes, batch)
            chosen = [token for i in batch for token in [*answers[i].tokens, ENDED][: counts[i]]]
            owners = [index for index in batch for _ in range(counts[index])]
            whole = _measure(loaded, states, chosen, owners, first_late)
            start = 0
            for index, size in zip(batch, sizes, strict=True):
                found[index] = whole.part(start, start + size)
                start += size
            if on_progress is not None:
                on_progress(len(found), len(inputs))
    return [found[index] for index in range(len(inputs))]


def forced_inputs(
    prompts: Sequence[Sequence[int]], answers: Sequence[Response]
) -> tuple[list[list[int]], list[int]]:
    """What goes through the model, and at how many of its last places a token is predicted.

    Raises:
        ModelError: an answer without a token.
    """
    inputs, counts = [], []
    for index, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        count = len(answer.tokens) + answer.ended
        if not count:
            raise ModelError(f"answer {index} has no tokens")
        inputs.append([*prompt, *answer.tokens][: len(prompt) + count - 1])
        counts.append(count)
    return inputs, counts


def passes(inputs: Sequence[Sequence[int]], rows: int) -> Iterator[list[int]]:
    """Batches of similar lengths, each of at most PASS_TOKENS tokens (or one row)."""
    for batch in by_length(inputs, rows):
        while batch:
            count = len(batch)
            while count > 1 and count * len(inputs[batch[count - 1]]) > PASS_TOKENS:
                count = min(count - 1, PASS_TOKENS // len(inputs[batch[count - 1]])) or 1
            yield batch[:count]
            batch = batch[count:]


def forced_states(
    loaded: LoadedModel,
    layers: Sequence[nn.Module],
    inputs: Sequence[Sequence[int]],
    counts: Sequence[int],
) -> tuple[list[Tensor], Tensor]:
    """Residuals after each of `layers` at each answer's places, [all places, d], row after row.

    Also the model's own logits [rows, vocabulary] at the last place of every row.
    """
    ids, mask, positions = pad_left(inputs, loaded.device)
    width = ids.shape[1]
    last = torch.tensor(counts, device=loaded.device)
    kept = torch.arange(width, device=loaded.device) >= width - last[:, None]
    with _keeping(layers, kept) as states:
        output = loaded.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            use_cache=False,
            logits_to_keep=1,
        )
    return states, output.logits[:, -1]


@contextmanager
def _keeping(layers: Sequence[nn.Module], kept: Tensor) -> Iterator[list[Tensor]]:
    """A list that a forward pass fills with each layer's output at the kept places."""
    states: list[Tensor] = []

    def leaving(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        state = hidden(output)
        states.append(state[kept.to(state.device)])  # a copy, so the other places are let go

    handles = [layer.register_forward_hook(leaving) for layer in layers]
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()


def require_same_head(
    loaded: LoadedModel,
    state: Tensor,
    logits: Tensor,
    sizes: Sequence[int],
    batch: Sequence[int],
) -> None:
    """The lens of the last layer is the model's output, or the lens is not this model's."""
    its = logits.float().to(state.device)
    broken = (~torch.isfinite(its).all(dim=-1)).nonzero()
    if len(broken):
        raise _not_finite(batch[int(broken[0])], len(loaded.anatomy.layers) - 1)
    ends = torch.tensor(sizes, device=state.device).cumsum(0) - 1
    rounding = 1e-3 if state.dtype.itemsize >= 4 else 2e-2  # of the largest logit
    mine = lens(loaded, state[ends]).float()
    if not torch.allclose(mine, its, rtol=0, atol=rounding * float(its.abs().max())):
        raise ModelError(
            f"architecture '{loaded.anatomy.architecture}' does more to its final state than norm "
            "and output embeddings, so the logit lens does not fit it"
        )


def _measure(
    loaded: LoadedModel,
    states: Sequence[Tensor],
    chosen: Sequence[int],
    owners: Sequence[int],
    first_late: int,
) -> Divergences:
    """All places of one pass; `owners` are the prompts they belong to, for errors."""
    places, last, eos = len(owners), len(states) - 1, eos_ids(loaded)
    step = max(1, LENS_NUMBERS // loaded.model.get_output_embeddings().weight.shape[0])
    whole = Divergences(
        entropy=np.empty(places),
        final=np.empty((last, places)),
        following=np.full((last, places), np.nan),
        agreed=np.zeros(places, dtype=bool),
    )
    for start in range(0, places, step):
        here = slice(start, min(start + step, places))

        def numbers(values: Tensor, layer: int, here: slice = here) -> Floats:
            """On the CPU; a place whose value is not finite is an error that names its prompt."""
            if not bool(torch.isfinite(values).all()):
                place = int((~torch.isfinite(values)).nonzero()[0])
                raise _not_finite(owners[here][place], layer)
            return values.cpu().numpy()

        output = probabilities(lens(loaded, states[last][here]))
        whole.entropy[here] = numbers(entropy(output), last)
        best = output.argmax(-1).tolist()
        whole.agreed[here] = [
            token == pick or (token == ENDED and pick in eos)
            for token, pick in zip(chosen[here], best, strict=True)
        ]
        upper = output
        for layer in reversed(range(last)):
            p = probabilities(lens(loaded, states[layer][here].to(states[last].device)))
            whole.final[layer, here] = numbers(jensen_shannon(p, output), layer)
            if layer >= first_late:
                whole.following[layer, here] = numbers(jensen_shannon(p, upper), layer)
            upper = p
    return whole


def _not_finite(prompt: int, layer: int) -> ModelError:
    return ModelError(
        f"the distribution of layer {layer} is not finite for prompt {prompt}; "
        "try dtype 'bfloat16' or 'float32'"
    )
