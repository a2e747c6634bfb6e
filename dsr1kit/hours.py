"""Hours of the day in a time zone: read from TOML, and asked whether a moment lies in them.

Knows nothing about what the hours are for; tariffs, peak hours and figures by hour use them.
"""

from __future__ import annotations

import datetime as dt
from typing import Any, cast
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from dsr1kit.config import Table

#: (from, to) in hours of the day, 0 to 24, `to` not included.
Spans = tuple[tuple[float, float], ...]

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
    elif isinstance(raw, list) and len(raw) == 2 and not any(isinstance(p, list) or "-" in str(p) for p in raw):
        raw = [raw]  # one span, written flat
    hours: list[tuple[float, float]] = []
    for span in raw if isinstance(raw, list) else [raw]:
        parts = span.replace("–", "-").split("-") if isinstance(span, str) else span
        try:
            low, high = (_hour(part) for part in cast("Any", parts))
        except (TypeError, ValueError):
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
    except (ZoneInfoNotFoundError, ValueError):
        raise t.error(key, f"no such time zone {zone!r}; expected one such as Asia/Shanghai") from None
    return zone


def within(spans: Spans, local: dt.datetime) -> bool:
    """Whether the clock of `local` (already in its zone) lies in one of the spans."""
    hour = local.hour + local.minute / 60 + (local.second + local.microsecond / 1e6) / 3600
    return any(low <= hour < high for low, high in spans)


def _hour(text: str | float) -> float:
    """Hours of the day from a number, `10` or `10:30`."""
    if isinstance(text, bool):
        raise TypeError("a boolean is no hour")
    if isinstance(text, int | float):
        return float(text)
    hours, _, minutes = text.strip().partition(":")
    return float(hours) + int(minutes or 0) / 60
