"""How well does the router ride out faults, and what does it cost? Real HTTP on loopback, servers that otherwise
answer at once; LiteLLM's Router beside it where it is installed (pip install litellm).

    python benchmarks/router_faults.py [--requests 1000] [--only storm,...]

Printed for each scene: success share, p50, p99 and worst time, upstream calls a request; then, for each trap, how
long after the clock that noticed it the answer came; last, the router's own cost beside the bare client.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import time
import urllib.request
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import fault_server

from dsr1kit.access.channels import Channel
from dsr1kit.access.router import Router

MESSAGES = [{"role": "user", "content": "What is 12 + 30?"}]
FIRST_S, STALL_S = 1.0, 0.5
TRAPS = {  # and the clock that notices it, in seconds; 0: told at once
    "queued": FIRST_S, "no_resource": 0.0, "empty": 0.0, "html": 0.0, "cut_thinking": 0.0, "fraction_429": 0.0,
    "error_event": 0.0, "stalled_answer": STALL_S,
}  # fmt: skip


def channel(base: str, mode: str) -> Channel:
    return Channel(name=mode, base_urls=(f"{base}/{mode}/v1",), model="r1", family="r1")


def counts(base: str) -> dict[str, int]:
    with urllib.request.urlopen(f"{base}/counts") as answer:  # noqa: S310 - loopback
        return json.load(answer)


def told(name: str, seconds: list[float], well: int, upstream: int) -> None:
    ordered = sorted(seconds)
    p50, p99 = ordered[len(ordered) // 2], ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]
    print(
        f"  {name:<10} success {well / len(seconds):7.2%}   p50 {p50 * 1e3:6.1f} ms   p99 {p99:6.3f} s   "
        f"worst {ordered[-1]:6.3f} s   upstream calls a request {upstream / len(seconds):.2f}",
        flush=True,
    )


async def drive(ask, requests: int, streams: int) -> tuple[list[float], int]:
    seconds: list[float] = []
    well = 0
    left = iter(range(requests))

    async def stream() -> None:
        nonlocal well
        for _ in left:
            began = time.monotonic()
            answered = await ask()
            well += answered
            seconds.append(time.monotonic() - began)

    await asyncio.gather(*(stream() for _ in range(streams)))
    return seconds, well


async def scene(base: str, modes: list[str], requests: int, streams: int) -> None:
    counts(base)
    channels = [replace(channel(base, mode), name=f"{mode}-{n}") for n, mode in enumerate(modes)]
    async with Router(channels, deadline_s=3.0) as router:

        async def ask() -> bool:
            return (await router.ask(MESSAGES)).outcome == "ok"

        seconds, well = await drive(ask, requests, streams)
    told("dsr1kit", seconds, well, sum(counts(base).values()))
    await peer_scene(base, modes, requests, streams)


async def peer_scene(base: str, modes: list[str], requests: int, streams: int) -> None:
    try:
        import litellm
    except ImportError:
        return
    litellm.suppress_debug_info = True
    models = [
        {"model_name": "r1", "litellm_params": {"model": "openai/r1", "api_base": f"{base}/{m}/v1", "api_key": "x"}}
        for m in modes
    ]
    peer = litellm.Router(model_list=models, num_retries=3, timeout=3, allowed_fails=3, cooldown_time=2)

    async def ask() -> bool:
        try:
            text = ""
            async for part in await peer.acompletion(model="r1", messages=MESSAGES, stream=True):
                text += part.choices[0].delta.content or ""
            return text == fault_server.TEXT
        except Exception:
            return False

    seconds, well = await drive(ask, requests, streams)
    told("LiteLLM", seconds, well, sum(counts(base).values()))


async def trap(base: str, mode: str, clock_s: float, rounds: int = 10) -> None:
    seconds = []
    for _ in range(rounds):
        # A fresh router each time, that would rather ask the trap: nothing is learned between rounds.
        pair = [channel(base, mode), channel(base, "sound")]
        limits = {"first_token_s": FIRST_S, "stall_s": STALL_S, "restart_answers": True, "hedging": None}
        async with Router(pair, deadline_s=10.0, backups=["sound"], **limits) as router:
            began = time.monotonic()
            reply = await router.ask(MESSAGES)
            seconds.append(time.monotonic() - began - clock_s)
            assert (reply.outcome, reply.answer) == ("ok", fault_server.TEXT), (mode, reply)
    print(f"  {mode:<16} answered {statistics.fmean(seconds) * 1e3:6.1f} ms after it was noticed, "
          f"worst {max(seconds) * 1e3:6.1f} ms")  # fmt: skip


async def overhead(base: str, requests: int, streams: int) -> None:
    async def measure(open_one) -> tuple[float, float]:
        async with open_one() as r1:

            async def ask() -> bool:
                return (await r1.ask(MESSAGES)).outcome == "ok"

            await drive(ask, 200, streams)
            wall, cpu = time.monotonic(), time.process_time()
            _, well = await drive(ask, requests, streams)
            assert well == requests
            return (time.process_time() - cpu) * 1e3 / requests, requests / (time.monotonic() - wall)

    one, three = channel(base, "sound"), [channel(base, "sound")]
    three += [Channel(name=f"sound{n}", base_urls=one.base_urls, model="r1", family="r1") for n in (2, 3)]
    # In turns: the machine's speed drifts.
    rounds = [(await measure(one.open), await measure(lambda: Router(three, deadline_s=30))) for _ in range(5)]
    bare, routed = ([statistics.median(r[side][k] for r in rounds) for k in (0, 1)] for side in (0, 1))
    print(f"  bare client {bare[0]:.3f} ms CPU a request, {bare[1]:.0f} requests/s")
    print(f"  router over three {routed[0]:.3f} ms, {routed[1]:.0f} requests/s")
    print(f"  it adds {routed[0] - bare[0]:.3f} ms CPU and keeps {routed[1] / bare[1]:.0%} of the requests/s")


async def main(requests: int, only: list[str]) -> None:
    def wanted(name: str) -> bool:
        return not only or name in only

    with fault_server.running() as base:
        if wanted("faults"):
            print(f"one channel always 429 (Retry-After: 2), one 503 at 40 %, one hanging 10 s at 5 %; {requests} "
                  "requests, 8 streams, deadline 3 s")  # fmt: skip
            await scene(base, ["always_429", "busy_40", "hangs_5"], requests, 8)
        if wanted("storm"):
            print("everything 503: three channels, 60 requests, 8 streams, deadline 3 s")
            await scene(base, ["always_503"] * 3, 60, 8)
        if wanted("traps"):
            print(f"traps before a healthy channel; first-token clock {FIRST_S:g} s, stall clock {STALL_S:g} s")
            for mode, clock_s in TRAPS.items():
                await trap(base, mode, clock_s)
        if wanted("overhead"):
            print("overhead, 32 streams")
            await overhead(base, 3000, 32)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--only", default="", help="faults, storm, traps, overhead; separated by commas")
    arguments = parser.parse_args()
    asyncio.run(main(arguments.requests, [name for name in arguments.only.split(",") if name]))
