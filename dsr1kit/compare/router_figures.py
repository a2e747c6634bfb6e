"""Figures of the router at work: an outage as it was ridden out, and the rehearsed month policy by policy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from dsr1kit.compare.figures import COLOURS
from dsr1kit.compare.outage import PROVIDERS, Outage

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def outage(played: Outage) -> Figure:
    """Each question by when it was due and how long it took: one channel alone (above), the router (below)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.6, 5.0), layout="constrained")
    panels = figure.subplots(2, 1, sharex=True, sharey=True)
    names = [name for name, *_ in PROVIDERS]
    titles = ("one channel alone (emulated)", "router over five (emulated)")
    for axes, who, title in zip(panels, ("alone", "router"), titles, strict=True):
        mine = [a for a in played.asked if a.who == who]
        for number, name in enumerate(names):
            points = [(a.at_s, a.total_s) for a in mine if a.answered_by == name]
            if points:
                axes.scatter(*zip(*points, strict=True), s=14, color=COLOURS[number], marker="osD^v"[number],
                             label=f"answered by {name}" if who == "router" else None)  # fmt: skip
        lost = [(a.at_s, a.total_s) for a in mine if not a.answered_by]
        if lost:
            axes.scatter(*zip(*lost, strict=True), s=22, color="black", marker="x", label="not answered")
        axes.axvspan(*played.down, color="#E69F00", alpha=0.15, linewidth=0)
        axes.set_yscale("log")
        axes.set_ylabel("time to the end (s)")
        axes.set_title(title, fontsize=10, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=9)
        axes.grid(alpha=0.25)
    panels[1].set_xlabel("seconds from the beginning; shaded: `official` is down (503, then queued, then silent)")
    handles: dict[str, Any] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return figure


def metrics(played: Outage) -> Figure:
    """Six of the router's twelve metrics through the outage, from its beginning on."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 4.2), layout="constrained")
    wanted: tuple[tuple[str, str | None, str], ...] = (
        ("requests_per_s", None, "requests ended a second"),
        ("success_share", None, "share answered"),
        ("first_token_s", "p99", "first token, p99 (s)"),
        ("in_flight", None, "requests under way"),
        ("open_circuits", None, "open circuits"),
        ("amplification", None, "upstream calls a request"),
    )
    panels = figure.subplots(2, 3, sharex=True).flat
    for number, (axes, (name, part, label)) in enumerate(zip(panels, wanted, strict=True)):
        points = [(at, told[name] if part is None else told[name][part]) for at, told in played.watched]
        known = [(at, value) for at, value in points if value is not None]
        if known:
            axes.plot(*zip(*known, strict=True), color=COLOURS[number % len(COLOURS)], linewidth=1.6)
        axes.axvspan(*played.down, color="#E69F00", alpha=0.15, linewidth=0)
        axes.set_title(label, fontsize=9, loc="left")
        axes.set_ylim(bottom=0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.25)
    figure.supxlabel("seconds from the beginning; emulated providers, `official` is down where shaded", fontsize=9)
    return figure


def month(summary: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Hours down, p99, upstream calls and throughput of each policy, with 95 % intervals over the months."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.0, 2.6), layout="constrained")
    panels = figure.subplots(1, 4, sharey=True)
    names = list(summary)
    wanted = (
        ("hours_down", "hours down"),
        ("total_s_p99", "p99 (s)"),
        ("amplification", "calls a request"),
        ("throughput_per_minute", "requests a minute"),
    )
    for axes, (key, label) in zip(panels, wanted, strict=True):
        for row, name in enumerate(names):
            value = summary[name][key]
            given = value if isinstance(value, dict) else {"value": value, "low": value, "high": value}
            middle, low, high = given["value"], given["low"], given["high"]
            axes.barh(row, middle, color=COLOURS[row], height=0.6)
            if high > low:
                axes.errorbar(middle, row, xerr=np.array([[middle - low], [high - middle]]), color="black", capsize=3,
                              linewidth=1.2)  # fmt: skip
            axes.annotate(f"{middle:.3g}", (high, row), (4, 0), textcoords="offset points", va="center", fontsize=8)
        axes.set_xlabel(label, fontsize=9)
        axes.set_xlim(0, axes.get_xlim()[1] * 1.2)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    figure.suptitle("emulated providers on a virtual clock", fontsize=10)
    panels[0].set_yticks(range(len(names)), names)
    panels[0].invert_yaxis()
    return figure
