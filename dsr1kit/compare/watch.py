"""One small question at regular intervals: availability and latency by hour of day, on a person's own channels.

Writes records as a comparison does, into a folder that the same command goes on with after a restart; moments
that passed meanwhile are missed, not made up for. Knows nothing about printing.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from dsr1kit import about
from dsr1kit.access.channels import Channel, load_channels
from dsr1kit.access.doctor import QUESTION, SMALL_LIMIT
from dsr1kit.backends import EMULATED, is_local, open_backend, price_of
from dsr1kit.compare import figures, report
from dsr1kit.compare.journal import Journal, read_records
from dsr1kit.compare.judge import verdict_of
from dsr1kit.compare.record import to_record
from dsr1kit.compare.stats import clustered_share, median_interval, median_ratio
from dsr1kit.compare.summary import Record, name_of, summarize, timed
from dsr1kit.compare.tasks import Item
from dsr1kit.errors import RunError, UsageError
from dsr1kit.hours import Spans, within
from dsr1kit.keys import require_key
from dsr1kit.records import ANSWERED, Backend, Reply, Sampling

#: The hours in which "server busy" was at its worst, by the article that the kit began from: 3.2 times slower.
PEAK_HOURS: Spans = ((10.0, 12.0), (15.0, 17.0))
PEAK_ZONE = "Asia/Shanghai"

_ITEM = Item(id="watch", prompt=QUESTION[0]["content"], gold="42", kind="watch", language="en")
_DRAW_EVERY_S = 60.0

#: Told of each moment: its number, how many there are, and the replies by channel.
OnTick = Callable[[int, int, Mapping[str, Reply]], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchSettings:
    """What is watched.

    Attributes:
        channels: catalogue names and `emulated:FILE`.
        every_s: seconds from one question to the next.
        for_s: how long, from the first question in the folder, by the clock on the wall: moments at which nothing
            was running are missed.
        peak_hours, timezone: the hours whose latency is set against that of the others.
        first_token_s, stall_s: limits of each question, in seconds.
    """

    channels: tuple[str, ...]
    every_s: float
    for_s: float
    peak_hours: Spans = PEAK_HOURS
    timezone: str = PEAK_ZONE
    first_token_s: float = 60.0
    stall_s: float = 30.0

    def __post_init__(self) -> None:
        if not self.channels:
            raise UsageError("a watch needs at least one channel")
        twice = [c for c in self.channels if self.channels.count(c) > 1]
        if twice:
            raise UsageError(f"channel {twice[0]!r} is named twice")
        for name in self.channels:
            if is_local(name):
                raise UsageError(f"{name} runs in this process; a watch is for channels that can be busy")
        for name in ("every_s", "for_s", "first_token_s", "stall_s"):
            if not 0 < getattr(self, name) < math.inf:
                raise UsageError(f"{name} must be above 0 seconds and finite, not {getattr(self, name)}")
        if not all(0 <= low < high <= 24 for low, high in self.peak_hours):
            raise UsageError(
                f"peak_hours must be spans within a day such as ((10, 12), (22, 24)), not {self.peak_hours}"
            )
        try:
            ZoneInfo(self.timezone)
        except (ZoneInfoNotFoundError, ValueError, OSError):  # OSError: a folder of zones, such as Europe
            raise UsageError(f"no such time zone {self.timezone!r}; expected one such as Asia/Shanghai") from None

    @property
    def ticks(self) -> int:
        """How many moments there are; the first is at once."""
        return max(1, int(self.for_s // self.every_s) + (1 if self.for_s % self.every_s else 0))


class Watched(NamedTuple):
    """A watch's folder, its files, and the summary as data."""

    folder: Path
    records: Path
    summary_path: Path
    report: Path
    summary: dict[str, Any]


