"""Intervals: equal to scipy's where it has them, and right as often as they say where it has not."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats as scipy_stats

from dsr1kit.compare.stats import clustered_share, median_interval, paired_difference, percentiles

RUNS = 2_000


def single(flags: np.ndarray) -> dict[str, list[bool]]:
    return {str(i): [bool(flag)] for i, flag in enumerate(flags)}


def several(rows: np.ndarray) -> dict[str, list[bool]]:
    return {str(i): [bool(flag) for flag in row] for i, row in enumerate(rows)}


@pytest.mark.parametrize(("right", "n"), [(0, 1), (1, 1), (0, 20), (20, 20), (7, 20), (1, 500), (499, 500)])
def test_with_one_sample_an_item_the_interval_is_wilsons(right: int, n: int) -> None:
    told = clustered_share(single(np.arange(n) < right))
    wanted = scipy_stats.binomtest(right, n).proportion_ci(method="wilson")
    assert told is not None
    assert told.value == right / n
    assert (told.low, told.high) == pytest.approx((wanted.low, wanted.high), abs=1e-12)
    assert told.low <= told.value <= told.high


@pytest.mark.parametrize(("n", "p"), [(50, 0.7), (100, 0.9), (30, 0.5), (200, 0.4)])
def test_the_share_of_single_samples_is_covered(n: int, p: float) -> None:
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(RUNS):
        told = clustered_share(single(rng.random(n) < p))
        assert told is not None
        hits += told.low <= p <= told.high
    assert 0.93 <= hits / RUNS <= 0.98


@pytest.mark.parametrize(
    ("items", "samples", "mean", "strength"), [(50, 4, 0.7, 1.0), (40, 8, 0.5, 0.5), (60, 3, 0.8, 5.0)]
)
def test_the_share_of_several_samples_an_item_is_covered(
    items: int, samples: int, mean: float, strength: float
) -> None:
    # Each item has its own chance, from a beta distribution: samples of an item go together.
    rng = np.random.default_rng(2)
    hits = 0
    for _ in range(RUNS):
        chances = rng.beta(mean * strength, (1 - mean) * strength, items)
        told = clustered_share(several(rng.random((items, samples)) < chances[:, None]))
        assert told is not None
        hits += told.low <= mean <= told.high
    assert 0.93 <= hits / RUNS <= 0.98


def width(outcomes: dict[str, list[bool]]) -> float:
    told = clustered_share(outcomes)
    assert told is not None
    return told.high - told.low


def test_samples_that_repeat_their_item_add_nothing_and_even_ones_count_fully() -> None:
    flags = np.arange(40) < 28
    assert width(several(np.repeat(flags[:, None], 5, axis=1))) == pytest.approx(width(single(flags)))
    even = {str(i): [True, False] for i in range(40)}
    assert width(even) == pytest.approx(width(single(np.arange(80) < 40)))


def test_degenerate_shares() -> None:
    assert clustered_share({}) is None
    assert clustered_share({"a": []}) is None
    one = clustered_share({"a": [True, True, False]})
    assert one is not None
    assert one.low < 2 / 3 < one.high
    right = clustered_share({str(i): [True] * 4 for i in range(10)})
    assert right is not None
    assert (right.value, right.high) == (1.0, 1.0)
    # Forty samples that agree ten by ten prove no more than ten items do.
    assert right.low == pytest.approx(scipy_stats.binomtest(10, 10).proportion_ci(method="wilson").low)


@pytest.mark.parametrize(
    ("n", "both", "only_a", "only_b"),
    [(50, 0.85, 0.06, 0.03), (100, 0.90, 0.05, 0.02), (40, 0.5, 0.25, 0.10), (200, 0.6, 0.1, 0.1)],
)
def test_the_paired_difference_is_covered(n: int, both: float, only_a: float, only_b: float) -> None:
    rng = np.random.default_rng(3)
    hits = 0
    for _ in range(RUNS):
        cell = rng.choice(4, size=n, p=[both, only_a, only_b, 1 - both - only_a - only_b])
        told = paired_difference(single((cell == 0) | (cell == 1)), single((cell == 0) | (cell == 2)))
        assert told is not None
        hits += told.low <= only_a - only_b <= told.high
    assert 0.93 <= hits / RUNS <= 0.98


def test_two_equal_channels_are_rarely_told_apart() -> None:
    rng = np.random.default_rng(4)
    told_apart = 0
    for _ in range(RUNS):
        told = paired_difference(single(rng.random(60) < 0.8), single(rng.random(60) < 0.8))
        assert told is not None
        told_apart += told.low > 0 or told.high < 0
    assert told_apart / RUNS <= 0.06


def test_the_paired_difference_is_bonett_and_prices() -> None:
    # n = 100, 12 right only by a, 3 only by b: the formula of the paper, by hand.
    a = np.arange(100) < 62
    b = np.concatenate([np.arange(62) < 50, np.arange(38) < 3])
    told = paired_difference(single(a), single(b))
    p12, p21 = 13 / 102, 4 / 102
    half = 1.959963984540054 * math.sqrt((p12 + p21 - (p12 - p21) ** 2) / 102)
    assert told is not None
    assert told.value == pytest.approx(0.09)
    assert (told.low, told.high) == pytest.approx((p12 - p21 - half, p12 - p21 + half))
    assert (told.items, told.items_to_settle) == (100, None)


def test_swapping_the_channels_mirrors_the_difference() -> None:
    rng = np.random.default_rng(5)
    a, b = several(rng.random((30, 3)) < 0.7), several(rng.random((30, 3)) < 0.5)
    one, other = paired_difference(a, b), paired_difference(b, a)
    assert one is not None
    assert other is not None
    assert (one.value, one.low, one.high) == pytest.approx((-other.value, -other.high, -other.low))
    assert one.items_to_settle == other.items_to_settle


def test_only_items_that_both_answered_count() -> None:
    told = paired_difference({"x": [True], "y": [True], "z": []}, {"y": [False], "z": [True], "w": [True]})
    assert told is not None
    assert (told.items, told.value) == (1, 1.0)
    assert paired_difference({"x": [True]}, {"y": [True]}) is None
    assert paired_difference({}, {}) is None


def test_the_items_that_would_settle_it_do_settle_it_and_are_more_than_there_were() -> None:
    rng = np.random.default_rng(6)
    seen = 0
    for n in (1, 2, 3, 5, 8, 20, 40):
        for _ in range(60):
            a, b = rng.random(n) < 0.75, rng.random(n) < 0.6
            told = paired_difference(single(a), single(b))
            assert told is not None
            unsure = told.low <= 0 <= told.high
            assert (told.items_to_settle is not None) == (unsure and told.value != 0)
            if told.items_to_settle is None:
                continue
            seen += 1
            assert told.items_to_settle > n
            # More items of the same make: whole copies of these, the first count that is enough.
            copies = math.ceil(told.items_to_settle / n)
            if copies * n < 5_000:
                more = paired_difference(single(np.tile(a, copies)), single(np.tile(b, copies)))
                assert more is not None
                assert more.low > 0 or more.high < 0
    assert seen > 50


def test_no_gap_at_all_asks_for_no_number_of_items() -> None:
    same = single(np.arange(20) < 12)
    told = paired_difference(same, same)
    assert told is not None
    assert told.value == 0
    assert told.low < 0 < told.high
    assert told.items_to_settle is None


@pytest.mark.parametrize("n", [6, 15, 50, 101])
def test_the_median_is_covered(n: int) -> None:
    rng = np.random.default_rng(7)
    hits = 0
    for _ in range(RUNS):
        told = median_interval(list(rng.lognormal(0.0, 1.0, n)))
        assert told is not None
        hits += told.low <= 1.0 <= told.high
    assert 0.94 <= hits / RUNS <= 0.985


def test_few_values_give_their_range_and_none_give_nothing() -> None:
    assert median_interval([]) is None
    assert median_interval([2.0]) == (2.0, 2.0, 2.0)
    assert median_interval([3.0, 1.0, 2.0]) == (2.0, 1.0, 3.0)


def test_percentiles_are_numpys_and_nothing_for_no_values() -> None:
    values = [0.5, 3.0, 1.0, 2.0]
    told = percentiles(values)
    assert told == {
        name: pytest.approx(np.percentile(values, p)) for name, p in (("p50", 50), ("p95", 95), ("p99", 99))
    }
    assert percentiles([1.5]) == {"p50": 1.5, "p95": 1.5, "p99": 1.5}
    assert percentiles([]) is None
