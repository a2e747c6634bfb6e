"""What tokens cost, and when: a flat price, or one with a tariff of peak hours over it.

A request is priced by the moment at which it completes. Knows nothing about channels or requests.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from zoneinfo import ZoneInfo

from dsr1kit.config import Table
from dsr1kit.errors import UnknownName
from dsr1kit.hours import Spans, as_moment, read_hours, read_zone, within
from dsr1kit.records import Usage

_LOOK_AHEAD_DAYS = 21  # longer than any run of holidays, or of working days


@dataclass(frozen=True, slots=True, kw_only=True)
class Tariff:
    """Hours in which the price is multiplied.

    Attributes:
        name: what catalogue entries call it.
        timezone: whose clock the hours are read from.
        hours: the peak, in hours of the day.
        factor: on the price in those hours.
        weekdays_only: no peak on Saturdays and Sundays.
        holidays: days without a peak.
        holiday_years: years whose holidays are in the data; in others they count as any day.
        since: from this moment on; None: always.
    """

    name: str
    timezone: str
    hours: Spans
    factor: float
    weekdays_only: bool = False
    holidays: frozenset[dt.date] = frozenset()
    holiday_years: frozenset[int] = frozenset()
    since: dt.datetime | None = None
    source: str = ""
    as_of: dt.date | None = None

    def peak(self, moment: dt.datetime) -> bool:
        """Whether `moment` (timezone-aware) is priced as peak."""
        if self.since is not None and moment < self.since:
            return False
        local = moment.astimezone(ZoneInfo(self.timezone))
        if self.weekdays_only and local.weekday() >= 5:
            return False
        return local.date() not in self.holidays and within(self.hours, local)

    def factor_at(self, moment: dt.datetime) -> float:
        """What the price is multiplied by at `moment`."""
        return self.factor if self.peak(moment) else 1.0

    def holidays_known(self, moment: dt.datetime) -> bool:
        """Whether the holidays of that year are in the data, where the tariff has any."""
        return not self.holiday_years or moment.astimezone(ZoneInfo(self.timezone)).year in self.holiday_years

    def changes(self, moment: dt.datetime) -> Iterator[dt.datetime]:
        """Moments after `moment`, in order, at which the factor may change; three weeks of them (UTC), and `since`."""
        zone = ZoneInfo(self.timezone)
        first = moment.astimezone(zone).date()
        edges = sorted({0.0, *(hour for span in self.hours for hour in span)})
        found = set() if self.since is None else {self.since.astimezone(dt.UTC)}
        for day in range(_LOOK_AHEAD_DAYS):
            midnight = dt.datetime.combine(first + dt.timedelta(days=day), dt.time(), zone)
            for hour in edges:
                # Wall-clock arithmetic within the zone; an hour that clocks pass twice counts twice.
                at = midnight + dt.timedelta(hours=hour)
                found.update(at.replace(fold=fold).astimezone(dt.UTC) for fold in (0, 1))
            found.update(_clocks_changed(midnight, midnight + dt.timedelta(days=1)))
        yield from sorted(at for at in found if at > moment)


def _clocks_changed(midnight: dt.datetime, following: dt.datetime) -> Iterator[dt.datetime]:
    """The moment (UTC) of the day at which clocks are put forward or back, if there is one."""
    zone, low, high = midnight.tzinfo, midnight.astimezone(dt.UTC), following.astimezone(dt.UTC)
    if low.astimezone(zone).utcoffset() == high.astimezone(zone).utcoffset():
        return
    while high - low > dt.timedelta(seconds=1):
        middle = low + dt.timedelta(seconds=(high - low) // dt.timedelta(seconds=2))
        same = middle.astimezone(zone).utcoffset() == low.astimezone(zone).utcoffset()
        low, high = (middle, high) if same else (low, middle)
    yield high


@dataclass(frozen=True, slots=True)
class Price:
    """What a million tokens cost.

    Attributes:
        input: prompt tokens, in `currency` per million; outside the tariff's peak.
        output: reasoning and answer tokens together, likewise.
        as_of: when this was read.
        tariff: peak hours over it; None: the same all day.
    """

    input: float
    output: float
    currency: str = "USD"
    as_of: dt.date | None = None
    tariff: Tariff | None = None

    @property
    def free(self) -> bool:
        """Whether nothing is charged at any time."""
        return self.input == self.output == 0

    def cost(self, usage: Usage) -> float | None:
        """Cost of one reply in `currency`, tariff aside; None where the tokens were not counted at all."""
        if usage.prompt_tokens is None and usage.completion_tokens is None:
            return None
        return ((usage.prompt_tokens or 0) * self.input + (usage.completion_tokens or 0) * self.output) / 1e6

    def at(self, moment: dt.datetime) -> Price:
        """The flat price at `moment` (timezone-aware): what a request that completes then is charged."""
        if self.tariff is None:
            return self
        factor = self.tariff.factor_at(moment)
        return replace(self, input=self.input * factor, output=self.output * factor, tariff=None)

    def next_cheaper(self, moment: dt.datetime) -> dt.datetime | None:
        """The next moment (UTC) at which it costs less than at `moment`; None: it does not get cheaper."""
        if self.tariff is None or self.free:
            return None
        now = self.tariff.factor_at(moment)
        return next((at for at in self.tariff.changes(moment) if self.tariff.factor_at(at) < now), None)


def read_price(table: Table | None) -> Price | None:
    """A price from its table: input and output per million tokens, currency, as_of."""
    if table is None:
        return None
    amounts = {key: table.number(key) for key in ("input", "output")}
    for key, amount in amounts.items():
        if amount is None:
            raise table.error(key, "is missing")
    price = Price(
        input=amounts["input"] or 0.0,
        output=amounts["output"] or 0.0,
        currency=table.text("currency", "USD"),
        as_of=table.date("as_of"),
    )
    table.finish()
    return price


def read_tariff(t: Table, name: str, holidays: Mapping[str, frozenset[dt.date]]) -> Tariff:
    """A tariff from its table; `holidays` are the known calendars by name."""
    calendar = t.text("holidays")
    if calendar and calendar not in holidays:
        raise t.error("holidays", str(UnknownName("calendar", calendar, holidays)))
    since = t.date("since")
    days = holidays.get(calendar, frozenset())
    factor = t.number("factor")
    if factor is None:
        raise t.error("factor", "is missing; what the price is multiplied by in these hours")
    tariff = Tariff(
        name=name,
        timezone=read_zone(t),
        hours=read_hours(t),
        factor=factor,
        weekdays_only=t.text("days", "all", choices=("all", "weekdays")) == "weekdays",
        holidays=days,
        holiday_years=frozenset(day.year for day in days),
        since=None if since is None else as_moment(since),
        source=t.text("source"),
        as_of=t.date("as_of"),
    )
    t.finish()
    return tariff


def read_holidays(t: Table) -> frozenset[dt.date]:
    """A calendar: `days = [...]` of dates, or of [first, last] spans; `source` and `as_of` beside it."""
    days: set[dt.date] = set()
    raw = t.raw("days")
    if not isinstance(raw, list) or not raw:
        raise t.error("days", "expected a list of dates, or of spans such as [2026-10-01, 2026-10-07]")
    for entry in raw:
        span = entry if isinstance(entry, list) else [entry, entry]
        if len(span) != 2 or not all(type(day) is dt.date for day in span) or span[0] > span[1]:
            raise t.error("days", f"expected dates, or spans of a first and a last one, not {entry!r:.60}")
        days.update(span[0] + dt.timedelta(days=n) for n in range((span[1] - span[0]).days + 1))
    t.text("source")
    t.date("as_of")
    t.finish()
    return frozenset(days)
