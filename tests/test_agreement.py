"""Cohen's kappa: published tables, scikit-learn, statsmodels, and what its interval must obey."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.metrics import cohen_kappa_score
from statsmodels.stats.inter_rater import cohens_kappa

from tasks.numerics.agreement import Agreement, agreement, cohen_kappa

Flags = NDArray[np.bool_]


def flags(both: int, only_a: int, only_b: int, neither: int) -> tuple[Flags, Flags]:
    """Labels that give a table."""
    counts = [both, only_a, only_b, neither]
    return (
        np.repeat([True, True, False, False], counts),
        np.repeat([True, False, True, False], counts),
    )


def compare(
    a: Flags, b: Flags, prompts: NDArray[np.int64] | None = None, seed: int = 0
) -> Agreement:
    return agreement(a, b, np.arange(a.size) if prompts is None else prompts, seed=seed)


@pytest.mark.parametrize(
    ("table", "kappa"),
    [
        ((15, 5, 10, 70), 0.57),  # Viera and Garrett 2005, Family Medicine 37:360-363
        ((40, 9, 6, 45), 0.70),  # Feinstein and Cicchetti 1990, J Clin Epidemiol 43:543-549
        ((80, 10, 5, 5), 0.32),  # the same: equal raw agreement, other rates
    ],
)
def test_published_tables(table: tuple[int, int, int, int], kappa: float) -> None:
    assert round(compare(*flags(*table)).kappa, 2) == kappa


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40))
def test_kappa_is_scikit_learns(pairs: list[tuple[bool, bool]]) -> None:
    a, b = (np.array(side) for side in zip(*pairs, strict=True))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it divides by zero where there is no kappa
        expected = cohen_kappa_score(a, b)
    assert compare(a, b).kappa == pytest.approx(expected, nan_ok=True, abs=1e-12)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), max_size=30), st.integers(0, 3))
def test_the_two_sides_can_be_swapped(pairs: list[tuple[bool, bool]], seed: int) -> None:
    a, b = np.array(pairs, dtype=bool).reshape(-1, 2).T
    one, other = compare(a, b, seed=seed), compare(b, a, seed=seed)
    assert (one.only_a, one.only_b) == (other.only_b, other.only_a)
    assert [one.kappa, one.low, one.high] == pytest.approx(
        [other.kappa, other.low, other.high], nan_ok=True
    )


def test_with_many_prompts_the_interval_is_the_large_sample_one() -> None:
    table = (300, 120, 80, 1500)
    found = compare(*flags(*table))
    known = cohens_kappa(np.array(table).reshape(2, 2))
    assert found.kappa == pytest.approx(known.kappa)
    assert (found.low, found.high) == pytest.approx((known.kappa_low, known.kappa_upp), abs=0.008)


def test_responses_to_one_prompt_are_no_new_evidence() -> None:
    a, b = flags(12, 5, 3, 30)
    once = compare(a, b)
    prompts = np.tile(np.arange(a.size), 10)
    repeated = compare(np.tile(a, 10), np.tile(b, 10), prompts)
    assert (repeated.responses, repeated.prompts) == (500, 50)
    assert [repeated.kappa, repeated.low, repeated.high] == pytest.approx(
        [once.kappa, once.low, once.high]
    )
    others = compare(np.tile(a, 10), np.tile(b, 10))  # as answers to prompts of their own they are
    assert others.high - others.low < 0.5 * (once.high - once.low)


def test_full_agreement_on_few_prompts_is_no_proof_of_it() -> None:
    few, many = compare(*flags(4, 0, 0, 4)), compare(*flags(200, 0, 0, 200))
    assert few.kappa == few.high == many.kappa == many.high == 1.0
    assert few.low < 0.5 < 0.95 < many.low < 1.0
    assert few.low == pytest.approx(2 * 0.025 ** (1 / 8) - 1)  # Clopper-Pearson of 8 of 8


@pytest.mark.parametrize("table", [(0, 0, 0, 9), (9, 0, 0, 0), (0, 0, 0, 0)])
def test_where_a_label_never_varies_there_is_no_kappa(table: tuple[int, int, int, int]) -> None:
    found = compare(*flags(*table))
    assert all(map(math.isnan, (found.kappa, found.low, found.high)))
    assert math.isnan(found.rate) == (sum(table) == 0)


def test_one_prompt_gives_a_kappa_but_no_interval() -> None:
    a, b = flags(3, 1, 1, 3)
    found = compare(a, b, np.zeros(8, dtype=np.int64))
    assert found.kappa == pytest.approx(0.5)
    assert math.isnan(found.low)
    assert not math.isnan(compare(a, b).low)


def test_a_label_that_hardly_occurs_gives_no_interval() -> None:
    """Half of all resamples leave out the one response with it, and have no kappa."""
    found = compare(*flags(0, 1, 0, 40))
    assert found.kappa == pytest.approx(0.0)
    rare = flags(1, 0, 0, 2)
    mixed = compare(np.append(rare[0], True), np.append(rare[1], False))
    assert math.isnan(mixed.low)
    assert not math.isnan(mixed.kappa)


def test_kappa_of_many_tables_at_once() -> None:
    tables = np.array([[15, 5, 10, 70], [0, 0, 0, 0], [5, 0, 0, 5], [0, 5, 5, 0]])
    found = cohen_kappa(tables)
    assert found[[0, 2, 3]] == pytest.approx([4 / 7, 1.0, -1.0])
    assert math.isnan(found[1])


def test_shapes_and_levels_are_checked() -> None:
    a, b = flags(1, 1, 1, 1)
    with pytest.raises(ValueError, match="labels of"):
        agreement(a, b[:3], np.arange(4))
    with pytest.raises(ValueError, match="level"):
        agreement(a, b, np.arange(4), level=1.0)


@pytest.mark.slow
@pytest.mark.parametrize("responses", [1, 4])
def test_the_interval_covers(responses: int) -> None:
    """Prompts have rates of their own, so that responses to one resemble each other."""
    generator = np.random.default_rng(responses)
    rates = np.array([[0.9, 0.02, 0.03, 0.05], [0.05, 0.1, 0.05, 0.8]])  # of two kinds of prompts
    true = float(cohen_kappa(rates.mean(axis=0)))
    runs, n, covered = 500, 150, 0
    for _ in range(runs):
        kinds = generator.integers(2, size=n)
        cells = np.concatenate(
            [generator.choice(4, size=responses, p=rates[kind]) for kind in kinds]
        )
        prompts = np.repeat(np.arange(n), responses)
        found = agreement(cells < 2, np.isin(cells, (0, 2)), prompts, resamples=800)
        covered += found.low <= true <= found.high
    assert 0.92 <= covered / runs <= 0.975
