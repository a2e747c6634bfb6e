"""What a reply costs and when it costs less: tariffs by the clock of their zone, holidays, the next cheaper moment."""

from __future__ import annotations

import datetime as dt
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsr1kit import load_channels
from dsr1kit.access.prices import Price, Tariff
from dsr1kit.compare.record import to_record
from dsr1kit.compare.tasks import load_task
from dsr1kit.errors import ConfigError
from dsr1kit.records import Outcome, Reply, Timing, Usage

BEIJING = ZoneInfo("Asia/Shanghai")
MINUTE = dt.timedelta(minutes=1)
MINE = '[channel.mine]\nbase_url = "http://h.example/v1"\nmodel = "m"\nprice = {input = 1, output = 2}\n'


@pytest.fixture(scope="module")
def deepseek():
    return load_channels()["deepseek"]


def beijing(text):
    return dt.datetime.fromisoformat(text).replace(tzinfo=BEIJING)


def utc(text):
    return dt.datetime.fromisoformat(text).replace(tzinfo=dt.UTC)


# DeepSeek's peak hours.
@pytest.mark.parametrize(
    ("moment", "peak"),
    [
        ("2026-11-23 08:59:59.999999", False),  # a Monday
        ("2026-11-23 09:00:00", True),
        ("2026-11-23 11:59:59.999999", True),
        ("2026-11-23 12:00:00", False),
        ("2026-11-23 13:59:59", False),
        ("2026-11-23 14:00:00", True),
        ("2026-11-23 17:59:59", True),
        ("2026-11-23 18:00:00", False),
        ("2026-11-23 00:00:00", False),
        ("2026-11-23 23:59:59", False),
        ("2026-11-27 15:00:00", True),  # Friday
        ("2026-11-28 10:00:00", False),  # Saturday
        ("2026-11-29 15:00:00", False),  # Sunday
        ("2026-11-30 10:00:00", True),  # Monday
        ("2026-09-24 10:00:00", True),  # the eve of Mid-Autumn
        ("2026-09-25 10:00:00", False),  # Mid-Autumn, a Friday
        ("2026-09-28 10:00:00", True),
        ("2026-09-30 17:59:59", True),  # the eve of National Day
        ("2026-10-01 10:00:00", False),  # National Day, a Thursday
        ("2026-10-07 17:00:00", False),  # its last day, a Wednesday
        ("2026-10-08 09:00:00", True),
        ("2026-10-10 10:00:00", False),  # a Saturday on which people work: a weekend all the same
    ],
)
def test_peak_by_weekday_hour_and_holiday_in_beijing(deepseek, moment, peak):
    at = beijing(moment)
    assert deepseek.peak.peak(at) is peak
    assert deepseek.peak.peak(at.astimezone(dt.UTC)) is peak
    factor = 2 if peak else 1
    assert deepseek.price.at(at) == Price(0.15 * factor, 0.6 * factor, "USD", dt.date(2026, 11, 23))


@pytest.mark.parametrize(("at", "factor"), [("2026-08-14 02:00", 1.0), ("2026-08-17 02:00", 2.0)])
def test_there_was_no_peak_before_the_tariff_began(deepseek, at, factor):
    assert deepseek.peak.factor_at(utc(at)) == factor


def test_the_first_peak_hour_is_that_of_the_monday_after_the_beginning(deepseek):
    assert deepseek.peak.since == utc("2026-08-16 16:00")  # midnight in Beijing, a Monday
    assert not deepseek.peak.peak(utc("2026-08-17 00:59:59"))
    assert deepseek.peak.peak(utc("2026-08-17 01:00"))


