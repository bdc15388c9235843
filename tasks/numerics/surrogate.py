"""A model of trials that were not made: Gaussian processes over what edits do.

A trial's parameters say how an edit is written, and very different ones may mean nearly the same
edit. So a trial is placed by the weight that each layer gets and by its direction; there a
Gaussian process foretells KL and refusals from few trials. Everything is closed form or a choice
from a short list: no optimiser whose last digits another machine would round differently.
Source: Rasmussen and Williams, Gaussian Processes for Machine Learning, chapters 2 and 5.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import numpy.typing as npt
from scipy.linalg import cho_solve, cholesky, solve_triangular
from scipy.spatial.distance import cdist
from scipy.special import ndtr

Floats = npt.NDArray[np.float64]

LENGTHS = (0.15, 0.3, 0.6, 1.2, 2.4)  # of features that run from 0 to about 1
NOISES = (1e-4, 1e-3, 1e-2)  # variance of what no feature explains, as a share of the whole
LEAST_SD = 0.5  # of a quantity that has not varied yet, so that far away it still may
KL_FLOOR = 1e-4  # nats; smaller KLs are hardly told apart
LARGEST_KL = 10.0  # nats
COUNT_FLOOR = 0.25  # what is added to a count before its logarithm is taken


@dataclass(frozen=True)
class GaussianProcess:
    """A Gaussian process of constant mean with a Matérn 5/2 kernel, conditioned on points.

    Attributes:
        points: [n, features].
        values: [n].
        length: over which the function varies, in units of the features.
        noise: variance of the noise as a share of the function's.
        mean: of the process.
        variance: of the process, before it is conditioned.
        likelihood: log density of the values, up to a constant.
        factor: [n, n], Cholesky factor of their correlation, lower.
        weights: [n], what each adds to a mean, as a factor of its correlation with the place.
    """

    points: Floats
    values: Floats
    length: float
    noise: float
    mean: float
    variance: float
    likelihood: float
    factor: Floats
    weights: Floats

    @classmethod
    def of(cls, points: Floats, values: Floats, length: float, noise: float) -> GaussianProcess:
        """With the likeliest variance, but no less than `LEAST_SD` squared."""
        n, mean = len(values), float(values.mean())
        covariance = _matern(points, points, length) + noise * np.eye(n)
        factor = cholesky(covariance, lower=True)
        centred = values - mean
        weights = cho_solve((factor, True), centred)
        fit = float(centred @ weights)
        variance = max(fit / n, LEAST_SD**2)
        likelihood = -0.5 * (fit / variance + n * np.log(variance))
        likelihood -= float(np.log(np.diag(factor)).sum())
        return cls(points, values, length, noise, mean, variance, likelihood, factor, weights)

    @classmethod
    def likeliest(cls, points: Floats, values: Floats) -> GaussianProcess:
        """The one of `LENGTHS` and `NOISES` that explains the values best."""
        tried = [cls.of(points, values, *pair) for pair in product(LENGTHS, NOISES)]
        return max(tried, key=lambda each: each.likelihood)

    def predict(self, points: Floats) -> tuple[Floats, Floats]:
        """Mean and standard deviation [m] of the noiseless function at points [m, features]."""
        shared = _matern(points, self.points, self.length)
        solved = solve_triangular(self.factor, shared.T, lower=True)
        left = np.maximum(1.0 - np.square(solved).sum(axis=0), 1e-12)
        return self.mean + shared @ self.weights, np.sqrt(self.variance * left)

    def believing(self, point: Floats) -> GaussianProcess:
        """As if `point` [features] had been tried and had come out as foretold."""
        foretold, _ = self.predict(point[None])
        points = np.vstack([self.points, point])
        made = self.of(points, np.append(self.values, foretold), self.length, self.noise)
        return replace(made, variance=self.variance)


def _matern(one: Floats, other: Floats, length: float) -> Floats:
    d = cdist(one, other) * (np.sqrt(5.0) / length)
    found: Floats = (1.0 + d + d * d / 3.0) * np.exp(-d)
    return found


@dataclass(frozen=True)
class Foresight:
    """What is foretold of trials, and how good the best one so far is.

    `best`: refusals, overrefusals and KL of that one.
    """

    kl: GaussianProcess
    refusals: GaussianProcess
    overrefusals: GaussianProcess
    best: tuple[float, float, float]

    @classmethod
    def of(
        cls, points: Floats, outcomes: Floats, heard: npt.NDArray[np.bool_], best: Sequence[float]
    ) -> Foresight:
        """From trials that were made.

        Args:
            points: [n, features].
            outcomes: [n, 3], refusals, overrefusals and KL (nats) of each.
            heard: [n], whose overrefusals are known; at least one.
            best: the outcome of the one that the next are to be better than.
        """
        refusals, overrefusals, kl = outcomes.T
        return cls(
            GaussianProcess.likeliest(points, log_kl(kl)),
            GaussianProcess.likeliest(points, log_count(refusals)),
            GaussianProcess.likeliest(points[heard], log_count(overrefusals[heard])),
            (best[0], best[1], best[2]),
        )

    def improvement(self, points: Floats) -> Floats:
        """How much better than the best a trial is expected to be, [m], for points [m, features].

        In the strict order: an improvement of a count is worth as much as a KL smaller by a factor
        of e, and that of the KL counts where no count is worse.
        """
        refusals, overrefusals, kl = self.best
        fewer, as_many = _chances(self.refusals, points, refusals)
        fewer_over, as_many_over = _chances(self.overrefusals, points, overrefusals)
        mean, sd = self.kl.predict(points)
        gain = expected_gain(mean, sd, float(log_kl(kl)))
        return fewer + as_many * (fewer_over + as_many_over * gain)

    def believing(self, point: Floats) -> Foresight:
        """As if `point` [features] had been tried and had come out as foretold."""
        return Foresight(
            self.kl.believing(point),
            self.refusals.believing(point),
            self.overrefusals.believing(point),
            self.best,
        )


def log_kl(kl: npt.ArrayLike) -> Floats:
    """KL in nats as the model sees it; what is not finite is as large as can be."""
    found: Floats = np.log(np.clip(np.asarray(kl, dtype=np.float64), 0, LARGEST_KL) + KL_FLOOR)
    return found


def log_count(count: npt.ArrayLike) -> Floats:
    """A count as the model sees it: none and one lie far apart, 60 and 61 do not."""
    found: Floats = np.log(np.asarray(count, dtype=np.float64) + COUNT_FLOOR)
    return found


def _chances(model: GaussianProcess, points: Floats, best: float) -> tuple[Floats, Floats]:
    """Probabilities [m] of fewer than `best`, and of as many; between two counts lies a half."""
    mean, sd = model.predict(points)
    at_most = ndtr((log_count(best + 0.5) - mean) / sd)
    if best < 1:
        return np.zeros_like(at_most), at_most
    fewer = ndtr((log_count(best - 0.5) - mean) / sd)
    return fewer, at_most - fewer


def expected_gain(mean: Floats, sd: Floats, best: float) -> Floats:
    """Expected improvement E[max(best - y, 0)] of normal y. Source: Jones et al. (1998)."""
    z = (best - mean) / sd
    found: Floats = sd * (z * ndtr(z) + np.exp(-0.5 * z * z) / np.sqrt(2 * np.pi))
    return found
