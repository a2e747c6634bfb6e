"""Comparisons end to end: real runs against scripted emulated providers, fakes where time must not pass."""

from __future__ import annotations

import asyncio
import datetime as dt
import json
import random
import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from dsr1kit.access.prices import Price
from dsr1kit.compare import report, runner
from dsr1kit.compare.items import Item
from dsr1kit.compare.journal import read_records
from dsr1kit.compare.judge import Judge
from dsr1kit.compare.runner import Finished, RunSettings, run_comparison
from dsr1kit.compare.summary import summarize, verdict
from dsr1kit.compare.tasks import load_task
from dsr1kit.emulator.server import Emulator
from dsr1kit.emulator.weather import load_weather
from dsr1kit.errors import ModelError, UnknownName, UsageError
from dsr1kit.records import (
    R1_SAMPLING,
    Attempt,
    Message,
    OnDelta,
    Outcome,
    Reply,
    Sampling,
    Timing,
    Usage,
    Verdict,
)


def weather(folder: Path, name: str, answer: str, rest: str = "") -> str:
    script = json.dumps(f"<think>\nLet me see.\n</think>\n\n{answer}")
    (folder / f"{name}.toml").write_text(f"[model]\nscript = {script}\n{rest}")
    return f"emulated:{folder / name}.toml"


def compare(out: Path, *channels: str, **settings: Any) -> Finished:
    how = {k: settings.pop(k) for k in ("retry_failed", "on_progress", "channel_file", "client_check") if k in settings}
    how.setdefault("client_check", False)
    return asyncio.run(run_comparison(RunSettings(channels=channels, **settings), out, **how))


# --- a real run -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """Six items twice over: a provider that answers all, and one that stumbles, both emulated."""
    folder = tmp_path_factory.mktemp("real")
    gold = load_task("arithmetic", 1)[0].gold
    good = weather(
        folder, "good", f"<script>alert('x')</script> \\boxed{{{gold}}}", "[latency]\nfirst_token_s = 0.02\n"
    )
    faults = "[faults]\ntruncated = 0.3\noverloaded = 0.3\n[price]\ninput = 1.0\noutput = 2.0\ncurrency = 'CNY'\n"
    bad = weather(folder, "bad", "\\boxed{-1}", faults)
    return compare(folder / "run", good, bad, items=6, samples=2)


NUMBER, MAYBE = (int, float), (int, float, type(None))
FIELDS: dict[str, Any] = {
    "run": str, "channel": str, "item": str, "sample": int, "model_requested": str,
    "model_served": (str, type(None)), "outcome": str, "detail": str, "due_at": str, "queue_s": NUMBER,
    "connect_s": NUMBER, "connection_reused": bool, "first_token_s": MAYBE, "first_answer_s": MAYBE,
    "think_s": MAYBE, "inter_token_s": MAYBE, "total_s": NUMBER, "prompt_tokens": (int, type(None)),
    "reasoning_tokens": (int, type(None)), "answer_tokens": (int, type(None)), "token_count_source": str,
    "reasoning": str, "answer": str, "finish_reason": (str, type(None)), "verdict": str, "cost": MAYBE,
    "currency": (str, type(None)), "attempts": list, "from_cache": bool, "emulated": bool,
}  # fmt: skip


def test_every_record_has_every_field_with_its_type(real: Finished) -> None:
    records = read_records(real.records)
    assert len(records) == 2 * 6 * 2
    for r in records:
        for name, types in FIELDS.items():
            assert isinstance(r[name], types), (name, r[name])
            assert types is bool or not isinstance(r[name], bool), name
        assert r["token_count_source"] in ("provider", "tokenizer", "estimated")
        assert r["verdict"] in ("right", "wrong", "unscored")
        assert dt.datetime.fromisoformat(r["due_at"]).utcoffset() == dt.timedelta(0)
        assert [set(a) for a in r["attempts"]] == [{"channel", "outcome", "total_s"}]
        assert r["attempts"][0]["outcome"] == r["outcome"] in set(Outcome)
    assert len({r["run"] for r in records}) == 1
    assert {r["outcome"] for r in records} >= {"ok", "truncated", "overloaded"}


