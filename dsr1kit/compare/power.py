"""Before spending anything: how many items and samples it takes to tell two channels apart.

Turns the very interval of `paired_difference` round: of items drawn from a large set, one has a difference
between the two channels' chances that varies from item to item (`between`), and samples that vary round those
chances (`within`); the mean of `n` items with K samples each then varies by (between + within / K) / n (Miller,
arXiv 2411.00640, section 5). Shares and differences are fractions: 0.03 is three points. Knows nothing about
money or time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from dsr1kit.compare.stats import adjusted
from dsr1kit.errors import UsageError

_NORMAL = NormalDist()


class PairedPilot(NamedTuple):
    """What two channels' answers to the same items say about how a comparison of them would go.

    Attributes:
        difference: accuracy of the one less that of the other.
        between: variance, from item to item, of the difference between the two chances of being right.
        within: variance of a single answer round its chance, mean over items, both channels' added up.
        items: how many items it rests on; 0: it was assumed.
    """

    difference: float
    between: float
    within: float
    items: int


@dataclass(frozen=True, slots=True)
class Plan:
    """What a comparison of two channels takes.

    Attributes:
        items, samples: questions, and answers of each channel to each of them.
        requests: of both channels together.
        power: chance that the interval of the difference leaves zero out; that of these very items, so at least
            what was asked for.
        difference: what would be detected, as a share.
    """

    items: int
    samples: int
    requests: int
    power: float
    difference: float


def pilot(a: Mapping[str, Sequence[bool]], b: Mapping[str, Sequence[bool]]) -> PairedPilot | None:
    """What shared items say; None for fewer than two of them.

    `between` and `within` are told apart by items with two samples or more on both sides. Where there is none,
    all is taken to lie between items: right for one sample an item, and cautious for several, of which it
    then expects nothing.
    """
    shared = [i for i in a if i in b and len(a[i]) and len(b[i])]
    if len(shared) < 2:
        return None
    shares = np.array([[sum(side[i]) / len(side[i]) for side in (a, b)] for i in shared])
    counts = np.array([[len(side[i]) for side in (a, b)] for i in shared])
    d = shares[:, 0] - shares[:, 1]
    total, several = float(np.var(d, ddof=1)), (counts > 1).all(axis=1)
    if not several.any():
        return PairedPilot(float(d.mean()), total, 0.0, len(shared))
    spread = shares[several] * (1 - shares[several]) * counts[several] / (counts[several] - 1)
    within = spread.mean(axis=0)
    # What sampling alone adds to the variance of d, an item with few samples more than one with many.
    noise = float((within * (1 / counts).mean(axis=0)).sum())
    return PairedPilot(float(d.mean()), max(0.0, total - noise), float(within.sum()), len(shared))


def assumed(
    difference: float, *, share_a: float, between: float | None = None, correlation: float = 0.0
) -> PairedPilot:
    """A pilot out of assumptions.

    Args:
        difference: accuracy of `a` less that of `b`.
        share_a: accuracy of `a`.
        between: variance from item to item of the difference between the chances; None: half of what a single
            sample varies in all. It decides what several samples gain, and nothing for one sample: where that
            matters, a pilot knows better.
        correlation: between the two channels' right answers over items; 0 is cautious: where the same items are
            hard for both, fewer are enough.

    Raises:
        UsageError: a share below 0 or above 1, no difference, or a correlation outside 0 .. 1.
    """
    share_b = share_a - difference
    if not (0 <= share_a <= 1 and 0 <= share_b <= 1):
        raise UsageError(
            f"shares lie between 0 and 1: {share_a:g} against {share_b:g} cannot be; give the accuracy of the first "
            "channel and a difference that leaves the second one between 0 and 1, 0.03 for three points"
        )
    if not 0 <= correlation <= 1 or (between is not None and between < 0):
        raise UsageError("a correlation lies between 0 and 1, a variance between items is not below 0")
    single = share_a * (1 - share_a) + share_b * (1 - share_b)
    together = 2 * correlation * math.sqrt(share_a * (1 - share_a) * share_b * (1 - share_b))
    least = abs(difference) * (1 - abs(difference))  # of any two channels so far apart
    total = max(single - together, least)
    apart = max(total / 2, least) if between is None else between
    return PairedPilot(difference, apart, max(0.0, total - apart), 0)


def items_to_detect(
    difference: float,
    *,
    share_a: float,
    samples: int = 1,
    between: float | None = None,
    correlation: float = 0.0,
    power: float = 0.8,
    alpha: float = 0.05,
    comparisons: int = 1,
) -> Plan:
    """The fewest items that detect a difference, from assumptions alone; arguments as `assumed` and `items_from_pilot`.

    Raises:
        UsageError: as they do.
    """
    guess = assumed(difference, share_a=share_a, between=between, correlation=correlation)
    return items_from_pilot(guess, samples, power, alpha=alpha, comparisons=comparisons)


def items_from_pilot(
    seen: PairedPilot,
    samples: int = 1,
    power: float = 0.8,
    *,
    difference: float | None = None,
    alpha: float = 0.05,
    comparisons: int = 1,
) -> Plan:
    """The fewest items that detect a difference in a share `power` of comparisons.

    Args:
        samples: answers of each channel to each item.
        difference: to be detected; None: the pilot's own.
        alpha: chance of calling a difference where there is none. The kit's own intervals are for 0.05.
        comparisons: how many are made in one run; each then gets its part of `alpha`, as Holm's first step does.

    Raises:
        UsageError: no difference to detect, or a number that cannot be meant.
    """
    wanted = seen.difference if difference is None else difference
    _check(samples, alpha, comparisons, power, wanted)
    reached = _power_by_items(seen, wanted, samples, alpha / comparisons)
    few, enough = 1, 2
    while reached(enough) < power:
        few, enough = enough, 2 * enough
    while enough - few > 1:
        middle = (few + enough) // 2
        few, enough = (few, middle) if reached(middle) >= power else (middle, enough)
    return Plan(enough, samples, 2 * enough * samples, reached(enough), wanted)


def power_of(
    seen: PairedPilot,
    items: int,
    samples: int = 1,
    *,
    difference: float | None = None,
    alpha: float = 0.05,
    comparisons: int = 1,
) -> float:
    """The chance that so many items and samples detect a difference; arguments as `items_from_pilot`."""
    wanted = seen.difference if difference is None else difference
    _check(samples, alpha, comparisons, items=items)
    return _power_by_items(seen, wanted, samples, alpha / comparisons)(items)


def detectable(
    items: int,
    *,
    share_a: float | None = None,
    seen: PairedPilot | None = None,
    samples: int = 1,
    between: float | None = None,
    correlation: float = 0.0,
    power: float = 0.8,
    alpha: float = 0.05,
    comparisons: int = 1,
) -> float | None:
    """The smallest difference that so many items detect, from a pilot's variances or from an assumed accuracy.

    Arguments as `items_from_pilot` and `assumed`, one of `seen` and `share_a`. With `share_a` the second channel
    is the worse one. None where not even the largest difference would be detected.

    Raises:
        UsageError: both or neither of `seen` and `share_a`, or a number that cannot be meant.
    """
    _check(samples, alpha, comparisons, power, items=items)
    if (seen is None) == (share_a is None):
        raise UsageError("detectable needs either a pilot (seen=...) or the first channel's accuracy (share_a=...)")
    most = 1.0 if share_a is None else share_a

    def reached(difference: float) -> float:
        known = seen
        if known is None:
            assert share_a is not None  # noqa: S101 - one of the two is there
            known = assumed(difference, share_a=share_a, between=between, correlation=correlation)
        return _power_by_items(known, difference, samples, alpha / comparisons)(items)

    if most <= 0 or reached(most) < power:
        return None
    low, high = 0.0, most
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if reached(middle) >= power else (middle, high)
    return high


def _power_by_items(seen: PairedPilot, difference: float, samples: int, alpha: float) -> Callable[[int], float]:
    """The power over the number of items, the estimate taken as normal and the interval as at its expectation."""
    variance = seen.between + seen.within / samples
    square = variance + difference**2
    # Differences of one sample are 1 where there is one; those of many are as large as their spread.
    added = square / min(1.0, samples * square) if square > 0 else 1.0
    z = _NORMAL.inv_cdf(1 - alpha / 2)

    def power(items: int) -> float:
        centre, error = adjusted(difference, square, added, items)
        spread = math.sqrt(items * variance) / (items + 2)
        if spread == 0:
            return float(abs(centre) > z * error)
        return _NORMAL.cdf((centre - z * error) / spread) + _NORMAL.cdf((-centre - z * error) / spread)

    return power


def _check(
    samples: int,
    alpha: float,
    comparisons: int,
    power: float = 0.8,
    difference: float = 0.1,
    items: int = 1,
) -> None:
    for name, number in (("items", items), ("samples", samples), ("comparisons", comparisons)):
        if number < 1:
            raise UsageError(f"{name} must be at least 1, not {number}")
    if not (0 < alpha < 1 and alpha < power < 1):
        raise UsageError(f"power must lie between alpha ({alpha:g}) and 1, such as 0.8; not {power:g}")
    if not 0 < abs(difference) <= 1:
        raise UsageError(f"a difference to detect is a share above 0, 0.03 for three points; not {difference:g}")
