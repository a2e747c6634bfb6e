"""Ask every channel the same questions and write down what happens: the run behind `dsr1kit compare`.

Hosted and emulated channels share one interleaved order, so that drift over the run hits all alike; local
models come after, one request at a time, with nothing else being measured. Each reply becomes a record in
the journal as it ends; the same settings on the same folder continue a killed run.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import json
import random
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from dsr1kit import about
from dsr1kit.access import outcomes
from dsr1kit.access.channels import Channel, load_channels
from dsr1kit.access.prices import Price
from dsr1kit.backends import LOCAL, is_local, open_backend, price_of
from dsr1kit.compare import report
from dsr1kit.compare.journal import Journal, read_records
from dsr1kit.compare.scoring import score_number
from dsr1kit.compare.summary import summarize
from dsr1kit.compare.tasks import Item, load_task
from dsr1kit.errors import ModelError, RunError, UsageError
from dsr1kit.keys import require_key
from dsr1kit.local.load import locate
from dsr1kit.records import ANSWERED, Attempt, Backend, Message, Outcome, Reply, Sampling, Verdict

#: What runs may report while they go: (stage, done, total); stages are `prepare`, `hosted` and `local`.
OnProgress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSettings:
    """What a comparison asks, of whom and how.

    Attributes:
        channels: catalogue names, `emulated:FILE`, `local:MODEL`.
        task, items, samples: how many draws of how many questions of which task.
        concurrency: requests in flight over all hosted channels together (closed loop).
        rate: requests per second in all, at random (Poisson) moments (open loop); None: closed loop.
        seed: of items, order, arrival times and draws.
        sampling: R1's by default; `max_tokens` here is a cap for tasks with short answers.
        max_cost: in a channel's own currency; when the sum in one currency reaches it, the rest of the
            run is recorded as `over_budget` and not asked, save of channels that charge nothing. The
            same run with more to spend asks that rest.
        first_token_s, stall_s, deadline_s: limits for hosted channels, in seconds.
    """

    channels: tuple[str, ...]
    task: str = "arithmetic"
    items: int = 50
    samples: int = 1
    concurrency: int = 4
    rate: float | None = None
    seed: int = 0
    sampling: Sampling = field(default_factory=Sampling)
    max_cost: float | None = None
    first_token_s: float = 120.0
    stall_s: float = 60.0
    deadline_s: float | None = None

    def __post_init__(self) -> None:
        if not self.channels:
            raise UsageError("a comparison needs at least one channel")
        twice = [c for c in self.channels if self.channels.count(c) > 1]
        if twice:
            raise UsageError(f"channel {twice[0]!r} is named twice")
        for name in ("items", "samples", "concurrency"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("rate", "max_cost", "first_token_s", "stall_s", "deadline_s"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UsageError(f"{name} must be above 0, not {value}")

    def sampling_for(self, sample: int) -> Sampling:
        """The sampling of one draw; the run's seed counts where the sampling has none of its own."""
        seed = self.seed if self.sampling.seed is None else self.sampling.seed
        return replace(self.sampling, seed=seed, sample=sample)


class Finished(NamedTuple):
    """A finished run: its folder's files, and the summary as data."""

    folder: Path
    records: Path
    summary_path: Path
    report: Path
    summary: dict[str, Any]


class _Question(NamedTuple):
    channel: str
    item: Item
    sample: int

    @property
    def key(self) -> tuple[str, str, int]:
        return (self.channel, self.item.id, self.sample)


async def run_comparison(
    settings: RunSettings,
    out: str | Path,
    *,
    channel_file: str | Path | None = None,
    retry_failed: bool = False,
    on_progress: OnProgress | None = None,
) -> Finished:
    """Run, or continue, a comparison in the folder `out`.

    Args:
        settings: what to ask.
        out: the run's folder; holds run.json, records.jsonl, summary.json and report.html.
        channel_file: the person's own catalogue; None: the one DSR1KIT_CHANNELS names.
        retry_failed: ask failed requests of an earlier start again.
        on_progress: told of each finished request.

    Raises:
        UsageError: unknown names, missing keys, a folder of another run; before anything is asked.
        ModelError: a local model that is not there, likewise.
        RunError: the folder can no longer be written.
    """
    catalogue = load_channels(channel_file)
    items = load_task(settings.task, settings.items, settings.seed)
    clocks: dict[str, Any] = {k: getattr(settings, k) for k in ("first_token_s", "stall_s", "deadline_s")}
    backends = {name: open_backend(name, catalogue, **clocks) for name in settings.channels}
    for name in settings.channels:
        if name in catalogue and catalogue[name].api_key_env and not catalogue[name].retired_on():
            require_key(catalogue[name].api_key_env, name)
        if is_local(name):
            locate(name.removeprefix(LOCAL).partition("@")[0])
    prices = {name: price_of(name, catalogue) for name in settings.channels}
    identity = _identity(settings, catalogue, backends)
    hosted_ones = [catalogue[name] for name in settings.channels if name in catalogue]
    surroundings = {
        "versions": about.versions(),
        "hardware": about.hardware(),
        "promises": {c.name: c.availability for c in hosted_ones if c.availability is not None},
        "warnings": [w for c in hosted_ones if (w := c.retirement_warning())],
    }
    with Journal(Path(out), identity, surroundings) as journal:
        if retry_failed:
            journal.forget_failed()
        run = _Run(settings, journal, prices, on_progress)
        if not run.budget_spent():
            journal.forget_unasked()
        open_ones = [q for q in _order(settings, items) if q.key not in journal.done()]
        hosted = [q for q in open_ones if not is_local(q.channel)]
        async with AsyncExitStack() as stack:
            opened: dict[str, Backend] = {}
            for name in dict.fromkeys(q.channel for q in hosted):
                opened[name] = await stack.enter_async_context(backends[name])
            await run.prepare(opened, hosted)
            await run.hosted(opened, hosted)
        for name in settings.channels:
            own = [q for q in open_ones if q.channel == name and is_local(name)]
            if own:
                try:
                    async with backends[name] as backend:
                        await run.local(backend, own)
                except ModelError as error:
                    finish(Path(out))  # what the others answered is there to be read
                    raise ModelError(f"{error} (the other channels are in {Path(out) / 'report.html'})") from None
    return finish(Path(out))


