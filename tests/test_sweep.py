"""The sweep of rates: the knee where queueing theory has it, what stops it, and what it leaves behind.

Most run on a virtual clock: an hour of load takes a moment, and no busy machine can move the knee.
"""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
import sys
import time
from itertools import pairwise

import pytest

from dsr1kit.access import outcomes
from dsr1kit.access.channels import Channel
from dsr1kit.access.prices import Price
from dsr1kit.access.quota import Quota
from dsr1kit.compare.items import Item
from dsr1kit.compare.load import Objective, erlang_loss
from dsr1kit.compare.sweep import SweepSettings, sweep_backend
from dsr1kit.compare.sweep_figures import sweep_alt, sweep_figure, sweep_table
from dsr1kit.emulator.virtual import Climate, VirtualChannel, VirtualLoop
from dsr1kit.errors import UsageError
from dsr1kit.records import Outcome, Reply, Timing, Usage

ITEMS = [Item(id=f"i{n}", prompt="?", gold="42", kind="k", language="en") for n in range(20)]
RATES = (2.0, 4.0, 8.0, 16.0, 32.0, 64.0)


class Provider:
    """A virtual provider with `places`: whoever finds none free is throttled, or waits, as told."""

    name = "virtual"

    def __init__(self, places=8, answer_s=0.4, waits=False, outcome=None, cost_tokens=100):
        self.answer_s, self.waits, self.outcome, self.tokens = answer_s, waits, outcome, cost_tokens
        self.places, self.free = places, asyncio.Semaphore(places)
        self.dues, self.in_flight = [], 0

    async def ask(self, messages, sampling=None, *, on_delta=None, due=None):
        loop = asyncio.get_running_loop()
        due = loop.time() if due is None else due
        self.dues.append((due, sampling.sample))
        if self.outcome is not None:
            return self._reply(self.outcome, due, loop.time())
        if self.free.locked() and not self.waits:
            return self._reply(Outcome.THROTTLED, due, loop.time(), extra={"quota": Quota(retry_after_s=1.0)})
        async with self.free:
            await asyncio.sleep(self.answer_s)
        return self._reply(Outcome.OK, due, loop.time())

    def _reply(self, outcome, due, now, extra=None):
        ok = outcome is Outcome.OK
        return Reply(
            outcome, "" if ok else outcomes.detail(outcome), answer="42" if ok else "", channel=self.name,
            timing=Timing(0.0, 0.0, True, *((now - due, now - due, 0.0) if ok else (None,) * 3), None, now - due),
            usage=Usage(10, 0, self.tokens, "provider", "provider") if ok else Usage(), due_at=due, emulated=True,
            extra=extra or {},
        )  # fmt: skip


def settings(**more):
    given = {"channel": "c", "objective": Objective(total_s=1.0), "rates": RATES, "seconds": 60.0, "warm_up": 0}
    return SweepSettings(**given | more)


def swept(provider, wanted=None, **more):
    async def work():
        return await sweep_backend(provider() if callable(provider) else provider, wanted or settings(), ITEMS, **more)

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(work())


def rate_blocking(share, places, answer_s):
    low, high = 0.0, 1000.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if erlang_loss(places, middle * answer_s) < share else (low, middle)
    return low


@pytest.mark.parametrize("places", [4, 8])
def test_the_knee_of_a_provider_with_so_many_places_is_where_erlang_has_it(places):
    found = swept(lambda: Provider(places), settings(refine=3, rates=(1.0, *RATES)))
    assert found.reached
    assert found.knee == pytest.approx(rate_blocking(0.1, places, 0.4), rel=0.15)
    assert found.goodput_per_s == pytest.approx(places / 0.4, rel=0.15)  # its capacity
    assert found.emulated


def test_the_knee_of_a_provider_that_makes_requests_wait_is_below_its_capacity():
    found = swept(lambda: Provider(8, waits=True), settings(refine=4))
    assert found.reached
    assert found.knee == pytest.approx(8 / 0.4, rel=0.15)
    overloaded = next(s for s in found.steps if s.rate == 32.0)
    assert overloaded.answered_per_s == pytest.approx(20.0, rel=0.05)  # what it gives, and not what was asked
    assert overloaded.outcomes == {"ok": overloaded.asked}  # nobody failed: late is late, all the same
    assert overloaded.goodput["share"]["value"] < 0.5
    assert overloaded.first_token_s["p95"] > 10


