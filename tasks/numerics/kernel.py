"""The weight kernel: how strongly each layer is edited.

Four numbers instead of one per layer keep the search small. The shape is a tent: full weight at one
position, falling off linearly on both sides, and nothing at all beyond a distance.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Kernel:
    """Edit weights of one component as a function of the layer (HERETIC 1.4.0).

    `max_weight`: weight at `max_weight_position` (layers, may lie between two).
    `min_weight`: weight at the edge, as a fraction of `max_weight`.
    `min_weight_distance`: distance of the edge (layers); layers farther away are not edited.
    """

    max_weight: float
    max_weight_position: float
    min_weight: float
    min_weight_distance: float

    def weights(self, n_layers: int) -> list[float]:
        """The weight of each layer 0..n_layers-1; 0.0 where the layer is not edited."""
        return [self._weight(abs(layer - self.max_weight_position)) for layer in range(n_layers)]

    def _weight(self, distance: float) -> float:
        if distance > self.min_weight_distance:
            return 0.0
        if distance == 0.0:  # also the only layer of a kernel of distance 0, where 0/0 would be met
            return self.max_weight
        fall = distance / self.min_weight_distance
        return self.max_weight * (1.0 + fall * (self.min_weight - 1.0))


def kernel_weights(
    max_weight: npt.NDArray[np.float64],
    position: npt.NDArray[np.float64],
    min_weight: npt.NDArray[np.float64],
    distance: npt.NDArray[np.float64],
    n_layers: int,
) -> npt.NDArray[np.float64]:
    """The weights of many kernels at once, [n, n_layers]; each argument [n], as in `Kernel`."""
    away = np.abs(np.arange(n_layers) - position[:, None])
    edge = distance[:, None]
    fall = np.divide(away, edge, out=np.zeros_like(away), where=(away > 0) & (away <= edge))
    tent = max_weight[:, None] * (1.0 + fall * (min_weight[:, None] - 1.0))
    return np.where(away > edge, 0.0, tent)
