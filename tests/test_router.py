"""The router against providers that fail in every way, on a clock that jumps; one test over real sockets."""

from __future__ import annotations

import asyncio
import datetime as dt
import functools
import logging
import math
import random
import tracemalloc
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
from scripted import ANSWER, HANG, ROLE, Scripted, response

from dsr1kit.access.cache import ReplyCache
from dsr1kit.access.channels import Channel
from dsr1kit.access.circuit import Circuit, CircuitSettings, FirstTokens, RetryBudget
from dsr1kit.access.prices import Price, Tariff
from dsr1kit.access.quota import Quota
from dsr1kit.access.race import Hedging
from dsr1kit.access.router import Router
from dsr1kit.emulator.virtual import VirtualLoop
from dsr1kit.errors import UsageError
from dsr1kit.records import Delta, Outcome, Reply, Timing, Usage

MESSAGES = [{"role": "user", "content": "What is 12 + 30?"}]
LASTING = [Outcome.NO_BALANCE, Outcome.UNAUTHORIZED, Outcome.UNKNOWN_MODEL, Outcome.RETIRED]
NOT_THE_CHANNELS = [
    Outcome.BAD_REQUEST,
    Outcome.FILTERED,
    Outcome.DEADLINE,
    Outcome.OVER_BUDGET,
    Outcome.CANCELLED,
]
THE_CHANNELS = [
    Outcome.THROTTLED,
    Outcome.OVERLOADED,
    Outcome.QUEUED,
    Outcome.STALLED,
    Outcome.CUT,
    Outcome.EMPTY,
    Outcome.NOT_AN_ANSWER,
    Outcome.UNREACHABLE,
    *LASTING,
]


# Fakes: a Backend plays one play for each call, the last one from then on.
class Fake:
    def __init__(self, name, *plays, channel=None):
        self.name, self.plays = name, plays or (answers(),)
        self.begun, self.cancelled, self.going, self.most = [], 0, 0, 0
        if channel is not None:
            self.channel = Channel(**{"name": name, "base_urls": ("http://x",), "model": "r1", **channel})

    @property
    def asked(self):
        return len(self.begun)

    async def ask(self, messages, sampling=None, *, on_delta=None, due=None):
        loop = asyncio.get_running_loop()
        due = loop.time() if due is None else due
        play = self.plays[min(self.asked, len(self.plays) - 1)]
        self.begun.append(loop.time())
        self.going += 1
        self.most = max(self.most, self.going)
        first = None

        def show(kind, text):
            nonlocal first
            first = loop.time() - due if first is None else first
            if on_delta is not None:
                on_delta(Delta(kind, text, loop.time() - due))

        try:
            reply = await play(show)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.going -= 1
        return replace(reply, channel=self.name, timing=Timing(first_token_s=first, total_s=loop.time() - due))


def answers(first_s=0.1, rest_s=0.1, text="42", thought="hm", outcome=Outcome.OK):
    async def play(show):
        await asyncio.sleep(first_s)
        show("reasoning", thought)
        await asyncio.sleep(rest_s)
        show("answer", text)
        return Reply(outcome, reasoning=thought, answer=text, usage=Usage(10, 90, 10))

    return play


def silent(after_s=0.1):
    """Answers whole, without a Delta."""

    async def play(show):
        await asyncio.sleep(after_s)
        return Reply(Outcome.OK, answer="42")

    return play


def fails(outcome=Outcome.OVERLOADED, after_s=0.01, wait_s=None):
    async def play(show):
        await asyncio.sleep(after_s)
        extra = {} if wait_s is None else {"quota": Quota(retry_after_s=wait_s)}
        return Reply(outcome, f"failed by {outcome.value}", extra=extra)

    return play


def breaks(thought="lost", text="", first_s=0.1, rest_s=0.1, outcome=Outcome.CUT):
    async def play(show):
        await asyncio.sleep(first_s)
        show("reasoning", thought)
        await asyncio.sleep(rest_s)
        if text:
            show("answer", text)
        return Reply(outcome, "broke", reasoning=thought, answer=text)

    return play


def hangs():
    async def play(show):
        await asyncio.Event().wait()

    return play


def trickles(every_s=0.2):
    async def play(show):
        while True:
            await asyncio.sleep(every_s)
            show("reasoning", ".")

    return play


def raises(error, after_s=0.0):
    async def play(show):
        await asyncio.sleep(after_s)
        raise error

    return play


# The clock that jumps.
def virtual(test):
    @functools.wraps(test)
    def run(**arguments):
        with asyncio.Runner(loop_factory=VirtualLoop) as runner:
            runner.run(test(**arguments))

    return run


def now():
    return asyncio.get_running_loop().time()


def member(router, name):
    return next(m for m in router._members.all if m.name == name)


async def settled(router):
    """What a request leaves behind: nothing."""
    for _ in range(5):
        await asyncio.sleep(0)
    assert asyncio.all_tasks() == {asyncio.current_task()}
    assert [(m.name, m.in_flight) for m in router._members.all if m.in_flight] == []
    assert not [name for name, (state, _) in router.circuits().items() if state == "half-open"]
    assert router.metrics.in_flight == 0
    assert not router._changed


@asynccontextmanager
async def routed(*fakes, check=True, **settings):
    settings.setdefault("deadline_s", 10.0)
    async with Router(fakes, rng=random.Random(1), **settings) as router:
        yield router
        if check:
            await settled(router)


async def many(router, count, **settings):
    return await asyncio.gather(*(router.ask(MESSAGES, **settings) for _ in range(count)))


def calls(reply):
    return [(a.channel, a.outcome) for a in reply.attempts]


ONCE = CircuitSettings(consecutive=1)
NEVER = CircuitSettings(consecutive=10**6, share=2.0)


# Tiers and weights.
@virtual
async def test_primaries_are_asked_before_backups():
    a, b, c = Fake("a"), Fake("b"), Fake("c")
    async with routed(a, b, c, backups=["c"]) as router:
        await many(router, 40)
        assert c.asked == 0
        assert a.asked
        assert b.asked
        for _ in range(5):
            a.plays = b.plays = (fails(),)
            reply = await router.ask(MESSAGES)
            assert (reply.outcome, reply.channel) == ("ok", "c")
            assert [name for name, _ in calls(reply)][-1] == "c"


@virtual
async def test_backups_of_the_catalogue_and_those_given():
    spare, main = Fake("spare", channel={"backup": True}), Fake("main")
    async with routed(spare, main) as router:
        assert (await router.ask(MESSAGES)).channel == "main"
    async with routed(spare, main, backups=["main"]) as router:
        assert (await router.ask(MESSAGES)).channel == "spare"


@virtual
async def test_weights_are_the_shares_of_healthy_channels():
    fakes = [Fake(name) for name in "abcd"]
    weights = {"a": 6, "b": 3, "c": 1, "d": 0}
    async with routed(*fakes, weights=weights, hedging=None) as router:
        for _ in range(40):
            await many(router, 10)
    assert [f.asked for f in fakes] == pytest.approx([240, 120, 40, 0], abs=4)
    assert fakes[3].asked == 0


@virtual
async def test_weights_of_the_catalogue():
    fakes = [Fake("a", channel={"weight": 3.0}), Fake("b")]
    async with routed(*fakes, hedging=None) as router:
        for _ in range(100):
            await router.ask(MESSAGES)
    assert [f.asked for f in fakes] == pytest.approx([75, 25], abs=2)


