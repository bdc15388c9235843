"""CP decomposition of hidden states, and the factors of prompts it has not seen.

A layer's states of many prompts are a tensor [prompts, positions, hidden]. Its CP decomposition
says it is a sum of `rank` products of a prompt factor a, a position factor b and a hidden factor c.
Position and hidden factors are what is learnt; a new prompt X [positions, hidden] is described by
the least-squares a for them: a = (Z^T Z)^-1 Z^T vec(X), with Z^T Z = (B^T B) * (C^T C) entry by
entry and (Z^T vec X)_r = b_r^T X c_r. Source: Kadali and Papalexakis 2026 (arXiv 2602.11495).
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Array = NDArray[np.floating]
SINGULAR = 1e-10  # of the largest eigenvalue: below, two components are one


@dataclass(frozen=True)
class Factors:
    """What a decomposition learnt.

    Attributes:
        positions: B [positions, rank], columns of norm 1.
        hidden: C [hidden size, rank], columns of norm 1.
        scale: what states are divided by, the root mean square of the training tensor.
        error: relative reconstruction error of the training tensor, 0-1.
    """

    positions: Floats
    hidden: Floats
    scale: float
    error: float


def decompose(
    states: Array, rank: int, *, iterations: int = 100, tolerance: float = 1e-6, seed: int = 0
) -> Factors:
    """Position and hidden factors of a tensor, by tensorly's alternating least squares in float64.

    Not centred, as in the source. Scaling by one number changes no direction of a factor; it makes
    the stopping rule the same for every layer.

    Args:
        states: [prompts, positions, hidden size] of training prompts.
        rank: number of components.
        iterations: at most so many rounds.
        tolerance: change of the reconstruction error at which to stop.
        seed: of the random parts of the initial factors (needed where `rank` exceeds a dimension).

    Raises:
        ValueError: not three-dimensional, empty, not finite, all zero, or a rank below 1.
    """
    _require(states)
    if rank < 1:
        raise ValueError(f"the rank is at least 1, not {rank}")
    scale = float(np.sqrt(np.mean(np.square(states, dtype=np.float64))))
    if scale == 0:
        raise ValueError("a tensor of zeros has no factors")
    from tensorly.decomposition import parafac

    tensor = states.astype(np.float64) / scale
    with warnings.catch_warnings():  # a rank above a dimension is meant: its rest is random
        warnings.filterwarnings("ignore", message="Trying to compute SVD", category=UserWarning)
        found = parafac(
            tensor, rank, n_iter_max=iterations, tol=tolerance, random_state=seed, init="svd"
        )
    positions, hidden = (_unit(np.asarray(factor)) for factor in found.factors[1:])
    factors = Factors(positions, hidden, scale, 0.0)
    rebuilt = np.einsum("nr,pr,hr->nph", project(states, factors), positions, hidden)
    error = float(np.linalg.norm(tensor - rebuilt) / np.linalg.norm(tensor))
    return Factors(positions, hidden, scale, error)


def project(states: Array, factors: Factors) -> Floats:
    """Prompt factors [prompts, rank] by the closed form; training and new prompts alike.

    Two components that became the same leave Z^T Z singular; the least solution is taken then.

    Args:
        states: [prompts, positions, hidden size].

    Raises:
        ValueError: states that do not fit the factors, or are not finite.
    """
    _require(states)
    wanted = (len(factors.positions), len(factors.hidden))
    if states.shape[1:] != wanted:
        raise ValueError(f"states {states.shape[1:]} do not fit factors of {wanted}")
    b, c = factors.positions, factors.hidden
    gram = (b.T @ b) * (c.T @ c)
    seen = np.einsum("nph,pr,hr->nr", states.astype(np.float64), b, c, optimize=True)
    found: Floats = (seen / factors.scale) @ np.linalg.pinv(gram, rcond=SINGULAR, hermitian=True)
    return found


def _unit(factor: Floats) -> Floats:
    """Columns of norm 1; a column of zeros stays as it is."""
    norms = np.linalg.norm(factor, axis=0)
    return factor / np.where(norms > 0, norms, 1.0)


def _require(states: Array) -> None:
    if states.ndim != 3 or not states.size:
        raise ValueError(f"states need [prompts, positions, hidden], got {states.shape}")
    if not np.isfinite(states).all():
        raise ValueError("states are not finite")