@pytest.mark.parametrize(("pro", "off", "on"), [(False, (0.15, 0.6), (0.3, 1.2)), (True, (0.66, 1.98), (1.32, 3.96))])
def test_both_successors_cost_double_at_peak(pro, off, on):
    price = load_channels()["deepseek-pro" if pro else "deepseek"].price
    assert price is not None
    quiet, busy = price.at(beijing("2026-11-23 08:00")), price.at(beijing("2026-11-23 10:00"))
    assert (quiet.input, quiet.output) == pytest.approx(off)
    assert (busy.input, busy.output) == pytest.approx(on)
    assert quiet.tariff is busy.tariff is None


@pytest.mark.parametrize(
    ("moment", "cheaper"),
    [
        ("2026-11-23 09:00", "2026-11-23 12:00"),
        ("2026-11-23 11:59:59.999999", "2026-11-23 12:00"),
        ("2026-11-27 14:00", "2026-11-27 18:00"),
        ("2026-09-30 17:59", "2026-09-30 18:00"),
        ("2026-11-23 12:00", None),
        ("2026-11-28 10:00", None),
    ],
)
def test_the_next_cheaper_moment_of_deepseek(deepseek, moment, cheaper):
    at = deepseek.price.next_cheaper(beijing(moment))
    assert at == (None if cheaper is None else beijing(cheaper))
    assert at is None or at.tzinfo is dt.UTC


def test_holidays_are_known_for_the_years_in_the_data_alone(deepseek):
    assert deepseek.peak.holidays_known(utc("2026-12-31 15:59"))
    assert not deepseek.peak.holidays_known(utc("2026-12-31 16:00"))  # 2027 in Beijing
    assert Tariff(name="t", timezone="UTC", hours=((1, 2),), factor=2).holidays_known(utc("1999-01-01"))


@pytest.mark.parametrize(
    ("day", "off"),
    [
        ("2025-12-31", False), ("2026-01-01", True), ("2026-01-02", True), ("2026-01-05", False),
        ("2026-02-13", False), ("2026-02-16", True), ("2026-02-20", True), ("2026-02-23", True), ("2026-02-24", False),
        ("2026-04-03", False), ("2026-04-06", True), ("2026-04-07", False),
        ("2026-04-30", False), ("2026-05-01", True), ("2026-05-05", True), ("2026-05-06", False),
        ("2026-06-18", False), ("2026-06-19", True), ("2026-06-22", False),
    ],
)  # fmt: skip
def test_china_s_public_holidays_of_2026(load, day, off):
    mine = load(
        MINE + 'tariff = "t"\n[tariff.t]\nhours = [[0, 24]]\ndays = "weekdays"\nfactor = 2\nholidays = "china"\n'
        'timezone = "Asia/Shanghai"\n'
    )["mine"]
    assert mine.peak.peak(beijing(f"{day} 12:00")) is not off


# What a reply is charged.
def record(begun, total_s, price):
    reply = Reply(
        Outcome.OK,
        timing=Timing(total_s=total_s),
        usage=Usage(prompt_tokens=1_000_000, answer_tokens=1_000_000),
        due_at=None if begun is None else begun.timestamp(),
    )
    return to_record(reply, "deepseek", load_task("arithmetic", 1, 0)[0], 0, price, "right")


@pytest.mark.parametrize(
    ("begun", "total_s", "cost"),
    [
        ("2026-11-23 11:59:50", 15.0, 0.75),  # completes at 12:00:05
        ("2026-11-23 11:59:50", 9.0, 1.5),
        ("2026-11-23 08:59:50", 15.0, 1.5),
        ("2026-11-23 13:59:59", 1.0, 1.5),  # at 14:00:00 sharp
        ("2026-11-23 17:59:59", 1.0, 0.75),
        ("2026-11-22 23:59:00", 9 * 3600 + 60.0, 1.5),  # begun on a Sunday
    ],
)
def test_a_reply_is_charged_by_when_it_completes(deepseek, begun, total_s, cost):
    written = record(beijing(begun), total_s, deepseek.price)
    assert (written["cost"], written["currency"]) == (pytest.approx(cost), "USD")