@virtual
async def test_a_weighted_channel_gets_its_share_back_after_a_long_outage():
    fakes = [Fake("a", fails()), Fake("b")]
    async with routed(*fakes, weights={"a": 3, "b": 1}, circuits=CircuitSettings(most_cooldown_s=2)) as router:
        for _ in range(3000):
            assert (await router.ask(MESSAGES)).outcome == "ok"
            await asyncio.sleep(1)
        fakes[0].plays = (answers(),)
        for _ in range(200):
            await router.ask(MESSAGES)
            await asyncio.sleep(1)
        before = fakes[0].asked
        for _ in range(100):
            await router.ask(MESSAGES)
        assert fakes[0].asked - before == pytest.approx(75, abs=8)


@virtual
async def test_among_equals_the_least_in_flight_and_the_fastest_is_asked():
    a, b = Fake("a"), Fake("b")
    async with routed(a, b) as router:
        await many(router, 40)
        assert abs(a.asked - b.asked) <= 6
        assert max(a.most, b.most) <= 23
    quick, slow = Fake("quick", answers(0.1)), Fake("slow", answers(1.0))
    async with routed(quick, slow, hedging=None) as router:
        for _ in range(200):
            await router.ask(MESSAGES)
        assert quick.asked > 180
        assert slow.asked  # now and then, to keep its measure fresh


@virtual
async def test_failing_fast_makes_no_channel_attractive():
    rng = random.Random(4)

    async def mostly_fails(show):
        await asyncio.sleep(0.001)
        return await answers(1.0)(show) if rng.random() < 0.3 else await fails(after_s=0)(show)

    broken, slow = Fake("broken", mostly_fails), Fake("slow", answers(1.0))
    async with routed(broken, slow, circuits=NEVER, hedging=None) as router:
        for _ in range(300):
            assert (await router.ask(MESSAGES)).outcome == "ok"
        assert broken.asked < 40


@virtual
async def test_a_first_token_before_a_failure_teaches_no_speed():
    fakes = [Fake("a", breaks(first_s=0.001)), Fake("b", answers(0.5))]
    async with routed(*fakes, backups=["b"], hedging=None) as router:
        for _ in range(20):
            assert (await router.ask(MESSAGES)).outcome == "ok"
        assert len(member(router, "a").first_tokens) == 0
        assert len(member(router, "b").first_tokens) == 20


# Constraints.
@virtual
async def test_only_the_regions_that_are_wanted():
    fakes = [Fake(name, channel={"region": name}) for name in ("cn", "eu", "us")] + [Fake("here")]
    async with routed(*fakes, regions=["eu", "us"]) as router:
        await many(router, 30)
    assert (fakes[0].asked, fakes[3].asked) == (0, 0)
    assert fakes[1].asked + fakes[2].asked == 30
    async with routed(*fakes, regions=["local"]) as router:
        assert (await router.ask(MESSAGES)).channel == "here"


@virtual
async def test_the_price_of_the_moment_counts():
    """Tariffs included: at nine in the morning the night's price is over the limit."""
    peak = Tariff(name="t", timezone="UTC", hours=((8.0, 20.0),), factor=4.0)
    cheap_at_night = Fake("night", channel={"price": Price(0.5, 2.0, tariff=peak)})
    even = Fake("even", channel={"price": Price(0.5, 4.0)})
    unknown, yuan = Fake("unknown", channel={}), Fake("yuan", channel={"price": Price(1, 1, "CNY")})
    free = Fake("free", channel={"price": Price(0, 0, "CNY"), "backup": True})
    at = dt.datetime(2026, 11, 23, 3, tzinfo=dt.UTC)
    fakes = (cheap_at_night, even, unknown, yuan, free)
    async with routed(*fakes, max_price=3.0, now=lambda: at, hedging=None) as router:
        await many(router, 10)
        assert [f.asked for f in fakes] == [10, 0, 0, 0, 0]
        at = dt.datetime(2026, 11, 23, 9, tzinfo=dt.UTC)
        await many(router, 10)
        assert [f.asked for f in fakes] == [10, 0, 0, 0, 10]
    with pytest.raises(UsageError, match="max_price"):
        Router([cheap_at_night], max_price=3.0, now=lambda: at)
    at = dt.datetime(2026, 11, 23, 3, tzinfo=dt.UTC)
    async with routed(cheap_at_night, max_price=3.0, now=lambda: at) as router:
        at = dt.datetime(2026, 11, 23, 9, tzinfo=dt.UTC)
        reply = await router.ask(MESSAGES)
        assert (reply.outcome, reply.attempts) == ("over_budget", ())
        assert "max_price" in reply.detail
        at = dt.datetime(2026, 11, 23, 21, tzinfo=dt.UTC)
        assert (await router.ask(MESSAGES)).outcome == "ok"


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"regions": ["mars"]}, "regions"),
        ({"regions": "local"}, "regions"),
        ({"max_price": -1.0}, "max_price"),
        ({"max_price": math.nan}, "max_price"),
        ({"weights": {"a": 0, "b": 0}}, "weight"),
        ({"weights": {"a": -1}}, "weight"),
        ({"weights": {"a": math.nan}}, "weight"),
        ({"weights": {"a": math.inf}}, "weight"),
        ({"weights": {"a": "3"}}, "weight"),
        ({"weights": {"c": 1}}, "weights"),
        ({"backups": ["c"]}, "backups"),
        ({"backups": "a"}, "backups"),
        ({"deadline_s": 0}, "deadline_s"),
        ({"deadline_s": -1}, "deadline_s"),
        ({"deadline_s": math.nan}, "deadline_s"),
        ({"deadline_s": "3"}, "deadline_s"),
        ({"first_token_s": 0}, "first_token_s"),
        ({"stall_s": 0}, "stall_s"),
    ],
)
def test_what_cannot_be_meant_is_told_by_its_name(settings, named):
    fakes = [Fake("a"), Fake("b")]
    with pytest.raises(UsageError, match=named):
        Router(fakes, **settings)
    assert not any(f.asked for f in fakes)


def test_no_backend_and_one_name_twice():
    with pytest.raises(UsageError, match="at least one backend"):
        Router([])
    with pytest.raises(UsageError, match="'a' is given twice"):
        Router([Fake("a"), Fake("b"), Fake("a")])
    with pytest.raises(UsageError, match=r"max_price=1 .* leaves no channel"):
        Router([Fake("a", channel={"price": Price(1, 2)}), Fake("b", channel={})], max_price=1)


@virtual
async def test_a_router_that_is_not_open_says_so():
    with pytest.raises(UsageError, match="not open"):
        await Router([Fake("a")]).ask(MESSAGES)
    async with Router([Fake("a")]) as router:
        with pytest.raises(UsageError, match="open already"):
            await router.__aenter__()
        assert (await router.ask(MESSAGES)).outcome == "ok"
    async with router:  # once more, with what it has learned
        assert (await router.ask(MESSAGES)).outcome == "ok"


# Failures and who learns from them.
@pytest.mark.parametrize("outcome", THE_CHANNELS)
@virtual
async def test_what_is_the_channels_fault_is_asked_elsewhere(outcome):
    async with routed(Fake("a", fails(outcome)), Fake("b"), backups=["b"]) as router:
        shown = []
        reply = await router.ask(MESSAGES, on_delta=shown.append)
        assert (reply.outcome, reply.answer, reply.channel) == ("ok", "42", "b")
        assert calls(reply) == [("a", outcome), ("b", "ok")]
        assert [d.attempt for d in shown] == [0, 0]  # nothing was shown before
        assert router.circuits()["a"] == (("open", outcome) if outcome in LASTING else ("closed", None))


