"""The rehearsed month and the outage played live: policies, outages and claims."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import subprocess
import sys

import pytest

from dsr1kit.compare import router_figures
from dsr1kit.compare.month import (
    POLICIES,
    MonthSettings,
    Played,
    claims,
    play,
    providers,
    rehearse_month,
    summarize_month,
)
from dsr1kit.compare.outage import play_outage, shares
from dsr1kit.emulator.virtual import Climate, VirtualChannel, VirtualLoop, draw_outages
from dsr1kit.errors import UsageError
from dsr1kit.records import Outcome

SMALL = MonthSettings(requests=2000, seeds=2)
ASK = [{"role": "user", "content": "?"}]


def on_virtual_time(work):
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(work)


def test_a_virtual_loop_jumps_and_keeps_the_order_of_timers():
    async def work():
        loop, seen = asyncio.get_running_loop(), []

        async def one(wait_s):
            await asyncio.sleep(wait_s)
            seen.append((wait_s, loop.time()))

        await asyncio.gather(*(one(w) for w in (86400.0, 1.5, 3600.0)))
        return seen

    assert on_virtual_time(work()) == [(w, pytest.approx(w, abs=1e-6)) for w in (1.5, 3600.0, 86400.0)]


def test_a_task_that_would_wait_for_ever_is_told():
    async def work():
        await asyncio.get_running_loop().create_future()

    with pytest.raises(RuntimeError, match="waits for ever"):
        on_virtual_time(work())


@pytest.mark.parametrize("hours", [12.7, 3.0, 0.5])
def test_outages_add_up_and_never_overlap(hours):
    outages = draw_outages(random.Random(1), hours, 30 * 86400.0)
    assert sum(o.end - o.begin for o in outages) == pytest.approx(hours * 3600)
    assert all(a.end <= b.begin for a, b in itertools.pairwise(outages))
    assert outages[0].begin >= 0
    assert outages[-1].end <= 30 * 86400.0
    assert {o.kind for o in outages} == {"busy", "queued", "silent"}
    assert draw_outages(random.Random(1), 0.0, 86400.0) == []


def test_all_policies_meet_the_same_outages():
    months = [providers(7, queued_s=a, silent_s=b) for a, b in ((600, 600), (30, 30))]
    assert [c.outages for c in months[0]] == [c.outages for c in months[1]]
    assert [c.outages for c in months[0]] != [c.outages for c in providers(8, queued_s=30, silent_s=30)]
    assert sum(o.end - o.begin for o in months[0][0].outages) == pytest.approx(12.7 * 3600)


def channel(climate, outages=(), **limits):
    made = providers(0, queued_s=30, silent_s=30)[0]
    return VirtualChannel(made.channel, climate, outages, random.Random(0), **limits)


def test_a_virtual_channel_is_slower_at_its_peak_hours():
    async def work():
        loop, one = asyncio.get_running_loop(), channel(Climate(spread=0.0, busy_share=0.0))
        night = await one.ask(ASK)
        loop.jump(10.5 * 3600 - loop.time())
        peak = await one.ask(ASK)
        return night.timing.total_s, peak.timing.total_s

    night, peak = on_virtual_time(work())
    assert peak == pytest.approx(3.2 * night)


def test_a_virtual_channel_keeps_its_limit_and_says_how_long_to_wait():
    async def work():
        one = channel(Climate(requests_per_minute=3, busy_share=0.0))
        replies = await asyncio.gather(*(one.ask(ASK) for _ in range(5)))
        return [(r.outcome, r.extra.get("quota")) for r in replies]

    seen = on_virtual_time(work())
    assert [o for o, _ in seen].count(Outcome.THROTTLED) == 2
    assert all(0 < q.wait_s() <= 60 for o, q in seen if o is Outcome.THROTTLED)


def test_one_channel_loses_its_outages_and_the_router_does_not():
    alone, routed = (play(p, 1, 3000, SMALL) for p in ("one channel", "router"))
    assert alone.requests == routed.requests == 3000
    assert alone.calls == 3000
    assert alone.share < 0.99 < 0.999 <= routed.share
    assert routed.calls < 1.3 * 3000
    assert play("router", 1, 500, SMALL) == play("router", 1, 500, SMALL)  # the same seed, the same month


def test_an_interval_without_any_failure_is_not_of_width_zero():
    row = summarize_month([Played(1000, 1000, 1000, (1.0,) * 1000, 1.0)] * 3)
    assert row["availability"] == {"value": 1.0, "low": pytest.approx(0.999), "high": 1.0}
    assert row["hours_down"]["value"] == 0
    assert row["hours_down"]["high"] == pytest.approx(0.72)


def test_claims_are_told_as_settled_only_by_their_intervals():
    def row(low, value, high, rate):
        share = {"low": low, "value": value, "high": high}
        down = {"low": (1 - high) * 720, "value": (1 - value) * 720, "high": (1 - low) * 720}
        return {
            "availability": share,
            "hours_down": down,
            "throughput_per_minute": {"low": 0.9 * rate, "value": rate, "high": 1.1 * rate},
        }

    one = row(0.98, 0.982, 0.984, 50.0)
    for router, holds in (
        (row(0.9999, 1.0, 1.0, 250.0), ["yes", "yes", "yes"]),
        (row(0.99, 0.992, 0.995, 100.0), ["no", "no", "no"]),
        (row(0.998, 0.9992, 0.9999, 190.0), ["not settled", "not settled", "not settled"]),
    ):
        assert [c["holds"] for c in claims({"one channel": one, "router": router})] == holds


def test_a_small_month_has_every_policy_and_a_figure():
    told = []
    summary = rehearse_month(SMALL, lambda *a: told.append(a))
    assert list(summary) == list(POLICIES)
    assert {name for name, *_ in told} == {*POLICIES, "throughput"}
    assert len(claims(summary)) == 3
    assert router_figures.month(summary).get_axes()


@pytest.mark.parametrize(
    ("wrong", "named"),
    [({"seeds": 1}, "seeds"), ({"requests": 10}, "requests"), ({"deadline_s": 0.0}, "deadline_s"),
     ({"first_token_s": -1.0}, "first_token_s")],
)  # fmt: skip
def test_settings_that_cannot_be_meant_are_refused(wrong, named):
    with pytest.raises(UsageError, match=named):
        MonthSettings(**wrong)


def test_the_command_prints_one_object_that_says_emulated():
    done = subprocess.run(
        [sys.executable, "-m", "dsr1kit", "rehearse", "--requests", "1000", "--seeds", "2", "--quiet", "--json"],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    told = json.loads(done.stdout)
    assert told["emulated"] is True
    assert set(told["policies"]) == set(POLICIES)
    wrong = subprocess.run(
        [sys.executable, "-m", "dsr1kit", "rehearse", "--seeds", "1"], capture_output=True, text=True, timeout=60
    )
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert "seeds" in wrong.stderr


def test_an_outage_played_live_takes_down_one_channel_and_not_the_router():
    played = asyncio.run(play_outage(seconds=6.0, rate=12.0, seed=1))
    alone, routed = shares(played.asked, "alone"), shares(played.asked, "router")
    assert alone["questions"] == routed["questions"] > 30
    assert alone["answered"] < 0.8
    assert routed["answered"] >= 0.98
    assert played.metrics.requests == routed["questions"]
    by = {a.answered_by for a in played.asked if a.who == "alone"}
    assert by <= {"official", ""}
    assert router_figures.outage(played).get_axes()
    assert len(router_figures.metrics(played).get_axes()) == 6
    assert max(told["open_circuits"] for _, told in played.watched) >= 1
