"""The twelve numbers: what they count, and that Prometheus, pandas and rich can read them."""

from __future__ import annotations

import asyncio
import io
import math
import random
import re
from collections import Counter
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from dsr1kit.access.channels import Channel
from dsr1kit.access.metrics import TWELVE, Metrics
from dsr1kit.access.prices import Price
from dsr1kit.access.race import Hedging
from dsr1kit.access.router import Router
from dsr1kit.emulator.virtual import VirtualLoop
from dsr1kit.records import Delta, Outcome, Reply, Timing, Usage

MESSAGES = [{"role": "user", "content": "What is 12 + 30?"}]

# The text format, version 0.0.4, as its specification has it.
_NAME = r"[a-zA-Z_:][a-zA-Z0-9_:]*"
_LABEL = r'[a-zA-Z_][a-zA-Z0-9_]*="(?:[^"\\\n]|\\["\\n])*"'
_VALUE = r"NaN|[+-]Inf|[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_SAMPLE = re.compile(rf"({_NAME})(?:\{{((?:{_LABEL})(?:,{_LABEL})*)?\}})? ({_VALUE})")
_HELP = re.compile(rf"# HELP ({_NAME}) ((?:[^\\\n]|\\[\\n])*)")
_TYPE = re.compile(rf"# TYPE ({_NAME}) (counter|gauge|histogram|summary|untyped)")


def parse(text):
    """{name: {labels: value}}; an AssertionError for whatever the format does not allow."""
    assert text.endswith("\n")
    assert "\r" not in text
    found, helped, order = {}, set(), []
    for line in text.split("\n")[:-1]:
        if match := _HELP.fullmatch(line):
            assert match[1] not in helped, f"two HELP lines: {line}"
            assert match[1] not in found
            helped.add(match[1])
        elif match := _TYPE.fullmatch(line):
            assert match[1] not in found, f"TYPE twice or after samples: {line}"
            found[match[1]] = {}
            order.append(match[1])
        else:
            match = _SAMPLE.fullmatch(line)
            assert match, f"not a sample: {line!r}"
            name, labels, value = match.groups()
            assert name == order[-1], f"samples of {name} are not together"
            pairs = re.findall(r'([a-zA-Z_]\w*)="((?:[^"\\]|\\.)*)"', labels or "")
            assert len({key for key, _ in pairs}) == len(pairs)
            told = tuple((key, re.sub(r"\\(.)", lambda m: {"n": "\n"}.get(m[1], m[1]), v)) for key, v in pairs)
            assert told not in found[name], f"the same sample twice: {line}"
            found[name][told] = float(value.replace("Inf", "inf"))
    assert helped == set(found)
    return found


def ended(metrics, at, outcome=Outcome.OK, *, calls=1, hedges=0, won=False, first=None, total=None, tokens=(0, 0)):
    metrics.began(at)
    reply = Reply(outcome, timing=Timing(first_token_s=first, total_s=total), usage=Usage(10, *tokens))
    metrics.ended(at, reply, calls, hedges, won)


def test_nothing_was_seen_yet():
    metrics = Metrics()
    snapshot = metrics.snapshot()
    assert list(snapshot) == list(TWELVE)
    assert len(TWELVE) == 12
    assert (snapshot["success_share"], snapshot["in_flight"], snapshot["busy"], snapshot["cost"]) == (None, 0, {}, {})
    parsed = parse(metrics.prometheus())
    assert list(parsed) == [f"dsr1kit_{name}" for name in TWELVE]
    assert math.isnan(parsed["dsr1kit_success_share"][()])
    assert parsed["dsr1kit_busy"] == {}
    assert list(metrics.frame().columns) == ["metric", "label", "value", "meaning"]
    Console(file=io.StringIO()).print(metrics.table())


def test_what_is_counted():
    metrics = Metrics()
    for n in range(100):
        ended(metrics, n / 10, first=n / 100, total=n / 10, tokens=(30, 10))
    for outcome in (Outcome.THROTTLED, Outcome.QUEUED, Outcome.QUEUED, Outcome.CUT, Outcome.BAD_REQUEST):
        ended(metrics, 10.0, outcome, calls=3, hedges=1, won=outcome is Outcome.CUT)
    ended(metrics, 10.0, Outcome.TRUNCATED)
    metrics.began(10.0)
    metrics.began(10.0)
    metrics.ended(10.0, None, 1, 0, False)
    metrics.paid(0.5, "USD")
    metrics.paid(0.25, "USD")
    metrics.paid(3.0, "CNY")
    metrics.cache = SimpleNamespace(hits=3, coalesced=1, misses=4)
    metrics.circuits = lambda: {"a": ("closed", None), "b": ("open", None), "c": ("half-open", None)}
    snapshot = metrics.snapshot()
    assert snapshot["requests_per_s"] == pytest.approx(10.6)
    assert snapshot["success_share"] == pytest.approx(101 / 107)
    assert snapshot["busy"] == {"throttled": 1, "queued": 2}
    assert snapshot["first_token_s"] == {"p50": pytest.approx(0.49), "p99": pytest.approx(0.99)}
    assert snapshot["total_s"] == {"p99": pytest.approx(9.9)}
    assert (snapshot["in_flight"], snapshot["open_circuits"]) == (1, 2)
    assert snapshot["amplification"] == pytest.approx((100 + 15 + 1 + 1) / 107)
    assert snapshot["hedge_win_share"] == pytest.approx(1 / 5)
    assert snapshot["cache_hit_share"] == 0.5
    assert snapshot["tokens_per_s"] == {"reasoning": pytest.approx(300), "answer": pytest.approx(100)}
    assert snapshot["cost"] == {"USD": 0.75, "CNY": 3.0}

    parsed = parse(metrics.prometheus())
    assert parsed["dsr1kit_busy"] == {(("outcome", "throttled"),): 1, (("outcome", "queued"),): 2}
    assert set(parsed["dsr1kit_first_token_s"]) == {(("quantile", "0.5"),), (("quantile", "0.99"),)}
    assert parsed["dsr1kit_cost"] == {(("currency", "USD"),): 0.75, (("currency", "CNY"),): 3.0}
    assert parsed["dsr1kit_tokens_per_s"][("kind", "answer"),] == pytest.approx(100)
    assert parsed["dsr1kit_open_circuits"] == {(): 2}

    frame = metrics.frame()
    assert set(frame["metric"]) == set(TWELVE)
    assert frame["value"].dtype == float
    at = frame.set_index(["metric", "label"])["value"]
    assert at["cost", "CNY"] == 3.0
    assert at["success_share", ""] == pytest.approx(101 / 107)
    assert (frame["meaning"] == frame["metric"].map(TWELVE)).all()

    out = io.StringIO()
    Console(file=out, width=100).print(metrics.table())
    assert all(name in out.getvalue() for name in TWELVE)


