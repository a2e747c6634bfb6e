"""An outage played live: emulated providers over real HTTP, one of which goes down and comes back.

The same questions at the same moments go to one channel alone and to a router over all of them.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dsr1kit.access.metrics import Metrics
from dsr1kit.access.router import Router
from dsr1kit.emulator.channel import channel_of
from dsr1kit.emulator.server import Emulator
from dsr1kit.emulator.weather import Weather
from dsr1kit.records import Backend, Message, Outcome

_MESSAGES: list[Message] = [{"role": "user", "content": "What is 12 + 30?"}]
_SCRIPT = "<think>\n12 + 30: tens 1 + 3 = 4, ones 2 + 0 = 2.\n</think>\n\nThe answer is \\boxed{42}."
#: Name, weight, backup, first token in seconds: the article's three weighted channels and two backups.
PROVIDERS = (
    ("official", 5.0, False, 0.06),
    ("cloud-a", 3.0, False, 0.08),
    ("cloud-b", 2.0, False, 0.08),
    ("backup-a", 1.0, True, 0.1),
    ("backup-b", 1.0, True, 0.1),
)
#: Stages of the outage of `official`: how it fails, one after the other, in equal parts.
STAGES = ("overloaded", "queued", "stalled")


@dataclass(frozen=True, slots=True)
class Asked:
    """One question of the play.

    Attributes:
        who: `alone` or `router`.
        at_s: when it was due, in seconds from the beginning.
        total_s: how long it took.
        answered_by: the channel whose answer it was; empty: none.
        calls: upstream calls made for it.
    """

    who: str
    at_s: float
    outcome: str
    total_s: float
    answered_by: str
    calls: int


@dataclass(frozen=True, slots=True)
class Outage:
    """What was played.

    Attributes:
        down: (begin, end) of the outage, in seconds from the beginning.
        metrics: the router's own, at the end.
        watched: (seconds from the beginning, the twelve metrics then), twice a second.
    """

    asked: tuple[Asked, ...]
    down: tuple[float, float]
    metrics: Metrics
    watched: tuple[tuple[float, dict[str, Any]], ...]


async def play_outage(
    *,
    seconds: float = 12.0,
    rate: float = 20.0,
    deadline_s: float = 3.0,
    first_token_s: float = 1.0,
    seed: int = 0,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> Outage:
    """Ask at random moments for `seconds`; in the middle half of them the channel `official` is down.

    Args:
        rate: questions a second, each to the channel alone and to the router.
        deadline_s, first_token_s: limits of both, in seconds.
        seed: of the moments and of the router.
    """
    down = (seconds * 0.25, seconds * 0.75)
    async with AsyncExitStack() as stack:
        emulators, channels = [], []
        for name, weight, backup, first_s in PROVIDERS:
            weather = Weather(
                path=Path(name), scripts=(_SCRIPT,), first_token_s=first_s, inter_token_s=0.001, spread=0.2,
                keep_alive="comment", keep_alive_s=0.2,
            )  # fmt: skip
            emulator = Emulator(weather)
            url = await stack.enter_async_context(emulator.listen())
            plain = channel_of(weather, url, name, emulator.began)
            channels.append(replace(plain, weight=weight, backup=backup, family="r1"))
            emulators.append(emulator)
        clocks: dict[str, Any] = {"first_token_s": first_token_s, "stall_s": 1.0}
        alone = await stack.enter_async_context(channels[0].open(deadline_s=deadline_s, **clocks))
        router = Router(channels, deadline_s=deadline_s, rng=random.Random(seed), **clocks)
        await stack.enter_async_context(router)
        watched: list[tuple[float, dict[str, Any]]] = []
        beside = [asyncio.create_task(w) for w in (_change(emulators[0], down), _watch(router.metrics, watched))]
        try:
            asked = await _drive({"alone": alone, "router": router}, seconds, rate, seed, on_progress)
        finally:
            for task in beside:
                task.cancel()
        return Outage(tuple(asked), down, router.metrics, tuple(watched))


async def _watch(metrics: Metrics, watched: list[tuple[float, dict[str, Any]]]) -> None:
    """Take the metrics twice a second."""
    loop = asyncio.get_running_loop()
    began = loop.time()
    while True:
        await asyncio.sleep(0.5)
        watched.append((loop.time() - began, metrics.snapshot()))


async def _change(emulator: Emulator, down: tuple[float, float]) -> None:
    """Take a provider through the stages of an outage."""
    calm = emulator.weather
    await asyncio.sleep(down[0])
    for stage in STAGES:
        emulator.weather = replace(calm, faults={stage: 1.0}, how={"stalled": "before"})
        await asyncio.sleep((down[1] - down[0]) / len(STAGES))
    emulator.weather = calm


async def _drive(
    backends: dict[str, Backend],
    seconds: float,
    rate: float,
    seed: int,
    on_progress: Callable[[str, int, int], None] | None,
) -> list[Asked]:
    loop = asyncio.get_running_loop()
    began = loop.time()
    asked: list[Asked] = []

    async def one(who: str, due: float) -> None:
        reply = await backends[who].ask(_MESSAGES, due=due)
        by = reply.channel if reply.outcome is Outcome.OK else ""
        calls = len(reply.attempts)
        asked.append(Asked(who, due - began, reply.outcome.value, loop.time() - due, by, calls))

    moments = _moments(random.Random(seed), rate, seconds)
    async with asyncio.TaskGroup() as group:
        for number, at in enumerate(moments, 1):
            await asyncio.sleep(max(0.0, began + at - loop.time()))
            for who in backends:
                group.create_task(one(who, began + at))
            if on_progress is not None:
                on_progress("outage", number, len(moments))
    return sorted(asked, key=lambda a: (a.at_s, a.who))


def _moments(rng: random.Random, rate: float, seconds: float) -> list[float]:
    moments, at = [], rng.expovariate(rate)
    while at < seconds:
        moments.append(at)
        at += rng.expovariate(rate)
    return moments


def shares(asked: Sequence[Asked], who: str) -> dict[str, float]:
    """Of one asker: share answered, p99 of the answers that came in seconds, upstream calls a question."""
    mine = [a for a in asked if a.who == who]
    well = sorted(a.total_s for a in mine if a.outcome == Outcome.OK.value)
    return {
        "questions": len(mine),
        "answered": len(well) / max(1, len(mine)),
        "p99_s_of_answers": well[min(len(well) - 1, int(0.99 * len(well)))] if well else float("nan"),
        "calls_per_question": sum(a.calls for a in mine) / max(1, len(mine)),
    }
