"""Money before a run and after it: tariffs, token counts from an earlier run, and what a right answer cost."""

from __future__ import annotations

import datetime as dt
import random
from typing import Any

import numpy as np
import pytest

from dsr1kit.access.channels import load_channels
from dsr1kit.access.prices import Price
from dsr1kit.access.stream import estimate_tokens
from dsr1kit.compare.items import Item
from dsr1kit.compare.money import (
    Estimate,
    ItemTokens,
    TokenGuess,
    cost_per_right,
    expected_cost,
    observed_tokens,
    reasoning_share,
)

FLAT = Price(input=1.0, output=10.0)
# A Tuesday that is no holiday in China; the peak hours there are 9-12 and 14-18.
NOON = dt.datetime(2026, 11, 24, 12, 0, tzinfo=dt.timezone(dt.timedelta(hours=8)))


def questions(count: int, kind: str = "sum") -> list[Item]:
    return [Item(f"{kind}-{n}", f"What is {n} + 1?", str(n + 1), kind, "en") for n in range(count)]


def cost(
    items: list[Item], samples: int = 1, price: Price | None = FLAT, *, at: dt.datetime = NOON,
    hours: float | None = 1.0, most: int = 1000, **tokens: Any,
) -> Estimate:  # fmt: skip
    duration = None if hours is None else dt.timedelta(hours=hours)
    return expected_cost(items, samples, price, TokenGuess(most=most, **tokens), at, duration)


def record(item: str, **fields: Any) -> dict[str, Any]:
    usual = {"outcome": "ok", "verdict": "right", "cost": 0.01, "from_cache": False, "kind": "sum",
             "prompt_tokens": 20, "reasoning_tokens": 90, "answer_tokens": 10}  # fmt: skip
    return {"item": item, **usual, **fields}


# --- before --------------------------------------------------------------------------------------------------------


def test_a_published_length_gives_the_expectation_and_the_limit_gives_the_bound() -> None:
    items = questions(50)
    found = cost(items, 2, completion=400.0, source="a card")
    prompts = 2 * sum(estimate_tokens(item.prompt) for item in items)
    assert found.requests == 100
    assert found.prompt_tokens == prompts
    assert found.completion_tokens == 40_000
    assert found.expected == pytest.approx((prompts * 1 + 40_000 * 10) / 1e6)
    assert found.bound == pytest.approx((prompts * 1 + 100_000 * 10) / 1e6)
    assert (found.low, found.high, found.tokens_source) == (None, None, "a card")


def test_an_unknown_length_is_not_made_up() -> None:
    found = cost(questions(10))
    assert found.expected is None
    assert found.completion_tokens is None
    assert found.bound is not None
    assert "only an upper bound" in " ".join(found.notes)


def test_a_published_length_beyond_the_limit_is_cut_at_the_limit() -> None:
    assert cost(questions(10), completion=23_000.0, most=1000).completion_tokens == 10_000


def test_an_unknown_price_stays_unknown_and_says_how_to_give_it() -> None:
    found = cost(questions(10), price=None, completion=100.0)
    assert (found.expected, found.bound, found.currency) == (None, None, None)
    assert found.completion_tokens == 1000
    assert "channel file" in found.notes[0]


def test_what_charges_nothing_costs_nothing_however_long_it_thinks() -> None:
    found = cost(questions(10), price=Price(0.0, 0.0))
    assert (found.low, found.expected, found.high, found.bound) == (0.0, 0.0, 0.0, 0.0)
    assert found.notes == ()


def test_an_earlier_run_counts_kind_by_kind() -> None:
    items = questions(30, "easy") + questions(10, "hard")
    seen = (ItemTokens("easy", 20, 100), ItemTokens("easy", 20, 120), ItemTokens("hard", 40, 900))
    found = cost(items, observed=seen)
    assert found.completion_tokens == pytest.approx(30 * 110 + 10 * 900)
    assert found.prompt_tokens == pytest.approx(30 * 20 + 10 * 40)
    assert found.expected == pytest.approx((found.prompt_tokens + 10 * found.completion_tokens) / 1e6)
    assert found.low is not None
    assert found.high is not None
    assert found.low < found.expected < found.high <= (found.bound or 0.0)


def test_a_kind_that_the_earlier_run_did_not_meet_is_taken_as_the_mean_of_all() -> None:
    seen = (ItemTokens("easy", 20, 100), ItemTokens("hard", 20, 300))
    found = cost(questions(10, "new"), observed=seen)
    assert found.completion_tokens == pytest.approx(2000)


def test_one_observed_item_gives_an_expectation_without_an_interval() -> None:
    found = cost(questions(10), observed=(ItemTokens("sum", 20, 100),))
    assert found.expected is not None
    assert (found.low, found.high) == (None, None)


def test_the_interval_holds_the_cost_of_runs_like_the_earlier_one_in_about_95_of_100() -> None:
    rng = np.random.default_rng(1)
    held = 0
    trials = 2000
    price = Price(input=0.0, output=1.0)
    for _ in range(trials):
        seen = tuple(ItemTokens("sum", 20, n) for n in rng.gamma(4.0, 200.0, 30))
        found = cost(questions(100), price=price, observed=seen, most=100_000)
        truth = float(rng.gamma(4.0, 200.0, 100).sum()) / 1e6
        held += (found.low or 0.0) <= truth <= (found.high or 0.0)
    assert 0.93 <= held / trials <= 0.97


