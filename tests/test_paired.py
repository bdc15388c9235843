"""Paired tests: published values, scipy and enumeration, what they never claim, what they cover."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom, fisher_exact, ttest_rel

from tasks.numerics import power
from tasks.numerics.differences import Samples, rate_difference
from tasks.numerics.intervals import clopper_pearson, wilson
from tasks.numerics.paired import (
    BETTER,
    TIED,
    WORSE,
    PairedTable,
    decide,
    holm,
    mcnemar,
    mean_interval,
    paired_table,
    permutation,
    rate_interval,
    spread_of_pairs,
    verdict,
)

NONE = np.zeros(0)
flags = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=12)


def columns(pairs: list[tuple[bool, bool]]) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.array(pairs, dtype=float).T
    return a, b


# Fagerland, Lydersen and Laake 2013, BMC Medical Research Methodology 13:91, tables 1, 2 and 8: the
# exact conditional McNemar test on Bentur 2009 and on Cavo 2012.
@pytest.mark.parametrize(
    ("table", "published"),
    [(PairedTable(1, 1, 7, 12), 0.070), (PairedTable(59, 6, 16, 80), 0.0525)],
)
def test_mcnemar_gives_the_published_p(table: PairedTable, published: float) -> None:
    assert mcnemar(table) == pytest.approx(published, abs=5e-4)


def test_one_refusal_of_twenty_proves_nothing() -> None:
    assert mcnemar(PairedTable(0, 1, 0, 19)) == 1.0  # published as p < 0.05
    assert mcnemar(PairedTable(20, 0, 0, 0)) == mcnemar(PairedTable(0, 0, 0, 20)) == 1.0
    assert mcnemar(PairedTable(0, 0, 6, 14)) == pytest.approx(2 / 64)


@pytest.mark.parametrize("rate", [0.1, 0.5])
@pytest.mark.parametrize("n", [8, 20, 40])
def test_mcnemar_never_exceeds_its_level_and_is_conservative(n: int, rate: float) -> None:
    """By enumeration: as many prompts change either way, at this rate in all."""
    wrong = 0.0
    for changed in range(n + 1):
        lost = np.arange(changed + 1)
        p = np.minimum(1, 2 * binom.cdf(np.minimum(lost, changed - lost), changed, 0.5))
        wrong += binom.pmf(changed, n, rate) * binom.pmf(lost, changed, 0.5)[p <= 0.05].sum()
    assert wrong <= 0.05
    assert wrong < 0.04  # it pays for being exact


def test_fishers_permutation_of_darwins_maize() -> None:
    """Fisher 1935, section 21: 863 of 2^15 sums are as large, 1,726 in both tails."""
    differences = np.array(
        [49, -67, 8, 16, 6, 23, 28, 41, 14, 29, 56, 24, 75, 60, -48], dtype=float
    )
    zeros = np.zeros(15)
    assert permutation(differences, zeros, resamples=2**15) == pytest.approx(1726 / 2**15)
    drawn = permutation(differences, zeros, resamples=9999)
    assert drawn == pytest.approx(1726 / 2**15, abs=0.01)
    assert drawn == permutation(differences, zeros, resamples=9999)
    assert drawn != permutation(differences, zeros, resamples=9999, seed=1)


@given(flags)
def test_on_rates_the_exact_permutation_is_mcnemar(pairs: list[tuple[bool, bool]]) -> None:
    a, b = columns(pairs)
    assert permutation(a, b) == pytest.approx(mcnemar(paired_table(a, b)))


@given(flags)
def test_the_table_counts_every_prompt_and_mirrors(pairs: list[tuple[bool, bool]]) -> None:
    a, b = columns(pairs)
    table, mirrored = paired_table(a, b), paired_table(b, a)
    assert table.n == len(pairs)
    assert (table.both, table.only_a, table.only_b) == (
        sum(x and y for x, y in pairs),
        sum(x and not y for x, y in pairs),
        sum(y and not x for x, y in pairs),
    )
    assert (mirrored.only_a, mirrored.only_b) == (table.only_b, table.only_a)
    assert mcnemar(mirrored) == mcnemar(table)


def test_a_permutation_is_close_to_the_t_test_where_that_holds() -> None:
    generator = np.random.default_rng(7)
    a = generator.normal(0.25, 1, 60)
    expected = ttest_rel(a, np.zeros(60)).pvalue
    assert permutation(a, np.zeros(60)) == pytest.approx(expected, abs=0.02)


def test_nothing_that_differs_is_no_evidence() -> None:
    same = np.array([0.1, 0.2, 0.3])
    assert permutation(same, same) == 1.0
    assert mean_interval(same, same) == (0.0, 0.0)
    assert permutation(np.ones(1), np.zeros(1)) == 1.0  # one prompt


@pytest.mark.parametrize(
    ("a", "b"), [([], []), ([1.0], [1.0, 0.0]), ([[1.0]], [[0.0]])], ids=["empty", "uneven", "flat"]
)
def test_pairs_that_are_none_are_refused(a: list[float], b: list[float]) -> None:
    for use in (paired_table, permutation, mean_interval, rate_interval):
        with pytest.raises(ValueError, match="pairs need two lists of one length"):
            use(np.array(a), np.array(b))


def test_values_that_are_none_are_refused() -> None:
    nan, ones = np.array([math.nan, 1.0]), np.ones(2)
    with pytest.raises(ValueError, match="finite"):
        permutation(nan, ones)
    with pytest.raises(ValueError, match="0 or 1"):
        paired_table(nan, ones)
    with pytest.raises(ValueError, match="0 or 1"):
        paired_table(np.array([0.5]), np.array([1.0]))


def test_the_interval_of_rates_is_the_published_one() -> None:
    """Newcombe 1998 method 10 as in Fagerland's chapter 8: only the order of a and b is ours."""
    cells = [(1.0, 1.0)] * 59 + [(0.0, 1.0)] * 6 + [(1.0, 0.0)] * 16 + [(0.0, 0.0)] * 80
    before, after = np.array(cells).T
    assert rate_interval(after, before) == pytest.approx((-0.1186, -0.0046), abs=5e-5)
    assert rate_interval(after, before) == rate_difference(Samples(NONE, before, after, NONE))