def finish(folder: Path) -> Finished:
    """Write summary.json and report.html from what the folder holds."""
    run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    records = read_records(folder / "records.jsonl")
    summary = summarize(records, run["identity"]["channels"], run.get("promises")) | {
        "run": run["run"],
        "task": run["identity"]["task"],
        "items": run["identity"]["items"],
        "samples": run["identity"]["samples"],
    }
    summary_path, report_path = folder / "summary.json", folder / "report.html"
    rendered = report.render(run, records, summary)
    try:
        summary_path.write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        report_path.write_text(rendered, encoding="utf-8")
    except OSError as error:
        raise RunError(
            f"{error.filename} cannot be written ({error.strerror}); the records in {folder} are whole"
        ) from None
    return Finished(folder, folder / "records.jsonl", summary_path, report_path, summary)


class _Run:
    def __init__(
        self,
        settings: RunSettings,
        journal: Journal,
        prices: Mapping[str, Price | None],
        on_progress: OnProgress | None,
    ) -> None:
        self._settings, self._journal, self._prices = settings, journal, prices
        self._tell = on_progress or (lambda *_: None)
        self._spent: defaultdict[str, float] = defaultdict(float)
        retired = journal.retired()
        # How often each draw was asked before: an emulator must not meet it with the same weather again.
        self._asked_before = Counter(
            (r["channel"], r["item"], r["sample"]) for r in retired if r["outcome"] != Outcome.OVER_BUDGET
        )
        for record in [*retired, *journal.read()]:
            if record.get("cost"):
                self._spent[record["currency"]] += record["cost"]

    def budget_spent(self) -> bool:
        """Whether what was spent in some currency has reached the limit."""
        limit = self._settings.max_cost
        return limit is not None and any(spent >= limit for spent in self._spent.values())

    async def prepare(self, opened: Mapping[str, Backend], questions: Sequence[_Question]) -> None:
        """Let emulated models answer before anything is measured."""
        by_channel: dict[str, list[tuple[list[Message], Sampling, int]]] = defaultdict(list)
        for q in questions:
            weather, before = getattr(opened[q.channel], "weather", None), self._asked_before[q.key]
            # A script's answers are ready; a model's are not.
            if weather is not None and (weather.model is not None or before):
                by_channel[q.channel].append((q.item.messages(), self._settings.sampling_for(q.sample), before))
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

    async def hosted(self, opened: Mapping[str, Backend], questions: Sequence[_Question]) -> None:
        """All hosted questions: closed loop at the concurrency, or open loop at the rate."""
        waiting = iter(questions)
        done = 0

        async def one(q: _Question, due: float | None = None) -> None:
            nonlocal done
            await self._one(opened[q.channel], q, due)
            done += 1
            self._tell("hosted", done, len(questions))

        async def worker() -> None:
            for q in waiting:
                await one(q)

        if questions:
            self._tell("hosted", 0, len(questions))
        cause: Exception | None = None
        try:
            async with asyncio.TaskGroup() as group:
                if self._settings.rate is None:
                    for _ in range(min(self._settings.concurrency, len(questions))):
                        group.create_task(worker())
                else:
                    await self._arrivals(group, one, questions, self._settings.rate)
        except* Exception as several:
            # What ended one ends all; the caller is told that one thing.
            cause = several.exceptions[0]
        if cause is not None:
            raise cause

    async def _arrivals(
        self,
        group: asyncio.TaskGroup,
        one: Callable[[_Question, float], Coroutine[Any, Any, None]],
        questions: Sequence[_Question],
        rate: float,
    ) -> None:
        """Begin each question at its seeded random moment, whatever is still in flight."""
        loop = asyncio.get_running_loop()
        rng = random.Random(f"{self._settings.seed}/arrivals")
        due = loop.time()
        for q in questions:
            due += rng.expovariate(rate)
            # Who will not be asked needs no moment of its own.
            if not self._over_budget(q.channel):
                await asyncio.sleep(max(0.0, due - loop.time()))
            group.create_task(one(q, due))

    async def local(self, backend: Backend, questions: Sequence[_Question]) -> None:
        """All questions of one local model, one after the other."""
        stage = f"local {backend.name.partition(':')[2]}"
        self._tell(stage, 0, len(questions))
        for number, q in enumerate(questions, 1):
            await self._one(backend, q, None)
            self._tell(stage, number, len(questions))

    async def _one(self, backend: Backend, q: _Question, due: float | None) -> None:
        price = self._prices[q.channel]
        if self._over_budget(q.channel):
            reply = self._not_asked(backend, q.channel)
        else:
            reply = await backend.ask(q.item.messages(), self._settings.sampling_for(q.sample), due=due)
        record = to_record(reply, q.channel, q.item, q.sample, price)
        if record["cost"]:
            self._spent[record["currency"]] += record["cost"]
        self._journal.append(record)

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


