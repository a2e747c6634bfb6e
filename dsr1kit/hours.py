"""Hours of the day in a time zone, and durations: read, and asked whether a moment lies in them.

Knows nothing about what the hours are for; tariffs, peak hours and figures by hour use them.
"""

from __future__ import annotations

import datetime as dt
import math
import re
from typing import Any, cast
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from dsr1kit.config import Table

#: (from, to) in hours of the day, 0 to 24, `to` not included.
Spans = tuple[tuple[float, float], ...]

_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|us|µs|ns|d|h|m|s)")
_UNITS = {"d": 86400.0, "h": 3600.0, "m": 60.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9}
_WANTED = 'expected spans such as [[10, 12], [15, 17]] or "10-12, 15-17"'


def read_hours(t: Table, key: str = "hours") -> Spans:
    """Spans of hours from a table: `[[10, 12], [15, 17]]`, `"10-12, 15-17"`, also with minutes, over midnight.

    Raises:
        ConfigError: the key is missing, or holds no hours.
    """
    if not t.has(key):
        raise t.error(key, "is missing; " + _WANTED)
    raw = t.raw(key)
    if isinstance(raw, str):
        raw = raw.split(",")
    elif (
        isinstance(raw, list) and len(raw) == 2 and not any(isinstance(p, list) or set("-–") & set(str(p)) for p in raw)
    ):
        raw = [raw]  # one span, written flat
    if raw == []:
        raise t.error(key, _WANTED)
    hours: list[tuple[float, float]] = []
    for span in raw if isinstance(raw, list) else [raw]:
        parts = span.replace("–", "-").split("-") if isinstance(span, str) else span
        try:
            low, high = (_hour(part) for part in cast("Any", parts))
        except (AttributeError, OverflowError, TypeError, ValueError):
            raise t.error(key, _WANTED) from None
        if not (0 <= low <= 24 and 0 <= high <= 24) or low == high:
            raise t.error(key, f"expected two different hours from 0 to 24, not {low:g} to {high:g}")
        # A span over midnight is two.
        hours += [(low, high)] if low < high else [(low, 24.0), (0.0, high)]
    return tuple(hours)


def read_zone(t: Table, key: str = "timezone") -> str:
    """The name of a time zone that exists; UTC where the table gives none."""
    zone = t.text(key, "UTC")
    try:
        ZoneInfo(zone)
    except (ZoneInfoNotFoundError, ValueError, OSError):  # OSError: a folder of zones, such as Europe
        raise t.error(key, f"no such time zone {zone!r}; expected one such as Asia/Shanghai") from None
    return zone


def as_moment(day: dt.date) -> dt.datetime:
    """A date's beginning, or a date-time as it stands; UTC where it names no zone."""
    moment = day if isinstance(day, dt.datetime) else dt.datetime.combine(day, dt.time())
    return moment if moment.tzinfo is not None else moment.replace(tzinfo=dt.UTC)


def duration_s(text: str) -> float | None:
    """Seconds in a duration such as `1m30s`, `24h`, `6ms` or `1d`; None where it is none."""
    bare = text.strip().lower().replace(" ", "")
    parts = _DURATION.findall(bare)
    if not parts or "".join(amount + unit for amount, unit in parts) != bare:
        return None
    total = sum(float(amount) * _UNITS[unit] for amount, unit in parts)
    return total if math.isfinite(total) else None


def within(spans: Spans, local: dt.datetime) -> bool:
    """Whether the clock of `local` (already in its zone) lies in one of the spans."""
    # As lengths of time: exact, where sums of fractions of an hour are not.
    clock = dt.timedelta(hours=local.hour, minutes=local.minute, seconds=local.second, microseconds=local.microsecond)
    return any(dt.timedelta(hours=low) <= clock < dt.timedelta(hours=high) for low, high in spans)


def _hour(text: str | float) -> float:
    """Hours of the day from a number, `10` or `10:30`."""
    if isinstance(text, bool):
        raise TypeError("a boolean is no hour")
    if isinstance(text, int | float):
        return float(text)
    hours, _, minutes = text.strip().partition(":")
    if not 0 <= int(minutes or 0) < 60:
        raise ValueError("an hour has 60 minutes")
    return float(hours) + int(minutes or 0) / 60
