"""A plan before anything is spent: its size, money and time, from an earlier run or from what is known."""

from __future__ import annotations

import datetime as dt
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from dsr1kit.compare.durations import Load, hosted_duration, whole_duration
from dsr1kit.compare.journal import Journal
from dsr1kit.compare.plan import ComparisonPlan, PlanSettings, plan_comparison
from dsr1kit.compare.plan_figures import costs_table
from dsr1kit.compare.power import items_to_detect
from dsr1kit.errors import Dsr1kitError, UnknownName, UsageError

CHANNELS = """
[channel.a]
base_url = "http://127.0.0.1:9/v1"
model = "deepseek-ai/DeepSeek-R1"
price = {input = 1.0, output = 10.0}

[channel.b]
base_url = "http://127.0.0.1:9/v1"
model = "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B"
price = {input = 0.1, output = 1.0, currency = "CNY"}
requests_per_minute = 60

[channel.b-elsewhere]
base_url = "http://127.0.0.1:9/v1"
model = "deepseek-r1-distill-qwen-7b"
price = {input = 0.1, output = 1.0}
max_output = 2000

[channel.unpriced]
base_url = "http://127.0.0.1:9/v1"
model = "someone/else"
"""
NOW = dt.datetime(2026, 11, 24, 4, 0, tzinfo=dt.UTC)


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    path = tmp_path / "my.toml"
    path.write_text(CHANNELS, encoding="utf-8")
    return path


@pytest.fixture
def planned(mine: Path) -> Any:
    def plan(*channels: str, **settings: Any) -> ComparisonPlan:
        return plan_comparison(PlanSettings(channels=channels, **settings), channel_file=mine, at=NOW)

    return plan


def answers(channel: str, shares: Mapping[str, float], samples: int, **more: Any) -> Iterator[dict[str, Any]]:
    rng = random.Random(f"{channel}/7")
    for item, share in shares.items():
        for sample in range(samples):
            right = "right" if rng.random() < share else "wrong"
            usual = {"outcome": "ok", "verdict": right, "kind": "sum2", "total_s": 2.5, "queue_s": 0.5,
                     "from_cache": False, "emulated": False, "cost": None, "prompt_tokens": 30,
                     "reasoning_tokens": rng.randint(50, 150), "answer_tokens": 20}  # fmt: skip
            yield {"channel": channel, "item": item, "sample": sample, **usual, **more}


def run_in(folder: Path, *records: dict[str, Any], task: str = "arithmetic", max_tokens: int = 32768) -> Path:
    channels = sorted({r["channel"] for r in records})
    identity = {"task": task, "channels": channels, "sampling": {"max_tokens": max_tokens}}
    with Journal(folder, identity) as journal:
        for r in records:
            journal.append(r)
    return folder


@pytest.fixture
def earlier(tmp_path: Path) -> Path:
    """A run of channels `a` and `b`, 200 items with four answers each, 80 and 75 of 100 right."""
    rng = random.Random(5)
    easy = {f"item-{n}": rng.betavariate(4, 1) for n in range(200)}
    hard = {item: share * 0.94 for item, share in easy.items()}
    records = [
        *answers("a", easy, 4, model_requested="deepseek-ai/DeepSeek-R1"),
        *answers("b", hard, 4, model_requested="deepseek-ai/DeepSeek-R1-Distill-Qwen-7B"),
    ]
    return run_in(tmp_path / "earlier", *records)


def needed(plan: ComparisonPlan, samples: int, basis: str = "assumed") -> int:
    return next(n.items for n in plan.needs if n.samples == samples and n.basis.startswith(basis))


# --- size ----------------------------------------------------------------------------------------------------------


def test_without_an_earlier_run_the_least_favourable_accuracy_is_assumed_and_said(planned: Any) -> None:
    plan = planned("a", "b", difference=0.05)
    assert needed(plan, 1) == items_to_detect(0.05, share_a=0.5).items == plan.items
    assert plan.samples == 1
    assert "accuracy of 50%" in " ".join(plan.notes)


def test_more_pairs_and_smaller_differences_take_more_questions(planned: Any) -> None:
    pair, three, finer = (
        needed(planned(*names, difference=d), 1)
        for names, d in ((("a", "b"), 0.1), (("a", "b", "unpriced"), 0.1), (("a", "b"), 0.05))
    )
    assert pair < three
    assert finer > 3 * pair


