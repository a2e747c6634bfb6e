"""Time that jumps: an event loop without waiting, and providers without sockets for it.

What runs on a VirtualLoop is the very code that runs elsewhere; only its clock shows what the next timer says.
A VirtualChannel is a Backend that behaves as a provider does through days and outages, drawn from a seed.
"""

from __future__ import annotations

import asyncio
import math
import random
import selectors
from bisect import bisect_right
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from dsr1kit.access import outcomes
from dsr1kit.access.channels import Channel
from dsr1kit.access.quota import Quota
from dsr1kit.hours import Spans
from dsr1kit.records import R1_SAMPLING, Delta, Message, OnDelta, Outcome, Reply, Sampling, Timing, Usage

Trouble = Literal["busy", "queued", "silent"]
_DAY_S = 86400.0


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock jumps to the next timer instead of waiting for it.

    For code that waits on timers and tasks alone: what waits for a socket or a thread would wait for ever, and is
    told so by a RuntimeError. Use it with `asyncio.Runner(loop_factory=VirtualLoop)`.
    """

    def __init__(self) -> None:
        super().__init__(_Jumping(self))
        self._virtual = 0.0

    def time(self) -> float:
        """Seconds since the loop began, as its timers have it."""
        return self._virtual

    def jump(self, seconds: float) -> None:
        """Let `seconds` have passed."""
        self._virtual += seconds


class _Jumping(selectors.SelectSelector):
    """Never waits: where asyncio would, the loop's clock moves on."""

    def __init__(self, loop: VirtualLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise RuntimeError("nothing is left that a virtual clock could jump to: a task waits for ever")
        if timeout > 0:
            self._loop.jump(timeout)
        return []


@dataclass(frozen=True, slots=True)
class Outage:
    """Seconds from `begin` to `end` in which a provider is in trouble of one kind."""

    begin: float
    end: float
    kind: Trouble


@dataclass(frozen=True, slots=True, kw_only=True)
class Climate:
    """How a provider behaves over a month.

    Attributes:
        first_token_s, answer_s: medians of the wait for the first token and of the rest, in seconds.
        spread: sigma of the log-normal around them.
        peak_hours, peak_factor: hours of the day in which both take so many times as long.
        busy_share: of requests that are told 503 at any time.
        requests_per_minute: beyond them, 429 with Retry-After; None: no limit.
        outage_hours: in a month, in all; drawn as a few outages of different kinds and lengths.
    """

    first_token_s: float = 2.0
    answer_s: float = 6.0
    spread: float = 0.35
    peak_hours: Spans = ((10.0, 12.0), (15.0, 17.0))
    peak_factor: float = 3.2
    busy_share: float = 0.01
    requests_per_minute: float | None = 60.0
    outage_hours: float = 0.0


def draw_outages(rng: random.Random, hours: float, length_s: float, count: int = 8) -> list[Outage]:
    """Outages that add up to `hours` within `length_s` seconds: some long, most short, of all kinds."""
    if hours <= 0:
        return []
    parts = [rng.expovariate(1.0) ** 1.5 for _ in range(count)]
    scale = hours * 3600.0 / sum(parts)
    kinds: tuple[Trouble, ...] = ("busy", "queued", "silent")
    free = length_s - hours * 3600.0
    # Cut the time that is left at random points and put an outage into each cut: they never overlap.
    cuts = sorted(rng.uniform(0, free) for _ in range(count))
    outages, passed = [], 0.0
    for number, (cut, part) in enumerate(zip(cuts, parts, strict=True)):
        begin = cut + passed
        outages.append(Outage(begin, begin + part * scale, kinds[number % 3] if number < 3 else rng.choice(kinds)))
        passed += part * scale
    return outages


@dataclass(eq=False)
class VirtualChannel:
    """A Backend on virtual time; see `Climate` for how it behaves.

    Args:
        channel: its weight, price, region; always told as emulated.
        outages: when it is in which trouble.
        rng: of its latencies and its odd 503.
        queued_s, silent_s: when the asker gives up on keep-alives, and on silence, before the first token; what has
            no first-token clock is kept for as long as the provider keeps alive, ten minutes.
    """

    channel: Channel
    climate: Climate
    outages: Sequence[Outage]
    rng: random.Random
    queued_s: float = 30.0
    silent_s: float = 30.0
    name: str = field(init=False)
    asked: int = 0
    _recent: deque[float] = field(default_factory=deque)

    def __post_init__(self) -> None:
        self.name = self.channel.name
        self._begins = [outage.begin for outage in self.outages]

    def trouble(self, now: float) -> Outage | None:
        """The outage at the moment `now`, if there is one."""
        index = bisect_right(self._begins, now) - 1
        return self.outages[index] if index >= 0 and now < self.outages[index].end else None

    def slowdown(self, now: float) -> float:
        """Factor on latencies at the moment `now`; the day begins at 0."""
        hour = now % _DAY_S / 3600.0
        climate = self.climate
        return climate.peak_factor if any(low <= hour < high for low, high in climate.peak_hours) else 1.0

    async def ask(
        self,
        messages: Sequence[Message],
        sampling: Sampling = R1_SAMPLING,
        *,
        on_delta: OnDelta | None = None,
        due: float | None = None,
    ) -> Reply:
        """Ask once; see `Backend.ask`."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        due = now if due is None else due
        self.asked += 1
        climate, rng = self.climate, self.rng
        outage = self.trouble(now)
        if outage is not None and outage.kind != "busy":
            queued = outage.kind == "queued"
            await asyncio.sleep(self.queued_s if queued else self.silent_s)
            return self._reply(Outcome.QUEUED if queued else Outcome.STALLED, due, loop.time())
        if (wait_s := self._over(now)) is not None:
            await asyncio.sleep(0.05)
            return self._reply(Outcome.THROTTLED, due, loop.time(), extra={"quota": Quota(retry_after_s=wait_s)})
        if outage is not None or rng.random() < climate.busy_share:
            await asyncio.sleep(0.05)
            return self._reply(Outcome.OVERLOADED, due, loop.time())
        factor = self.slowdown(now)
        first_s = climate.first_token_s * factor * math.exp(rng.gauss(0.0, climate.spread))
        rest_s = climate.answer_s * factor * math.exp(rng.gauss(0.0, climate.spread))
        if first_s > self.queued_s:
            await asyncio.sleep(self.queued_s)
            return self._reply(Outcome.QUEUED, due, loop.time())
        await asyncio.sleep(first_s)
        first_at = loop.time()
        if on_delta is not None:
            on_delta(Delta("reasoning", "...", first_at - due))
        await asyncio.sleep(rest_s)
        return self._reply(Outcome.OK, due, loop.time(), first_at=first_at)

    def _over(self, now: float) -> float | None:
        limit = self.climate.requests_per_minute
        if limit is None:
            return None
        while self._recent and self._recent[0] <= now - 60.0:
            self._recent.popleft()
        if len(self._recent) >= limit:
            return max(0.5, self._recent[0] + 60.0 - now)
        self._recent.append(now)
        return None

    def _reply(
        self,
        outcome: Outcome,
        due: float,
        now: float,
        *,
        first_at: float | None = None,
        extra: dict[str, Any] | None = None,
    ) -> Reply:
        ok = outcome is Outcome.OK
        return Reply(
            outcome,
            "" if ok else outcomes.detail(outcome),
            reasoning="..." if ok else "",
            answer="42" if ok else "",
            channel=self.name,
            model_requested=self.channel.model,
            model_served=self.channel.model,
            timing=Timing(first_token_s=None if first_at is None else first_at - due, total_s=now - due),
            usage=Usage(20, 600, 100, "provider", "provider") if ok else Usage(),
            emulated=True,
            extra=extra or {},
        )
