"""A watch: one small question at every moment, by a clock of our own; a folder that goes on after any end."""

from __future__ import annotations

import asyncio
import datetime as dt
import html
import json
import math
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import AsyncExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from scripted import ANSWER, Scripted, refusal, response

from dsr1kit.access.channels import Catalogue, Channel
from dsr1kit.access.prices import Price
from dsr1kit.compare.journal import Journal, read_records
from dsr1kit.compare.watch import WatchSettings, by_hour, finish_watch, peak_ratio, watch
from dsr1kit.emulator.channel import channel_of
from dsr1kit.emulator.server import Emulator
from dsr1kit.emulator.weather import load_weather
from dsr1kit.errors import ConfigError, MissingKey, RunError, UnknownName, UsageError

SECRET = "correct-horse-battery-staple-79"  # noqa: S105 - a made-up value that must not leak
START = dt.datetime(2026, 11, 22, 16, 0, tzinfo=dt.UTC)  # midnight in Shanghai
FIELDS = {
    "run", "channel", "item", "sample", "model_requested", "model_served", "outcome", "detail", "due_at", "queue_s",
    "connect_s", "connection_reused", "first_token_s", "first_answer_s", "think_s", "inter_token_s", "total_s",
    "prompt_tokens", "reasoning_tokens", "answer_tokens", "token_count_source", "reasoning", "answer",
    "finish_reason", "verdict", "cost", "currency", "attempts", "from_cache", "emulated",
}  # fmt: skip


class Clock:
    """A clock that runs only while it is slept by, and stops the watch (as a kill would) when told to."""

    def __init__(self, at=START, stop_at=math.inf):
        self.at, self.stop_at = at.timestamp(), stop_at

    def __call__(self):
        return self.at

    async def sleep(self, seconds):
        self.at += seconds
        if self.at >= self.stop_at:
            raise KeyboardInterrupt

    def now(self):
        return dt.datetime.fromtimestamp(self.at, dt.UTC)


def settings(*channels, every_s=600.0, for_s=3600.0, **more):
    return WatchSettings(channels=channels or ("one",), every_s=every_s, for_s=for_s, **more)


def run(out, wanted=None, clock=None, script=None, on_tick=None, **fields):
    """Watch a scripted provider; returns what was watched and the server."""
    clock = clock or Clock()
    wanted = wanted or settings()

    async def inside():
        async with Scripted(script or response(ANSWER)) as server:
            catalogue = Catalogue({n: server.channel(name=n, **fields) for n in (*wanted.channels, "other")})
            try:
                done = await watch(wanted, out, channels=catalogue, clock=clock, sleep=clock.sleep, on_tick=on_tick)
            except KeyboardInterrupt:
                done = None
            return done, server

    return asyncio.run(inside())


def moments(out):
    return [(r["channel"], r["sample"]) for r in read_records(out / "records.jsonl")]


# --- records ---------------------------------------------------------------------------------------------------


def test_a_watch_writes_the_records_of_a_comparison(tmp_path):
    ticks = []
    done, server = run(
        tmp_path, settings("one", "two"), on_tick=lambda n, of, replies: ticks.append((n, of, sorted(replies))),
        price=Price(1.0, 10.0),
    )  # fmt: skip
    records = read_records(done.records)
    assert moments(tmp_path) == [(name, tick) for tick in range(6) for name in ("one", "two")]
    assert all(set(r) >= FIELDS for r in records)
    assert {(r["outcome"], r["verdict"], r["emulated"], r["from_cache"]) for r in records} == {
        ("ok", "right", False, False)
    }
    due = [dt.datetime.fromisoformat(r["due_at"]) for r in records[::2]]
    assert due == [START + dt.timedelta(minutes=10 * tick) for tick in range(6)]
    assert ticks == [(n, 6, ["one", "two"]) for n in range(1, 7)]
    assert len(server.requests) == 12
    assert all(r["cost"] > 0 and r["currency"] == "USD" for r in records)
    assert {r["run"] for r in records} == {done.summary["run"]}
    assert server.requests[0].json["max_tokens"] <= 256


