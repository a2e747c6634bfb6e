"""The report's figures as matplotlib figures and SVG text: what channels come to; run_figures.py has the rest.

Colours are Okabe and Ito's, told apart by people with any colour vision; marker shapes, line styles and hatches
repeat what the colours say. Reads summaries; knows nothing about HTML or records.
"""

from __future__ import annotations

import functools
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

from dsr1kit.compare.verdict import name_of
from dsr1kit.hours import Spans

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D00")
MARKERS = "osD^vPX*"
#: As many as colours, so that a curve is known in black and white too.
LINES: tuple[Any, ...] = (
    "-", "--", "-.", ":", (0, (8, 2, 1, 2, 1, 2)), (0, (2, 1)), (0, (10, 3)), (0, (1, 4)),
)  # fmt: skip
#: Outcomes in the order and colour in which they are stacked; greys are the caller's own.
OUTCOMES = {
    "ok": "#009E73", "truncated": "#E69F00", "filtered": "#F0E442", "throttled": "#56B4E9",
    "overloaded": "#0072B2", "queued": "#7A5195", "stalled": "#CC79A7", "cut": "#D55E00", "empty": "#A6761D",
    "not_an_answer": "#8C564B",
    "no_balance": "#B22222", "unauthorized": "#6B0000", "unknown_model": "#4B3621", "retired": "#2F4F4F",
    "bad_request": "#5C5C8A", "unreachable": "#1A1A1A", "deadline": "#777777", "over_budget": "#A0A0A0",
    "cancelled": "#C8C8C8",
}  # fmt: skip
HATCHES = ("", "//", "..", "xx", "\\\\", "++", "oo", "--")
#: Width in inches at which 9 points come out as large as the report's own text.
WIDTH = 9.2
_WRAP = 26
_RING = "not beaten on accuracy,\nspeed and cost at once"
_MOST_KINDS = 24
#: Files of fonts with Chinese, Japanese and Korean signs, by what they are called on the systems the kit runs on.
_CJK = re.compile(
    r"(?i)(sans.?cjk|notosans(sc|jp)|wqy|pingfang|hiragino sans gb|msyh|simhei|droidsansfallback|serif.?cjk)"
)


def sheet(width: float, height: float, **grid: Any) -> tuple[Figure, Any]:
    """A figure and its axes, bare on two sides; `grid` as matplotlib's `subplots` takes it."""
    # Figure directly, not pyplot: no global state, no backend to choose, nothing to close.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(**grid)
    for one in np.ravel(axes):
        one.spines[["top", "right"]].set_visible(False)
        # Ticks are made when a figure is drawn: they cannot be dressed before.
        one.tick_params(labelsize=9, labelfontfamily=list(_fonts()))
    return figure, axes


def to_svg(figure: Figure, title: str = "", description: str = "", key: str = "") -> str:
    """The figure as an SVG element, without XML header, the same bytes for the same data.

    Args:
        title, description: what a screen reader says in its place: its subject, and what it shows.
        key: put before every id, so that several figures can stand in one page.
    """
    import matplotlib as mpl

    dress(figure)
    box = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": "dsr1kit", "svg.fonttype": "path"}):
        figure.savefig(box, format="svg", metadata={"Date": None, "Creator": None})
    text = box.getvalue()
    text = text[text.index("<svg") :]
    # Without what no reader of the page sees; the sheet of styles would hold for the whole page.
    text = re.sub(
        r"<metadata>.*?</metadata>\s*|<!--.*?-->\s*|<defs>\s*<style.*?</style>\s*</defs>\s*", "", text, flags=re.S
    )
    if key:
        text = re.sub(r'(\bid="|xlink:href="#|url\(#)', rf"\g<1>{key}-", text)
    opening, told = 'stroke-linejoin="round"', ""
    if title:
        opening = f'role="img" aria-labelledby="{key}-title {key}-desc" {opening}'
        told = f'<title id="{key}-title">{escape(title)}</title><desc id="{key}-desc">{escape(description)}</desc>'
    return re.sub(r"<svg ([^>]*)>", lambda m: f"<svg {opening} {m[1]}>{told}", text, count=1)


