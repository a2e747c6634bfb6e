"""The asking itself: hosted channels together under one load, then a local model alone.

Each reply is judged, priced and written down as it ends. Knows opened backends, the journal and the load;
nothing about catalogues, summaries or reports.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from dsr1kit.access import outcomes
from dsr1kit.access.prices import Price
from dsr1kit.compare.items import Item
from dsr1kit.compare.journal import Journal
from dsr1kit.compare.judge import Judge
from dsr1kit.compare.load import InFlight, arrivals
from dsr1kit.compare.record import to_record
from dsr1kit.compare.selfwatch import ClientBias, LoopWatch, client_note
from dsr1kit.compare.settings import OnProgress, RunSettings
from dsr1kit.records import Backend, Message, Outcome, Reply, Sampling, Verdict


class Question(NamedTuple):
    """One draw of one item from one channel; a negative sample is a warm-up, which counts for nothing."""

    channel: str
    item: Item
    sample: int

    @property
    def key(self) -> tuple[str, str, int]:
        """What its record is found by."""
        return (self.channel, self.item.id, self.sample)


def in_order(settings: RunSettings, items: Sequence[Item]) -> Iterator[Question]:
    """Sample by sample, item by item; the channels of one question in an order drawn for it."""
    for sample in range(settings.samples):
        for item in items:
            names = list(settings.channels)
            random.Random(f"{settings.seed}/{item.id}/{sample}").shuffle(names)
            for name in names:
                yield Question(name, item, sample)


class Asking:
    """One start of a run.

    Args:
        judge: open.
        prices: what each channel charges; None: unknown.
    """

    def __init__(
        self,
        settings: RunSettings,
        journal: Journal,
        judge: Judge,
        prices: Mapping[str, Price | None],
        on_progress: OnProgress | None,
    ) -> None:
        self._settings, self._journal, self._judge, self._prices = settings, journal, judge, prices
        self._tell = on_progress or (lambda *_: None)
        self._spent: defaultdict[str, float] = defaultdict(float)
        retired = journal.retired()
        # How often each draw was asked before: an emulator must not meet it with the same weather again.
        self._asked_before = Counter(
            (r["channel"], r["item"], r["sample"]) for r in retired if r["outcome"] != Outcome.OVER_BUDGET
        )
        for record in [*retired, *journal.warm_ups(), *journal.read()]:
            if record.get("cost"):
                self._spent[record["currency"]] += record["cost"]

    def spent(self) -> dict[str, float]:
        """What the run has cost so far, warm-ups and retries included, by currency."""
        return dict(self._spent)

    def budget_spent(self) -> bool:
        """Whether what was spent in some currency has reached the limit."""
        limit = self._settings.max_cost
        return limit is not None and any(spent >= limit for spent in self._spent.values())

    async def prepare(self, opened: Mapping[str, Backend], questions: Sequence[Question]) -> None:
        """Let emulated models answer before anything is measured."""
        by_channel: dict[str, list[tuple[list[Message], Sampling, int]]] = defaultdict(list)
        for q in questions:
            weather, before = getattr(opened[q.channel], "weather", None), self._asked_before[q.key]
            # A script's answers are ready; a model's are not.
            if weather is not None and (weather.model is not None or before):
                by_channel[q.channel].append((q.item.messages(), self._sampling(q), before))
        total = sum(len(v) for v in by_channel.values())
        done = 0

        def count(more: int) -> None:
            nonlocal done
            done += more
            self._tell("prepare", done, total)

        if total:
            self._tell("prepare", 0, total)
        for name, asked in by_channel.items():
            await opened[name].prepare(asked, count)  # type: ignore[attr-defined]  # only emulated channels have it

    async def hosted(
        self, opened: Mapping[str, Backend], questions: Sequence[Question], bias: ClientBias | None = None
    ) -> None:
        """All hosted questions: closed loop at the concurrency, or open loop at the rate; notes how the client did.

        Args:
            bias: what the client itself adds, measured before.
        """
        waiting = iter(questions)
        in_flight = InFlight()
        streams = min(self._settings.concurrency, len(questions))
        queue_s: list[float] = []
        first_token_s: list[float] = []
        stage = "warm-up" if questions and questions[0].sample < 0 else "hosted"
        done = 0

        async def one(q: Question, due: float | None = None) -> None:
            nonlocal done
            with in_flight:
                timing = (await self._one(opened[q.channel], q, due)).timing
            if timing.queue_s is not None:
                queue_s.append(timing.queue_s)
            if timing.first_token_s is not None:
                first_token_s.append(timing.first_token_s)
            done += 1
            self._tell(stage, done, len(questions))

        async def worker() -> None:
            for q in waiting:
                await one(q)
            in_flight.drained()

        if questions:
            self._tell(stage, 0, len(questions))
        rate = None if stage == "warm-up" else self._settings.rate
        cause: Exception | None = None
        watch = LoopWatch()
        try:
            async with watch, asyncio.TaskGroup() as group:
                if rate is None:
                    for _ in range(streams):
                        group.create_task(worker())
                else:
                    await self._arrivals(group, one, questions, rate)
        except* Exception as several:
            # What ended one ends all; the caller is told that one thing.
            cause = several.exceptions[0]
        finally:
            if questions and stage == "hosted":
                note = client_note(
                    bias, watch, in_flight, asked=streams if rate is None else None,
                    queue_s=queue_s, first_token_s=first_token_s,
                )  # fmt: skip
                self._journal.note(client=[*(self._journal.noted("client") or []), note])
        if cause is not None:
            raise cause

    async def _arrivals(
        self,
        group: asyncio.TaskGroup,
        one: Callable[[Question, float], Coroutine[Any, Any, None]],
        questions: Sequence[Question],
        rate: float,
    ) -> None:
        """Begin each question at its seeded random moment, whatever is still in flight."""
        loop = asyncio.get_running_loop()
        begun = loop.time()
        for q, after in zip(questions, arrivals(rate, len(questions), self._settings.seed), strict=True):
            # Who will not be asked needs no moment of its own.
            if not self._over_budget(q.channel):
                await asyncio.sleep(max(0.0, begun + after - loop.time()))
            group.create_task(one(q, begun + after))

    async def local(self, backend: Backend, questions: Sequence[Question]) -> None:
        """All questions of one local model, one after the other."""
        stage = f"local {backend.name.partition(':')[2]}"
        self._tell(stage, 0, len(questions))
        for number, q in enumerate(questions, 1):
            await self._one(backend, q, None)
            self._tell(stage, number, len(questions))

    async def _one(self, backend: Backend, q: Question, due: float | None) -> Reply:
        if self._over_budget(q.channel):
            reply = self._not_asked(backend, q.channel)
        else:
            reply = await backend.ask(q.item.messages(), self._sampling(q), due=due)
        known = self._judge.at_once(reply, q.item)
        if known is not None:
            self._keep(reply, q, known)
            return reply
        keeping = asyncio.ensure_future(self._judge_and_keep(reply, q))
        try:
            await asyncio.shield(keeping)
        except asyncio.CancelledError:
            # What came back was paid for: it is written down before the run ends.
            await keeping
            raise
        return reply

    async def _judge_and_keep(self, reply: Reply, q: Question) -> None:
        self._keep(reply, q, await self._judge.verdict(reply, q.item))

    def _keep(self, reply: Reply, q: Question, verdict: Verdict) -> None:
        record = to_record(reply, q.channel, q.item, q.sample, self._prices[q.channel], verdict)
        if record["cost"]:
            self._spent[record["currency"]] += record["cost"]
        self._journal.append(record, warm_up=q.sample < 0)

    def _sampling(self, q: Question) -> Sampling:
        # Draws beyond those that count: a warm-up must not put a counted answer into some cache.
        sample = q.sample if q.sample >= 0 else self._settings.samples - 1 - q.sample
        return self._settings.sampling_for(q.item.id, sample)

    def _over_budget(self, name: str) -> bool:
        price = self._prices[name]
        return self.budget_spent() and not (price is not None and price.free)

    def _not_asked(self, backend: Backend, name: str) -> Reply:
        channel = getattr(backend, "channel", None)
        return Reply(
            Outcome.OVER_BUDGET,
            outcomes.detail(Outcome.OVER_BUDGET, f"--max-cost {self._settings.max_cost:g} was reached"),
            channel=name,
            model_requested=getattr(channel, "model", ""),
            due_at=time.time(),
            emulated=getattr(channel, "emulated", False),
        )
