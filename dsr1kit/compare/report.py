"""report.html: one file that opens offline, the verdict first, figures with their tables beside them.

Puts together what summary.py computed, figures.py and run_figures.py drew and descriptions.py put in words;
computes nothing itself.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dsr1kit.compare import descriptions, figures, run_figures
from dsr1kit.compare.slim import SlimRecords
from dsr1kit.compare.summary import Record
from dsr1kit.compare.tasks import facts
from dsr1kit.compare.verdict import duration, name_of, objective_told
from dsr1kit.errors import Dsr1kitError
from dsr1kit.keys import redact

_EXAMPLES = 6
#: Characters of one text that an example shows; R1 may think for a hundred thousand.
_MOST_SHOWN = 4000


def render(run: Mapping[str, Any], records: Sequence[Record], summary: Mapping[str, Any]) -> str:
    """The report as HTML text.

    Args:
        run: run.json; with `gain` (what `finetune.gain` notes) the report is one of before and after.
        records: records.jsonl, whole or as `slim.load_records` reads it.
        summary: summary.json; all as data.
    """
    channels = summary["channels"]
    labels = {name: name_of(name, c) for name, c in channels.items()}
    # Answers that a model in the process gave many at once have no times of their own.
    timed = any(c["first_token_s"] for c in channels.values()) or not run.get("gain")
    passed = run_figures.passage(records) if timed else None
    drawn = {
        "tradeoffs": (figures.tradeoffs(summary), "Accuracy against speed and cost", descriptions.tradeoffs(summary)),
        "latency": (
            run_figures.distributions(records, channels),
            "Time to the first answer",
            descriptions.distributions(channels),
        ),
        "split": (
            run_figures.where_time_goes(channels),
            "Where the time of a request goes",
            descriptions.where_time_goes(channels),
        ),
        "outcomes": (figures.outcomes(channels), "Outcomes of all requests", descriptions.outcomes(channels)),
        "kinds": (figures.accuracy_by_kind(channels), "Accuracy by kind of question", descriptions.kinds(channels)),
    }
    if not timed:
        drawn = {key: figure for key, figure in drawn.items() if key in ("outcomes", "kinds")}
    if passed is not None:
        drawn["time"] = (
            run_figures.over_time(passed, channels),
            "Outcomes over time",
            descriptions.over_time(passed, channels),
        )
    if any(c["pass_curve"] for c in channels.values()):
        drawn["samples"] = (run_figures.pass_at_k(channels), "pass@k", descriptions.pass_at_k(channels))
    return fill(
        "report.html.j2",
        run=run,
        timed=timed,
        gain=run.get("gain"),
        identity=run["identity"],
        summary=summary,
        channels=channels,
        labels=labels,
        figures={key: figures.to_svg(*figure, key=key) for key, figure in drawn.items()},
        renamed={labels[name]: shown for name in channels if (shown := _renamed(name, channels))},
        spans=[] if passed is None else _spans(passed, channels),
        stages=run_figures.STAGES,
        by_place=run_figures.by_place(channels),
        examples=disagreements(records, labels),
        failures=_failures(records),
        emulated=[labels[n] for n, c in channels.items() if c["emulated"]],
        kinds=list(dict.fromkeys(k for c in channels.values() for k in c["accuracy_by_kind"])),
        task=_task(run["identity"]["task"]),
        objective=objective_told(summary["objective"]) if summary.get("objective") else "",
        client=_client(summary.get("client") or []),
    )


def fill(template: str, **values: Any) -> str:
    """One of this folder's templates as text, with keys redacted."""
    import jinja2

    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {
        "percent": _percent,
        "seconds": _seconds,
        "sure_seconds": _sure_seconds,
        "money": _money,
        "sure_money": _sure_money,
        "points": _points,
        "p": _p,
        "ratio": _ratio,
    }
    return redact(environment.get_template(template).render(**values))


def disagreements(records: Sequence[Record], labels: Mapping[str, str]) -> list[dict[str, Any]]:
    """Questions that some channels answered right and others wrong, with each channel's own words."""
    whole: Callable[[Record], Record] = records.whole if isinstance(records, SlimRecords) else lambda record: record
    by_item: defaultdict[tuple[str, int], dict[str, Record]] = defaultdict(dict)
    for r in records:
        if r["verdict"] != "unscored" and r["channel"] in labels:
            by_item[(r["item"], r["sample"])][r["channel"]] = r
    mixed = [rs for _, rs in sorted(by_item.items()) if {r["verdict"] for r in rs.values()} == {"right", "wrong"}]
    # One of each kind first: six of the same would say less.
    first: dict[Any, Mapping[str, Record]] = {}
    others = [rs for rs in mixed if first.setdefault(next(iter(rs.values())).get("kind"), rs) is not rs]
    out = []
    for rs in [*first.values(), *others][:_EXAMPLES]:
        replies = [{"label": label, **_clipped(whole(rs[name]))} for name, label in labels.items() if name in rs]
        question = replies[0].get("question") or replies[0]["item"]
        out.append({"question": question, "gold": replies[0].get("gold"), "replies": replies})
    return out