def test_failures_are_records_too(tmp_path):
    scripts = iter([refusal(503, "busy"), response(ANSWER), refusal(429, "slow down"), response(ANSWER)])
    done, _ = run(tmp_path, settings(for_s=2400.0), script=lambda r: next(scripts))
    assert [r["outcome"] for r in read_records(done.records)] == ["overloaded", "ok", "throttled", "ok"]
    assert done.summary["channels"]["one"]["availability"]["value"] == 0.5
    assert done.summary["by_hour"]["one"][0]["availability"]["value"] == 0.5


def test_the_first_question_is_asked_at_once_and_the_last_before_the_end(tmp_path):
    assert settings(every_s=600, for_s=86400).ticks == 144
    assert settings(every_s=600, for_s=601).ticks == 2
    assert settings(every_s=600, for_s=599).ticks == 1
    done, _ = run(tmp_path, settings(every_s=600, for_s=1))
    assert [r["sample"] for r in read_records(done.records)] == [0]


# --- going on --------------------------------------------------------------------------------------------------


def test_a_watch_that_was_stopped_goes_on_and_what_passed_meanwhile_is_missing(tmp_path):
    stopped, _ = run(tmp_path, settings("one", "two"), Clock(stop_at=START.timestamp() + 1200))
    assert stopped is None
    assert moments(tmp_path) == [("one", 0), ("two", 0), ("one", 1), ("two", 1)]
    kept = (tmp_path / "records.jsonl").read_bytes()
    done, server = run(tmp_path, settings("one", "two"), Clock(START + dt.timedelta(minutes=45)))
    assert (tmp_path / "records.jsonl").read_bytes().startswith(kept)
    assert [sample for name, sample in moments(tmp_path) if name == "two"] == [0, 1, 4, 5]
    assert len(server.requests) == 4
    late, last = (dt.datetime.fromisoformat(r["due_at"]) for r in read_records(done.records)[4::2])
    assert (late, last) == (START + dt.timedelta(minutes=45), START + dt.timedelta(minutes=50))
    assert len(json.loads((tmp_path / "run.json").read_text())["starts"]) == 2


def test_a_moment_that_was_half_recorded_is_completed_and_nothing_asked_twice(tmp_path):
    wanted = settings("one", "two", "three")
    run(tmp_path, wanted, Clock(stop_at=START.timestamp() + 1200))
    lines = (tmp_path / "records.jsonl").read_bytes().splitlines(keepends=True)
    assert len(lines) == 6
    (tmp_path / "records.jsonl").write_bytes(b"".join(lines[:4]) + lines[4][:40])  # torn in the middle of a line
    _, server = run(tmp_path, wanted, Clock(START + dt.timedelta(minutes=11), stop_at=START.timestamp() + 1200))
    assert sorted(moments(tmp_path)) == sorted((n, t) for t in (0, 1) for n in wanted.channels)
    assert len(server.requests) == 2


def test_a_watch_that_is_over_asks_nothing_and_tells_the_same(tmp_path):
    first, _ = run(tmp_path)
    again, server = run(tmp_path, clock=Clock(START + dt.timedelta(days=2)))
    assert not server.requests
    assert again.summary == first.summary


def test_a_longer_watch_goes_on_with_a_shorter_one(tmp_path):
    run(tmp_path, settings(for_s=1800.0))
    run(tmp_path, settings(for_s=3600.0), Clock(START + dt.timedelta(minutes=21)))
    assert [sample for _, sample in moments(tmp_path)] == [0, 1, 2, 3, 4, 5]


def test_an_answer_that_takes_longer_than_the_interval_makes_the_next_moments_missing(tmp_path):
    clock = Clock()

    def slow(request):
        clock.at += 1500
        return response(ANSWER)

    run(tmp_path, clock=clock, script=slow)
    samples = [sample for _, sample in moments(tmp_path)]
    assert samples == sorted(set(samples))
    assert samples == [0, 2, 5]


class Counting(BaseHTTPRequestHandler):
    """A provider in a thread that outlives the process which asks it."""

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked.append(time.time())
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Content-Length", str(len(ANSWER)))
        self.end_headers()
        self.wfile.write(ANSWER)

    def log_message(self, *_):
        pass


