"""A comparison before anything is spent: how many questions it takes, what they cost, how long they last.

Figures come from an earlier run of the same task where one is given, else from what was published, else from
assumptions that are told as such. Asks nothing of any channel.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path

from dsr1kit.access.channels import Channel, load_channels
from dsr1kit.access.stream import estimate_tokens
from dsr1kit.backends import EMULATED, LOCAL, is_local, price_of
from dsr1kit.compare import published
from dsr1kit.compare.detection import Detection, Need, Reach
from dsr1kit.compare.durations import Load, hosted_duration, whole_duration
from dsr1kit.compare.earlier import EarlierRun, read_run
from dsr1kit.compare.items import Item, TaskFacts
from dsr1kit.compare.money import Estimate, TokenGuess, expected_cost, observed_tokens
from dsr1kit.compare.settings import USUAL_ITEMS
from dsr1kit.compare.tasks import facts, load_task
from dsr1kit.errors import Dsr1kitError, UsageError
from dsr1kit.local.places import locate

_LOADED = 5_000  # questions; of more, the first stand for the rest


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanSettings:
    """What is to be planned.

    Attributes:
        channels: catalogue names, `emulated:FILE`, `local:MODEL`.
        items, samples: questions, and answers to each; None: as many as the difference asks for.
        difference: what is to be detected between any two channels, a share (0.03: three points).
        power: chance of detecting it, if it is there.
        like: folder of an earlier run of the same task.
        concurrency, rate: as in a run; a rate goes before.
        max_tokens: longest completion.
        seed: of the items.
    """

    channels: tuple[str, ...]
    task: str = "arithmetic"
    items: int | None = None
    samples: int | None = None
    difference: float = 0.03
    power: float = 0.8
    like: Path | None = None
    concurrency: int = 4
    rate: float | None = None
    max_tokens: int = 32768
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.channels:
            raise UsageError("a plan needs at least one channel")
        twice = [c for c in self.channels if self.channels.count(c) > 1]
        if twice:
            raise UsageError(f"channel {twice[0]!r} is named twice")
        for name in ("items", "samples", "concurrency", "rate", "max_tokens"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UsageError(f"{name} must be above 0, not {value}")
        for name in ("difference", "power"):
            if not 0 < getattr(self, name) < 1:
                raise UsageError(f"{name} must lie between 0 and 1, not at {getattr(self, name):g}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ChannelPlan:
    """What one channel's part takes.

    Attributes:
        each_s: seconds of one request, mean; None: unknown.
        notes: limits that it will meet, and the like; those about money are the estimate's.
    """

    channel: str
    estimate: Estimate
    each_s: float | None
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparisonPlan:
    """The whole plan.

    Attributes:
        facts: of the task.
        items, samples: what was planned for: the settings' own, or what the difference asks for.
        comparisons: pairs of channels; the chance of a false alarm is shared among them.
        needs: what it takes to detect the difference; reaches: what the planned size detects. Both are empty for a
            single channel.
        seconds: of the whole run; None: unknown. least_seconds: what known limits make it last at least.
        notes: what a person should know before paying.
    """

    facts: TaskFacts
    items: int
    samples: int
    difference: float
    power: float
    comparisons: int
    needs: tuple[Need, ...]
    reaches: tuple[Reach, ...]
    channels: tuple[ChannelPlan, ...]
    seconds: float | None
    least_seconds: float | None
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Known:
    """What is at hand about the channels of a plan."""

    settings: PlanSettings
    catalogue: Mapping[str, Channel]
    task: TaskFacts
    earlier: EarlierRun | None
    models: Mapping[str, str]

    def limit(self, name: str) -> int:
        """Longest completion of a channel, in tokens."""
        most = self.catalogue[name].max_output if name in self.catalogue else None
        return min(self.settings.max_tokens, most or self.settings.max_tokens)


def plan_comparison(
    settings: PlanSettings, *, channel_file: str | Path | None = None, at: dt.datetime | None = None
) -> ComparisonPlan:
    """Plan a comparison that begins at `at` (timezone-aware; None: now).

    Raises:
        UsageError: unknown names, an earlier run of another task or without answers, more questions than there are.
        ModelError: a local model that is not there.
    """
    catalogue = load_channels(channel_file)
    prices = {name: price_of(name, catalogue) for name in settings.channels}
    earlier = None if settings.like is None else read_run(settings.like, settings.task)
    models = {name: _model(name, catalogue) for name in settings.channels}
    known = _Known(settings, catalogue, facts(settings.task), earlier, models)
    found = _detection(known)
    known = replace(known, task=_counted(settings, known.task, _size(settings, known.task, found)[0]))
    found = replace(found, size=known.task.size)
    count, samples = _size(settings, known.task, found)
    items, missing = _questions(settings, known.task, count)
    guesses = {name: _guess(name, known) for name in settings.channels}
    begin = at or dt.datetime.now(dt.UTC)

    def estimates(duration: float | None) -> dict[str, Estimate]:
        span = None if duration is None else dt.timedelta(seconds=duration)
        return {name: expected_cost(items, samples, prices[name], guesses[name], begin, span) for name in prices}

    # Tokens first, which decide how long it takes; then the money, which depends on when.
    loads = [_load(name, estimate, known) for name, estimate in estimates(None).items()]
    hosted = hosted_duration(loads, settings.concurrency, settings.rate)
    whole = whole_duration(loads, settings.concurrency, settings.rate)
    priced = estimates(hosted.expected)
    return ComparisonPlan(
        facts=known.task,
        items=len(items),
        samples=samples,
        difference=settings.difference,
        power=settings.power,
        comparisons=found.comparisons,
        needs=tuple(found.needs(samples)),
        reaches=tuple(found.reaches(len(items), samples)),
        channels=tuple(
            ChannelPlan(
                channel=load.channel,
                estimate=priced[load.channel],
                each_s=load.each_s,
                notes=tuple(_remarks(load, known)),
            )
            for load in loads
        ),
        seconds=whole.expected,
        least_seconds=whole.least,
        notes=(*missing, *found.notes(len(items), samples), *_time_notes(loads)),
    )


def _model(name: str, catalogue: Mapping[str, Channel]) -> str:
    if is_local(name):
        source = name.removeprefix(LOCAL).partition("@")[0]
        locate(source)
        return source
    if name.startswith(EMULATED):
        from dsr1kit.emulator.weather import load_weather

        return load_weather(name.removeprefix(EMULATED)).served_model
    return catalogue[name].model


def _detection(known: _Known) -> Detection:
    """What decides how many questions it takes: the spread of an earlier run, else an assumed accuracy."""
    settings, earlier = known.settings, known.earlier
    pairs = list(combinations(settings.channels, 2))
    pilots = {}
    shares = []
    if earlier is not None:
        judged = {name: earlier.judged(source) for name in settings.channels if (source := _source(name, known))}
        pilots = {f"{a} / {b}": (judged[a], judged[b]) for a, b in pairs if a in judged and b in judged}
        shares = [sum(map(sum, found.values())) / sum(map(len, found.values())) for found in judged.values() if found]
    told = [s for m in known.models.values() for s in published.scores(m, settings.task) if s.metric == "pass@1"]
    if shares:
        share, source = sum(shares) / len(shares), "the earlier run's mean accuracy"
    elif told:
        share, source = told[0].value / 100, f"published for {told[0].model}: {told[0].source}"
    else:
        share, source = 0.5, "nothing is known; this takes the most questions"
    return Detection(
        difference=settings.difference, power=settings.power, comparisons=len(pairs), size=known.task.size,
        share=share, share_source=source, pilots=pilots,
    )  # fmt: skip


def _source(name: str, known: _Known) -> str:
    return known.earlier.like(name, known.models[name]) if known.earlier is not None else ""


def _size(settings: PlanSettings, task: TaskFacts, found: Detection) -> tuple[int, int]:
    """How many questions, and answers to each: as asked for, else as the difference needs."""
    items, samples = settings.items, settings.samples
    if samples is None:
        samples = found.fewest_samples() if items is None else 1
    if items is None:
        items = found.items_for(samples) if found.comparisons else USUAL_ITEMS
        items = items if task.size is None else min(items, task.size)
    elif task.size is not None and items > task.size:
        raise UsageError(f"task {task.name!r} has {task.size:,} questions, not {items:,}: plan for at most that many")
    return items, samples


def _questions(settings: PlanSettings, task: TaskFacts, count: int) -> tuple[list[Item], list[str]]:
    """The questions, for their length; blank ones, and a note, where a public set cannot be had here."""
    try:
        found = load_task(settings.task, min(count, _LOADED), settings.seed)
    except Dsr1kitError as error:
        if task.offline:
            raise
        blank = Item(task.name, "", "", "", task.languages[0])
        return [blank] * count, [
            f"tokens of prompts are not counted, nor what they cost, for the questions are not here: {error}"
        ]
    return [found[number % len(found)] for number in range(count)], []


def _counted(settings: PlanSettings, task: TaskFacts, wanted: int) -> TaskFacts:
    """The task with its size, where it turns out to have fewer questions than wanted and none knew how many."""
    if task.size is not None or settings.items is not None:
        return task
    few, many = 0, min(wanted, _LOADED)
    try:
        load_task(settings.task, many, settings.seed)
    except UsageError:
        while many - few > 1:
            middle = (few + many) // 2
            try:
                load_task(settings.task, middle, settings.seed)
                few = middle
            except UsageError:
                many = middle
        if few == 0:
            raise
        return replace(task, size=few)
    return task


def _guess(name: str, known: _Known) -> TokenGuess:
    most = known.limit(name)
    source = _source(name, known)
    if source and known.earlier is not None:
        seen = observed_tokens(known.earlier.records[source])
        if seen:
            where = f"the run in {known.earlier.folder}"
            return TokenGuess(most=most, observed=seen, source=where if source == name else f"{source} in {where}")
    return published_guess(known.models[name], known.task, most, _counter(name))


def published_guess(
    model: str, task: TaskFacts, most: int, count: Callable[[str], int] = estimate_tokens
) -> TokenGuess:
    """How many tokens an answer takes by what was published of the model, else of the task; nothing is made up.

    Args:
        most: longest completion that may come.
        count: tokens in a prompt's text.
    """
    length = published.mean_tokens(model, task.name)
    if length is not None:
        return TokenGuess(most=most, completion=length.tokens, source=length.source, count=count)
    return TokenGuess(most=most, completion=task.expected_completion_tokens, source=task.tokens_source, count=count)


def _counter(name: str) -> Callable[[str], int]:
    """What counts the tokens of a text: a local model's own tokenizer, without loading the model, else an estimate."""
    if not is_local(name):
        return estimate_tokens
    file = Path(locate(name.removeprefix(LOCAL).partition("@")[0])[0]) / "tokenizer.json"
    if not file.is_file():
        return estimate_tokens
    try:
        from tokenizers import Tokenizer
    except ImportError:  # of the extra `local`; a plan can do without
        return estimate_tokens
    tokenizer = Tokenizer.from_file(str(file))
    return lambda text: len(tokenizer.encode(text).ids)