def test_a_sound_reply_is_measured_judged_and_priced(real: Finished) -> None:
    for r in read_records(real.records):
        if r["outcome"] == "ok":
            assert 0 <= r["queue_s"] <= r["first_token_s"] <= r["first_answer_s"] <= r["total_s"]
            assert r["think_s"] == pytest.approx(r["first_answer_s"] - r["first_token_s"], abs=1e-5)
            assert r["reasoning"].strip() == "Let me see."
            assert r["finish_reason"] == "stop"
            assert r["token_count_source"] in ("provider",)
            assert r["verdict"] in ("right", "wrong")
        if "bad" in r["channel"] and r["outcome"] == "ok":
            tokens = r["prompt_tokens"] * 1.0 + (r["reasoning_tokens"] + r["answer_tokens"]) * 2.0
            assert (r["cost"], r["currency"]) == (pytest.approx(tokens / 1e6), "CNY")
        if "good" in r["channel"]:
            assert (r["cost"], r["currency"]) == (None, None)
        if r["outcome"] == "overloaded":
            assert r["verdict"] == "unscored"
            assert r["first_token_s"] is None
            assert r["answer"] == ""


def test_the_summary_has_the_agreed_shape(real: Finished) -> None:
    summary = json.loads(real.summary_path.read_text())
    assert summary == real.summary
    records = read_records(real.records)
    for name, c in summary["channels"].items():
        mine = [r for r in records if r["channel"] == name]
        assert c["n"] == len(mine) == 12
        assert c["outcomes"] == dict(Counter(r["outcome"] for r in mine))
        assert set(c["accuracy"]) == {"value", "low", "high"}
        for clock in ("first_token_s", "first_answer_s", "total_s"):
            assert set(c[clock]) == {"p50", "p95", "p99"}
            assert c[clock]["p50"] <= c[clock]["p95"] <= c[clock]["p99"]
        assert {"tokens_per_s", "cost_total", "cost_per_right", "currency"} <= set(c)
        assert c["emulated"] is True
    (pair,) = summary["pairs"]
    assert [pair["a"], pair["b"]] == list(summary["channels"])
    assert set(pair["accuracy_difference"]) == {"value", "low", "high"}
    bad = summary["channels"][pair["b"]]
    assert bad["currency"] == "CNY"
    assert bad["cost_total"] == pytest.approx(sum(r["cost"] or 0 for r in records))


def test_the_verdict_is_quality_then_speed_then_money(real: Finished) -> None:
    quality, speed, money, *_ = real.summary["verdict"]
    assert quality.startswith("Quality: ")
    assert speed.startswith("Speed: ")
    assert money.startswith("Cost and availability: ")
    for name in real.summary["channels"]:
        assert all(name in line for line in (quality, speed, money))


def test_what_the_emulator_sent_says_so_everywhere(real: Finished) -> None:
    assert all(r["emulated"] for r in read_records(real.records))
    assert "emulat" in " ".join(real.summary["verdict"])
    page = real.report.read_text()
    assert re.search(r"(?i)emulated:</strong>|kit.s own emulator", page)


def test_the_report_is_one_file_that_asks_for_nothing_else(real: Finished) -> None:
    page = real.report.read_text()
    assert not re.search(r"(?i)(src|href|srcset|action|poster|data)\s*=\s*[\"']?\s*(https?:)?//", page)
    assert not re.search(r"(?i)<(link|script|iframe|object|embed|base)\b", page)
    assert not re.search(r"(?i)@import|url\(\s*[\"']?(https?:)?//", page)
    assert page.count("<svg") >= 3
    for line in real.summary["verdict"]:
        assert line.split(":")[0] in page


def test_the_report_shows_markup_in_answers_as_text(real: Finished) -> None:
    page = real.report.read_text()
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert" in page


def test_run_json_says_what_it_was_made_with(real: Finished) -> None:
    run = json.loads((real.folder / "run.json").read_text())
    assert run["identity"]["items"] == 6
    assert run["identity"]["sampling"]["temperature"] == 0.6
    assert run["versions"]["python"]
    assert run["hardware"]["cores"] >= 1


# --- fakes ------------------------------------------------------------------------------------------------


