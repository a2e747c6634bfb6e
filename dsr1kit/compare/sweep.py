"""How many requests a second a channel bears: rates upwards until the service objective breaks, then the knee.

Each rate is an open loop: requests are due at random moments whatever is still in flight, and all times count from
there, so that a channel that falls behind cannot hide it. Knows nothing about printing or drawing.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import json
import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from itertools import cycle
from pathlib import Path
from typing import IO, Any

from dsr1kit import about
from dsr1kit.access.channels import load_channels
from dsr1kit.access.prices import Price
from dsr1kit.access.quota import Quota
from dsr1kit.backends import open_backend, price_of
from dsr1kit.compare.items import Item
from dsr1kit.compare.judge import Judge
from dsr1kit.compare.load import InFlight, arrivals, goodput
from dsr1kit.compare.record import to_record
from dsr1kit.compare.selfwatch import ClientBias, LoopWatch, client_note, measure_client
from dsr1kit.compare.settings import OnProgress
from dsr1kit.compare.stats import percentiles
from dsr1kit.compare.summary import timed
from dsr1kit.compare.sweep_result import Step, Sweep, SweepSettings, in_words, knee_of, line_of
from dsr1kit.compare.tasks import load_task
from dsr1kit.errors import RunError, UsageError
from dsr1kit.keys import redact_texts
from dsr1kit.records import ANSWERED, Backend, Outcome, Reply, Sampling

__all__ = ["Step", "Sweep", "SweepSettings", "run_sweep", "sweep_backend"]

#: Below this share of requests within the objective, at two rates running, higher ones tell nothing more.
BROKEN_SHARE = 0.5
#: Beyond this share of throttled requests a provider that turns away gives nearly all it has.
THROTTLED_SHARE = 2 / 3
_FEW = 10
_BUDGET = "the budget of"
_MINUTE_S = 60.0
_LONG_WAIT_S = 5.0  # asked for by a quota that is counted over a minute, and not by a full house


async def run_sweep(
    settings: SweepSettings,
    out: str | Path,
    *,
    channel_file: str | Path | None = None,
    client_check: bool = True,
    on_progress: OnProgress | None = None,
    on_note: Callable[[str], None] | None = None,
) -> Sweep:
    """Sweep a channel into the folder `out`: sweep.jsonl (its records, each with its `rate`) and sweep.json.

    Args:
        channel_file: the person's own catalogue; None: the one DSR1KIT_CHANNELS names.
        client_check: measure the client itself before, at the number of streams the highest rate will need.
        on_progress: told of each finished request, the rate as its stage.
        on_note: told in words what was found so far.

    Raises:
        UsageError: an unknown name, a missing key, a budget without a price, a folder that holds a sweep already.
        RunError: the folder can no longer be written.
    """
    catalogue = load_channels(channel_file)
    clocks: dict[str, Any] = {k: getattr(settings, k) for k in ("first_token_s", "stall_s", "deadline_s")}
    opening = open_backend(settings.channel, catalogue, **clocks)
    price = price_of(settings.channel, catalogue)
    if settings.max_cost is not None and price is None:
        raise UsageError(
            f"{settings.channel} has no price, so that no budget can be kept: give it one in a --channel-file, or "
            "leave --max-cost out"
        )
    items = load_task(settings.task, settings.items, settings.seed)
    folder = Path(out)
    with _records_of(folder) as file:
        async with opening as backend:
            found = await sweep_backend(
                backend, settings, items, price, file=file, client_check=client_check,
                on_progress=on_progress, on_note=on_note,
            )  # fmt: skip
    told = asdict(found) | {"versions": about.versions(), "hardware": about.hardware()}
    try:
        text = json.dumps(redact_texts(told), indent=2, ensure_ascii=False, default=str)
        (folder / "sweep.json").write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise RunError(f"{error.filename} cannot be written ({error.strerror}); the records are whole") from None
    return found


def _records_of(folder: Path) -> IO[str]:
    path = folder / "sweep.jsonl"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return path.open("x", encoding="utf-8", errors="replace")
    except FileExistsError:
        raise UsageError(f"{path} is there already; choose another folder with --out") from None
    except OSError as error:
        raise UsageError(f"the output folder {folder} cannot be written ({error.strerror}); choose another") from None


async def sweep_backend(
    backend: Backend,
    settings: SweepSettings,
    items: Sequence[Item],
    price: Price | None = None,
    *,
    file: IO[str] | None = None,
    client_check: bool = False,
    on_progress: OnProgress | None = None,
    on_note: Callable[[str], None] | None = None,
) -> Sweep:
    """Sweep a Backend that is open; see `run_sweep`."""
    async with Judge() as judge:
        sweeping = _Sweeping(backend, settings, items, price, judge, file, on_progress or (lambda *_: None))
        await sweeping.go(client_check=client_check, note=on_note or (lambda _: None))
    return sweeping.found()


class _Sweeping:
    def __init__(
        self,
        backend: Backend,
        settings: SweepSettings,
        items: Sequence[Item],
        price: Price | None,
        judge: Judge,
        file: IO[str] | None,
        tell: OnProgress,
    ) -> None:
        self._backend, self._settings, self._price = backend, settings, price
        self._judge, self._file, self._tell = judge, file, tell
        self._draws = _draws(items)
        self._steps: list[Step] = []
        self._spent = self._rest_s = 0.0
        self._expected: float | None = None
        self._stopped = self._first_failure = ""
        self._emulated = False
        self._bias: ClientBias | None = None

    async def go(self, *, client_check: bool, note: Callable[[str], None]) -> None:
        settings = self._settings
        warm = await self._warm_up()
        if warm:
            lengths = [t for r in warm if (t := r.timing.total_s) is not None]
            requests = sum(map(settings.requests, settings.rates))
            if self._price is not None and not self._price.free:
                self._expected = self._spent / len(warm) * requests
                note(f"{requests} requests, about {self._price.currency} {self._expected:.2g} by the warm-up's cost")
            if not any(r.outcome in ANSWERED for r in warm):
                self._stopped = f"no warm-up request was answered: {warm[0].outcome.value}: {warm[0].detail}"
                return
            if client_check:
                streams = math.ceil(settings.rates[-1] * statistics.fmean(lengths))  # Little's law
                self._bias = await measure_client(streams)
        elif client_check:
            self._bias = await measure_client(math.ceil(settings.rates[-1]))
        for rate in settings.rates:
            note(line_of(await self._at(rate)))
            self._stopped = self._enough()
            if self._stopped:
                break
        for _ in range(settings.refine):
            low, high = knee_of(self._steps)
            if low is None or high is None or self._stopped.startswith(_BUDGET):
                break
            between = float(f"{math.sqrt(low.rate * high.rate):.3g}")
            if not low.rate < between < high.rate:  # as close as three digits tell
                break
            note(line_of(await self._at(between)))
            self._stopped = self._over_budget() or self._stopped

    async def _warm_up(self) -> list[Reply]:
        replies = []
        for _ in range(self._settings.warm_up):
            item, sample = next(self._draws)
            await self._prepare([(item, sample)])
            reply = await self._backend.ask(item.messages(), self._sampling(sample))
            self._count(to_record(reply, self._settings.channel, item, sample, self._price, "unscored"))
            replies.append(reply)
        return replies

    async def _at(self, rate: float) -> Step:
        settings = self._settings
        loop = asyncio.get_running_loop()
        count = settings.requests(rate)
        drawn = [next(self._draws) for _ in range(count)]
        await self._prepare(drawn)
        await asyncio.sleep(self._rest_s)  # what this rate meets must not be what the last one used up
        # Poisson arrivals, given that there are so many in the time: no rate is missed by the luck of the draw.
        *moments, end = arrivals(1.0, count + 1, settings.seed)
        stage = f"{rate:g}/s"
        self._tell(stage, 0, count)
        flight, replies, records = InFlight(loop.time), [], []

        async def one(item: Item, sample: int, due: float) -> None:
            with flight:
                reply = await self._backend.ask(item.messages(), self._sampling(sample), due=due)
            replies.append(reply)
            verdict = await self._judge.verdict(reply, item)
            record = {"rate": rate, **to_record(reply, settings.channel, item, sample, self._price, verdict)}
            records.append(record)
            self._count(record)
            self._write(record)
            self._tell(stage, len(records), count)

        cause: Exception | None = None
        try:
            async with LoopWatch() as watch, asyncio.TaskGroup() as group:
                begun = loop.time()
                for (item, sample), moment in zip(drawn, moments, strict=True):
                    due = begun + moment / end * count / rate
                    await asyncio.sleep(max(0.0, due - loop.time()))
                    if self._over_budget():
                        break
                    group.create_task(one(item, sample, due))
        except* Exception as several:
            cause = several.exceptions[0]  # what ended one ends all; the caller is told that one thing
        if cause is not None:
            raise cause
        step = self._step(rate, records, replies, flight, watch)
        self._steps.append(step)
        self._rest_s = _rest_s(replies)
        return step

    def _step(
        self, rate: float, records: list[dict[str, Any]], replies: list[Reply], flight: InFlight, watch: LoopWatch
    ) -> Step:
        settings = self._settings
        timings = [reply.timing for reply in replies]
        late = [timing.queue_s for timing in timings if timing.queue_s is not None]
        first = timed(records, "first_token_s")
        note = client_note(self._bias, watch, flight, asked=None, queue_s=late, first_token_s=first)
        good = goodput(records, settings.objective) | {"per_s": 0.0}
        if good["asked"]:
            good["per_s"] = good["met"] / (good["asked"] / rate)
        quotas = [q for r in replies if r.outcome is Outcome.THROTTLED and (q := _quota(r)) is not None and q.told]
        return Step(
            rate=rate,
            asked=good["asked"],
            outcomes=dict(Counter(r["outcome"] for r in records).most_common()),
            answered_per_s=_pace(records),
            goodput=good,
            first_token_s=percentiles(first),
            first_answer_s=percentiles(timed(records, "first_answer_s")),
            in_flight={"mean": round(flight.mean(), 2), "peak": flight.peak()},
            client=note,
            holds=bool(good["asked"]) and good["share"]["value"] >= settings.share,
            cost=None if self._price is None else sum(r["cost"] or 0.0 for r in records),
            quota=str(quotas[-1]) if quotas else "",
        )

    def _enough(self) -> str:
        """Why higher rates would tell nothing; empty where they might."""
        last = self._steps[-1]
        if over := self._over_budget():
            return over
        if not last.asked or not any(last.outcomes.get(o) for o in ANSWERED):
            return f"no request was answered at {last.rate:g}/s ({self._first_failure})"
        if last.outcomes.get("throttled", 0) > THROTTLED_SHARE * last.asked:
            return f"{last.outcomes['throttled'] / last.asked:.0%} of the requests were throttled at {last.rate:g}/s"
        if last.client["limited"] and not last.holds:
            return f"the client was the limit at {last.rate:g}/s"
        if len(self._steps) > 1 and all(s.goodput["share"]["value"] < BROKEN_SHARE for s in self._steps[-2:]):
            return f"at {last.rate:g}/s, as before, fewer than {BROKEN_SHARE:.0%} met the objective"
        return ""

    def _over_budget(self) -> str:
        limit = self._settings.max_cost
        return f"{_BUDGET} {limit:g} was reached" if limit is not None and self._spent >= limit else ""

    async def _prepare(self, drawn: Sequence[tuple[Item, int]]) -> None:
        """Let an emulated model answer before anything is measured."""
        weather = getattr(self._backend, "weather", None)
        if weather is not None and weather.model is not None:
            asked = [(item.messages(), self._sampling(sample), 0) for item, sample in drawn]
            await self._backend.prepare(asked)  # type: ignore[attr-defined]  # only emulated channels have a weather

    def _sampling(self, sample: int) -> Sampling:
        given = self._settings.sampling
        return replace(given, seed=self._settings.seed if given.seed is None else given.seed, sample=sample)

    def _count(self, record: dict[str, Any]) -> None:
        self._spent += record["cost"] or 0.0
        self._emulated = self._emulated or record["emulated"]
        if record["outcome"] not in ANSWERED and not self._first_failure:
            self._first_failure = f"{record['outcome']}: {record['detail']}"

    def _write(self, record: dict[str, Any]) -> None:
        if self._file is not None:
            try:
                self._file.write(json.dumps(redact_texts(record), ensure_ascii=False) + "\n")
                self._file.flush()
            except OSError as error:
                raise RunError(f"the records cannot be written any more: {error.strerror}") from None

    def found(self) -> Sweep:
        """All of it, the steps by rate."""
        settings, steps = self._settings, sorted(self._steps, key=lambda step: step.rate)
        knee, broken = knee_of(steps)
        certain = False
        if knee is not None and broken is not None:
            certain = (
                knee.goodput["share"]["low"] >= settings.share and broken.goodput["share"]["high"] < settings.share
            )
        blamed = broken or knee
        found = Sweep(
            settings=json.loads(json.dumps(asdict(settings))),
            steps=tuple(steps),
            knee=None if knee is None else knee.rate,
            reached=broken is not None,
            certain=certain,
            limited="" if blamed is None else blamed.client["limited"],
            stopped=self._stopped,
            goodput_per_s=max((step.goodput["per_s"] for step in steps), default=0.0),
            cost=None if self._price is None else self._spent,
            cost_expected=self._expected,
            currency=None if self._price is None else self._price.currency,
            emulated=self._emulated,
            verdict=(),
        )
        return replace(found, verdict=in_words(found, settings))


def _draws(items: Sequence[Item]) -> Iterator[tuple[Item, int]]:
    """The items in turn, without end, each time as another draw: nothing is asked twice."""
    asked: Counter[str] = Counter()
    for item in cycle(items):
        yield item, asked[item.id]
        asked[item.id] += 1


def _pace(records: Sequence[dict[str, Any]]) -> float | None:
    ended = sorted(
        dt.datetime.fromisoformat(r["due_at"]).timestamp() + r["total_s"]
        for r in records
        if r["outcome"] in ANSWERED and r["due_at"] is not None
    )
    if len(ended) < _FEW:
        return None
    # The outer tenths are when the channel fills and empties, and one very long answer.
    low, high = len(ended) // 10, len(ended) - 1 - len(ended) // 10
    return (high - low) / span if (span := ended[high] - ended[low]) > 0 else None


def _quota(reply: Reply) -> Quota | None:
    told = reply.extra.get("quota")
    return told if isinstance(told, Quota) else None


def _rest_s(replies: Sequence[Reply]) -> float:
    """How long to wait until no quota that was told remembers these requests, in seconds."""
    throttled = (_quota(reply) for reply in replies if reply.outcome is Outcome.THROTTLED)
    wait_s = max((quota.wait_s(cap_s=_MINUTE_S) or 0.0 for quota in throttled if quota is not None), default=0.0)
    return _MINUTE_S if wait_s > _LONG_WAIT_S else wait_s
