"""A Backend over Backends that stays up when one of them is busy: tiers, weights, circuits, hedges, one deadline.

Every request has one deadline and all requests share one retry budget, over retries, fallbacks and hedges
together. Reasoning is disposable: a stream that breaks before its first answer token is asked elsewhere, and
nobody sees it. Knows nothing about HTTP or caching; what answers is a Backend, whatever it is made of.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import math
import random
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from types import SimpleNamespace, TracebackType
from typing import Self

from tenacity import wait_exponential

from dsr1kit.access import outcomes
from dsr1kit.access.channels import Channel
from dsr1kit.access.circuit import LASTING, CircuitSettings, RetryBudget
from dsr1kit.access.members import Members, channel_of
from dsr1kit.access.metrics import Metrics
from dsr1kit.access.race import NOT_THE_CHANNELS, Hedging, Racer, Request
from dsr1kit.errors import UsageError
from dsr1kit.records import (
    ANSWERED,
    R1_SAMPLING,
    Backend,
    Message,
    OnDelta,
    Outcome,
    Reply,
    Sampling,
    Timing,
)

_MOST_ROUNDS = 4  # over the same channels, for one request
_HEDGING = Hedging()


class Router:
    """Several ways to R1 as one: `async with Router([channels["a"], channels["b"]], deadline_s=30) as r1`.

    Args:
        backends: Channels, which the router opens and closes, or open Backends.
        deadline_s: for a request as a whole, all its calls and waits included; seconds.
        first_token_s, stall_s: longest wait for a token, and longest silence between two, of Channels that the
            router opens; seconds.
        restart_answers: ask again whole when an answer breaks off; else the part is returned as `cut`.
        weights, backups: by name, in the place of what the channels say.
        regions: only channels of these regions (data residency); empty: all.
        max_price: only channels whose output costs at most this per million tokens, in `currency`, at the moment
            of asking; a channel whose price is unknown, or in another currency, is left out then.
        hedging: None: no hedges.
        budget, circuits: of retries, and of each channel.
        rng, clock, now: randomness, `loop.time`, and the wall clock that tariffs are read by.

    Raises:
        UsageError: nothing left by the constraints, all weights zero, a limit that cannot be meant.
    """

    def __init__(
        self,
        backends: Sequence[Channel | Backend],
        *,
        deadline_s: float = 120.0,
        first_token_s: float = 30.0,
        stall_s: float = 30.0,
        restart_answers: bool = False,
        weights: Mapping[str, float] | None = None,
        backups: Collection[str] | None = None,
        regions: Collection[str] = (),
        max_price: float | None = None,
        currency: str = "USD",
        hedging: Hedging | None = _HEDGING,
        budget: RetryBudget | None = None,
        circuits: CircuitSettings | None = None,
        name: str = "router",
        rng: random.Random | None = None,
        clock: Callable[[], float] | None = None,
        now: Callable[[], dt.datetime] | None = None,
    ) -> None:
        for limit, value in (("deadline_s", deadline_s), ("first_token_s", first_token_s), ("stall_s", stall_s)):
            if not isinstance(value, int | float) or not value > 0:
                raise UsageError(f"{limit} must be above 0 seconds, not {value!r}")
        self.name = name
        self.metrics = Metrics()
        self._deadline_s, self._restart = deadline_s, restart_answers
        self._clocks = {"first_token_s": first_token_s, "stall_s": stall_s}
        self._budget = budget or RetryBudget()
        self._rng = rng or random.Random()
        self._clock, self._now = clock, now or (lambda: dt.datetime.now(dt.UTC))
        self._members = Members(
            backends,
            weights=weights or {},
            backups=backups,
            regions=regions,
            max_price=max_price,
            currency=currency,
            circuits=circuits or CircuitSettings(),
            rng=self._rng,
            now=self._now,
        )
        self._racer = Racer(
            self._members,
            hedging,
            self._budget,
            self.metrics,
            deadline_s=deadline_s,
            clock=self._time,
            now=self._now,
            changed=self._tell_changed,
        )
        self.metrics.circuits = self.circuits
        self._waits = wait_exponential(multiplier=0.05, max=2.0)
        self._stack: AsyncExitStack | None = None
        self._changed: dict[asyncio.Future[None], None] = {}  # in the order in which they came

    async def __aenter__(self) -> Self:
        if self._stack is not None:
            raise UsageError(f"the router {self.name!r} is open already")
        async with AsyncExitStack() as stack:
            for member in self._members.all:
                if isinstance(member.backend, Channel):
                    member.asker = await stack.enter_async_context(member.backend.open(**self._clocks))
                else:
                    member.asker = member.backend
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        stack, self._stack = self._stack, None
        if stack is not None:
            await stack.aclose()

    # One request.
    async def ask(
        self,
        messages: Sequence[Message],
        sampling: Sampling = R1_SAMPLING,
        *,
        on_delta: OnDelta | None = None,
        due: float | None = None,
    ) -> Reply:
        """Ask until one answers, the deadline passes, or nothing is left to try; see `Backend.ask`.

        A Delta's `attempt` counts the calls whose text was shown before: what came under a lower number is void.
        """
        if self._stack is None:
            raise UsageError("the router is not open: use `async with Router(...) as r1:`")
        began = self._time()
        due = began if due is None else due
        request = Request(messages, sampling, on_delta, due, due + self._deadline_s)
        self._racer.began()
        self.metrics.began(began)
        reply: Reply | None = None
        try:
            reply = await self._answer(request)
        finally:
            if request.unused:
                self._budget.untake(request.unused)
            self.metrics.ended(self._time(), reply, request.calls, request.hedges, request.hedge_won)
        return reply

    async def _answer(self, request: Request) -> Reply:
        rounds = 0
        while True:
            if self._time() >= request.deadline:
                return self._late(request)
            member = self._members.pick(request.tried, self._time())
            if member is None:
                if not request.tried:
                    if not await self._reopened(request):
                        return self._nothing_open(request)
                    continue
                # All that are open have been tried: the same ones again, after a pause.
                rounds += 1
                request.tried.clear()
                if rounds >= _MOST_ROUNDS:
                    return self._last(request)
                if self._members.any_ready(self._time()) and not await self._paused(request, rounds):
                    return self._last(request)
                continue
            reply = await self._racer.run(request, member)
            if reply is None:
                return self._late(request)
            if reply.outcome in ANSWERED:
                self._budget.give_back(request.taken)
                alone = len(request.attempts) == 1 and (reply.attempts or reply.from_cache)
                return reply if alone else self._told(request, reply)
            if reply.outcome in NOT_THE_CHANNELS:
                return self._told(request, reply)
            if reply.answer.strip() and not self._restart:
                return self._told(request, self._cut(reply))
            if not self._may_go_on(request, reply):
                return self._last(request)

    def _may_go_on(self, request: Request, reply: Reply) -> bool:
        """Whether the budget has another call in it, if there is anyone to make it to."""
        if len(self._members.all) == 1 and reply.outcome in LASTING:
            return False
        taken = self._budget.take(reply.outcome)
        if taken is None:
            return False
        request.taken = request.unused = taken
        return True

    async def _paused(self, request: Request, rounds: int) -> bool:
        """Wait before another round, with full jitter; False where the deadline would pass meanwhile."""
        longest = self._waits(SimpleNamespace(attempt_number=rounds))  # type: ignore[arg-type]  # all that it reads
        wait_s = self._rng.uniform(0, longest)
        if self._time() + wait_s >= request.deadline:
            return False
        await asyncio.sleep(wait_s)
        return True

    async def _reopened(self, request: Request) -> bool:
        """Wait until some circuit lets a request pass; False where none will before the deadline."""
        now = self._time()
        usable = self._members.usable()
        probing = any(m.circuit.state == "half-open" for m in usable)
        at = min((m.circuit.reopens_at for m in usable if m.circuit.state == "open"), default=math.inf)
        if at >= request.deadline and not probing:
            return False
        changed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._changed[changed] = None
        try:
            async with asyncio.timeout(max(0.0, min(at, request.deadline) - now) + 0.001):
                await changed
        except TimeoutError:
            pass
        finally:
            del self._changed[changed]
        return self._time() < request.deadline

    # What is said.
    @staticmethod
    def _told(request: Request, reply: Reply) -> Reply:
        """The reply, with all calls that were made for it."""
        return replace(reply, attempts=tuple(request.attempts))

    def _late(self, request: Request) -> Reply:
        """The deadline has passed: with whatever text had come by then."""
        reply = self._own(request, Outcome.DEADLINE, f"no whole answer in {self._deadline_s:g} s")
        winner = request.winner
        first = None if winner is None or winner.first_at is None else winner.first_at - request.due
        timing = replace(reply.timing, first_token_s=first)
        reasoning, answer = request.text("reasoning"), request.text("answer")
        return replace(reply, timing=timing, reasoning=reasoning, answer=answer)

    def _own(self, request: Request, outcome: Outcome, fact: str) -> Reply:
        reasons = "; ".join(f"{name}: {reply.outcome.value}" for name, reply in request.failed[-6:])
        said = outcomes.detail(outcome, fact) + (f" ({reasons})" if reasons else "")
        return Reply(
            outcome,
            said,
            channel=self.name,
            timing=Timing(total_s=self._time() - request.due),
            due_at=time.time() - (self._time() - request.due),
            attempts=tuple(request.attempts),
            # What was called and did not answer in time has not said that it is emulated.
            emulated=any(reply.emulated for _, reply in request.failed)
            or any(m.emulated for m in self._members.all if m.name in {a.channel for a in request.attempts}),
        )

    def _nothing_open(self, request: Request) -> Reply:
        """Every circuit is open, and none closes in time."""
        now = self._time()
        reasons: list[Outcome] = []
        told = []
        for m in self._members.usable():
            reasons += [m.circuit.reason] if m.circuit.reason else []
            when = f", tried again in {max(0.0, m.circuit.reopens_at - now):.1f} s" if m.circuit.state == "open" else ""
            told.append(f"{m.name}: {m.circuit.reason.value if m.circuit.reason else 'busy with a probe'}{when}")
        # What may pass is told before what will not.
        outcome = next((r for r in reasons if r not in LASTING), reasons[0] if reasons else Outcome.OVER_BUDGET)
        fact = f"no channel is open ({'; '.join(told)})" if told else "max_price leaves no channel at this hour"
        reply = self._own(request, outcome, fact)
        return replace(reply, emulated=reply.emulated or any(m.emulated for m in self._members.all))

    def _last(self, request: Request) -> Reply:
        """The last failure, with what the other channels said."""
        _, reply = request.failed[-1]
        others = "; ".join(f"{name}: {r.outcome.value}" for name, r in request.failed[:-1][-6:])
        detail = f"{reply.detail} (before: {others})" if others else reply.detail
        return replace(reply, detail=detail, attempts=tuple(request.attempts))

    @staticmethod
    def _cut(reply: Reply) -> Reply:
        if reply.outcome is Outcome.CUT:
            return reply
        return replace(
            reply, outcome=Outcome.CUT, detail=f"broken off in the answer ({reply.outcome.value}: {reply.detail})"
        )

    @property
    def cache_scope(self) -> str:
        """What a cache must not mix up with another router's answers: who may answer, and how."""
        parts = []
        for member in self._members.all:
            channel = channel_of(member.backend)
            told = (
                (channel.base_urls, channel.model, channel.reasoning)
                if channel
                else (getattr(member.backend, "cache_scope", ""),)
            )
            parts.append(repr((member.name, *told)))
        return "router over " + ", ".join(sorted(parts))

    # Small things.
    def _time(self) -> float:
        return self._clock() if self._clock is not None else asyncio.get_running_loop().time()

    def _tell_changed(self) -> None:
        for future in self._changed:
            if not future.done():
                future.set_result(None)

    def circuits(self) -> dict[str, tuple[str, Outcome | None]]:
        """State of each channel's circuit, and what opened it."""
        return {m.name: (m.circuit.state, m.circuit.reason) for m in self._members.all}
