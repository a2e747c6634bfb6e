"""The channels of a router: what is remembered about each, which constraints they meet, whose turn it is.

Knows nothing about requests under way beyond how many there are.
"""

from __future__ import annotations

import datetime as dt
import math
import random
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dsr1kit.access.channels import Channel
from dsr1kit.access.circuit import Circuit, CircuitSettings, FirstTokens
from dsr1kit.access.prices import Price
from dsr1kit.errors import UsageError
from dsr1kit.records import Backend

_EXPLORE = 0.03  # share of requests that go to another than the best of equals, to keep its measure fresh
_LEAST_HEALTH = 0.03  # below it all channels are equally ill
_MEMORY = 0.9  # how much of a channel's health is the past's


@dataclass(eq=False)
class Member:
    """One channel of a router.

    Attributes:
        asker: the open Backend, while the router is open.
        health: share of its calls that were answered, the latest weighing most.
        turn: its standing in the weighted turns.
        mean_cost: of its answers, in its own currency; None: none was priced yet.
    """

    name: str
    backend: Backend | Channel
    weight: float
    backup: bool
    price: Price | None
    circuit: Circuit
    first_tokens: FirstTokens = field(default_factory=FirstTokens)
    in_flight: int = 0
    health: float = 1.0
    turn: float = 0.0
    mean_cost: float | None = None
    asker: Any = None
    said_emulated: bool = False

    def answered(self, well: bool) -> None:
        """A call ended, answered or by the channel's fault."""
        self.health = _MEMORY * self.health + (1 - _MEMORY) * well

    def paid(self, cost: float) -> None:
        """An answer's cost."""
        self.mean_cost = cost if self.mean_cost is None else 0.9 * self.mean_cost + 0.1 * cost

    @property
    def emulated(self) -> bool:
        """Whether the kit's own emulator serves it."""
        channel = channel_of(self.backend)
        return self.said_emulated or (channel is not None and channel.emulated)


