"""From records to summary.json: one entry a channel, one a pair, and what they come to in words.

Reads records as plain dicts, so that any run folder can be summarised again; none of the texts of a record is
looked at, so that slim ones do. Knows nothing about HTTP, models or HTML; the words are verdict.py's.
"""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from itertools import combinations
from typing import Any

import numpy as np

from dsr1kit.compare import latency, load, money, published, stats
from dsr1kit.compare.stats import Interval, clustered_share, paired_difference, percentiles
from dsr1kit.compare.verdict import headline, verdict
from dsr1kit.compare.verdict import name_of as name_of
from dsr1kit.identity import told
from dsr1kit.records import ANSWERED, Outcome

Record = Mapping[str, Any]

#: Requests that one of the caller's clocks ended: slower than that clock, which is all that is known of them.
CLOCKED = frozenset({Outcome.QUEUED, Outcome.STALLED, Outcome.DEADLINE})
_CLOCKS = ("first_token_s", "first_answer_s", "total_s")
_PERCENTILES = ("p50", "p95", "p99")


def summarize(
    records: Sequence[Record],
    channels: Sequence[str],
    promises: Mapping[str, float] | None = None,
    *,
    run: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The summary of a run: `channels`, `pairs` and `verdict`; of a comparison more.

    Args:
        promises: share of requests that a channel's contract promises to answer, by channel.
        run: a comparison's run.json as data. With it there are `pareto`, `headline`, `published`, `objective` and
            `client`, what the run noted about its own client, and the verdict knows them.

    Accuracy counts replies that could be judged (whole ones, and truncated ones as they stand); requests
    that failed count in availability instead. Latency counts the same replies, never cached ones; requests
    that a clock ended enter the censored percentiles beside.
    """
    by_channel: dict[str, list[Record]] = {name: [] for name in channels}
    for r in records:
        if r["channel"] in by_channel:
            by_channel[r["channel"]].append(r)
    objective = _objective(run)
    summaries = {name: _channel(rs, (promises or {}).get(name), objective) for name, rs in by_channel.items()}
    result: dict[str, Any] = {"channels": summaries, "pairs": _pairs(channels, by_channel)}
    if run is not None:
        result |= {
            "pareto": pareto(summaries),
            "objective": None if objective is None else dict(objective.bounds),
            "client": list(run.get("client") or []),
            "published": _published(by_channel, run["identity"].get("task", "")),
            "headline": headline(result, run["identity"].get("task", "")),
        }
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


def censored(records: Iterable[Record]) -> tuple[list[float], list[bool], list[str]]:
    """Times to the first answer in seconds, whether it came (else it is later than the time), and the items.

    Counts replies as `timed` does, and requests that a clock or the token limit ended before any answer.
    Requests that were turned away (throttled, overloaded, ...) say nothing about time: they are availability.
    """
    times, ended, items = [], [], []
    for r in records:
        if r["from_cache"] or not (r["outcome"] in ANSWERED or r["outcome"] in CLOCKED):
            continue
        came = r.get("first_answer_s") is not None
        at = r["first_answer_s"] if came else r.get("total_s")
        if at is not None:
            times.append(at)
            ended.append(came)
            items.append(r["item"])
    return times, ended, items


def timed_median(records: Iterable[Record], name: str) -> float | None:
    """The median of one timing field; None where no record has it."""
    values = timed(records, name)
    return float(np.median(values)) if values else None


def _timed_items(records: Iterable[Record], name: str) -> tuple[list[float], list[str]]:
    """What `timed` gives, and the item of each value."""
    values, items = [], []
    for r in records:
        if r["outcome"] in ANSWERED and not r["from_cache"] and (value := r.get(name)) is not None:
            values.append(value)
            items.append(r["item"])
    return values, items


def _by_item(records: Iterable[Record], name: str) -> dict[str, list[float]]:
    out: defaultdict[str, list[float]] = defaultdict(list)
    for value, item in zip(*_timed_items(records, name), strict=True):
        out[item].append(value)
    return dict(out)


def _channel(records: Sequence[Record], promised: float | None, objective: load.Objective | None) -> dict[str, Any]:
    answered = [r for r in records if r["outcome"] in ANSWERED]
    scored = judged(answered)
    right = sum(r["verdict"] == "right" for r in records)
    costs = [r["cost"] for r in records if r["cost"] is not None]
    gaps = timed(records, "inter_token_s")
    thought = sum(r["reasoning_tokens"] or 0 for r in answered)
    said = sum(r["answer_tokens"] or 0 for r in answered)
    cost_total = sum(costs) if costs else None
    reached: defaultdict[str, list[bool]] = defaultdict(list)
    kinds: defaultdict[str, list[Record]] = defaultdict(list)
    for r in records:
        if r["outcome"] != "over_budget":
            reached[r["item"]].append(r["outcome"] in ANSWERED)
        if r.get("kind"):
            kinds[r["kind"]].append(r)
    availability = clustered_share(reached)
    draws = Counter(r["item"] for r in records)
    clocks = {name: _timed_items(answered, name) for name in _CLOCKS}
    names = {(r.get("model_requested"), r.get("model_served")) for r in answered}
    return {
        "n": len(records),
        "n_items": len(draws),
        "n_samples": max(draws.values(), default=0),
        "outcomes": dict(sorted(Counter(r["outcome"] for r in records).items(), key=lambda kv: -kv[1])),
        "accuracy": _interval(clustered_share(scored)),
        "accuracy_without_truncated": _interval(clustered_share(judged(answered, truncated=False))),
        "n_scored": sum(len(v) for v in scored.values()),
        "n_unscored": sum(r["verdict"] == "unscored" for r in answered),
        "n_right": right,
        **_over_samples(scored, answered),
        "availability": _interval(availability),
        "promise": None if promised is None else promise(availability, promised),
        "goodput": None if objective is None else load.goodput(records, objective),
        "models_served": dict(Counter(r["model_served"] for r in answered if r.get("model_served"))),
        "substitutions": sorted({told(asked or "", served) for asked, served in names} - {""}),
        **{name: percentiles(values) for name, (values, _) in clocks.items()},
        **{f"{name}_interval": _percentile_intervals(*clock) for name, clock in clocks.items()},
        "first_answer_s_censored": _censored(records),
        "first_answer_median": _interval(_median(*clocks["first_answer_s"])),
        "time_split": time_split(answered),
        "connections": connections(answered),
        "tokens_per_s": 1 / statistics.median(gaps) if gaps and statistics.median(gaps) > 0 else None,
        "reasoning_tokens_share": thought / (thought + said) if thought + said else None,
        "cost_total": cost_total,
        "cost_per_right": cost_total / right if cost_total is not None and right else None,
        "cost_per_right_interval": _interval(money.cost_per_right(records)),
        "currency": next((r["currency"] for r in records if r["currency"]), None),
        "emulated": any(r["emulated"] for r in records),
        "accuracy_by_kind": {kind: _interval(clustered_share(judged(rs))) for kind, rs in kinds.items()},
    }


def _over_samples(scored: Mapping[str, Sequence[bool]], answered: Sequence[Record]) -> dict[str, Any]:
    """pass@k over k (doubling, to the most samples an item has) and majority voting; None with one sample."""
    most = max((len(v) for v in scored.values()), default=0)
    if most < 2:
        return {"pass_at_k": None, "pass_curve": [], "majority": None}
    ks = sorted({*(2**power for power in range(most.bit_length())), most})
    curve = [{"k": k, **share._asdict()} for k in ks if (share := stats.pass_at_k(scored, k)) is not None]
    finals: defaultdict[str, list[tuple[str | None, bool]]] = defaultdict(list)
    for r in answered:
        if r["verdict"] != "unscored":
            finals[r["item"]].append((r.get("final"), r["verdict"] == "right"))
    # Records of before final answers were kept cannot vote.
    voters = any(r.get("final") is not None for r in answered)
    majority = stats.majority_share(finals) if voters else None
    return {
        "pass_at_k": curve[-1] if curve and curve[-1]["k"] == most else None,
        "pass_curve": curve,
        "majority": None if majority is None else {"k": most, **majority._asdict()},
    }


def _percentile_intervals(values: Sequence[float], items: Sequence[str]) -> dict[str, Any] | None:
    """Each percentile with its interval, None for one that so few values do not bound; None without any value."""
    found = latency.percentile_intervals(values, clusters=items)
    return {q: _interval(found.get(q)) for q in _PERCENTILES} if values else None


def _median(values: Sequence[float], items: Sequence[str]) -> Interval | None:
    """The median, its interval the same as among the percentiles; of too few items for one, all that was seen."""
    found = latency.percentile_intervals(values, (50,), clusters=items).get("p50")
    return found or (Interval(float(np.median(values)), min(values), max(values)) if values else None)


def _censored(records: Iterable[Record]) -> dict[str, Any]:
    times, ended, items = censored(records)
    found = latency.censored_percentiles(times, ended, clusters=items)
    shown = {q: None if (p := found.get(q)) is None else p._asdict() for q in _PERCENTILES}
    return shown | {"censored": len(ended) - sum(ended), "n": len(ended)}


def time_split(records: Iterable[Record]) -> dict[str, float] | None:
    """Mean seconds an answered request spent in each stage; they add up to its mean whole time.

    `client_s` due to sent, `connect_s` DNS to TLS, `wait_s` to the first token (the far side's queue and
    prefill), `think_s` to the first answer, `answer_s` to the end. A reply that a limit cut in its thinking
    has thought to its end. None where nothing was measured.
    """
    rows = [
        (
            queue := r.get("queue_s") or 0.0,
            connect := r.get("connect_s") or 0.0,
            max(0.0, r["first_token_s"] - queue - connect),
            (r["total_s"] if (first := r.get("first_answer_s")) is None else first) - r["first_token_s"],
            0.0 if first is None else r["total_s"] - first,
        )
        for r in records
        if r["outcome"] in ANSWERED
        and not r["from_cache"]
        and r.get("first_token_s") is not None
        and r.get("total_s") is not None
    ]
    if not rows:
        return None
    means = np.mean(np.array(rows, dtype=float), axis=0)
    return dict(zip(("client_s", "connect_s", "wait_s", "think_s", "answer_s"), map(float, means), strict=True))


def connections(records: Iterable[Record]) -> dict[str, Any] | None:
    """First token over fresh and over kept connections, medians in seconds; None where nothing is connected to."""
    cold: list[Record] = []
    warm: list[Record] = []
    for r in records:
        if r["outcome"] in ANSWERED and not r["from_cache"] and r.get("connect_s") is not None:
            (warm if r.get("connection_reused") else cold).append(r)
    if not cold and not warm:
        return None

    return {
        "cold": {
            "n": len(cold),
            "first_token_p50_s": timed_median(cold, "first_token_s"),
            "connect_p50_s": timed_median(cold, "connect_s"),
        },
        "warm": {"n": len(warm), "first_token_p50_s": timed_median(warm, "first_token_s")},
    }


def promise(measured: Interval | None, promised: float) -> dict[str, Any]:
    """What was promised against what was measured: kept, broken, or open while the interval holds both."""
    held = "open"
    if measured is not None:
        held = "kept" if measured.low >= promised else "broken" if measured.high < promised else "open"
    return {"promised": promised, "held": held}


def _interval(interval: Interval | None) -> dict[str, float] | None:
    return None if interval is None else interval._asdict()


def _pairs(channels: Sequence[str], by_channel: Mapping[str, Sequence[Record]]) -> list[dict[str, Any]]:
    shares = {name: judged(rs) for name, rs in by_channel.items()}
    times = {name: _by_item(rs, "first_answer_s") for name, rs in by_channel.items()}
    medians = {name: timed_median(by_channel[name], "first_answer_s") for name in channels}
    pairs: list[dict[str, Any]] = []
    for a, b in combinations(channels, 2):
        difference = paired_difference(shares[a], shares[b])
        if difference is None:
            continue
        top, bottom = medians[a], medians[b]
        pairs.append(
            {
                "a": a,
                "b": b,
                "accuracy_difference": {"value": difference.value, "low": difference.low, "high": difference.high},
                "differs": difference.excludes_zero,
                "p": difference.p,
                "mcnemar_p": stats.mcnemar(shares[a], shares[b]),
                "items": difference.items,
                "items_to_settle": difference.items_to_settle,
                "first_answer_ratio": top / bottom if top is not None and bottom else None,
                "first_answer_ratio_interval": _interval(latency.paired_median_ratio(times[a], times[b])),
            }
        )
    corrected = stats.holm([pair["p"] for pair in pairs])
    return [
        pair | {"p_holm": p, "differs_after_holm": bool(pair["differs"] and p < 0.05)}
        for pair, p in zip(pairs, corrected, strict=True)
    ]


def pareto(channels: Mapping[str, Any]) -> list[str]:
    """Channels that no other beats, by the estimates alone.

    One beats another that is as accurate, as fast to the first answer and as cheap per right answer, and better
    in one of these. What a channel charges is compared within one currency, and with free ones; where it
    is not known, the channel is neither beaten nor beats.
    """
    points = {
        name: (c["accuracy"]["value"], c["first_answer_s"]["p50"], c["cost_per_right"], c["currency"])
        for name, c in channels.items()
        if c["accuracy"] and c["first_answer_s"]
    }

    def beats(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
        if a[2] is None or b[2] is None or (a[2] > 0 and b[2] > 0 and a[3] != b[3]):
            return False
        no_worse = a[0] >= b[0] and a[1] <= b[1] and (a[2] == 0 or (b[2] > 0 and a[2] <= b[2]))
        return bool(no_worse and a[:3] != b[:3])

    return [name for name, point in points.items() if not any(beats(other, point) for other in points.values())]


def _objective(run: Mapping[str, Any] | None) -> load.Objective | None:
    noted = (run or {}).get("objective")
    return load.Objective(**noted) if noted else None


def _published(by_channel: Mapping[str, Sequence[Record]], task: str) -> list[dict[str, Any]]:
    """What others have published for the same model and task, one entry a channel and figure; of no emulated one."""
    found = []
    for name, records in by_channel.items():
        if not any(r["emulated"] for r in records):
            model = next((r["model_requested"] for r in records if r.get("model_requested")), name)
            found += [{"channel": name, **_plain(score)} for score in published.scores(model, task)]
    return found


def _plain(score: Any) -> dict[str, Any]:
    return {k: v if isinstance(v, int | float | str | None) else str(v) for k, v in asdict(score).items()}
