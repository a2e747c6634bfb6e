"""The calls of one request: the first, the hedges beside it, and what each of them teaches.

The first real token wins; the others are cancelled. Knows nothing about which channel is asked first, nor what
follows when all calls of a race have failed.
"""

from __future__ import annotations

import asyncio
import datetime as dt
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from dsr1kit.access.circuit import RetryBudget
from dsr1kit.access.members import Member, Members
from dsr1kit.access.metrics import Metrics
from dsr1kit.access.quota import Quota
from dsr1kit.access.stream import estimate_tokens
from dsr1kit.records import ANSWERED, Attempt, Delta, Message, OnDelta, Outcome, Reply, Sampling

#: The request's own fault, or the caller's: no other channel would do better, and no circuit learns from it.
NOT_THE_CHANNELS = frozenset(
    {Outcome.BAD_REQUEST, Outcome.FILTERED, Outcome.DEADLINE, Outcome.OVER_BUDGET, Outcome.CANCELLED}
)
_MOST_LANES = 3  # calls of one request at a time
_MOST_CALLS = 6  # of one race, those that failed included, rescues aside
_LEAST_LEFT_S = 0.05  # before the deadline, for which a call is still worth it


@dataclass(frozen=True, slots=True)
class Hedging:
    """When a second channel is asked although the first has not failed.

    Attributes:
        cold_s: until first-token times are known; None: a quarter of the deadline, at most two seconds.
        floor_s: never earlier than that; below it a hedge costs more than it gains.
        share: at most this share of requests is hedged, `burst` of them in a row. A call that has taken half of
            the time that was left counts as lost, and needs no share.
        max_cost: at most this much money for all hedges together, each counted as a whole answer in its
            channel's own currency; None: no limit.
    """

    cold_s: float | None = None
    floor_s: float = 0.05
    share: float = 0.1
    burst: float = 10.0
    max_cost: float | None = None


@dataclass(eq=False, slots=True)
class _Lane:
    """One upstream call of a request.

    Attributes:
        taken: from the retry budget; 0.0 for the first of a race.
        probe: whether it is the one that a half-open circuit lets pass.
        given_up: nobody waits for it any more; what it still says or shows is void.
        number: of its first Delta.
        said: what it showed, once it has won; all that there is of it when the deadline passes.
    """

    member: Member
    began: float
    taken: float
    probe: bool
    task: asyncio.Task[Reply] | None = None
    started: bool = False
    given_up: bool = False
    first_at: float | None = None
    number: int = 0
    said: list[Delta] = field(default_factory=list)
    reply: Reply | None = None


@dataclass(eq=False, slots=True)
class Request:
    """One request of a caller: what is asked, until when, and what became of its calls.

    Attributes:
        tried: names of channels that were asked in this round.
        failed: replies that were the channel's fault, in the order of their ends.
        taken: what the last of its extra calls took from the retry budget.
        unused: what was taken for a call that is not made yet.
        shown: number of the last Delta that was shown.
    """

    messages: Sequence[Message]
    sampling: Sampling
    on_delta: OnDelta | None
    due: float
    deadline: float
    attempts: list[Attempt] = field(default_factory=list)
    failed: list[tuple[str, Reply]] = field(default_factory=list)
    tried: set[str] = field(default_factory=set)
    taken: float = 0.0
    unused: float = 0.0
    shown: int = -1
    calls: int = 0
    hedges: int = 0
    winner: _Lane | None = None
    wake: asyncio.Future[None] | None = None

    def stir(self) -> None:
        """Have the race look again."""
        if self.wake is not None and not self.wake.done():
            self.wake.set_result(None)

    def text(self, kind: Literal["reasoning", "answer"]) -> str:
        """What the winner of the last race showed of its reasoning or answer."""
        return "".join(d.text for d in self.winner.said if d.kind == kind) if self.winner is not None else ""

    @property
    def hedge_won(self) -> bool:
        """Whether a hedge gave the first token."""
        return self.winner is not None and self.winner.taken > 0


