"""Figures of how a run went: distributions of latency, where the time goes, outcomes over time, pass@k.

Colours and marks as in figures.py; curves are thinned to what an eye can tell, so that a figure is as large for a
million records as for a thousand. Reads summaries and records; knows nothing about HTML.
"""

from __future__ import annotations

import datetime as dt
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dsr1kit.compare import figures
from dsr1kit.compare.figures import COLOURS, LINES, MARKERS, WIDTH, label, legend, sheet
from dsr1kit.compare.summary import Record, censored

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Values = NDArray[Any]

_MOST_POINTS = 500
_MOST_BINS = 60
_BIN_S = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 21600, 43200, 86400, 604800)
#: A pause shorter than this is no gap, however short the run.
_LEAST_PAUSE_S = 60.0
#: The stages of a request, in the order in which they pass: field of `time_split`, name, colour, hatch.
STAGES = (
    ("client_s", "client", "#000000", ""),
    ("connect_s", "connect", "#CC79A7", "xx"),
    ("wait_s", "wait for the first token (queue and prefill)", "#E69F00", "//"),
    ("think_s", "thinking", "#56B4E9", ".."),
    ("answer_s", "answering", "#0072B2", ""),
)


def distributions(records: Sequence[Record], channels: Mapping[str, Any]) -> Figure:
    """Share of first answers that had begun by a time, one curve a channel.

    Where requests ended before any answer there is a second panel that counts them, by Kaplan and Meier; its ticks
    are the moments at which such requests ended.
    """
    by_channel: defaultdict[str, list[Record]] = defaultdict(list)
    for r in records:
        by_channel[r["channel"]].append(r)
    found = {name: censored(by_channel[name]) for name in channels}
    late = any(not all(ended) for _, ended, _ in found.values())
    figure, grid = sheet(WIDTH, 4.2, ncols=2 if late else 1, sharey=True, squeeze=False)
    drawn, span = 0, [np.inf, 0.0]
    for number, (name, (times, ended, _)) in enumerate(found.items()):
        at, came = np.asarray(times, dtype=float), np.asarray(ended, dtype=bool)
        if not came.any():
            continue
        drawn += 1
        span = [min(span[0], at[at > 0].min(initial=np.inf)), max(span[1], at.max())]
        look: dict[str, Any] = {"color": COLOURS[number % len(COLOURS)], "linestyle": LINES[number % len(LINES)]}
        for axes, (x, y) in zip(grid[0], (_came_by(at[came]), _came_by(at, came)), strict=False):
            axes.step(x, y * 100, where="post", linewidth=2, label=label(name, channels), **look)
        if late and not came.all():
            x, y = _came_by(at, came)
            stopped = _thinned(np.sort(at[~came]), 60)
            heights = y[np.maximum(0, np.searchsorted(x, stopped, side="right") - 1)] * 100
            grid[0][1].plot(stopped, heights, linestyle="", marker="|", markersize=9, color=look["color"])
    for axes in grid[0]:
        if span[1] > 20 * span[0] > 0:
            axes.set_xlim(span[0] * 0.9, span[1] * 1.1)
            figures.log_ticks(axes)
        else:
            axes.set_xlim(left=0)
        axes.set_ylim(0, 101)
        axes.grid(alpha=0.25)
        axes.set_xlabel("time to the first answer (s)")
    grid[0][0].set_ylabel("answers begun by then (%)")
    if late:
        grid[0][0].set_title("of the answers that came", fontsize=10)
        grid[0][1].set_title("of all that were waited for ( | where waiting ended)", fontsize=10)
    legend(figure, drawn, handles=grid[0][0].get_legend_handles_labels()[0])
    return figure


def _came_by(times: Values, came: Values | None = None) -> tuple[Values, Values]:
    """The share that had come by each time, as a step curve of at most 500 points; Kaplan-Meier where some did not."""
    order = np.argsort(times, kind="stable")
    at = times[order]
    happened = np.ones(len(at)) if came is None else came[order].astype(float)
    moments, first = np.unique(at, return_index=True)
    at_risk = len(at) - first
    events = np.add.reduceat(happened, first)
    share = 1 - np.cumprod(1 - events / at_risk)
    x, y = np.concatenate(([moments[0]], moments)), np.concatenate(([0.0], share))
    return _thinned(x, _MOST_POINTS), _thinned(y, _MOST_POINTS)