@pytest.mark.parametrize("outcome", NOT_THE_CHANNELS)
@virtual
async def test_what_is_not_the_channels_fault_is_final(outcome):
    a, b = Fake("a", fails(outcome)), Fake("b")
    async with routed(a, b, backups=["b"], circuits=ONCE) as router:
        for _ in range(20):
            reply = await router.ask(MESSAGES)
            assert (reply.outcome, calls(reply)) == (outcome, [("a", outcome)])
        assert (a.asked, b.asked) == (20, 0)
        assert router.circuits()["a"] == ("closed", None)
        assert router._budget.level == router._budget.capacity


@virtual
async def test_truncated_is_an_answer():
    async with routed(Fake("a", answers(outcome=Outcome.TRUNCATED)), Fake("b"), backups=["b"]) as router:
        assert (await router.ask(MESSAGES)).outcome == "truncated"
        assert router.metrics.snapshot()["success_share"] == 1.0


@virtual
async def test_all_calls_are_told_in_order():
    fakes = [Fake(n, fails(o)) for n, o in zip("abc", THE_CHANNELS[1:4], strict=True)]
    async with routed(*fakes, Fake("d", silent()), backups=["d"], hedging=None) as router:
        reply = await router.ask(MESSAGES)
        assert [o for _, o in calls(reply)][-1] == "ok"
        assert sorted(calls(reply)) == sorted([*zip("abc", THE_CHANNELS[1:4], strict=True), ("d", "ok")])
        begun = {f.name: f.begun[0] for f in fakes}
        assert [a.channel for a in reply.attempts[:3]] == sorted(begun, key=begun.__getitem__)
        assert all(a.total_s == pytest.approx(0.01) for a in reply.attempts[:3])
        assert sum(f.asked for f in fakes) + 1 == len(reply.attempts)
    async with routed(Fake("a")) as router:
        assert calls(await router.ask(MESSAGES)) == [("a", "ok")]  # of a Backend that tells none itself


@virtual
async def test_time_counts_from_when_the_request_was_due():
    async with routed(Fake("a", breaks(first_s=1.0, rest_s=1.0)), Fake("b"), backups=["b"], hedging=None) as router:
        await asyncio.sleep(5)
        reply = await router.ask(MESSAGES, due=now() - 3)
        assert reply.timing.first_token_s == pytest.approx(5.1)
        assert reply.timing.total_s == pytest.approx(5.2)
        late = await router.ask(MESSAGES, due=now() - 30)
        assert (late.outcome, late.attempts, late.timing.total_s) == ("deadline", (), 30)
        short = await router.ask(MESSAGES, due=now() - 9)  # the deadline counts from there too
        assert (short.outcome, short.timing.total_s) == ("deadline", pytest.approx(10))


# Reasoning is disposable.
@pytest.mark.parametrize("restart", [False, True])
@virtual
async def test_a_stream_that_breaks_in_its_reasoning_moves_unseen(restart):
    shown = []
    fakes = Fake("a", breaks("lost")), Fake("b", answers(thought="kept"))
    async with routed(*fakes, backups=["b"], restart_answers=restart) as router:
        reply = await router.ask(MESSAGES, on_delta=shown.append)
        assert (reply.outcome, reply.reasoning, reply.answer) == ("ok", "kept", "42")
        assert calls(reply) == [("a", "cut"), ("b", "ok")]
        assert [(d.attempt, d.text) for d in shown] == [(0, "lost"), (1, "kept"), (1, "42")]


@pytest.mark.parametrize("outcome", [Outcome.CUT, Outcome.STALLED, Outcome.OVERLOADED])
@virtual
async def test_a_stream_that_breaks_in_its_answer_is_returned_as_cut(outcome):
    a, b = Fake("a", breaks(text="The ans", outcome=outcome)), Fake("b")
    async with routed(a, b, backups=["b"]) as router:
        reply = await router.ask(MESSAGES)
        assert (reply.outcome, reply.answer, b.asked) == ("cut", "The ans", 0)
        assert outcome.value in reply.detail or outcome is Outcome.CUT
        assert calls(reply) == [("a", outcome)]
        assert member(router, "a").circuit._row == 1


@virtual
async def test_white_space_is_no_answer_yet():
    async with routed(Fake("a", breaks(text="\n\n")), Fake("b"), backups=["b"]) as router:
        assert (await router.ask(MESSAGES)).answer == "42"


@virtual
async def test_an_answer_that_breaks_is_asked_again_whole_where_that_is_wanted():
    shown = []
    fakes = Fake("a", breaks("one", "The ans")), Fake("b", breaks("two", "The answ")), Fake("c")
    async with routed(*fakes, weights={"a": 9, "b": 3, "c": 1}, backups=["b", "c"], restart_answers=True) as router:
        reply = await router.ask(MESSAGES, on_delta=shown.append)
        assert (reply.outcome, reply.answer, reply.reasoning) == ("ok", "42", "hm")
        best = max(d.attempt for d in shown)
        assert [d.attempt for d in shown] == sorted(d.attempt for d in shown)
        assert [d.text for d in shown if d.attempt == best] == ["hm", "42"]
        assert best == 2
    async with routed(*(Fake(n, breaks("x", "part")) for n in "ab"), restart_answers=True) as router:
        reply = await router.ask(MESSAGES)
        assert reply.outcome == "cut"


@virtual
async def test_a_router_in_a_router_voids_what_it_must():
    shown = []
    inner = Router([Fake("a", breaks("one")), Fake("b", breaks("two"))], backups=["b"], name="inner", hedging=None,
                   budget=RetryBudget(capacity=5), deadline_s=5)  # fmt: skip
    async with inner, routed(inner, Fake("c"), backups=["c"], hedging=None) as outer:
        reply = await outer.ask(MESSAGES, on_delta=shown.append)
        assert [(d.attempt, d.text) for d in shown] == [(0, "one"), (1, "two"), (2, "hm"), (2, "42")]
        assert calls(reply) == [("a", "cut"), ("b", "cut"), ("c", "ok")]
        assert outer.metrics.calls == 3


# One deadline.
FAULTS = {
    "hang": (hangs(),),
    "queue": (fails(Outcome.QUEUED, 30.0),),
    "trickle": (trickles(),),
    "late failure": (fails(after_s=2.9),),
    "failing fast": (fails(after_s=0.001),),
    "told to wait": (fails(Outcome.THROTTLED, wait_s=2.0),),
    "told to wait long": (fails(Outcome.THROTTLED, wait_s=100.0),),
    "wait of nothing": (fails(Outcome.THROTTLED, wait_s=0.0),),
    "at no time": (fails(after_s=0),),
}


@pytest.mark.parametrize("hedging", [None, Hedging(), Hedging(cold_s=0.0, floor_s=0.0)])
@pytest.mark.parametrize("number", [1, 3])
@pytest.mark.parametrize("fault", FAULTS)
@virtual
async def test_the_deadline_holds_whatever_happens(fault, number, hedging):
    fakes = [Fake(f"f{n}", *FAULTS[fault]) for n in range(number)]
    async with routed(*fakes, deadline_s=3.0, hedging=hedging) as router:
        for _ in range(4):
            began = now()
            replies = await many(router, 8)
            assert now() - began <= 3.05
            for reply in replies:
                assert reply.outcome != "ok"
                assert reply.timing.total_s <= 3.05
                assert reply.detail
            await settled(router)


