"""Forward passes that begin above the layers an edit leaves alone.

What lies below the first edited layer is the same for every trial of a study. So the unedited
model runs once with its states recorded, and a trial's pass begins where its edit does. Nothing
here knows an architecture: a layer that is left out hands on what it is given, and the last one
that is left out hands on the recorded states.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from tasks.models.anatomy import hidden


class PartialPass:
    """The layers of one model, of which the lower ones can be left out.

    State 0 enters layer 0 and state l + 1 leaves layer l.
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self._layers = layers
        self._extra: dict[int, int | None] = {}  # values beside the states, if a tuple is returned

    @contextmanager
    def recorded(self, levels: Collection[int]) -> Iterator[dict[int, Tensor]]:
        """A dict that each forward pass fills with the states [rows, tokens, d] at `levels`."""
        states: dict[int, Tensor] = {}

        def keep(level: int) -> Callable[[nn.Module, Any, Any], None]:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                self._extra[level] = len(output) - 1 if isinstance(output, tuple) else None
                if level in levels:
                    states[level] = hidden(output)

            return hook

        handles = [
            layer.register_forward_hook(keep(number))
            for number, layer in enumerate(self._layers, start=1)
        ]
        try:
            yield states
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def beginning_at(self, level: int, states: Tensor | None) -> Iterator[None]:
        """Within the block, forward passes compute layers `level` and above only.

        `states` [rows, tokens, d] enter layer `level`, or the final norm if it is the number of
        layers. At level 0 nothing is left out. Layers that are left out write no keys and values.
        A pass has to have been recorded before.
        """
        below = self._layers[:level]
        own = [layer.__dict__.get("forward") for layer in below]
        for number, layer in enumerate(below, start=1):
            layer.forward = _handing_on(states if number == level else None, self._extra[number])
        try:
            yield
        finally:
            for layer, forward in zip(below, own, strict=True):
                del layer.forward
                if forward is not None:
                    layer.forward = forward


def _handing_on(states: Tensor | None, extra: int | None) -> Callable[..., Any]:
    """What stands for a layer's forward: `states`, or else its input, in the layer's own form."""

    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        found = hidden_states if states is None else states
        return found if extra is None else (found, *[None] * extra)

    return forward
