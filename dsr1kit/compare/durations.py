"""How long a comparison lasts: from an earlier run's latency, or at least as long as known limits make it.

Hosted channels are asked together, local models after them, one request at a time; so they are added up here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """One channel's part of a run.

    Attributes:
        local: asked after the others, one request at a time.
        requests: how many.
        tokens: expected over all of them, prompts included; None: unknown.
        each_s: mean seconds of a request; None: unknown.
        requests_per_minute, tokens_per_minute, max_in_flight: the channel's known limits.
    """

    channel: str
    local: bool
    requests: int
    tokens: float | None = None
    each_s: float | None = None
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    max_in_flight: int | None = None

    def floor_s(self) -> float | None:
        """Seconds that its limits make it last at least; None where no limit is known."""
        floors = []
        if self.requests_per_minute is not None:
            floors.append(self._begun_s(self.requests, self.requests_per_minute))
        if self.tokens_per_minute is not None and self.tokens is not None:
            floors.append(self._begun_s(self.tokens, self.tokens_per_minute))
        if self.max_in_flight is not None and self.each_s is not None:
            floors.append(self.requests * self.each_s / self.max_in_flight)
        return max(floors, default=None)

    @staticmethod
    def _begun_s(amount: float, per_minute: float) -> float:
        # A minute's allowance is there at the start; the rest comes at the rate.
        return max(0.0, amount - per_minute) * 60.0 / per_minute


@dataclass(frozen=True, slots=True, kw_only=True)
class Duration:
    """Seconds of a run, or of its hosted part.

    Attributes:
        expected: None where some latency is unknown.
        least: what is certain: known limits, a rate, local models whose speed is known; None: nothing is.
    """

    expected: float | None
    least: float | None


def hosted_duration(loads: Sequence[Load], concurrency: int, rate: float | None) -> Duration:
    """How long all hosted channels together take: closed loop at a concurrency, or open loop at a rate."""
    hosted = [load for load in loads if not load.local]
    if not hosted:
        return Duration(expected=0.0, least=0.0)
    floors = [floor for load in hosted if (floor := load.floor_s()) is not None]
    asked = sum(load.requests for load in hosted)
    last = [load.each_s for load in hosted]
    if rate is not None:
        floors.append(asked / rate)
        expected = max(floors) + max(s for s in last if s is not None) if None not in last else max(floors)
        return Duration(expected=expected, least=max(floors))
    least = max(floors, default=None)
    if None in last:
        return Duration(expected=None, least=least)
    busy = math.fsum(load.requests * (load.each_s or 0.0) for load in hosted) / min(concurrency, asked)
    return Duration(expected=max([busy, *floors]), least=least)


def whole_duration(loads: Sequence[Load], concurrency: int, rate: float | None) -> Duration:
    """How long the run takes, local models after the hosted channels included."""
    hosted = hosted_duration(loads, concurrency, rate)
    parts = [hosted.expected, *(_alone_s(load) for load in loads if load.local)]
    known = [part for part in (hosted.least if hosted.expected is None else hosted.expected, *parts[1:]) if part]
    return Duration(
        expected=None if None in parts else math.fsum(part or 0.0 for part in parts),
        least=math.fsum(known) if known else None,
    )


def _alone_s(load: Load) -> float | None:
    return None if load.each_s is None else load.requests * load.each_s