def test_more_answers_take_fewer_questions_but_never_fewer_than_the_floor(planned: Any) -> None:
    plan = planned("a", "b", difference=0.05)
    counts = [n.items for n in plan.needs if n.basis == "assumed"]
    assert counts == sorted(counts, reverse=True)
    reached = {r.samples: r.difference for r in plan.reaches}
    assert reached[1] > reached[64] > reached[None] > 0


def test_an_earlier_run_decides_by_its_own_spread(planned: Any, earlier: Path) -> None:
    guessed, seen = (planned("a", "b", difference=0.05, like=path) for path in (None, earlier))
    assert needed(seen, 1, "a / b") != needed(guessed, 1)
    assert seen.items == needed(seen, 1, "a / b")
    assert "a / b (200 items)" in {n.basis for n in seen.needs}


def test_what_is_asked_for_is_planned_and_what_it_shows_is_told(planned: Any) -> None:
    plan = planned("a", "b", items=20, samples=3)
    assert (plan.items, plan.samples) == (20, 3)
    assert {c.estimate.requests for c in plan.channels} == {60}
    assert any("20 questions with 3 answer(s) each detect" in note for note in plan.notes)


def test_where_more_answers_help_their_number_is_told(planned: Any) -> None:
    short = planned("a", "b", items=1500, samples=1, difference=0.04)
    help_told = next(note for note in short.notes if "1,500 questions with 1 answer(s) each detect" in note)
    assert "with 16 answers to each they do" in help_told
    assert not any("each detect" in note for note in planned("a", "b", items=1500, samples=16, difference=0.04).notes)


def test_a_single_channel_is_planned_without_anything_to_tell_apart(planned: Any) -> None:
    plan = planned("a", items=10)
    assert (plan.needs, plan.reaches, plan.comparisons) == ((), (), 0)
    assert plan.channels[0].estimate.bound is not None