@virtual
async def test_a_backend_that_does_not_end_when_cancelled_holds_nobody_up():
    async def deaf(show):
        for _ in range(3):
            try:
                await asyncio.sleep(20)
            except asyncio.CancelledError:
                continue
        show("answer", "too late")
        return Reply(Outcome.OK, answer="too late")

    shown = []
    async with routed(Fake("a", deaf), deadline_s=2.0, circuits=ONCE, check=False) as router:
        reply = await router.ask(MESSAGES, on_delta=shown.append)
        assert (reply.outcome, now()) == ("deadline", 2.0)
        await asyncio.sleep(60)
        assert shown == []
        assert calls(reply) == [("a", "cancelled")]
        assert router.metrics.snapshot()["cost"] == {}
        await settled(router)


# The budget.
@virtual
async def test_without_budget_a_request_fails_at_once_with_its_reasons():
    fakes = [Fake(name, fails()) for name in "abc"]
    async with routed(*fakes, budget=RetryBudget(capacity=10), circuits=NEVER, hedging=None) as router:
        first = await router.ask(MESSAGES)
        assert len(first.attempts) == 3
        for _ in range(20):
            began = now()
            reply = await router.ask(MESSAGES)
            assert (reply.outcome, len(reply.attempts)) == ("overloaded", 1)
            assert now() - began == pytest.approx(0.01)
        assert "overloaded" in first.detail
        assert first.detail.count("overloaded") >= 3


@virtual
async def test_the_budget_is_one_for_all_requests_and_refills_with_success():
    fakes = [Fake("a", fails()), Fake("b", fails())]
    budget = RetryBudget(capacity=50)
    async with routed(*fakes, budget=budget, circuits=NEVER, hedging=None) as router:
        await many(router, 100)
        assert sum(f.asked for f in fakes) == 110
        assert budget.level == 0
        for fake in fakes:
            fake.plays = (answers(),)
        await many(router, 30)
        assert budget.level == 30
        await many(router, 30)
        assert budget.level == 50


@virtual
async def test_success_gives_back_what_the_last_retry_took_and_slow_failures_cost_more():
    budget = RetryBudget()
    async with routed(Fake("a", fails(Outcome.QUEUED)), Fake("b"), budget=budget, backups=["b"]) as router:
        levels = []
        await router.ask(MESSAGES, on_delta=lambda _: levels.append(budget.level))
        assert levels == [90, 90]
        assert budget.level == 100
    fakes = Fake("a", fails()), Fake("b", fails()), Fake("c")
    async with routed(*fakes, budget=budget, backups=["c"], hedging=None) as router:
        await router.ask(MESSAGES)
        assert budget.level == 95


@virtual
async def test_what_is_taken_for_a_call_that_is_never_made_is_put_back():
    budget = RetryBudget()
    async with routed(Fake("a", fails(Outcome.THROTTLED, wait_s=100)), budget=budget) as router:
        for _ in range(5):
            assert (await router.ask(MESSAGES)).outcome == "throttled"
        assert budget.level == 100


@virtual
async def test_waits_are_exponential_with_full_jitter():
    gaps = []
    for seed in range(60):
        fake = Fake("a", fails(after_s=0))
        async with Router([fake], rng=random.Random(seed), deadline_s=10, hedging=None) as router:
            await router.ask(MESSAGES)
        gaps.append([b - a for a, b in zip(fake.begun, fake.begun[1:], strict=False)])
    for number, most in enumerate((0.05, 0.1, 0.2)):
        waits = [gap[number] for gap in gaps]
        assert len(waits) == 60
        assert 0 <= min(waits) < 0.2 * most
        assert 0.8 * most < max(waits) <= most + 1e-9


# Circuits.
@virtual
async def test_a_circuit_opens_after_failures_in_a_row():
    a, b = Fake("a", fails()), Fake("b")
    async with routed(a, b, backups=["b"], circuits=CircuitSettings(cooldown_s=60)) as router:
        for _ in range(20):
            assert (await router.ask(MESSAGES)).outcome == "ok"
        assert a.asked == 5
        assert router.circuits() == {"a": ("open", Outcome.OVERLOADED), "b": ("closed", None)}
        a.plays = (answers(),)
        await asyncio.sleep(80)
        reply = await router.ask(MESSAGES)
        assert reply.channel == "a"
        assert router.circuits()["a"] == ("closed", None)


@virtual
async def test_a_circuit_opens_by_the_share_of_failures():
    plays = [answers(), fails(), fails()] * 10
    a = Fake("a", *plays)
    async with routed(a, Fake("b"), backups=["b"], circuits=CircuitSettings(cooldown_s=60)) as router:
        for _ in range(20):
            await router.ask(MESSAGES)
        assert a.asked in (10, 11, 12)
        assert router.circuits()["a"][0] == "open"


@pytest.mark.parametrize("outcome", LASTING)
@virtual
async def test_what_will_not_pass_opens_at_once_and_for_long(outcome):
    a = Fake("a", fails(outcome))
    async with routed(a, Fake("b"), backups=["b"]) as router:
        for _ in range(280):
            assert (await router.ask(MESSAGES)).outcome == "ok"
            await asyncio.sleep(0.8)
        assert a.asked == 1
        await asyncio.sleep(100)
        await router.ask(MESSAGES)
        assert a.asked == 2
        alone = Fake("alone", fails(outcome))
    async with routed(alone) as router:
        assert (await router.ask(MESSAGES)).outcome == outcome
        began = now()
        reply = await router.ask(MESSAGES)
        assert (reply.outcome, alone.asked, now()) == (outcome, 1, began)


@virtual
async def test_a_429_that_says_how_long_opens_for_that_long():
    a = Fake("a", fails(Outcome.THROTTLED, wait_s=7.5), answers())
    async with routed(a, Fake("b"), backups=["b"], hedging=None) as router:
        await router.ask(MESSAGES)
        began = now()
        while a.asked == 1:
            await router.ask(MESSAGES)
        assert 7.2 <= a.begun[1] - began <= 7.6
        assert router.circuits()["a"] == ("closed", None)
    b = Fake("b", fails(Outcome.THROTTLED))
    async with routed(b, Fake("c"), backups=["c"]) as router:
        await router.ask(MESSAGES)
        assert router.circuits()["b"] == ("closed", None)


@virtual
async def test_a_late_answer_does_not_end_what_a_provider_asked_to_wait():
    async def first_long(show):
        await asyncio.sleep(3)
        show("answer", "42")
        return Reply(Outcome.OK, answer="42")

    a = Fake("a", first_long, fails(Outcome.THROTTLED, wait_s=20), answers())
    async with routed(a, Fake("b"), backups=["b"], hedging=None) as router:
        await many(router, 2)
        assert now() == 3
        assert router.circuits()["a"] == ("open", Outcome.THROTTLED)
        await router.ask(MESSAGES)
        assert a.asked == 2


@virtual
async def test_a_probe_is_one_among_fifty():
    a = Fake("a", fails(Outcome.THROTTLED, wait_s=2.0), answers(0.5, 0.5))
    async with routed(a, hedging=None) as router:
        replies = await many(router, 1)
        assert replies[0].outcome == "ok"
    a = Fake("a", fails(Outcome.THROTTLED, wait_s=2.0), answers(0.5, 0.5))
    async with routed(a, hedging=None) as router:
        began = now()
        burst = asyncio.gather(router.ask(MESSAGES), *(later(router) for _ in range(50)))
        await asyncio.sleep(2.4)
        assert (a.asked, a.going, router.circuits()["a"][0]) == (2, 1, "half-open")
        assert {reply.outcome for reply in await burst} == {"ok"}
        assert now() - began == pytest.approx(4.0, abs=0.1)
        assert router.circuits()["a"] == ("closed", None)


