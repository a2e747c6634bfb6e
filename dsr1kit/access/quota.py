"""What a response's headers say about quotas: one reader for every provider's way of saying it.

`Retry-After` (seconds, fractions, an HTTP date), `retry-after-ms`, OpenAI's `x-ratelimit-*` with durations such
as `1m30s`, plain `X-RateLimit-*` and `RateLimit-*`, ModelScope's `modelscope-ratelimit-*`. Where a provider says
nothing, the requests in flight are what is left to go by. Knows nothing about requests or waiting.
"""

from __future__ import annotations

import datetime as dt
import email.utils
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from dsr1kit.hours import duration_s

#: Longest wait that a header is believed in, in seconds.
CAP_S = 600.0
#: Longest value that is read: patterns over a value of kilobytes would hold up every other request.
_LONGEST = 200

_PARTS = {"limit": "limit", "remaining": "remaining", "reset": "reset_s"}
#: A header's name: x-ratelimit-remaining-tokens, x-ratelimit-remaining, modelscope-ratelimit-requests-remaining.
_NAME = re.compile(
    r"(?:x-)?ratelimit-(?P<part>limit|remaining|reset)(?:-(?P<scope>[a-z-]+))?"
    r"|modelscope-ratelimit-(?P<scope2>[a-z-]+)-(?P<part2>limit|remaining|reset)"
)


@dataclass(frozen=True, slots=True)
class Allowance:
    """One quota of an account, as far as the headers tell it.

    Attributes:
        scope: what is counted: `requests`, `tokens`, `model requests`, ...
        limit, remaining: in that unit.
        reset_s: seconds until it is whole again.
    """

    scope: str
    limit: float | None = None
    remaining: float | None = None
    reset_s: float | None = None

    def __str__(self) -> str:
        left = "" if self.remaining is None else f"{self.remaining:.12g} "
        of = "" if self.limit is None else f"of {self.limit:.12g} "
        reset = "" if self.reset_s is None else f", whole again in {_told(self.reset_s)}"
        if left:
            return f"{left}{of}{self.scope} left{reset}"
        return f"a limit {of}{self.scope}{reset}" if of else f"a limit on {self.scope}{reset}"


@dataclass(frozen=True, slots=True)
class Quota:
    """What is known about a channel's quota after a response.

    Attributes:
        retry_after_s: how long the provider asks to wait, in seconds.
        allowances: what its headers count.
        in_flight: requests this client had in flight to the channel, this one included.
        most_answered: most in flight at a time of which one was answered.
    """

    retry_after_s: float | None = None
    allowances: tuple[Allowance, ...] = field(default=())
    in_flight: int = 1
    most_answered: int = 0

    @property
    def told(self) -> bool:
        """Whether the provider said anything."""
        return self.retry_after_s is not None or bool(self.allowances)

    def wait_s(self, *, cap_s: float = CAP_S, left_s: float | None = None) -> float | None:
        """Seconds to wait before the next request, from 0 on; None where nothing says so.

        Args:
            cap_s: longest wait that is believed.
            left_s: time left until the request's deadline, beyond which no header is trusted either.
        """
        used_up = [a.reset_s for a in self.allowances if a.remaining == 0 and a.reset_s is not None]
        # A wait that is asked for outright is what counts; a used-up quota stands in for it.
        wanted = self.retry_after_s if self.retry_after_s is not None else max(used_up, default=None)
        if wanted is None:
            return None
        return max(0.0, min(wanted, cap_s, math.inf if left_s is None else left_s))

    def __str__(self) -> str:
        parts = [str(a) for a in self.allowances]
        if self.retry_after_s is not None:
            parts.insert(0, f"asks to wait {_told(self.retry_after_s)}")
        if parts:
            return "; ".join(parts)
        flight = f"{self.in_flight} in flight"
        answered = f", at most {self.most_answered} were answered at a time" if self.most_answered else ""
        return f"no quota headers; {flight}{answered}"


def read_quota(
    headers: Mapping[str, str], *, now: dt.datetime | None = None, in_flight: int = 1, most_answered: int = 0
) -> Quota:
    """The quota that response headers (names lower-cased) tell. Never raises: what cannot be read is left out.

    Args:
        now: the moment that dates count from, where the response has no `Date` of its own (timezone-aware).
    """
    said = {
        name: value
        for name, value in headers.items()
        if ("ratelimit-" in name or name.startswith("retry-after")) and len(value) <= _LONGEST
    }
    if not said:
        return Quota(None, (), in_flight, most_answered)
    # By the server's own clock where it tells it: this machine's may be wrong.
    here = _date(headers.get("date", "")[:_LONGEST]) or now or dt.datetime.now(dt.UTC)
    found: dict[str, dict[str, float]] = {}
    for name, value in said.items():
        match = _NAME.fullmatch(name)
        if match is None:
            continue
        part = match["part"] or match["part2"]
        scope = (match["scope"] or match["scope2"] or "requests").replace("-", " ")
        amount = _seconds(value, here) if part == "reset" else _amount(value)
        if amount is not None:
            found.setdefault(scope, {})[_PARTS[part]] = amount
    return Quota(
        _retry_after(said, here),
        tuple(Allowance(scope, **parts) for scope, parts in found.items()),
        in_flight,
        most_answered,
    )


def _told(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds < 100 else f"{seconds:.0f} s"


def _retry_after(headers: Mapping[str, str], here: dt.datetime) -> float | None:
    if (text := headers.get("retry-after-ms")) is not None and (ms := _amount(text)) is not None:
        return ms / 1e3
    text = headers.get("retry-after")
    if text is None:
        return None
    if (seconds := _amount(text)) is not None:
        return seconds
    return _seconds(text, here)


def _amount(text: str) -> float | None:
    """A number of at least 0; only the first where a list follows (`100, 100;w=60`)."""
    try:
        value = float(text.split(",")[0].split(";")[0])
    except ValueError:
        return None
    return value if math.isfinite(value) and value >= 0 else None


def _seconds(text: str, here: dt.datetime) -> float | None:
    """Seconds until a reset: `90`, `1m30s`, `6ms`, an epoch in seconds or milliseconds, a date."""
    value = _amount(text)
    if value is not None:
        if value > 1e9:  # no quota takes thirty years: this is a moment
            return max(0.0, (value / 1e3 if value > 1e11 else value) - here.timestamp())
        return value
    if (spoken := duration_s(text)) is not None:
        return spoken
    at = _date(text)
    return None if at is None else max(0.0, (at - here).total_seconds())


def _date(text: str) -> dt.datetime | None:
    for read in (email.utils.parsedate_to_datetime, dt.datetime.fromisoformat):
        try:
            at = read(text.strip())
            at = at if at.tzinfo is not None else at.replace(tzinfo=dt.UTC)
            return at.astimezone(dt.UTC)
        except (ValueError, TypeError, IndexError, OverflowError):
            continue
    return None
