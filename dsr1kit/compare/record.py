"""From a reply to a record: one line of records.jsonl.

Knows replies, items and prices; nothing about files, load or statistics.
"""

from __future__ import annotations

import datetime as dt
from typing import Any

from dsr1kit.access.prices import Price
from dsr1kit.compare.items import Item
from dsr1kit.compare.judge import final_of
from dsr1kit.records import Attempt, Outcome, Reply, Verdict


def to_record(
    reply: Reply, channel: str, item: Item, sample: int, price: Price | None, verdict: Verdict
) -> dict[str, Any]:
    """One line of records.jsonl (without the run's id)."""
    timing, usage = reply.timing, reply.usage
    due = reply.due_at
    ended = dt.datetime.now(dt.UTC) if due is None else dt.datetime.fromtimestamp(due + (timing.total_s or 0.0), dt.UTC)
    cost = price.at(ended).cost(usage) if price is not None else None  # charged by when it completes
    asked = reply.outcome is not Outcome.OVER_BUDGET
    attempts = reply.attempts or ((Attempt(channel, reply.outcome, timing.total_s),) if asked else ())
    return {
        "channel": channel,
        "item": item.id,
        "kind": item.kind,
        "language": item.language,
        "sample": sample,
        "model_requested": reply.model_requested,
        "model_served": reply.model_served,
        "outcome": reply.outcome.value,
        "detail": reply.detail,
        "due_at": dt.datetime.fromtimestamp(due, dt.UTC).isoformat() if due is not None else None,
        "queue_s": _rounded(timing.queue_s),
        "connect_s": _rounded(timing.connect_s),
        "connection_reused": timing.connection_reused,
        "first_token_s": _rounded(timing.first_token_s),
        "first_answer_s": _rounded(timing.first_answer_s),
        "think_s": _rounded(timing.think_s),
        "inter_token_s": _rounded(timing.inter_token_s),
        "total_s": _rounded(timing.total_s),
        "prompt_tokens": usage.prompt_tokens,
        "reasoning_tokens": usage.reasoning_tokens,
        "answer_tokens": usage.answer_tokens,
        "token_count_source": usage.source,
        "token_split_source": usage.split_source,
        "question": item.prompt,
        "gold": item.gold,
        "scorer": item.scorer,
        "final": final_of(reply, item),
        "reasoning": reply.reasoning,
        "answer": reply.answer,
        "finish_reason": reply.finish_reason,
        "verdict": verdict,
        "cost": cost,
        "currency": price.currency if price is not None else None,
        "attempts": [{"channel": a.channel, "outcome": a.outcome.value, "total_s": a.total_s} for a in attempts],
        "from_cache": reply.from_cache,
        "base_url": reply.extra.get("base_url") or None,
        # The kit's emulator marks what it sends, so that a catalogue entry that points at one is told too.
        "emulated": reply.emulated,
    }


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 6)
