"""What headers say about quotas, in every provider's words; and whatever they say, a wait that can be waited."""

from __future__ import annotations

import datetime as dt
import math
import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dsr1kit.access.quota import CAP_S, Allowance, Quota, read_quota

NOW = dt.datetime(2026, 11, 23, 8, 0, 0, tzinfo=dt.UTC)
EPOCH = int(NOW.timestamp())
HTTP_NOW = "Mon, 23 Nov 2026 08:00:00 GMT"


def read(**headers):
    return read_quota({name.replace("_", "-"): value for name, value in headers.items()}, now=NOW)


# What is asked outright.
@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("20", 20.0),
        ("2.5", 2.5),
        (" 3 ", 3.0),
        ("0", 0.0),
        ("1e2", 100.0),
        ("5, 5", 5.0),
        ("30;comment", 30.0),
        ("1m30s", 90.0),
        ("6ms", 0.006),
        ("Mon, 23 Nov 2026 08:00:42 GMT", 42.0),
        ("Monday, 23-Nov-26 08:00:42 GMT", 42.0),
        ("Mon Nov 23 08:00:42 2026", 42.0),
        ("Mon, 23 Nov 2026 09:00:42 +0100", 42.0),
        ("2026-11-23T08:00:42Z", 42.0),
        ("2026-11-23T16:00:42.5+08:00", 42.5),
        ("Mon, 23 Nov 2026 07:59:00 GMT", 0.0),
        ("Thu, 01 Jan 1970 00:00:00 GMT", 0.0),
        ("-1", None),
        ("nan", None),
        ("inf", None),
        ("-inf", None),
        ("1e999", None),
        ("", None),
        (" ", None),
        ("soon", None),
        ("Mon, 32 Nov 2026 08:00:00 GMT", None),
        ("Mon, 23 Nov 2026 25:00:00 GMT", None),
        (",", None),
        (";", None),
        ("9" * 100_000, None),
    ],
)
def test_retry_after_in_every_form(text, seconds):
    assert read(retry_after=text).retry_after_s == (None if seconds is None else pytest.approx(seconds))


@pytest.mark.parametrize(("text", "seconds"), [("1500", 1.5), ("0", 0.0), ("250.5", 0.2505), ("-1", 7.0), ("x", 7.0)])
def test_milliseconds_go_before_seconds_where_they_can_be_read(text, seconds):
    assert read(retry_after_ms=text, retry_after="7").retry_after_s == pytest.approx(seconds)
    assert read(retry_after_ms=text, retry_after="7").wait_s() == pytest.approx(seconds)


def test_dates_count_from_the_server_s_own_clock_where_it_tells_it():
    server = "Mon, 23 Nov 2026 09:30:00 GMT"  # an hour and a half ahead of this machine
    later = "Mon, 23 Nov 2026 09:30:20 GMT"
    assert read(retry_after=later, date=server).retry_after_s == 20.0
    assert read(retry_after=later).retry_after_s == 5420.0
    assert read(retry_after=later, date="garbage").retry_after_s == 5420.0
    epoch = str(EPOCH + 5420)
    assert read(x_ratelimit_reset=epoch, date=server).allowances == (Allowance("requests", None, None, 20.0),)
    assert read(x_ratelimit_reset=later, date=server).allowances == (Allowance("requests", None, None, 20.0),)


def test_dates_count_from_now_where_neither_the_server_nor_the_caller_says_when_that_is():
    soon = dt.datetime.now(dt.UTC) + dt.timedelta(seconds=30)
    wait = read_quota({"retry-after": f"{soon:%a, %d %b %Y %H:%M:%S GMT}"}).retry_after_s
    assert wait is not None
    assert 0 < wait <= 30


# What is counted.
def test_openai_s_headers():
    quota = read(
        x_ratelimit_limit_requests="60",
        x_ratelimit_remaining_requests="59",
        x_ratelimit_reset_requests="1s",
        x_ratelimit_limit_tokens="150000",
        x_ratelimit_remaining_tokens="149984",
        x_ratelimit_reset_tokens="6m0s",
    )
    assert quota.allowances == (Allowance("requests", 60, 59, 1.0), Allowance("tokens", 150_000, 149_984, 360.0))
    assert str(quota) == (
        "59 of 60 requests left, whole again in 1 s; 149984 of 150000 tokens left, whole again in 360 s"
    )
    assert quota.told
    assert quota.wait_s() is None  # nothing is used up