async def later(router, after_s=0.1):
    await asyncio.sleep(after_s)
    return await router.ask(MESSAGES)


@pytest.mark.parametrize("how", ["cancelled", "raised", "bad request", "failed"])
@virtual
async def test_when_a_probe_ends_without_word_the_next_one_probes(how):
    plays = {
        "cancelled": hangs(),
        "raised": raises(UsageError("no"), 0.5),
        "bad request": fails(Outcome.BAD_REQUEST, 0.5),
        "failed": fails(Outcome.OVERLOADED, 0.5),
    }
    a = Fake("a", fails(Outcome.THROTTLED, wait_s=1.0), plays[how], answers())
    async with routed(a, hedging=None, deadline_s=8.0) as router:
        first = asyncio.create_task(router.ask(MESSAGES))
        others = [asyncio.create_task(later(router, 0.2)) for _ in range(10)]
        await asyncio.sleep(1.3)
        assert (a.asked, a.most) == (2, 1)
        if how == "cancelled":
            tasks = [first, *others]
            for task in tasks[:]:
                if a.cancelled == 0:
                    task.cancel()
                    await asyncio.sleep(0.01)
        ended = await asyncio.gather(first, *others, return_exceptions=True)
        answered = [r for r in ended if isinstance(r, Reply) and r.outcome == "ok"]
        assert len(answered) >= 10 - (how == "cancelled") * 10
        assert now() < 5.0
        assert router.circuits()["a"][0] != "half-open"


@virtual
async def test_others_that_end_meanwhile_make_no_second_probe():
    """Calls from before the circuit opened are cancelled, answered and failed while the probe is under way."""
    slow = [answers(1.0, 1.5), fails(after_s=2.6), hangs()]
    a = Fake("a", *slow, fails(Outcome.THROTTLED, wait_s=2.0), answers(3.0, 0.1), answers())
    async with routed(a, hedging=None, deadline_s=20.0, check=False) as router:
        old = [asyncio.create_task(router.ask(MESSAGES)) for _ in range(3)]
        await asyncio.sleep(0.1)
        throttled = asyncio.create_task(router.ask(MESSAGES))
        await asyncio.sleep(0.1)
        more = [asyncio.create_task(router.ask(MESSAGES)) for _ in range(10)]
        await asyncio.sleep(2.1)
        assert (a.asked, router.circuits()["a"][0]) == (5, "half-open")
        old[2].cancel()
        for _ in range(25):
            await asyncio.sleep(0.1)
            assert (a.asked, router.circuits()["a"][0]) == (5, "half-open")
        await asyncio.gather(*old, throttled, *more, return_exceptions=True)
        await settled(router)


@virtual
async def test_cooldowns_double_with_each_failed_probe_up_to_a_limit():
    a = Fake("a", fails())
    circuits = CircuitSettings(consecutive=1, cooldown_s=1.0, most_cooldown_s=8.0)
    async with routed(a, Fake("b"), backups=["b"], circuits=circuits, hedging=None) as router:
        while now() < 100:
            await router.ask(MESSAGES)
            await asyncio.sleep(0.01)
        gaps = [y - x for x, y in zip(a.begun, a.begun[1:], strict=False)]
        for gap, cooldown_s in zip(gaps, [1, 2, 4, 8, 8, 8, 8, 8], strict=False):
            assert 0.75 * cooldown_s <= gap <= 1.25 * cooldown_s + 0.3


@virtual
async def test_a_probe_that_ran_into_a_deadline_is_not_repeated_by_everyone():
    a = Fake("a", fails(Outcome.THROTTLED, wait_s=1.0), hangs())
    async with routed(a, Fake("b"), backups=["b"], hedging=None, deadline_s=2.0) as router:
        await router.ask(MESSAGES)
        await asyncio.sleep(1.0)
        replies = [await router.ask(MESSAGES) for _ in range(4)]
        assert [r.outcome for r in replies] == ["deadline", "ok", "ok", "ok"]


@virtual
async def test_when_all_are_open_the_first_to_reopen_is_waited_for():
    fakes = [Fake(n, fails(Outcome.THROTTLED, wait_s=w), answers()) for n, w in (("a", 6.0), ("b", 3.0))]
    async with routed(*fakes, hedging=None) as router:
        reply = await router.ask(MESSAGES)
        assert (reply.outcome, reply.channel) == ("ok", "b")
        assert reply.timing.total_s == pytest.approx(3.2, abs=0.1)
        assert len(reply.attempts) == 3


@virtual
async def test_when_none_reopens_in_time_it_fails_at_once_with_the_reason_of_each():
    fakes = [Fake("a", fails(Outcome.THROTTLED, wait_s=60)), Fake("b", fails(Outcome.NO_BALANCE))]
    async with routed(*fakes, hedging=None) as router:
        reply = await router.ask(MESSAGES)
        assert now() == pytest.approx(0.02)
        assert reply.outcome == "throttled"
        for said in ("a: throttled", "b: no_balance"):
            assert said in reply.detail
        began = now()
        reply = await router.ask(MESSAGES)
        assert (now(), reply.attempts, reply.channel) == (began, (), "router")
        assert "tried again in 60.0 s" in reply.detail


def test_a_circuit_by_itself():
    circuit = Circuit(CircuitSettings(consecutive=2, cooldown_s=1), random.Random(1))
    assert not circuit.begin()
    circuit.failure(0, Outcome.CUT)
    circuit.success()
    circuit.failure(0, Outcome.CUT)
    assert circuit.state == "closed"
    circuit.failure(0, Outcome.EMPTY)
    assert (circuit.state, circuit.reason, circuit.ready(0.5), circuit.ready(1.3)) == ("open", "empty", False, True)
    circuit.success()  # from before
    assert circuit.state == "open"
    assert (circuit.begin(), circuit.begin(), circuit.state, circuit.ready(99)) == (True, False, "half-open", False)
    circuit.failure(2, Outcome.CUT)
    circuit.success()
    circuit.abandoned(2, probe=False)
    assert circuit.state == "half-open"
    circuit.abandoned(3, probe=True)
    assert (circuit.state, circuit.ready(3)) == ("open", True)
    assert circuit.begin()
    circuit.success(probe=True)
    assert (circuit.state, circuit.reason) == ("closed", None)
    circuit.failure(10, Outcome.THROTTLED, 30.0)
    circuit.failure(11, Outcome.THROTTLED, 5.0)  # does not shorten what is known
    assert circuit.reopens_at == 40
    circuit.failure(12, Outcome.THROTTLED, 50.0)
    assert circuit.reopens_at == 62
    assert circuit.begin()
    circuit.failure(63, Outcome.THROTTLED, 10**9, probe=True)
    assert circuit.reopens_at == 63 + 120


def test_first_tokens():
    times = FirstTokens()
    assert (len(times), times.hedge_after(2.0, 0.05)) == (0, 2.0)
    for n in range(1, 101):
        times.add(n / 10)
    assert len(times) == 64
    assert times.median == pytest.approx(6.85)
    assert times.hedge_after(2.0, 0.05) == pytest.approx(9.4, abs=0.11)
    few = FirstTokens()
    for seconds in [0.1] * 6 + [5.0] * 6:
        few.add(seconds)
    assert few.hedge_after(2.0, 0.05) == 5.0  # p90
    for _ in range(8):
        few.add(0.1)
    assert few.hedge_after(2.0, 0.05) == pytest.approx(0.3)  # three medians
    few.forget(0.1)
    few.forget(17.0)
    assert len(few) == 19


