"""What a sweep shows: requests met a second and tail latency against the rate, the knee marked; and a table.

Reads a sweep as sweep.json has it. Colours and marks as in figures.py; asks nothing of anyone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dsr1kit.compare.figures import COLOURS, sheet

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

_TIMES = (("first_token_s", "first token", 0, "o"), ("first_answer_s", "first answer", 1, "s"))


def sweep_figure(sweep: Mapping[str, Any]) -> Figure:
    """Requests a second that were answered, and in time (above); p95 latency of those answered (below)."""
    steps = sorted(sweep["steps"], key=lambda step: step["rate"])
    rates = [step["rate"] for step in steps]
    figure, (above, below) = sheet(7.4, 6.0, nrows=2, sharex=True)
    above.plot(rates, rates, color="#888888", linestyle=":", linewidth=1.5, label="as asked")
    paced = [(s["rate"], s["answered_per_s"]) for s in steps if s["answered_per_s"] is not None]
    above.plot(*_columns(paced), color=COLOURS[5], marker="^", linestyle="--", linewidth=1.6, label="answered")
    for step in steps:
        share, rate = step["goodput"]["share"], step["rate"]
        if share is not None:
            above.plot([rate, rate], [share["low"] * rate, share["high"] * rate], color=COLOURS[2], linewidth=1.6)
    above.plot(
        rates, [s["goodput"]["per_s"] for s in steps], color=COLOURS[2], marker="o", linewidth=2, label="in time"
    )
    for name, label, number, marker in _TIMES:
        points = [(s["rate"], s[name]["p95"]) for s in steps if s[name] is not None]
        style = {"color": COLOURS[number], "linewidth": 1.8}
        below.plot(*_columns(points), marker=marker, label=f"{label}, p95", **style)
        bound = sweep["settings"]["objective"].get(name)
        if bound is not None:
            below.axhline(bound, linestyle="--", alpha=0.7, label=f"{label}, objective", **style)
    for axes in (above, below):
        if sweep["knee"] is not None:
            label = f"knee, {sweep['knee']:g}/s" + ("" if sweep["reached"] else " or above")
            axes.axvline(sweep["knee"], color="#000000", linestyle="-.", linewidth=1.2, label=label)
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, fontsize=9, loc="upper left", ncols=2)
    # What was asked soon leaves what was given far below: it may leave the axes.
    most = max((s["rate"] * s["goodput"]["share"]["high"] for s in steps if s["goodput"]["share"]), default=1.0)
    above.set_ylim(0, 1.5 * most)
    below.set_ylim(0, 1.5 * below.get_ylim()[1])  # room for the legend above the lines
    above.set_ylabel("requests a second")
    below.set_ylabel("seconds from due")
    below.set_xscale("log", base=2)
    below.set_xticks(rates, [f"{rate:g}" for rate in rates], rotation=45 if len(rates) > 8 else 0)
    below.minorticks_off()
    below.set_xlabel("rate asked (requests a second)" + (", emulated channel" if sweep["emulated"] else ""))
    return figure


def _columns(points: list[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def sweep_table(sweep: Mapping[str, Any]) -> pd.DataFrame:
    """One row a rate: share in time with its interval (%), requests a second, times in seconds."""
    import pandas as pd

    rows = {}
    for step in sorted(sweep["steps"], key=lambda step: step["rate"]):
        share = step["goodput"]["share"] or {"value": None, "low": None, "high": None}
        first, answer = step["first_token_s"] or {}, step["first_answer_s"] or {}
        rows[step["rate"]] = {
            "requests": step["asked"],
            "in time %": _percent(share["value"]),
            "low %": _percent(share["low"]),
            "high %": _percent(share["high"]),
            "in time /s": step["goodput"]["per_s"],
            "answered /s": step["answered_per_s"],
            "in flight": step["in_flight"]["mean"],
            "first token p50 s": first.get("p50"),
            "first token p95 s": first.get("p95"),
            "first answer p95 s": answer.get("p95"),
            "holds": step["holds"],
            "client limited": bool(step["client"]["limited"]),
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("rate /s").round(3)


def sweep_alt(sweep: Mapping[str, Any]) -> str:
    """What the figure shows, in words."""
    steps = sorted(sweep["steps"], key=lambda step: step["rate"])
    points = [f"{s['rate']:g} a second: {s['goodput']['met']} of {s['asked']} in time" for s in steps]
    return f"{' '.join(sweep['verdict'])} By rate: {'; '.join(points) or 'none asked'}."


def _percent(share: float | None) -> float | None:
    return None if share is None else round(100 * share, 1)