class Racer:
    """Runs races over a router's members, within its budget.

    Args:
        deadline_s: of a request; the cold default of hedges is read from it.
        clock, now: loop time, and the wall clock that prices are read by.
        changed: called when a circuit may have changed.
    """

    def __init__(
        self,
        members: Members,
        hedging: Hedging | None,
        budget: RetryBudget,
        metrics: Metrics,
        *,
        deadline_s: float,
        clock: Callable[[], float],
        now: Callable[[], dt.datetime],
        changed: Callable[[], None],
    ) -> None:
        self._members, self._hedging, self._budget, self._metrics = members, hedging, budget, metrics
        self._time, self._now, self._changed = clock, now, changed
        cold_s = None if hedging is None else hedging.cold_s
        self._cold_s = min(2.0, deadline_s / 4) if cold_s is None else cold_s
        self._share_left = hedging.burst if hedging else 0.0
        self._hedges_cost = 0.0

    def began(self) -> None:
        """A request begins: it brings its share of a hedge."""
        if self._hedging is not None:
            self._share_left = min(self._hedging.burst, self._share_left + self._hedging.share)

    async def run(self, request: Request, member: Member) -> Reply | None:
        """One call and the hedges it needs; the reply of whoever gave the first token; None: the deadline passed."""
        loop = asyncio.get_running_loop()
        request.winner = None
        lanes = [self._start(request, member, 0.0)]
        hedge_at = self._hedge_at(lanes[0])
        # Half of what is left is a long time for a first token: from then on a call counts as lost; and again half
        # of what is left then, as long as that is worth it.
        rescue_at = (lanes[0].began + request.deadline) / 2
        late = False
        try:
            while True:
                winner = request.winner or next((lane for lane in lanes if _good(lane.reply)), None)
                if winner is not None:
                    # Words about the request itself do not make those slow that gave none yet.
                    lost = winner.reply is None or winner.reply.outcome not in NOT_THE_CHANNELS
                    for lane in lanes:
                        if lane is not winner and lane.reply is None and not lane.given_up:
                            self._give_up(request, lane, lost=lost)
                    if winner.reply is not None:
                        if winner.reply.outcome in ANSWERED:
                            request.winner = winner
                        return winner.reply
                    hedge_at = None
                self._raise_errors(lanes)
                if all(lane.reply is not None or lane.given_up for lane in lanes):
                    return next(lane.reply for lane in reversed(lanes) if lane.reply is not None)
                if (now := self._time()) >= request.deadline:
                    late = True
                    return None
                # A hedge that has failed is replaced at once: the first call has been too long already.
                if hedge_at is not None and (now >= hedge_at or (len(lanes) > 1 and lanes[-1].reply is not None)):
                    hedge = self._hedge(request, lanes, rescue=now >= rescue_at)
                    if now >= rescue_at:
                        rescue_at = (now + request.deadline) / 2
                    hedge_at = self._next_hedge(request, hedge, rescue_at)
                    if hedge is not None:
                        lanes.append(hedge)
                        continue
                request.wake = loop.create_future()
                until = request.deadline if hedge_at is None else min(hedge_at, request.deadline)
                timer = loop.call_later(max(0.0, until - now), request.stir)
                try:
                    await request.wake
                finally:
                    timer.cancel()
        finally:
            request.wake = None
            for lane in lanes:
                if lane.reply is None and not lane.given_up:
                    self._give_up(request, lane, lost=False, late=late)

    @staticmethod
    def _raise_errors(lanes: Sequence[_Lane]) -> None:
        """Raise what a call raised: a misuse, or the caller's own on_delta."""
        for lane in lanes:
            if lane.reply is None and not lane.given_up and lane.task is not None and lane.task.done():
                lane.task.result()

    def _start(self, request: Request, member: Member, taken: float) -> _Lane:
        lane = _Lane(member, self._time(), taken, member.circuit.begin())
        request.tried.add(member.name)
        request.calls += 1
        request.unused = 0.0
        member.in_flight += 1
        lane.task = asyncio.create_task(self._call(request, lane))
        return lane

    async def _call(self, request: Request, lane: _Lane) -> Reply:
        member = lane.member
        lane.started = True

        def show(delta: Delta) -> None:
            if lane.given_up:
                return
            if lane.first_at is None:
                if not delta.text:
                    return
                lane.first_at = self._time()
                member.first_tokens.add(lane.first_at - lane.began)
                if request.winner is None:
                    request.winner = lane
                    lane.number = request.shown + 1
                    if request.calls > 1:  # there may be others to cancel
                        request.stir()
            if request.winner is not lane:
                return
            lane.said.append(delta)
            if request.on_delta is not None:
                request.shown = number = lane.number + delta.attempt
                request.on_delta(delta if number == delta.attempt else replace(delta, attempt=number))

        try:
            reply: Reply = await member.asker.ask(request.messages, request.sampling, on_delta=show, due=request.due)
        except BaseException:
            if not lane.given_up:
                member.circuit.abandoned(self._time(), probe=lane.probe)
                self._changed()
            raise
        finally:
            member.in_flight -= 1
            request.stir()
        if not lane.given_up:
            lane.reply = reply
            self._learn(request, lane, reply)
        return reply

    def _learn(self, request: Request, lane: _Lane, reply: Reply) -> None:
        member, now = lane.member, self._time()
        member.said_emulated = member.said_emulated or reply.emulated
        if len(reply.attempts) > 1:  # a router's
            request.attempts += reply.attempts
            request.calls += len(reply.attempts) - 1
        else:
            request.attempts.append(Attempt(member.name, reply.outcome, now - lane.began))
        was = member.circuit.state
        if reply.outcome in ANSWERED:
            member.answered(well=True)
            member.circuit.success(probe=lane.probe)
        elif reply.outcome in NOT_THE_CHANNELS:
            member.circuit.abandoned(now, probe=lane.probe)
        else:
            if lane.first_at is not None:
                member.first_tokens.forget(lane.first_at - lane.began)
            request.failed.append((member.name, reply))
            member.answered(well=False)
            quota = reply.extra.get("quota")
            wait_s = quota.wait_s() if isinstance(quota, Quota) else None
            member.circuit.failure(now, reply.outcome, wait_s, probe=lane.probe)
        if member.circuit.state != was or was != "closed":
            self._changed()
        if member.price is not None and not reply.from_cache:
            cost = member.price.at(self._now()).cost(reply.usage)
            if cost:
                self._metrics.paid(cost, member.price.currency)
                member.paid(cost)

    def _give_up(self, request: Request, lane: _Lane, *, lost: bool, late: bool = False) -> None:
        """End a call that is no longer wanted; a first one that lost before its first token was slow."""
        assert lane.task is not None  # noqa: S101 - only called for lanes that were started
        lane.given_up = True
        lane.task.add_done_callback(_end_quietly)
        if lane.task.done():  # it raised
            return
        lane.task.cancel()
        if not lane.started:  # and never will be
            lane.member.in_flight -= 1
        now = self._time()
        request.attempts.append(Attempt(lane.member.name, Outcome.CANCELLED, now - lane.began))
        if lost and lane.first_at is None and lane.taken == 0.0:
            lane.member.answered(well=False)
            lane.member.circuit.failure(now, Outcome.STALLED, probe=lane.probe)
        else:
            lane.member.circuit.abandoned(now, probe=lane.probe, late=late and lane.first_at is None)
        self._changed()

    # Hedges.
    def _hedge_at(self, lane: _Lane) -> float | None:
        hedging = self._hedging
        if hedging is None or len(self._members.all) < 2:
            return None
        return lane.began + lane.member.first_tokens.hedge_after(self._cold_s, hedging.floor_s)

    def _next_hedge(self, request: Request, hedge: _Lane | None, rescue_at: float) -> float | None:
        """When to look again; a hedge that was refused is tried again when the calls count as lost."""
        if hedge is not None:
            return self._hedge_at(hedge)
        return rescue_at if request.deadline - rescue_at > _LEAST_LEFT_S else None

    def _hedge(self, request: Request, lanes: Sequence[_Lane], *, rescue: bool) -> _Lane | None:
        """Another call beside those under way, if share, money and budget have it; a rescue needs no share."""
        hedging = self._hedging
        # The share is of requests: what takes the place of a hedge that failed is the retry budget's business.
        first = len(lanes) == 1
        if hedging is None or (first and self._share_left < 1 and not rescue):
            return None
        now, pick = self._time(), self._members.pick
        under_way = [lane for lane in lanes if lane.reply is None and not lane.given_up]
        going = [lane.member.name for lane in under_way]
        if not rescue and (len(under_way) >= _MOST_LANES or len(lanes) >= _MOST_CALLS):
            return None
        # Best one that was not asked yet; then one that failed, which may do better now; then the same again, for
        # what hangs is often one request and not the channel; last one whose circuit is open.
        member = pick(request.tried, now) or pick(going, now) or pick((), now) or pick(going, now, or_open=True)
        if member is None:
            return None
        cost = self._about(member, request)
        if hedging.max_cost is not None and self._hedges_cost + cost > hedging.max_cost:
            return None
        taken = self._budget.take(None)
        if taken is None:
            return None
        if first:
            self._share_left = max(0.0, self._share_left - 1)
        if len(under_way) >= _MOST_LANES:  # a rescue takes the place of the oldest
            self._give_up(request, under_way[0], lost=True)
        self._hedges_cost += cost
        request.taken = taken
        request.hedges += 1
        return self._start(request, member, taken)

    def _about(self, member: Member, request: Request) -> float:
        """What a whole answer of this channel is likely to cost."""
        if member.mean_cost is not None or member.price is None:
            return member.mean_cost or 0.0
        price = member.price.at(self._now())
        prompt = sum(estimate_tokens(m["content"]) for m in request.messages)
        return (prompt * price.input + 1000 * price.output) / 1e6


def _end_quietly(task: asyncio.Task[Reply]) -> None:
    """What a call that is given up raises in its end is nobody's business."""
    if not task.cancelled():
        task.exception()


def _good(reply: Reply | None) -> bool:
    """Whether a reply ends a race: answered, or not the channel's fault."""
    return reply is not None and (reply.outcome in ANSWERED or reply.outcome in NOT_THE_CHANNELS)