Answer = Callable[["Fake", Sequence[Message], Sampling], Reply]


def sound(fake: Fake, messages: Sequence[Message], sampling: Sampling) -> Reply:
    return made("\\boxed{1}")


LITTLE = Usage(0, 0, 1)


def made(answer: str, outcome: Outcome = Outcome.OK, *, at: float = 0.5, usage: Usage = LITTLE, **more: Any) -> Reply:
    timing = Timing(0.0, 0.0, True, at, at * 2, at, 0.01, at * 3)
    return Reply(outcome, answer=answer, timing=timing, usage=usage, **more)


class Fake:
    """A Backend that answers from a function and notes when it was asked."""

    def __init__(self, name: str, answer: Answer, log: list[dict[str, Any]], takes_s: float) -> None:
        self.name, self._answer, self._log, self._takes_s = name, answer, log, takes_s
        self._open = False

    async def __aenter__(self) -> Fake:
        self._open = True
        return self

    async def __aexit__(self, *_: object) -> None:
        self._open = False

    async def ask(
        self,
        messages: Sequence[Message],
        sampling: Sampling = R1_SAMPLING,
        *,
        on_delta: OnDelta | None = None,
        due: float | None = None,
    ) -> Reply:
        assert self._open
        loop = asyncio.get_running_loop()
        entry = {
            "channel": self.name, "question": messages[0]["content"], "sampling": sampling, "due": due,
            "begun": loop.time(), "due_at": time.time(),
        }  # fmt: skip
        self._log.append(entry)
        await asyncio.sleep(self._takes_s)
        entry["ended"] = loop.time()
        return self._answer(self, messages, sampling)


class Stage:
    """Fakes in the place of all channels: `answers`, `prices` by name; `log` of what they were asked."""

    def __init__(self) -> None:
        self.answers: dict[str, Answer] = {}
        self.prices: dict[str, Price] = {}
        self.log: list[dict[str, Any]] = []
        self.takes_s = 0.001

    def open(self, name: str, *_: object, **__: object) -> Fake:
        return Fake(name, self.answers.get(name, sound), self.log, self.takes_s)

    def asked(self) -> Counter[tuple[str, str, int]]:
        return Counter((e["channel"], e["question"], e["sampling"].sample) for e in self.log)


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Stage:
    stage = Stage()
    monkeypatch.setattr(runner, "open_backend", stage.open)
    monkeypatch.setattr(runner, "price_of", lambda name, _: stage.prices.get(name))
    monkeypatch.setattr(report, "render", lambda *_: "")  # seconds of drawing that no fake needs
    return stage


def test_the_channels_of_a_run_take_turns(stage: Stage, tmp_path: Path) -> None:
    compare(tmp_path, "a", "b", "c", items=12, samples=2, concurrency=1)
    for begin in range(0, len(stage.log), 3):
        turn = stage.log[begin : begin + 3]
        assert {e["channel"] for e in turn} == {"a", "b", "c"}
        assert len({(e["question"], e["sampling"].sample) for e in turn}) == 1
    # No channel is always first.
    assert {e["channel"] for e in stage.log[::3]} == {"a", "b", "c"}


def test_every_draw_has_a_seed_and_a_number_of_its_own_the_same_in_every_run(stage: Stage, tmp_path: Path) -> None:
    compare(tmp_path / "1", "a", "b", items=3, samples=4, seed=11)
    drawn = Counter((e["question"], e["sampling"].seed, e["sampling"].sample) for e in stage.log)
    assert set(drawn.values()) == {2}, "both channels are asked with the same draws"
    assert len({seed for _, seed, _ in drawn}) == 3, "items must not share their random numbers"
    assert Counter(sample for *_, sample in drawn) == {0: 3, 1: 3, 2: 3, 3: 3}
    stage.log.clear()
    compare(tmp_path / "2", "a", "b", items=3, samples=4, seed=11)
    assert Counter((e["question"], e["sampling"].seed, e["sampling"].sample) for e in stage.log) == drawn
    stage.log.clear()
    compare(tmp_path / "3", "a", items=3, samples=4, seed=12)
    assert not {seed for _, seed, _ in drawn} & {e["sampling"].seed for e in stage.log}


