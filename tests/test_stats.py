"""Intervals: equal to scipy's where it has them, and right as often as they say where it has not."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from itertools import combinations

import numpy as np
import pytest
from scipy import stats as scipy_stats
from statsmodels.stats.contingency_tables import mcnemar as statsmodels_mcnemar
from statsmodels.stats.multitest import multipletests

from dsr1kit.compare.stats import (
    Interval,
    PairedDifference,
    clustered_share,
    holm,
    majority_share,
    mcnemar,
    median_interval,
    median_ratio,
    paired_difference,
    pass_at_k,
    percentiles,
    quantile_interval,
    ratio_of_totals,
)

RUNS = 2_000


def assert_covers(intervals: Iterable[Interval | PairedDifference | None], truth: float) -> None:
    """Of RUNS stated intervals, 93 to 97 % hold the truth."""
    told = list(intervals)
    assert len(told) == RUNS
    assert None not in told
    assert 0.93 <= sum(one is not None and one.low <= truth <= one.high for one in told) / RUNS <= 0.97


def single(flags: np.ndarray) -> dict[str, list[bool]]:
    return {str(i): [flag] for i, flag in enumerate(flags.astype(bool).tolist())}


def several(rows: np.ndarray) -> dict[str, list[bool]]:
    return {str(i): row for i, row in enumerate(rows.astype(bool).tolist())}


def chances(rng: np.random.Generator, mean: float, strength: float, items: int) -> np.ndarray:
    """Each item's own chance, from a beta distribution: samples of an item go together."""
    return rng.beta(mean * strength, (1 - mean) * strength, items)


@pytest.mark.parametrize(("right", "n"), [(0, 1), (1, 1), (0, 20), (20, 20), (7, 20), (1, 500), (499, 500)])
def test_with_one_sample_an_item_the_interval_is_wilsons(right: int, n: int) -> None:
    told = clustered_share(single(np.arange(n) < right))
    wanted = scipy_stats.binomtest(right, n).proportion_ci(method="wilson")
    assert told is not None
    assert told.value == right / n
    assert (told.low, told.high) == pytest.approx((wanted.low, wanted.high), abs=1e-12)
    assert told.low <= told.value <= told.high


@pytest.mark.parametrize(("n", "p"), [(50, 0.7), (100, 0.9), (30, 0.5), (200, 0.4), (300, 0.95)])
def test_the_share_of_single_samples_is_covered(n: int, p: float) -> None:
    rng = np.random.default_rng(1)
    assert_covers((clustered_share(single(rng.random(n) < p)) for _ in range(RUNS)), p)


@pytest.mark.parametrize(
    ("items", "samples", "mean", "strength"),
    [(50, 4, 0.7, 1.0), (40, 8, 0.5, 0.5), (60, 3, 0.8, 5.0), (100, 4, 0.95, 1.0), (50, 8, 0.95, 2.0)],
)
def test_the_share_of_several_samples_an_item_is_covered(
    items: int, samples: int, mean: float, strength: float
) -> None:
    rng = np.random.default_rng(2)
    drawn = (rng.random((items, samples)) < chances(rng, mean, strength, items)[:, None] for _ in range(RUNS))
    assert_covers((clustered_share(several(rows)) for rows in drawn), mean)


@pytest.mark.parametrize(
    ("items", "samples", "k", "mean", "strength"),
    [(60, 8, 4, 0.5, 1.0), (100, 8, 8, 0.3, 0.5), (100, 4, 4, 0.8, 1.0), (30, 16, 4, 0.3, 1.0)],
)
def test_pass_at_k_is_covered(items: int, samples: int, k: int, mean: float, strength: float) -> None:
    rng = np.random.default_rng(10)
    # The chance that k draws of an item with a beta chance are all wrong.
    wrong = [((1 - mean) * strength + j) / (strength + j) for j in range(k)]
    drawn = (rng.random((items, samples)) < chances(rng, mean, strength, items)[:, None] for _ in range(RUNS))
    assert_covers((pass_at_k(several(rows), k) for rows in drawn), 1 - math.prod(wrong))


