"""From records to summary.json: one entry a channel, one a pair, and a verdict in three lines.

Reads records as plain dicts, so that any run folder can be summarised again. Knows nothing about HTTP,
models or HTML.
"""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any

from dsr1kit.compare.stats import Interval, clustered_share, median_interval, paired_difference, percentiles
from dsr1kit.identity import told
from dsr1kit.records import ANSWERED

Record = Mapping[str, Any]


def summarize(
    records: Sequence[Record], channels: Sequence[str], promises: Mapping[str, float] | None = None
) -> dict[str, Any]:
    """The summary of a run: `channels`, `pairs` and `verdict`.

    Args:
        promises: share of requests that a channel's contract promises to answer, by channel.

    Accuracy counts replies that could be judged (whole ones, and truncated ones as they stand); requests
    that failed count in availability instead. Latency counts the same replies, never cached ones.
    """
    by_channel = {name: [r for r in records if r["channel"] == name] for name in channels}
    summaries = {name: _channel(rs, (promises or {}).get(name)) for name, rs in by_channel.items()}
    pairs = [_pair(a, b, by_channel) for a, b in combinations(channels, 2)]
    result = {"channels": summaries, "pairs": [p for p in pairs if p is not None]}
    return result | {"verdict": verdict(result)}


def judged(records: Iterable[Record], *, truncated: bool = True) -> dict[str, list[bool]]:
    """For each item, right or not of each sample that has a verdict."""
    out: defaultdict[str, list[bool]] = defaultdict(list)
    for r in records:
        if r["verdict"] != "unscored" and (truncated or r["outcome"] == "ok"):
            out[r["item"]].append(r["verdict"] == "right")
    return dict(out)


def timed(records: Iterable[Record], name: str) -> list[float]:
    """The values of one timing field that may enter a latency figure."""
    return [r[name] for r in records if r["outcome"] in ANSWERED and not r["from_cache"] and r.get(name) is not None]


def _channel(records: Sequence[Record], promised: float | None = None) -> dict[str, Any]:
    outcomes = Counter(r["outcome"] for r in records)
    answered = [r for r in records if r["outcome"] in ANSWERED]
    right = sum(r["verdict"] == "right" for r in records)
    costs = [r["cost"] for r in records if r["cost"] is not None]
    gaps = timed(records, "inter_token_s")
    thought = sum(r["reasoning_tokens"] or 0 for r in answered)
    said = sum(r["answer_tokens"] or 0 for r in answered)
    reached = defaultdict(list)
    for r in records:
        if r["outcome"] != "over_budget":
            reached[r["item"]].append(r["outcome"] in ANSWERED)
    cost_total = sum(costs) if costs else None
    return {
        "n": len(records),
        "outcomes": dict(sorted(outcomes.items(), key=lambda kv: -kv[1])),
        "accuracy": _interval(clustered_share(judged(records))),
        "accuracy_without_truncated": _interval(clustered_share(judged(records, truncated=False))),
        "n_scored": sum(len(v) for v in judged(records).values()),
        "n_right": right,
        "availability": _interval(clustered_share(reached)),
        "promise": None if promised is None else promise(clustered_share(reached), promised),
        "models_served": dict(Counter(r["model_served"] for r in answered if r.get("model_served"))),
        "substitutions": sorted({told(r.get("model_requested") or "", r.get("model_served")) for r in answered} - {""}),
        "first_token_s": percentiles(timed(records, "first_token_s")),
        "first_answer_s": percentiles(timed(records, "first_answer_s")),
        "first_answer_median": _interval(median_interval(timed(records, "first_answer_s"))),
        "total_s": percentiles(timed(records, "total_s")),
        "tokens_per_s": 1 / statistics.median(gaps) if gaps and statistics.median(gaps) > 0 else None,
        "reasoning_tokens_share": thought / (thought + said) if thought + said else None,
        "cost_total": cost_total,
        "cost_per_right": cost_total / right if cost_total is not None and right else None,
        "currency": next((r["currency"] for r in records if r["currency"]), None),
        "emulated": any(r["emulated"] for r in records),
        "accuracy_by_kind": {
            kind: _interval(clustered_share(judged(r for r in records if r.get("kind") == kind)))
            for kind in dict.fromkeys(r.get("kind") for r in records)
            if kind
        },
    }


def promise(measured: Interval | None, promised: float) -> dict[str, Any]:
    """What was promised against what was measured: kept, broken, or open while the interval holds both."""
    held = "open"
    if measured is not None:
        held = "kept" if measured.low >= promised else "broken" if measured.high < promised else "open"
    return {"promised": promised, "held": held}


