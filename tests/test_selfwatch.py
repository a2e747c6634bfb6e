"""The client watches itself: its bias on a scripted server, its lateness in a run, and who was the limit."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time

import pytest

from dsr1kit.access.channels import Channel
from dsr1kit.compare.load import InFlight
from dsr1kit.compare.selfwatch import ClientBias, LoopWatch, client_note, client_verdict, measure_client
from dsr1kit.emulator.scripted import NUMBERED, Script, ScriptedServer
from dsr1kit.emulator.virtual import VirtualLoop
from dsr1kit.errors import RunError

FINE = {
    "cpu_share": 0.2,
    "lag_ms": {"p50": 0.5, "p99": 2.0, "max": 5.0},
    "in_flight": {"asked": 8, "mean": 7.9, "peak": 8},
    "late_ms": {"p50": 0.1, "p99": 0.5},
}


def test_the_scripted_server_is_exact_and_tells_how_late_it_was_for_each_request():
    script = Script(first_token_s=0.1, inter_token_s=0.02, tokens=10)

    async def work():
        async with ScriptedServer(script) as server:
            channel = Channel(name="scripted", base_urls=(server.url,), model="m")
            async with channel.open() as client:
                replies = [
                    await client.ask([{"role": "user", "content": NUMBERED.format(number)}]) for number in (7, 3)
                ]
            return replies, await server.lateness(), await server.lateness()

    replies, late, none = asyncio.run(work())
    assert [told.number for told in late] == [7, 3]
    assert none == []
    for reply, told in zip(replies, late, strict=True):
        assert reply.outcome == "ok"
        assert reply.emulated
        assert reply.answer.endswith("\\boxed{42}")
        assert reply.usage.completion_tokens == 10
        assert told.first_s >= 0
        # Never sooner than the script and what the server was late by say; how much later is the machine's affair.
        assert reply.timing.first_token_s >= 0.1 + told.first_s - 0.002
        assert reply.timing.total_s >= 0.1 + 9 * 0.02


def test_the_scripted_server_ends_with_who_started_it_however_that_one_ends():
    code = (
        "import asyncio\nfrom dsr1kit.emulator.scripted import ScriptedServer\n"
        "async def main():\n"
        "    async with ScriptedServer() as server:\n"
        "        print(server._process.pid, flush=True)\n"
        "        await asyncio.sleep(60)\n"
        "asyncio.run(main())"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    parent.send_signal(signal.SIGKILL)
    parent.wait(timeout=10)
    parent.stdout.close()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        with contextlib.suppress(ProcessLookupError, FileNotFoundError):
            os.kill(pid, 0)
            with open(f"/proc/{pid}/stat") as stat:  # noqa: PTH123 - a file of the kernel's, gone at any moment
                if stat.read().rpartition(")")[2].split()[0] != "Z":  # nobody may be there to reap it
                    time.sleep(0.02)
                    continue
        return
    pytest.fail("the server outlived who started it")


def test_a_server_that_cannot_start_is_told(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")

    async def work():
        async with ScriptedServer():
            pass

    with pytest.raises(RunError, match="did not start"):
        asyncio.run(work())


@pytest.mark.parametrize("streams", [1, 32])
def test_the_client_is_measured_at_a_run_s_own_concurrency_and_in_bounded_time(streams):
    began = time.monotonic()
    bias = asyncio.run(measure_client(streams, seconds=0.8))
    assert time.monotonic() - began < 60
    assert isinstance(bias, ClientBias)
    assert bias.streams == streams
    assert bias.requests >= streams
    assert bias.first_token_ms > -1.0  # a client cannot see a token before it was sent
    assert bias.first_token_p99_ms >= bias.first_token_ms
    assert bias.cpu_ms_per_request > 0


def test_a_client_that_is_held_up_finds_so_in_its_own_bias():
    async def held_up():
        async def hold():
            while True:
                time.sleep(0.12)  # noqa: ASYNC251 - the fault that is to be found
                await asyncio.sleep(0.005)

        holding = asyncio.create_task(hold())
        try:
            return await measure_client(1, seconds=0.8)
        finally:
            holding.cancel()

    # A request is sent between two holds, and its first token, due 50 ms later, is read at the end of the second.
    assert asyncio.run(held_up()).first_token_ms > 20


def test_a_blocked_event_loop_is_reported_with_every_moment_it_missed():
    async def blocked():
        async with LoopWatch() as watch:
            await asyncio.sleep(0.05)
            time.sleep(0.4)  # noqa: ASYNC251 - the fault that is to be found
            await asyncio.sleep(0.05)
        return watch

    watch = asyncio.run(blocked())
    lag = watch.lag_ms()
    assert lag["max"] >= 375
    assert lag["p99"] >= 300
    # Twenty timers were due in those 0.4 s, each late by what was left: were they counted as one, this were nothing.
    assert lag["p50"] >= 50
    note = client_note(None, watch, InFlight(), asked=None, queue_s=[0.0], first_token_s=[1.0])
    assert "its event loop woke" in note["limited"]
    assert "another one" in note["limited"]


def test_an_event_loop_at_rest_is_not_reported_and_costs_next_to_nothing():
    async def at_rest():
        async with LoopWatch() as watch:
            await asyncio.sleep(0.5)
        return watch

    # A noisy machine may hold up one of three; a watch that reports what is not there does so in all.
    watches = [asyncio.run(at_rest()) for _ in range(3)]
    assert min(w.lag_ms()["p50"] for w in watches) < 5
    assert min(w.cpu_share for w in watches) < 0.02
    notes = [client_note(None, w, InFlight(), asked=None, queue_s=[0.0], first_token_s=[1.0]) for w in watches]
    assert "" in [note["limited"] for note in notes]


def test_an_event_loop_is_watched_on_its_own_clock():
    async def work():
        async with LoopWatch() as watch:
            await asyncio.sleep(3600)
        return watch

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        watch = runner.run(work())
    assert watch.lag_ms()["max"] < 0.1
    assert watch.cpu_share < 0.01


def test_a_run_limited_by_its_server_is_not_blamed_on_the_client():
    """Two streams on a server that takes a second: long waits and few answers, and a client with nothing to do."""
    script = Script(first_token_s=0.8, inter_token_s=0.05, tokens=5)

    async def work():
        flight = InFlight()

        async def stream(client):
            replies = []
            for _ in range(2):
                with flight:
                    replies.append(await client.ask([{"role": "user", "content": "?"}]))
            flight.drained()
            return replies

        async with contextlib.AsyncExitStack() as stack:
            server = await stack.enter_async_context(ScriptedServer(script))
            channel = Channel(name="scripted", base_urls=(server.url,), model="m")
            client = await stack.enter_async_context(channel.open())
            async with LoopWatch() as watch:
                replies = [r for found in await asyncio.gather(stream(client), stream(client)) for r in found]
        return client_note(
            None, watch, flight, asked=2,
            queue_s=[r.timing.queue_s for r in replies], first_token_s=[r.timing.first_token_s for r in replies],
        )  # fmt: skip

    notes = [asyncio.run(work())]
    if notes[0]["limited"]:  # a machine that others use may truly have been the limit; not twice
        notes.append(asyncio.run(work()))
    assert notes[-1]["limited"] == "", notes
    assert notes[-1]["in_flight"]["mean"] > 1.8


def test_a_client_with_time_to_spare_is_not_blamed():
    assert client_verdict(FINE, first_token_ms=500.0) == ""
    assert client_verdict(FINE | {"in_flight": {"asked": None, "mean": 0.1, "peak": 1}}, first_token_ms=500.0) == ""
    assert client_verdict(FINE, first_token_ms=None) == ""


@pytest.mark.parametrize(
    ("change", "first_token_ms", "says", "mend"),
    [
        ({"cpu_share": 0.97}, 500.0, "97% of one core (over 85%)", "fewer streams"),
        ({"lag_ms": {"p50": 1.0, "p99": 60.0, "max": 90.0}}, 500.0, "60.0 ms late", "something else kept this machine"),
        ({"lag_ms": {"p50": 1.0, "p99": 8.0, "max": 90.0}}, 50.0, "8.0 ms late", "something else kept this machine"),
        ({"in_flight": {"asked": 64, "mean": 40.0, "peak": 64}}, 500.0, "40.0 requests in flight of the 64", "fewer"),
        ({"late_ms": {"p50": 300.0, "p99": 900.0}}, 500.0, "sent 900 ms after they were due", "requests_per_minute"),
        (
            {"cpu_share": 0.99, "lag_ms": {"p50": 1.0, "p99": 200.0, "max": 300.0}},
            5000.0,
            "99% of one core (over 85%), its event loop woke 200.0 ms late",
            "from two processes",
        ),
    ],
)
def test_a_client_that_was_the_limit_says_so_with_figures_and_what_to_do(change, first_token_ms, says, mend):
    told = client_verdict(FINE | change, first_token_ms=first_token_ms)
    assert says in told
    assert mend in told
    assert "\n" not in told


def test_a_little_lateness_is_nothing_beside_a_long_wait():
    late = FINE | {"lag_ms": {"p50": 2.0, "p99": 80.0, "max": 120.0}}
    assert client_verdict(late, first_token_ms=5000.0) == ""
    assert client_verdict(late, first_token_ms=300.0)
    tiny = FINE | {"lag_ms": {"p50": 0.5, "p99": 4.0, "max": 9.0}}
    assert client_verdict(tiny, first_token_ms=10.0) == ""  # timers are no more exact than that
