"""The planner: as many items as it says detect a difference as often as it says."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from statsmodels.stats.power import TTestPower

from dsr1kit.compare.power import (
    PairedPilot,
    assumed,
    detectable,
    items_from_pilot,
    items_to_detect,
    pilot,
    power_of,
)
from dsr1kit.compare.stats import paired_difference
from dsr1kit.errors import UsageError

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import told_apart


def several(rows: np.ndarray) -> dict[str, list[bool]]:
    return {str(i): row for i, row in enumerate(rows.tolist())}


def detected(rng: np.random.Generator, a: np.ndarray, b: np.ndarray, samples: int) -> bool:
    """Whether answers drawn with these chances of two channels are told apart."""
    told = paired_difference(*(several(rng.random((len(p), samples)) < p[:, None]) for p in (a, b)))
    assert told is not None
    return told.excludes_zero


def test_with_chances_that_differ_by_a_ninth_three_points_take_millers_969_items() -> None:
    # Miller, arXiv 2411.00640, section 5: variance between items 1/9, none within. The kit's interval adds two.
    plan = items_from_pilot(PairedPilot(0.03, 1 / 9, 0.0, 0))
    assert plan.items == pytest.approx(969, rel=0.01)
    assert plan.requests == 2 * plan.items


@pytest.mark.parametrize(("difference", "variance"), [(0.03, 0.3), (0.05, 0.1), (0.1, 0.25)])
def test_items_are_about_those_of_a_paired_t_test(difference: float, variance: float) -> None:
    theirs = TTestPower().solve_power(effect_size=difference / variance**0.5, power=0.8, alpha=0.05)
    plan = items_from_pilot(PairedPilot(difference, variance, 0.0, 0))
    assert plan.items == pytest.approx(theirs, rel=0.05)
    assert plan.power >= 0.8
    assert power_of(PairedPilot(difference, variance, 0.0, 0), plan.items - 1) < 0.8


@pytest.mark.parametrize(("share_a", "difference"), [(0.8, 0.1), (0.95, 0.05), (0.6, 0.2)])
def test_items_planned_from_assumptions_detect_the_difference_as_often_as_asked(
    share_a: float, difference: float
) -> None:
    plan = items_to_detect(difference, share_a=share_a)
    rng = np.random.default_rng(1)
    a, b = np.full(plan.items, share_a), np.full(plan.items, share_a - difference)
    assert 0.75 <= np.mean([detected(rng, a, b, 1) for _ in range(1000)]) <= 0.86


@pytest.mark.parametrize("samples", [1, 4])
def test_items_planned_from_a_pilot_detect_the_difference_as_often_as_asked(samples: int) -> None:
    rng = np.random.default_rng(2)

    def chances(items: int) -> tuple[np.ndarray, np.ndarray]:
        a = rng.beta(1.5, 0.5, items)
        return a, a * rng.beta(9, 1, items)

    seen = pilot(*(several(rng.random((20_000, 6)) < p[:, None]) for p in chances(20_000)))
    assert seen is not None
    plan = items_from_pilot(seen, samples)
    found = np.mean([detected(rng, *chances(plan.items), samples) for _ in range(1000)])
    assert 0.75 <= found <= 0.86
    assert power_of(seen, plan.items, samples) == plan.power


def test_a_pilot_tells_what_lies_between_items_from_what_lies_within() -> None:
    rng = np.random.default_rng(3)
    a = rng.beta(2, 1, 40_000)
    b = a * rng.choice([0.5, 1.0], 40_000)
    counts = rng.choice([2, 8], 40_000)
    flags = [{str(i): (rng.random(n) < p).tolist() for i, (p, n) in enumerate(zip(side, counts, strict=True))}
             for side in (a, b)]  # fmt: skip
    seen = pilot(*flags)
    assert seen is not None
    assert seen.difference == pytest.approx(np.mean(a - b), abs=0.01)
    assert seen.between == pytest.approx(np.var(a - b), rel=0.05)
    assert seen.within == pytest.approx(np.mean(a * (1 - a)) + np.mean(b * (1 - b)), rel=0.02)
    assert seen.items == 40_000


def test_a_pilot_of_single_samples_promises_nothing_from_more_of_them() -> None:
    rng = np.random.default_rng(4)
    seen = pilot(*(several(rng.random((200, 1)) < p) for p in (0.8, 0.6)))
    assert seen is not None
    assert seen.within == 0
    one, eight = (items_from_pilot(seen, k) for k in (1, 8))
    assert eight.items == pytest.approx(one.items, rel=0.05)
    assert pilot({"x": [True]}, {"x": [False]}) is None
    assert pilot({"x": [True], "y": [True]}, {"z": [False]}) is None


def test_samples_save_items_down_to_what_items_differ_by() -> None:
    plans = [items_to_detect(0.03, share_a=0.8, samples=k) for k in (1, 2, 4, 16, 256)]
    assert [plan.items for plan in plans] == sorted((plan.items for plan in plans), reverse=True)
    assert [plan.requests for plan in plans] == sorted(plan.requests for plan in plans)
    seen = assumed(0.03, share_a=0.8)
    floor = items_from_pilot(PairedPilot(0.03, seen.between, 0.0, 0))
    assert plans[-1].items == pytest.approx(floor.items, rel=0.03)


def test_more_comparisons_a_smaller_difference_and_more_power_take_more_items() -> None:
    base = items_to_detect(0.05, share_a=0.8).items
    assert items_to_detect(0.05, share_a=0.8, comparisons=10).items > 1.5 * base
    assert items_to_detect(0.025, share_a=0.8).items > 3.5 * base
    assert items_to_detect(0.05, share_a=0.8, power=0.95).items > 1.5 * base
    assert items_to_detect(0.05, share_a=0.8, correlation=0.5).items < 0.6 * base
    assert items_to_detect(-0.05, share_a=0.75).items == base


@pytest.mark.parametrize("samples", [1, 4])
def test_what_so_many_items_detect_takes_so_many_items(samples: int) -> None:
    least = detectable(500, share_a=0.8, samples=samples)
    assert least is not None
    assert items_to_detect(least, share_a=0.8, samples=samples).items in (500, 501)
    seen = PairedPilot(0.01, 0.05, 0.2, 100)
    from_pilot = detectable(500, seen=seen, samples=samples)
    assert from_pilot is not None
    assert items_from_pilot(seen, samples, difference=from_pilot).items in (500, 501)


def test_too_few_items_detect_nothing() -> None:
    assert detectable(3, share_a=0.3) is None
    assert detectable(30, share_a=0.01) is None


def test_without_a_difference_the_power_is_the_level() -> None:
    assert power_of(PairedPilot(0.0, 0.05, 0.2, 0), 5_000) == pytest.approx(0.05, abs=0.002)


def test_what_cannot_be_meant_is_refused_with_what_can() -> None:
    with pytest.raises(UsageError, match=r"0\.03 for three points"):
        items_to_detect(3, share_a=0.8)
    with pytest.raises(UsageError, match=r"0\.03 for three points"):
        items_to_detect(0.0, share_a=0.8)
    with pytest.raises(UsageError, match=r"such as 0\.8"):
        items_to_detect(0.03, share_a=0.8, power=80)
    with pytest.raises(UsageError, match="samples must be at least 1"):
        items_to_detect(0.03, share_a=0.8, samples=0)
    with pytest.raises(UsageError, match="correlation"):
        items_to_detect(0.03, share_a=0.8, correlation=2)
    with pytest.raises(UsageError, match="either a pilot"):
        detectable(100)
    with pytest.raises(UsageError, match="items must be at least 1"):
        power_of(PairedPilot(0.03, 0.1, 0.1, 0), 0)


# --- a recorded pool: benchmarks/told_apart.py with fewer comparisons, and bands as much wider as chance asks ------


def test_the_pool_holds_three_vendors_and_the_degraded_ones_are_worse() -> None:
    pool = told_apart.read_pool()
    assert list(pool) == ["float32", "4bit", "hot"]
    assert all(flags.shape == (1400, 8) for flags in pool.values())
    assert pool["hot"].mean() < pool["4bit"].mean() < pool["float32"].mean()


@pytest.mark.parametrize("samples", [1, 4])
@pytest.mark.parametrize("name", ["float32", "4bit", "hot"])
def test_equal_vendors_are_told_apart_in_one_of_twenty(name: str, samples: int) -> None:
    row = told_apart.equal(told_apart.read_pool(), name, samples, items=200, comparisons=600)
    assert 0.025 <= row.claimed <= 0.08


@pytest.mark.parametrize("samples", [1, 4])
@pytest.mark.parametrize("name", ["4bit", "hot"])
def test_degraded_vendors_are_told_apart_as_often_as_planned(name: str, samples: int) -> None:
    row = told_apart.unequal(told_apart.read_pool(), "float32", name, samples, comparisons=300)
    assert row.difference > 0.02
    assert 0.74 <= row.claimed <= 0.9
