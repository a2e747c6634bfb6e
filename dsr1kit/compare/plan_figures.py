"""What a plan shows: tables of questions, money and time, and the difference that so many questions detect.

Reads plans as plan.py makes them and turns power.py's figures into a curve; asks nothing of anyone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from dsr1kit.compare.figures import COLOURS, sheet
from dsr1kit.compare.power import PairedPilot, detectable

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd
    from matplotlib.figure import Figure

    from dsr1kit.compare.plan import ComparisonPlan

_LINES, _MARKERS = ("-", "--", "-.", ":"), "osD^"
_POINTS = 40


def needs_table(plan: ComparisonPlan) -> pd.DataFrame:
    """Questions that detect the plan's difference: one row a basis, one column a number of answers to each."""
    import pandas as pd

    rows: dict[str, dict[str, int]] = {}
    for need in plan.needs:
        rows.setdefault(need.basis, {})[f"{need.samples} answer{'s' if need.samples > 1 else ''} each"] = need.items
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis(f"for {100 * plan.difference:g} points")


def costs_table(plan: ComparisonPlan) -> pd.DataFrame:
    """One row a channel: requests, tokens, money expected (with its 95 % interval) and at most, seconds a request."""
    import pandas as pd

    rows = {}
    for channel in plan.channels:
        guess = channel.estimate
        rows[channel.channel] = {
            "requests": guess.requests,
            "tokens in": guess.prompt_tokens,
            "tokens out": guess.completion_tokens,
            "expected": guess.expected,
            "low": guess.low,
            "high": guess.high,
            "at most": guess.bound,
            "currency": guess.currency,
            "a request takes s": channel.each_s,
        }
    table = pd.DataFrame.from_dict(rows, orient="index").round(4)
    for column in ("tokens in", "tokens out"):
        table[column] = table[column].astype("Float64").round().astype("Int64")
    return table


def detectable_figure(
    seen: PairedPilot | None = None,
    *,
    share: float | None = None,
    most_items: int = 2000,
    samples: Sequence[int] = (1, 4, 16),
    power: float = 0.8,
    marked: float | None = None,
) -> Figure:
    """The smallest difference that so many questions detect, in points, one curve a number of answers to each.

    Args:
        seen: a pilot's variances; None: `share` is assumed for the better channel.
        marked: a difference (a share) at which a line is drawn.
    """
    figure, axes = sheet(7.4, 4.0)
    counts = np.unique(np.geomspace(20, most_items, _POINTS).astype(int))
    for number, k in enumerate(samples):
        found = [detectable(int(n), seen=seen, share_a=share, samples=k, power=power) for n in counts]
        points = [(n, 100 * d) for n, d in zip(counts, found, strict=True) if d is not None]
        axes.plot(
            *zip(*points, strict=True), color=COLOURS[number % len(COLOURS)], linestyle=_LINES[number % len(_LINES)],
            marker=_MARKERS[number % len(_MARKERS)], markevery=8, linewidth=2,
            label=f"{k} answer{'s' if k > 1 else ''} to each",
        )  # fmt: skip
    if marked is not None:
        axes.axhline(100 * marked, color="#000000", linestyle=":", linewidth=1.2, label=f"{100 * marked:g} points")
    axes.set_xscale("log")
    ticks = [n for n in (20, 50, 100, 200, 500, 1000, 2000, 5000, 10000) if n <= most_items]
    axes.set_xticks(ticks, [f"{n:,}" for n in ticks])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xlabel("questions")
    axes.set_ylabel(f"difference detected in {power:.0%} of runs (points)")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=9)
    return figure
