"""Differences between two measurements: published values, scipy's bootstrap, and real coverage."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom, binomtest, bootstrap, multinomial

from tasks.numerics.differences import Samples, match, mean_difference, rate_difference

NONE = np.zeros(0)
BOTH, GAINED, LOST, NEITHER = (1.0, 1.0), (0.0, 1.0), (1.0, 0.0), (0.0, 0.0)


def paired(both: int, gained: int, lost: int, neither: int) -> Samples:
    """A paired table: refused both times, only after, only before, never."""
    cells = zip((both, gained, lost, neither), (BOTH, GAINED, LOST, NEITHER), strict=True)
    pairs = np.array([pair for count, pair in cells for _ in range(count)]).reshape(-1, 2)
    return Samples(NONE, pairs[:, 0], pairs[:, 1], NONE)


def ones(k: int, n: int) -> np.ndarray:
    return np.array([1.0] * k + [0.0] * (n - k))


def independent(after: tuple[int, int], before: tuple[int, int]) -> Samples:
    """Rates k of n on prompts that share none."""
    return Samples(ones(*before), NONE, NONE, ones(*after))


# Newcombe 1998, Statistics in Medicine 17:873-890, table II, method 10.
INDEPENDENT = [
    ((56, 70), (48, 80), (0.0524, 0.3339)),
    ((9, 10), (3, 10), (0.1705, 0.8090)),
    ((6, 7), (2, 7), (0.0582, 0.8062)),
    ((5, 56), (0, 29), (-0.0381, 0.1926)),
    ((0, 10), (0, 20), (-0.1611, 0.2775)),
    ((0, 10), (0, 10), (-0.2775, 0.2775)),
    ((10, 10), (0, 20), (0.6791, 1.0)),
    ((10, 10), (0, 10), (0.6075, 1.0)),
]
# Fagerland, Lydersen and Laake, Statistical Analysis of Contingency Tables, chapter 8: complete
# response before and after therapy (Cavo 2012) and airway responsiveness (Bentur 2009).
PAIRED = [((59, 6, 16, 80), (-0.1186, -0.0046)), ((1, 1, 7, 12), (-0.507, -0.026))]


@pytest.mark.parametrize(("after", "before", "published"), INDEPENDENT)
def test_unshared_prompts_give_the_published_intervals(
    after: tuple[int, int], before: tuple[int, int], published: tuple[float, float]
) -> None:
    assert rate_difference(independent(after, before)) == pytest.approx(published, abs=5e-5)


@pytest.mark.parametrize(("table", "published"), PAIRED)
def test_shared_prompts_give_the_published_intervals(
    table: tuple[int, int, int, int], published: tuple[float, float]
) -> None:
    digits = len(str(published[0]).split(".")[1])
    assert rate_difference(paired(*table)) == pytest.approx(published, abs=0.51 * 10**-digits)


tables = st.tuples(*[st.integers(0, 30)] * 4).filter(any)


@given(tables)
def test_shared_prompts_agree_with_the_textbook_formula(table: tuple[int, int, int, int]) -> None:
    both, gained, lost, neither = table
    n = sum(table)
    before, after = both + lost, both + gained

    def ends(k: int) -> tuple[float, float]:
        interval = binomtest(k, n).proportion_ci(0.95, "wilson")
        return k / n - interval.low, interval.high - k / n

    cross = both * neither - gained * lost
    cross = max(cross - n / 2, 0) if cross > 0 else cross
    margins = before * (n - before) * after * (n - after)
    phi = cross / math.sqrt(margins) if margins else 0.0
    (down_1, up_1), (down_2, up_2) = ends(before), ends(after)
    low = math.sqrt(down_2**2 - 2 * phi * down_2 * up_1 + up_1**2)
    high = math.sqrt(up_2**2 - 2 * phi * up_2 * down_1 + down_1**2)
    difference = (after - before) / n
    expected = max(-1, difference - low), min(1, difference + high)
    assert rate_difference(paired(*table)) == pytest.approx(expected, abs=1e-7)


rates = st.lists(st.sampled_from([0.0, 1.0]), max_size=12).map(np.array)
pairs = st.lists(st.sampled_from([BOTH, GAINED, LOST, NEITHER]), max_size=12)


@given(rates, pairs, rates)
def test_swapping_the_measurements_mirrors_the_interval(
    gone: np.ndarray, shared: list[tuple[float, float]], new: np.ndarray
) -> None:
    before, after = np.array(shared, dtype=float).reshape(-1, 2).T
    samples = Samples(gone, before, after, new)
    if not samples.n_before or not samples.n_after:
        return
    low, high = rate_difference(samples)
    first, second = samples.means
    assert -1 <= low <= second - first + 1e-12
    assert second - first - 1e-12 <= high <= 1
    mirrored = rate_difference(Samples(new, after, before, gone))
    assert mirrored == pytest.approx((-high, -low), abs=1e-9)


def coverage(outcomes: Iterable[tuple[float, Samples]], truth: float) -> float:
    """Probability that the interval holds the truth, over outcomes with their probabilities."""
    held = ((p, rate_difference(samples)) for p, samples in outcomes)
    return math.fsum(p for p, (low, high) in held if low - 1e-9 <= truth <= high + 1e-9)


CELLS = [
    (0.9, 0.02, 0.02, 0.06),
    (0.05, 0.05, 0.05, 0.85),
    (0.3, 0.2, 0.1, 0.4),
    (0.0, 0.3, 0.05, 0.65),
    (0.45, 0.05, 0.05, 0.45),
]


@pytest.mark.parametrize("cells", CELLS, ids=str)
def test_paired_intervals_cover_at_every_table_of_sixteen_prompts(
    cells: tuple[float, float, float, float],
) -> None:
    n = 16
    counts = [c for c in itertools.product(range(n + 1), repeat=3) if sum(c) <= n]
    outcomes = [(*c, n - sum(c)) for c in counts]
    weights = multinomial.pmf(outcomes, n, cells)
    weighted = ((p, paired(*o)) for p, o in zip(weights, outcomes, strict=True) if p > 1e-9)
    assert 0.94 <= coverage(weighted, cells[1] - cells[2]) <= 1


@pytest.mark.parametrize("rates_of", [(0.05, 0.05), (0.2, 0.5), (0.9, 0.6), (0.02, 0.3)], ids=str)
def test_independent_intervals_cover_at_every_outcome(rates_of: tuple[float, float]) -> None:
    n_before, n_after = 20, 14
    outcomes = (
        (
            binom.pmf(i, n_before, rates_of[0]) * binom.pmf(j, n_after, rates_of[1]),
            independent((j, n_after), (i, n_before)),
        )
        for i in range(n_before + 1)
        for j in range(n_after + 1)
    )
    assert 0.93 <= coverage(outcomes, rates_of[1] - rates_of[0]) <= 1


def partly_shared(generator: np.random.Generator) -> Samples:
    """20 prompts before and 18 after, 12 of them shared, in true rates of 0.4 and 0.5."""
    cells = np.array([BOTH, GAINED, LOST, NEITHER])
    shared = cells[generator.choice(4, size=12, p=(0.35, 0.15, 0.05, 0.45))]
    gone, new = generator.random(8) < 0.4, generator.random(6) < 0.5
    return Samples(gone * 1.0, shared[:, 0], shared[:, 1], new * 1.0)


def test_intervals_of_partly_shared_prompts_cover_too() -> None:
    generator = np.random.default_rng(0)
    draws = [(1 / 3000, partly_shared(generator)) for _ in range(3000)]
    assert 0.94 <= coverage(draws, 0.1) <= 0.98


def test_pairing_narrows_the_interval_and_no_disagreement_proves_nothing() -> None:
    table = paired(40, 2, 3, 35)
    alone = Samples(table.before, NONE, NONE, table.after)
    low, high = rate_difference(table)
    wide = rate_difference(alone)
    assert high - low < 0.75 * (wide[1] - wide[0])
    agreed = rate_difference(paired(40, 0, 0, 40))
    assert agreed[0] < -0.01 < 0.01 < agreed[1]
    few = rate_difference(paired(4, 0, 0, 4))
    assert few[0] < agreed[0] < agreed[1] < few[1]


def test_a_rate_of_something_else_is_refused() -> None:
    with pytest.raises(ValueError, match="0 or 1"):
        rate_difference(Samples(NONE, np.array([0.5]), np.array([1.0]), NONE))


@pytest.mark.parametrize("case", ["paired", "independent"])
def test_mean_intervals_agree_with_scipys_bootstrap(case: str) -> None:
    generator = np.random.default_rng(1)
    before, after = generator.lognormal(-3, 1, 60), generator.lognormal(-2.5, 1, 60)
    options = {"method": "percentile", "n_resamples": 20000, "rng": np.random.default_rng(2)}
    if case == "paired":
        theirs = bootstrap((after - before,), np.mean, **options)
        samples = Samples(NONE, before, after, NONE)
    else:
        theirs = bootstrap(
            (after, before), lambda a, b, axis: a.mean(axis) - b.mean(axis), **options
        )
        samples = Samples(before, NONE, NONE, after)
    ours = mean_difference(samples, resamples=20000)
    interval = theirs.confidence_interval
    width = interval.high - interval.low
    assert ours == pytest.approx((interval.low, interval.high), abs=0.03 * width)


def test_mean_intervals_agree_with_every_resample_of_three_prompts() -> None:
    samples = Samples(NONE, np.array([0.0, 1.0, 5.0]), np.array([1.0, 1.5, 9.0]), NONE)
    means = [np.mean(c) for c in itertools.product(samples.after - samples.before, repeat=3)]
    exact = np.quantile(means, [0.25, 0.75], method="inverted_cdf")
    assert mean_difference(samples, level=0.5, resamples=20000) == pytest.approx(exact, abs=0.01)


@pytest.mark.parametrize("shared", [0, 20, 40])
def test_mean_intervals_cover(shared: int) -> None:
    generator = np.random.default_rng(shared)
    truth = math.exp(-2.8 + 0.125) - math.exp(-3 + 0.125)  # of log-normal means

    def draw() -> Samples:
        common = generator.normal(size=40)
        own = generator.normal(size=40)
        before = np.exp(-3 + 0.5 * common)
        mixed = 0.8 * common + 0.6 * own
        after = np.exp(-2.8 + 0.5 * np.where(np.arange(40) < shared, mixed, own))
        return Samples(before[shared:], before[:shared], after[:shared], after[shared:])

    intervals = [mean_difference(draw(), resamples=500) for _ in range(400)]
    held = np.mean([low <= truth <= high for low, high in intervals])
    assert 0.91 <= held <= 0.98


def test_mean_intervals_repeat_with_their_seed_and_refuse_infinities() -> None:
    generator = np.random.default_rng(0)
    samples = Samples(generator.random(5), generator.random(9), generator.random(9), NONE)
    assert mean_difference(samples) == mean_difference(samples)
    assert mean_difference(samples) != mean_difference(samples, seed=1)
    with pytest.raises(ValueError, match="finite"):
        mean_difference(Samples(NONE, np.array([0.0]), np.array([math.inf]), NONE))
    with pytest.raises(ValueError, match="level"):
        mean_difference(samples, level=1.0)


def test_one_replaced_prompt_proves_nothing_and_many_do() -> None:
    values = np.random.default_rng(0).lognormal(0, 1, 10)
    one = Samples(values[:1], values[1:], values[1:].copy(), values[:1] + 1)
    low, high = mean_difference(one)
    assert low < 0 < 0.1 < high
    all_of_them = Samples(values, NONE, NONE, values + 9)
    assert mean_difference(all_of_them)[0] > 0


def test_no_difference_is_exactly_none() -> None:
    values = np.random.default_rng(0).random(7)
    assert mean_difference(Samples(NONE, values, values.copy(), NONE)) == (0.0, 0.0)


def test_prompts_are_matched_by_name_whatever_their_order() -> None:
    before = {"a": 1.0, "b": 2.0, "c": 3.0}
    samples = match(before, {"d": 9.0, "c": 5.0, "b": 4.0})
    assert samples.gone.tolist() == [1.0]
    assert (samples.before.tolist(), samples.after.tolist()) == ([2.0, 3.0], [4.0, 5.0])
    assert samples.new.tolist() == [9.0]
    assert samples.means == (2.0, 6.0)
    assert not samples.same
    assert match(before, dict(reversed(before.items()))).same
    assert not match(before, before | {"a": 1.0 + 1e-12}).same
    with pytest.raises(ValueError, match="got 3 and 0"):
        match(before, {})
