"""What a router remembers about one channel: a circuit that opens on trouble, and how long first tokens take.

Time is given by the caller; knows nothing about requests, tasks or other channels.
"""

from __future__ import annotations

import random
import statistics
from collections import deque
from dataclasses import dataclass
from typing import Literal

from dsr1kit.records import Outcome

#: Outcomes that will not go away by asking again: the circuit opens at once, and for long.
LASTING = frozenset({Outcome.NO_BALANCE, Outcome.UNAUTHORIZED, Outcome.UNKNOWN_MODEL, Outcome.RETIRED})


@dataclass(frozen=True, slots=True)
class CircuitSettings:
    """When a circuit opens, and for how long.

    Attributes:
        consecutive: failures in a row that open it.
        share, least: share of failures among the last `window` requests that opens it, from `least` of them on.
        cooldown_s, most_cooldown_s: first and longest time it stays open; doubles with each failed probe.
        lasting_cooldown_s: for what will not go away by asking again.
        most_wait_s: longest wait that a provider's own headers are believed in.
    """

    consecutive: int = 5
    share: float = 0.6
    least: int = 10
    window: int = 20
    cooldown_s: float = 1.0
    most_cooldown_s: float = 60.0
    lasting_cooldown_s: float = 300.0
    most_wait_s: float = 120.0


class Circuit:
    """Closed: requests pass. Open: none do. Half-open: one may, to see; its end closes or opens the circuit.

    Args:
        settings: thresholds and times.
        rng: spreads the end of cooldowns, so that channels are not probed in step.
    """

    def __init__(self, settings: CircuitSettings, rng: random.Random) -> None:
        self._settings, self._rng = settings, rng
        self.state: Literal["closed", "open", "half-open"] = "closed"
        self.reopens_at = 0.0
        self.reason: Outcome | None = None
        self._told = False
        self._row = 0
        self._opened_in_row = 0
        self._recent: deque[bool] = deque(maxlen=settings.window)

    def ready(self, now: float) -> bool:
        """Whether a request may pass at the time `now`."""
        return self.state == "closed" or (self.state == "open" and now >= self.reopens_at)

    @property
    def sure(self) -> bool:
        """Whether it is open for something that asking again will not mend before its time."""
        return self.state != "closed" and (self._told or self.reason in LASTING)

    def begin(self) -> bool:
        """A request passes; whether it is the probe of an open circuit, whose end must tell so."""
        if self.state != "open":
            return False
        self.state = "half-open"
        return True

    def success(self, *, probe: bool = False) -> None:
        """A request was answered; what began before the circuit opened says nothing about it now."""
        if self.state == "closed":
            self._row = 0
            self._recent.append(True)
        elif probe:
            self.state, self.reason, self._opened_in_row, self._row = "closed", None, 0, 0
            self._recent.clear()

    def failure(self, now: float, outcome: Outcome, wait_s: float | None = None, *, probe: bool = False) -> None:
        """A request failed by the channel's fault.

        Args:
            wait_s: how long the provider itself asks to wait, where it does.
            probe: what `begin` told of this request.
        """
        if self.state != "closed" and not probe:
            # What was under way when it opened may end later; it does not shorten what is known, nor end a probe.
            if self.state == "open" and (outcome in LASTING or (outcome is Outcome.THROTTLED and wait_s is not None)):
                self._open(now, outcome, wait_s)
            return
        self._row += 1
        self._recent.append(False)
        failed = self._recent.count(False)
        crowded = len(self._recent) >= self._settings.least and failed >= self._settings.share * len(self._recent)
        told = outcome is Outcome.THROTTLED and wait_s is not None
        if self.state != "closed" or outcome in LASTING or told or crowded or self._row >= self._settings.consecutive:
            self._open(now, outcome, wait_s)

    def abandoned(self, now: float, *, probe: bool, late: bool = False) -> None:
        """A request ended without saying anything about the channel; a probe is to be made again.

        Args:
            late: it ran into its deadline: the next probe waits a little, for this one may have hung.
        """
        if probe:
            self.state = "open"
            self.reopens_at = now + (self._settings.cooldown_s * self._rng.uniform(0.75, 1.25) if late else 0.0)

    def _open(self, now: float, outcome: Outcome, wait_s: float | None) -> None:
        settings = self._settings
        if outcome in LASTING:
            cooldown_s = settings.lasting_cooldown_s
        elif wait_s is not None:
            cooldown_s = min(wait_s, settings.most_wait_s)
        else:
            cooldown_s = min(settings.most_cooldown_s, settings.cooldown_s * 2.0**self._opened_in_row)
            cooldown_s *= self._rng.uniform(0.75, 1.25)
        until = now + cooldown_s
        if self.state == "open" and until <= self.reopens_at:
            return
        if self.state != "open":
            self._opened_in_row = min(30, self._opened_in_row + 1)
        self.state, self.reopens_at, self.reason, self._told = "open", until, outcome, wait_s is not None


class FirstTokens:
    """The last successful first-token times of a channel, in seconds from when it was asked."""

    def __init__(self, size: int = 64) -> None:
        self._times: deque[float] = deque(maxlen=size)
        self._stale = True
        self._median = self._p90 = 0.0

    def __len__(self) -> int:
        return len(self._times)

    def add(self, seconds: float) -> None:
        """A request's first token came after `seconds`."""
        self._times.append(seconds)
        self._stale = True

    def forget(self, seconds: float) -> None:
        """What `add` was told belongs to a request that failed after all."""
        if seconds in self._times:
            self._times.remove(seconds)
            self._stale = True

    @property
    def median(self) -> float:
        """Of the times kept; 0.0 without any."""
        self._refresh()
        return self._median

    def hedge_after(self, cold_s: float, floor_s: float, least: int = 8) -> float:
        """When a second channel is worth asking: the smaller of p90 and three medians; `cold_s` while unknown."""
        if len(self._times) < least:
            return cold_s
        self._refresh()
        return max(floor_s, min(self._p90, 3 * self._median))

    def _refresh(self) -> None:
        if self._stale and self._times:
            ordered = sorted(self._times)
            self._median = statistics.median(ordered)
            self._p90 = ordered[min(len(ordered) - 1, int(0.9 * len(ordered)))]
            self._stale = False


class RetryBudget:
    """A bucket that failures drain and successes refill, as in the standard retry mode of AWS's SDKs.

    One for all requests of a router: when everything fails, retries stop, and the far side is left in peace.

    Args:
        capacity: what it holds when full.
        retry_cost, timeout_cost: what another call costs, after a failure and after a time-out.
    """

    def __init__(self, capacity: float = 100.0, retry_cost: float = 5.0, timeout_cost: float = 10.0) -> None:
        self.capacity, self.level = capacity, capacity
        self.retry_cost, self.timeout_cost = retry_cost, timeout_cost

    def take(self, outcome: Outcome | None) -> float | None:
        """What another call costs after `outcome` (None: a hedge); None: there is not enough left."""
        slow = outcome in (Outcome.QUEUED, Outcome.STALLED, Outcome.UNREACHABLE)
        cost = self.timeout_cost if slow else self.retry_cost
        if self.level < cost:
            return None
        self.level -= cost
        return cost

    def give_back(self, taken: float) -> None:
        """A request succeeded, and its last call but the first took `taken`; without any it refills a little."""
        self.level = min(self.capacity, self.level + (taken or 1.0))

    def untake(self, taken: float) -> None:
        """A call for which `taken` was taken was not made after all."""
        self.level = min(self.capacity, self.level + taken)
