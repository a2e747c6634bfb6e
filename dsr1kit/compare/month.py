"""A month in a minute: several policies against the same emulated providers, on a virtual clock.

The article's claims put to the test: 99.9 % availability, downtime from 12.7 to 0.3 hours a month, 3.8 times the
throughput, by spreading load over three weighted channels and two backups with retries. The full policy is the
kit's own Router, the code that runs over real HTTP. All policies meet the same outages, limits and arrivals.
Everything here is emulated, and says so.
"""

from __future__ import annotations

import asyncio
import math
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from typing import Any, Protocol

from dsr1kit.access.channels import Channel
from dsr1kit.access.prices import Price
from dsr1kit.access.quota import Quota
from dsr1kit.access.router import Router
from dsr1kit.emulator.virtual import Climate, VirtualChannel, VirtualLoop, draw_outages
from dsr1kit.errors import UsageError
from dsr1kit.records import ANSWERED, Message, Outcome, Reply

MONTH_S = 30 * 86400.0
MONTH_HOURS = MONTH_S / 3600.0
_MESSAGES: list[Message] = [{"role": "user", "content": "What is 12 + 30?"}]

#: The article's layout: three weighted channels and two backups. Prices are those of places in the catalogue.
CHANNELS = (
    ("official", 5.0, False, Price(0.55, 2.19), Climate(outage_hours=12.7)),
    ("cloud-a", 3.0, False, Price(0.5, 2.15), Climate(first_token_s=2.5, outage_hours=6.0)),
    ("cloud-b", 2.0, False, Price(0.7, 2.5), Climate(first_token_s=2.5, outage_hours=6.0)),
    ("backup-a", 1.0, True, Price(1.35, 5.4), Climate(first_token_s=3.0, outage_hours=3.0)),
    ("backup-b", 1.0, True, Price(3.0, 7.0), Climate(first_token_s=3.0, outage_hours=3.0)),
)


class Policy(Protocol):
    """A way of asking that is put to the test."""

    async def ask(self, messages: Sequence[Message]) -> Reply:
        """Ask once."""
        ...


@dataclass(frozen=True, slots=True)
class Played:
    """What became of one policy in one month.

    Attributes:
        calls: upstream calls made for all requests together.
        total_s: of the requests that were answered, in seconds.
        cost: of all answers, in USD.
    """

    requests: int
    answered: int
    calls: int
    total_s: tuple[float, ...]
    cost: float

    @property
    def share(self) -> float:
        """Share of requests that were answered."""
        return self.answered / max(1, self.requests)


class Single:
    """One channel alone, asked once."""

    def __init__(self, channels: Sequence[VirtualChannel], rng: random.Random) -> None:
        self._channel = channels[0]

    async def ask(self, messages: Sequence[Message]) -> Reply:
        """Ask once, come what may."""
        return await self._channel.ask(messages)


class Retries:
    """One channel with the retries of OpenAI's SDK: two, after 0.5 to 8 s, or what Retry-After says up to 60 s."""

    def __init__(self, channels: Sequence[VirtualChannel], rng: random.Random) -> None:
        self._channel, self._rng = channels[0], rng

    async def ask(self, messages: Sequence[Message]) -> Reply:
        """Ask up to three times."""
        for attempt in range(3):
            reply = await self._channel.ask(messages)
            if reply.outcome in ANSWERED or attempt == 2:
                break
            quota = reply.extra.get("quota")
            told = quota.retry_after_s if isinstance(quota, Quota) else None
            wait_s = (
                told if told is not None and told <= 60 else min(8.0, 0.5 * 2**attempt) * self._rng.uniform(0.75, 1)
            )
            await asyncio.sleep(wait_s)
        return reply


class Weights:
    """nginx's way: smooth weighted turns, three tries on other servers, out for 10 s after three failures in 10 s."""

    def __init__(self, channels: Sequence[VirtualChannel], rng: random.Random) -> None:
        self._servers = [_Server(c) for c in channels]

    async def ask(self, messages: Sequence[Message]) -> Reply:
        """Ask up to three servers."""
        tried: list[_Server] = []
        reply: Reply | None = None
        for _ in range(3):
            server = self._next(tried)
            if server is None:
                break
            tried.append(server)
            reply = await server.channel.ask(messages)
            if reply.outcome in ANSWERED:
                break
            server.fail(asyncio.get_running_loop().time())
        return reply or Reply(Outcome.OVERLOADED, "no live upstreams", emulated=True)

    def _next(self, tried: Sequence[_Server]) -> _Server | None:
        now = asyncio.get_running_loop().time()
        for backup in (False, True):
            up = [s for s in self._servers if s.backup is backup and s not in tried and s.out_until <= now]
            if up:
                for server in up:
                    server.turn += server.weight
                best = max(up, key=lambda s: s.turn)
                best.turn -= sum(s.weight for s in up)
                return best
        return None