# Hedges.
@virtual
async def test_a_second_channel_is_asked_and_the_first_token_wins():
    shown = []
    a, b = Fake("a", answers(5.0, 1.0, thought="a")), Fake("b", answers(0.5, 1.0, thought="b"))
    async with routed(a, b, backups=["b"], hedging=Hedging(cold_s=1.0)) as router:
        reply = await router.ask(MESSAGES, on_delta=shown.append)
        assert (reply.channel, reply.reasoning, now()) == ("b", "b", pytest.approx(2.5))
        assert calls(reply) == [("a", "cancelled"), ("b", "ok")]
        assert {d.text for d in shown} == {"b", "42"}
        assert (a.cancelled, b.cancelled, b.begun) == (1, 0, [1.0])
        assert member(router, "a").circuit._row == 1  # once, however often it is looked at
        snapshot = router.metrics.snapshot()
        assert (snapshot["hedge_win_share"], snapshot["amplification"]) == (1.0, 2.0)


@virtual
async def test_a_hedge_that_loses_is_cancelled_at_the_first_token():
    shown = []
    a, b = Fake("a", answers(1.5, 5.0, thought="a")), Fake("b", answers(3.0, thought="b"))
    async with routed(a, b, backups=["b"], hedging=Hedging(cold_s=1.0)) as router:
        asking = asyncio.create_task(router.ask(MESSAGES, on_delta=shown.append))
        await asyncio.sleep(1.51)
        assert (b.asked, b.going, b.cancelled) == (1, 0, 1)
        reply = await asking
        assert calls(reply) == [("b", "cancelled"), ("a", "ok")]
        assert {d.text for d in shown} == {"a", "42"}
        assert router.circuits()["b"] == ("closed", None)
        assert router.metrics.snapshot()["hedge_win_share"] == 0.0


@virtual
async def test_empty_text_is_no_token():
    async def empty_first(show):
        show("reasoning", "")
        await asyncio.sleep(5)
        return Reply(Outcome.OK, answer="late")

    async with routed(Fake("a", empty_first), Fake("b"), backups=["b"], hedging=Hedging(cold_s=1.0)) as router:
        assert (await router.ask(MESSAGES)).channel == "b"


@pytest.mark.parametrize("play", [silent(), fails(Outcome.BAD_REQUEST), answers()])
@virtual
async def test_a_hedge_that_ends_the_race_starts_no_other(play):
    a, b = Fake("a", hangs()), Fake("b", play)
    async with routed(a, b, backups=["b"], hedging=Hedging(cold_s=1.0)) as router:
        reply = await router.ask(MESSAGES)
        assert (a.asked, b.asked, len(reply.attempts)) == (1, 1, 2)
        # Words about the request itself make nobody slow who was asked too.
        assert member(router, "a").circuit._row == (reply.outcome == "ok")
        await settled(router)
    for cold_s in (0.1, 0.2):  # the answer and the hedge's turn at the same moment
        async with routed(Fake("a", play), Fake("b"), backups=["b"], hedging=Hedging(cold_s=cold_s)) as router:
            await router.ask(MESSAGES)
            await settled(router)


@virtual
async def test_a_hedge_and_the_deadline_at_the_same_moment():
    async with routed(
        Fake("a", hangs()), Fake("b"), backups=["b"], deadline_s=2.0, hedging=Hedging(cold_s=2.0)
    ) as router:
        assert (await router.ask(MESSAGES)).outcome == "deadline"
        await settled(router)


@pytest.mark.parametrize("cold_s", [1.5 + 0.03 * n for n in range(20)])
@virtual
async def test_a_hedge_whose_deadline_passes_before_it_began(cold_s):
    looks = 0

    def clock():
        nonlocal looks
        looks += 1
        return now() + 0.05 * looks

    fakes = Fake("a", hangs()), Fake("b", hangs())
    async with routed(*fakes, deadline_s=2.0, hedging=Hedging(cold_s=cold_s), clock=clock) as router:
        assert (await router.ask(MESSAGES)).outcome == "deadline"
        await settled(router)


@virtual
async def test_a_loser_that_ends_with_words_is_told_once():
    async def polite(show):
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            show("answer", "too late")
        return Reply(Outcome.OK, answer="too late")

    shown = []
    async with routed(Fake("a", polite), Fake("b"), backups=["b"], hedging=Hedging(cold_s=0.5)) as router:
        reply = await router.ask(MESSAGES, on_delta=shown.append)
        assert calls(reply) == [("a", "cancelled"), ("b", "ok")]
        assert [d.text for d in shown] == ["hm", "42"]
        assert member(router, "a").circuit._row == 1


@virtual
async def test_the_hedge_comes_after_what_first_tokens_taught():
    """The smaller of p90 and three medians; while they are unknown a quarter of the deadline, at most two seconds."""
    for deadline_s, cold_s in ((4.0, 1.0), (100.0, 2.0)):
        b = Fake("b")
        async with routed(Fake("a", hangs()), b, backups=["b"], deadline_s=deadline_s) as router:
            began = now()
            await router.ask(MESSAGES)
            assert b.begun == [pytest.approx(began + cold_s)]
    a, b = Fake("a", *[answers(0.2)] * 20, hangs()), Fake("b")
    async with routed(a, b, backups=["b"]) as router:
        for _ in range(20):
            await router.ask(MESSAGES)
        began = now()
        assert (await router.ask(MESSAGES)).channel == "b"
        assert b.begun[-1] - began == pytest.approx(0.2)
    a, b = Fake("a", *[fails(after_s=0.001), answers(1.0)] * 20, hangs()), Fake("b")
    async with routed(a, b, backups=["b"], circuits=NEVER, hedging=Hedging(share=1.0)) as router:
        for _ in range(40):
            await router.ask(MESSAGES)
        began = now()
        await router.ask(MESSAGES)
        assert b.begun[-1] - began == pytest.approx(1.0)  # failures are fast and teach nothing


@virtual
async def test_hedges_are_capped_in_their_share():
    a, b = Fake("a", answers(1.5, 0.1)), Fake("b", answers(3.0, 0.1))
    hedging = Hedging(cold_s=0.5, share=0.1, burst=5.0)
    async with routed(a, b, backups=["b"], hedging=hedging) as router:
        member(router, "a").first_tokens.hedge_after = lambda *_: 0.5
        for _ in range(200):
            await router.ask(MESSAGES)
        assert 20 <= b.asked <= 5 + 0.1 * 200 + 1
        # A hedge may be hedged, but only three are under way at a time.
        assert b.asked <= router.metrics.hedges <= 2 * b.asked


@virtual
async def test_hedges_are_capped_in_money():
    price = {"price": Price(0.0, 1e6)}  # one for each token
    a, b = Fake("a", hangs(), channel=price), Fake("b", answers(), channel=price)
    hedging = Hedging(cold_s=0.5, max_cost=2050.0)
    async with routed(a, b, backups=["b"], hedging=hedging, deadline_s=4.0, circuits=NEVER) as router:
        outcomes = [(await router.ask(MESSAGES)).outcome for _ in range(20)]
        # A thousand tokens are guessed, until an answer was priced: a hundred.
        assert outcomes.count("ok") == 11
        assert b.asked == 11
    free = Fake("a", hangs()), Fake("b")
    async with routed(*free, backups=["b"], hedging=Hedging(cold_s=0.5, max_cost=0.0), circuits=ONCE) as router:
        assert (await router.ask(MESSAGES)).outcome == "ok"