def test_a_reply_without_a_tariff_costs_the_same_at_any_hour():
    flat = Price(1.0, 2.0)
    costs = {record(beijing(f"2026-11-23 {hour:02}:30"), 1.0, flat)["cost"] for hour in range(24)}
    assert costs == {3.0}
    assert record(beijing("2026-11-23 10:00"), 1.0, None)["cost"] is None
    assert record(None, None, flat)["cost"] == 3.0


# Zones whose clocks change.
@pytest.mark.parametrize(
    ("moment", "peak"),
    [
        ("2026-03-28 23:59", False), ("2026-03-29 00:00", True),  # 01:00 in winter time
        ("2026-03-29 00:59", True), ("2026-03-29 01:00", False),  # 02:00 does not exist: it is 03:00
        ("2026-10-24 22:59", False), ("2026-10-24 23:00", True),  # 01:00 in summer time
        ("2026-10-25 00:29", True), ("2026-10-25 00:30", False),  # 02:30, the first one
        ("2026-10-25 01:00", True),  # 02:00 again
        ("2026-10-25 01:29", True), ("2026-10-25 01:30", False),
    ],
)  # fmt: skip
def test_peak_hours_follow_the_clock_on_the_days_it_is_changed(moment, peak):
    tariff = Tariff(name="t", timezone="Europe/Berlin", hours=((1.0, 2.5),), factor=2)
    assert tariff.peak(utc(moment)) is peak


@pytest.mark.parametrize(
    ("hours", "moment", "cheaper"),
    [
        (((1.0, 2.5),), "2026-03-29 00:10", "2026-03-29 01:00"),  # ends as the clocks go forward
        (((1.0, 2.5),), "2026-10-24 23:30", "2026-10-25 00:30"),
        (((1.0, 2.5),), "2026-10-25 01:10", "2026-10-25 01:30"),  # the second 02:10
        (((2.25, 2.75),), "2026-10-25 00:20", "2026-10-25 00:45"),
        (((2.25, 2.75),), "2026-10-25 01:20", "2026-10-25 01:45"),
        (((2.5, 24.0),), "2026-10-25 00:45", "2026-10-25 01:00"),  # cheap again as they go back
        (((9.0, 12.0),), "2026-03-29 07:30", "2026-03-29 10:00"),
        (((9.0, 12.0),), "2026-10-25 08:30", "2026-10-25 11:00"),
    ],
)
def test_the_next_cheaper_moment_on_the_days_the_clocks_change(hours, moment, cheaper):
    price = Price(1.0, 2.0, tariff=Tariff(name="t", timezone="Europe/Berlin", hours=hours, factor=2))
    assert price.next_cheaper(utc(moment)) == utc(cheaper)


def test_a_span_over_midnight_is_peak_on_both_sides_of_it(load):
    mine = load(MINE + 'tariff = "t"\n[tariff.t]\nhours = "22-6:30"\nfactor = 3\ntimezone = "Asia/Shanghai"\n')["mine"]
    peaks = [h for h in range(24) if mine.peak.peak(beijing(f"2026-11-23 {h:02}:00"))]
    assert peaks == [0, 1, 2, 3, 4, 5, 6, 22, 23]
    assert not mine.peak.peak(beijing("2026-11-23 06:30"))
    assert mine.price.next_cheaper(beijing("2026-11-23 22:15")) == beijing("2026-11-24 06:30")


def test_a_span_over_midnight_on_weekdays_ends_with_friday(load):
    mine = load(MINE + 'tariff = "t"\n[tariff.t]\nhours = "22-6"\nfactor = 3\ndays = "weekdays"\n')["mine"]
    assert mine.peak.peak(utc("2026-11-27 23:59"))
    assert not mine.peak.peak(utc("2026-11-28 00:00"))
    assert mine.price.next_cheaper(utc("2026-11-27 23:00")) == utc("2026-11-28 00:00")
    assert mine.peak.peak(utc("2026-11-30 00:00"))  # Monday, after a Sunday night