def dress(figure: Figure) -> None:
    """Let every text of the figure fall back to a font that has its signs."""
    from matplotlib.text import Text

    families = list(_fonts())
    for text in figure.findobj(Text):
        text.set_fontfamily(families)


@functools.cache
def _fonts() -> dict[str, Any]:
    """Families that texts are drawn in, the first that has a sign drawing it, and their signs."""
    from matplotlib import font_manager, ft2font

    chosen = {"DejaVu Sans": ft2font.FT2Font(font_manager.findfont("DejaVu Sans"))}
    # By file, not by matplotlib's list of fonts: that is as old as the first figure drawn on the machine.
    found = [(m[1].lower(), "Regular" not in p, p) for p in font_manager.findSystemFonts() if (m := _CJK.search(p))]
    for _, _, path in sorted(found)[:1]:
        font = ft2font.FT2Font(path)
        font_manager.fontManager.addfont(path)
        chosen[font.family_name] = font
    return chosen


def label(name: str, channels: Mapping[str, Any]) -> str:
    """A channel's name as figures show it: in lines that fit a legend, and in signs that the fonts have."""
    return drawable(name_of(name, channels[name]), f"channel {list(channels).index(name) + 1}")


def drawable(text: str, instead: str) -> str:
    """The text in short lines; where no font has all its signs, `instead` and what is left of it."""
    if missing_signs(text):
        rest = "".join(sign for sign in text if not missing_signs(sign)).strip(" :-_")
        text = instead + (f" ({rest})" if rest else "")
    # Two dollar signs would be read as mathematics.
    return wrapped(text).replace("$", r"\$")


def missing_signs(text: str) -> bool:
    """Whether some sign of the text is in none of the fonts, so that a box would be drawn."""
    return any(not any(font.get_char_index(ord(sign)) for font in _fonts().values()) for sign in text)


def wrapped(text: str, width: int = _WRAP) -> str:
    """The text in lines of at most `width` signs, broken after its own marks where there are some."""
    lines = [""]
    for piece in re.findall(r".+?(?:[\s/:@_-]+|$)", text) or [text]:
        while len(piece) > width:
            lines[-1:] = [lines[-1], piece[:width]] if lines[-1] else [piece[:width]]
            piece = piece[width:]
            lines.append("")
        if lines[-1] and len(lines[-1]) + len(piece.rstrip()) > width:
            lines.append("")
        lines[-1] += piece
    return "\n".join(line.strip() for line in lines if line.strip())


def legend(figure: Figure, entries: int, columns: int = 3, **more: Any) -> None:
    """The legend below the figure: inside, it would cover a channel whenever the data fill the corner."""
    if entries:
        figure.legend(loc="outside lower center", ncols=min(entries, columns), frameon=False, fontsize=9, **more)


def accuracy_against_latency(summary: Mapping[str, Any]) -> Figure:
    """Accuracy over the median time to the first answer, both with 95 % intervals; up and left is better."""
    figure, axes = sheet(WIDTH, 4.4)
    axes.set_ylabel("right answers (%)")
    _panel(axes, summary["channels"], _first_answers(summary["channels"]), "time to the first answer, median (s)")
    axes.set_ylim(*_room(axes.get_ylim()))
    _legend_of_panels(figure, summary["channels"], [axes])
    return figure


def tradeoffs(summary: Mapping[str, Any]) -> Figure:
    """Accuracy over the first answer's median (left) and over cost per right answer, one panel a currency.

    All with 95 % intervals; up and left is better. A ring marks channels that no other beats on all three. Free
    channels stand in every panel of cost, those whose price is unknown in none.
    """
    channels = summary["channels"]
    panels = [("time to the first answer, median (s)", _first_answers(channels))]
    panels += [(f"{currency} per 1,000 right answers", _costs(channels, currency)) for currency in currencies(channels)]
    figure, grid = sheet(WIDTH, 4.6, ncols=len(panels), sharey=True, squeeze=False)
    for axes, (title, points) in zip(grid[0], panels, strict=True):
        _panel(axes, channels, points, title, summary.get("pareto", ()))
    grid[0][0].set_ylabel("right answers (%)")
    grid[0][0].set_ylim(*_room(grid[0][0].get_ylim()))
    _legend_of_panels(figure, channels, grid[0])
    return figure