def test_the_same_seed_asks_at_the_same_moments_and_another_at_others():
    def dues(seed):
        provider = Provider()
        swept(provider, settings(rates=(4.0,), refine=0, seed=seed))
        return provider.dues

    assert dues(1) == dues(1)
    assert dues(1) != dues(2)


def test_a_rate_is_asked_exactly_and_at_random_moments():
    provider = Provider(1000)
    found = swept(provider, settings(rates=(8.0,), refine=0))
    moments = [due for due, _ in provider.dues]
    assert len(moments) == found.steps[0].asked == 480
    gaps = [b - a for a, b in pairwise(moments)]
    assert 55 < moments[-1] - moments[0] <= 60
    assert min(gaps) < 0.01 < 0.125 < 0.4 < max(gaps)  # not evenly: an exponential's


def test_no_draw_of_a_question_is_asked_twice():
    seen = []

    class Remembering(Provider):
        async def ask(self, messages, sampling=None, **more):
            seen.append((messages[0]["content"], sampling.sample))
            return await super().ask(messages, sampling, **more)

    items = [Item(id=f"i{n}", prompt=f"What is {n}?", gold="42", kind="k", language="en") for n in range(3)]

    async def work():
        return await sweep_backend(Remembering(), settings(rates=(1.0, 2.0), warm_up=2), items)

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.run(work())
    assert len(seen) == len(set(seen)) == 2 + 60 + 120


def test_a_knee_that_lies_higher_is_said_to_be_not_reached():
    found = swept(lambda: Provider(1000), settings(rates=(1.0, 2.0)))
    assert (found.knee, found.reached, found.stopped) == (2.0, False, "")
    assert "not reached" in found.verdict[0]
    assert "ask at higher ones" in found.verdict[0]


def test_a_knee_below_the_lowest_rate_is_said_to_be_there():
    found = swept(lambda: Provider(1), settings(rates=(8.0, 16.0, 32.0)))
    assert found.knee is None
    assert found.reached
    assert found.answered
    assert "below 8 requests a second" in found.verdict[0]


def test_it_stops_once_two_rates_running_are_broken_and_says_why():
    found = swept(lambda: Provider(2, waits=True), settings(refine=0, rates=(1.0, *RATES)))
    assert found.steps[-1].rate < 64.0
    assert "fewer than 50% met the objective" in found.stopped
    assert any(found.stopped in line for line in found.verdict)


def test_it_stops_once_most_requests_are_throttled():
    found = swept(lambda: Provider(1), settings(refine=0))
    assert "of the requests were throttled" in found.stopped
    assert found.steps[-1].outcomes["throttled"] > found.steps[-1].asked * 2 / 3
    assert found.steps[-1].quota == "asks to wait 1 s"


def test_a_limit_by_the_minute_is_found_when_rates_last_a_minute_and_told_of_when_they_do_not():
    def limited():
        channel = Channel(name="virtual", base_urls=("http://127.0.0.1:1/v1",), model="m")
        climate = Climate(first_token_s=0.2, answer_s=0.2, busy_share=0.0, requests_per_minute=240.0, peak_hours=())
        return VirtualChannel(channel, climate, (), random.Random(0))

    found = swept(limited, settings(refine=3, objective=Objective(total_s=5.0)))
    assert found.knee == pytest.approx(240 / 60, rel=0.15)
    short = swept(limited, settings(refine=0, seconds=5.0, objective=Objective(total_s=5.0)))
    assert short.knee > 8
    assert "limit by the minute" in " ".join(short.verdict)