def _interval(interval: Interval | None) -> dict[str, float] | None:
    return None if interval is None else interval._asdict()


def _pair(a: str, b: str, by_channel: Mapping[str, Sequence[Record]]) -> dict[str, Any] | None:
    difference = paired_difference(judged(by_channel[a]), judged(by_channel[b]))
    if difference is None:
        return None
    times = [timed(by_channel[name], "first_answer_s") for name in (a, b)]
    ratio = statistics.median(times[0]) / statistics.median(times[1]) if all(times) else None
    return {
        "a": a,
        "b": b,
        "accuracy_difference": {"value": difference.value, "low": difference.low, "high": difference.high},
        "differs": difference.excludes_zero,
        "items": difference.items,
        "items_to_settle": difference.items_to_settle,
        "first_answer_ratio": ratio,
    }


def verdict(summary: Mapping[str, Any]) -> list[str]:
    """Three lines for a person: quality, speed, money with availability; and whether other models answered."""
    channels = summary["channels"]
    others = [f"{name_of(name, c)} {said}" for name, c in channels.items() for said in c["substitutions"]]
    return [
        "Quality: " + _quality(channels, summary["pairs"]),
        "Speed: " + _speed(channels),
        "Cost and availability: " + _money(channels),
        *(["Model: " + "; ".join(others) + "."] if others else []),
    ]


def name_of(name: str, summary: Mapping[str, Any]) -> str:
    """A channel's name, marked when it was emulated and its own name does not say so."""
    return f"{name} (emulated)" if summary["emulated"] and not name.startswith("emulated:") else name


def _quality(channels: Mapping[str, Any], pairs: Sequence[Mapping[str, Any]]) -> str:
    scored = {n: c for n, c in channels.items() if c["accuracy"]}
    if not scored:
        return "no reply could be judged."
    order = sorted(scored, key=lambda n: -scored[n]["accuracy"]["value"])
    best = order[0]
    acc = scored[best]["accuracy"]
    sure = f"{acc['value']:.0%} ({acc['low']:.0%} to {acc['high']:.0%})"
    parts = [f"{name_of(best, scored[best])} is right in {sure}"]
    for name in order[1:]:
        pair = next((p for p in pairs if {p["a"], p["b"]} == {best, name}), None)
        if pair is None:
            continue
        sign = 1 if pair["a"] == best else -1
        low, high = sorted(100 * sign * pair["accuracy_difference"][k] for k in ("low", "high"))
        label = name_of(name, scored[name])
        if pair["differs"] and low > 0:
            parts.append(f"{label} is {low:.0f} to {high:.0f} points behind")
        elif pair["differs"]:
            # The best over all items need not be so over those that both answered.
            items = pair["items"]
            parts.append(f"{label} is {-high:.0f} to {-low:.0f} points ahead on the {items} items both answered")
        else:
            settle = pair["items_to_settle"]
            more = f"about {_round_up(settle)} items would settle it" if settle else "no gap seen to settle"
            parts.append(f"no difference shown to {label} ({low:+.0f} to {high:+.0f} points; {more})")
    return "; ".join(parts) + "."


def _speed(channels: Mapping[str, Any]) -> str:
    medians = {n: c["first_answer_s"]["p50"] for n, c in channels.items() if c["first_answer_s"]}
    if not medians:
        return "no answer arrived."
    order = sorted(medians, key=lambda n: medians[n])
    medians_told = [
        f"{name_of(n, channels[n])} {medians[n]:.2f} s (p95 {channels[n]['first_answer_s']['p95']:.2f} s)"
        for n in order
    ]
    return "first answer after (median) " + ", ".join(medians_told) + "."


def _money(channels: Mapping[str, Any]) -> str:
    said = []
    for name, c in channels.items():
        if c["cost_per_right"] is None:
            cost = "price unknown" if c["currency"] is None else "nothing right"
        elif c["cost_per_right"] == 0:
            cost = "no fee"
        else:
            cost = f"{c['currency']} {c['cost_per_right'] * 1000:.3g} per 1,000 right answers"
        share = c["availability"]["value"] if c["availability"] else 0.0
        said.append(f"{name_of(name, c)} {cost}, {share:.1%} answered" + _promise(c["promise"]))
    return "; ".join(said) + "."


def _promise(promise: Mapping[str, Any] | None) -> str:
    if promise is None:
        return ""
    verdicts = {"kept": "kept", "broken": "broken", "open": "neither kept nor broken for certain"}
    return f" ({100 * promise['promised']:.6g}% promised: {verdicts[promise['held']]})"


def _round_up(n: int) -> str:
    step = 10 ** max(0, len(str(n)) - 2)
    return f"{-(-n // step) * step:,}"