class _Server:
    def __init__(self, channel: VirtualChannel) -> None:
        self.channel, self.weight, self.backup = channel, channel.channel.weight, channel.channel.backup
        self.turn = self.out_until = 0.0
        self._failures: list[float] = []

    def fail(self, now: float) -> None:
        self._failures = [at for at in self._failures if at > now - 10.0] + [now]
        if len(self._failures) >= 3:
            self.out_until, self._failures = now + 10.0, []


class Routed:
    """The kit's own Router over all five."""

    def __init__(self, channels: Sequence[VirtualChannel], rng: random.Random, *, deadline_s: float) -> None:
        self.router = Router(channels, deadline_s=deadline_s, rng=rng)

    async def ask(self, messages: Sequence[Message]) -> Reply:
        """Ask until one answers or the deadline passes."""
        return await self.router.ask(messages)


#: Policies by name, in the order of reports; each is made anew for each month.
POLICIES: dict[str, Callable[..., Any]] = {
    "one channel": Single,
    "openai-style retries": Retries,
    "nginx-style weights": Weights,
    "router": Routed,
}

#: Seconds after which a policy gives up on keep-alives and on silence before the first token, where they are not
#: the router's clock: the read time-outs of OpenAI's SDK (600 s) and of nginx (60 s) start anew with each
#: keep-alive, and the provider closes a queued request after ten minutes.
PATIENCE = {"one channel": (600.0, 600.0), "openai-style retries": (600.0, 600.0), "nginx-style weights": (600.0, 60.0)}


@dataclass(frozen=True, slots=True, kw_only=True)
class MonthSettings:
    """What is rehearsed.

    Attributes:
        requests: for each policy, over all seeds together.
        seeds: months; intervals are taken over them.
        deadline_s: a request counts as answered only within it.
        first_token_s: the router's longest wait for a first token; the other policies have none (see PATIENCE).
    """

    requests: int = 100_000
    seeds: int = 5
    deadline_s: float = 120.0
    first_token_s: float = 30.0

    def __post_init__(self) -> None:
        if self.seeds < 2:
            raise UsageError(f"seeds must be at least 2 for an interval, not {self.seeds}")
        if self.requests < 100 * self.seeds:
            raise UsageError(f"requests must be at least 100 a seed, not {self.requests} for {self.seeds}")
        for name in ("deadline_s", "first_token_s"):
            if not getattr(self, name) > 0:
                raise UsageError(f"{name} must be above 0 seconds, not {getattr(self, name)}")


def providers(
    seed: int, *, queued_s: float, silent_s: float, length_s: float = MONTH_S, outages: bool = True
) -> list[VirtualChannel]:
    """The five providers of one month, the same for the same seed; see VirtualChannel for the limits in seconds."""
    made = []
    for name, weight, backup, price, climate in CHANNELS:
        channel = Channel(
            name=name, base_urls=("http://virtual.invalid/v1",), model="deepseek-r1", family="r1", weight=weight,
            backup=backup, price=price, emulated=True,
        )  # fmt: skip
        hours = climate.outage_hours if outages else 0.0
        drawn = draw_outages(random.Random(f"{seed}/{name}/outages"), hours, length_s)
        made.append(VirtualChannel(channel, climate, drawn, random.Random(f"{seed}/{name}"), queued_s, silent_s))
    return made


def play(
    policy: str,
    seed: int,
    requests: int,
    settings: MonthSettings,
    *,
    length_s: float = MONTH_S,
    outages: bool = True,
) -> Played:
    """One policy through one month (or `length_s` seconds) of one seed, on a virtual clock."""

    def run() -> Played:
        with asyncio.Runner(loop_factory=VirtualLoop) as runner:
            return runner.run(_play(policy, seed, requests, settings, length_s, outages))

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return run()
    with ThreadPoolExecutor(1) as other:  # a notebook's own loop runs in this thread
        return other.submit(run).result()


async def _play(
    policy: str, seed: int, requests: int, settings: MonthSettings, length_s: float, outages: bool
) -> Played:
    queued_s, silent_s = PATIENCE.get(policy, (settings.first_token_s, settings.first_token_s))
    channels = providers(seed, queued_s=queued_s, silent_s=silent_s, length_s=length_s, outages=outages)
    rng = random.Random(f"{seed}/policy")
    made = POLICIES[policy]
    asker = made(channels, rng, deadline_s=settings.deadline_s) if made is Routed else made(channels, rng)
    loop = asyncio.get_running_loop()
    totals: list[float] = []
    cost = 0.0
    tasks: set[asyncio.Task[None]] = set()
    prices = {c.name: c.channel.price for c in channels}

    async def one() -> None:
        nonlocal cost
        began = loop.time()
        reply = await asker.ask(_MESSAGES)
        took = loop.time() - began
        if reply.outcome in ANSWERED and took <= settings.deadline_s:
            totals.append(took)
            price = prices.get(reply.channel)
            cost += (price.cost(reply.usage) or 0.0) if price else 0.0

    async with AsyncExitStack() as stack:
        if isinstance(asker, Routed):
            await stack.enter_async_context(asker.router)
        arrivals = random.Random(f"{seed}/arrivals")
        for _ in range(requests):
            await asyncio.sleep(arrivals.expovariate(requests / length_s))
            task = asyncio.create_task(one())
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        while tasks:
            await asyncio.wait(tasks)
    return Played(requests, len(totals), sum(c.asked for c in channels), tuple(totals), cost)