# R's p.adjust(c(0.01, 0.02, 0.03, 0.04, 0.05), "holm"); and Aickin and Gensler 1996's procedure by
# hand on four.
@pytest.mark.parametrize(
    ("p", "adjusted"),
    [
        ([0.01, 0.02, 0.03, 0.04, 0.05], [0.05, 0.08, 0.09, 0.09, 0.09]),
        ([0.01, 0.04, 0.03, 0.005], [0.03, 0.06, 0.06, 0.02]),
        ([0.5, 0.9], [1.0, 1.0]),
        ([0.04], [0.04]),
        ([], []),
    ],
)
def test_holm_is_as_published(p: list[float], adjusted: list[float]) -> None:
    assert holm(p) == pytest.approx(adjusted)


@pytest.mark.parametrize("p", [[math.nan], [1.2], [-0.1, 0.5]])
def test_what_is_no_p_value_is_refused(p: list[float]) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        holm(p)


def test_a_win_needs_interval_p_and_resolution() -> None:
    assert verdict(-0.1, (-0.2, -0.01), 0.05) == BETTER
    assert verdict(0.1, (0.01, 0.2), 0.01) == WORSE
    assert verdict(-0.1, (-0.2, 0.0), 0.01) == TIED  # the interval holds zero
    assert verdict(-0.1, (-0.2, -0.01), 0.0501) == TIED  # Holm does not hold
    assert verdict(-5e-5, (-6e-5, -4e-5), 0.01, resolution=1e-4) == TIED  # nobody would show it


def test_the_strict_order_goes_from_metric_to_metric() -> None:
    assert decide([TIED, BETTER, WORSE], (False, False)) == (BETTER, 1)
    assert decide([WORSE, BETTER, BETTER], (False, False)) == (WORSE, 0)
    assert decide([TIED, TIED, TIED], (True, True)) == (TIED, None)
    assert decide([BETTER, BETTER, BETTER], (True, False)) == (WORSE, None)
    assert decide([WORSE], (False, True)) == (BETTER, None)


# What could have been found

# Cohen 1988, Statistical Power Analysis, tables 2.4.1 and 6.4.1: 5 %, two-sided, power 80 %.


def test_detectable_means_are_cohens() -> None:
    assert power.unpaired_mean(64, 1.0) == pytest.approx(0.5, abs=0.005)
    assert power.unpaired_mean(26, 2.0) == pytest.approx(2 * 0.8, abs=0.02)
    assert power.paired_mean(34, 1.0) == pytest.approx(0.5, abs=0.01)


def test_many_prompts_detect_cohens_effect_and_fewer_by_fishers_test_a_little_less() -> None:
    def effect(found: float | None) -> float:
        assert found is not None
        return abs(2 * math.asin(math.sqrt(0.5 + found)) - math.pi / 2)

    assert effect(power._cohens(63, 0.5, 0.95, 0.8)) == pytest.approx(0.5, abs=0.005)
    assert effect(power.unpaired_rate(6300, 0.5)) == pytest.approx(0.05, abs=5e-4)
    assert 0.5 < effect(power.unpaired_rate(63, 0.5)) < 0.58  # exact tests are conservative
    assert power.unpaired_rate(63, 0.0) == pytest.approx(power.unpaired_rate(63, 1.0), abs=1e-4)


