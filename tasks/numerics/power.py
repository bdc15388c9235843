"""What a comparison of n prompts could have found: the least difference that it would not miss.

A tie between two edits means little where only a huge difference could have shown. All answers are
for one two-sided test at 1 - `level`, before any correction, with the stated power (80 %).
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

POWER = 0.8
LEVEL = 0.95
LARGEST_EXACT = 1000  # prompts
FEWEST = 6  # prompts; fewer pairs than that can reach no p of 5 %, whatever they say


def paired_rate(
    n: int, against: float = 0.0, level: float = LEVEL, power: float = POWER
) -> float | None:
    """Least difference of two rates on the same n prompts that exact McNemar finds.

    Args:
        n: prompts.
        against: rate of prompts that change the other way, 0-1: the more of them, the more noise.

    Returns:
        The difference, 0-1; None: not even the largest possible one is found.

    Exact: the number of prompts that change is binomial, and so is, given it, the part that
    changes for the better; the test's power is summed over both.

    Source: Connor 1987 (the unconditional power of McNemar's test).
    """
    if n < FEWEST or not 0 <= against <= 0.5:
        return None
    from scipy.optimize import brentq

    largest = 1 - 2 * against

    def beyond(difference: float) -> float:
        return mcnemar_power(n, difference, against, level) - power

    if largest <= 0 or beyond(largest) < 0:
        return None
    return float(brentq(beyond, 0.0, largest, xtol=1e-6))


def mcnemar_power(n: int, difference: float, against: float, level: float = LEVEL) -> float:
    """Power of the two-sided exact McNemar test on n pairs, 0-1.

    `difference` of the rates, of which `against` change the other way: so difference + 2 * against
    of all pairs change.
    """
    import numpy as np
    from scipy.stats import binom

    changing = min(1.0, difference + 2 * against)
    if changing <= 0:
        return 0.0
    changed = np.arange(n + 1)
    share = (difference + against) / changing
    needed = binom.isf((1 - level) / 2, changed, 0.5) + 1  # of them one way, to be significant
    found = binom.sf(needed - 1, changed, share) + binom.cdf(changed - needed, changed, share)
    return float((binom.pmf(changed, n, changing) * found)[1:].sum())


def unpaired_rate(n: int, rate: float, level: float = LEVEL, power: float = POWER) -> float | None:
    """Least difference from `rate` that n prompts each, other ones, would show.

    Exact, by Fisher's test; beyond 1,000 prompts by Cohen's normal approximation. The smaller of
    the differences up and down that exist; None: there is none.

    Source: Casagrande, Pike and Smith 1978 (the exact power of Fisher's test); Cohen 1988.
    """
    if n < FEWEST:
        return None
    if n > LARGEST_EXACT:
        return _cohens(n, rate, level, power)
    from scipy.optimize import brentq

    found = []
    for sign, room in ((1, 1 - rate), (-1, rate)):

        def beyond(difference: float, sign: int = sign) -> float:
            other = min(1.0, max(0.0, rate + sign * difference))
            return fisher_power(n, rate, other, level) - power

        if beyond(room) >= 0:
            found.append(float(brentq(beyond, 0.0, room, xtol=1e-6)))
    return min(found, default=None)


def fisher_power(n: int, one: float, other: float, level: float = LEVEL) -> float:
    """Power of Fisher's two-sided exact test between two rates, n prompts each, 0-1."""
    import numpy as np
    from scipy.stats import binom

    counts = np.arange(n + 1)
    chances = binom.pmf(counts, n, one), binom.pmf(counts, n, other)
    return float(chances[0] @ _rejected(n, level) @ chances[1])


@lru_cache(maxsize=8)
def _rejected(n: int, level: float) -> NDArray[np.float64]:
    """1 where Fisher's test rejects i of n against j of n, [n + 1, n + 1]."""
    import numpy as np
    from scipy.stats import hypergeom

    found = np.zeros((n + 1, n + 1))
    for total in range(2 * n + 1):
        first = np.arange(max(0, total - n), min(n, total) + 1)
        chance = hypergeom.pmf(first, 2 * n, n, total)
        order = np.argsort(chance)
        summed = np.cumsum(chance[order])
        # what is as unlikely as the observed counts too; 1e-7 as scipy has it for rounding
        upto = np.searchsorted(chance[order], chance * (1 + 1e-7), side="right") - 1
        found[first, total - first] = summed[upto] <= 1 - level
    return found


def _cohens(n: int, rate: float, level: float, power: float) -> float | None:
    """2 asin sqrt(p) is normal with variance 1/n, whatever p."""
    from statsmodels.stats.power import NormalIndPower

    effect = float(NormalIndPower().solve_power(nobs1=n, alpha=1 - level, power=power, ratio=1.0))
    angle = 2 * math.asin(math.sqrt(rate))
    ends = [angle + effect, angle - effect]
    found = [abs(math.sin(end / 2) ** 2 - rate) for end in ends if 0 <= end <= math.pi]
    return min(found, default=None)


def paired_mean(n: int, spread: float, level: float = LEVEL, power: float = POWER) -> float | None:
    """Least difference of means on the same n prompts that a paired t test finds.

    `spread`: standard deviation of the differences; the answer has its unit. None for fewer than
    6 prompts. The t test stands in for the permutation test, whose power is much the same.

    Source: statsmodels.
    """
    if n < FEWEST or not math.isfinite(spread):
        return None
    from statsmodels.stats.power import TTestPower

    return spread * float(TTestPower().solve_power(nobs=n, alpha=1 - level, power=power))


def unpaired_mean(
    n: int, spread: float, level: float = LEVEL, power: float = POWER
) -> float | None:
    """The same where each has n prompts of its own; `spread`: standard deviation of the values."""
    if n < FEWEST or not math.isfinite(spread):
        return None
    from statsmodels.stats.power import TTestIndPower

    return spread * float(TTestIndPower().solve_power(nobs1=n, alpha=1 - level, power=power))
