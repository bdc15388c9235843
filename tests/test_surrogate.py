"""The model of trials not made: against scikit-learn, against sampling, and by its laws."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import ConstantKernel, Matern

from tasks.numerics.kernel import Kernel, kernel_weights
from tasks.numerics.surrogate import (
    LENGTHS,
    NOISES,
    Foresight,
    GaussianProcess,
    expected_gain,
    log_count,
)

DICE = np.random.default_rng(3)
POINTS = DICE.random((30, 5))
VALUES = np.sin(4 * POINTS[:, 0]) + 2 * POINTS[:, 1] ** 2
ELSEWHERE = DICE.random((50, 5))


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("noise", NOISES)
def test_it_foretells_what_scikit_learn_does(length: float, noise: float) -> None:
    ours = GaussianProcess.of(POINTS, VALUES, length, noise)
    kernel = ConstantKernel(ours.variance) * Matern(length, nu=2.5)
    theirs = GaussianProcessRegressor(kernel, alpha=ours.variance * noise, optimizer=None)
    theirs.fit(POINTS, VALUES - VALUES.mean())
    mean, sd = theirs.predict(ELSEWHERE, return_std=True)
    assert ours.predict(ELSEWHERE)[0] == pytest.approx(mean + VALUES.mean(), abs=1e-8)
    assert ours.predict(ELSEWHERE)[1] == pytest.approx(sd, abs=1e-6)


def test_the_likeliest_is_what_scikit_learn_would_choose() -> None:
    """By the marginal likelihood, at each pair's own best variance."""

    def likelihood(length: float, noise: float) -> float:
        ours = GaussianProcess.of(POINTS, VALUES, length, noise)
        kernel = ConstantKernel(ours.variance) * Matern(length, nu=2.5)
        theirs = GaussianProcessRegressor(kernel, alpha=ours.variance * noise, optimizer=None)
        return float(theirs.fit(POINTS, VALUES - VALUES.mean()).log_marginal_likelihood_value_)

    pairs = [(length, noise) for length in LENGTHS for noise in NOISES]
    found = GaussianProcess.likeliest(POINTS, VALUES)
    assert (found.length, found.noise) == max(pairs, key=lambda pair: likelihood(*pair))
    differences = [
        likelihood(*p) - GaussianProcess.of(POINTS, VALUES, *p).likelihood for p in pairs
    ]
    assert differences == pytest.approx([differences[0]] * len(pairs), abs=1e-6)


def test_it_learns_a_smooth_function_and_not_noise() -> None:
    truth = np.sin(4 * ELSEWHERE[:, 0]) + 2 * ELSEWHERE[:, 1] ** 2
    mean, _ = GaussianProcess.likeliest(POINTS, VALUES).predict(ELSEWHERE)
    assert np.corrcoef(mean, truth)[0, 1] > 0.9
    noise = np.random.default_rng(0).permutation(VALUES)
    mean, _ = GaussianProcess.likeliest(POINTS, noise).predict(ELSEWHERE)
    assert np.corrcoef(mean, truth)[0, 1] < 0.5


def test_what_is_believed_is_known_afterwards() -> None:
    model = GaussianProcess.likeliest(POINTS, VALUES)
    mean, sd = model.predict(ELSEWHERE[:1])
    after, less = model.believing(ELSEWHERE[0]).predict(ELSEWHERE[:1])
    assert after == pytest.approx(mean, abs=1e-2)
    assert less < 0.2 * sd


def test_nothing_varied_so_far_but_it_may_far_away() -> None:
    model = GaussianProcess.likeliest(POINTS[:4], np.full(4, 2.0))
    near, far = model.predict(POINTS[:1]), model.predict(POINTS[:1] + 50)
    assert near[1][0] < 0.1
    assert far[1][0] == pytest.approx(0.5, rel=0.2)


@given(st.floats(-3, 3), st.floats(0.05, 3), st.floats(-3, 3))
def test_expected_gain_is_the_mean_of_what_is_gained(mean: float, sd: float, best: float) -> None:
    y = np.linspace(min(best, mean) - 12 * sd, best, 200_001)
    gained = np.trapezoid((best - y) * norm.pdf(y, mean, sd), y)
    found = float(expected_gain(np.array([mean]), np.array([sd]), best)[0])
    assert found == pytest.approx(gained, rel=1e-5, abs=1e-12)


def foresight(
    outcomes: list[tuple[float, float, float]], best: int
) -> tuple[Foresight, np.ndarray]:
    points = np.linspace(0, 1, len(outcomes))[:, None]
    heard = np.ones(len(outcomes), dtype=bool)
    return Foresight.of(points, np.array(outcomes), heard, outcomes[best]), points


def test_fewer_refusals_come_before_a_smaller_kl() -> None:
    """Refusals fall to the right and KL to the left: with refusals left, one goes right."""
    outcomes = [(60.0 - 10 * k, 0.0, 0.01 * (k + 1)) for k in range(6)]
    model, _ = foresight(outcomes, 5)
    gain = model.improvement(np.array([[-0.1], [1.1]]))
    assert gain[1] > 2 * gain[0]
    zero = [(max(0.0, 20 - 10 * k), 0.0, 0.01 * (k + 1)) for k in range(6)]
    model, _ = foresight(zero, 2)
    gain = model.improvement(np.array([[0.4], [1.1]]))
    assert gain[0] > gain[1], "nothing is left to refuse less, so a smaller KL counts"


def test_overrefusals_come_between() -> None:
    over = [(0.0, 12.0 - 2 * k, 0.01) for k in range(6)]
    model, _ = foresight(over, 5)
    gain = model.improvement(np.array([[0.0], [1.2]]))
    assert gain[1] > 5 * gain[0]


def test_counts_are_compared_by_halves() -> None:
    assert log_count(0.5) < log_count(1)
    model, points = foresight([(0.0, 0.0, 0.01), (1.0, 0.0, 0.01), (0.0, 0.0, 0.02)], 0)
    assert model.improvement(points)[1] < 1e-3, "what is known to refuse more is no improvement"


@given(
    st.lists(
        st.tuples(st.floats(0, 1.5), st.floats(0, 11), st.floats(0, 1), st.floats(0, 11)),
        min_size=1,
        max_size=6,
    )
)
def test_many_kernels_are_as_each_of_them(rows: list[tuple[float, float, float, float]]) -> None:
    found = kernel_weights(*np.array(rows).T, 12)
    assert found.tolist() == [Kernel(*row).weights(12) for row in rows]