async def watch(
    settings: WatchSettings,
    out: str | Path,
    *,
    channels: Mapping[str, Channel] | None = None,
    on_tick: OnTick | None = None,
    clock: Callable[[], float] = time.time,
    sleep: Callable[[float], Any] = asyncio.sleep,
) -> Watched:
    """Watch, or go on watching, in the folder `out`, until its time is over.

    Args:
        channels: the catalogue; None: the shipped one and the person's own.
        on_tick: told of each moment that was asked at.
        clock, sleep: seconds since the epoch, and how to wait for them; a rehearsal runs a day in a minute.

    Raises:
        UsageError: unknown names, missing keys, a folder of another run; before anything is asked.
        RunError: the folder can no longer be written.
    """
    catalogue = load_channels() if channels is None else channels
    for name in settings.channels:
        if name in catalogue or not name.startswith(EMULATED):
            _openable(catalogue[name])
    prices = {n: catalogue[n].price if n in catalogue else price_of(n, catalogue) for n in settings.channels}
    identity = {"watch": True, **asdict(settings), "channels": list(settings.channels)}
    del identity["for_s"]  # a longer watch goes on with a shorter one
    surroundings = {"versions": about.versions(), "hardware": about.hardware(), **_contracts(settings, catalogue)}
    folder = Path(out)
    with Journal(folder, identity, surroundings) as journal:
        done = {sample for channel, _, sample in journal.done() if channel == settings.channels[-1]}
        drawn_at = time.monotonic()
        async with AsyncExitStack() as stack:
            known = journal.read()
            over = bool(known) and clock() >= _began(known, settings.every_s, 0.0) + settings.ticks * settings.every_s
            emulated = {} if over else await _start_emulators(settings, catalogue, stack)
            began = _began(known, settings.every_s, clock())
            for tick in range(settings.ticks):
                due = began + tick * settings.every_s
                if tick in done or clock() >= due + settings.every_s:
                    continue  # asked before, or missed while nobody watched
                await sleep(max(0.0, due - clock()))
                asked_at = clock()
                asked = [name for name in settings.channels if (name, _ITEM.id, tick) not in journal.done()]
                replies = await asyncio.gather(*(_ask(name, settings, catalogue, emulated) for name in asked))
                for name, reply in zip(asked, replies, strict=True):
                    moment = dt.datetime.fromtimestamp(asked_at, dt.UTC).isoformat()
                    verdict = verdict_of(reply, _ITEM)
                    journal.append(to_record(reply, name, _ITEM, tick, prices[name], verdict) | {"due_at": moment})
                if on_tick is not None:
                    on_tick(tick + 1, settings.ticks, dict(zip(asked, replies, strict=True)))
                if time.monotonic() - drawn_at >= _DRAW_EVERY_S and tick + 1 < settings.ticks:
                    finish_watch(folder)  # there to be looked at while the watch goes on
                    drawn_at = time.monotonic()
    return finish_watch(folder)


def _openable(channel: Channel) -> None:
    channel.open()  # raises where something is still to fill in
    if channel.protocol == "chat-completions" and channel.api_key_env:
        require_key(channel.api_key_env, channel.name)


def _contracts(settings: WatchSettings, catalogue: Mapping[str, Channel]) -> dict[str, Any]:
    known = [catalogue[name] for name in settings.channels if name in catalogue]
    return {
        "promises": {c.name: c.availability for c in known if c.availability is not None},
        "warnings": [w for c in known if (w := c.retirement_warning())],
    }


async def _start_emulators(
    settings: WatchSettings, catalogue: Mapping[str, Channel], stack: AsyncExitStack
) -> dict[str, Backend]:
    clocks: dict[str, Any] = {"first_token_s": settings.first_token_s, "stall_s": settings.stall_s}
    return {
        name: await stack.enter_async_context(open_backend(name, {}, **clocks))
        for name in settings.channels
        if name.startswith(EMULATED) and name not in catalogue
    }


async def _ask(
    name: str, settings: WatchSettings, catalogue: Mapping[str, Channel], emulated: Mapping[str, Backend]
) -> Reply:
    sampling = Sampling(max_tokens=SMALL_LIMIT)
    if name in emulated:
        return await emulated[name].ask(QUESTION, sampling)
    # Opened for each question: over ten minutes a kept connection is closed anyway, and connecting is news too.
    clocks = {"first_token_s": settings.first_token_s, "stall_s": settings.stall_s}
    async with catalogue[name].open(**clocks) as client:
        return await client.ask(QUESTION, sampling)


def _began(records: Sequence[Record], every_s: float, now: float) -> float:
    """When the first moment was, in seconds since the epoch: by the first record, or now."""
    if not records:
        return now
    asked = dt.datetime.fromisoformat(records[0]["due_at"]).timestamp()
    return asked - int(records[0]["sample"]) * every_s


def _run(folder: Path) -> dict[str, Any]:
    run: dict[str, Any] = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    return run


def by_hour(records: Sequence[Record], timezone: str = PEAK_ZONE) -> list[dict[str, Any]]:
    """Availability and first-token time by hour of day, for the hours that were watched.

    Returns one dict an hour: hour (0 to 23 in `timezone`), n, availability and first_token_s, each with value,
    low and high (95 %) or None.
    """
    zone = ZoneInfo(timezone)
    hours: dict[int, list[Record]] = {}
    for r in records:
        hours.setdefault(_local(r, zone).hour, []).append(r)
    out = []
    for hour, rs in sorted(hours.items()):
        share = clustered_share({str(n): [r["outcome"] in ANSWERED] for n, r in enumerate(rs)})
        first = median_interval(timed(rs, "first_token_s"))
        out.append(
            {
                "hour": hour,
                "n": len(rs),
                "availability": None if share is None else share._asdict(),
                "first_token_s": None if first is None else first._asdict(),
            }
        )
    return out