@pytest.mark.parametrize("hour", [0.366667, 0.38, 0.5833, 2 / 3, 8.35, 10 + 1 / 3, 14.7, 23.99])
def test_an_edge_at_any_fraction_of_an_hour_is_the_moment_it_becomes_cheaper(hour):
    price = Price(1.0, 2.0, tariff=Tariff(name="t", timezone="UTC", hours=((0.1, hour),), factor=2))
    at = price.next_cheaper(utc("2026-11-23 00:10"))
    assert at is not None
    assert at - utc("2026-11-23 00:00") == dt.timedelta(hours=hour)


def test_discount_hours_are_a_factor_below_one_and_the_beginning_of_a_tariff_counts():
    since = utc("2026-11-25 01:30")
    night = Tariff(name="t", timezone="UTC", hours=((0.0, 8.0),), factor=0.5, since=since)
    assert Price(1.0, 2.0, tariff=night).next_cheaper(utc("2026-11-25 01:00")) == since
    assert Price(1.0, 2.0, tariff=night).next_cheaper(utc("2026-11-25 12:00")) == utc("2026-11-26 00:00")
    assert Price(1.0, 2.0, tariff=night).next_cheaper(utc("2026-11-25 02:00")) is None
    assert Price(0.0, 0.0, tariff=night).next_cheaper(utc("2026-11-25 12:00")) is None
    assert Price(1.0, 2.0).next_cheaper(utc("2026-11-25 12:00")) is None


hour = st.integers(0, 96).map(lambda quarters: quarters / 4)
tariffs = st.builds(
    Tariff,
    name=st.just("t"),
    timezone=st.sampled_from(["UTC", "Asia/Shanghai", "Europe/Berlin", "America/New_York", "Australia/Lord_Howe"]),
    hours=st.lists(st.tuples(hour, hour).map(sorted).map(tuple), min_size=1, max_size=3).map(tuple),
    factor=st.sampled_from([0.5, 2.0]),
    weekdays_only=st.booleans(),
    holidays=st.sets(st.dates(dt.date(2026, 10, 1), dt.date(2026, 11, 20)), max_size=8).map(frozenset),
    since=st.none() | st.datetimes(dt.datetime(2026, 10, 20), dt.datetime(2026, 10, 30), timezones=st.just(dt.UTC)),
)
# On both sides of the days on which Berlin, New York and Lord Howe change their clocks.
changes = st.sampled_from([utc("2026-10-03 15:30"), utc("2026-10-25 01:00"), utc("2026-11-01 06:00")])
moments = st.one_of(
    st.datetimes(dt.datetime(2026, 10, 2), dt.datetime(2026, 11, 6), timezones=st.just(dt.UTC)),
    st.builds(lambda at, minutes: at + minutes * MINUTE, changes, st.integers(-150, 150)),
)


@settings(max_examples=100, deadline=None)
@given(tariffs, moments)
def test_no_earlier_minute_is_cheaper_than_the_next_cheaper_moment(tariff, moment):
    price = Price(1.0, 2.0, tariff=tariff)
    now = price.at(moment).input
    at = price.next_cheaper(moment)
    if at is not None:
        assert at > moment
        assert price.at(at).input < now
    step = moment + MINUTE
    end = min(at or moment + dt.timedelta(days=4), moment + dt.timedelta(days=4))
    while step < end:
        assert price.at(step).input >= now, step
        step += MINUTE


# One's own tariffs and holidays.
OWN = (
    MINE
    + 'tariff = "siesta"\n[tariff.siesta]\ntimezone = "Europe/Madrid"\ndays = "weekdays"\nhours = ["14:30-16"]\n'
    + 'factor = 0.5\nholidays = "local"\nsince = 2026-06-01\nsource = "s"\nas_of = 2026-06-01\n'
    + '[holidays.local]\ndays = [2026-06-24, [2026-08-10, 2026-08-14]]\nsource = "town hall"\nas_of = 2026-01-01\n'
)