def _thinned(values: Values, most: int) -> Values:
    if len(values) <= most:
        return values
    return np.take(values, np.linspace(0, len(values) - 1, most).round().astype(int))


def where_time_goes(channels: Mapping[str, Any]) -> Figure:
    """Mean seconds of an answered request in each stage (left), and their shares (right); hosted above local."""
    split = {name: channels[name]["time_split"] for name in by_place(channels) if channels[name]["time_split"]}
    figure, (left, right) = sheet(WIDTH, 1.5 + 0.6 * max(1, len(split)), ncols=2, sharey=True, width_ratios=[3, 2])
    wholes = [sum(stages.values()) for stages in split.values()]
    rows = range(len(split))
    begun, shares_begun = np.zeros(len(split)), np.zeros(len(split))
    for field, stage, colour, hatch in STAGES:
        spent = np.array([stages[field] for stages in split.values()])
        shares = spent / np.maximum(wholes, 1e-12) * 100
        look: dict[str, Any] = {"color": colour, "hatch": hatch, "edgecolor": "white", "linewidth": 0.6, "height": 0.6}
        left.barh(rows, spent, left=begun, label=stage, **look)
        right.barh(rows, shares, left=shares_begun, **look)
        begun, shares_begun = begun + spent, shares_begun + shares
    for row, whole in zip(rows, wholes, strict=True):
        left.annotate(f"{whole:.3g} s", (whole, row), (4, 0), textcoords="offset points", va="center", fontsize=9)
    left.set_yticks(rows, [label(name, channels) for name in split])
    left.set_ylim(max(1, len(split)) - 0.5, -0.5)
    left.set_xlim(0, max(wholes, default=1.0) * 1.18)
    left.set_xlabel("mean seconds of a request")
    right.set_xlim(0, 100)
    right.set_xlabel("share of its time (%)")
    legend(figure, len(STAGES) if split else 0, 5, handles=left.get_legend_handles_labels()[0], columnspacing=1.2)
    return figure


def by_place(channels: Mapping[str, Any]) -> list[str]:
    """Channels in their order, local ones last."""
    return sorted(channels, key=lambda name: name.startswith("local:"))


class Passage(NamedTuple):
    """A run cut into equal spans of time, pauses taken out.

    Attributes:
        span_s: seconds of a span.
        begins: when each span begins, in seconds since the epoch.
        counts: for each channel and outcome, requests due in each span.
        pauses: spans before which there was a pause, and its seconds.
    """

    span_s: float
    begins: list[float]
    counts: dict[str, dict[str, list[int]]]
    pauses: dict[int, float]


