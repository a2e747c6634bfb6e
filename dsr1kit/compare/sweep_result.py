"""What a sweep asks and what it found: rates, the knee among them, and that in words.

The rule: a rate holds when the share of its requests that met the objective is at least the wanted one; the knee is
the highest rate that holds with all lower ones. Knows nothing about asking.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from dsr1kit.backends import is_local
from dsr1kit.compare.load import Objective
from dsr1kit.errors import UsageError
from dsr1kit.records import ANSWERED, Sampling

_MINUTE_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepSettings:
    """What a sweep asks of one channel.

    Attributes:
        channel: a catalogue name or `emulated:FILE`.
        objective: within which a request must be answered.
        rates: requests a second, upwards.
        seconds: how long each rate is asked at; limits that are counted by the minute show only from 60 on.
        share: of the requests, which must meet the objective for a rate to hold.
        refine: how often the gap between the last rate that holds and the first that does not is halved.
        task, items: what is asked, in turn.
        warm_up: requests before the first rate, which count for nothing but their cost.
        seed: of items, moments and draws.
        max_cost: in the channel's currency; when the sum reaches it, nothing more is asked.
        first_token_s, stall_s, deadline_s: limits of each request, in seconds.
    """

    channel: str
    objective: Objective
    rates: tuple[float, ...]
    seconds: float = 20.0
    share: float = 0.9
    refine: int = 2
    task: str = "arithmetic"
    items: int = 50
    warm_up: int = 2
    seed: int = 0
    sampling: Sampling = field(default_factory=Sampling)
    max_cost: float | None = None
    first_token_s: float = 120.0
    stall_s: float = 60.0
    deadline_s: float | None = 120.0

    def __post_init__(self) -> None:
        if is_local(self.channel):
            raise UsageError(f"{self.channel} runs in this process, one request at a time; a sweep is for channels")
        if not self.rates or any(not 0 < rate < math.inf for rate in self.rates):
            raise UsageError(f"rates must be above 0 requests a second and finite, not {self.rates}")
        if any(a >= b for a, b in pairwise(self.rates)):
            raise UsageError(f"rates must go upwards, not {', '.join(f'{rate:g}' for rate in self.rates)}")
        if not 0 < self.share <= 1:
            raise UsageError(f"share must be above 0 and at most 1, not {self.share}")
        for name in ("seconds", "max_cost", "first_token_s", "stall_s", "deadline_s"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise UsageError(f"{name} must be above 0 and finite, not {value}")
        for name, least in (("refine", 0), ("items", 1), ("warm_up", 0)):
            if getattr(self, name) < least:
                raise UsageError(f"{name} must be at least {least}, not {getattr(self, name)}")

    def requests(self, rate: float) -> int:
        """How many requests one rate takes."""
        return max(1, round(rate * self.seconds))


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One rate.

    Attributes:
        rate: asked, in requests a second.
        asked: requests sent; outcomes: how they ended.
        answered_per_s: answers a second, over the middle 80 % of them; None with fewer than ten.
        goodput: as `load.goodput`, its `per_s` those met a second of asking.
        first_token_s, first_answer_s: percentiles of the answered ones, in seconds; None: none was.
        in_flight: `mean` and `peak` of requests in flight.
        client: how the client did, as a run's `client_note`.
        holds: whether the share that met the objective is what was wanted.
        quota: what the last throttled reply told about it.
    """

    rate: float
    asked: int
    outcomes: dict[str, int]
    answered_per_s: float | None
    goodput: dict[str, Any]
    first_token_s: dict[str, float] | None
    first_answer_s: dict[str, float] | None
    in_flight: dict[str, float]
    client: dict[str, Any]
    holds: bool
    cost: float | None
    quota: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """What a sweep found.

    Attributes:
        steps: in the order in which they were asked.
        knee: highest rate at which, as at all lower ones asked, the wanted share met the objective; None: at none.
        reached: whether some rate above the knee broke the objective.
        certain: whether the intervals of the knee's share and of the next rate's leave the wanted share out.
        limited: a sentence where the client, and not the channel, was the limit.
        stopped: why higher rates were not asked; empty where all were.
        goodput_per_s: the most requests met a second at any rate; what the channel gives however hard it is pushed.
        cost, cost_expected: all requests, and what the rates were to cost by the warm-up's; None: no price known.
        verdict: all that in words.
    """

    settings: dict[str, Any]
    steps: tuple[Step, ...]
    knee: float | None
    reached: bool
    certain: bool
    limited: str
    stopped: str
    goodput_per_s: float
    cost: float | None
    cost_expected: float | None
    currency: str | None
    emulated: bool
    verdict: tuple[str, ...]

    @property
    def answered(self) -> bool:
        """Whether any request was."""
        return any(step.outcomes.get(o, 0) for step in self.steps for o in ANSWERED)