def test_a_killed_process_is_gone_on_with_by_the_same_command(tmp_path):
    every_s, ticks = 0.25, 16
    server = ThreadingHTTPServer(("127.0.0.1", 0), Counting)
    server.asked = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    mine = tmp_path / "mine.toml"
    mine.write_text(f"[channel.one]\nbase_url = 'http://127.0.0.1:{server.server_port}/v1'\nmodel = 'served-r1'\n")
    command = [
        sys.executable, "-m", "dsr1kit", "doctor", "one", "--channel-file", str(mine), "--every", f"{every_s}s",
        "--for", f"{every_s * ticks:g}s", "--out", str(tmp_path / "w"), "--json",
    ]  # fmt: skip
    records = tmp_path / "w" / "records.jsonl"
    try:
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            limit = time.monotonic() + 30
            while (not records.exists() or records.read_bytes().count(b"\n") < 2) and time.monotonic() < limit:
                time.sleep(0.01)
            process.send_signal(signal.SIGKILL)
        kept = records.read_bytes()
        time.sleep(2.2 * every_s)
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    finally:
        server.shutdown()
        server.server_close()
    assert done.returncode == 0, done.stderr
    assert records.read_bytes().startswith(kept[: kept.rfind(b"\n") + 1])
    rows = read_records(records)
    samples = [r["sample"] for r in rows]
    assert samples == sorted(set(samples))
    assert samples[0] == 0
    assert samples[-1] == ticks - 1
    assert len(samples) < ticks - 1  # what passed while nobody watched is missing
    assert len(server.asked) - len(rows) <= 1  # one may have been under way when it was killed
    began = dt.datetime.fromisoformat(rows[0]["due_at"]).timestamp()
    for row in rows:
        late_s = dt.datetime.fromisoformat(row["due_at"]).timestamp() - began - row["sample"] * every_s
        assert -0.01 < late_s < every_s + 0.1
    assert json.loads(done.stdout)["channels"]["one"]["n"] == len(rows)


