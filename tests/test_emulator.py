"""The emulated provider through the real client: faults, paces, dialects, its process and its model."""

from __future__ import annotations

import asyncio
import datetime as dt
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import replace

import aiohttp
import pytest

from dsr1kit.backends import open_backend, price_of
from dsr1kit.emulator.channel import EmulatedChannel, channel_of
from dsr1kit.emulator.server import Emulator
from dsr1kit.emulator.troubles import load_troubles, play
from dsr1kit.emulator.weather import FAULTS, FORMS, load_weather
from dsr1kit.errors import ConfigError, RunError, UnknownName, UsageError
from dsr1kit.records import Outcome, Sampling


def channel_at(path, url):
    return channel_of(load_weather(path), url, f"emulated:{path}", dt.datetime.now(dt.UTC))


QUESTION = [{"role": "user", "content": "What is 12 + 30?"}]
SCRIPT = "<think>\\n12 + 30: tens 4, ones 2. 好。\\n</think>\\n\\nThe answer is 42 😀."
REASONING, ANSWER = "12 + 30: tens 4, ones 2. 好。", "The answer is 42 😀."
NOON = dt.datetime(2026, 11, 23, 12, 30, tzinfo=dt.UTC)


@pytest.fixture
def weather_file(tmp_path):
    """Writes a weather file: scripted, with the tables that are given."""
    numbers = itertools.count()

    def write(text="", model=f'script = "{SCRIPT}"'):
        path = tmp_path / f"weather{next(numbers)}.toml"
        path.write_text(f"[model]\n{model}\n{text}", encoding="utf-8")
        return path

    return write


def serve(path, scenario, now=None):
    """Run `scenario(url, emulator, backend channel)` against an emulator in this process."""

    async def inside():
        emulator = Emulator(load_weather(path), now=now)
        async with emulator.listen() as url:
            return await scenario(channel_at(path, url), emulator)

    return asyncio.run(inside())


def clocks(outcome):
    """Short ones where a clock ends the request; elsewhere none that a busy machine could reach."""
    return {"first_token_s": 0.4, "stall_s": 0.2} if outcome in ("queued", "stalled") else {}


def ask(path, times=1, sampling=None, now=None, **clocks):
    async def scenario(channel, emulator):
        async with channel.open(**clocks) as r1:
            return [await r1.ask(QUESTION, sampling or Sampling(seed=1)) for _ in range(times)]

    replies = serve(path, scenario, now)
    return replies[0] if times == 1 else replies


# Faults.
@pytest.mark.parametrize("keep_alive", ["none", "comment"])
@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_has_exactly_its_outcome(weather_file, fault, keep_alive):
    path = weather_file(
        f'[faults]\n{fault} = 1.0\n[latency]\nfirst_token_s = 0.05\n'
        f'[dialect]\nkeep_alive = "{keep_alive}"\nkeep_alive_s = 0.02'
    )  # fmt: skip
    reply = ask(path, **clocks(fault))
    assert reply.outcome.value == fault, reply.detail
    assert reply.emulated


@pytest.mark.parametrize("fault", ["truncated", "cut"])
def test_faults_inside_a_one_word_answer(weather_file, fault):
    assert ask(weather_file(f"[faults]\n{fault} = 1.0", 'script = "42"')).outcome.value == fault


def test_faults_of_a_request_that_wants_no_stream(weather_file):
    async def scenario(channel, emulator):
        async with aiohttp.ClientSession() as session:
            url = channel.base_urls[0] + "/chat/completions"
            async with session.post(url, json={"messages": QUESTION}) as response:
                return await response.json()

    choices = {}
    for fault in ("empty", "filtered", "truncated"):
        choices[fault] = serve(weather_file(f"[faults]\n{fault} = 1.0"), scenario)["choices"][0]
    assert not choices["empty"]["message"]["content"]
    assert choices["filtered"]["finish_reason"] == "content_filter"
    assert choices["truncated"]["finish_reason"] == "length"
    for fault in ("cut", "queued", "stalled"):
        with pytest.raises(aiohttp.ClientError):
            serve(weather_file(f"[faults]\n{fault} = 1.0\n[dialect]\nqueue_s = 0.05"), scenario)