class Members:
    """All channels of a router, after its constraints; see `Router` for the arguments.

    Raises:
        UsageError: nothing left by the constraints, all weights zero, names that are not there.
    """

    def __init__(
        self,
        backends: Sequence[Channel | Backend],
        *,
        weights: Mapping[str, float],
        backups: Collection[str] | None,
        regions: Collection[str],
        max_price: float | None,
        currency: str,
        circuits: CircuitSettings,
        rng: random.Random,
        now: Callable[[], dt.datetime],
    ) -> None:
        if isinstance(backends, str | Channel) or hasattr(backends, "ask"):
            raise UsageError("a router takes a list of Channels or open Backends: Router([a, b])")
        if not backends:
            raise UsageError("a router needs at least one backend")
        for backend in backends:
            if not isinstance(backend, Channel) and not hasattr(backend, "ask"):
                raise UsageError(f"{backend!r:.60} is neither a Channel nor a Backend: load_channels()[name] gives one")
        for setting, names in (("regions", regions), ("backups", backups)):
            if isinstance(names, str):  # of which each letter would count
                raise UsageError(f"{setting} must be a list of names, such as [{names!r}]")
        self._max_price, self._currency = max_price, currency
        self._rng, self._now = rng, now
        self._first = 0
        within = [b for b in backends if not regions or region_of(b) in regions]
        if not within:
            known = ", ".join(sorted({region_of(b) or "(none)" for b in backends}))
            raise UsageError(f"regions={sorted(regions)} leaves no channel; there are: {known}")
        self.all = [self._member(b, weights, backups, circuits) for b in within]
        self._check([b.name for b in backends], weights, backups or ())

    def _member(
        self,
        backend: Channel | Backend,
        weights: Mapping[str, float],
        backups: Collection[str] | None,
        circuits: CircuitSettings,
    ) -> Member:
        channel = channel_of(backend)
        weight = weights.get(backend.name, channel.weight if channel else 1.0)
        if not isinstance(weight, int | float) or not weight >= 0 or math.isinf(weight):
            raise UsageError(f"weight of {backend.name} must be at least 0, not {weight!r}")
        backup = backend.name in backups if backups is not None else bool(channel and channel.backup)
        price = channel.price if channel else Price(0.0, 0.0)
        return Member(backend.name, backend, weight, backup, price, Circuit(circuits, self._rng))

    def _check(self, given: Sequence[str], weights: Mapping[str, float], backups: Collection[str]) -> None:
        twice = {n for n in given if given.count(n) > 1}
        if twice:
            raise UsageError(f"backend {min(twice)!r} is given twice")
        for setting, names in (("weights", weights), ("backups", backups)):
            strange = [n for n in names if n not in given]
            if strange:
                raise UsageError(f"{setting} names {strange[0]!r}, which is not among {', '.join(given)}")
        if not any(m.weight for m in self.all):
            raise UsageError("weight is 0 for every channel that is left: nothing could be asked")
        if self._max_price is not None and not any(self.affordable(m) for m in self.all):
            raise UsageError(f"max_price={self._max_price:g} {self._currency} leaves no channel now")

    def any_ready(self, now: float) -> bool:
        """Whether there is one that may be asked at the time `now`."""
        return any(m.circuit.ready(now) for m in self.usable())

    def usable(self) -> list[Member]:
        """Those that may be asked at all, whatever their circuits say."""
        return [m for m in self.all if m.weight and self.affordable(m)]

    def affordable(self, member: Member) -> bool:
        """Whether its price keeps within the limit at this moment."""
        if self._max_price is None:
            return True
        if member.price is None or (member.price.currency != self._currency and not member.price.free):
            return False
        return member.price.at(self._now()).output <= self._max_price

    def pick(self, tried: Collection[str], now: float, *, or_open: bool = False) -> Member | None:
        """The next channel: primaries before backups, by weight, and among equals the best; None: none is open.

        Args:
            tried: names that are not wanted again.
            now: the time that circuits are read at.
            or_open: rather an open circuit than none, unless it is sure to fail.
        """
        for ready in (True, False) if or_open else (True,):
            for backup in (False, True):
                tier = [
                    m
                    for m in self.all
                    if m.backup is backup
                    and m.weight
                    and m.name not in tried
                    and (m.circuit.ready(now) if ready else m.circuit.state == "open" and not m.circuit.sure)
                    and self.affordable(m)
                ]
                if tier:
                    return tier[0] if len(tier) == 1 else self._choose(tier)
        return None

    def _choose(self, tier: Sequence[Member]) -> Member:
        """Among weights by smooth weighted turns; among equals by load, speed and health."""
        group: Sequence[Member] = tier
        if any(m.weight != tier[0].weight for m in tier):
            groups: dict[float, list[Member]] = {}
            for member in tier:
                groups.setdefault(member.weight, []).append(member)
            total = 0.0
            for members in groups.values():
                # Never nothing: what is not asked would not be found well again.
                share = sum(m.weight * max(_LEAST_HEALTH, m.health) for m in members)
                members[0].turn += share
                total += share
            group = max(groups.values(), key=lambda members: members[0].turn)
            group[0].turn -= total
            if len(group) == 1:
                return group[0]
        if self._rng.random() < _EXPLORE:
            return self._rng.choice(group)
        neutral = min((m.first_tokens.median for m in group if len(m.first_tokens)), default=1.0)
        self._first = (self._first + 1) % len(group)  # so that equals take turns
        best, least = group[0], math.inf
        for number in range(len(group)):
            member = group[(number + self._first) % len(group)]
            burden = _burden(member, neutral)
            if burden < least:
                best, least = member, burden
        return best


def _burden(member: Member, neutral: float) -> float:
    """Load times speed; failing fast makes no channel attractive: only successes are timed, failures weigh."""
    speed = member.first_tokens.median if len(member.first_tokens) else neutral
    # A millisecond is what measuring is good for: below it channels are equals.
    return (member.in_flight + 1) * (speed + 0.001) / max(_LEAST_HEALTH, member.health) ** 4


def channel_of(backend: Channel | Backend) -> Channel | None:
    """The catalogue entry behind a backend, where there is one."""
    channel = backend if isinstance(backend, Channel) else getattr(backend, "channel", None)
    return channel if isinstance(channel, Channel) else None


def region_of(backend: Channel | Backend) -> str:
    """Where the backend computes; what has no channel runs here."""
    channel = channel_of(backend)
    return channel.region if channel else "local"