# --- what cannot be meant --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"channels": ()}, "at least one channel"),
        ({"channels": ("one", "two", "one")}, "'one' is named twice"),
        ({"channels": ("local:tiny-r1",)}, "local:tiny-r1 runs in this process"),
        ({"every_s": 0.0}, "every_s must be above 0"),
        ({"every_s": -1.0}, "every_s must be above 0"),
        ({"every_s": math.nan}, "every_s must be above 0"),
        ({"for_s": 0.0}, "for_s must be above 0"),
        ({"for_s": math.inf}, "for_s must be above 0"),
        ({"first_token_s": 0.0}, "first_token_s must be above 0"),
        ({"stall_s": 0.0}, "stall_s must be above 0"),
        ({"timezone": "Mars/Base"}, "no such time zone 'Mars/Base'"),
        ({"timezone": "../etc/passwd"}, "no such time zone"),
        ({"timezone": "Europe"}, "no such time zone"),
        ({"timezone": ""}, "no such time zone"),
        ({"peak_hours": ((22.0, 6.0),)}, "peak_hours"),
        ({"peak_hours": ((10.0, 25.0),)}, "peak_hours"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(wrong, told):
    with pytest.raises(UsageError, match=told):
        WatchSettings(**{"channels": ("one",), "every_s": 1.0, "for_s": 1.0, **wrong})


def test_names_keys_and_entries_are_looked_at_before_anything_is_asked_or_written(tmp_path, monkeypatch):
    out = tmp_path / "w"
    monkeypatch.delenv("WATCH_KEY", raising=False)
    open_ = Channel(name="open", base_urls=("http://127.0.0.1:1/v1",), model="m")
    keyed = Channel(name="keyed", base_urls=("http://127.0.0.1:1/v1",), model="m", api_key_env="WATCH_KEY")
    unfilled = Channel(name="unfilled", base_urls=(), model="m", fill_in=("base_url",))
    catalogue = Catalogue({c.name: c for c in (open_, keyed, unfilled)})
    wrong = [("opne", UnknownName), ("keyed", MissingKey), ("unfilled", ConfigError), ("emulated:clam", UnknownName)]
    for name, error in wrong:
        with pytest.raises(error):
            asyncio.run(watch(settings("open", name), out, channels=catalogue))
    assert not out.exists()


def test_a_folder_of_another_run_is_refused_and_left_as_it_is(tmp_path):
    run(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    for other in (settings(every_s=300.0), settings("other"), settings(timezone="UTC"), settings(stall_s=1.0)):
        with pytest.raises(UsageError, match="another run"):
            run(tmp_path, other)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_the_folder_of_a_comparison_is_refused(tmp_path):
    with Journal(tmp_path, {"channels": ["one"], "task": "arithmetic"}) as journal:
        journal.append({"channel": "one", "item": "a", "sample": 0, "outcome": "ok"})
    with pytest.raises(UsageError, match="another run"):
        run(tmp_path)


def test_two_watches_do_not_write_into_one_folder(tmp_path):
    identity = {"any": 1}
    with Journal(tmp_path, identity), pytest.raises(UsageError, match="in use"):
        run(tmp_path)


def test_a_folder_that_can_no_longer_be_written_is_told(tmp_path):
    run(tmp_path)
    (tmp_path / "summary.json").unlink()
    (tmp_path / "summary.json").mkdir()
    with pytest.raises(RunError, match="the records are whole"):
        finish_watch(tmp_path)


# --- a day -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def day(tmp_path_factory):
    """A day of two emulated channels by a clock of our own: one 3.2 times slower at its peak, one as ever."""
    folder = tmp_path_factory.mktemp("day")
    peak = '[peak]\nhours = [[10, 12], [15, 17]]\nfactor = 3.2\ntimezone = "Asia/Shanghai"\n'
    texts = {
        "peaky": "first_token_s = 0.018\n" + peak,
        "flat": "first_token_s = 0.008\nspread = 0.6\nseed = 5\n",
    }
    clock = Clock()

    async def inside():
        catalogue = {}
        async with AsyncExitStack() as stack:
            for name, text in texts.items():
                (folder / f"{name}.toml").write_text(
                    f'[model]\nscript = "<think>\\nso\\n</think>\\n42"\n[latency]\n{text}'
                )
                emulator = Emulator(load_weather(folder / f"{name}.toml"), now=clock.now)
                url = await stack.enter_async_context(emulator.listen())
                catalogue[name] = channel_of(emulator.weather, url, name, clock.now())
            wanted = WatchSettings(channels=("peaky", "flat"), every_s=600, for_s=86400)
            out = folder / "<b>w"
            return await watch(wanted, out, channels=catalogue, clock=clock, sleep=clock.sleep)

    return asyncio.run(inside())


def test_a_day_finds_the_peak(day):
    peak = day.summary["peak"]["peaky"]
    assert (peak["n_inside"], peak["n_outside"]) == (24, 120)
    assert peak["ratio"]["low"] > 1.5
    assert 2.0 < peak["ratio"]["value"] < 3.6
    assert (peak["answered_inside"], peak["answered_outside"]) == (1.0, 1.0)
    line = day.summary["verdict"][0]
    assert line.startswith("peaky (emulated): answered 100.0% of 144")
    assert "10-12, 15-17 o'clock" in line
    assert "no difference" not in line


def test_a_day_without_a_peak_shows_no_difference(day):
    ratio = day.summary["peak"]["flat"]["ratio"]
    assert ratio["low"] <= 1 <= ratio["high"]
    assert "no difference shown" in day.summary["verdict"][1]


def test_the_hours_are_those_of_the_time_zone(day):
    rows = day.summary["by_hour"]["peaky"]
    assert [row["hour"] for row in rows] == list(range(24))
    assert {row["n"] for row in rows} == {6}
    slow = {row["hour"] for row in rows if row["first_token_s"]["value"] > 0.04}
    assert slow == {10, 11, 15, 16}
    for row in rows:
        for figure in (row["availability"], row["first_token_s"]):
            assert figure["low"] <= figure["value"] <= figure["high"]


def test_the_summary_has_the_keys_of_a_comparison_and_those_of_a_watch(day):
    text = day.summary_path.read_text(encoding="utf-8")

    def no_constant(name):
        raise AssertionError(f"{name} is no JSON")

    told = json.loads(text, parse_constant=no_constant)
    assert told == json.loads(json.dumps(day.summary))
    assert set(told) == {"channels", "pairs", "verdict", "run", "every_s", "timezone", "moments", "by_hour", "peak"}
    assert {
        "n", "outcomes", "accuracy", "availability", "promise", "models_served", "substitutions", "first_token_s",
        "first_answer_s", "total_s", "tokens_per_s", "cost_total", "cost_per_right", "currency", "emulated",
    } <= set(told["channels"]["peaky"])  # fmt: skip
    assert (told["every_s"], told["timezone"]) == (600, "Asia/Shanghai")
    assert told["channels"]["peaky"]["models_served"] == {"scripted-r1": 144}


def test_the_report_says_emulated_and_needs_nothing_from_elsewhere(day):
    page = day.report.read_text(encoding="utf-8")
    assert "<strong>Emulated:</strong> peaky (emulated), flat (emulated)." in page
    assert all(html.escape(line, quote=False) in page.replace("&#39;", "'") for line in day.summary["verdict"])
    assert not re.findall(
        r"(?i)(?:src|href|data|action)\s*=\s*[\"']?(?!#|data:)\S+", re.sub(r"xlink:href=\"#", "", page)
    )
    assert not re.findall(r"(?i)@import|url\(\s*[\"']?(?!#)|<script|<link|<iframe", page)
    assert page.count("<svg") == 2


def test_texts_of_others_do_not_become_part_of_the_report(tmp_path):
    evil = "<script>alert(1)</script>"
    answer = ANSWER.replace(b"served-r1", evil.encode())
    done, _ = run(tmp_path, settings(evil, for_s=1200.0), script=response(answer))
    assert "<script" not in done.report.read_text(encoding="utf-8")
    assert done.summary["channels"][evil]["models_served"] == {evil: 2}
    assert any(evil in said for said in done.summary["channels"][evil]["substitutions"])


def test_a_watch_without_a_record_has_a_report_too(tmp_path):
    run(tmp_path, clock=Clock(stop_at=0))
    done = finish_watch(tmp_path)
    assert done.summary["verdict"] == ["one: nothing asked yet."]
    assert done.summary["peak"]["one"]["ratio"] is None
    assert done.report.exists()


def test_few_questions_are_not_compared(tmp_path):
    done, _ = run(tmp_path)
    assert "too few questions" in done.summary["verdict"][0]


def row(minute, first=0.1, outcome="ok"):
    at = START + dt.timedelta(minutes=minute)
    return {"due_at": at.isoformat(), "first_token_s": first, "outcome": outcome, "from_cache": False}


def test_failures_count_for_availability_and_not_for_latency():
    records = [row(5), row(15, 9.0, "stalled"), row(25, None, "overloaded"), row(35, 0.3, "truncated")]
    (hour,) = by_hour(records)
    assert (hour["hour"], hour["n"], hour["availability"]["value"]) == (0, 4, 0.5)
    assert hour["first_token_s"]["value"] == pytest.approx(0.2)
    (only,) = by_hour([row(5, None, "overloaded")])
    assert only["first_token_s"] is None
    peak = peak_ratio(records)
    assert (peak["n_inside"], peak["n_outside"], peak["answered_inside"]) == (0, 4, None)


def test_the_peak_begins_with_its_hour_and_ends_before_the_next():
    records = [row(m) for m in (599, 600, 719, 720)]
    assert peak_ratio(records)["n_inside"] == 2


# --- promises, warnings, keys ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("promised", "good", "held"),
    [(0.5, True, "kept"), (0.99, False, "broken"), (0.999, True, "open"), (0.0, False, "kept"), (1.0, True, "open")],
)
def test_a_promise_is_kept_broken_or_open(tmp_path, promised, good, held):
    script = response(ANSWER) if good else refusal(503, "busy")
    done, _ = run(tmp_path, settings(for_s=20 * 600.0), script=script, availability=promised)
    assert done.summary["channels"]["one"]["promise"] == {"promised": promised, "held": held}
    assert f"{100 * promised:.6g}% promised ({held})" in done.summary["verdict"][0]
    assert "promised" in done.report.read_text(encoding="utf-8")


def test_without_a_promise_none_is_told(tmp_path):
    done, _ = run(tmp_path)
    assert done.summary["channels"]["one"]["promise"] is None
    assert "promised" not in done.summary["verdict"][0]


def test_a_retirement_that_is_near_is_in_the_report(tmp_path):
    soon = dt.datetime.now(dt.UTC).date() + dt.timedelta(days=9)
    done, _ = run(tmp_path, retires=soon)
    assert "Soon retired" in done.report.read_text(encoding="utf-8")


def test_another_model_that_answers_is_in_the_summary(tmp_path):
    done, _ = run(tmp_path, model="deepseek-r1")
    told = done.summary["channels"]["one"]
    assert told["models_served"] == {"served-r1": 6}
    assert told["substitutions"] == ["asked for deepseek-r1, answered by served-r1: another model"]


def test_a_key_that_is_said_back_is_in_no_file(tmp_path, monkeypatch):
    monkeypatch.setenv("WATCH_KEY", SECRET)

    def script(request):
        told = request.headers["authorization"]
        if len(said) % 2:
            return refusal(401, f"wrong key {told}")
        return response(ANSWER.replace(b"served-r1", told.encode()).replace(b"17 + 25", told.encode()))

    said = []
    done, _ = run(tmp_path, script=lambda r: said.append(1) or script(r), api_key_env="WATCH_KEY")
    assert len(said) == 6
    texts = {p.name: p.read_text(encoding="utf-8") for p in tmp_path.iterdir()}
    assert {"records.jsonl", "run.json", "summary.json", "report.html"} <= set(texts)
    assert not [name for name, text in texts.items() if SECRET in text]
    assert SECRET not in json.dumps(done.summary)
    assert "[redacted]" in texts["records.jsonl"]


def test_an_emulated_channel_is_served_for_the_length_of_the_watch(tmp_path):
    weather = tmp_path / "w.toml"
    weather.write_text('[model]\nscript = "<think>\\nso\\n</think>\\n42"\n[price]\ninput = 1\noutput = 2\n')
    clock = Clock()
    done = asyncio.run(
        watch(settings(f"emulated:{weather}"), tmp_path / "o", channels={}, clock=clock, sleep=clock.sleep)
    )
    (told,) = done.summary["channels"].values()
    assert (told["n"], told["emulated"], told["outcomes"]) == (6, True, {"ok": 6})
    assert told["cost_total"] > 0
    assert done.report.exists()


def test_missed_moments_are_told(tmp_path):
    """A watch that was not running for a while says so, and asks nothing for a time that is over."""
    from dsr1kit.compare.rehearsal import JumpingClock

    begin = dt.datetime(2026, 11, 23, tzinfo=dt.UTC)
    weather = load_weather("scripted")

    async def run(clock, for_s):
        async with Emulator(weather, now=clock.now).listen() as url:
            channel = channel_of(weather, url, "mine", begin)
            settings = WatchSettings(channels=("mine",), every_s=60.0, for_s=for_s)
            return await watch(settings, tmp_path, channels={"mine": channel}, clock=clock, sleep=clock.sleep)

    first = asyncio.run(run(JumpingClock(begin), 180.0))
    assert first.summary["moments"] == {"asked": 3, "missed": 0}
    later = asyncio.run(run(JumpingClock(begin + dt.timedelta(seconds=300)), 480.0))
    assert later.summary["moments"] == {"asked": 6, "missed": 2}
    assert "2 of 8 moments were missed" in later.summary["verdict"][-1]
    over = asyncio.run(run(JumpingClock(begin + dt.timedelta(days=1)), 480.0))
    assert over.summary["moments"] == {"asked": 6, "missed": 2}