@pytest.fixture
def short(tmp_path: Path) -> str:
    path = tmp_path / "thirty.jsonl"
    lines = [json.dumps({"question": f"What is {n} + 1?", "answer": str(n + 1)}) for n in range(30)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return f"file:{path}"


def test_a_task_with_too_few_questions_is_planned_whole_and_its_floor_is_told(planned: Any, short: str) -> None:
    plan = planned("a", "b", task=short, difference=0.03)
    assert plan.items == 30
    assert plan.samples > 1
    assert {n.enough for n in plan.needs} == {False}
    assert any("only more of them go below that" in note for note in plan.notes)


def test_more_questions_than_there_are_are_refused(planned: Any, short: str) -> None:
    with pytest.raises(UsageError, match="30"):
        planned("a", task=short, items=31)


def test_a_generator_that_runs_out_is_planned_with_what_it_has(planned: Any) -> None:
    plan = planned("a", "b", task="arithmetic:remainder7", difference=0.03)
    assert 100 < plan.items < 900
    assert plan.facts.size == plan.items


# --- money ---------------------------------------------------------------------------------------------------------


def test_tokens_of_an_earlier_run_price_the_same_channel(planned: Any, earlier: Path) -> None:
    plan = planned("a", "b", items=100, like=earlier)
    a, b = (c.estimate for c in plan.channels)
    assert (a.currency, b.currency) == ("USD", "CNY")
    assert a.completion_tokens == pytest.approx(100 * 120, rel=0.1)
    assert a.prompt_tokens == pytest.approx(3000)
    assert a.low is not None
    assert a.low < a.expected < a.high < a.bound


def test_the_same_model_elsewhere_is_priced_by_the_earlier_run_but_not_timed_by_it(planned: Any, earlier: Path) -> None:
    plan = planned("b-elsewhere", items=100, like=earlier)
    assert plan.channels[0].estimate.completion_tokens == pytest.approx(100 * 120, rel=0.1)
    assert plan.channels[0].estimate.tokens_source == f"b in the run in {earlier}"
    assert plan.channels[0].each_s is None
    assert plan.seconds is None


def test_another_models_tokens_are_not_taken_for_this_one(planned: Any, earlier: Path) -> None:
    plan = planned("unpriced", items=100, like=earlier)
    assert plan.channels[0].estimate.completion_tokens is None
    assert "did not ask this model" in " ".join(plan.channels[0].notes)


def test_a_channels_longest_output_bounds_what_it_can_cost(planned: Any) -> None:
    plan = planned("b-elsewhere", items=10)
    assert plan.channels[0].estimate.completion_most == 20_000
    assert "2,000 tokens" in " ".join(plan.channels[0].notes)


def test_the_table_shows_whole_tokens_and_leaves_unknown_ones_open(planned: Any, earlier: Path) -> None:
    plan = planned("a", "unpriced", like=earlier)
    table = costs_table(plan)
    assert [str(table[column].dtype) for column in ("tokens in", "tokens out")] == ["Int64", "Int64"]
    assert table.loc["a", "tokens out"] == round(plan.channels[0].estimate.completion_tokens)
    assert pd.isna(table.loc["unpriced", "tokens out"])


def test_a_local_model_costs_nothing_and_its_prompts_are_counted_by_its_own_tokenizer(planned: Any) -> None:
    plan = planned("local:tiny-r1", "a", items=20)
    local, hosted = (c.estimate for c in plan.channels)
    assert (local.expected, local.bound) == (0.0, 0.0)
    assert local.prompt_tokens != hosted.prompt_tokens


# --- time ----------------------------------------------------------------------------------------------------------


def test_an_earlier_runs_latency_gives_the_time_at_a_concurrency(planned: Any, earlier: Path) -> None:
    # Each request took two seconds of its own; channel b's 60 a minute do not hold it back.
    assert planned("a", items=100, like=earlier, concurrency=4).seconds == pytest.approx(50.0)
    assert planned("a", "b", items=100, like=earlier, concurrency=8).seconds == pytest.approx(50.0)


def test_a_known_limit_makes_it_last_at_least_so_long(planned: Any, earlier: Path) -> None:
    fast = planned("b", items=600, like=earlier, concurrency=100)
    assert fast.seconds == pytest.approx(540.0)  # the first minute's 60 are there at once
    unknown = planned("b", items=600)
    assert unknown.seconds is None
    assert unknown.least_seconds == pytest.approx(540.0)
    assert "at least 9 min" in " ".join(unknown.channels[0].notes)


def test_a_rate_beyond_a_channels_quota_is_warned_of(planned: Any) -> None:
    plan = planned("a", "b", items=100, rate=4.0)
    notes = {c.channel: " ".join(c.notes) for c in plan.channels}
    assert "120 requests a minute are more than its limit of 60" in notes["b"]
    assert "limit" not in notes["a"]


def test_local_models_come_after_the_hosted_ones() -> None:
    loads = [
        Load(channel="a", local=False, requests=100, each_s=4.0),
        Load(channel="local:x", local=True, requests=100, each_s=0.5),
    ]
    assert hosted_duration(loads, 10, None).expected == pytest.approx(40.0)
    assert whole_duration(loads, 10, None).expected == pytest.approx(90.0)
    assert whole_duration(loads, 10, 10.0).expected == pytest.approx(10.0 + 4.0 + 50.0)


def test_an_unknown_local_speed_leaves_the_whole_unknown_but_bounded_from_below() -> None:
    loads = [
        Load(channel="a", local=False, requests=100, each_s=4.0, max_in_flight=2),
        Load(channel="local:x", local=True, requests=100),
    ]
    found = whole_duration(loads, 10, None)
    assert found.expected is None
    assert found.least == pytest.approx(200.0)


def test_more_in_flight_than_there_are_requests_gains_nothing() -> None:
    loads = [Load(channel="a", local=False, requests=3, each_s=4.0)]
    assert hosted_duration(loads, 100, None).expected == pytest.approx(4.0)


# --- what is refused -----------------------------------------------------------------------------------------------


def test_an_earlier_run_of_another_task_is_refused_with_the_difference(planned: Any, tmp_path: Path) -> None:
    other = run_in(tmp_path / "other", *answers("a", {"x": 1.0}, 1), task="arithmetic:sum2")
    with pytest.raises(UsageError, match=r"'arithmetic:sum2' there, 'arithmetic' here"):
        planned("a", like=other)


def test_a_folder_without_a_run_or_without_records_is_refused(planned: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"holds no run\.json"):
        planned("a", like=tmp_path)
    empty = run_in(tmp_path / "empty")
    with pytest.raises(UsageError, match="no request of the run"):
        planned("a", like=empty)
    (empty / "records.jsonl").unlink()
    with pytest.raises(UsageError, match=r"no records\.jsonl"):
        planned("a", like=empty)


def test_a_run_in_which_nothing_was_answered_teaches_nothing(planned: Any, tmp_path: Path) -> None:
    failed = answers("a", {"x": 1.0}, 3, outcome="throttled", verdict="unscored")
    with pytest.raises(UsageError, match="no request of the run"):
        planned("a", like=run_in(tmp_path / "failed", *failed))


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"difference": 0.0}, "difference"), ({"power": 1.0}, "power"), ({"items": 0}, "items"), ({"rate": -1.0}, "rate"),
     ({"samples": 0}, "samples"), ({"concurrency": 0}, "concurrency")],
)  # fmt: skip
def test_a_number_that_cannot_be_meant_is_refused(planned: Any, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        planned("a", **settings)


def test_unknown_channels_tasks_and_models_are_refused(planned: Any) -> None:
    with pytest.raises(UnknownName, match="channel"):
        planned("nowhere")
    with pytest.raises(UnknownName, match="task"):
        planned("a", task="arithmetics")
    with pytest.raises(Dsr1kitError):
        planned("local:no-such-model")
    with pytest.raises(UsageError, match="twice"):
        planned("a", "a")


# --- what an earlier run lacks is said -----------------------------------------------------------------------------


def test_an_earlier_run_with_one_answer_each_says_nothing_of_more_answers(planned: Any, tmp_path: Path) -> None:
    shares = {f"item-{n}": 0.8 for n in range(120)}
    once = run_in(tmp_path / "once", *answers("a", shares, 1), *answers("b", shares, 1))
    plan = planned("a", "b", like=once)
    assert needed(plan, 64, "a / b") == pytest.approx(needed(plan, 1, "a / b"), rel=0.01)
    assert any("one answer to each question" in note for note in plan.notes)


def test_answers_cut_by_a_shorter_limit_are_pointed_out(planned: Any, tmp_path: Path) -> None:
    cut = answers("a", {f"item-{n}": 0.5 for n in range(5)}, 1, outcome="truncated")
    plan = planned("a", items=10, like=run_in(tmp_path / "cut", *cut, max_tokens=256))
    assert "5 answers of the earlier run were stopped" in " ".join(plan.channels[0].notes)


def test_figures_from_the_emulator_say_so(planned: Any, tmp_path: Path) -> None:
    made = answers("a", {f"item-{n}": 0.5 for n in range(5)}, 1, emulated=True)
    plan = planned("a", items=10, like=run_in(tmp_path / "made", *made))
    assert "emulated provider" in " ".join(plan.channels[0].notes)


# --- the command ---------------------------------------------------------------------------------------------------


def dsr1kit(*arguments: str | Path, code: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "dsr1kit", "plan", *map(str, arguments)],
        capture_output=True, text=True, timeout=120, env=os.environ | environment, check=False,
    )  # fmt: skip
    assert done.returncode == code, (done.stdout[-500:], done.stderr[-1500:])
    assert "Traceback" not in done.stderr
    return done