def rehearse_month(
    settings: MonthSettings, on_progress: Callable[[str, int, int], None] | None = None
) -> dict[str, dict[str, Any]]:
    """All policies through all months; what `summarize_month` makes of them, by policy."""
    each = settings.requests // settings.seeds
    out = {}
    for name in POLICIES:
        months = []
        for seed in range(settings.seeds):
            months.append(play(name, seed, each, settings))
            if on_progress is not None:
                on_progress(name, seed + 1, settings.seeds)
        out[name] = summarize_month(months)
    for name in POLICIES:
        rates = [throughput(name, settings, seed=seed) for seed in range(settings.seeds)]
        out[name]["throughput_per_minute"] = _over(rates, 0.0)
        out[name]["emulated"] = True
        if on_progress is not None:
            on_progress("throughput", list(POLICIES).index(name) + 1, len(POLICIES))
    return out


def summarize_month(months: Sequence[Played]) -> dict[str, Any]:
    """One policy's months: values with 95 % intervals over the months (Student's t)."""
    requests = sum(m.requests for m in months)
    availability = _over([m.share for m in months], 0.0, 1.0)
    if all(m.share == 1.0 for m in months):  # no failure among n: by the rule of three, at most 3 / n are expected
        availability["low"] = 1.0 - 3.0 / requests
    return {
        "requests": requests,
        "availability": availability,
        "hours_down": {
            "value": (1 - availability["value"]) * MONTH_HOURS,
            "low": (1 - availability["high"]) * MONTH_HOURS,
            "high": (1 - availability["low"]) * MONTH_HOURS,
        },
        "total_s_p50": _over([_percentile(m.total_s, 0.5) for m in months], 0.0),
        "total_s_p99": _over([_percentile(m.total_s, 0.99) for m in months], 0.0),
        "amplification": _over([m.calls / m.requests for m in months], 0.0),
        "cost_per_1000": _over([1000 * m.cost / max(1, m.answered) for m in months], 0.0),
    }


def _percentile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else math.nan


def _over(values: Sequence[float], low: float = -math.inf, high: float = math.inf) -> dict[str, float]:
    from scipy import stats

    mean = statistics.fmean(values)
    half = float(stats.t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
    return {"value": mean, "low": max(low, mean - half), "high": min(high, mean + half)}


def throughput(
    policy: str, settings: MonthSettings, *, seed: int = 0, wanted: float = 0.98, minutes: float = 10.0
) -> float:
    """Requests a minute that a policy carries with at least `wanted` of them answered, without outages.

    The default is what one channel alone can reach, which tells one request in a hundred that it is busy.
    Found by bisection over the rate, each tried for `minutes` of virtual time at night.
    """
    low, high = 5.0, 800.0
    calm = replace(settings, deadline_s=60.0)
    for _ in range(7):
        rate = math.sqrt(low * high)
        played = play(policy, seed, int(rate * minutes), calm, length_s=60.0 * minutes, outages=False)
        low, high = (rate, high) if played.share >= wanted else (low, rate)
    return math.sqrt(low * high)


def claims(summary: Mapping[str, Mapping[str, Any]]) -> list[dict[str, str]]:
    """The article's claims beside what was measured, as rows; all of it on emulated providers."""
    one, router = summary["one channel"], summary["router"]
    more, alone_carries = router["throughput_per_minute"], one["throughput_per_minute"]
    # The widest that both intervals allow.
    bounds = (("value", "value"), ("low", "high"), ("high", "low"))
    ratio, least, most = (more[a] / max(1e-9, alone_carries[b]) for a, b in bounds)
    share, down, alone = router["availability"], router["hours_down"], one["hours_down"]
    return [
        {
            "claim": "availability 99.9 %",
            "measured": f"emulated: {share['value']:.3%} ({share['low']:.3%} to {share['high']:.3%})",
            "holds": _holds(share["low"] >= 0.999, share["high"] < 0.999),
        },
        {
            "claim": "downtime of 0.3 hours a month, from 12.7",
            "measured": f"emulated: {down['value']:.2f} ({down['low']:.2f} to {down['high']:.2f}), "
            f"from {alone['value']:.1f} ({alone['low']:.1f} to {alone['high']:.1f})",
            "holds": _holds(down["high"] <= 0.3, down["low"] > 0.3),
        },
        {
            "claim": "3.8 times the throughput",
            "measured": f"emulated: {ratio:.1f} times ({least:.1f} to {most:.1f}), both with 98 % answered",
            "holds": _holds(least >= 3.8, most < 3.8),
        },
    ]


def _holds(yes: bool, no: bool) -> str:
    return "yes" if yes else "no" if no else "not settled"