def test_a_provider_that_answers_nothing_is_not_asked_at_every_rate():
    found = swept(lambda: Provider(outcome=Outcome.UNAUTHORIZED))
    assert len(found.steps) == 1
    assert not found.answered
    assert found.knee is None
    assert "unauthorized" in found.stopped
    warmed = swept(lambda: Provider(outcome=Outcome.UNAUTHORIZED), settings(warm_up=2))
    assert warmed.steps == ()
    assert "unauthorized" in warmed.stopped


def test_a_budget_ends_the_sweep_and_is_told_beforehand_what_it_would_take():
    notes = []
    price = Price(0.0, 1e6)  # one for each token
    found = swept(
        lambda: Provider(1000, cost_tokens=1), settings(rates=(1.0, 2.0, 4.0), max_cost=100.0, warm_up=2),
        price=price, on_note=notes.append,
    )  # fmt: skip
    assert found.cost_expected == pytest.approx(60 + 120 + 240)
    assert notes[0].startswith("420 requests, about USD 4.2e+02")
    assert 100.0 <= found.cost < 102.0  # what was in flight when it was reached still ends
    assert "budget of 100" in found.stopped
    assert [step.rate for step in found.steps] == [1.0, 2.0]
    assert not found.reached  # what was not asked did not break


def test_a_budget_spent_in_the_warm_up_leaves_the_knee_unknown():
    found = swept(lambda: Provider(cost_tokens=1), settings(max_cost=1.0, warm_up=2), price=Price(0.0, 1e6))
    assert (found.knee, found.reached, found.answered) == (None, False, False)
    assert found.verdict[0].startswith("Knee: unknown")


def test_the_gap_around_the_knee_is_not_halved_beyond_what_its_figures_tell():
    found = swept(lambda: Provider(4), settings(refine=60, seconds=5.0, rates=(2.0, 16.0)))
    rates = [step.rate for step in found.steps]
    assert len(rates) == len(set(rates)) < 20


def test_a_client_that_is_the_limit_is_named_and_higher_rates_are_left_alone():
    class Blocking(Provider):
        async def ask(self, messages, sampling=None, *, on_delta=None, due=None):
            time.sleep(0.12)  # noqa: ASYNC251 - the fault that is to be found
            return await super().ask(messages, sampling, due=due)

    async def work():
        wanted = settings(rates=(20.0, 40.0, 80.0), seconds=1.5, refine=0, objective=Objective(first_token_s=0.3))
        return await sweep_backend(Blocking(1000, answer_s=0.05), wanted, ITEMS)

    found = asyncio.run(work())
    assert [step.rate for step in found.steps] == [20.0]
    assert "the client was the limit" in found.limited
    assert "the client was the limit at 20/s" in found.stopped
    assert any(line.startswith("Client: ") for line in found.verdict)