def test_pass_at_k_is_the_share_of_choices_that_hold_a_right_one() -> None:
    outcomes = {"a": [True, False, False, True, False], "b": [False] * 4, "c": [True] * 6, "short": [True]}
    by_hand = [
        np.mean([any(choice) for choice in combinations(outcomes[item], 3)])
        for item in ("a", "b", "c")
    ]  # fmt: skip
    told = pass_at_k(outcomes, 3)
    assert told is not None
    assert told.value == pytest.approx(np.mean(by_hand))
    one, plain = pass_at_k(outcomes, 1), clustered_share(outcomes)
    assert one == pytest.approx(plain)
    assert pass_at_k(outcomes, 7) is None
    assert pass_at_k({}, 1) is None


def voted(rng: np.random.Generator, items: int, samples: int) -> dict[str, list[tuple[str | None, bool]]]:
    """Answers of which the wrong ones are of three kinds, and one in thirty is none."""
    right = rng.random((items, samples)) < chances(rng, 0.6, 1.5, items)[:, None]
    answer = np.where(right, 0, rng.integers(1, 4, right.shape))
    silent = rng.random(right.shape) < 1 / 30
    return {
        str(i): [(None, False) if s else (str(a), r) for a, r, s in zip(*rows, strict=True)]
        for i, rows in enumerate(zip(answer.tolist(), right.tolist(), silent.tolist(), strict=True))
    }


def test_the_majority_share_is_covered() -> None:
    rng = np.random.default_rng(11)
    truth = majority_share(voted(rng, 60_000, 5))
    assert truth is not None
    assert_covers((majority_share(voted(rng, 60, 5)) for _ in range(RUNS)), truth.value)


def test_the_majority_decides_and_ties_are_shared() -> None:
    def of(*votes: tuple[str | None, bool]) -> float:
        told = majority_share({"item": votes})
        assert told is not None
        return told.value

    assert of(("7", True), ("7", True), ("8", False)) == 1
    assert of(("7", True), ("8", False), ("8", False)) == 0
    assert of(("7", True), ("8", False)) == 0.5
    assert of(("7", True), ("8", False), ("9", False)) == pytest.approx(1 / 3)
    # Who gives no answer does not vote, however many they are.
    assert of((None, False), (None, False), ("7", True)) == 1
    assert of((None, False)) == 0
    mixed = majority_share({"a": [("7", True)], "b": [("1", False), ("2", True), ("1", False)], "none": []})
    assert mixed is not None
    assert mixed.value == 0.5
    assert majority_share({}) is None


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
    cells = (rng.choice(4, size=n, p=[both, only_a, only_b, 1 - both - only_a - only_b]) for _ in range(RUNS))
    assert_covers(
        (paired_difference(single((c == 0) | (c == 1)), single((c == 0) | (c == 2))) for c in cells), only_a - only_b
    )


@pytest.mark.parametrize(
    ("items", "samples", "mean", "worse"),
    [(50, 4, 0.75, 0.05), (200, 4, 0.9, 0.03), (30, 8, 0.6, 0.1), (40, 2, 0.7, 0.0), (100, 8, 0.5, 0.02)],
)
def test_the_paired_difference_of_several_samples_is_covered(
    items: int, samples: int, mean: float, worse: float
) -> None:
    # What is hard for the one is hard for the other: items go together between channels as within them.
    rng = np.random.default_rng(8)

    def told() -> PairedDifference | None:
        chance = chances(rng, mean, 1.5, items)[:, None]
        a, b = (rng.random((items, samples)) < c for c in (chance, chance * (1 - worse / mean)))
        return paired_difference(several(a), several(b))

    assert_covers((told() for _ in range(RUNS)), worse)