def test_at_most_concurrency_requests_are_in_flight(stage: Stage, tmp_path: Path) -> None:
    stage.takes_s = 0.01
    compare(tmp_path, "a", "b", items=10, concurrency=3)
    most = max(sum(o["begun"] <= e["begun"] < o["ended"] for o in stage.log) for e in stage.log)
    assert most == 3


def test_local_models_run_after_all_hosted_ones_and_one_request_at_a_time(stage: Stage, tmp_path: Path) -> None:
    stage.takes_s = 0.005
    compare(tmp_path, "local:tiny-r1", "a", "local:tiny-r1@8bit", "b", items=4, concurrency=4)
    local = [e for e in stage.log if e["channel"].startswith("local:")]
    hosted = [e for e in stage.log if not e["channel"].startswith("local:")]
    assert len(local) == len(hosted) == 8
    assert max(e["ended"] for e in hosted) <= min(e["begun"] for e in local)
    assert all(one["ended"] <= other["begun"] for one, other in pairwise(local))
    assert [e["channel"] for e in local] == ["local:tiny-r1"] * 4 + ["local:tiny-r1@8bit"] * 4


def gaps(dues: Sequence[float]) -> list[float]:
    return [b - a for a, b in pairwise(dues)]


def test_an_open_loop_has_seeded_random_moments_whatever_is_still_in_flight(stage: Stage, tmp_path: Path) -> None:
    stage.takes_s = 0.7
    compare(tmp_path / "1", "a", "b", items=8, rate=100.0, seed=3, concurrency=1)
    first = [e["due"] for e in stage.log]
    assert max(e["begun"] for e in stage.log) < min(e["ended"] for e in stage.log)
    rng = random.Random("3/arrivals")
    assert gaps(first) == pytest.approx([rng.expovariate(100.0) for _ in range(16)][1:], abs=1e-6)
    stage.log.clear()
    compare(tmp_path / "2", "a", "b", items=8, rate=100.0, seed=3, concurrency=1)
    assert gaps([e["due"] for e in stage.log]) == pytest.approx(gaps(first), abs=1e-6)


def test_times_of_an_open_loop_count_from_the_due_moment_waits_included(tmp_path: Path) -> None:
    weather(tmp_path, "slow", "\\boxed{1}", "[latency]\nfirst_token_s = 0.06\n")

    async def work() -> Finished:
        async with Emulator(load_weather(tmp_path / "slow.toml")).listen() as url:
            mine = tmp_path / "mine.toml"
            mine.write_text(f"[channel.slow]\nbase_url = '{url}'\nmodel = 'm'\nmax_in_flight = 1\n")
            settings = RunSettings(channels=("slow",), items=6, rate=60.0)
            return await run_comparison(settings, tmp_path / "run", channel_file=mine, client_check=False)

    done = asyncio.run(work())
    records = sorted(read_records(done.records), key=lambda r: r["due_at"])
    dues = [dt.datetime.fromisoformat(r["due_at"]).timestamp() for r in records]
    rng = random.Random("0/arrivals")
    assert gaps(dues) == pytest.approx([rng.expovariate(60.0) for _ in range(6)][1:], abs=0.02)
    # One at a time at 60 ms each: the last waits for all before it, and its clock shows that.
    assert records[-1]["queue_s"] > 6 * 0.06 - (dues[-1] - dues[0]) - 0.08
    assert all(r["first_token_s"] >= r["queue_s"] + 0.055 for r in records)
    # A catalogue entry that points at an emulator is told too.
    assert all(r["emulated"] for r in records)


def test_a_resumed_run_asks_only_what_has_no_record(stage: Stage, tmp_path: Path) -> None:
    def tired(fake: Fake, messages: Sequence[Message], sampling: Sampling) -> Reply:
        if len(stage.log) == 9:
            raise UsageError("the far end of the test")
        return made("\\boxed{1}")

    stage.answers = {"a": tired, "b": tired}
    with pytest.raises(UsageError, match="far end"):
        compare(tmp_path, "a", "b", items=6, samples=2, concurrency=1)
    assert len(read_records(tmp_path / "records.jsonl")) == 8
    stage.answers = {}
    compare(tmp_path, "a", "b", items=6, samples=2, concurrency=1)
    again = stage.asked()
    assert len(again) == 24
    assert sum(again.values()) == 25  # the one whose answer never came
    compare(tmp_path, "a", "b", items=6, samples=2, concurrency=1)
    assert stage.asked() == again
    records = read_records(tmp_path / "records.jsonl")
    assert Counter((r["channel"], r["item"], r["sample"]) for r in records).most_common(1)[0][1] == 1