@given(
    st.dictionaries(st.text(min_size=1, max_size=8), st.floats(allow_nan=True, allow_infinity=True), max_size=5),
    st.lists(st.sampled_from(list(Outcome)), max_size=30),
)
def test_whatever_is_counted_prometheus_can_read_it(costs, outcomes):
    metrics = Metrics()
    for currency, cost in costs.items():
        metrics.paid(cost, currency)
    for number, outcome in enumerate(outcomes):
        ended(metrics, number * 1e-12, outcome, first=1e-9, total=1e300)
    text = metrics.prometheus()
    if not any(c in text for c in "\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"):
        parsed = parse(text)
        assert len(parsed["dsr1kit_cost"]) == len(costs)
        assert {key[0][1] for key in parsed["dsr1kit_cost"]} == set(costs)
        busy = Counter(o.value for o in outcomes if o in ("throttled", "overloaded", "queued", "stalled"))
        assert {key[0][1]: value for key, value in parsed["dsr1kit_busy"].items()} == busy
    metrics.frame()
    Console(file=io.StringIO()).print(metrics.table())


def test_percentiles_and_rates_are_of_the_last_ten_thousand():
    metrics = Metrics()
    for n in range(30_000):
        ended(metrics, float(n if n < 20_000 else 20_000 + (n - 20_000) / 10), total=1.0 if n < 20_000 else 5.0)
    assert metrics.snapshot()["total_s"]["p99"] == 5.0
    assert metrics.snapshot()["requests_per_s"] == pytest.approx(10.0, rel=1e-3)


# Through a router.
class Priced:
    def __init__(self, name, first_s, outcomes=()):
        self.name, self.first_s, self.outcomes = name, first_s, list(outcomes)
        self.channel = Channel(name=name, base_urls=("http://x",), model="r1", price=Price(1.0, 4.0, "CNY"))
        self.cached = False

    async def ask(self, messages, sampling=None, *, on_delta=None, due=None):
        loop = asyncio.get_running_loop()
        due = loop.time() if due is None else due
        outcome = self.outcomes.pop(0) if self.outcomes else Outcome.OK
        await asyncio.sleep(self.first_s)
        if outcome is not Outcome.OK:
            return Reply(outcome)
        on_delta(Delta("reasoning", "x", self.first_s))
        timing = Timing(first_token_s=loop.time() - due, total_s=loop.time() - due)
        usage = Usage(1000, 800, 200, "provider", "provider")
        return Reply(outcome, answer="42", timing=timing, usage=usage, from_cache=self.cached)


def routed(*backends, **settings):
    async def main(use):
        async with Router(backends, rng=random.Random(1), **settings) as router:
            return await use(router)

    def run(use):
        with asyncio.Runner(loop_factory=VirtualLoop) as runner:
            return runner.run(main(use))

    return run


def test_a_router_tells_its_own():
    async def use(router):
        await router.ask(MESSAGES)
        asking = asyncio.create_task(router.ask(MESSAGES))
        await asyncio.sleep(0.1)
        assert router.metrics.snapshot()["in_flight"] == 1
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        return router.metrics

    failing = Priced("a", 0.5, [Outcome.OVERLOADED])
    metrics = routed(failing, Priced("b", 0.5), backups=["b"], hedging=None)(use)
    snapshot = metrics.snapshot()
    assert snapshot["in_flight"] == 0
    assert snapshot["amplification"] == 1.5
    assert snapshot["success_share"] == 0.5
    assert snapshot["cost"] == {"CNY": pytest.approx((1000 * 1 + 1000 * 4) / 1e6)}
    assert snapshot["total_s"]["p99"] == pytest.approx(1.0)
    assert snapshot["busy"] == {}
    assert snapshot["open_circuits"] == 0
    assert parse(metrics.prometheus())["dsr1kit_amplification"] == {(): 1.5}


def test_hedges_that_won_and_lost():
    async def use(router):
        for _ in range(4):
            await router.ask(MESSAGES)
        return router.metrics.snapshot()["hedge_win_share"], router.metrics.hedges

    hedging = Hedging(cold_s=0.5)
    pair = Priced("a", 3.0), Priced("b", 0.2)
    assert routed(*pair, backups=["b"], hedging=hedging)(use) == (1.0, 4)
    pair = Priced("a", 0.6), Priced("b", 3.0)
    assert routed(*pair, backups=["b"], hedging=hedging)(use) == (0.0, 4)


def test_what_comes_from_a_cache_costs_nothing():
    async def use(router):
        await router.ask(MESSAGES)
        return router.metrics.snapshot()["cost"]

    backend = Priced("a", 0.1)
    backend.cached = True
    assert routed(backend)(use) == {}