def passage(records: Sequence[Record]) -> Passage | None:
    """Outcomes over time, by when a request was due; None where no record tells when."""
    dues = [(dt.datetime.fromisoformat(r["due_at"]).timestamp(), r) for r in records if r.get("due_at")]
    if not dues:
        return None
    moments = np.array([at for at, _ in dues])
    ordered = np.sort(moments)
    starts = _stretches(ordered)
    ends = [*starts[1:], len(ordered)]
    lengths = [float(ordered[e - 1] - ordered[s]) for s, e in zip(starts, ends, strict=True)]
    span_s = next((s for s in _BIN_S if sum(int(n // s) + 1 for n in lengths) <= _MOST_BINS), max(lengths))
    begins: list[float] = []
    pauses: dict[int, float] = {}
    for number, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        if number:
            pauses[len(begins)] = float(ordered[start] - ordered[start - 1])
        begins += [float(ordered[start]) + i * span_s for i in range(int(length // span_s) + 1)]
    where = np.searchsorted(begins, moments, side="right") - 1
    counts: dict[str, dict[str, list[int]]] = {}
    for (_, r), place in zip(dues, where, strict=True):
        row = counts.setdefault(r["channel"], {}).setdefault(r["outcome"], [0] * len(begins))
        row[int(place)] += 1
    return Passage(float(span_s), begins, counts, pauses)


def _stretches(ordered: Values) -> list[int]:
    """Where each unbroken stretch begins: a pause longer than a quarter of what is left is cut out, then the next."""
    gaps = np.diff(ordered)
    left = float(ordered[-1] - ordered[0])
    cuts: list[int] = []
    for place in np.argsort(-gaps):
        if gaps[place] < _LEAST_PAUSE_S or gaps[place] < left / 4 or len(cuts) == _MOST_BINS // 4:
            break
        left -= float(gaps[place])
        cuts.append(int(place) + 1)
    return [0, *sorted(cuts)]


def over_time(passed: Passage, channels: Mapping[str, Any]) -> Figure:
    """Requests by when they were due, stacked by outcome, one row a channel; a dotted line marks a pause."""
    shown = [name for name in channels if name in passed.counts]
    figure, grid = sheet(WIDTH, 1.2 + 1.15 * len(shown), nrows=len(shown), sharex=True, squeeze=False)
    places = np.arange(len(passed.begins)) + 0.5
    handles: dict[str, Any] = {}
    for axes, name in zip(grid[:, 0], shown, strict=True):
        floor = np.zeros(len(places))
        for outcome in figures.OUTCOMES:
            if outcome in passed.counts[name]:
                counts = np.array(passed.counts[name][outcome])
                some = counts > 0
                look = figures.outcome_style(outcome)
                handles[outcome] = axes.bar(places[some], counts[some], bottom=floor[some], width=1.0, **look)
                floor += counts
        for place, lasted in passed.pauses.items():
            axes.axvline(place, color="#1b1f24", linestyle=":", linewidth=1.4)
            if axes is grid[0, 0]:
                axes.annotate(f"pause {_long(lasted)}", (place, 1), (2, 2), xycoords=("data", "axes fraction"),
                              textcoords="offset points", fontsize=8)  # fmt: skip
        axes.set_ylim(0, max(1.0, floor.max() * 1.08))
        axes.yaxis.get_major_locator().set_params(integer=True, nbins=3)
        axes.set_title(label(name, channels).replace("\n", ""), fontsize=9, loc="left", pad=14 if passed.pauses else 4)
    last = grid[-1, 0]
    last.set_xlim(0, max(1, len(places)))
    ticks = sorted({int(i) for i in np.linspace(0, len(places) - 1, min(7, len(places)))})
    last.set_xticks(ticks, [clock(passed.begins[i], passed) for i in ticks])
    last.set_xlabel(f"when requests were due (UTC), in spans of {_long(passed.span_s)}")
    order = [o for o in figures.OUTCOMES if o in handles]
    legend(figure, len(order), 6, handles=[handles[o] for o in order], labels=order)
    return figure


def clock(at: float, passed: Passage) -> str:
    """A moment of the run as UTC, as exactly as its spans ask for."""
    moment = dt.datetime.fromtimestamp(at, dt.UTC)
    days = (
        dt.datetime.fromtimestamp(passed.begins[0], dt.UTC).date()
        != dt.datetime.fromtimestamp(passed.begins[-1], dt.UTC).date()
    )
    return moment.strftime(("%m-%d " if days else "") + ("%H:%M" if passed.span_s >= 60 else "%H:%M:%S"))


def _long(seconds: float) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s"


def pass_at_k(channels: Mapping[str, Any]) -> Figure:
    """pass@k over k with 95 % intervals, one curve a channel; a hollow diamond is the majority of all samples."""
    figure, axes = sheet(WIDTH, 4.0)
    shown = {name: c["pass_curve"] for name, c in channels.items() if c["pass_curve"]}
    ks = sorted({point["k"] for curve in shown.values() for point in curve})
    spread = np.linspace(-0.05, 0.05, len(channels)) if len(channels) > 1 else [0.0]
    for number, name in enumerate(channels):
        if name not in shown:
            continue
        value, low, high = (np.array([p[k] for p in shown[name]]) * 100 for k in ("value", "low", "high"))
        # By place, not by k: the same small step aside at every k.
        at = np.array([ks.index(p["k"]) for p in shown[name]]) + spread[number]
        colour = COLOURS[number % len(COLOURS)]
        axes.errorbar(
            at, value, yerr=[value - low, high - value], fmt=MARKERS[number % len(MARKERS)], color=colour,
            linestyle=LINES[number % len(LINES)], markersize=6, capsize=3, linewidth=1.5,
            label=label(name, channels),
        )  # fmt: skip
        if votes := channels[name]["majority"]:
            axes.plot([at[-1] + 0.12], [votes["value"] * 100], marker="D", markersize=9, markerfacecolor="none",
                      color=colour, linestyle="")  # fmt: skip
    axes.set_xticks(range(len(ks)), [str(k) for k in ks])
    axes.set_xlim(-0.5, len(ks) - 0.5)
    axes.set_xlabel("samples of a question (k)")
    axes.set_ylabel("a right one among k (%)")
    axes.grid(alpha=0.25)
    legend(figure, len(shown))
    return figure