def _load(name: str, estimate: Estimate, known: _Known) -> Load:
    channel = known.catalogue.get(name)
    tokens = estimate.completion_tokens
    return Load(
        channel=name,
        local=is_local(name),
        requests=estimate.requests,
        tokens=None if tokens is None else tokens + (estimate.prompt_tokens or 0.0),
        # Latency is the channel's own: another one with the same model says nothing about it.
        each_s=None if known.earlier is None else known.earlier.seconds(name),
        requests_per_minute=channel.requests_per_minute if channel else None,
        tokens_per_minute=channel.tokens_per_minute if channel else None,
        max_in_flight=channel.max_in_flight if channel else None,
    )


def _remarks(load: Load, known: _Known) -> list[str]:
    """What a person should know of a channel before asking so much of it."""
    settings, channel, earlier = known.settings, known.catalogue.get(load.channel), known.earlier
    said = []
    if channel is not None and (closed := channel.closed_because()):
        said.append(f"cannot be used now: {closed}")
    if known.limit(load.channel) < settings.max_tokens:
        said.append(f"answers are cut at its longest output of {known.limit(load.channel):,} tokens")
    source = _source(load.channel, known)
    if earlier is not None and not source:
        said.append(f"the run in {earlier.folder} did not ask this model")
    elif earlier is not None and (cut := earlier.truncated(source)) and (earlier.max_tokens or 0) < settings.max_tokens:
        said.append(f"{cut} answers of the earlier run were stopped by its length limit: these may be longer")
    if earlier is not None and earlier.emulated(source) and not load.channel.startswith(EMULATED):
        said.append(f"its figures come from an emulated provider ({source} in {earlier.folder})")
    hosted = sum(not is_local(name) for name in settings.channels)
    if load.requests_per_minute is not None and settings.rate is not None:
        asked = 60 * settings.rate / hosted
        if asked > load.requests_per_minute:
            said.append(
                f"{asked:.3g} requests a minute are more than its limit of {load.requests_per_minute:g}: they queue"
            )
    if load.max_in_flight is not None and settings.rate is None and settings.concurrency > load.max_in_flight * hosted:
        said.append(f"its limit of {load.max_in_flight} requests at a time is below its part of the concurrency")
    floor = load.floor_s()
    if floor:
        said.append(f"its limits make it last at least {spoken(floor)}")
    return said


def _time_notes(loads: Sequence[Load]) -> list[str]:
    unknown = [load.channel for load in loads if load.each_s is None]
    if not unknown:
        return []
    which = "no latency is known" if len(unknown) == len(loads) else f"no latency of {', '.join(unknown)} is known"
    return [f"{which}, so how long the run takes is not; a run of a few questions, named by --like, tells it"]


def spoken(seconds: float) -> str:
    """A length of time for people: `40 s`, `12 min`, `3.5 h`, `2.1 days`."""
    for unit, length in (("days", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= (2 if unit == "days" else 1.5) * length:
            return f"{seconds / length:.2g} {unit}" if seconds < 10 * length else f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