@pytest.mark.parametrize(("one", "other"), [(0.1, 0.6), (0.0, 0.4), (0.3, 0.3)])
def test_fishers_power_is_that_of_enumerated_tables(one: float, other: float) -> None:
    n = 11
    counts = range(n + 1)
    found = sum(
        binom.pmf(i, n, one) * binom.pmf(j, n, other)
        for i in counts
        for j in counts
        if fisher_exact([[i, n - i], [j, n - j]]).pvalue <= 0.05
    )
    assert power.fisher_power(n, one, other) == pytest.approx(found, abs=1e-12)
    if one == other:
        assert found <= 0.05


@pytest.mark.parametrize(("difference", "against"), [(0.3, 0.0), (0.4, 0.1), (0.0, 0.2)])
def test_mcnemars_power_is_that_of_enumerated_tables(difference: float, against: float) -> None:
    n, found = 9, 0.0
    rates = (difference + against, against, 1 - difference - 2 * against)
    for cells in itertools.product(range(n + 1), repeat=2):
        if sum(cells) <= n:
            rest = n - sum(cells)
            ways = math.comb(n, cells[0]) * math.comb(n - cells[0], cells[1])
            chance = ways * rates[0] ** cells[0] * rates[1] ** cells[1] * rates[2] ** rest
            found += chance * (mcnemar(PairedTable(0, *cells, rest)) <= 0.05)
    assert power.mcnemar_power(n, difference, against) == pytest.approx(found, abs=1e-12)


@pytest.mark.parametrize("n", [20, 128])
@pytest.mark.parametrize("against", [0.0, 0.05])
def test_the_detectable_rate_has_the_stated_power_and_no_more(n: int, against: float) -> None:
    found = power.paired_rate(n, against)
    assert found is not None
    assert power.mcnemar_power(n, found, against) == pytest.approx(power.POWER, abs=1e-3)
    assert power.mcnemar_power(n, 0.9 * found, against) < power.POWER - 0.01
    more = power.paired_rate(2 * n, against)
    assert more is not None
    assert more < found
    noisier = power.paired_rate(n, against + 0.05)
    assert noisier is not None
    assert noisier > found


def test_too_few_prompts_can_find_nothing() -> None:
    assert power.paired_rate(5) is power.unpaired_rate(5, 0.1) is power.paired_mean(5, 1.0) is None
    assert power.paired_rate(20, 0.45) is None  # nearly all change, and as many either way
    assert power.paired_mean(20, math.nan) is power.unpaired_mean(20, math.nan) is None
    assert all(map(math.isnan, spread_of_pairs(np.ones(1), np.ones(1))))


# Coverage


MEAN = math.exp((0.8**2 + 0.6**2) / 2)  # of exp of a normal number of this spread


def differences(kind: str, n: int, runs: int) -> tuple[np.ndarray, float]:
    """Differences of two KLs as they look, long tails and prompts in common, and the true mean."""
    generator = np.random.default_rng([n, len(kind)])
    prompt = generator.normal(0, 0.8, (runs, n))
    a, b = (np.exp(prompt + part) for part in generator.normal(0, 0.6, (2, runs, n)))
    scales = {"close": (0.005, 0.0055), "against nothing": (0.0, 0.0055), "apart": (0.005, 0.02)}
    of_a, of_b = scales[kind]
    return of_a * a - of_b * b, (of_a - of_b) * MEAN


def covered(kind: str, n: int, runs: int = 1000) -> float:
    drawn, truth = differences(kind, n, runs)
    intervals = [mean_interval(d, np.zeros(n), resamples=600) for d in drawn]
    return sum(low <= truth <= high for low, high in intervals) / runs


@pytest.mark.parametrize(("kind", "n"), [("close", 64), ("close", 128), ("apart", 256)])
def test_the_interval_of_a_kl_difference_covers_its_level(kind: str, n: int) -> None:
    assert 0.93 <= covered(kind, n) <= 0.97


@pytest.mark.parametrize(("n", "least"), [(10, 0.84), (64, 0.90)])
def test_where_one_kl_dwarfs_the_other_few_prompts_cover_too_little(n: int, least: float) -> None:
    assert least <= covered("apart", n) < 0.94


@pytest.mark.parametrize("n", [64, 128])
def test_wilson_covers_its_level_on_average_and_clopper_pearson_more(n: int) -> None:
    rates = np.linspace(0.02, 0.98, 97)

    def mean_coverage(intervals: list[tuple[float, float]]) -> float:
        low, high = np.array(intervals).T[:, :, None]
        inside = (low <= rates) & (rates <= high)
        return float((binom.pmf(np.arange(n + 1)[:, None], n, rates) * inside).sum(0).mean())

    assert 0.945 <= mean_coverage([wilson(k, n) for k in range(n + 1)]) <= 0.96
    assert 0.955 <= mean_coverage([clopper_pearson(k, n) for k in range(n + 1)]) <= 0.98
