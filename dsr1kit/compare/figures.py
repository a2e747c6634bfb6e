"""The report's figures as SVG text: accuracy against latency, latency distributions, outcomes.

Colours are Okabe and Ito's, told apart by people with any colour vision; marker shapes and line styles repeat
what the colours say. Reads summaries and records; knows nothing about HTML.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dsr1kit.compare.summary import Record, name_of, timed
from dsr1kit.hours import Spans

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D00")
_MARKERS, _LINES = "osD^vPX*", ("-", "--", "-.", ":")
#: Outcomes in the order and colour in which they are stacked; greys are the caller's own.
_OUTCOMES = {
    "ok": "#009E73", "truncated": "#E69F00", "filtered": "#F0E442", "throttled": "#56B4E9",
    "overloaded": "#0072B2", "queued": "#7A5195", "stalled": "#CC79A7", "cut": "#D55E00", "empty": "#A6761D",
    "not_an_answer": "#8C564B",
    "no_balance": "#B22222", "unauthorized": "#6B0000", "unknown_model": "#4B3621", "retired": "#2F4F4F",
    "bad_request": "#5C5C8A", "unreachable": "#1A1A1A", "deadline": "#777777", "over_budget": "#A0A0A0",
    "cancelled": "#C8C8C8",
}  # fmt: skip
_HATCHES = ("", "//", "..", "xx", "\\\\", "++", "oo", "--")


def _axes(width: float, height: float) -> tuple[Figure, Any]:
    # Figure directly, not pyplot: no global state, no backend to choose, nothing to close.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=9)
    return figure, axes


def _label(name: str, channel: Mapping[str, Any]) -> str:
    # Two dollar signs would be read as mathematics.
    return name_of(name, channel).replace("$", r"\$")


def to_svg(figure: Figure) -> str:
    """The figure as an SVG element, without XML header, the same bytes for the same data."""
    import matplotlib as mpl

    box = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": "dsr1kit", "svg.fonttype": "path"}):
        figure.savefig(box, format="svg", metadata={"Date": None, "Creator": None})
    text = box.getvalue()
    return text[text.index("<svg") :]


def accuracy_against_latency(summary: Mapping[str, Any]) -> Figure:
    """Accuracy over the median time to the first answer, both with 95 % intervals; up and left is better."""
    figure, axes = _axes(7.4, 4.2)
    drawn = 0
    for number, (name, c) in enumerate(summary["channels"].items()):
        accuracy, latency = c["accuracy"], c["first_answer_median"]
        if accuracy is None or latency is None:
            continue
        drawn += 1
        colour = COLOURS[number % len(COLOURS)]
        axes.errorbar(
            latency["value"],
            accuracy["value"] * 100,
            xerr=[[latency["value"] - latency["low"]], [latency["high"] - latency["value"]]],
            yerr=[
                [(accuracy["value"] - accuracy["low"]) * 100],
                [(accuracy["high"] - accuracy["value"]) * 100],
            ],
            fmt=_MARKERS[number % len(_MARKERS)],
            color=colour,
            markersize=9,
            capsize=3,
            linewidth=1.6,
            label=_label(name, c),
        )
    axes.set_xlabel("time to the first answer token, median (s)")
    axes.set_ylabel("right answers (%)")
    axes.set_xlim(left=0)
    axes.set_ylim(*_room(axes.get_ylim()))
    axes.grid(alpha=0.25)
    if drawn:
        # Beside the axes: inside, it would cover a channel whenever the data fill the corner.
        figure.legend(loc="outside lower center", ncols=min(drawn, 3), frameon=False, fontsize=9)
    return figure


def _room(limits: tuple[float, float]) -> tuple[float, float]:
    return max(-2.0, limits[0] - 3), min(102.0, limits[1] + 3)


def latency_distributions(records: Sequence[Record], channels: Mapping[str, Any]) -> Figure:
    """Share of answers that had begun by a time, one curve a channel."""
    figure, axes = _axes(7.4, 3.8)
    drawn = 0
    for number, (name, c) in enumerate(channels.items()):
        values = sorted(timed((r for r in records if r["channel"] == name), "first_answer_s"))
        if not values:
            continue
        drawn += 1
        shares = np.arange(1, len(values) + 1) / len(values) * 100
        axes.step(
            [values[0], *values],
            [0.0, *shares],
            where="post",
            color=COLOURS[number % len(COLOURS)],
            linestyle=_LINES[number % len(_LINES)],
            linewidth=2,
            label=_label(name, c),
        )
    axes.set_xlabel("time to the first answer token (s)")
    axes.set_ylabel("answers begun by then (%)")
    axes.set_xlim(left=0)
    axes.set_ylim(0, 101)
    axes.grid(alpha=0.25)
    if drawn:
        figure.legend(loc="outside lower center", ncols=min(drawn, 3), frameon=False, fontsize=9)
    return figure


def outcomes(channels: Mapping[str, Any]) -> Figure:
    """Outcomes of all requests, stacked to 100 %, one bar a channel."""
    figure, axes = _axes(7.4, 1.5 + 0.5 * len(channels))
    names = [_label(name, c) for name, c in channels.items()]
    left = np.zeros(len(channels))
    present = [o for o in _OUTCOMES if any(c["outcomes"].get(o) for c in channels.values())]
    for number, outcome in enumerate(present):
        shares = np.array([100 * c["outcomes"].get(outcome, 0) / max(1, c["n"]) for c in channels.values()])
        axes.barh(
            names, shares, left=left, color=_OUTCOMES[outcome], label=outcome, height=0.62,
            edgecolor="white", linewidth=0.6, hatch=_HATCHES[number % len(_HATCHES)],
        )  # fmt: skip
        left += shares
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("share of requests (%)")
    if present:
        figure.legend(loc="outside lower center", ncols=min(len(present), 6), frameon=False, fontsize=9)
    return figure


def accuracy_by_kind(channels: Mapping[str, Any]) -> Figure:
    """Accuracy of each channel on each kind of question, with 95 % intervals."""
    kinds = list(dict.fromkeys(k for c in channels.values() for k in c["accuracy_by_kind"]))
    figure, axes = _axes(7.4, 1.4 + 0.42 * len(kinds))
    offsets = np.linspace(-0.26, 0.26, max(2, len(channels)))
    drawn = 0
    for number, (name, c) in enumerate(channels.items()):
        rows = [(kinds.index(k), v) for k, v in c["accuracy_by_kind"].items() if v is not None]
        if not rows:
            continue
        drawn += 1
        value = np.array([v["value"] * 100 for _, v in rows])
        low = value - np.array([v["low"] * 100 for _, v in rows])
        high = np.array([v["high"] * 100 for _, v in rows]) - value
        axes.errorbar(
            value, [row + offsets[number % len(offsets)] for row, _ in rows], xerr=[low, high],
            fmt=_MARKERS[number % len(_MARKERS)], color=COLOURS[number % len(COLOURS)], markersize=6,
            capsize=2, linewidth=1.3, label=_label(name, c),
        )  # fmt: skip
    axes.set_yticks(range(len(kinds)), kinds)
    axes.invert_yaxis()
    axes.set_xlim(-2, 102)
    axes.set_xlabel("right answers (%)")
    axes.grid(axis="x", alpha=0.25)
    if drawn:
        figure.legend(loc="outside lower center", ncols=min(drawn, 3), frameon=False, fontsize=9)
    return figure


def by_hour(
    hours: Mapping[str, Sequence[Mapping[str, Any]]], channels: Mapping[str, Any], peak: Spans, timezone: str
) -> Figure:
    """Share answered (above) and median first-token time (below) by hour of day, peak hours shaded."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.4, 5.2), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    offsets = np.linspace(-0.18, 0.18, max(2, len(hours))) if len(hours) > 1 else [0.0]
    for number, (name, rows) in enumerate(hours.items()):
        for axes, key, factor in ((above, "availability", 100.0), (below, "first_token_s", 1.0)):
            points = [(row["hour"] + 0.5 + offsets[number % len(offsets)], row[key]) for row in rows if row[key]]
            if not points:
                continue
            value = np.array([v["value"] * factor for _, v in points])
            low = value - np.array([v["low"] * factor for _, v in points])
            high = np.array([v["high"] * factor for _, v in points]) - value
            axes.errorbar(
                [x for x, _ in points], value, yerr=[low, high], fmt=_MARKERS[number % len(_MARKERS)],
                color=COLOURS[number % len(COLOURS)], markersize=5, capsize=2, linewidth=1.2,
                label=_label(name, channels[name]) if axes is above else None,
            )  # fmt: skip
    for axes in (above, below):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=9)
        axes.grid(alpha=0.25)
        for low_hour, high_hour in peak:
            axes.axvspan(low_hour, high_hour, color="#E69F00", alpha=0.15, linewidth=0)
    above.set_ylim(-2, 104)
    above.set_ylabel("answered (%)")
    below.set_ylim(bottom=0)
    below.set_ylabel("first token, median (s)")
    below.set_xlim(0, 24)
    below.set_xticks(range(0, 25, 2))
    below.set_xlabel(f"hour of day, {timezone}")
    if any(hours.values()):
        figure.legend(loc="outside lower center", ncols=min(len(hours), 3), frameon=False, fontsize=9)
    return figure
