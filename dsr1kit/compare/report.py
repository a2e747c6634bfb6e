"""report.html: one file that opens offline, the verdict first, figures with their tables beside them.

Puts together what summary.py computed and figures.py drew; computes nothing itself.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dsr1kit.compare import figures
from dsr1kit.compare.summary import Record, name_of
from dsr1kit.keys import redact

_EXAMPLES = 6


def render(run: Mapping[str, Any], records: Sequence[Record], summary: Mapping[str, Any]) -> str:
    """The report as HTML text.

    Args:
        run: run.json; records: records.jsonl; summary: summary.json, all as data.
    """
    channels = summary["channels"]
    labels = {name: name_of(name, c) for name, c in channels.items()}
    drawn = {
        "accuracy": figures.accuracy_against_latency(summary),
        "latency": figures.latency_distributions(records, channels),
        "outcomes": figures.outcomes(channels),
        "kinds": figures.accuracy_by_kind(channels),
    }
    return fill(
        "report.html.j2",
        run=run,
        identity=run["identity"],
        summary=summary,
        channels=channels,
        labels=labels,
        figures={name: figures.to_svg(figure) for name, figure in drawn.items()},
        examples=disagreements(records, labels),
        failures=_failures(records),
        emulated=[labels[n] for n, c in channels.items() if c["emulated"]],
        kinds=list(dict.fromkeys(k for c in channels.values() for k in c["accuracy_by_kind"])),
    )


def fill(template: str, **values: Any) -> str:
    """One of this folder's templates as text, with keys redacted."""
    import jinja2

    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"percent": _percent, "seconds": _seconds, "money": _money, "points": _points}
    return redact(environment.get_template(template).render(**values))


def disagreements(records: Sequence[Record], labels: Mapping[str, str]) -> list[dict[str, Any]]:
    """Questions that some channels answered right and others wrong, with each channel's own words."""
    by_item: defaultdict[tuple[str, int], list[Record]] = defaultdict(list)
    for r in records:
        if r["verdict"] != "unscored":
            by_item[(r["item"], r["sample"])].append(r)
    out: list[dict[str, Any]] = []
    seen_kinds: set[str] = set()
    # One of each kind first: six of the same would say less.
    mixed = [rs for rs in by_item.values() if {r["verdict"] for r in rs} == {"right", "wrong"}]
    for rs in sorted(mixed, key=lambda rs: (rs[0]["item"], rs[0]["sample"])):
        if len(out) < _EXAMPLES and rs[0].get("kind", "") not in seen_kinds:
            seen_kinds.add(rs[0].get("kind", ""))
            replies = [
                {"label": labels[name], **next(r for r in rs if r["channel"] == name)}
                for name in labels
                if any(r["channel"] == name for r in rs)
            ]
            out.append(
                {
                    "question": rs[0].get("question", rs[0]["item"]),
                    "gold": rs[0].get("gold"),
                    "replies": replies,
                }
            )
    return out


def _failures(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Each way in which requests failed, how often, and the first one's sentence."""
    groups: defaultdict[tuple[str, str], list[Record]] = defaultdict(list)
    for r in records:
        if r["outcome"] not in ("ok",):
            groups[(r["channel"], r["outcome"])].append(r)
    return [
        {"channel": channel, "outcome": outcome, "n": len(rs), "detail": rs[0]["detail"]}
        for (channel, outcome), rs in sorted(groups.items())
    ]


def _percent(interval: Mapping[str, float] | None) -> str:
    if interval is None:
        return "–"
    return f"{interval['value']:.1%} ({interval['low'] * 100:.1f}–{interval['high'] * 100:.1f})"


def _points(interval: Mapping[str, float]) -> str:
    return f"{interval['value'] * 100:+.1f} ({interval['low'] * 100:+.1f} to {interval['high'] * 100:+.1f})"


def _seconds(value: Any) -> str:
    # A percentile of a channel that never answered is jinja's undefined.
    if not isinstance(value, float):
        return "–"
    return f"{value * 1000:.0f} ms" if value < 1 else f"{value:.2f} s"


def _money(value: float | None, currency: str | None) -> str:
    if value is None:
        return "–"
    return "0" if value == 0 else f"{currency or ''} {value:.3g}".strip()