def test_failed_requests_are_asked_again_only_when_wanted(stage: Stage, tmp_path: Path) -> None:
    def busy(fake: Fake, messages: Sequence[Message], sampling: Sampling) -> Reply:
        return Reply(Outcome.OVERLOADED, "busy") if len(stage.log) % 2 else made("\\boxed{1}")

    stage.answers = {"a": busy}
    compare(tmp_path, "a", items=6, concurrency=1)
    stage.answers = {}
    compare(tmp_path, "a", items=6, concurrency=1)
    assert len(stage.log) == 6
    done = compare(tmp_path, "a", items=6, concurrency=1, retry_failed=True)
    assert len(stage.log) == 9
    assert done.summary["channels"]["a"]["outcomes"] == {"ok": 6}
    assert len(read_records(tmp_path / "retried.jsonl")) == 3


def test_the_budget_stops_the_asking_and_more_of_it_goes_on(stage: Stage, tmp_path: Path) -> None:
    stage.prices = {"a": Price(0.0, 1e6), "local:tiny-r1": Price(0.0, 0.0)}  # one answer token: 1 USD
    run = {"items": 8, "concurrency": 1}
    done = compare(tmp_path, "a", "local:tiny-r1", max_cost=3, **run)
    a, local = done.summary["channels"]["a"], done.summary["channels"]["local:tiny-r1"]
    assert a["outcomes"] == {"over_budget": 5, "ok": 3}
    assert a["cost_total"] == 3
    assert local["outcomes"] == {"ok": 8}  # costs nothing
    (detail,) = {r["detail"] for r in read_records(tmp_path / "records.jsonl") if r["outcome"] == "over_budget"}
    assert "--max-cost 3" in detail
    done = compare(tmp_path, "a", "local:tiny-r1", max_cost=5, **run)
    assert done.summary["channels"]["a"]["outcomes"] == {"ok": 5, "over_budget": 3}
    done = compare(tmp_path, "a", "local:tiny-r1", **run)
    assert done.summary["channels"]["a"]["outcomes"] == {"ok": 8}
    assert set(stage.asked().values()) == {1}


def test_what_failed_requests_cost_counts_although_they_are_asked_again(stage: Stage, tmp_path: Path) -> None:
    stage.prices = {"a": Price(0.0, 1e6)}
    stage.answers = {"a": lambda *_: made("half", Outcome.CUT)}
    compare(tmp_path, "a", items=4, concurrency=1, max_cost=4)
    done = compare(tmp_path, "a", items=4, concurrency=1, max_cost=4, retry_failed=True)
    assert done.summary["channels"]["a"]["outcomes"] == {"over_budget": 4}
    assert len(stage.log) == 4


def test_requests_the_budget_kept_back_are_marked_as_emulated_too(tmp_path: Path) -> None:
    price = "[price]\ninput = 1.0\noutput = 1.0\n"
    done = compare(tmp_path / "run", weather(tmp_path, "w", "\\boxed{1}", price), items=3, concurrency=1, max_cost=1e-9)
    records = read_records(done.records)
    assert [r["outcome"] for r in records] == ["ok", "over_budget", "over_budget"]
    assert all(r["emulated"] and r["model_requested"] == "scripted-r1" for r in records)


def test_cached_replies_never_enter_a_latency_figure(stage: Stage, tmp_path: Path) -> None:
    def some_cached(fake: Fake, messages: Sequence[Message], sampling: Sampling) -> Reply:
        cached = len(stage.log) % 2 == 0
        return made("\\boxed{1}", at=0.001 if cached else 2.0, from_cache=cached)

    stage.answers = {"a": some_cached, "b": lambda *_: made("\\boxed{1}", from_cache=True)}
    done = compare(tmp_path, "a", items=10, concurrency=1)
    a = done.summary["channels"]["a"]
    assert a["first_token_s"] == {"p50": 2.0, "p95": 2.0, "p99": 2.0}
    assert a["first_answer_s"]["p50"] == 4.0
    assert a["total_s"]["p50"] == 6.0
    b = compare(tmp_path / "b", "b", items=3).summary["channels"]["b"]
    assert (b["first_token_s"], b["total_s"], b["tokens_per_s"]) == (None, None, None)
    assert b["accuracy"] is not None