def knee_of(steps: Sequence[Step]) -> tuple[Step | None, Step | None]:
    """The highest rate that holds with all lower ones, and the lowest that does not; None where there is none."""
    knee = None
    for step in sorted(steps, key=lambda step: step.rate):
        if not step.asked:  # the budget was spent before its first request
            continue
        if not step.holds:
            return knee, step
        knee = step
    return knee, None


def line_of(step: Step) -> str:
    """One rate in a line."""
    others = ", ".join(f"{n} {outcome}" for outcome, n in step.outcomes.items() if outcome not in ANSWERED)
    first = "" if step.first_token_s is None else f", first token p95 {step.first_token_s['p95']:.2f} s"
    return f"{step.rate:g}/s: {_share(step)} in time of {step.asked}{first}" + (f"; {others}" if others else "")


def in_words(found: Sweep, settings: SweepSettings) -> tuple[str, ...]:
    """The verdict: the knee first, then what bounds how far it is to be believed."""
    knee, broken = knee_of(found.steps)
    return tuple(filter(None, (
        "Knee: " + _knee(knee, broken, found.certain, settings),
        f"Most: {found.goodput_per_s:.3g} requests a second were answered in time, whatever was asked." if knee else "",
        "" if not found.limited else f"Client: at the knee {found.limited}.",
        "" if not found.stopped else f"Stopped: {found.stopped}.",
        _quota(found, settings),
        "" if not found.cost else f"Cost: {found.currency} {found.cost:.3g} for all of it.",
        "Emulated: the channel is the kit's own emulator, or one that says it is." if found.emulated else "",
    )))  # fmt: skip


def _knee(knee: Step | None, broken: Step | None, certain: bool, settings: SweepSettings) -> str:
    wanted = f"{settings.share:.0%} within {settings.objective}"
    if knee is None and broken is None:
        return "unknown, no rate was asked at."
    if knee is None:
        assert broken is not None  # noqa: S101 - one of both is there
        return (
            f"below {broken.rate:g} requests a second: already there {_share(broken)} met what {wanted} should. "
            "Ask at lower rates, or set a looser objective."
        )
    there = f"{knee.rate:g} requests a second held {wanted} ({_share(knee)})"
    if broken is None:
        return f"not reached. {there}, the highest rate asked; ask at higher ones."
    return f"{there}; {broken.rate:g} did not ({_share(broken)})." + (
        "" if certain else " The intervals leave open on which side of it each lies; longer at each rate would tell."
    )


def _share(step: Step) -> str:
    share = step.goodput["share"]
    return "none" if share is None else f"{share['value']:.0%} ({share['low']:.0%} to {share['high']:.0%})"


def _quota(found: Sweep, settings: SweepSettings) -> str:
    told = next((step.quota for step in reversed(found.steps) if step.quota), "")
    if settings.seconds >= _MINUTE_S:
        return f"Quota: {told}." if told else ""
    short = f"a limit by the minute may lie below the knee; {settings.seconds:g} s at a rate do not show it, 60 would"
    return f"Quota: {told}; {short}." if told else f"Quota: {short}."