@virtual
async def test_hedges_draw_on_the_budget():
    a, b = Fake("a", hangs()), Fake("b")
    budget = RetryBudget(capacity=4)
    async with routed(a, b, backups=["b"], budget=budget, deadline_s=4.0) as router:
        assert (await router.ask(MESSAGES)).outcome == "deadline"
        assert b.asked == 0


@virtual
async def test_success_gives_back_the_last_of_several_hedges():
    budget = RetryBudget()
    fakes = Fake("a", hangs()), Fake("b", fails()), Fake("c")
    async with routed(*fakes, weights={"a": 9, "b": 5, "c": 1}, budget=budget, hedging=Hedging(cold_s=0.5)) as router:
        router._members.pick = _in_order(router)
        reply = await router.ask(MESSAGES)
        assert [name for name, _ in calls(reply)] == ["b", "a", "c"]
        assert budget.level == 95


@virtual
async def test_no_hedges_where_none_are_wanted():
    a, b = Fake("a", answers(9.0)), Fake("b")
    async with routed(a, b, backups=["b"], hedging=None) as router:
        assert (await router.ask(MESSAGES)).channel == "a"
        assert b.asked == 0


@virtual
async def test_a_call_that_was_given_up_shows_nothing_in_the_next_race():
    """A local model's thread goes on for a while after its task was cancelled."""

    async def zombie(show):
        asyncio.get_running_loop().call_later(1.5, show, "reasoning", "ghost")
        await asyncio.Event().wait()

    shown = []
    plays = Fake("a", zombie), Fake("b", breaks(first_s=0.1, rest_s=0.5)), Fake("c", answers(1.0))
    async with routed(*plays, weights={"a": 3, "b": 2, "c": 1}, hedging=Hedging(cold_s=0.5)) as router:
        router._members.pick = _in_order(router)
        reply = await router.ask(MESSAGES, on_delta=shown.append)
        assert (reply.outcome, reply.channel) == ("ok", "c")
        assert "ghost" not in {d.text for d in shown}


def _in_order(router):
    def pick(tried, at, *, or_open=False):
        return next((m for m in router._members.all if m.name not in tried and m.circuit.ready(at)), None)

    return pick


# What goes wrong on the caller's side.
@virtual
async def test_an_on_delta_that_raises_reaches_the_caller():
    def bad(_):
        raise ZeroDivisionError("on_delta")

    for hedging in (None, Hedging(cold_s=0.05)):
        a, b = Fake("a", answers(0.1, 5.0)), Fake("b", answers(0.01, 5.0))
        async with routed(a, b, backups=["b"], hedging=hedging, circuits=ONCE) as router:
            with pytest.raises(ZeroDivisionError, match="on_delta"):
                await router.ask(MESSAGES, on_delta=bad)
            await settled(router)
            assert set(router.circuits().values()) <= {("closed", None), ("open", Outcome.STALLED)}
            assert a.going + b.going == 0


@virtual
async def test_a_misuse_reaches_the_caller():
    for plays in ((raises(UsageError("cannot be meant")),), (raises(UsageError("cannot be meant"), 1.0),)):
        a, b = Fake("a", *plays), Fake("b", hangs())
        async with routed(a, b, backups=["b"], hedging=Hedging(cold_s=0.5), circuits=ONCE) as router:
            with pytest.raises(UsageError, match="cannot be meant"):
                await router.ask(MESSAGES)
            await settled(router)
            assert router.circuits()["a"] == ("closed", None)


@virtual
async def test_a_backend_that_is_cancelled_by_itself_is_not_waited_for():
    async with routed(Fake("a", raises(asyncio.CancelledError(), 0.1)), Fake("b")) as router:
        router._members.pick = _in_order(router)
        with pytest.raises(asyncio.CancelledError):
            await router.ask(MESSAGES)
        assert now() == pytest.approx(0.1)
        await settled(router)


@virtual
async def test_what_a_given_up_call_raises_in_its_end_is_nobodys_business(caplog):
    async def ends_badly(show):
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            raise RuntimeError("in its end") from None

    with caplog.at_level(logging.ERROR, "asyncio"):
        async with routed(Fake("a", ends_badly), Fake("b"), backups=["b"], hedging=Hedging(cold_s=0.1)) as router:
            assert (await router.ask(MESSAGES)).outcome == "ok"
        import gc

        gc.collect()
        await asyncio.sleep(0)
    assert caplog.records == []


SCENES = {
    "hedge": lambda: [Fake("a", answers(1.0, 0.5)), Fake("b", answers(0.3, 0.3))],
    "failover": lambda: [Fake("a", fails(after_s=0.3)), Fake("b", breaks()), Fake("c")],
    "all open": lambda: [Fake("a", fails(Outcome.THROTTLED, 0.1, 0.8), answers()), Fake("b", fails(Outcome.RETIRED))],
    "hang": lambda: [Fake("a", hangs()), Fake("b", hangs())],
    "rounds": lambda: [Fake("a", fails(after_s=0.1))],
}


@pytest.mark.parametrize("scene", SCENES)
def test_the_caller_may_cancel_at_any_moment(scene):
    async def one(at_s, turns):
        fakes = SCENES[scene]()
        settings = CircuitSettings(consecutive=1, cooldown_s=0.4)
        async with routed(*fakes, hedging=Hedging(cold_s=0.2), circuits=settings, deadline_s=1.7) as router:
            asking = [asyncio.create_task(router.ask(MESSAGES)) for _ in range(3)]
            await asyncio.sleep(at_s)
            for _ in range(turns):
                await asyncio.sleep(0)
            for task in asking:
                task.cancel()
            ended = await asyncio.gather(*asking, return_exceptions=True)
            assert all(isinstance(e, (asyncio.CancelledError, Reply)) for e in ended)
            await settled(router)
            assert all(f.going == 0 for f in fakes)
            # And the router is as good as before.
            for fake in fakes:
                fake.plays = (answers(0.01, 0.01),)
            await asyncio.sleep(400)
            assert (await router.ask(MESSAGES)).outcome == "ok"

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        for number in range(100):
            runner.run(one(0.0199 * number, 0))
        for turns in range(25):
            runner.run(one(0.0, turns))
            runner.run(one(0.2, turns))


@virtual
async def test_two_asks_on_one_tick_do_not_share_a_slot():
    a, b = Fake("a"), Fake("b")
    async with routed(a, b, hedging=None) as router:
        router._rng.random = lambda: 1.0  # no exploring
        await many(router, 50)
        assert (a.most, b.most) == (25, 25)


def test_routers_of_one_name_are_told_apart_by_a_cache():
    scopes = {Router(fakes).cache_scope for fakes in (
        [Fake("a")], [Fake("b")], [Fake("a"), Fake("b")], [Fake("a", channel={})], [Fake("a", channel={"model": "x"})],
    )}  # fmt: skip
    assert len(scopes) == 5
    assert Router([Fake("a")]).cache_scope == Router([Fake("a", hangs())], deadline_s=1).cache_scope