@pytest.mark.parametrize("prefix", ["x-ratelimit", "ratelimit"])
def test_plain_headers_count_requests(prefix):
    said = {f"{prefix}-limit": "100, 100;w=60", f"{prefix}-remaining": "0", f"{prefix}-reset": "12"}
    quota = read_quota(said, now=NOW)
    assert quota.allowances == (Allowance("requests", 100, 0, 12.0),)
    assert quota.wait_s() == 12.0


def test_modelscope_s_headers():
    quota = read(
        modelscope_ratelimit_requests_limit="2000",
        modelscope_ratelimit_requests_remaining="1998",
        modelscope_ratelimit_model_requests_limit="500",
        modelscope_ratelimit_model_requests_remaining="0",
    )
    assert quota.allowances == (Allowance("requests", 2000, 1998), Allowance("model requests", 500, 0))
    assert str(quota) == "1998 of 2000 requests left; 0 of 500 model requests left"
    assert quota.wait_s() is None  # used up, but nobody says until when


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 90.0), ("0.25", 0.25), ("1s", 1.0), ("1m30s", 90.0), ("6ms", 0.006), ("1h2m3.5s", 3723.5),
        ("1d", 86400.0), ("2d12h", 216_000.0), ("1m 30s", 90.0), ("1H", 3600.0), ("120us", 0.00012), ("0s", 0.0),
        (str(EPOCH + 42), 42.0), (f"{EPOCH + 42}.5", 42.5), (str((EPOCH + 42) * 1000), 42.0),
        (str(EPOCH - 42), 0.0), (str((EPOCH - 42) * 1000), 0.0), ("2026-11-23T08:00:42Z", 42.0),
        ("Mon, 23 Nov 2026 08:00:42 GMT", 42.0), (HTTP_NOW, 0.0),
        ("1x", None), ("m", None), ("1m30", None), ("-1m", None), ("1m-30s", None), ("1.5.2s", None), ("", None),
        ("nan", None), ("inf", None), ("-3", None), ("tomorrow", None), ("9" * 150 + "d" + "9" * 40 + "s", 8.64e154),
    ],
)  # fmt: skip
def test_resets_in_every_form(text, seconds):
    quota = read(x_ratelimit_remaining_tokens="0", x_ratelimit_reset_tokens=text)
    assert quota.allowances[0].reset_s == (None if seconds is None else pytest.approx(seconds))
    assert quota.wait_s() == (None if seconds is None else pytest.approx(min(seconds, CAP_S)))


@pytest.mark.parametrize("text", ["", "-1", "nan", "inf", "many", "0x10", "1e999", "None"])
def test_an_amount_that_cannot_be_read_is_left_out(text):
    assert read(x_ratelimit_limit=text, x_ratelimit_remaining="3").allowances == (Allowance("requests", None, 3),)
    assert not read(x_ratelimit_limit=text).told


@pytest.mark.parametrize(
    "name",
    ["x-ratelimit", "ratelimit-policy", "x-ratelimit-used", "my-ratelimit-limit", "modelscope-ratelimit-limit",
     "x-ratelimit-limit-", "x-retry-after", "retry-after-s", "ratelimit-limit\n"],
)  # fmt: skip
def test_headers_that_mean_something_else_are_left_alone(name):
    assert read_quota({name: "5"}, now=NOW) == Quota()


# How long to wait.
def test_the_longest_of_what_is_used_up_is_waited_for():
    quota = Quota(
        allowances=(Allowance("requests", 60, 0, 5), Allowance("tokens", 9, 0, 8), Allowance("days", 9, 1, 99))
    )
    assert quota.wait_s() == 8


def test_what_is_asked_outright_goes_before_what_is_counted():
    assert read(retry_after="2", x_ratelimit_remaining="0", x_ratelimit_reset="50").wait_s() == 2.0
    assert read(retry_after="0", x_ratelimit_remaining="0", x_ratelimit_reset="50").wait_s() == 0.0


@pytest.mark.parametrize(
    ("limits", "wait"),
    [
        ({}, CAP_S),
        ({"cap_s": 60.0}, 60.0),
        ({"cap_s": 60.0, "left_s": 10.0}, 10.0),
        ({"left_s": 0.0}, 0.0),
        ({"left_s": -5.0}, 0.0),
        ({"left_s": 1e9}, CAP_S),
        ({"cap_s": math.inf}, 86400.0),
        ({"cap_s": 0.0}, 0.0),
    ],
)
def test_a_wait_is_believed_up_to_the_cap_and_the_deadline(limits, wait):
    assert read(retry_after="86400").wait_s(**limits) == wait
    assert Quota().wait_s(**limits) is None