def test_what_a_backend_raises_is_raised():
    class Broken(Provider):
        async def ask(self, *args, **more):
            raise UsageError("cannot be meant")

    with pytest.raises(UsageError, match="cannot be meant"):
        swept(Broken)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"channel": "local:tiny-r1"}, "runs in this process"),
        ({"rates": ()}, "above 0"),
        ({"rates": (1.0, -1.0)}, "above 0"),
        ({"rates": (2.0, 1.0)}, "upwards"),
        ({"share": 0.0}, "share must be"),
        ({"share": 1.1}, "share must be"),
        ({"seconds": 0.0}, "seconds must be"),
        ({"refine": -1}, "refine must be"),
        ({"items": 0}, "items must be"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(change, why):
    with pytest.raises(UsageError, match=why):
        settings(**change)


def test_the_figure_the_table_and_the_words_hold_the_same():
    found = swept(lambda: Provider(8), settings(refine=1))
    from dataclasses import asdict

    told = json.loads(json.dumps(asdict(found)))
    figure = sweep_figure(told)
    labels = {text.get_text() for axes in figure.axes for text in axes.get_legend().get_texts()}
    assert f"knee, {found.knee:g}/s" in labels
    assert {"as asked", "answered", "in time", "first token, p95"} <= labels
    assert "emulated" in figure.axes[1].get_xlabel()
    table = sweep_table(told)
    assert list(table.index) == sorted(step.rate for step in found.steps)
    assert table.loc[found.knee, "holds"]
    assert f"{found.knee:g} requests a second held" in sweep_alt(told)


# The command, over real processes.
WEATHER = """
title = "two places"
[model]
script = "<think>\\nab\\n</think>\\n\\n\\\\boxed{42}"
[latency]
first_token_s = 0.4
[limits]
max_in_flight = 2
[price]
input = 1.0
output = 2.0
"""


def sweep(*arguments, code=0):
    done = subprocess.run(
        [sys.executable, "-m", "dsr1kit", "sweep", *map(str, arguments)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == code, done.stderr
    return done


def test_the_command_finds_what_an_emulated_channel_was_made_to_bear(tmp_path):
    weather = tmp_path / "w.toml"
    weather.write_text(WEATHER)
    command = [
        f"emulated:{weather}", "--rates", "0.5,40", "--seconds", "4", "--refine", "0", "--slo", "first_token_s=5",
        "--no-client-check", "--max-cost", "10", "--json", "--out", tmp_path / "out",
    ]  # fmt: skip
    told = json.loads(sweep(*command).stdout)
    assert told["goodput_per_s"] == pytest.approx(2 / 0.4, rel=0.3)  # 16 in 4 s, and two more at its edges
    assert told["emulated"]
    assert told["reached"]
    assert told["knee"] in (0.5, None)  # two requests in four seconds: two may yet meet two others
    on_disk = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert on_disk["steps"] == told["steps"]
    assert on_disk["versions"]["python"]
    records = [json.loads(line) for line in (tmp_path / "out" / "sweep.jsonl").read_text().splitlines()]
    assert len(records) == sum(step["asked"] for step in told["steps"])
    assert {record["rate"] for record in records} == {0.5, 40.0}
    assert sum(r["outcome"] == "ok" for r in records if r["rate"] == 40.0) == told["steps"][1]["goodput"]["met"]
    assert all(r["emulated"] and r["first_token_s"] >= 0.4 for r in records if r["outcome"] == "ok")
    assert told["cost"] == pytest.approx(sum(r["cost"] or 0 for r in records), rel=0.5)
    svg = (tmp_path / "out" / "sweep.svg").read_text()
    assert svg.startswith("<svg")
    assert "at 40/s" in svg or "40 a second" in svg
    again = sweep(*command, code=2)
    assert "is there already" in again.stderr
    assert again.stdout == ""


def test_the_command_exits_1_where_no_request_succeeded(tmp_path):
    catalogue = tmp_path / "c.toml"
    catalogue.write_text('[channel.gone]\nbase_url = "http://127.0.0.1:9/v1"\nmodel = "m"\n')
    done = sweep(
        "gone", "--channel-file", catalogue, "--rates", "1", "--slo", "total_s=5", "--out", tmp_path / "out", "--json",
        code=1,
    )  # fmt: skip
    assert json.loads(done.stdout)["knee"] is None
    assert "no request to gone was answered" in done.stderr
    assert "unreachable" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["nosuch", "--slo", "total_s=5"], "unknown channel"),
        (["deepseek", "--slo", "speed=5"], "an objective has no 'speed'"),
        (["deepseek", "--slo", "total_s=5", "--rates", "a,b"], "numbers separated by commas"),
        (["deepseek", "--slo", "total_s=5", "--from", "4", "--to", "2"], "--from must be"),
        (["deepseek", "--slo", "total_s=5", "--from", "1e-30"], "too many doublings"),
        (["free", "--slo", "total_s=5", "--max-cost", "1"], "has no price"),
        (["local:tiny-r1", "--slo", "total_s=5"], "runs in this process"),
    ],
)
def test_the_command_refuses_what_cannot_be_meant(arguments, why, tmp_path):
    catalogue = tmp_path / "c.toml"
    catalogue.write_text('[channel.free]\nbase_url = "http://127.0.0.1:9/v1"\nmodel = "m"\n')
    done = sweep(*arguments, "--channel-file", catalogue, "--out", tmp_path / "out", code=2)
    assert why in done.stderr
    assert not (tmp_path / "out").exists()