def test_shares_are_about_kept_and_the_rest_is_sound(weather_file):
    weather = load_weather(weather_file("[faults]\nthrottled = 0.3\ncut = 0.2"))
    faults = [weather.draw(f"q{i}", "1", 0, NOON).fault for i in range(2000)]
    assert 0.25 < faults.count("throttled") / 2000 < 0.35
    assert 0.15 < faults.count("cut") / 2000 < 0.25
    assert set(faults) == {"throttled", "cut", None}


def test_draws_depend_on_seed_question_request_seed_and_attempt_alone(weather_file):
    weather = load_weather(weather_file("[latency]\nfirst_token_s = 1.0\ninter_token_s = 0.1\nspread = 0.5"))

    def drawn(*what, of=weather):
        draw = of.draw(*what, NOON)
        return draw.first_token_s, draw.fault, draw.cut_at, tuple(draw.gaps_s(5))

    same = drawn("q", "1", 0)
    drawn("other", "1", 0)
    assert drawn("q", "1", 0) == same
    seeded = load_weather(weather_file("[latency]\nfirst_token_s = 1.0\ninter_token_s = 0.1\nspread = 0.5\nseed = 9"))
    others = [drawn("p", "1", 0), drawn("q", "2", 0), drawn("q", "1", 1), drawn("q", "1", 0, of=seeded)]
    assert len({same, *others}) == 5