def _clipped(record: Record) -> dict[str, Any]:
    shown = dict(record)
    for name in ("question", "reasoning", "answer"):
        text = shown.get(name) or ""
        if len(text) > _MOST_SHOWN:
            half = _MOST_SHOWN // 2
            left_out = len(text) - 2 * half
            shown[name] = f"{text[:half]}\n[… {left_out:,} characters left out …]\n{text[-half:]}"
    return shown


def _failures(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Each way in which requests failed, how often, and the first one's sentence."""
    counts: Counter[tuple[str, str]] = Counter()
    first: dict[tuple[str, str], str] = {}
    for r in records:
        if r["outcome"] != "ok":
            key = (r["channel"], r["outcome"])
            counts[key] += 1
            first.setdefault(key, r["detail"])
    return [{"channel": c, "outcome": o, "n": n, "detail": first[(c, o)]} for (c, o), n in sorted(counts.items())]


def _renamed(name: str, channels: Mapping[str, Any]) -> str:
    """What figures call a channel whose own name no font here can draw; empty for all others."""
    return figures.label(name, channels).replace("\n", " ") if figures.missing_signs(name) else ""


def _spans(passed: run_figures.Passage, channels: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of the table beside outcomes over time."""
    return [
        {
            "begins": run_figures.clock(begins, passed),
            "pause": passed.pauses.get(number),
            "cells": {
                name: ", ".join(f"{row[number]} {o}" for o, row in passed.counts.get(name, {}).items() if row[number])
                for name in channels
            },
        }
        for number, begins in enumerate(passed.begins)
    ]


def _client(notes: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """How the client did: the starts of the run, and a row for each thing that was measured at them."""

    def biases(field: str, form: str) -> list[str]:
        return [form.format(note["bias"][field]) if note["bias"] else "–" for note in notes]

    flights = [note["in_flight"] for note in notes]
    rows = [
        ("streams that it was measured at", biases("streams", "{}")),
        ("first token later by, mean", biases("first_token_ms", "{:.2f} ms")),
        ("first token later by, p99", biases("first_token_p99_ms", "{:.2f} ms")),
        ("time between tokens off by", biases("inter_token_share", "{:+.2%}")),
        ("CPU of a request", biases("cpu_ms_per_request", "{:.2f} ms")),
        ("event loop late, p50", [f"{note['lag_ms']['p50']:.2f} ms" for note in notes]),
        ("event loop late, p99", [f"{note['lag_ms']['p99']:.2f} ms" for note in notes]),
        ("event loop late, most", [f"{note['lag_ms']['max']:.2f} ms" for note in notes]),
        ("requests in flight, asked for", [str(flight["asked"] or "open loop") for flight in flights]),
        ("requests in flight, mean", [f"{flight['mean']:.1f}" for flight in flights]),
        ("requests in flight, most", [str(flight["peak"]) for flight in flights]),
        ("share of one core", [f"{note['cpu_share']:.0%}" for note in notes]),
        ("sent after they were due, p99", [f"{note['late_ms']['p99']:.1f} ms" for note in notes]),
    ]
    return [str(number) for number in range(1, len(notes) + 1)], rows


def _task(name: str) -> dict[str, Any]:
    """What is known of the task; nothing where it was a file that is no longer there."""
    try:
        return asdict(facts(name))
    except Dsr1kitError:
        return {}


def _percent(interval: Mapping[str, float] | None) -> str:
    if interval is None:
        return "–"
    return f"{interval['value']:.1%} ({interval['low'] * 100:.1f}–{interval['high'] * 100:.1f})"


def _points(interval: Mapping[str, float]) -> str:
    return f"{interval['value'] * 100:+.1f} ({interval['low'] * 100:+.1f} to {interval['high'] * 100:+.1f})"


def _seconds(value: Any) -> str:
    # A percentile of a channel that never answered is jinja's undefined.
    return duration(value) if isinstance(value, int | float) else "–"


def _sure_seconds(interval: Any) -> str:
    """A percentile with its interval; the percentile alone where there were too few values for one."""
    if not interval:
        return "–"
    if interval["low"] is None or interval["high"] is None:
        bounds = [f"from {duration(interval['low'])}"] if interval["low"] is not None else []
        return " ".join([duration(interval["value"]), *(f"({b})" for b in bounds)])
    value, low, high = (duration(interval[k]) for k in ("value", "low", "high"))
    if len({text.rpartition(" ")[2] for text in (value, low, high)}) == 1:
        low = low.rpartition(" ")[0]
        high = high.rpartition(" ")[0]
    return f"{value} ({low}–{high})"


def _money(value: float | None, currency: str | None) -> str:
    if value is None:
        return "–"
    return "0" if value == 0 else f"{currency or ''} {value:.3g}".strip()


def _sure_money(channel: Mapping[str, Any]) -> str:
    """Cost of 1,000 right answers with its interval."""
    cost, interval = channel["cost_per_right"], channel["cost_per_right_interval"]
    if not cost or not interval:
        return _money(cost, channel["currency"])
    return f"{_money(cost * 1000, channel['currency'])} ({interval['low'] * 1000:.3g}–{interval['high'] * 1000:.3g})"


def _p(value: float | None) -> str:
    if value is None:
        return "–"
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _ratio(interval: Mapping[str, float] | None) -> str:
    if interval is None:
        return "–"
    return f"{interval['value']:.2f} ({interval['low']:.2f}–{interval['high']:.2f})"