@pytest.mark.parametrize(("items", "samples"), [(100, 1), (100, 4)])
def test_two_equal_channels_are_told_apart_in_one_of_twenty(items: int, samples: int) -> None:
    rng = np.random.default_rng(4)
    claimed = 0
    for _ in range(RUNS):
        chance = chances(rng, 0.7, 1.5, items)[:, None]
        told = paired_difference(*(several(rng.random((items, samples)) < chance) for _ in "ab"))
        assert told is not None
        claimed += told.excludes_zero
    assert 0.035 <= claimed / RUNS <= 0.065


def test_the_paired_difference_is_agresti_and_mins() -> None:
    # n = 100, 12 right only by a, 3 only by b: half an item more in each of the four cells, by hand.
    a = np.arange(100) < 62
    b = np.concatenate([np.arange(62) < 50, np.arange(38) < 3])
    told = paired_difference(single(a), single(b))
    p12, p21 = 12.5 / 102, 3.5 / 102
    half = 1.959963984540054 * math.sqrt((p12 + p21 - (p12 - p21) ** 2) / 102)
    assert told is not None
    assert told.value == pytest.approx(0.09)
    assert (told.low, told.high) == pytest.approx((p12 - p21 - half, p12 - p21 + half))
    assert (told.items, told.items_to_settle) == (100, None)


def test_samples_that_repeat_their_item_leave_the_difference_as_it_is() -> None:
    rng = np.random.default_rng(9)
    a, b = rng.random((2, 40)) < 0.7
    once = paired_difference(single(a), single(b))
    thrice = paired_difference(*(several(np.repeat(flags[:, None], 3, axis=1)) for flags in (a, b)))
    assert once == pytest.approx(thrice)


def test_p_is_below_five_percent_exactly_where_the_interval_excludes_zero() -> None:
    rng = np.random.default_rng(12)
    seen = Counter()
    for n in (1, 2, 5, 20, 60, 300):
        for samples in (1, 3):
            for _ in range(100):
                rows = [rng.random((n, samples)) < p for p in rng.choice([0.5, 0.65, 0.9], 2)]
                told = paired_difference(several(rows[0]), several(rows[1]))
                assert told is not None
                assert 0 <= told.p <= 1
                assert (told.p < 0.05) == told.excludes_zero
                seen[told.excludes_zero] += 1
    assert min(seen[True], seen[False]) > 200


def test_mcnemar_is_statsmodels() -> None:
    rng = np.random.default_rng(13)
    for n in (5, 30, 200):
        a, b = rng.random(n) < 0.8, rng.random(n) < 0.7
        table = [[np.sum(a & b), np.sum(a & ~b)], [np.sum(~a & b), np.sum(~a & ~b)]]
        assert mcnemar(single(a), single(b)) == pytest.approx(statsmodels_mcnemar(table, exact=True).pvalue)
    same = single(np.arange(9) < 4)
    assert mcnemar(same, same) == 1
    assert mcnemar({"x": [True, False]}, {"x": [True]}) is None
    assert mcnemar({"x": [True]}, {"y": [True]}) is None
    # An item that only one of them answered several times is no part of it.
    assert mcnemar({"x": [True], "y": [True, True]}, {"x": [False]}) == 1


def test_holm_is_statsmodels() -> None:
    for p_values in ([0.03], [0.04, 0.001, 0.03, 0.02, 0.9], [0.5, 0.5], [0.01, 0.01, 0.04]):
        assert holm(p_values) == pytest.approx(multipletests(p_values, method="holm")[1])
    assert holm([]) == []


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
    assert_covers((median_interval(rng.lognormal(0.0, 1.0, n).tolist()) for _ in range(RUNS)), 1.0)


