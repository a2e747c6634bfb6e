"""Percentiles: statsmodels' where it has them, and held by their intervals as often as these say."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import pytest
from statsmodels.duration.survfunc import SurvfuncRight

from dsr1kit.compare.latency import (
    CensoredPercentile,
    censored_percentiles,
    paired_median_ratio,
    percentile_intervals,
)
from dsr1kit.compare.stats import Interval, median_interval, percentiles

RUNS = 2_000


def lasting(rng: np.random.Generator, items: int, samples: int = 1, alike: float = 0.0) -> np.ndarray:
    """Seconds [item, sample] with a long tail: one in twenty takes four times as long; `alike` is what items share."""
    times = np.exp(rng.normal(0, alike, (items, 1)) + rng.normal(0, 0.4, (items, samples)))
    return np.where(rng.random(times.shape) < 0.05, 4 * times, times)


def truth(samples: int, alike: float, q: float) -> float:
    return float(np.percentile(lasting(np.random.default_rng(99), 1_000_000 // samples, samples, alike), q))


def assert_covers(told: Iterable[Interval | CensoredPercentile | None], value: float) -> None:
    """Of RUNS stated intervals 93 to 97 % hold the value; all but one in fifty must be stated."""
    stated = [one for one in told if one is not None]
    assert len(stated) >= 0.98 * RUNS
    held = sum(one.low <= value <= (math.inf if one.high is None else one.high) for one in stated)
    assert 0.93 <= held / len(stated) <= 0.97


@pytest.mark.parametrize(("n", "qs"), [(100, (50, 95)), (200, (50, 95)), (400, (50, 95, 99))])
def test_percentiles_of_independent_times_are_covered(n: int, qs: tuple[int, ...]) -> None:
    rng = np.random.default_rng(1)
    told = [percentile_intervals(lasting(rng, n).ravel(), qs) for _ in range(RUNS)]
    for q in qs:
        assert_covers((one[f"p{q}"] for one in told), truth(1, 0.0, q))


@pytest.mark.parametrize(
    ("items", "samples", "alike", "qs"),
    [(40, 4, 0.6, (50,)), (100, 4, 0.6, (50, 95)), (100, 8, 0.5, (50, 95)), (150, 2, 0.0, (50, 95))],
)
def test_percentiles_of_several_samples_an_item_are_covered(
    items: int, samples: int, alike: float, qs: tuple[int, ...]
) -> None:
    rng = np.random.default_rng(2)
    clusters = np.repeat(np.arange(items), samples).tolist()
    told = [
        percentile_intervals(lasting(rng, items, samples, alike).ravel(), qs, clusters=clusters) for _ in range(RUNS)
    ]
    for q in qs:
        assert_covers((one.get(f"p{q}") for one in told), truth(samples, alike, q))


def test_the_value_is_the_plain_percentile_and_lies_within_its_interval() -> None:
    times = lasting(np.random.default_rng(3), 500).ravel().tolist()
    told = percentile_intervals(times)
    assert {name: one.value for name, one in told.items()} == percentiles(times)
    assert all(one.low <= one.value <= one.high for one in told.values())
    assert told["p50"] == median_interval(times)
    assert list(percentile_intervals(times, (12.5, 90))) == ["p12.5", "p90"]


@pytest.mark.parametrize(("n", "names"), [(0, []), (5, []), (6, ["p50"]), (71, ["p50"]), (72, ["p50", "p95"]),
                                          (367, ["p50", "p95"]), (368, ["p50", "p95", "p99"])])  # fmt: skip
def test_a_percentile_is_left_out_where_so_few_values_cannot_bound_it(n: int, names: list[str]) -> None:
    assert list(percentile_intervals(lasting(np.random.default_rng(4), n).ravel())) == names
    # Samples of one item are no more items.
    twice = lasting(np.random.default_rng(4), n, 2, alike=0.6).ravel()
    assert set(percentile_intervals(twice, clusters=np.repeat(np.arange(n), 2).tolist())) <= set(names)


def test_repeated_times_add_nothing_and_single_ones_lose_nothing() -> None:
    times = lasting(np.random.default_rng(5), 200).ravel()
    once, named = (percentile_intervals(times, clusters=c)["p50"] for c in (None, [f"item {i}" for i in range(200)]))
    assert once == named
    again = percentile_intervals(np.repeat(times, 4), clusters=np.repeat(np.arange(200), 4).tolist())["p50"]
    # Not narrower for being said four times; a little wider, since that is estimated.
    assert 0.97 <= math.log(again.high / again.low) / math.log(once.high / once.low) <= 1.1


# --- requests that were given up -----------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::RuntimeWarning:statsmodels")  # of its own logarithms of nothing
@pytest.mark.parametrize("n", [97, 211, 401])
def test_kaplan_meier_is_statsmodels(n: int) -> None:
    rng = np.random.default_rng(6)
    times, clock = lasting(rng, n).ravel(), rng.exponential(6, n)
    seen, ended = np.minimum(times, clock), times <= clock
    theirs = SurvfuncRight(seen, ended)
    ours = censored_percentiles(seen, ended.tolist(), (10, 50, 80, 90))
    for q in (10, 50, 80, 90):
        low, high = theirs.quantile_ci(q / 100)
        told = ours[f"p{q}"]
        assert told is not None
        assert told == (theirs.quantile(q / 100), low, None if math.isinf(high) else high)


def test_without_any_given_up_it_is_the_empirical_quantile() -> None:
    times = lasting(np.random.default_rng(7), 300).ravel()
    told = censored_percentiles(times, [True] * 300)
    assert told.keys() == {"p50", "p95", "p99"}
    for q, name in ((50, "p50"), (95, "p95"), (99, "p99")):
        one = told[name]
        assert one is not None
        assert one.value == np.percentile(times, q, method="inverted_cdf")
        assert one.low <= one.value <= (math.inf if one.high is None else one.high)


@pytest.mark.parametrize(("n", "qs"), [(100, (50, 80)), (200, (50, 80, 95)), (400, (50, 80, 95))])
def test_percentiles_of_times_some_of_which_were_given_up_are_covered(n: int, qs: tuple[int, ...]) -> None:
    rng = np.random.default_rng(8)

    def told() -> dict[str, CensoredPercentile | None]:
        times, clock = lasting(rng, n).ravel(), rng.exponential(15, n)
        return censored_percentiles(np.minimum(times, clock), (times <= clock).tolist(), qs)

    runs = [told() for _ in range(RUNS)]
    for q in qs:
        assert_covers((one[f"p{q}"] for one in runs), truth(1, 0.0, q))


def test_percentiles_under_one_clock_for_all_and_several_samples_an_item_are_covered() -> None:
    rng = np.random.default_rng(9)
    clusters = np.repeat(np.arange(100), 4).tolist()

    def told() -> dict[str, CensoredPercentile | None]:
        times = lasting(rng, 100, 4, 0.6).ravel()
        return censored_percentiles(np.minimum(times, 9.0), (times <= 9.0).tolist(), (50, 80, 95), clusters=clusters)

    runs = [told() for _ in range(RUNS)]
    for q in (50, 80, 95):
        assert_covers((one[f"p{q}"] for one in runs), truth(4, 0.6, q))


def test_what_was_given_up_makes_percentiles_longer_than_those_of_the_answers_alone() -> None:
    times = lasting(np.random.default_rng(10), 400).ravel()
    seen, ended = np.minimum(times, 2.0), times <= 2.0
    plain, told = percentiles(seen[ended].tolist()), censored_percentiles(seen, ended.tolist())
    assert plain is not None
    assert told["p50"] is not None
    assert told["p50"].value > plain["p50"]
    # More than one in twenty had not ended by then: nobody knows when the 95th did.
    assert told["p95"] is None


def test_degenerate_times() -> None:
    assert percentile_intervals([]) == {}
    assert censored_percentiles([], []) == {"p50": None, "p95": None, "p99": None}
    assert censored_percentiles([1.0, 2.0], [False, False]) == {"p50": None, "p95": None, "p99": None}
    assert censored_percentiles([3.0], [True], (50,)) == {"p50": CensoredPercentile(3.0, 3.0, None)}
    assert censored_percentiles([2.0] * 50, [True] * 50, (50,)) == {"p50": CensoredPercentile(2.0, 2.0, None)}
    assert percentile_intervals([2.0] * 50, (50,)) == {"p50": Interval(2.0, 2.0, 2.0)}
    # One item alone says nothing of how items differ.
    assert percentile_intervals([1.0, 2.0] * 40, clusters=["only"] * 80) == {}


# --- two channels --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("items", "samples", "alike"), [(60, 1, 0.6), (60, 4, 0.6), (200, 1, 0.5), (50, 2, 0.0)])
def test_the_ratio_of_medians_over_the_same_items_is_covered(items: int, samples: int, alike: float) -> None:
    rng = np.random.default_rng(11)

    def told() -> Interval | None:
        shared = np.exp(rng.normal(0, alike, (items, 1)))
        a, b = (shared * lasting(rng, items, samples) for _ in "ab")
        return paired_median_ratio(dict(enumerate((1.5 * a).tolist())), dict(enumerate(b.tolist())))

    assert_covers((told() for _ in range(RUNS)), 1.5)


def test_the_ratio_over_the_same_items_knows_what_they_share() -> None:
    rng = np.random.default_rng(12)
    times = lasting(rng, 80, 1, 1.0)
    a, b = ({str(i): [float(t)] for i, t in enumerate((times * f).ravel())} for f in (2.0, 1.0))
    told, back = paired_median_ratio(a, b), paired_median_ratio(b, a)
    # Twice as long on every item: nothing is left to chance.
    assert told == pytest.approx((2.0, 2.0, 2.0))
    assert back is not None
    assert back == pytest.approx((0.5, 0.5, 0.5))
    assert paired_median_ratio(dict(list(a.items())[:5]), b) is None
    assert paired_median_ratio(a, {}) is None