def _legend_of_panels(figure: Figure, channels: Mapping[str, Any], panels: Sequence[Any]) -> None:
    """Marks without their bars, each channel once, in the channels' order; the ring last."""
    from matplotlib.lines import Line2D

    drawn = {text for axes in panels for text in axes.get_legend_handles_labels()[1]}
    handles = [
        Line2D([], [], linestyle="", markersize=9, label=text, **_mark(number))
        for number, name in enumerate(channels)
        if (text := label(name, channels)) in drawn
    ]
    if _RING in drawn:
        ring: dict[str, Any] = {"marker": "o", "markerfacecolor": "none", "color": "#1b1f24", "markersize": 15}
        handles.append(Line2D([], [], linestyle="", label=_RING, **ring))
    legend(figure, len(handles), handles=handles)


def _mark(number: int) -> dict[str, Any]:
    return {"marker": MARKERS[number % len(MARKERS)], "color": COLOURS[number % len(COLOURS)]}


def currencies(channels: Mapping[str, Any]) -> list[str]:
    """The currencies in which some channel charged something for right answers."""
    return list(dict.fromkeys(c["currency"] for c in channels.values() if c["cost_per_right"]))


def _first_answers(channels: Mapping[str, Any]) -> dict[str, Mapping[str, float]]:
    return {name: c["first_answer_median"] for name, c in channels.items() if c["first_answer_median"]}


def _costs(channels: Mapping[str, Any], currency: str) -> dict[str, Mapping[str, float]]:
    found: dict[str, Mapping[str, float]] = {}
    for name, c in channels.items():
        cost = c["cost_per_right"]
        if cost is not None and (cost == 0 or c["currency"] == currency):
            interval = c["cost_per_right_interval"] or {"value": cost, "low": cost, "high": cost}
            found[name] = {k: v * 1000 for k, v in interval.items()}
    return found


def _panel(
    axes: Any,
    channels: Mapping[str, Any],
    points: Mapping[str, Mapping[str, float]],
    title: str,
    front: Iterable[str] = (),
) -> None:
    points = {name: point for name, point in points.items() if channels[name]["accuracy"]}
    above = [p["value"] for p in points.values() if p["value"] > 0]
    free = any(p["value"] <= 0 for p in points.values())
    wide = len(above) > 1 and max(above) > 8 * min(above)
    # A logarithm has no zero: the free ones get a place of their own.
    at_zero = min(above) / 4 if wide and free else 0.0
    for number, name in enumerate(channels):
        if name not in points:
            continue
        x, y = points[name], channels[name]["accuracy"]
        at = x["value"] if x["value"] > 0 else at_zero
        low, high = (min(at, max(x["low"], at / 100)), max(at, x["high"])) if x["value"] > 0 else (at, at)
        axes.errorbar(
            at, y["value"] * 100, xerr=[[at - low], [high - at]],
            yerr=[[(y["value"] - y["low"]) * 100], [(y["high"] - y["value"]) * 100]],
            fmt=MARKERS[number % len(MARKERS)], color=COLOURS[number % len(COLOURS)], markersize=9, capsize=3,
            linewidth=1.6, label=label(name, channels),
        )  # fmt: skip
    ringed = [name for name in front if name in points]
    if ringed:
        axes.scatter(
            [points[n]["value"] if points[n]["value"] > 0 else at_zero for n in ringed],
            [channels[n]["accuracy"]["value"] * 100 for n in ringed],
            s=330, facecolors="none", edgecolors="#1b1f24", linewidths=1.3, zorder=4,
            label=_RING,
        )  # fmt: skip
    axes.set_xlabel(title)
    axes.grid(alpha=0.25)
    if wide:
        log_ticks(axes, free_at=at_zero if free else None)
    else:
        axes.set_xlim(left=-0.09 * axes.get_xlim()[1] if free else 0)


