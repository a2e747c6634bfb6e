"""Intervals: how sure a share, a difference or a ratio is, and which of many differences may be believed.

Items are the units that vary; several samples of one item are one cluster (Miller, "Adding Error Bars to
Evals", arXiv 2411.00640). All intervals are 95 %. Knows nothing about channels or files, nor about clocks:
percentiles of a latency with their intervals are in `latency`.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
_Z = 1.959963984540054


class Interval(NamedTuple):
    """An estimate with its 95 % interval."""

    value: float
    low: float
    high: float


# --- one channel ---------------------------------------------------------------------------------------------------


def clustered_share(outcomes: Mapping[str, Sequence[bool]]) -> Interval | None:
    """Mean over items of the share of successes (pass@1), with Wilson's interval at the effective sample size.

    Args:
        outcomes: for each item, success or not of each of its samples.

    The effective size is p(1-p) / SE^2, SE being the standard error between items; it lies between the
    number of items (samples of an item all alike) and the number of samples (all independent), and is less where
    few items decide how large SE is (`t_of_squares`). With one sample an item this is Wilson's interval itself.
    None where there is nothing to count.
    """
    counted = [samples for samples in outcomes.values() if len(samples)]
    return _mean_of_items([sum(s) / len(s) for s in counted], sum(len(s) for s in counted))


def pass_at_k(outcomes: Mapping[str, Sequence[bool]], k: int) -> Interval | None:
    """The chance that at least one of `k` samples is right, mean over items, with an interval as `clustered_share`.

    Unbiased for each item (Chen et al., arXiv 2107.03374): of its samples, the share of choices of `k` that
    hold a right one. Items with fewer than `k` samples say nothing about it and are left out; None where
    none is left.
    """
    counted = [samples for samples in outcomes.values() if len(samples) >= k > 0]
    values = [1 - math.comb(len(s) - sum(s), k) / math.comb(len(s), k) for s in counted]
    return _mean_of_items(values, sum(len(s) for s in counted))


def majority_share(finals: Mapping[str, Sequence[tuple[str | None, bool]]]) -> Interval | None:
    """Share of items whose most frequent final answer is right (majority@K), with an interval as `clustered_share`.

    Args:
        finals: for each item, the final answer of each of its samples, None where it gave none, and whether it is
            right.

    All samples of an item vote, save those without an answer; an item where nobody votes is wrong. Answers
    with equally many votes share the item: it counts as the mean over them. Items may differ in samples.
    """
    return _mean_of_items([_elected(votes) for votes in finals.values() if votes], sum(map(len, finals.values())))


def _elected(votes: Sequence[tuple[str | None, bool]]) -> float:
    ballots: defaultdict[str, list[bool]] = defaultdict(list)
    for answer, right in votes:
        if answer is not None:
            ballots[answer].append(right)
    most = max(map(len, ballots.values()), default=0)
    leaders = [sum(ballot) / most for ballot in ballots.values() if len(ballot) == most]
    return sum(leaders) / len(leaders) if leaders else 0.0


def _mean_of_items(values: Sequence[float], samples: int) -> Interval | None:
    """The mean of one share an item, `samples` being how many draws they rest on in all."""
    if not values:
        return None
    p, items = float(np.mean(values)), len(values)
    size = float(items)
    if items > 1 and samples > items and 0 < p < 1:
        squares = (np.array(values) - p) ** 2
        size = float(samples)
        if squares.any():
            variance = float(squares.sum()) / (items - 1) / items * (t_of_squares(squares) / _Z) ** 2
            size = min(size, max(float(items), p * (1 - p) / variance))
    return Interval(p, *_wilson(p, size))


def t_of_squares(squares: FloatArray) -> float:
    """What takes the place of 1.96 where a variance is estimated by the sum of such squares.

    Student's t with as many degrees of freedom as match how sure that sum is (Satterthwaite, 1946): one less than
    there are squares at most, and few where few of them are much larger than the others.
    """
    from scipy import special

    total, most = float(squares.sum()), len(squares) - 1.0
    spread = float((squares**2).sum()) - total**2 / len(squares)
    freedom = min(most, 2 * total**2 / spread) if spread > 0 else most
    return float(special.stdtrit(freedom, 0.975))


def _wilson(p: float, n: float) -> tuple[float, float]:
    centre = (p + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z / (1 + _Z**2 / n) * math.sqrt(p * (1 - p) / n + _Z**2 / (4 * n**2))
    # At 0 and 1 rounding may leave the bound a hair inside the estimate.
    return min(p, max(0.0, centre - half)), max(p, min(1.0, centre + half))


# --- two channels --------------------------------------------------------------------------------------------------


class PairedDifference(NamedTuple):
    """Accuracy of `a` less that of `b` over the items both answered.

    Attributes:
        items: how many items both answered.
        items_to_settle: how many in all would make the interval exclude zero if further items went as these
            did; None where it does so already, or where no gap was seen.
        p: two-sided, by the same normal approximation as the interval: below 0.05 exactly where that excludes
            zero.
    """

    value: float
    low: float
    high: float
    items: int
    items_to_settle: int | None
    p: float

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval leaves zero out, so that the difference may be called one."""
        return self.low > 0 or self.high < 0