def test_outcomes_do_not_depend_on_the_order_of_arrival(weather_file):
    path = weather_file("[faults]\noverloaded = 0.3\nempty = 0.3\n[latency]\nfirst_token_s = 0.01\nspread = 1.0")

    async def scenario(channel, emulator):
        outcomes = []
        for order in (range(12), reversed(range(12))):
            fresh = Emulator(emulator.weather)
            async with (
                fresh.listen() as url,
                channel_at(path, url).open() as r1,
            ):

                async def one(i, r1=r1):
                    questions = [{"role": "user", "content": f"question {i % 6}"}]
                    return i, (await r1.ask(questions, Sampling(seed=5, sample=i // 6))).outcome

                outcomes.append(dict(await asyncio.gather(*(one(i) for i in order))))
        return outcomes

    first, second = serve(path, scenario)
    assert first == second
    assert len(set(first.values())) > 1


# Pace.
def test_constant_latency_is_kept(weather_file):
    reply = ask(weather_file("[latency]\nfirst_token_s = 0.15\ninter_token_s = 0.02"))
    assert reply.outcome is Outcome.OK
    assert reply.timing.first_token_s >= 0.145
    assert reply.timing.inter_token_s >= 0.018
    assert reply.timing.total_s >= 0.145 + 0.018 * (reply.usage.completion_tokens - 1)


def test_spread_latency_is_log_normal_about_its_median(weather_file):
    weather = load_weather(weather_file("[latency]\nfirst_token_s = 0.2\nspread = 0.5"))
    drawn = sorted(weather.draw(f"q{i}", "1", 0, NOON).first_token_s for i in range(4000))
    assert statistics.median(drawn) == pytest.approx(0.2, rel=0.06)
    assert drawn[int(0.8413 * 4000)] / 0.2 == pytest.approx(1.6487, rel=0.08)  # e ** 0.5: one sigma up
    assert drawn[0] > 0


def test_peak_hours_multiply_both_paces_in_their_time_zone(weather_file):
    weather = load_weather(
        weather_file(
            "[latency]\nfirst_token_s = 0.2\ninter_token_s = 0.01\n"
            '[peak]\nhours = [[10, 12], "20.5-21"]\nfactor = 3.0\ntimezone = "Asia/Shanghai"'
        )
    )

    def at(hour, minute=0):
        draw = weather.draw("q", "1", 0, dt.datetime(2026, 11, 23, hour, minute, tzinfo=dt.UTC))
        return round(draw.first_token_s, 6), round(draw.gaps_s(1)[0], 6)

    calm, busy = (0.2, 0.01), (0.6, 0.03)
    assert [at(1, 59), at(2), at(3, 59), at(4)] == [calm, busy, busy, calm]
    assert [at(12, 29), at(12, 30), at(13)] == [calm, busy, calm]


def test_a_peak_hour_slows_the_real_answer_down(weather_file):
    path = weather_file("[latency]\nfirst_token_s = 0.05\n[peak]\nhours = [[12, 13]]\nfactor = 5")
    assert ask(path, now=lambda: NOON).timing.first_token_s >= 0.245


def test_keep_alives_come_while_waiting_and_are_no_first_token(weather_file):
    for how in ("comment", "blank"):
        path = weather_file(f'[latency]\nfirst_token_s = 0.2\n[dialect]\nkeep_alive = "{how}"\nkeep_alive_s = 0.03')
        reply = ask(path)
        assert reply.outcome is Outcome.OK
        assert reply.extra["keep_alives"] >= 2
        assert reply.timing.first_token_s >= 0.195


# Limits.
def test_requests_beyond_the_limits_are_429_with_retry_after(weather_file):
    first, second, third = ask(weather_file("[limits]\nrequests_per_minute = 2"), times=3)
    assert (first.outcome, second.outcome, third.outcome) == (Outcome.OK, Outcome.OK, Outcome.THROTTLED)
    assert 1 <= int(third.headers["retry-after"]) <= 60

    async def scenario(channel, emulator):
        async with channel.open() as r1:
            return await asyncio.gather(*(r1.ask(QUESTION) for _ in range(4)))

    path = weather_file("[limits]\nmax_in_flight = 1\n[latency]\nfirst_token_s = 0.3")
    outcomes = [r.outcome for r in serve(path, scenario)]
    assert sorted(outcomes) == [Outcome.OK] + [Outcome.THROTTLED] * 3


def test_a_client_that_goes_away_frees_its_place(weather_file):
    async def scenario(channel, emulator):
        async with channel.open(deadline_s=0.1) as hasty:
            assert (await hasty.ask(QUESTION)).outcome is Outcome.DEADLINE
        async with asyncio.timeout(5):
            while emulator._in_flight:  # noqa: ASYNC110 - the emulator tells nobody
                await asyncio.sleep(0.005)

    serve(weather_file("[limits]\nmax_in_flight = 1\n[latency]\nfirst_token_s = 60.0"), scenario)


@pytest.mark.parametrize(
    "body", [b"{", b"[]", b"{}", b'{"messages": []}', b'{"messages": [7]}',
             b'{"messages": [{"role": "user", "content": "x"}], "max_tokens": -1}',
             b'{"messages": [{"role": "user", "content": "x"}], "temperature": "hot"}'],
)  # fmt: skip
def test_broken_requests_are_400(weather_file, body):
    async def scenario(channel, emulator):
        url = channel.base_urls[0] + "/chat/completions"
        async with aiohttp.ClientSession() as session, session.post(url, data=body) as response:
            return response.status, await response.json()

    status, told = serve(weather_file(), scenario)
    assert status == 400
    assert told["error"]["message"]


# Dialects.
DIALECTS = {
    "plain": "",
    "reasoning": 'reasoning = "reasoning"',
    "inline": 'reasoning = "inline"',
    "prefilled": 'reasoning = "prefilled"',
    "crlf": "crlf = true",
    "no usage": "usage = false",
    "no done": "done = false",
    "three tokens a chunk": "tokens_per_chunk = 3",
    "inline, seven a chunk": 'reasoning = "inline"\ntokens_per_chunk = 7\ncrlf = true',
}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_dialect_gives_the_same_parts(weather_file, dialect):
    reply = ask(weather_file(f"[dialect]\n{DIALECTS[dialect]}"))
    assert (reply.outcome, reply.reasoning, reply.answer) == (Outcome.OK, REASONING, ANSWER)
    assert reply.emulated
    assert reply.model_served == "scripted-r1"
    assert reply.timing.first_answer_s is not None
    assert reply.usage.source == ("estimated" if dialect == "no usage" else "provider")
    if "chunk" in dialect:
        assert reply.extra["chunks"] < reply.usage.completion_tokens


def test_max_tokens_stops_by_length(weather_file):
    reply = ask(weather_file(), sampling=Sampling(max_tokens=3))
    assert (reply.outcome, reply.usage.completion_tokens) == (Outcome.TRUNCATED, 3)


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning", "inline", "prefilled"])
def test_a_request_without_stream_gets_one_json(weather_file, field):
    async def scenario(channel, emulator):
        async with aiohttp.ClientSession() as session:
            url = channel.base_urls[0] + "/chat/completions"
            async with session.post(url, json={"messages": QUESTION, "temperature": None}) as response:
                assert response.headers["x-dsr1kit-emulated"] == "1"
                return await response.json()

    whole = serve(weather_file(f'[dialect]\nreasoning = "{field}"'), scenario)
    message = whole["choices"][0]["message"]
    if field in ("inline", "prefilled"):
        assert message["content"].startswith("<think>") == (field == "inline")
        assert message["content"].endswith(f"\n</think>\n\n{ANSWER}")
    else:
        assert (message[field], message["content"]) == (REASONING, ANSWER)
    assert whole["usage"]["completion_tokens_details"]["reasoning_tokens"] > 0


def test_models_are_listed(weather_file):
    async def scenario(channel, emulator):
        async with (
            aiohttp.ClientSession() as session,
            session.get(channel.base_urls[0] + "/models") as response,
        ):
            return await response.json()

    assert [m["id"] for m in serve(weather_file(), scenario)["data"]] == ["scripted-r1"]


# Its own process.
def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as stat:  # noqa: PTH123 - gone any moment
            return stat.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition, within_s=20.0):
    end = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < end, "did not happen in time"
        time.sleep(0.02)


def test_a_channel_brings_its_process_and_takes_it_away(weather_file):
    path = weather_file("[price]\ninput = 1.0\noutput = 2.0")
    name = f"emulated:{path}"

    async def inside():
        async with open_backend(name, {}) as r1:
            pid = r1._process.pid
            assert alive(pid)
            return await r1.ask(QUESTION), pid

    reply, pid = asyncio.run(inside())
    assert (reply.outcome, reply.answer, reply.emulated, reply.channel) == (Outcome.OK, ANSWER, True, name)
    assert not alive(pid)
    assert price_of(name, {}).output == 2.0


def test_a_channel_that_cannot_start_says_why(weather_file):
    async def inside(path):
        async with EmulatedChannel(path):
            pass

    with pytest.raises(RunError, match="no-such-model"):
        asyncio.run(inside(weather_file(model='name = "./no-such-model"')))


def test_wrong_limits_start_no_process(weather_file):
    async def inside():
        channel = EmulatedChannel(weather_file(), first_token_s=0.0)
        with pytest.raises(UsageError, match="first_token_s"):
            await channel.__aenter__()
        assert channel._process is None

    asyncio.run(inside())


def test_unopened_and_unknown_are_usage_errors(weather_file):
    with pytest.raises(UsageError, match="async with"):
        asyncio.run(EmulatedChannel(weather_file()).ask(QUESTION))
    with pytest.raises(UnknownName, match="calm"):
        open_backend("emulated:clam")
    with pytest.raises(ConfigError, match="no such weather file"):
        open_backend("emulated:./nowhere/x.toml")


def test_no_emulator_outlives_a_killed_parent(weather_file):
    code = (
        "import asyncio, sys\n"
        "from dsr1kit.emulator.channel import EmulatedChannel, channel_of\n"
        "async def main():\n"
        "    async with EmulatedChannel(sys.argv[1]) as c:\n"
        "        print(c._process.pid, flush=True)\n"
        "        await asyncio.sleep(600)\n"
        "asyncio.run(main())\n"
    )
    command = [sys.executable, "-c", code, str(weather_file())]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        pid = int(parent.stdout.readline())
        assert alive(pid)
        parent.send_signal(signal.SIGKILL)
    wait_until(lambda: not alive(pid))


def emulate(*arguments):
    return subprocess.Popen(
        [sys.executable, "-m", "dsr1kit", "emulate", *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "COLUMNS": "500"},
    )  # fmt: skip


def test_the_command_tells_its_url_first_ends_on_a_signal_and_refuses_a_taken_port(weather_file):
    path = weather_file()
    with emulate(path) as first:
        told = json.loads(first.stdout.readline())
        assert list(told) == ["url"]
        port = told["url"].removeprefix("http://127.0.0.1:").removesuffix("/v1")
        with emulate(path, "--port", port) as second:
            out, err = second.communicate(timeout=60)
        assert (second.returncode, out) == (2, "")
        assert f"port {port}" in err
        assert "--port" in err
        first.send_signal(signal.SIGTERM)
        first.wait(timeout=20)
        assert first.returncode == 0


def test_a_broken_weather_file_is_a_usage_error(weather_file):
    with emulate(weather_file("[faults]\nbusy = 0.1")) as process:
        _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "busy" in err


# With a model.
MODEL = 'name = "tiny-r1"\ntemperature = 5.0'  # hot enough for draws to differ
DRAWS = [Sampling(max_tokens=60, seed=3, sample=i) for i in range(3)]


def test_prepared_answers_add_no_computing_and_seeds_repeat_over_processes(weather_file):
    pytest.importorskip("torch")
    path = weather_file("[latency]\nseed = 4", MODEL)

    async def inside():
        async with EmulatedChannel(path) as one, EmulatedChannel(path) as two:
            questions, prepared = [(QUESTION, s, 0) for s in DRAWS], []
            await asyncio.gather(one.prepare(questions, prepared.append), two.prepare(questions))
            assert sum(prepared) == len(DRAWS)
            first = [await one.ask(QUESTION, s) for s in DRAWS]
            second = [await two.ask(QUESTION, s) for s in reversed(DRAWS)]
            again = [await one.ask(QUESTION, s) for s in DRAWS]  # a second attempt was not prepared
            return first, second[::-1], again

    first, second, again = asyncio.run(inside())
    assert all(r.emulated and r.model_served == "tiny-r1" and r.usage.completion_tokens for r in first)
    texts = [(r.reasoning, r.answer) for r in first]
    assert texts == [(r.reasoning, r.answer) for r in second]
    assert len(set(texts)) > 1
    # Generated beforehand, an answer comes at once; generated on demand it takes its computing.
    assert min(r.timing.first_token_s for r in first) < min(r.timing.first_token_s for r in again)


@pytest.mark.parametrize(
    "hours",
    ["[[10, 12], [15, 17]]", '["10-12", "15-17"]', '"10-12, 15-17"', '["10:00-12:00", "15:00–17:00"]'],
)
def test_peak_hours_are_read_in_every_sensible_form(weather_file, hours):
    weather = load_weather(weather_file(f"[peak]\nhours = {hours}\nfactor = 3.2"))
    assert weather.peak_hours == ((10.0, 12.0), (15.0, 17.0))


def test_a_flat_pair_is_one_span_and_a_span_over_midnight_two(weather_file):
    assert load_weather(weather_file("[peak]\nhours = [10, 12]")).peak_hours == ((10.0, 12.0),)
    assert load_weather(weather_file("[peak]\nhours = [[22, 6]]")).peak_hours == ((22.0, 24.0), (0.0, 6.0))


# Forms of an outcome.
HOW = [(outcome, form) for outcome, forms in FORMS.items() for form in forms]
STATUS = {"500": 500, "503": 503, "529": 529, "402": 402, "403": 403, "401": 401, "404": 404, "410": 410, "400": 400,
          "422": 422, "429": 429}  # fmt: skip


@pytest.mark.parametrize(("outcome", "form"), HOW)
def test_every_form_of_an_outcome_is_that_outcome_on_the_wire(weather_file, outcome, form):
    path = weather_file(f'[faults]\n{outcome} = 1\n[how]\n{outcome} = "{form}"\n')
    reply = ask(path, **clocks(outcome))
    assert reply.outcome.value == outcome, reply.detail
    assert reply.emulated
    assert reply.http_status == STATUS.get(form, 200)
    thought, said = bool(reply.reasoning), bool(reply.answer)
    if form in ("before", "nothing", "body") or form in STATUS or outcome == "not_an_answer":
        assert (thought, said) == (False, False)
    elif form == "thinking":
        assert (reply.reasoning, said) == (REASONING, False)
    elif form == "answer":
        assert (reply.reasoning, said) == (REASONING, True)
        assert reply.answer != ANSWER
    elif outcome in ("stalled", "cut") or form == "event":
        assert thought


@pytest.mark.parametrize(("outcome", "form"), [("throttled", "event"), ("overloaded", "event")])
def test_an_error_inside_a_200_is_one_without_a_stream_too(weather_file, outcome, form):
    async def scenario(channel, emulator):
        url = channel.base_urls[0] + "/chat/completions"
        async with aiohttp.ClientSession() as session, session.post(url, json={"messages": QUESTION}) as response:
            return response.status, await response.json()

    status, told = serve(weather_file(f'[faults]\n{outcome} = 1\n[how]\n{outcome} = "{form}"\n'), scenario)
    assert status == 200
    assert set(told) == {"error"}
    assert told["error"]["message"]


def test_the_account_s_refusals_are_those_of_the_model_list_too(weather_file):
    async def scenario(channel, emulator):
        url = channel.base_urls[0] + "/models"
        async with aiohttp.ClientSession() as session, session.get(url) as response:
            return response.status

    assert serve(weather_file("[faults]\nunauthorized = 1"), scenario) == 401
    assert serve(weather_file('[faults]\nno_balance = 1\n[how]\nno_balance = "403"'), scenario) == 403
    assert serve(weather_file("[faults]\noverloaded = 1"), scenario) == 200
    assert serve(weather_file("[faults]\nunauthorized = 0.5"), scenario) == 200


# Quotas.
@pytest.mark.parametrize(
    ("kind", "wait_s", "reads"),
    [
        ("retry-after", 2.5, ["3"]),
        ("fraction", 2.5, ["2.5"]),
        ("retry-after-ms", 0.35, ["350"]),
        ("openai", 90.0, ["60", "0", "1m30s"]),
        ("openai", 0.35, ["60", "0", "350ms"]),
        ("x-ratelimit", 2.5, ["60", "0", "3"]),
        ("modelscope", 2.5, ["2000", "1000", "60", "0"]),
        ("none", 2.5, []),
    ],
)
def test_every_way_of_telling_a_quota_is_sent_and_read(weather_file, kind, wait_s, reads):
    path = weather_file(
        f'[faults]\nthrottled = 1\n[limits]\nretry_after_s = {wait_s}\n[dialect]\nquota_headers = "{kind}"'
    )
    reply = ask(path)
    assert reply.outcome is Outcome.THROTTLED
    told = {k: v for k, v in reply.headers.items() if "ratelimit" in k or "retry-after" in k}
    assert list(told.values()) == reads
    quota = reply.extra["quota"]
    assert quota.told == bool(reads)
    if kind not in ("none", "modelscope"):
        assert wait_s <= quota.wait_s() <= max(1.0, wait_s) + 1


def test_a_date_to_try_again_at_is_sent_and_read(weather_file):
    path = weather_file('[faults]\nthrottled = 1\n[limits]\nretry_after_s = 30\n[dialect]\nquota_headers = "date"')
    reply = ask(path)
    assert reply.headers["retry-after"].endswith(" GMT")
    assert 27 <= reply.extra["quota"].wait_s() <= 31


@pytest.mark.parametrize("kind", ["openai", "x-ratelimit", "modelscope"])
def test_what_is_left_is_told_with_every_answer(weather_file, kind):
    path = weather_file(f'[limits]\nrequests_per_minute = 5\n[dialect]\nquota_headers = "{kind}"')
    left = [r.extra["quota"].allowances[-1].remaining for r in ask(path, times=6)]
    assert left == [4, 3, 2, 1, 0, 0]


# Retirement.
def at_times(path, moments, began=NOON, times=1):
    """Outcomes of questions asked so many seconds after the emulator began."""
    clock = [began]

    async def scenario(channel, emulator):
        outcomes = []
        async with channel.open() as r1:
            for after_s in moments:
                clock[0] = began + dt.timedelta(seconds=after_s)
                outcomes.append([(await r1.ask(QUESTION)).outcome.value for _ in range(times)])
        return [o[0] if times == 1 else o for o in outcomes]

    async def inside():
        emulator = Emulator(load_weather(path), now=lambda: clock[0])
        async with emulator.listen() as url:
            # By the real calendar this channel is never retired: the emulator is what says so.
            channel = replace(channel_at(path, url), retires=None)
            return await scenario(channel, emulator)

    return asyncio.run(inside())


@pytest.mark.parametrize("limit", ["", "[limits]\nrequests_per_minute = 600\n"])
def test_a_model_is_served_until_its_retirement_and_not_after(weather_file, limit):
    later = weather_file(limit + "[retirement]\nin_s = 60\nshrinks_s = 1\n")
    assert at_times(later, [0, 58, 60, 61]) == ["ok", "ok", "retired", "retired"]
    dated = weather_file(limit + "[retirement]\nat = 2026-11-23T12:31:00Z\nshrinks_s = 1\n")
    assert at_times(dated, [0, 58, 60, 61]) == ["ok", "ok", "retired", "retired"]


def test_a_retirement_is_a_date_of_the_channel(weather_file):
    async def scenario(channel, emulator):
        return channel

    begun = dt.datetime(2099, 1, 1, tzinfo=dt.UTC)
    weather = load_weather(weather_file("[retirement]\nin_s = 86400\n"))
    assert channel_of(weather, "http://127.0.0.1:1/v1", "e", begun).retires == begun + dt.timedelta(days=1)
    for text in ("2099-01-02", "2099-01-02T00:00:00", "2099-01-02T08:00:00+08:00"):
        path = weather_file(f"[retirement]\nat = {text}\n")
        assert serve(path, scenario).retires_at() == dt.datetime(2099, 1, 2, tzinfo=dt.UTC)
    assert serve(weather_file(), scenario).retires is None


def test_requests_a_minute_shrink_to_nothing_before_the_retirement(weather_file):
    path = weather_file("[limits]\nrequests_per_minute = 4\n[retirement]\nin_s = 1000\nshrinks_s = 800\n")
    full, half, none, gone = (at_times(path, [after_s], times=6)[0] for after_s in (100, 600, 900, 1000))
    assert full == ["ok"] * 4 + ["throttled"] * 2
    assert half == ["ok"] * 2 + ["throttled"] * 4
    assert none == ["throttled"] * 6
    assert gone == ["retired"] * 6


def test_a_quota_that_shrinks_is_told_as_it_is_granted(weather_file):
    path = weather_file(
        "[limits]\nrequests_per_minute = 8\n[retirement]\nin_s = 1000\nshrinks_s = 2000\n"
        '[dialect]\nquota_headers = "x-ratelimit"\n'
    )
    reply = ask(path, now=lambda: NOON)
    assert (reply.headers["x-ratelimit-limit"], reply.headers["x-ratelimit-remaining"]) == ("4", "3")


# Account, names and limits of length.
def test_the_balance_is_told_as_deepseek_tells_it_and_an_empty_one_refuses(weather_file):
    async def scenario(channel, emulator):
        url = channel.base_urls[0] + "/user/balance"
        async with aiohttp.ClientSession() as session, session.get(url) as response:
            told = (response.status, await response.json())
        async with channel.open() as r1:
            return channel.balance_path, *told, (await r1.ask(QUESTION)).outcome

    path, status, told, outcome = serve(weather_file("[limits]\nbalance = 3.5\n[price]\ninput=1\noutput=1"), scenario)
    assert (path, status, outcome) == ("/user/balance", 200, Outcome.OK)
    assert told == {"is_available": True, "balance_infos": [{"currency": "USD", "total_balance": "3.50"}]}
    _, status, told, outcome = serve(weather_file("[limits]\nbalance = 0"), scenario)
    assert (told["is_available"], outcome) == (False, Outcome.NO_BALANCE)
    path, status, _, outcome = serve(weather_file(), scenario)
    assert (path, status, outcome) == ("", 404, Outcome.OK)


@pytest.mark.parametrize(
    ("text", "status", "names"),
    [
        ("", 200, ["scripted-r1"]),
        ('listed = ["a", "b"]', 200, ["a", "b"]),
        ("listed = []", 200, []),
        ('serves = "other"', 200, ["scripted-r1"]),
        ('models = "none"', 404, None),
        ('models = "forbidden"', 403, None),
    ],
)
def test_the_model_list_is_what_the_weather_has_in_it(weather_file, text, status, names):
    async def scenario(channel, emulator):
        url = channel.base_urls[0] + "/models"
        async with aiohttp.ClientSession() as session, session.get(url) as response:
            return response.status, await response.json()

    got, told = serve(weather_file(f"[dialect]\n{text}"), scenario)
    assert got == status
    assert names is None or [m["id"] for m in told["data"]] == names


def test_another_name_may_be_served_than_is_asked_for(weather_file):
    reply = ask(weather_file('[dialect]\nserves = "some-other-model"'))
    assert (reply.outcome, reply.model_requested, reply.model_served) == (
        Outcome.OK, "scripted-r1", "some-other-model",
    )  # fmt: skip


def test_a_burst_comes_whole_at_the_moment_of_its_last_token(weather_file):
    pace = "[latency]\nfirst_token_s = 0.05\ninter_token_s = 0.01\n"
    paced, burst = ask(weather_file(pace)), ask(weather_file(pace + "[dialect]\nburst = true\n"))
    assert (burst.reasoning, burst.answer) == (paced.reasoning, paced.answer)
    assert paced.extra["chunks"] > 10
    assert burst.extra["chunks"] <= 2
    assert burst.timing.first_token_s >= 0.05 + 0.009 * (paced.usage.completion_tokens - 1)
    assert burst.timing.total_s - burst.timing.first_token_s < 0.05


def test_answers_end_at_the_ceiling_of_the_place_or_of_the_request(weather_file):
    path = weather_file("[limits]\nmax_output = 5\n")
    reply = ask(path)
    assert (reply.outcome, reply.finish_reason, reply.usage.completion_tokens) == (Outcome.TRUNCATED, "length", 5)
    assert ask(path, sampling=Sampling(max_tokens=3)).usage.completion_tokens == 3
    assert ask(weather_file("[limits]\nmax_output = 5000\n")).outcome is Outcome.OK


def test_more_tokens_than_the_place_takes_are_refused_with_its_limit(weather_file):
    path = weather_file("[limits]\nrefuse_above = 100\n")
    assert ask(path, sampling=Sampling(max_tokens=100)).outcome is Outcome.OK
    reply = ask(path, sampling=Sampling(max_tokens=101))
    assert (reply.outcome, reply.http_status) == (Outcome.BAD_REQUEST, 400)
    assert "[1, 100]" in reply.detail

    async def scenario(channel, emulator):
        url = channel.base_urls[0] + "/chat/completions"
        async with aiohttp.ClientSession() as session, session.post(url, json={"messages": QUESTION}) as response:
            return response.status

    assert serve(path, scenario) == 200  # nothing was asked for that could be too much


def test_numbers_that_are_none_are_400(weather_file):
    async def scenario(channel, emulator):
        url = channel.base_urls[0] + "/chat/completions"
        body = b'{"messages": [{"role": "user", "content": "x"}], "max_tokens": 1e999}'
        async with aiohttp.ClientSession() as session, session.post(url, data=body) as response:
            return response.status

    assert serve(weather_file(), scenario) == 400


# Several scripts, system prompts.
SEVERAL = 'script = ["first of all", "second to none", "third time lucky", "fourth and last"]'


def test_of_several_scripts_the_first_is_given_at_temperature_0_and_one_is_drawn_above(weather_file):
    path = weather_file(model=SEVERAL)
    cold = {r.answer for r in ask(path, times=8, sampling=Sampling(temperature=0.0))}
    assert cold == {"first of all"}
    hot = [r.answer for r in ask(path, times=16, sampling=Sampling(temperature=1.0, seed=1))]
    assert len(set(hot)) > 1
    assert set(hot) <= set(load_weather(path).scripts)
    assert hot == [r.answer for r in ask(path, times=16, sampling=Sampling(temperature=1.0, seed=1))]


def test_a_temperature_of_the_weather_stands_above_the_request_s(weather_file):
    always = ask(weather_file(model=SEVERAL + "\ntemperature = 0.0"), times=8, sampling=Sampling(temperature=1.0))
    assert {r.answer for r in always} == {"first of all"}
    never = ask(weather_file(model=SEVERAL + "\ntemperature = 1.0"), times=16, sampling=Sampling(temperature=0.0))
    assert len({r.answer for r in never}) > 1


@pytest.mark.parametrize(
    ("how", "outcome", "answer"),
    [("accept", "ok", ANSWER), ("obey", "ok", f"{ANSWER} MANGO"), ("refuse", "bad_request", "")],
)
def test_a_system_prompt_is_accepted_obeyed_or_refused(weather_file, how, outcome, answer):
    async def scenario(channel, emulator):
        system = {"role": "system", "content": 'End with the word "MANGO".'}
        async with channel.open() as r1:
            assert (await r1.ask(QUESTION)).answer == ANSWER
            return await r1.ask([system, *QUESTION])

    reply = serve(weather_file(f'[how]\nsystem = "{how}"'), scenario)
    assert (reply.outcome.value, reply.answer) == (outcome, answer)


# The shipped troubles.
def test_every_trouble_is_a_client_s_outcome_too():
    troubles = load_troubles()

    async def one(trouble, turns):
        async with turns, play(trouble) as channel, channel.open(**clocks(trouble.outcome.value)) as r1:
            assert channel.emulated
            return (await r1.ask(QUESTION, Sampling(max_tokens=128))).outcome

    async def inside():
        turns = asyncio.Semaphore(6)
        return await asyncio.gather(*(one(t, turns) for t in troubles.values()))

    seen = dict(zip(troubles, asyncio.run(inside()), strict=True))
    assert seen == {name: t.outcome for name, t in troubles.items()}