# --- tariffs -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def peaked() -> Price:
    """The price of a channel that costs twice as much in Beijing's working hours."""
    price = load_channels()["deepseek"].price
    assert price is not None
    assert price.tariff is not None
    assert price.tariff.factor == 2.0
    return price


def test_a_run_within_the_cheap_hours_costs_the_flat_price(peaked: Price) -> None:
    found = cost(questions(10), price=peaked, at=NOON, hours=1.0, completion=100.0)
    flat = cost(questions(10), price=Price(peaked.input, peaked.output), completion=100.0)
    assert found.expected == pytest.approx(flat.expected)
    assert found.notes == ()


def test_a_run_that_crosses_into_the_peak_is_priced_by_its_share_of_it(peaked: Price) -> None:
    # From noon for four hours: two before the peak of 14-18, two in it.
    found = cost(questions(10), price=peaked, at=NOON, hours=4.0, completion=100.0)
    flat = cost(questions(10), price=Price(peaked.input, peaked.output), completion=100.0)
    assert found.expected == pytest.approx(1.5 * (flat.expected or 0.0))
    assert found.bound == pytest.approx(2.0 * (flat.bound or 0.0))
    assert "50% of the run is priced at 2 times" in found.notes[0]


def test_a_run_that_begins_in_the_peak_is_told_when_it_gets_cheaper(peaked: Price) -> None:
    found = cost(questions(10), price=peaked, at=NOON + dt.timedelta(hours=3), hours=1.0, completion=100.0)
    assert "2026-11-24 10:00 UTC" in " ".join(found.notes)


def test_a_run_of_unknown_length_is_priced_as_at_its_start_and_says_so(peaked: Price) -> None:
    found = cost(questions(10), price=peaked, at=NOON, hours=None, completion=100.0)
    flat = cost(questions(10), price=Price(peaked.input, peaked.output), completion=100.0)
    assert found.expected == pytest.approx(flat.expected)
    assert found.bound == pytest.approx(2.0 * (flat.bound or 0.0))
    assert "how long the run takes is not known" in found.notes[0]


# --- after ---------------------------------------------------------------------------------------------------------


def test_tokens_are_observed_item_by_item_over_its_samples() -> None:
    seen = observed_tokens([
        record("a"), record("a", reasoning_tokens=290), record("b", kind="words", reasoning_tokens=None),
        record("c", outcome="throttled"), record("d", from_cache=True), record("e", prompt_tokens=None),
    ])  # fmt: skip
    assert seen == (ItemTokens("sum", 20, 200), ItemTokens("words", 20, 10))


def test_cost_per_right_counts_what_failed_and_was_charged() -> None:
    rows = [record(str(n), verdict="wrong" if n % 4 == 0 else "right") for n in range(40)]
    failed = [record("x", outcome="cut", verdict="unscored"), record("y", outcome="cut", verdict="unscored", cost=None)]
    found = cost_per_right([*rows, *failed, record("z", outcome="over_budget", verdict="unscored", cost=None)])
    assert found is not None
    assert found.value == pytest.approx(0.41 / 30)
    assert found.low < found.value < found.high


def test_cost_per_right_has_no_value_without_a_right_answer_or_without_a_price() -> None:
    assert cost_per_right([record("a", verdict="wrong"), record("b", verdict="wrong")]) is None
    assert cost_per_right([record("a", cost=None), record("b", cost=None)]) is None
    assert cost_per_right([]) is None


def test_what_charges_nothing_costs_nothing_for_a_right_answer() -> None:
    found = cost_per_right([record(str(n), cost=0.0, verdict="right" if n % 2 else "wrong") for n in range(20)])
    assert found is not None
    assert tuple(found) == (0.0, 0.0, 0.0)


def test_answers_of_one_item_widen_the_interval_more_than_as_many_items() -> None:
    rng = random.Random(3)
    verdicts = ["right" if rng.random() < 0.6 else "wrong" for _ in range(40)]
    apart = cost_per_right([record(f"{n}-{k}", verdict=v) for n, v in enumerate(verdicts) for k in range(4)])
    together = cost_per_right([record(str(n), verdict=v) for n, v in enumerate(verdicts) for _ in range(4)])
    assert apart is not None
    assert together is not None
    assert together.value == pytest.approx(apart.value)
    assert together.high - together.low > 1.5 * (apart.high - apart.low)


def test_the_reasoning_share_is_of_answered_tokens_alone() -> None:
    answered = [record(str(n), answer_tokens=10 if n % 2 else 30) for n in range(20)]
    found = reasoning_share([*answered, record("x", outcome="cut")])
    assert found is not None
    assert found.value == pytest.approx(180 / 220)
    assert 0.0 <= found.low <= found.value <= found.high <= 1.0
    assert reasoning_share([record("a", reasoning_tokens=None, answer_tokens=None)]) is None
