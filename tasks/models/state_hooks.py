"""Every state of the residual stream, as a forward pass makes it.

Hooks hand on one state at a time, so that whoever looks keeps what it needs and the rest is let go:
`output_hidden_states` would hold every position of every layer, and its last state is one after the
final norm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from tasks.models.anatomy import hidden


@contextmanager
def every_state(layers: Sequence[nn.Module], keep: Callable[[Tensor], object]) -> Iterator[None]:
    """Within the block, `keep` is given each forward pass's states [rows, tokens, d], in order.

    State 0 is what enters layer 0, state l + 1 what leaves layer l, before any final norm.
    """

    def entering(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        keep(args[0] if args else kwargs["hidden_states"])

    def leaving(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        keep(hidden(output))

    handles = [layers[0].register_forward_pre_hook(entering, with_kwargs=True)]
    handles += [layer.register_forward_hook(leaving) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
