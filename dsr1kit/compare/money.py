"""What a comparison costs: before it, from prices and token counts; after it, for every right answer.

Reads items, prices and records; asks nothing of anyone. What nobody has measured stays unknown (None) here, and only
its upper bound is told.
"""

from __future__ import annotations

import datetime as dt
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dsr1kit.access.prices import Price
from dsr1kit.access.stream import estimate_tokens
from dsr1kit.compare.items import Item
from dsr1kit.compare.stats import Interval, ratio_of_totals
from dsr1kit.records import ANSWERED, Outcome

Record = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class ItemTokens:
    """What the requests of one item took in an earlier run, mean over its samples."""

    kind: str
    prompt_tokens: float
    completion_tokens: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenGuess:
    """How many tokens a request is expected to take, and how that is known.

    Attributes:
        most: longest completion that may come, thinking included.
        observed: items of an earlier run; where there are some, they decide.
        completion: mean completion where none were observed; None: nobody knows.
        source: where `observed` or `completion` comes from.
        count: tokens in a prompt's text, where nothing was observed.
    """

    most: int
    observed: tuple[ItemTokens, ...] = ()
    completion: float | None = None
    source: str = ""
    count: Callable[[str], int] = estimate_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What one channel's part of a run is expected to take.

    Attributes:
        requests: how many there are.
        prompt_tokens, completion_tokens: expected over all of them; None where nobody knows, of prompts where the
            questions are not at hand (then they are in no amount of money either).
        completion_most: tokens of all completions if each ran to its limit.
        expected: money, in `currency`; None where price or tokens are unknown.
        low, high: its 95 % interval, from the spread between an earlier run's items and a tariff's hours; None
            without such a run.
        bound: money if every completion ran to its limit in the dearest hour of the run.
        tokens_source: how the tokens are known; empty where they are not.
        notes: what a person should know beside the figures, in sentences.
    """

    requests: int
    prompt_tokens: float | None
    completion_tokens: float | None
    completion_most: int
    low: float | None
    expected: float | None
    high: float | None
    bound: float | None
    currency: str | None
    tokens_source: str
    notes: tuple[str, ...]


def expected_cost(
    items: Sequence[Item],
    samples: int,
    price: Price | None,
    tokens: TokenGuess,
    at: dt.datetime,
    duration: dt.timedelta | None,
) -> Estimate:
    """What asking `items`, each `samples` times, is expected to cost on a channel.

    Args:
        price: what the channel charges; None: unknown.
        at: when the run begins (timezone-aware).
        duration: how long it takes, requests completing evenly over it; None: unknown.

    A request is priced by the moment at which it completes, so a run that crosses a tariff's peak is priced by the
    share of it that lies in the peak.
    """
    requests = len(items) * samples
    notes: list[str] = []
    completion_total: float | None = None
    if tokens.observed:
        prompt_total = requests * _projected(items, [(o.kind, o.prompt_tokens) for o in tokens.observed]).value
        completion_total = requests * _projected(items, [(o.kind, o.completion_tokens) for o in tokens.observed]).value
    else:
        texts = Counter(item.prompt for item in items)
        prompt_total = float(samples * sum(times * tokens.count(text) for text, times in texts.items()))
        if tokens.completion is not None:
            completion_total = requests * min(tokens.completion, tokens.most)
    low = expected = high = bound = None
    if price is None:
        notes.append("the price is unknown: give it as price = {input = ..., output = ...} in a channel file")
    elif price.free:
        low = expected = high = bound = 0.0
    else:
        mean, least, most, told = _factors(price, at, duration)
        notes += told
        bound = most * (prompt_total * price.input + requests * tokens.most * price.output) / 1e6
        if tokens.observed:
            each = [(o.kind, _of(price, o.prompt_tokens, o.completion_tokens)) for o in tokens.observed]
            projected = _projected(items, each)
            expected = mean * requests * projected.value
            if not math.isnan(projected.low):
                low, high = least * requests * projected.low, min(bound, most * requests * projected.high)
        elif completion_total is not None:
            expected = mean * _of(price, prompt_total, completion_total)
        else:
            notes.append(
                "how long answers at this task are is not known, so that only an upper bound can be told; a run of a "
                "few questions, named by --like, tells it"
            )
    return Estimate(
        requests=requests,
        prompt_tokens=prompt_total if tokens.observed or any(item.prompt for item in items) else None,
        completion_tokens=completion_total,
        completion_most=requests * tokens.most,
        low=low,
        expected=expected,
        high=high,
        bound=bound,
        currency=None if price is None else price.currency,
        tokens_source=tokens.source,
        notes=tuple(notes),
    )


def _of(price: Price, prompt_tokens: float, completion_tokens: float) -> float:
    return (prompt_tokens * price.input + completion_tokens * price.output) / 1e6


def _projected(items: Sequence[Item], observed: Sequence[tuple[str, float]]) -> Interval:
    """The mean over `items` of what was observed of others, kind by kind, with its 95 % prediction interval.

    Kinds that were not observed are taken as the mean of all. With fewer observations than one more than there are
    kinds nothing is known of the spread, and the bounds are NaN.
    """
    by_kind: defaultdict[str, list[float]] = defaultdict(list)
    for kind, value in observed:
        by_kind[kind].append(value)
    everything = [value for _, value in observed]
    wanted = Counter(item.kind if item.kind in by_kind else None for item in items)
    cells = {kind: everything if kind is None else by_kind[kind] for kind in wanted}
    shares = {kind: count / len(items) for kind, count in wanted.items()}
    mean = math.fsum(shares[kind] * float(np.mean(values)) for kind, values in cells.items())
    residuals = np.concatenate([np.asarray(values) - np.mean(values) for values in by_kind.values()])
    freedom = len(everything) - len(by_kind)
    if freedom < 1:
        return Interval(mean, math.nan, math.nan)
    # Here, not above: it takes most of a second, which every refused command would wait for.
    from scipy import stats

    variance = float(np.sum(residuals**2)) / freedom
    spread = math.fsum(shares[kind] ** 2 / len(values) for kind, values in cells.items()) + 1 / len(items)
    half = float(stats.t.ppf(0.975, freedom)) * math.sqrt(variance * spread)
    return Interval(mean, max(0.0, mean - half), mean + half)


def _factors(price: Price, at: dt.datetime, duration: dt.timedelta | None) -> tuple[float, float, float, list[str]]:
    """A tariff's factor on the price over the run: mean, lowest and highest, and what to tell of it."""
    tariff = price.tariff
    if tariff is None:
        return 1.0, 1.0, 1.0, []
    now = tariff.factor_at(at)
    if duration is None:
        low, high = sorted((1.0, tariff.factor))
        said = (
            f"how long the run takes is not known: it is priced as at its start; the peak of {tariff.name} costs "
            f"{tariff.factor:g} times as much"
        )
        return now, low, high, [said]
    end = at + duration
    moments = [at, *(moment for moment in tariff.changes(at) if moment < end)]
    spans = [(tariff.factor_at(a), (b - a).total_seconds()) for a, b in zip(moments, [*moments[1:], end], strict=True)]
    total = math.fsum(seconds for _, seconds in spans)
    mean = math.fsum(factor * seconds for factor, seconds in spans) / total if total else now
    highest = max(factor for factor, _ in spans)
    told: list[str] = []
    if highest > 1.0:
        share = math.fsum(seconds for factor, seconds in spans if factor == highest) / total if total else 1.0
        told.append(f"{share:.0%} of the run is priced at {highest:g} times, in the peak of {tariff.name}")
        cheaper = price.next_cheaper(at) if tariff.peak(at) else None
        if cheaper is not None:
            told.append(f"it gets cheaper at {cheaper.astimezone(dt.UTC):%Y-%m-%d %H:%M} UTC")
    return mean, min(factor for factor, _ in spans), highest, told