def test_a_tariff_and_a_calendar_of_one_s_own(load):
    mine = load(OWN)["mine"]
    madrid = ZoneInfo("Europe/Madrid")

    def factor(text):
        return mine.peak.factor_at(dt.datetime.fromisoformat(text).replace(tzinfo=madrid))

    assert [factor(f"2026-06-23 {t}") for t in ("14:29", "14:30", "15:59", "16:00")] == [1.0, 0.5, 0.5, 1.0]
    assert factor("2026-06-24 15:00") == 1.0
    assert [factor(f"2026-08-{day:02} 15:00") for day in (7, 10, 14, 17)] == [0.5, 1.0, 1.0, 0.5]
    assert factor("2026-05-29 15:00") == 1.0
    assert mine.price == Price(1.0, 2.0, "USD", None, mine.peak)
    assert (mine.peak.name, mine.peak.source, mine.peak.as_of) == ("siesta", "s", dt.date(2026, 6, 1))


def test_a_shipped_entry_takes_a_tariff_of_one_s_own_and_shipped_tariffs_stay(load):
    own = OWN.replace("[channel.mine]", '[channel.vllm]\ntariff = "siesta"\n[channel.mine]')
    channels = load(own)
    assert channels["vllm"].peak == channels["mine"].peak
    assert channels["deepseek"].peak == load_channels()["deepseek"].peak


def test_a_calendar_of_one_s_own_takes_the_place_of_the_shipped_one(load):
    peak = load("[holidays.china]\ndays = [2027-10-01]\n")["deepseek"].peak
    assert not peak.peak(beijing("2027-10-01 10:00"))
    assert peak.peak(beijing("2026-10-01 10:00"))
    assert peak.holidays_known(beijing("2027-06-01 10:00"))


@pytest.mark.parametrize(
    "hours",
    ["[[9, 12], [14, 18]]", '"9-12, 14-18"', '"9–12,14–18"', '["9-12", "14–18"]', '["9–12", "14–18"]',
     '[["9:00", "12:00"], [14.0, 18]]', '[["09:00", 12], "14:00-18:00"]'],
)  # fmt: skip
def test_hours_are_read_in_every_sensible_form(load, hours):
    mine = load(MINE + f'tariff = "t"\n[tariff.t]\nhours = {hours}\nfactor = 2\n')["mine"]
    assert mine.peak.hours == ((9.0, 12.0), (14.0, 18.0))


T = "[tariff.t]\nfactor = 2\n"
H = "[holidays.h]\n"


