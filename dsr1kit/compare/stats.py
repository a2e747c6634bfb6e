"""Intervals: how sure a share, a difference or a percentile is.

Items are the units that vary; several samples of one item are one cluster (Miller, "Adding Error Bars to
Evals", arXiv 2411.00640). All intervals are 95 %. Knows nothing about channels or files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

_Z = 1.959963984540054


class Interval(NamedTuple):
    """An estimate with its 95 % interval."""

    value: float
    low: float
    high: float


def clustered_share(outcomes: Mapping[str, Sequence[bool]]) -> Interval | None:
    """Mean over items of the share of successes, with Wilson's interval at the effective sample size.

    Args:
        outcomes: for each item, success or not of each of its samples.

    The effective size is p(1-p) / SE^2, SE being the standard error between items; it lies between the
    number of items (samples of an item all alike) and the number of samples (all independent). With one
    sample an item this is Wilson's interval itself. None where there is nothing to count.
    """
    means = np.array([sum(samples) / len(samples) for samples in outcomes.values() if samples])
    if means.size == 0:
        return None
    p = float(means.mean())
    items, samples = means.size, sum(len(s) for s in outcomes.values())
    size = float(items)
    if items > 1 and samples > items and 0 < p < 1:
        variance = float(means.var(ddof=1)) / items
        size = float(samples)
        if variance > 0:
            size = min(size, max(float(items), p * (1 - p) / variance))
    return Interval(p, *_wilson(p, size))


def _wilson(p: float, n: float) -> tuple[float, float]:
    centre = (p + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z / (1 + _Z**2 / n) * math.sqrt(p * (1 - p) / n + _Z**2 / (4 * n**2))
    # At 0 and 1 rounding may leave the bound a hair inside the estimate.
    return min(p, max(0.0, centre - half)), max(p, min(1.0, centre + half))


class PairedDifference(NamedTuple):
    """Accuracy of `a` less that of `b` over the items both answered.

    Attributes:
        items: how many items both answered.
        items_to_settle: how many in all would make the interval exclude zero if further items went as these
            did; None where it does so already, or where no gap was seen.
    """

    value: float
    low: float
    high: float
    items: int
    items_to_settle: int | None

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval leaves zero out, so that the difference may be called one."""
        return self.low > 0 or self.high < 0


def paired_difference(a: Mapping[str, Sequence[bool]], b: Mapping[str, Sequence[bool]]) -> PairedDifference | None:
    """The mean difference over shared items, with the adjusted Wald interval of Bonett and Price (2012).

    One item each way is added before the usual interval is taken, which keeps its coverage when few items
    differ; for single samples this is their method exactly, for means over samples it is cautious.
    """
    shared = [i for i in a if i in b and len(a[i]) and len(b[i])]
    if not shared:
        return None
    d = np.array([sum(a[i]) / len(a[i]) - sum(b[i]) / len(b[i]) for i in shared])
    value, square = float(d.mean()), float(np.mean(d**2))
    low, high = _bonett_price(value, square, len(shared))
    settle = None
    if low <= 0 <= high and abs(value) > 1e-9:
        settle = _first_that_excludes_zero(value, square, len(shared))
    return PairedDifference(value, low, high, len(shared), settle)


def _bonett_price(value: float, square: float, n: int) -> tuple[float, float]:
    """The interval from mean and mean square of `n` differences, with +1 and -1 added to them."""
    centre = n * value / (n + 2)
    half = _Z * math.sqrt(max(0.0, (n * square + 2) / (n + 2) - centre**2) / (n + 2))
    return max(-1.0, centre - half), min(1.0, centre + half)


def _first_that_excludes_zero(value: float, square: float, n: int) -> int:
    def settled(m: int) -> bool:
        low, high = _bonett_price(value, square, m)
        return low > 0 or high < 0

    few, enough = n, 2 * n
    while not settled(enough):
        few, enough = enough, 2 * enough
    while enough - few > 1:
        middle = (few + enough) // 2
        few, enough = (few, middle) if settled(middle) else (middle, enough)
    return enough


def percentiles(values: Sequence[float]) -> dict[str, float] | None:
    """p50, p95 and p99 by linear interpolation; None for no values."""
    if not values:
        return None
    p50, p95, p99 = np.percentile(np.asarray(values, dtype=float), [50, 95, 99])
    return {"p50": float(p50), "p95": float(p95), "p99": float(p99)}


def median_interval(values: Sequence[float]) -> Interval | None:
    """The median with its exact, distribution-free interval from order statistics.

    Below six values no such interval reaches 95 %; it is their whole range then, which covers less.
    """
    if not values:
        return None
    # Here, not above: it takes most of a second, which every refused command would wait for.
    from scipy import stats

    ordered = np.sort(np.asarray(values, dtype=float))
    n = ordered.size
    rank = int(stats.binom.ppf(0.025, n, 0.5))
    low = ordered[max(0, rank - 1)] if n > 5 else ordered[0]
    high = ordered[min(n - 1, n - rank)] if n > 5 else ordered[-1]
    return Interval(float(np.median(ordered)), float(low), float(high))


def median_ratio(a: Sequence[float], b: Sequence[float], *, seed: int = 0) -> Interval | None:
    """Median of `a` over median of `b`, with the percentile interval of 2,000 seeded bootstrap samples.

    None with fewer than six values on a side, where resampling says little.
    """
    if len(a) < 6 or len(b) < 6:
        return None
    rng = np.random.default_rng(seed)
    tops, bottoms = (
        np.median(rng.choice(np.asarray(values, dtype=float), (2000, len(values))), axis=1) for values in (a, b)
    )
    ratios = tops / np.maximum(bottoms, 1e-9)
    low, high = np.percentile(ratios, [2.5, 97.5])
    value = float(np.median(a) / max(1e-9, float(np.median(b))))
    return Interval(value, min(value, float(low)), max(value, float(high)))
