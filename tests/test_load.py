"""Objectives, goodput, arrivals, requests in flight: what was due when, and what of it was answered in time."""

from __future__ import annotations

import datetime as dt
import math
import statistics
from itertools import pairwise

import pytest

from dsr1kit.compare.load import InFlight, Objective, arrivals, erlang_loss, goodput, parse_slo
from dsr1kit.errors import UsageError

START = dt.datetime(2026, 11, 24, 9, 0, tzinfo=dt.UTC)


def record(number=0, outcome="ok", at_s=None, first=0.5, total=2.0, **more):
    due = START + dt.timedelta(seconds=number if at_s is None else at_s)
    return {
        "item": f"i{number}", "outcome": outcome, "due_at": due.isoformat(), "first_token_s": first,
        "first_answer_s": first, "inter_token_s": 0.02, "total_s": total, **more,
    }  # fmt: skip


def test_an_objective_is_read_from_words_and_written_back():
    objective = parse_slo(" first_token_s=2, total_s = 60 ")
    assert objective == Objective(first_token_s=2.0, total_s=60.0)
    assert parse_slo(str(objective)) == objective


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "needs at least one of first_token_s"),
        ("ttft=2", "no 'ttft'; expected first_token_s"),
        ("first_token_s", "a number of seconds, not ''"),
        ("first_token_s=2s", "a number of seconds, not '2s'"),
        ("first_token_s=2,first_token_s=3", "given twice"),
        ("total_s=0", "above 0"),
        ("total_s=nan", "above 0"),
        ("total_s=inf", "finite"),
    ],
)
def test_an_objective_that_cannot_be_meant_is_refused(text, why):
    with pytest.raises(UsageError, match=why):
        parse_slo(text)


def test_requests_that_failed_count_as_not_met_and_those_never_asked_not_at_all():
    failed = ["throttled", "overloaded", "queued", "stalled", "cut", "deadline", "unreachable"]
    records = [record(n) for n in range(6)] + [record(6 + n, outcome) for n, outcome in enumerate(failed)]
    records += [record(20, "over_budget"), record(21, "cancelled")]
    found = goodput(records, parse_slo("first_token_s=1"))
    assert (found["met"], found["asked"]) == (6, 13)
    assert found["share"]["value"] == pytest.approx(6 / 13)
    assert found["share"]["low"] < 6 / 13 < found["share"]["high"]


@pytest.mark.parametrize(
    ("bound", "value", "met"),
    [
        ("first_token_s=2", {"first_token_s": 2.0}, True),
        ("first_token_s=2", {"first_token_s": 2.1}, False),
        ("first_answer_s=2", {"first_answer_s": None, "outcome": "truncated"}, False),
        ("first_token_s=2", {"first_answer_s": None, "outcome": "truncated"}, True),
        ("inter_token_s=0.05", {"inter_token_s": 0.06}, False),
        ("inter_token_s=0.05", {"inter_token_s": None}, True),
        ("first_token_s=2,total_s=3", {"total_s": 3.5}, False),
    ],
)
def test_every_bound_must_be_met_by_what_the_record_tells(bound, value, met):
    assert parse_slo(bound).met(record() | value) is met


def test_a_request_that_was_sent_late_is_late_however_fast_its_answer_was():
    late = record(first=2.5, total=2.6, queue_s=2.4)  # times count from due
    assert goodput([late], parse_slo("first_token_s=2"))["met"] == 0


def test_goodput_a_second_leaves_the_pause_between_two_starts_out():
    first = [record(n) for n in range(60)]
    second = [record(100 + n, at_s=86_400 + n) for n in range(60)]
    alone = goodput(first, parse_slo("total_s=5"))["per_s"]
    assert alone == pytest.approx(60 / 61)  # the last is due at 59 s and ends 2 s later
    assert goodput(first + second, parse_slo("total_s=5"))["per_s"] == pytest.approx(alone)


def test_requests_that_are_rare_by_design_have_no_pauses_between_them():
    rare = [record(n, at_s=600 * n) for n in range(7)]
    assert goodput(rare, parse_slo("total_s=5"))["per_s"] == pytest.approx(7 / 3602)


def test_goodput_of_nothing_asked_is_nothing():
    found = goodput([record(0, "over_budget")], parse_slo("total_s=5"))
    assert found == {"met": 0, "asked": 0, "share": None, "per_s": None}


def test_arrivals_are_poisson_seeded_and_upwards():
    moments = arrivals(20.0, 4000, seed=1)
    gaps = [b - a for a, b in pairwise([0.0, *moments])]
    assert moments == sorted(moments) == arrivals(20.0, 4000, seed=1)
    assert moments != arrivals(20.0, 4000, seed=2)
    assert statistics.fmean(gaps) == pytest.approx(0.05, rel=0.1)
    assert statistics.stdev(gaps) == pytest.approx(0.05, rel=0.1)  # as an exponential's is
    assert arrivals(20.0, 10, seed=1) == moments[:10]


@pytest.mark.parametrize("rate", [0.0, -1.0, float("inf"), float("nan")])
def test_a_rate_that_is_none_is_refused(rate):
    with pytest.raises(UsageError, match="rate must be above 0"):
        arrivals(rate, 1, seed=0)


class Clock:
    def __init__(self):
        self.at = 100.0

    def __call__(self):
        return self.at


def test_requests_in_flight_are_weighted_by_time():
    clock = Clock()
    flight = InFlight(clock)
    assert (flight.mean(), flight.peak()) == (0.0, 0)
    flight.enter()
    clock.at += 1.0
    with flight:
        clock.at += 3.0
    clock.at += 1.0
    flight.leave()
    assert flight.mean() == pytest.approx((1 * 1 + 2 * 3 + 1 * 1) / 5)
    assert flight.peak() == 2


def test_what_runs_out_after_the_last_request_began_is_not_held_against_a_closed_loop():
    clock = Clock()
    flight = InFlight(clock)
    for _ in range(8):
        flight.enter()
    clock.at += 10.0
    flight.drained()
    for _ in range(8):
        clock.at += 10.0
        flight.leave()
    assert flight.mean() == pytest.approx(8.0)


@pytest.mark.parametrize(
    ("seats", "load", "refused"), [(1, 1.0, 0.5), (5, 1.6, 0.0177), (10, 8.43, 0.1414), (2, 0.0, 0.0)]
)
def test_the_loss_formula_agrees_with_its_definition(seats: int, load: float, refused: float) -> None:
    terms = [load**k / math.factorial(k) for k in range(seats + 1)]
    assert erlang_loss(seats, load) == pytest.approx(terms[-1] / sum(terms))
    assert erlang_loss(seats, load) == pytest.approx(refused, abs=1e-3)