# All of it at once.
class Weather(Fake):
    """Faults drawn anew for each spell of weather."""

    def __init__(self, name, rng):
        super().__init__(name, self.play)
        self.rng, self.calm, self.until, self.odds = rng, False, 0.0, []

    async def play(self, show):
        rng = self.rng
        if now() >= self.until:
            self.until = now() + rng.expovariate(1 / 20)
            bad = rng.choice([0.0, 0.02, 0.3, 1.0])
            self.odds = [(1 - bad, None), *((bad * rng.random() ** 3, kind) for kind in range(11))]
        kinds = [kind for _, kind in self.odds]
        kind = None if self.calm else rng.choices(kinds, [odd for odd, _ in self.odds])[0]
        soon = rng.expovariate(10)
        plays = {
            None: lambda: answers(soon, soon),
            0: lambda: fails(rng.choice(THE_CHANNELS), soon),
            1: lambda: fails(Outcome.THROTTLED, soon, rng.choice([0.0, 0.3, 2.0, 50.0])),
            2: hangs,
            3: trickles,
            4: lambda: breaks(first_s=soon),
            5: lambda: breaks(first_s=soon, text="par"),
            6: lambda: fails(rng.choice(NOT_THE_CHANNELS), soon),
            7: lambda: raises(UsageError("misuse"), soon),
            8: lambda: silent(soon),
            9: lambda: raises(asyncio.CancelledError(), soon),
            10: lambda: answers(3.0, 3.0),
        }
        self.begun.clear()  # of twenty thousand requests none is kept
        return await plays[kind]()(show)


@pytest.mark.parametrize("requests", [20_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_a_soak_in_all_weathers_leaves_nothing_behind(requests):
    rng = random.Random(20)
    deadline_s = 4.0
    ended = {}
    traced = []

    async def one(router):
        began = now()
        deltas = []
        asking = asyncio.create_task(router.ask(MESSAGES, on_delta=deltas.append if rng.random() < 0.5 else None))
        if rng.random() < 0.03:
            await asyncio.sleep(rng.uniform(0, 1.0))
            asking.cancel()
        try:
            reply = await asking
            assert reply.timing.total_s <= deadline_s + 0.05
            shown = [d for d in deltas if d.attempt == deltas[-1].attempt]
            assert [d.attempt for d in deltas] == sorted(d.attempt for d in deltas)
            if reply.outcome == "ok" and reply.reasoning and shown:  # else it was given without a Delta
                assert "".join(d.text for d in shown if d.kind == "answer") == reply.answer
                assert "".join(d.text for d in shown if d.kind == "reasoning") == reply.reasoning
            end = reply.outcome
        except (asyncio.CancelledError, UsageError) as error:
            end = type(error).__name__
        assert now() - began <= deadline_s + 0.05
        ended[end] = ended.get(end, 0) + 1

    async def soak():
        fakes = [Weather(name, rng) for name in "abcde"]
        circuits = CircuitSettings(lasting_cooldown_s=20.0)
        weights = {"a": 2, "b": 2, "c": 1, "d": 1, "e": 1}
        async with Router(fakes, weights=weights, circuits=circuits, deadline_s=deadline_s, rng=rng) as router:
            for half in range(2):
                if half:
                    tracemalloc.start()
                for _ in range(2):
                    going = set()
                    for _number in range(requests // 4):
                        task = asyncio.create_task(one(router))
                        going.add(task)
                        task.add_done_callback(going.discard)
                        await asyncio.sleep(rng.expovariate(20))
                        if task.done():
                            task.result()
                    for task in list(going):
                        await task
                    if half:
                        traced.append(tracemalloc.get_traced_memory()[0])
                    await settled(router)
            tracemalloc.stop()
            for fake in fakes:
                fake.calm = True
            await asyncio.sleep(130)
            for _ in range(5000):
                assert (await router.ask(MESSAGES)).outcome == "ok"
                if all(state == "closed" for state, _ in router.circuits().values()):
                    break
            assert set(router.circuits().values()) == {("closed", None)}
            await settled(router)

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.run(soak())
    assert sum(ended.values()) == requests
    assert ended["ok"] > 0.7 * requests
    # The second quarter replaces what the first kept (the metrics' last 10,000 requests, mostly).
    assert traced[1] - traced[0] < 1_000_000


def test_the_same_seed_gives_the_same_day():
    """Nothing depends on addresses or hashes: what is simulated on a virtual clock can be repeated."""

    async def day():
        rng = random.Random(3)
        fakes = [Weather(name, rng) for name in "abc"]
        async with Router(fakes, deadline_s=4.0, rng=rng) as router:
            going = []
            for _ in range(1500):
                going.append(asyncio.create_task(router.ask(MESSAGES)))
                await asyncio.sleep(rng.expovariate(20))
            ended = await asyncio.gather(*going, return_exceptions=True)
            return [(e.outcome, e.attempts, e.timing) if isinstance(e, Reply) else type(e) for e in ended]

    def once():
        with asyncio.Runner(loop_factory=VirtualLoop) as runner:
            return runner.run(day())

    first, _padding = once(), [object() for _ in range(12345)]
    assert once() == first


# Over real sockets.
def test_a_losers_connection_is_closed_and_only_the_winner_is_shown():
    async def main():
        shown = []
        async with Scripted(response((0.0, ROLE), HANG)) as slow, Scripted(response(ANSWER)) as quick:
            channels = [slow.channel(name="slow"), quick.channel(name="quick", backup=True)]
            async with Router(channels, deadline_s=5.0, hedging=Hedging(cold_s=0.2)) as router:
                reply = await router.ask(MESSAGES, on_delta=shown.append)
                assert (reply.outcome, reply.channel) == ("ok", "quick")
                assert calls(reply) == [("slow", "cancelled"), ("quick", "ok")]
                assert "".join(d.text for d in shown if d.kind == "answer") == "The answer is 42."
                assert "".join(d.text for d in shown if d.kind == "reasoning") == "17 + 25 is 42."
                await slow.until(lambda: slow.open_connections == 0, within_s=1.0)
                assert len(slow.requests) == len(quick.requests) == 1
                assert [m.in_flight for m in router._members.all] == [0, 0]
                ours = [t for t in asyncio.all_tasks() if "_call" in repr(t) or "Router" in repr(t)]
                assert ours == []

    asyncio.run(main())


@virtual
async def test_the_deadline_leaves_the_text_that_had_come():
    async def slow(show):
        await asyncio.sleep(0.2)
        show("reasoning", "hm")
        show("answer", "The ans")
        await asyncio.sleep(100)

    fake = Fake("a", slow, channel={"emulated": True})
    async with Router([fake], deadline_s=2.0) as router:
        reply = await router.ask(MESSAGES)
    assert (reply.outcome, reply.reasoning, reply.answer) == (Outcome.DEADLINE, "hm", "The ans")
    assert reply.emulated


def test_a_cache_before_a_channel_keeps_its_region_and_price(tmp_path):
    channel = Channel(name="a", base_urls=("http://127.0.0.1:1",), model="r1", region="us", price=Price(1.0, 9.0))
    cached = ReplyCache(channel, tmp_path / "cache.sqlite")
    with pytest.raises(UsageError, match="regions"):
        Router([cached], regions=("eu",))
    with pytest.raises(UsageError, match="max_price"):
        Router([cached], max_price=5.0)
    assert Router([cached], regions=("us",), max_price=9.0)


@virtual
async def test_calls_that_all_hang_are_replaced_when_they_count_as_lost():
    """Three lanes were full of calls that hung, and the deadline passed although a fourth would have answered."""
    only = Fake("a", hangs(), hangs(), hangs(), answers(0.1, 0.1))
    other = Fake("b", fails(Outcome.UNAUTHORIZED))
    began = now()
    async with Router([only, other], deadline_s=8.0, hedging=Hedging(cold_s=0.1)) as router:
        reply = await router.ask(MESSAGES)
        assert reply.outcome == "ok"
        assert now() - began < 4.5  # at half of the eight seconds, and a little
        await settled(router)
    assert only.asked == 4