def log_ticks(axes: Any, free_at: float | None = None) -> None:
    """A logarithmic axis of time or money with ticks in plain numbers, few enough not to touch."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_xscale("log")
    low, high = axes.get_xlim()
    subs = (1.0, 2.0, 5.0) if high / low < 300 else (1.0, 3.0) if high / low < 3000 else (1.0,)
    axes.xaxis.set_major_locator(LogLocator(subs=subs, numticks=9))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    if free_at is not None:
        ticks = [t for t in LogLocator(subs=subs, numticks=9).tick_values(low, high) if 2 * free_at < t <= high]
        axes.set_xticks([free_at, *ticks], ["free", *(f"{t:g}" for t in ticks)])
        axes.axvline(free_at * 1.8, color="#777777", linestyle=":", linewidth=1)


def _room(limits: tuple[float, float]) -> tuple[float, float]:
    return max(-2.0, limits[0] - 3), min(103.0, limits[1] + 3)


def outcomes(channels: Mapping[str, Any]) -> Figure:
    """Outcomes of all requests, stacked to 100 %, one bar a channel."""
    figure, axes = sheet(WIDTH, 1.4 + 0.55 * len(channels))
    names = [label(name, channels) for name in channels]
    totals = np.array([max(1, c["n"]) for c in channels.values()])
    left = np.zeros(len(names))
    present = [o for o in OUTCOMES if any(o in c["outcomes"] for c in channels.values())]
    for outcome in present:
        shares = np.array([c["outcomes"].get(outcome, 0) for c in channels.values()]) / totals * 100
        axes.barh(range(len(names)), shares, left=left, label=outcome, height=0.62, **outcome_style(outcome))
        left += shares
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("share of requests (%)")
    legend(figure, len(present), 6)
    return figure


def outcome_style(outcome: str) -> dict[str, Any]:
    """How bars of an outcome look, in every figure alike."""
    hatch = HATCHES[list(OUTCOMES).index(outcome) % len(HATCHES)]
    return {"color": OUTCOMES[outcome], "edgecolor": "white", "linewidth": 0.6, "hatch": hatch}


def accuracy_by_kind(channels: Mapping[str, Any]) -> Figure:
    """Accuracy of each channel on each kind of question, with 95 % intervals; the first kinds, of very many."""
    kinds = list(dict.fromkeys(k for c in channels.values() for k in c["accuracy_by_kind"]))[:_MOST_KINDS]
    figure, axes = sheet(WIDTH, 1.4 + (0.3 + 0.12 * len(channels)) * max(1, len(kinds)))
    offsets = np.linspace(-0.3, 0.3, len(channels)) if len(channels) > 1 else [0.0]
    drawn = 0
    for number, (name, c) in enumerate(channels.items()):
        rows = [(kinds.index(k), v) for k, v in c["accuracy_by_kind"].items() if v is not None and k in kinds]
        if not rows:
            continue
        drawn += 1
        value = np.array([v["value"] * 100 for _, v in rows])
        low = value - np.array([v["low"] * 100 for _, v in rows])
        high = np.array([v["high"] * 100 for _, v in rows]) - value
        axes.errorbar(
            value, [row + offsets[number] for row, _ in rows], xerr=[low, high],
            fmt=MARKERS[number % len(MARKERS)], color=COLOURS[number % len(COLOURS)], markersize=6,
            capsize=2, linewidth=1.3, label=label(name, channels),
        )  # fmt: skip
    axes.set_yticks(range(len(kinds)), [drawable(kind, f"kind {number}") for number, kind in enumerate(kinds, 1)])
    axes.set_ylim(max(1, len(kinds)) - 0.5, -0.5)
    axes.set_xlim(-2, 102)
    axes.set_xlabel("right answers (%)")
    axes.grid(axis="x", alpha=0.25)
    legend(figure, drawn)
    return figure


def by_hour(
    hours: Mapping[str, Sequence[Mapping[str, Any]]], channels: Mapping[str, Any], peak: Spans, timezone: str
) -> Figure:
    """Share answered (above) and median first-token time (below) by hour of day, peak hours shaded."""
    figure, (above, below) = sheet(WIDTH, 5.4, nrows=2, sharex=True)
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
                [x for x, _ in points], value, yerr=[low, high], fmt=MARKERS[number % len(MARKERS)],
                color=COLOURS[number % len(COLOURS)], markersize=5, capsize=2, linewidth=1.2,
                label=label(name, channels) if axes is above else None,
            )  # fmt: skip
    for axes in (above, below):
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
    legend(figure, len(hours) if any(hours.values()) else 0)
    return figure
