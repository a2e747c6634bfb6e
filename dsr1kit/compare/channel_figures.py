"""Figures of the catalogue and of the doctor's accuracy: prices now and by the hour, retirements, confusion.

Colours and marks as in figures.py. Reads channels and counts; asks nothing of anyone.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING
from zoneinfo import ZoneInfo

import numpy as np

from dsr1kit.access.channels import Channel
from dsr1kit.compare.figures import COLOURS
from dsr1kit.hours import as_moment

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LINES = ("-", "--", "-.", ":")
_DAYS = 7


def prices(channels: Mapping[str, Channel], now: dt.datetime) -> Figure:
    """Input and output price of the channels that charge in USD (left); tariffs over the week to come (right)."""
    from matplotlib.figure import Figure

    priced = [
        (c, c.price.at(now))
        for c in channels.values()
        if c.price is not None and c.price.currency == "USD" and not c.price.free and not c.retired_on(now)
    ]
    priced.sort(key=lambda pair: pair[1].output)
    figure = Figure(figsize=(10.5, 1.6 + 0.3 * len(priced)), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[3, 2])
    rows = range(len(priced))
    for row, (_, price) in zip(rows, priced, strict=True):
        left.plot([price.input, price.output], [row, row], color="#BBBBBB", linewidth=2, zorder=1)
    left.scatter([p.input for _, p in priced], rows, color=COLOURS[0], marker="o", label="input", zorder=2)
    left.scatter([p.output for _, p in priced], rows, color=COLOURS[1], marker="s", label="output", zorder=2)
    left.set_yticks(rows, [c.name for c, _ in priced])
    left.set_xlim(left=0)
    left.set_xlabel("USD per million tokens, now")
    left.legend(frameon=False, fontsize=9, loc="lower right")
    tariffed = [c for c, _ in priced if c.peak is not None]
    zone = ZoneInfo(tariffed[0].peak.timezone if tariffed and tariffed[0].peak else "UTC")
    for number, channel in enumerate(tariffed):
        times, values = _by_the_hour(channel, now)
        local = [t.astimezone(zone).replace(tzinfo=None) for t in times]
        right.step(local, values, where="post", color=COLOURS[number], linestyle=_LINES[number % 4],
                   linewidth=1.8, label=channel.name)  # fmt: skip
    right.set_ylim(bottom=0)
    right.set_ylabel("USD per million output tokens")
    right.set_xlabel(f"the week to come, {zone.key}")
    if tariffed:
        import matplotlib.dates as mdates

        right.xaxis.set_major_locator(mdates.DayLocator())  # type: ignore[no-untyped-call]  # as matplotlib has it
        right.xaxis.set_major_formatter(mdates.DateFormatter("%a\n%d"))  # type: ignore[no-untyped-call]
        right.legend(frameon=False, fontsize=9, loc="upper right")
        right.set_ylim(top=right.get_ylim()[1] * 1.25)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=9)
        axes.grid(alpha=0.25)
    return figure


def _by_the_hour(channel: Channel, now: dt.datetime) -> tuple[list[dt.datetime], list[float]]:
    """Output price at `now` and at every change in the week after it."""
    price, peak = channel.price, channel.peak
    assert price is not None  # noqa: S101 - only called for tariffed channels
    assert peak is not None  # noqa: S101 - likewise
    end = now + dt.timedelta(days=_DAYS)
    times = [now, *(at for at in peak.changes(now) if at < end), end]
    return times, [price.at(at).output for at in times]


def retirements(channels: Mapping[str, Channel], now: dt.datetime) -> Figure:
    """Until when each hosted channel of R1 and its distills serves it; where no end is known, how fresh that is.

    A solid line ends at the retirement, or where the facts were last read; dotted is what nobody has announced.
    """
    from matplotlib.figure import Figure

    hosted = [c for c in channels.values() if c.family in ("r1", "r1-distill") and c.region != "local"]
    hosted.sort(key=lambda c: (c.retires_at() is None, c.retires_at() or now, c.name), reverse=True)
    figure = Figure(figsize=(8.4, 1.4 + 0.27 * len(hosted)), layout="constrained")
    axes = figure.subplots()
    today, begin, end = (_days(now + dt.timedelta(days=days)) for days in (0, -330, 100))
    for row, channel in enumerate(hosted):
        until = channel.retires_at()
        if until is not None:
            at, colour = _days(until), "#999999" if until <= now else COLOURS[1]
            axes.plot([begin, at], [row, row], color=colour, linewidth=3, solid_capstyle="butt")
            axes.plot(at, row, marker="X", color=colour, markersize=7)
            axes.annotate(f"{until:%Y-%m-%d}", (at, row), (8, 0), textcoords="offset points", va="center",
                          fontsize=8, color="#555555", bbox={"fc": "white", "ec": "none", "pad": 0.5})  # fmt: skip
            continue
        seen = max(begin, _days(channel.as_of or now))
        axes.plot([begin, seen], [row, row], color=COLOURS[2], linewidth=3, solid_capstyle="butt")
        axes.plot([seen, end], [row, row], color=COLOURS[2], linewidth=1.4, linestyle=":")
        axes.plot(end, row, marker=">", color=COLOURS[2], markersize=6)
    axes.axvline(today, color="black", linewidth=1.2, linestyle="--", zorder=0)
    axes.annotate("today", (today, len(hosted) - 0.4), (4, 0), textcoords="offset points", fontsize=9)
    axes.set_yticks(range(len(hosted)), [c.name for c in hosted])
    axes.set_xlim(begin, end + 12)
    axes.xaxis_date()
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=9)
    axes.grid(axis="x", alpha=0.25)
    axes.set_xlabel("served until (solid: known; dotted: no end announced)")
    return figure


def _days(moment: dt.date) -> float:
    """Matplotlib's unit of dates: days since the beginning of 1970, in UTC."""
    return as_moment(moment).timestamp() / 86400


def confusion(truth: Sequence[str], named: Sequence[str]) -> Figure:
    """How often each condition (rows) was named as which outcome (columns)."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys([*truth, *named]))
    counts = np.zeros((len(names), len(names)), dtype=int)
    for a, b in zip(truth, named, strict=True):
        counts[names.index(a), names.index(b)] += 1
    figure = Figure(figsize=(7.6, 6.6), layout="constrained")
    axes = figure.subplots()
    axes.imshow(np.where(counts > 0, counts, np.nan), cmap="Blues", vmin=0, vmax=max(1, counts.max()) * 1.4)
    for row, column in zip(*np.nonzero(counts), strict=True):
        axes.text(column, row, str(counts[row, column]), ha="center", va="center", fontsize=10)
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel("named by the doctor")
    axes.set_ylabel("emulated condition")
    axes.set_xticks(np.arange(len(names) + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(len(names) + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="#E5E5E5", linewidth=0.8)
    axes.tick_params(which="both", length=0, labelsize=9)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return figure