def peak_ratio(records: Sequence[Record], spans: Spans = PEAK_HOURS, timezone: str = PEAK_ZONE) -> dict[str, Any]:
    """First-token time inside the peak hours over that outside, medians, with a 95 % interval where there is one."""
    zone = ZoneInfo(timezone)
    inside = [r for r in records if within(spans, _local(r, zone))]
    outside = [r for r in records if not within(spans, _local(r, zone))]
    ratio = median_ratio(timed(inside, "first_token_s"), timed(outside, "first_token_s"))
    return {
        "n_inside": len(inside),
        "n_outside": len(outside),
        "ratio": None if ratio is None else ratio._asdict(),
        "answered_inside": _answered(inside),
        "answered_outside": _answered(outside),
    }


def _answered(records: Sequence[Record]) -> float | None:
    return sum(r["outcome"] in ANSWERED for r in records) / len(records) if records else None


def _local(record: Record, zone: ZoneInfo) -> dt.datetime:
    return dt.datetime.fromisoformat(record["due_at"]).astimezone(zone)


def finish_watch(folder: str | Path) -> Watched:
    """Write summary.json and report.html from what the folder holds so far."""
    folder = Path(folder)
    run, records = _run(folder), read_records(folder / "records.jsonl")
    identity = run["identity"]
    names, zone = identity["channels"], identity["timezone"]
    spans = tuple((low, high) for low, high in identity["peak_hours"])
    mine = {name: [r for r in records if r["channel"] == name] for name in names}
    # Each moment stands for itself; as draws of one question they would count as one.
    alone = [{**r, "item": f"{r['item']}-{r['sample']}"} for r in records]
    summary: dict[str, Any] = summarize(alone, names, run.get("promises")) | {
        "run": run["run"],
        "every_s": identity["every_s"],
        "moments": _moments(records),
        "timezone": zone,
        "by_hour": {name: by_hour(rs, zone) for name, rs in mine.items()},
        "peak": {name: peak_ratio(rs, spans, zone) for name, rs in mine.items()},
    }
    summary["verdict"] = [_verdict(name, summary, spans) for name in names]
    if missed := summary["moments"]["missed"]:
        whole = summary["moments"]["asked"] + missed
        summary["verdict"].append(f"{missed} of {whole} moments were missed: nothing was running then.")
    paths = {"summary": folder / "summary.json", "report": folder / "report.html"}
    rendered = report.fill("watch.html.j2", **_shown(run, summary, spans))
    try:
        paths["summary"].write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        paths["report"].write_text(rendered, encoding="utf-8")
    except OSError as error:
        raise RunError(f"{error.filename} cannot be written ({error.strerror}); the records are whole") from None
    return Watched(folder, folder / "records.jsonl", paths["summary"], paths["report"], summary)


def _moments(records: Sequence[Record]) -> dict[str, int]:
    """How many moments were asked at, and how many before the last of them were missed."""
    asked = {r["sample"] for r in records}
    return {"asked": len(asked), "missed": max(asked) + 1 - len(asked) if asked else 0}


def _verdict(name: str, summary: Mapping[str, Any], spans: Spans) -> str:
    c, peak = summary["channels"][name], summary["peak"][name]
    label = name_of(name, c)
    if not c["n"]:
        return f"{label}: nothing asked yet."
    share = c["availability"]
    told = f"{label}: answered {share['value']:.1%} of {c['n']} ({share['low']:.1%} to {share['high']:.1%})"
    if c["promise"]:
        told += f", {100 * c['promise']['promised']:.6g}% promised ({c['promise']['held']})"
    first = c["first_token_s"]
    told += f"; first token after {first['p50']:.2f} s (median)" if first else ""
    when = ", ".join(f"{low:g}-{high:g}" for low, high in spans)
    ratio = peak["ratio"]
    if ratio is None:
        return f"{told}; too few questions inside or outside {when} o'clock to compare them."
    sure = f"{ratio['value']:.2f} times as long ({ratio['low']:.2f} to {ratio['high']:.2f})"
    shown = "" if ratio["low"] > 1 or ratio["high"] < 1 else ": no difference shown"
    return f"{told}; at {when} o'clock {sure} as at other hours{shown}."


def _shown(run: Mapping[str, Any], summary: Mapping[str, Any], spans: Spans) -> dict[str, Any]:
    channels = summary["channels"]
    return {
        "run": run,
        "summary": summary,
        "labels": {name: name_of(name, c) for name, c in channels.items()},
        "emulated": [name_of(name, c) for name, c in channels.items() if c["emulated"]],
        "when": ", ".join(f"{low:g}–{high:g}" for low, high in spans),
        "figures": {
            "hours": figures.to_svg(figures.by_hour(summary["by_hour"], channels, spans, summary["timezone"])),
            "outcomes": figures.to_svg(figures.outcomes(channels)),
        },
    }
