"""What each figure of a report shows, in words: for those who hear a page instead of seeing it.

Reads a summary as data; says findings, not how a figure looks. Knows nothing about HTML or matplotlib.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dsr1kit.compare.run_figures import STAGES, Passage, by_place, clock
from dsr1kit.compare.verdict import duration, listed, name_of, percent

Channels = Mapping[str, Mapping[str, Any]]


def tradeoffs(summary: Mapping[str, Any]) -> str:
    """Accuracy, first answer and cost of each channel, and who is not beaten on all three."""
    channels = summary["channels"]
    said = []
    for name, c in channels.items():
        parts = [f"right in {percent(c['accuracy'])}"] if c["accuracy"] else ["no reply that could be judged"]
        if first := c["first_answer_median"]:
            span = f"{duration(first['low'])} to {duration(first['high'])}"
            parts.append(f"first answer after {duration(first['value'])} ({span})")
        if c["cost_per_right"] is not None:
            cost = c["cost_per_right"]
            parts.append(f"{c['currency']} {cost * 1000:.3g} per 1,000 right answers" if cost else "no fee")
        said.append(f"{name_of(name, c)}: {', '.join(parts)}.")
    front = [name_of(name, channels[name]) for name in summary.get("pareto", ())]
    if front:
        said.append(f"Not beaten on accuracy, speed and cost at once: {listed(front)}.")
    return " ".join(said)


def distributions(channels: Channels) -> str:
    """How fast answers began, and how many never did."""
    said = []
    for name, c in channels.items():
        first, late = c["first_answer_s"], c["first_answer_s_censored"]
        if not first:
            said.append(f"{name_of(name, c)}: no answer.")
            continue
        told = f"{name_of(name, c)}: half of its answers had begun by {duration(first['p50'])}, 95 of 100 by "
        told += duration(first["p95"])
        if late["censored"]:
            told += f"; {late['censored']} of {late['n']} requests ended before any answer"
            median = late.get("p50")
            told += f", counting them half had begun by {duration(median['value'])}" if median else ", too many to say"
        said.append(told + ".")
    return " ".join(said)


def where_time_goes(channels: Channels) -> str:
    """The whole time of a request on each channel, and its stages' shares, largest first."""
    said = []
    for name in by_place(channels):
        split = channels[name]["time_split"]
        if not split:
            continue
        whole = sum(split.values())
        stages = sorted(((split[field], stage) for field, stage, *_ in STAGES), reverse=True)
        shares = [f"{spent / whole:.0%} {stage}" for spent, stage in stages if whole and spent / whole >= 0.005]
        said.append(f"{name_of(name, channels[name])}: {duration(whole)}, of it {listed(shares)}.")
    return " ".join(said)


def outcomes(channels: Channels) -> str:
    """Shares of outcomes on each channel."""
    said = []
    for name, c in channels.items():
        shares = [f"{n / c['n']:.1%} {outcome}" for outcome, n in c["outcomes"].items()]
        said.append(f"{name_of(name, c)}: {listed(shares) if shares else 'nothing asked'}.")
    return " ".join(said)


def over_time(passed: Passage, channels: Channels) -> str:
    """From when to when, and when each channel failed most."""
    said = [f"Requests were due from {clock(passed.begins[0], passed)} to {clock(passed.begins[-1], passed)} UTC."]
    if passed.pauses:
        said.append(f"{len(passed.pauses)} pauses are cut out." if len(passed.pauses) > 1 else "One pause is cut out.")
    for name, counts in passed.counts.items():
        failed = [sum(row) for row in zip(*(n for o, n in counts.items() if o != "ok"), strict=True)]
        if not any(failed):
            said.append(f"{name_of(name, channels[name])}: all ended well.")
            continue
        worst = max(range(len(failed)), key=lambda i: failed[i])
        asked = sum(n[worst] for n in counts.values())
        said.append(
            f"{name_of(name, channels[name])}: {sum(failed)} did not end as ok, most of them "
            f"({failed[worst]} of {asked}) in the span that began at {clock(passed.begins[worst], passed)}."
        )
    return " ".join(said)


def kinds(channels: Channels) -> str:
    """The kinds on which each channel is right most and least often."""
    said = []
    for name, c in channels.items():
        known = {kind: share for kind, share in c["accuracy_by_kind"].items() if share}
        if not known:
            continue
        order = sorted(known, key=lambda kind: float(known[kind]["value"]))
        told = f"most often right on {order[-1]}, {percent(known[order[-1]])}"
        if len(order) > 1:
            told += f"; least often on {order[0]}, {percent(known[order[0]])}"
        said.append(f"{name_of(name, c)}: {told}.")
    return " ".join(said)


def pass_at_k(channels: Channels) -> str:
    """From one sample to all of them, and the majority's share."""
    said = []
    for name, c in channels.items():
        curve = c["pass_curve"]
        if not curve:
            continue
        first, last = curve[0], curve[-1]
        told = f"{percent(first)} with {first['k']} sample, {percent(last)} with one of {last['k']} right"
        if c["majority"]:
            told += f", {percent(c['majority'])} by majority"
        said.append(f"{name_of(name, c)}: {told}.")
    return " ".join(said)