def to_record(reply: Reply, channel: str, item: Item, sample: int, price: Price | None) -> dict[str, Any]:
    """One line of records.jsonl (without the run's id)."""
    timing, usage = reply.timing, reply.usage
    due = reply.due_at
    ended = dt.datetime.now(dt.UTC) if due is None else dt.datetime.fromtimestamp(due + (timing.total_s or 0.0), dt.UTC)
    cost = price.at(ended).cost(usage) if price is not None else None  # charged by when it completes
    asked = reply.outcome is not Outcome.OVER_BUDGET
    attempts = reply.attempts or ((Attempt(channel, reply.outcome, timing.total_s),) if asked else ())
    return {
        "channel": channel,
        "item": item.id,
        "kind": item.kind,
        "sample": sample,
        "model_requested": reply.model_requested,
        "model_served": reply.model_served,
        "outcome": reply.outcome.value,
        "detail": reply.detail,
        "due_at": dt.datetime.fromtimestamp(due, dt.UTC).isoformat() if due is not None else None,
        "queue_s": _rounded(timing.queue_s),
        "connect_s": _rounded(timing.connect_s),
        "connection_reused": timing.connection_reused,
        "first_token_s": _rounded(timing.first_token_s),
        "first_answer_s": _rounded(timing.first_answer_s),
        "think_s": _rounded(timing.think_s),
        "inter_token_s": _rounded(timing.inter_token_s),
        "total_s": _rounded(timing.total_s),
        "prompt_tokens": usage.prompt_tokens,
        "reasoning_tokens": usage.reasoning_tokens,
        "answer_tokens": usage.answer_tokens,
        "token_count_source": usage.source,
        "token_split_source": usage.split_source,
        "question": item.prompt,
        "gold": item.gold,
        "reasoning": reply.reasoning,
        "answer": reply.answer,
        "finish_reason": reply.finish_reason,
        "verdict": verdict_of(reply, item),
        "cost": cost,
        "currency": price.currency if price is not None else None,
        "attempts": [asdict(a) | {"outcome": a.outcome.value} for a in attempts],
        "from_cache": reply.from_cache,
        "base_url": reply.extra.get("base_url") or None,
        # The kit's emulator marks what it sends, so that a catalogue entry that points at one is told too.
        "emulated": reply.emulated,
    }


def verdict_of(reply: Reply, item: Item) -> Verdict:
    """Judge a reply; one that is neither whole nor stopped by length says nothing about quality."""
    if reply.outcome not in ANSWERED:
        return "unscored"
    # A number at which a limit cut the text off may be half a number, or a step of the thinking.
    return score_number(reply.answer, item.gold, boxed_only=reply.outcome is Outcome.TRUNCATED)


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 6)


def _order(settings: RunSettings, items: Sequence[Item]) -> Iterator[_Question]:
    """Sample by sample, item by item; the channels of one question in an order drawn for it."""
    for sample in range(settings.samples):
        for item in items:
            names = list(settings.channels)
            random.Random(f"{settings.seed}/{item.id}/{sample}").shuffle(names)
            for name in names:
                yield _Question(name, item, sample)


def _identity(settings: RunSettings, catalogue: Mapping[str, Channel], backends: Mapping[str, Any]) -> dict[str, Any]:
    identity = asdict(settings) | {"channels": list(settings.channels)}
    # Raising the budget is how a run that hit it goes on.
    del identity["max_cost"]
    facts: dict[str, Any] = {}
    for name in settings.channels:
        if name in catalogue:
            c = catalogue[name]
            facts[name] = {"base_urls": list(c.base_urls), "model": c.model, "reasoning": c.reasoning}
        elif hasattr(backends[name], "weather"):
            weather = json.loads(json.dumps(asdict(backends[name].weather), default=str))
            del weather["path"]
            facts[name] = {"weather": weather}
    return identity | {"facts": facts}