@pytest.mark.parametrize(
    ("text", "where", "told"),
    [
        (MINE + 'tariff = "deepseek-peek"\n', "[channel.mine] tariff", "did you mean 'deepseek-peak'"),
        (MINE + "tariff = 3\n", "[channel.mine] tariff", "expected a string"),
        (T, "[tariff.t] hours", "is missing"),
        (T + "hours = []\n", "[tariff.t] hours", "expected spans"),
        (T + 'hours = ""\n', "[tariff.t] hours", "expected spans"),
        (T + "hours = 9\n", "[tariff.t] hours", "expected spans"),
        (T + "hours = [9]\n", "[tariff.t] hours", "expected spans"),
        (T + "hours = [9, 10, 11]\n", "[tariff.t] hours", "expected spans"),
        (T + "hours = [[9, 10, 11]]\n", "[tariff.t] hours", "expected spans"),
        (T + "hours = [[9, true]]\n", "[tariff.t] hours", "expected spans"),
        (T + "hours = [[[9], [10]]]\n", "[tariff.t] hours", "expected spans"),
        (T + "hours = [[09:00:00, 12:00:00]]\n", "[tariff.t] hours", "expected spans"),
        (T + "hours = [2026-01-01, 2026-01-02]\n", "[tariff.t] hours", "expected spans"),
        (T + f"hours = [[0, {10**400}]]\n", "[tariff.t] hours", "expected spans"),
        (T + 'hours = "9:00-10:75"\n', "[tariff.t] hours", "expected spans"),
        (T + 'hours = "nine-ten"\n', "[tariff.t] hours", "expected spans"),
        (T + "hours = {from = 9, to = 12}\n", "[tariff.t] hours", "expected spans"),
        (T + "hours = [[9, 9]]\n", "[tariff.t] hours", "two different hours"),
        (T + "hours = [[9, 25]]\n", "[tariff.t] hours", "from 0 to 24"),
        (T + "hours = [[nan, 12]]\n", "[tariff.t] hours", "from 0 to 24"),
        (T + "hours = [[9, inf]]\n", "[tariff.t] hours", "from 0 to 24"),
        (T + "hours = [[-1, 12]]\n", "[tariff.t] hours", "from 0 to 24"),
        (T + 'hours = "9-12"\ntimezone = "Beijing"\n', "[tariff.t] timezone", "no such time zone 'Beijing'"),
        (T + 'hours = "9-12"\ntimezone = "Europe"\n', "[tariff.t] timezone", "no such time zone 'Europe'"),
        (T + 'hours = "9-12"\ntimezone = ""\n', "[tariff.t] timezone", "no such time zone"),
        (T + 'hours = "9-12"\ntimezone = "../etc/passwd"\n', "[tariff.t] timezone", "no such time zone"),
        (T + 'hours = "9-12"\ntimezone = 8\n', "[tariff.t] timezone", "expected a string"),
        (T + 'hours = "9-12"\ndays = "monday"\n', "[tariff.t] days", "expected one of all, weekdays"),
        (T + 'hours = "9-12"\nholidays = "chino"\n', "[tariff.t] holidays", "did you mean 'china'"),
        (T + 'hours = "9-12"\nsince = "2026-01-01"\n', "[tariff.t] since", "without quotes"),
        (T + 'hours = "9-12"\nfacter = 2\n', "[tariff.t] facter", "did you mean 'factor'"),
        (T.replace("2", "-2") + 'hours = "9-12"\n', "[tariff.t] factor", "at least 0"),
        (T.replace("2", '"double"') + 'hours = "9-12"\n', "[tariff.t] factor", "expected a number"),
        ("[tariff]\nt = 3\n", "tariff.t", "must be a table"),
        (H, "[holidays.h] days", "expected a list of dates"),
        (H + "days = []\n", "[holidays.h] days", "expected a list of dates"),
        (H + "days = 2026-01-01\n", "[holidays.h] days", "expected a list of dates"),
        (H + 'days = ["2026-01-01"]\n', "[holidays.h] days", "2026-01-01"),
        (H + "days = [2026-01-01T00:00:00Z]\n", "[holidays.h] days", "expected dates"),
        (H + "days = [[2026-01-02, 2026-01-01]]\n", "[holidays.h] days", "a first and a last"),
        (H + "days = [[2026-01-02]]\n", "[holidays.h] days", "a first and a last"),
        (H + "days = [2026-01-01]\nyear = 2026\n", "[holidays.h] year", "unknown key"),
        ("[holidays]\nh = [2026-01-01]\n", "holidays.h", "must be a table"),
        (MINE.replace("input", "inptu"), "[channel.mine.price] input", "is missing"),
        (MINE.replace("output = 2", "output = nan"), "[channel.mine.price] output", "expected a number"),
        (MINE.replace("output = 2", 'output = 2, as_of = "2026"'), "[channel.mine.price] as_of", "without quotes"),
        (MINE.replace("output = 2", "output = 2, currency = 3"), "[channel.mine.price] currency", "a string"),
    ],
)
def test_a_mistake_is_told_with_its_file_its_table_and_its_key(load, text, where, told):
    with pytest.raises(ConfigError) as error:
        load(text)
    message = str(error.value)
    assert "my.toml" in message
    assert where in message
    assert told in message