@pytest.mark.parametrize(("n", "q"), [(40, 0.5), (200, 0.95), (400, 0.99)])
def test_bounds_of_a_quantile_lie_between_those_ranks_that_are_too_narrow_and_too_wide(n: int, q: float) -> None:
    bounds = quantile_interval(np.arange(1.0, n + 1), q)
    assert bounds is not None
    below = scipy_stats.binom(n, q)
    # Rank r is below the quantile when r values are: P(Bin(n, q) >= r).
    narrow, wide = math.ceil(bounds[0]), math.floor(bounds[0])
    assert below.sf(narrow - 1) <= 0.975 <= below.sf(wide - 1)
    narrow, wide = math.floor(bounds[1]), math.ceil(bounds[1])
    assert below.cdf(narrow - 1) <= 0.975 <= below.cdf(wide - 1)


@pytest.mark.parametrize(("n", "q"), [(5, 0.5), (71, 0.95), (367, 0.99)])
def test_a_quantile_that_so_few_values_cannot_bound_has_no_interval(n: int, q: float) -> None:
    assert quantile_interval(np.arange(float(n)), q) is None
    assert quantile_interval(np.arange(float(n + 1)), q) is not None


@pytest.mark.parametrize(("few", "many"), [(20, 20), (50, 101)])
def test_the_ratio_of_medians_is_covered(few: int, many: int) -> None:
    rng = np.random.default_rng(14)
    drawn = ((rng.lognormal(0, 0.6, few), rng.lognormal(0.5, 0.6, many)) for _ in range(RUNS))
    told = (median_ratio(a.tolist(), b.tolist(), seed=seed) for seed, (a, b) in enumerate(drawn))
    assert_covers(told, math.exp(-0.5))


@pytest.mark.parametrize("n", [8, 9])
def test_the_ratio_of_medians_is_that_of_whole_resamples(n: int) -> None:
    rng = np.random.default_rng(15)
    a, b = rng.lognormal(0, 0.6, n), rng.lognormal(0, 0.6, n)
    tops, bottoms = (np.median(rng.choice(values, (200_000, n)), axis=1) for values in (a, b))
    told = median_ratio(a.tolist(), b.tolist())
    assert told is not None
    assert told.value == pytest.approx(np.median(a) / np.median(b))
    assert told[1:] == pytest.approx(np.percentile(tops / bottoms, [2.5, 97.5]), rel=0.05)
    assert median_ratio(a.tolist()[:5], b.tolist()) is None


@pytest.mark.parametrize(("items", "samples"), [(50, 1), (100, 4), (30, 4)])
def test_the_ratio_of_totals_is_covered(items: int, samples: int) -> None:
    # What an item costs has a long tail; whether it comes out right hangs on the item as well.
    rng = np.random.default_rng(16)
    truth = math.exp(0.7**2 / 2 + 0.4**2 / 2) / 0.7

    def told() -> Interval | None:
        cost = rng.lognormal(0, 0.7, (items, 1)) * rng.lognormal(0, 0.4, (items, samples))
        right = rng.random((items, samples)) < chances(rng, 0.7, 1.5, items)[:, None]
        return ratio_of_totals(*(dict(enumerate(part.sum(axis=1).tolist())) for part in (cost, right)))

    assert_covers((told() for _ in range(RUNS)), truth)


def test_degenerate_ratios_of_totals() -> None:
    told = ratio_of_totals({"a": 1.0, "b": 3.0, "c": 2.0, "elsewhere": 50.0}, {"a": 1, "b": 1, "c": 1})
    assert told is not None
    mean = scipy_stats.t.interval(0.95, 2, loc=2.0, scale=1 / math.sqrt(3))
    assert told == pytest.approx((2.0, *mean))
    assert ratio_of_totals({"a": 0.0, "b": 0.0}, {"a": 1, "b": 1}) == (0, 0, 0)
    assert ratio_of_totals({"a": 1.0, "b": 1.0}, {"a": 0, "b": 0}) is None
    assert ratio_of_totals({"a": 1.0, "b": 1.0, "c": 1.0}, {"a": 0, "b": 0, "c": 1}) is None
    assert ratio_of_totals({"a": 1.0}, {"a": 1}) is None


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
