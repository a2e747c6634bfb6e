"""The router over real HTTP: every trap of the far side, and a bad day of three providers at once."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from dsr1kit.access.channels import Channel
from dsr1kit.access.race import Hedging
from dsr1kit.access.router import Router

MESSAGES = [{"role": "user", "content": "What is 12 + 30?"}]
FIRST_S, STALL_S = 0.5, 0.3
#: and the clock that notices each, in seconds; 0: told at once
TRAPS = {
    "queued": FIRST_S,
    "no_resource": 0.0,
    "empty": 0.0,
    "html": 0.0,
    "cut_thinking": 0.0,
    "fraction_429": 0.0,
    "error_event": 0.0,
    "stalled_answer": STALL_S,
}
OUTCOMES = {
    "queued": "queued",
    "no_resource": "overloaded",
    "empty": "empty",
    "html": "not_an_answer",
    "cut_thinking": "cut",
    "fraction_429": "throttled",
    "error_event": "overloaded",
    "stalled_answer": "stalled",
}


def _fault_server():
    """The benchmark's server; its process of its own finds it by name again."""
    path = Path(__file__).parents[1] / "benchmarks" / "fault_server.py"
    spec = importlib.util.spec_from_file_location("fault_server", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["fault_server"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def server():
    folder = str(Path(__file__).parents[1] / "benchmarks")
    sys.path.insert(0, folder)
    try:
        module = _fault_server()
        with module.running() as base:
            yield base, module.TEXT
    finally:
        sys.path.remove(folder)
        sys.modules.pop("fault_server", None)


@pytest.fixture(autouse=True)
def _no_proxies(monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


def channel(base, mode, **fields):
    return Channel(name=mode, base_urls=(f"{base}/{mode}/v1",), model="r1", family="r1", **fields)


def counts(base):
    with urllib.request.urlopen(f"{base}/counts") as answer:  # noqa: S310 - loopback
        return json.load(answer)


async def left_behind(router):
    for _ in range(20):
        await asyncio.sleep(0)
    assert asyncio.all_tasks() == {asyncio.current_task()}
    assert [m.in_flight for m in router._members.all] == [0] * len(router._members.all)


@pytest.mark.parametrize("hedging", [None, Hedging()], ids=["no hedges", "hedges"])
@pytest.mark.parametrize("trap", TRAPS)
def test_a_trap_is_left_for_the_healthy_channel(server, trap, hedging):
    base, text = server

    async def main():
        channels = [channel(base, trap), channel(base, "sound", backup=True)]
        shown = []
        settings = {"first_token_s": FIRST_S, "stall_s": STALL_S, "restart_answers": True, "hedging": hedging}
        async with Router(channels, deadline_s=5.0, **settings) as router:
            began = time.monotonic()
            reply = await router.ask(MESSAGES, on_delta=shown.append)
            took_s = time.monotonic() - began
            assert (reply.outcome, reply.answer, reply.channel) == ("ok", text, "sound")
            assert [(a.channel, a.outcome) for a in reply.attempts] == [(trap, OUTCOMES[trap]), ("sound", "ok")]
            assert TRAPS[trap] <= took_s <= TRAPS[trap] + 0.5
            assert reply.timing.total_s == pytest.approx(took_s, abs=0.1)
            last = max(d.attempt for d in shown)
            assert "".join(d.text for d in shown if d.attempt == last and d.kind == "answer") == text
            assert "".join(d.text for d in shown if d.attempt == last and d.kind == "reasoning") == reply.reasoning
            assert last == (trap in ("no_resource", "cut_thinking", "error_event", "stalled_answer"))
            await left_behind(router)

    asyncio.run(main())


def test_a_stall_in_mid_answer_is_returned_as_cut_where_no_restart_is_wanted(server):
    base, _ = server

    async def main():
        channels = [channel(base, "stalled_answer"), channel(base, "sound", backup=True)]
        async with Router(channels, deadline_s=5.0, first_token_s=FIRST_S, stall_s=STALL_S) as router:
            reply = await router.ask(MESSAGES)
            assert (reply.outcome, reply.answer) == ("cut", "The ans")
            await left_behind(router)

    asyncio.run(main())


def test_a_bad_day_of_three_providers(server):
    """One always says 429, one is busy in four of ten cases, one hangs for ten seconds now and then."""
    base, text = server

    async def main():
        counts(base)
        channels = [channel(base, mode) for mode in ("always_429", "busy_40", "hangs_5")]
        async with Router(channels, deadline_s=3.0) as router:
            left = iter(range(300))
            replies, worst_s = [], 0.0

            async def stream():
                nonlocal worst_s
                for _ in left:
                    began = time.monotonic()
                    replies.append(await router.ask(MESSAGES))
                    worst_s = max(worst_s, time.monotonic() - began)

            await asyncio.gather(*(stream() for _ in range(8)))
            assert [r.detail for r in replies if r.outcome != "ok"] == []
            assert {r.answer for r in replies} == {text}
            assert len(replies) == 300
            asked = counts(base)
            assert sum(asked.values()) <= 1.3 * 300
            assert sum(asked.values()) == sum(len(r.attempts) for r in replies) == router.metrics.calls
            assert asked["always_429"] <= 4 + 8  # the first of each stream, then a probe every two seconds
            assert worst_s < 3.0
            await left_behind(router)

    asyncio.run(main())


def test_when_everything_is_busy_the_far_side_is_left_in_peace(server):
    base, _ = server

    async def main():
        counts(base)
        channels = [
            Channel(name=name, base_urls=(f"{base}/always_503/v1",), model="r1", family="r1") for name in ("a", "b")
        ]
        async with Router(channels, deadline_s=1.0) as router:
            began = time.monotonic()
            replies = await asyncio.gather(*(router.ask(MESSAGES) for _ in range(100)))
            assert time.monotonic() - began < 1.3
            assert {r.outcome for r in replies} == {"overloaded"}
            assert all("overloaded" in r.detail for r in replies)
            assert sum(counts(base).values()) <= 130
            await left_behind(router)

    asyncio.run(main())
