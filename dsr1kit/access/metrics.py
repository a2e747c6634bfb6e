"""Twelve numbers that say how a router and its cache are doing; Prometheus text, a frame, a live table.

Counts what it is told; knows nothing about requests, channels or HTTP.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict, deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from dsr1kit.records import ANSWERED, BUSY, Outcome, Reply

if TYPE_CHECKING:
    import pandas as pd
    from rich.table import Table

_KEPT = 10_000  # requests over which percentiles and rates are taken

#: The twelve, with what they mean; names and order are fixed.
TWELVE: dict[str, str] = {
    "requests_per_s": "requests ended a second",
    "success_share": "share of requests that were answered, truncated ones included",
    "busy": "requests that ended busy, by outcome",
    "first_token_s": "time to the first token, p50 and p99",
    "total_s": "time to the end, p99",
    "in_flight": "requests under way",
    "open_circuits": "channels that are not asked at present",
    "amplification": "upstream calls for each request",
    "hedge_win_share": "share of hedges that gave the first token",
    "cache_hit_share": "share of requests answered from the cache, or together with an equal one",
    "tokens_per_s": "reasoning and answer tokens a second",
    "cost": "money spent, by currency",
}


class Metrics:
    """Counters of one router; `cache` and `circuits` are asked when a snapshot is taken."""

    def __init__(self) -> None:
        self.requests = self.answered = self.calls = self.hedges = self.hedge_wins = self.in_flight = 0
        self.busy: Counter[str] = Counter()
        self.outcomes: Counter[str] = Counter()
        self.cost: defaultdict[str, float] = defaultdict(float)
        self.reasoning_tokens = self.answer_tokens = 0
        self.cache: Any = None
        self.circuits: Callable[[], dict[str, tuple[str, Any]]] | None = None
        self._first: deque[float] = deque(maxlen=_KEPT)
        self._total: deque[float] = deque(maxlen=_KEPT)
        self._ends: deque[tuple[float, int, int]] = deque(maxlen=_KEPT)
        self._began_at: float | None = None

    def began(self, now: float) -> None:
        """A request begins at the loop time `now`."""
        self.in_flight += 1
        if self._began_at is None:
            self._began_at = now

    def ended(self, now: float, reply: Reply | None, calls: int, hedges: int, hedge_won: bool) -> None:
        """A request ends; `reply` is None where its caller cancelled it."""
        self.in_flight -= 1
        self.requests += 1
        self.calls += calls
        self.hedges += hedges
        self.hedge_wins += hedge_won
        if reply is None:
            self.outcomes[Outcome.CANCELLED.value] += 1
            return
        self.outcomes[reply.outcome.value] += 1
        if reply.outcome in ANSWERED:
            self.answered += 1
        elif reply.outcome in BUSY:
            self.busy[reply.outcome.value] += 1
        thought, said = reply.usage.reasoning_tokens or 0, reply.usage.answer_tokens or 0
        self.reasoning_tokens += thought
        self.answer_tokens += said
        self._ends.append((now, thought, said))
        if reply.timing.first_token_s is not None:
            self._first.append(reply.timing.first_token_s)
        if reply.timing.total_s is not None:
            self._total.append(reply.timing.total_s)

    def paid(self, amount: float, currency: str) -> None:
        """An upstream call cost `amount`, whether its answer was used or not."""
        self.cost[currency] += amount

    def snapshot(self) -> dict[str, Any]:
        """The twelve, by name; None where nothing has been seen yet. Rates are over the last 10,000 requests."""
        span = self._span()
        hits = self.cache.hits + self.cache.coalesced if self.cache is not None else 0
        asked = hits + self.cache.misses if self.cache is not None else 0
        states = self.circuits() if self.circuits is not None else {}
        first = _percentiles(self._first)
        return {
            "requests_per_s": len(self._ends) / span if span else None,
            "success_share": self.answered / self.requests if self.requests else None,
            "busy": dict(self.busy),
            "first_token_s": {"p50": first[0], "p99": first[1]},
            "total_s": {"p99": _percentiles(self._total)[1]},
            "in_flight": self.in_flight,
            "open_circuits": sum(state != "closed" for state, _ in states.values()),
            "amplification": self.calls / self.requests if self.requests else None,
            "hedge_win_share": self.hedge_wins / self.hedges if self.hedges else None,
            "cache_hit_share": hits / asked if asked else None,
            "tokens_per_s": {
                "reasoning": sum(t for _, t, _ in self._ends) / span if span else None,
                "answer": sum(s for _, _, s in self._ends) / span if span else None,
            },
            "cost": dict(self.cost),
        }

    def _span(self) -> float:
        """Seconds that the kept requests took together."""
        if not self._ends or self._began_at is None:
            return 0.0
        begin = self._began_at if len(self._ends) < _KEPT else self._ends[0][0]
        return max(1e-9, self._ends[-1][0] - begin)

    def prometheus(self) -> str:
        """The twelve in Prometheus' text exposition format (version 0.0.4)."""
        lines: list[str] = []
        for name, value in self.snapshot().items():
            full = f"dsr1kit_{name}"
            lines += [f"# HELP {full} {TWELVE[name]}", f"# TYPE {full} gauge"]
            label = {"busy": "outcome", "cost": "currency", "tokens_per_s": "kind"}.get(name, "quantile")
            for key, one in value.items() if isinstance(value, dict) else (("", value),):
                shown = {"p50": "0.5", "p99": "0.99"}.get(key, key)
                tag = f'{{{label}="{_escaped(shown)}"}}' if key else ""
                lines.append(f"{full}{tag} {_number(one)}")
        return "\n".join(lines) + "\n"

    def rows(self) -> list[tuple[str, str, float]]:
        """(metric, label, value) of all that is known; the label is empty, a percentile, an outcome or a currency."""
        out = []
        for name, value in self.snapshot().items():
            for key, one in value.items() if isinstance(value, dict) else (("", value),):
                out.append((name, key, math.nan if one is None else float(one)))
        return out

    def frame(self) -> pd.DataFrame:
        """The rows as a frame with the columns metric, label, value, meaning."""
        import pandas as pd

        rows = [(name, label, value, TWELVE[name]) for name, label, value in self.rows()]
        return pd.DataFrame(rows, columns=["metric", "label", "value", "meaning"])

    def table(self) -> Table:
        """A rich table, to be shown once or inside `rich.live.Live`."""
        from rich.table import Table

        table = Table("metric", "", "value", box=None, header_style="bold", pad_edge=False)
        for name, label, value in self.rows():
            table.add_row(name, label, "–" if math.isnan(value) else f"{value:,.4g}")
        return table


def _percentiles(values: deque[float]) -> tuple[float | None, float | None]:
    """p50 and p99 by nearest rank."""
    if not values:
        return None, None
    ordered = sorted(values)
    return ordered[int(0.5 * (len(ordered) - 1))], ordered[math.ceil(0.99 * (len(ordered) - 1))]


def _number(value: float | None) -> str:
    """As the format spells it: NaN, +Inf, -Inf."""
    if value is None or math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "+Inf" if value > 0 else "-Inf"
    return repr(float(value))


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