def observed_tokens(records: Iterable[Record]) -> tuple[ItemTokens, ...]:
    """Per item, the tokens that its answered requests took; cached replies, which cost nothing, are left out."""
    by_item: defaultdict[str, list[Record]] = defaultdict(list)
    for r in records:
        counted = r.get("prompt_tokens") is not None and _completion(r) is not None
        if r["outcome"] in ANSWERED and not r["from_cache"] and counted:
            by_item[r["item"]].append(r)
    return tuple(
        ItemTokens(
            str(rs[0].get("kind") or ""),
            float(np.mean([r["prompt_tokens"] for r in rs])),
            float(np.mean([_completion(r) for r in rs])),
        )
        for rs in by_item.values()
    )


def _completion(record: Record) -> int | None:
    counts = [record.get(name) for name in ("reasoning_tokens", "answer_tokens")]
    return None if counts == [None, None] else sum(count or 0 for count in counts)


def cost_per_right(records: Iterable[Record]) -> Interval | None:
    """What one channel charged in all, for each right answer, with an interval clustered by item.

    Requests that failed and were charged count, too. None where the price is unknown, nothing was right, or too little
    was right to bound it.
    """
    costs: defaultdict[str, float] = defaultdict(float)
    right: defaultdict[str, float] = defaultdict(float)
    priced = False
    for r in records:
        if r["outcome"] == Outcome.OVER_BUDGET:
            continue
        priced = priced or r["cost"] is not None
        costs[r["item"]] += r["cost"] or 0.0
        right[r["item"]] += r["verdict"] == "right"
    return ratio_of_totals(costs, right) if priced and any(right.values()) else None


def reasoning_share(records: Iterable[Record]) -> Interval | None:
    """Share of one channel's answered tokens that were thinking, with an interval clustered by item."""
    thought: defaultdict[str, float] = defaultdict(float)
    both: defaultdict[str, float] = defaultdict(float)
    for r in records:
        if r["outcome"] in ANSWERED and (total := _completion(r)) is not None:
            thought[r["item"]] += r["reasoning_tokens"] or 0
            both[r["item"]] += total
    share = ratio_of_totals(thought, both) if any(both.values()) else None
    return None if share is None else Interval(share.value, max(0.0, share.low), min(1.0, share.high))