def test_accuracy_is_shown_with_and_without_truncated_replies(stage: Stage, tmp_path: Path) -> None:
    golds = {i.prompt: i.gold for i in load_task("arithmetic", 10)}

    def some_cut(fake: Fake, messages: Sequence[Message], sampling: Sampling) -> Reply:
        if len(stage.log) <= 4:
            return made("12 and so", Outcome.TRUNCATED)
        return made(f"\\boxed{{{golds[messages[0]['content']]}}}")

    stage.answers = {"a": some_cut}
    a = compare(tmp_path, "a", items=10, concurrency=1).summary["channels"]["a"]
    assert a["accuracy"]["value"] == pytest.approx(0.6)
    assert a["accuracy_without_truncated"]["value"] == 1.0
    assert a["n_scored"] == 10


def test_attempts_of_a_router_are_kept(stage: Stage, tmp_path: Path) -> None:
    tried = (Attempt("x", Outcome.OVERLOADED, 0.1), Attempt("y", Outcome.OK, 0.4))
    stage.answers = {"a": lambda *_: made("\\boxed{1}", attempts=tried)}
    (r,) = read_records(compare(tmp_path, "a", items=1).records)
    assert r["attempts"] == [
        {"channel": "x", "outcome": "overloaded", "total_s": 0.1},
        {"channel": "y", "outcome": "ok", "total_s": 0.4},
    ]


def test_warm_ups_are_draws_of_their_own_that_count_for_nothing_but_their_cost(stage: Stage, tmp_path: Path) -> None:
    usage = Usage(1_000_000, 0, 0, "provider", "provider")
    stage.answers = {"a": lambda *_: made("\\boxed{1}", usage=usage)}
    stage.prices = {"a": Price(1.0, 0.0)}
    told: list[tuple[str, int, int]] = []
    done = compare(tmp_path, "a", items=4, samples=2, warm_up=3, max_cost=100.0, on_progress=lambda *t: told.append(t))
    records = read_records(done.records)
    assert sorted({r["sample"] for r in records}) == [0, 1]
    assert len(records) == 8
    assert [e["sampling"].sample for e in stage.log[:3]] == [2, 3, 4], "before those that count, and none of them"
    assert [t for t in told if t[0] == "warm-up"] == [("warm-up", n, 3) for n in range(4)]
    assert done.summary["channels"]["a"]["cost_total"] == pytest.approx(8.0)
    assert [r["cost"] for r in read_records(tmp_path / "warm-up.jsonl")] == [1.0] * 3
    # Nothing is left to ask, so nothing is warmed up.
    compare(tmp_path, "a", items=4, samples=2, warm_up=3, max_cost=100.0)
    assert len(stage.log) == 11
    # The budget knows of them: 3 for warm-ups and 5 of the 8.
    short = compare(tmp_path / "short", "a", items=4, samples=2, warm_up=3, max_cost=8.0, concurrency=1)
    assert short.summary["channels"]["a"]["outcomes"] == {"ok": 5, "over_budget": 3}


def test_local_models_are_warmed_up_too(stage: Stage, tmp_path: Path) -> None:
    compare(tmp_path, "a", "local:tiny-r1", items=2, warm_up=1)
    assert [e["sampling"].sample for e in stage.log if e["channel"] == "local:tiny-r1"] == [1, 0, 0]


