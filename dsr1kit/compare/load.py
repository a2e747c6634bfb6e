"""Load: the moments at which requests are due, how many are in flight, and which of them were answered in time.

All times count from the moment a request was due, so that a client or a server that falls behind cannot hide it.
Knows records as plain dicts; nothing about channels, files or statistics beyond an interval.
"""

from __future__ import annotations

import datetime as dt
import math
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from dsr1kit.compare.stats import clustered_share
from dsr1kit.errors import UsageError
from dsr1kit.records import ANSWERED, Outcome

Record = Mapping[str, Any]
#: What was never asked of the far side says nothing about it.
_NOT_ASKED = frozenset({Outcome.OVER_BUDGET, Outcome.CANCELLED})
_LEAST_PAUSE_S = 60.0


_BOUNDS = ("first_token_s", "first_answer_s", "inter_token_s", "total_s")


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """A service objective: longest times, in seconds from the moment a request is due; None: any.

    Attributes:
        first_token_s: until the first reasoning or answer text.
        first_answer_s: until the first text of the answer, after any reasoning.
        inter_token_s: mean time between two tokens.
        total_s: until the last text.
    """

    first_token_s: float | None = None
    first_answer_s: float | None = None
    inter_token_s: float | None = None
    total_s: float | None = None

    def __post_init__(self) -> None:
        for name in _BOUNDS:
            bound = getattr(self, name)
            if bound is not None and not 0 < bound < math.inf:
                raise UsageError(f"{name} of an objective must be above 0 seconds and finite, not {bound}")
        if not self.bounds:
            raise UsageError(f"an objective needs at least one of {', '.join(_BOUNDS)}, as first_token_s=2,total_s=60")

    def __str__(self) -> str:
        return ",".join(f"{name}={bound:g}" for name, bound in self.bounds.items())

    @property
    def bounds(self) -> dict[str, float]:
        """Those that are set, by name."""
        return {name: bound for name in _BOUNDS if (bound := getattr(self, name)) is not None}

    def met(self, record: Record) -> bool:
        """Whether a request was answered, and in time; one that failed was not."""
        return record["outcome"] in ANSWERED and all(
            # An answer of a single piece has no time between tokens, and so none that is too long.
            name == "inter_token_s" if (value := record.get(name)) is None else value <= bound
            for name, bound in self.bounds.items()
        )


def parse_slo(text: str) -> Objective:
    """An objective from `first_token_s=2,total_s=60`.

    Raises:
        UsageError: a name that is no bound, one given twice, or a value that is no time.
    """
    bounds: dict[str, float] = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        name, _, value = (p.strip() for p in part.partition("="))
        if name not in _BOUNDS:
            raise UsageError(f"an objective has no {name!r}; expected {', '.join(_BOUNDS)}, as first_token_s=2")
        if name in bounds:
            raise UsageError(f"{name} is given twice in the objective {text!r}")
        try:
            bounds[name] = float(value)
        except ValueError:
            raise UsageError(f"{name} of an objective must be a number of seconds, not {value!r}") from None
    return Objective(**bounds)


def goodput(records: Sequence[Record], objective: Objective) -> dict[str, Any]:
    """How many of one channel's requests were answered within the objective.

    Returns:
        `met` and `asked` (failed requests were asked, those kept back by a budget or cancelled were not), `share`
        with its interval clustered by item (None where nothing was asked), and `per_s`, those met a second of the
        run (None where the run has no length). Pauses between two starts of a run do not count: stretches of at
        least a minute, and of twenty usual gaps between requests, in which nothing was in flight.
    """
    asked = [r for r in records if r["outcome"] not in _NOT_ASKED]
    by_item: defaultdict[str, list[bool]] = defaultdict(list)
    for record in asked:
        by_item[record["item"]].append(objective.met(record))
    met = sum(map(sum, by_item.values()))
    share = clustered_share(by_item)
    span_s = _span_s(asked)
    return {
        "met": met,
        "asked": len(asked),
        "share": None if share is None else share._asdict(),
        "per_s": met / span_s if span_s > 0 else None,
    }


def _span_s(records: Iterable[Record]) -> float:
    """Seconds from the first request due to the last that ended, pauses taken out."""
    spans = sorted(
        (due := dt.datetime.fromisoformat(r["due_at"]).timestamp(), due + (r["total_s"] or 0.0))
        for r in records
        if r["due_at"] is not None
    )
    if not spans:
        return 0.0
    usual = statistics.median(b[0] - a[0] for a, b in pairwise(spans)) if len(spans) > 1 else 0.0
    pause_s = max(_LEAST_PAUSE_S, 20 * usual)
    whole = 0.0
    begun, ended = spans[0]
    for due, end in spans:
        if due - ended >= pause_s:
            whole += ended - begun
            begun = due
        ended = max(ended, end)
    return whole + ended - begun


def arrivals(rate: float, n: int, seed: int) -> list[float]:
    """The moments of `n` Poisson arrivals at `rate` a second, in seconds from the start; the same for a seed.

    Raises:
        UsageError: a rate that is not above 0.
    """
    if not 0 < rate < math.inf:
        raise UsageError(f"a rate must be above 0 requests a second and finite, not {rate}")
    rng = random.Random(f"{seed}/arrivals")
    moments, at = [], 0.0
    for _ in range(n):
        at += rng.expovariate(rate)
        moments.append(at)
    return moments


class InFlight:
    """How many requests are in flight, weighted by time: `with in_flight: await backend.ask(...)`.

    The mean counts from the first request on; a closed loop calls `drained` when it has nothing more to begin, for
    from then on fewer are in flight however fast the client is.

    Args:
        now: seconds, never going back.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._count = self._peak = 0
        self._area = 0.0
        self._begun: float | None = None
        self._at = 0.0
        self._over = False

    def __enter__(self) -> None:
        self.enter()

    def __exit__(self, *_: object) -> None:
        self.leave()

    def enter(self) -> None:
        """A request begins."""
        self._pass()
        self._count += 1
        self._peak = max(self._peak, self._count)

    def leave(self) -> None:
        """A request has ended."""
        self._pass()
        self._count -= 1

    def drained(self) -> None:
        """No more requests will begin: what follows is not counted."""
        self._pass()
        self._over = True

    def _pass(self) -> None:
        now = self._now()
        if self._begun is None:
            self._begun = self._at = now
        if not self._over:
            self._area += self._count * (now - self._at)
            self._at = now

    def mean(self) -> float:
        """Requests in flight on average, from the first that began to the last change; 0 before that."""
        length = 0.0 if self._begun is None else self._at - self._begun
        return self._area / length if length > 0 else float(self._count)

    def peak(self) -> int:
        """Most requests in flight at a time."""
        return self._peak


def erlang_loss(seats: int, load: float) -> float:
    """Share of requests that a channel with so many seats refuses when it queues none (Erlang's loss formula, 1917).

    Args:
        seats: requests that it serves at a time.
        load: those that would be in flight if none were refused: rate times seconds a request.
    """
    refused = 1.0
    for seat in range(1, seats + 1):
        refused = load * refused / (seat + load * refused)
    return refused