# What is shown of it.
@pytest.mark.parametrize(
    ("quota", "sentence"),
    [
        (read(retry_after="2.5"), "asks to wait 2.5 s"),
        (read(retry_after="3600"), "asks to wait 3600 s"),
        (read(retry_after="0.25", x_ratelimit_remaining="3"), "asks to wait 0.25 s; 3 requests left"),
        (read(x_ratelimit_limit="100"), "a limit of 100 requests"),
        (read(x_ratelimit_limit="100", x_ratelimit_reset="1d"), "a limit of 100 requests, whole again in 86400 s"),
        (read(x_ratelimit_reset="5"), "a limit on requests, whole again in 5 s"),
        (
            read(x_ratelimit_limit_tokens="1200000", x_ratelimit_remaining_tokens="1199999"),
            "1199999 of 1200000 tokens left",
        ),
        (read_quota({}, in_flight=7), "no quota headers; 7 in flight"),
        (
            read_quota({}, in_flight=7, most_answered=4),
            "no quota headers; 7 in flight, at most 4 were answered at a time",
        ),
    ],
)
def test_a_quota_is_shown_as_a_sentence(quota, sentence):
    assert str(quota) == sentence


def test_without_headers_the_requests_in_flight_are_what_is_known():
    quota = read_quota({"content-type": "text/html"}, in_flight=3, most_answered=2)
    assert (quota.told, quota.wait_s(), quota.in_flight, quota.most_answered) == (False, None, 3, 2)


# Whatever they say.
@pytest.mark.parametrize("text", ["1" * 60_000, "1." * 30_000, "1s" * 30_000, "(" * 60_000, "Mon, " * 12_000])
@pytest.mark.parametrize("name", ["retry-after", "retry-after-ms", "x-ratelimit-reset-requests", "date"])
def test_a_header_of_many_kilobytes_holds_nobody_up(name, text):
    began = time.process_time()
    read_quota({"x-ratelimit-reset": "1", name: text}, now=NOW)
    assert time.process_time() - began < 0.1


word = st.sampled_from(["limit", "remaining", "reset", "requests", "tokens", "model-requests", "day", ""])
names = st.one_of(
    st.sampled_from(["retry-after", "retry-after-ms", "date", "x-ratelimit-reset", "ratelimit-reset"]),
    st.lists(word, min_size=1, max_size=3).map(lambda words: "x-ratelimit-" + "-".join(words)),
    st.lists(word, min_size=1, max_size=3).map(lambda words: "modelscope-ratelimit-" + "-".join(words)),
    st.text(max_size=30),
)
date_bits = st.sampled_from(
    ["Mon,", "23", "Nov", "2026", "08:00:42", "GMT", "-0000", "+9999", "-99999999", "0001-01-01", "9999-12-31", "T",
     "24:00", "Z", "(", ")", ".", "00", "99", "AM", ":", "-", "+"]
)  # fmt: skip
values = st.one_of(
    st.text(max_size=40),
    st.floats().map(str),
    st.integers().map(str),
    st.lists(date_bits, max_size=8).map(" ".join),
    st.lists(date_bits, max_size=8).map("".join),
    st.lists(st.sampled_from(["1", "2.5", "h", "m", "s", "ms", "d", " ", "-", "e9"]), max_size=8).map("".join),
)


@settings(max_examples=600, deadline=None)
@given(st.dictionaries(names, values, max_size=6), st.floats(0, 1e6), st.none() | st.floats(-1e3, 1e6), st.booleans())
@example({"retry-after": "0001-01-01T00:00:00+23:59"}, 600.0, None, True)
@example({"retry-after": "9999-12-31T23:59:59-23:59", "date": "0001-01-01"}, 600.0, None, False)
@example({"x-ratelimit-reset": "1 Jan 0000 00:00 -9999", "date": ":"}, 600.0, None, True)
def test_no_header_raises_and_any_wait_can_be_waited(headers, cap_s, left_s, clock):
    quota = read_quota(headers, now=NOW if clock else None)
    wait = quota.wait_s(cap_s=cap_s, left_s=left_s)
    assert wait is None or (0 <= wait <= cap_s and (left_s is None or wait <= max(0.0, left_s)))
    assert wait is None or quota.told
    assert str(quota).strip()
    assert "None" not in str(quota)
    for allowance in quota.allowances:
        known = (allowance.limit, allowance.remaining, allowance.reset_s)
        assert any(amount is not None for amount in known)
        assert all(amount is None or (math.isfinite(amount) and amount >= 0) for amount in known)