def test_an_answer_that_came_is_kept_though_the_run_is_stopped_while_it_is_judged(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def slowly(self: Judge, reply: Reply, item: Item) -> Verdict:
        judging.set()
        await asyncio.sleep(0.2)
        return "right"

    async def work() -> None:
        settings = RunSettings(channels=("a",), items=3, concurrency=1)
        task = asyncio.ensure_future(run_comparison(settings, tmp_path, client_check=False))
        await judging.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    judging = asyncio.Event()
    monkeypatch.setattr(Judge, "at_once", staticmethod(lambda reply, item: None))  # as of what only algebra decides
    monkeypatch.setattr(Judge, "verdict", slowly)
    asyncio.run(work())
    (kept,) = read_records(tmp_path / "records.jsonl")
    assert kept["verdict"] == "right"
    assert len(stage.log) == 1


def test_an_objective_may_change_between_starts_for_it_asks_nothing(stage: Stage, tmp_path: Path) -> None:
    compare(tmp_path, "a", items=3, objective="total_s=60")
    done = compare(tmp_path, "a", items=3, objective="first_token_s=0.5")
    assert len(stage.log) == 3
    assert json.loads((tmp_path / "run.json").read_text())["objective"]["first_token_s"] == 0.5
    assert done.summary["channels"]["a"]["goodput"]["asked"] == 3


def test_a_run_notes_how_its_client_did(tmp_path: Path) -> None:
    channel = weather(tmp_path, "w", "\\boxed{1}", "[latency]\nfirst_token_s = 0.02\n")
    done = compare(tmp_path / "run", channel, items=12, concurrency=3, client_check=True)
    (note,) = json.loads((done.folder / "run.json").read_text())["client"]
    assert note["bias"]["streams"] == 3
    assert note["bias"]["requests"] >= 3
    assert -5 < note["bias"]["first_token_ms"] < 200
    assert note["in_flight"]["asked"] == note["in_flight"]["peak"] == 3
    assert 1 <= note["in_flight"]["mean"] <= 3
    assert 0 <= note["lag_ms"]["p50"] <= note["lag_ms"]["p99"] <= note["lag_ms"]["max"]
    assert note["cpu_share"] > 0
    assert isinstance(note["limited"], str)
    assert done.summary["client"] == [note]


def test_progress_tells_every_stage_to_its_end(stage: Stage, tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    compare(tmp_path, "a", "local:tiny-r1", items=3, on_progress=lambda *t: told.append(t))
    assert [t for t in told if t[0] == "hosted"] == [("hosted", n, 3) for n in range(4)]
    assert [t for t in told if t[0] == "local tiny-r1"] == [("local tiny-r1", n, 3) for n in range(4)]


def test_progress_has_no_stage_for_answers_that_are_ready(tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    channel = weather(tmp_path, "w", "\\boxed{1}")
    compare(tmp_path / "run", channel, items=2, on_progress=lambda *t: told.append(t))
    assert {stage for stage, _, _ in told} == {"hosted"}


# --- misuse, before anything is asked or made ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"channels": ()}, "at least one channel"),
        ({"channels": ("a", "a")}, "named twice"),
        ({"items": -1}, "items must be at least 0"),
        ({"warm_up": -1}, "warm_up must be at least 0"),
        ({"samples": -1}, "samples must be at least 1"),
        ({"concurrency": 0}, "concurrency must be at least 1"),
        ({"rate": 0.0}, "rate must be above 0"),
        ({"max_cost": -1.0}, "max_cost must be above 0"),
        ({"first_token_s": 0.0}, "first_token_s must be above 0"),
        ({"stall_s": float("nan")}, "stall_s must be above 0"),
        ({"deadline_s": -2.0}, "deadline_s must be above 0"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        RunSettings(**{"channels": ("a",)} | settings)


@pytest.mark.parametrize(
    ("channel", "error"),
    [
        ("depseek", UnknownName),
        ("emulated:clam", UnknownName),
        ("local:tiny-r2", UnknownName),
        ("local:./nowhere", ModelError),
        ("local:tiny-r1@5bit", UnknownName),
    ],
)
def test_a_wrong_channel_is_refused_before_the_folder_is_made(
    tmp_path: Path, channel: str, error: type[Exception]
) -> None:
    with pytest.raises(error):
        compare(tmp_path / "run", "emulated:scripted", channel)
    assert not (tmp_path / "run").exists()


# --- summaries from records alone ---------------------------------------------------------------------------


def row(channel: str, item: int, verdict_: str, outcome: str = "ok", **more: Any) -> dict[str, Any]:
    return {
        "channel": channel, "item": str(item), "sample": 0, "kind": "k", "outcome": outcome,
        "verdict": verdict_, "from_cache": False, "emulated": False, "cost": None, "currency": None,
        "inter_token_s": 0.02, "first_token_s": 0.1, "first_answer_s": 0.2, "total_s": 0.3,
        "reasoning_tokens": 3, "answer_tokens": 1,
    } | more  # fmt: skip


def test_a_difference_is_called_one_only_when_its_interval_excludes_zero() -> None:
    a = [row("a", i, "right") for i in range(40)]
    close = [row("b", i, "right" if i < 38 else "wrong") for i in range(40)]
    far = [row("b", i, "right" if i < 20 else "wrong") for i in range(40)]
    (pair,) = summarize([*a, *close], ["a", "b"])["pairs"]
    assert not pair["differs"]
    assert pair["items_to_settle"] > 40
    assert "no difference shown to b" in verdict(summarize([*a, *close], ["a", "b"]))[0]
    assert "items would settle it" in verdict(summarize([*a, *close], ["a", "b"]))[0]
    (pair,) = summarize([*a, *far], ["a", "b"])["pairs"]
    assert pair["differs"]
    assert pair["items_to_settle"] is None
    assert re.search(r"b is \d+ to \d+ points behind", verdict(summarize([*a, *far], ["a", "b"]))[0])


def test_a_channel_that_leads_only_on_easier_items_is_not_told_as_ahead() -> None:
    # a answered 40 hard items, b also 200 easy ones; on the shared items a is better.
    hard = [row("a", i, "right" if i < 28 else "wrong") for i in range(40)]
    hard += [row("b", i, "right" if i < 8 else "wrong") for i in range(40)]
    easy = [row("b", 100 + i, "right") for i in range(200)]
    (line, *_) = summarize([*hard, *easy], ["a", "b"])["verdict"]
    assert re.search(r"a is \d+ to \d+ points ahead on the 40 items both answered", line)


def test_failures_count_in_availability_and_not_in_accuracy_or_latency() -> None:
    rows = [row("a", i, "right") for i in range(6)]
    rows += [row("a", 6 + i, "unscored", "overloaded", first_answer_s=None, total_s=99.0) for i in range(2)]
    rows += [row("a", 8 + i, "unscored", "over_budget", total_s=None) for i in range(2)]
    a = summarize(rows, ["a"])["channels"]["a"]
    assert a["accuracy"]["value"] == 1.0
    assert a["availability"]["value"] == pytest.approx(6 / 8)
    assert a["total_s"]["p99"] == 0.3
    assert a["tokens_per_s"] == pytest.approx(50)


def test_a_run_without_any_answer_still_has_a_summary_and_a_report(tmp_path: Path) -> None:
    done = compare(
        tmp_path / "run",
        weather(tmp_path, "$dead$", "x", "[faults]\noverloaded = 1.0\n"),
        weather(tmp_path, "$html$", "x", "[faults]\nnot_an_answer = 1.0\n"),
        items=2,
    )
    for c in done.summary["channels"].values():
        assert (c["accuracy"], c["first_token_s"], c["cost_per_right"]) == (None, None, None)
    assert done.summary["pairs"] == []
    assert "no reply could be judged" in done.summary["verdict"][0]
    assert "no answer arrived" in done.summary["verdict"][1]
    assert "not_an_answer" in done.report.read_text()


def test_a_retry_of_an_emulated_failure_meets_new_weather(tmp_path: Path) -> None:
    """Every start is a new emulator; without the attempt number each retry would draw the same fault again."""
    name = weather(tmp_path, "w", "\\boxed{1}", "[latency]\nseed = 3\n[faults]\noverloaded = 0.5\n")
    failed = [compare(tmp_path / "run", name, items=12).summary["channels"][name]["outcomes"]["overloaded"]]
    for _ in range(6):
        done = compare(tmp_path / "run", name, items=12, retry_failed=True)
        failed.append(done.summary["channels"][name]["outcomes"].get("overloaded", 0))
    assert failed[-1] < failed[0]
    assert sum(done.summary["channels"][name]["outcomes"].values()) == 12