def paired_difference(a: Mapping[str, Sequence[bool]], b: Mapping[str, Sequence[bool]]) -> PairedDifference | None:
    """The mean difference over shared items, with the adjusted Wald interval of Agresti and Min (2005).

    Half an item is added to each of the four cells of the paired table before the usual interval is taken: two
    items in all, half of one where only `a` is right and half where only `b` is. With several samples an item
    (then a difference between two means) the added halves are as large as the differences seen are where there
    is one, in the root mean square. Where fewer than six items differ, no interval for such counts keeps near
    95 %, and this one covers more.
    """
    shared = [i for i in a if i in b and len(a[i]) and len(b[i])]
    if not shared:
        return None
    d = np.array([sum(a[i]) / len(a[i]) - sum(b[i]) / len(b[i]) for i in shared])
    value, square, unequal = float(d.mean()), float(np.mean(d**2)), int(np.count_nonzero(d))
    added = square * len(d) / unequal if unequal else 1.0
    centre, error = adjusted(value, square, added, len(d))
    low, high = max(-1.0, centre - _Z * error), min(1.0, centre + _Z * error)
    settle = None
    if low <= 0 <= high and abs(value) > 1e-9:
        settle = _first_that_excludes_zero(value, square, added, len(d))
    p = math.erfc(abs(centre) / (error * math.sqrt(2)))
    return PairedDifference(value, low, high, len(d), settle, p)


def adjusted(value: float, square: float, added: float, n: float) -> tuple[float, float]:
    """Centre and standard error behind `paired_difference`'s interval.

    Args:
        value, square: mean and mean square of the differences of `n` items.
        added: square of the differences that are added, half an item each way.
    """
    centre = n * value / (n + 2)
    return centre, math.sqrt(max(0.0, (n * square + added) / (n + 2) - centre**2) / (n + 2))


def _first_that_excludes_zero(value: float, square: float, added: float, n: int) -> int:
    def settled(m: int) -> bool:
        centre, error = adjusted(value, square, added, m)
        return abs(centre) > _Z * error

    few, enough = n, 2 * n
    while not settled(enough):
        few, enough = enough, 2 * enough
    while enough - few > 1:
        middle = (few + enough) // 2
        few, enough = (few, middle) if settled(middle) else (middle, enough)
    return enough


