"""How firmly a ranking stands: exact probabilities, published signed ranks, areas by counting."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import multinomial, ttest_rel

from tasks.numerics.fronts import fewest_refusals, hypervolume, least_kl
from tasks.numerics.rankings import across_models, sign_test, standing

FREE = np.zeros(2, dtype=bool)


def ranked(harmful: Any, kl: Any, gated: Any = None, others: Any = None, **options: Any) -> Any:
    """A standing without overrefusals, unless they are given."""
    table, values = np.array(harmful, dtype=float), np.array(kl, dtype=float)
    labels = np.zeros_like(values) if others is None else np.array(others, dtype=float)
    none = np.zeros((len(table), 0))
    stopped = np.zeros(len(table), dtype=bool) if gated is None else np.array(gated)
    return standing(table, [labels, none], values, stopped, **options)


def test_two_trials_that_refuse_one_prompt_each_are_first_as_often_as_the_draw_says() -> None:
    n, resamples = 4, 20_000
    first = ranked([[1, 0, 0, 0], [0, 1, 0, 0]], [[0.1], [0.2]], resamples=resamples).first
    draws = [(i, j, n - i - j) for i in range(n + 1) for j in range(n + 1 - i)]
    chance = multinomial(n, [0.25, 0.25, 0.5])
    ahead = sum(chance.pmf(draw) for draw in draws if draw[0] <= draw[1])  # the lower KL has ties
    spread = math.sqrt(ahead * (1 - ahead) / resamples)
    assert first[0] == pytest.approx(ahead, abs=4 * spread)
    assert first.sum() == pytest.approx(1)


@pytest.mark.parametrize(
    ("harmful", "others", "kl", "gated"),
    [
        ([[0, 0], [1, 1]], None, [[9.0], [0.0]], None),  # refusals before KL
        ([[1, 1], [1, 1]], [[0], [1]], [[9.0], [0.0]], None),  # overrefusals before KL
        ([[0, 0], [0, 0]], None, [[0.1, 0.2], [0.2, 0.3]], None),
        ([[1, 1], [0, 0]], None, [[9.0], [0.0]], [False, True]),  # gates before all
        ([[0, 0], [0, 0]], None, [[0.1], [0.1]], None),  # all ties: the order given
    ],
)
def test_what_no_draw_can_change_stands(harmful: Any, others: Any, kl: Any, gated: Any) -> None:
    found = ranked(harmful, kl, gated, others, resamples=200)
    assert found.first.tolist() == [1.0, 0.0]
    assert found.holds == 1.0


def test_three_orders_are_counted_whole() -> None:
    harmful = [[0, 0, 0, 0], [1, 0, 0, 0], [0, 1, 0, 0]]
    found = ranked(harmful, [[0.1], [0.1], [0.1]], resamples=5000)
    assert found.first[0] == 1.0  # never a refusal, and the first of equals
    assert 0.3 < found.holds < 0.9  # the other two swap now and then


def test_a_seed_fixes_the_draws_and_many_trials_are_cut_into_pieces(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    generator = np.random.default_rng(1)
    harmful, kl = generator.integers(0, 2, (5, 30)), generator.random((5, 20))
    found = ranked(harmful, kl, resamples=600)
    assert found.first.tolist() == ranked(harmful, kl, resamples=600).first.tolist()
    assert found.first.tolist() != ranked(harmful, kl, resamples=600, seed=1).first.tolist()
    monkeypatch.setattr("tasks.numerics.rankings._CELLS", 500)
    pieces = ranked(harmful, kl, resamples=600)
    assert pieces.first.sum() == pytest.approx(1)
    assert np.abs(pieces.first - found.first).max() < 0.1


@pytest.mark.parametrize(
    ("harmful", "kl"), [(np.zeros((0, 3)), np.zeros((0, 2))), (np.zeros((2, 3)), np.zeros((1, 2)))]
)
def test_tables_that_do_not_fit_are_refused(harmful: np.ndarray, kl: np.ndarray) -> None:
    with pytest.raises(ValueError, match="a ranking needs"):
        standing(harmful, [kl], kl, np.zeros(len(harmful), dtype=bool))
    with pytest.raises(ValueError, match="KL of 3 prompts, labels of 2"):
        standing(np.zeros((2, 1)), [np.zeros((2, 2))], np.zeros((2, 3)), FREE)


def test_the_signed_rank_is_the_published_one() -> None:
    """Hollander and Wolfe 1973, page 29: depression scale factors, one-sided p 0.0195."""
    before = np.array([1.83, 0.50, 1.62, 2.48, 1.68, 1.88, 1.55, 3.06, 1.30])
    after = np.array([0.878, 0.647, 0.598, 2.05, 1.06, 1.29, 1.06, 3.14, 1.29])
    found = across_models(before - after)
    assert found.p == pytest.approx(2 * 0.01953, abs=1e-4)
    assert found.models == 9
    assert found.interval is not None
    assert found.interval == pytest.approx(ttest_rel(before, after).confidence_interval(0.95))


def test_few_models_prove_nothing_and_say_so() -> None:
    for m in (1, 2, 3, 5):
        found = across_models([-0.5] * m)
        assert found.p == pytest.approx(found.least_p) == 2.0 ** (1 - m)
        assert found.p > 0.05
    assert across_models([-0.1, -0.2, -0.3, -0.4, -0.5, -0.6]).p == pytest.approx(2 / 64)
    assert across_models([0.3]).interval is None


def test_models_without_a_difference_are_no_evidence() -> None:
    found = across_models([0.0, 0.0, 0.0])
    assert (found.p, found.mean, found.interval) == (1.0, 0.0, (0.0, 0.0))


@pytest.mark.parametrize("values", [[], [math.nan], [1.0, math.inf]])
def test_a_summary_of_nothing_is_refused(values: list[float]) -> None:
    with pytest.raises(ValueError, match="finite differences"):
        across_models(values)


def test_the_interval_over_eight_models_covers_its_level() -> None:
    drawn = np.random.default_rng(3).normal(0.2, 1, (1500, 8))
    held = [found.interval for found in map(across_models, drawn) if found.interval]
    assert 0.93 <= sum(low <= 0.2 <= high for low, high in held) / 1500 <= 0.97


def test_the_sign_test_counts_no_ties() -> None:
    assert sign_test(0, 0) == 1.0
    assert sign_test(5, 0) == pytest.approx(2 / 32)
    assert sign_test(8, 2) == sign_test(2, 8) == pytest.approx(2 * 56 / 1024)


# Matched costs

grid = st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), max_size=8)


@given(grid)
def test_the_hypervolume_is_the_cells_that_are_dominated(points: list[tuple[int, int]]) -> None:
    size = 8
    cells = sum(any(r <= x and k <= y for r, k in points) for x in range(size) for y in range(size))
    found = hypervolume([(float(r), float(k)) for r, k in points], (size, size))
    assert found == pytest.approx(cells / size**2)


def test_the_hypervolume_is_one_only_at_the_origin() -> None:
    assert hypervolume([(0.0, 0.0)], (1.0, 0.5)) == 1.0
    assert hypervolume([], (1.0, 0.5)) == hypervolume([(1.0, 0.0)], (1.0, 0.5)) == 0.0
    with pytest.raises(ValueError, match="positive in both"):
        hypervolume([(0.0, 0.0)], (1.0, 0.0))


def test_matched_costs_are_the_best_within_the_budget() -> None:
    points = [(0.0, 0.3), (2.0, 0.1), (5.0, 0.02)]
    assert fewest_refusals(points, 0.1) == 2
    assert fewest_refusals(points, 0.0999) == 5
    assert fewest_refusals(points, 0.01) is None
    assert least_kl(points, 4) == 0.1
    assert least_kl(points, 5) == 0.02
    assert least_kl([], 5) is None