def test_the_command_prints_one_object(mine: Path, earlier: Path) -> None:
    done = dsr1kit("--channels", "a,b", "--difference", "5", "--like", earlier, "--channel-file", mine, "--json")
    plan = json.loads(done.stdout)
    assert plan["difference"] == pytest.approx(0.05)
    assert [c["channel"] for c in plan["channels"]] == ["a", "b"]
    assert plan["channels"][0]["estimate"]["expected"] > 0
    assert plan["seconds"] > 0


def test_the_command_shows_size_money_and_what_is_not_known(mine: Path) -> None:
    text = dsr1kit("--channels", "a,unpriced", "--items", "100", "--channel-file", mine).stdout
    assert "To tell 3 points apart in 80% of cases" in text
    assert "100 questions of arithmetic" in text
    assert "32.8 USD" in text  # 100 answers of 32,768 tokens
    assert "price is unknown" in text
    assert "no latency is known" in text


def test_a_public_set_is_planned_where_no_hub_can_be_reached(mine: Path, tmp_path: Path) -> None:
    done = dsr1kit("--channels", "a,b", "--task", "aime24", "--channel-file", mine, "--json",
                   HF_ENDPOINT="http://127.0.0.1:9", HF_HUB_OFFLINE="0", HF_HOME=str(tmp_path / "hub"))  # fmt: skip
    plan = json.loads(done.stdout)
    assert plan["items"] == 30
    assert plan["channels"][0]["estimate"]["bound"] > 0
    assert plan["channels"][0]["estimate"]["prompt_tokens"] is None, "nothing was counted, which is not zero"
    assert "accuracy of 80%" in " ".join(plan["notes"])  # R1's published 79.8
    assert "prompts are not counted" in " ".join(plan["notes"])


def test_the_command_refuses_a_run_of_another_task_with_exit_2(mine: Path, tmp_path: Path) -> None:
    other = run_in(tmp_path / "other", *answers("a", {"x": 1.0}, 1), task="gsm8k")
    done = dsr1kit("--channels", "a", "--like", other, "--channel-file", mine, code=2)
    assert done.stdout == ""
    assert "'gsm8k' there" in done.stderr