def mcnemar(a: Mapping[str, Sequence[bool]], b: Mapping[str, Sequence[bool]]) -> float | None:
    """The exact two-sided p of McNemar's test over shared items: are those that only one got right evenly split?

    None where an item has several samples, which the test does not know, and where no item is shared.
    """
    from scipy import stats

    shared = [i for i in a if i in b and len(a[i]) and len(b[i])]
    if not shared or any(len(a[i]) > 1 or len(b[i]) > 1 for i in shared):
        return None
    only_a = sum(bool(a[i][0]) and not b[i][0] for i in shared)
    only_b = sum(bool(b[i][0]) and not a[i][0] for i in shared)
    return float(stats.binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0


def holm(p_values: Sequence[float]) -> list[float]:
    """Each p as it stands when all are looked at together (Holm, 1979), in their order.

    Calling those below 0.05 differences is wrong about even one of them in at most 5 % of runs.
    """
    adjusted_p, least = [0.0] * len(p_values), 0.0
    for rank, at in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        least = max(least, min(1.0, (len(p_values) - rank) * p_values[at]))
        adjusted_p[at] = least
    return adjusted_p


# --- other quantities ----------------------------------------------------------------------------------------------


def ratio_of_totals(tops: Mapping[str, float], bottoms: Mapping[str, float]) -> Interval | None:
    """One sum over another, as cost over right answers, with Fieller's interval (1954), clustered by item.

    Args:
        tops, bottoms: each item's part of either sum, its samples added up; items in both count.

    None for fewer than two items, and where the lower sum is not surely above zero: the ratio may then be
    anything.
    """
    from scipy import special

    shared = [i for i in tops if i in bottoms]
    n = len(shared)
    if n < 2:
        return None
    top, bottom = (np.array([float(of[i]) for i in shared]) for of in (tops, bottoms))
    over, under = float(top.mean()), float(bottom.mean())
    spread = float(special.stdtrit(n - 1, 0.975)) ** 2 * np.cov(top, bottom) / n
    left = under**2 - float(spread[1, 1])
    if under <= 0 or left <= 0:
        return None
    middle = over * under - float(spread[0, 1])
    root = math.sqrt(max(0.0, middle**2 - left * (over**2 - float(spread[0, 0]))))
    value = over / under
    return Interval(value, min(value, (middle - root) / left), max(value, (middle + root) / left))


def percentiles(values: Sequence[float]) -> dict[str, float] | None:
    """p50, p95 and p99 by linear interpolation; None for no values."""
    if not values:
        return None
    p50, p95, p99 = np.percentile(np.asarray(values, dtype=float), [50, 95, 99])
    return {"p50": float(p50), "p95": float(p95), "p99": float(p99)}


def quantile_interval(ordered: FloatArray, q: float, number: float | None = None) -> tuple[float, float] | None:
    """The distribution-free interval of a quantile, from fractional order statistics (Hutson, 1999).

    Rank r of n values lies below the quantile with the chance that a Beta(r, n + 1 - r) variable is below `q`; the
    ranks at which that is 97.5 % and 2.5 % are fractions, and the bounds are interpolated between the values
    next to them. So it is neither too wide, as with whole ranks, nor resampled: a bootstrap's interval covers
    too little in the tail.

    Args:
        ordered: ascending.
        q: 0.95 for the 95th percentile.
        number: how many independent values they are worth; None: their own number.

    None where so few values cannot bound the quantile on both sides: below 6 for the median, 72 for the 95th
    percentile, 368 for the 99th.
    """
    # Here, not above: it takes most of a second, which every refused command would wait for.
    from scipy import optimize, special

    worth = float(len(ordered) if number is None else number)
    if max(q, 1 - q) ** worth > 0.025 - 1e-12:
        return None

    def bound(chance: float) -> float:
        def off(level: float) -> float:
            return float(special.betainc(level * (worth + 1), (1 - level) * (worth + 1), q)) - chance

        level = optimize.brentq(off, 1 / (worth + 1), worth / (worth + 1))
        place = level * (len(ordered) + 1) - 1
        below = min(max(0, int(place)), len(ordered) - 1)
        above = min(below + 1, len(ordered) - 1)
        share = min(1.0, max(0.0, place - below))
        return float(ordered[below] + share * (ordered[above] - ordered[below]))

    return bound(0.975), bound(0.025)


def median_interval(values: Sequence[float]) -> Interval | None:
    """The median with its distribution-free interval (`quantile_interval`).

    Below six values no such interval reaches 95 %; it is their whole range then, which covers less.
    """
    if not values:
        return None
    ordered = np.sort(np.asarray(values, dtype=float))
    middle = float(np.median(ordered))
    low, high = quantile_interval(ordered, 0.5) or (float(ordered[0]), float(ordered[-1]))
    return Interval(middle, min(middle, low), max(middle, high))


def median_ratio(a: Sequence[float], b: Sequence[float], *, seed: int = 0) -> Interval | None:
    """Median of `a` over median of `b`, two independent sets of values, with the percentile interval of 2,000
    seeded bootstrap samples.

    None with fewer than six values on a side, where resampling says little. Two channels that answer the same
    items are not independent: `latency.paired_median_ratio` knows that.
    """
    if len(a) < 6 or len(b) < 6:
        return None
    rng = np.random.default_rng(seed)
    tops, bottoms = (_resampled_medians(np.sort(np.asarray(values, dtype=float)), 2000, rng) for values in (a, b))
    low, high = np.percentile(tops / np.maximum(bottoms, 1e-9), [2.5, 97.5])
    value = float(np.median(a) / max(1e-9, float(np.median(b))))
    return Interval(value, min(value, float(low)), max(value, float(high)))


def _resampled_medians(ordered: FloatArray, times: int, rng: np.random.Generator) -> FloatArray:
    """Medians of so many bootstrap samples, drawn without the samples: 100,000 values need no 2,000 copies.

    The sorted draws of a sample stand where sorted uniform numbers fall among the values, and the middle ones of
    those have beta distributions.
    """
    n = len(ordered)
    lower = (n + 1) // 2
    first = rng.beta(lower, n + 1 - lower, times)
    # With an even number the next one as well: the least of those that are left above.
    second = first if n % 2 else first + (1 - first) * rng.beta(1, n - lower, times)
    places = [np.minimum((level * n).astype(int), n - 1) for level in (first, second)]
    middle: FloatArray = (ordered[places[0]] + ordered[places[1]]) / 2
    return middle
