"""Summaries from records alone: what is counted where, what may be called a difference, and the words for it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from dsr1kit.compare.journal import read_records
from dsr1kit.compare.slim import load_records
from dsr1kit.compare.summary import summarize
from dsr1kit.compare.verdict import verdict
from dsr1kit.errors import UsageError


def row(channel: str, item: int, judged: str, outcome: str = "ok", **more: Any) -> dict[str, Any]:
    answered = outcome in ("ok", "truncated")
    return {
        "run": "r", "channel": channel, "item": f"q{item}", "sample": 0, "kind": "k", "outcome": outcome, "detail": "",
        "verdict": judged if answered else "unscored", "from_cache": False, "emulated": False, "cost": None,
        "currency": None, "due_at": f"2026-01-01T10:{item % 60:02d}:00+00:00", "queue_s": 0.01, "connect_s": 0.0,
        "connection_reused": True, "inter_token_s": 0.02, "first_token_s": 0.2 if answered else None,
        "first_answer_s": 1.0 + item / 1000 if outcome == "ok" else None, "total_s": 2.0 + item / 1000,
        "reasoning_tokens": 3, "answer_tokens": 1, "model_requested": "m", "model_served": "m", "final": None,
        "question": f"question {item}", "gold": "1", "reasoning": "hm", "answer": "1",
    } | more  # fmt: skip


def rows(channel: str, right: int, of: int, **more: Any) -> list[dict[str, Any]]:
    return [row(channel, i, "right" if i < right else "wrong", **more) for i in range(of)]


def line(summary: dict[str, Any], word: str) -> str:
    return next(said for said in summary["verdict"] if said.startswith(f"{word}: "))


RUN: dict[str, Any] = {"identity": {"task": "arithmetic"}}


# --- what is counted where ----------------------------------------------------------------------------------


def test_answers_that_could_not_be_judged_are_counted_and_are_neither_right_nor_wrong() -> None:
    records = [*rows("a", 8, 10), *(row("a", 10 + i, "unscored") for i in range(4)), row("a", 14, "", "overloaded")]
    summary = summarize(records, ["a"])
    a = summary["channels"]["a"]
    assert (a["n_unscored"], a["n_scored"], a["accuracy"]["value"]) == (4, 10, 0.8)
    assert (a["n_items"], a["n_samples"]) == (15, 1)
    assert "could not be judged count neither way: 4 of a" in line(summary, "Quality")


def test_requests_that_a_clock_ended_are_in_the_censored_percentiles_and_those_turned_away_are_not() -> None:
    records = rows("a", 30, 30)
    records += [row("a", 30 + i, "", o, total_s=60.0) for i, o in enumerate(["queued", "stalled", "deadline"] * 5)]
    records += [row("a", 50 + i, "", o, total_s=0.1) for i, o in enumerate(["throttled", "overloaded"] * 5)]
    a = summarize(records, ["a"])["channels"]["a"]
    late = a["first_answer_s_censored"]
    assert (late["n"], late["censored"]) == (45, 15)
    # Two thirds were answered: the naive p95 is that of the answered ones, the honest one is never reached.
    assert a["first_answer_s"]["p95"] < 1.1
    assert late["p95"] is None
    assert 1.0 < a["first_answer_s"]["p50"] < late["p50"]["value"] < 1.1
    assert late["p50"]["low"] <= late["p50"]["value"]
    assert a["availability"]["value"] == pytest.approx(30 / 55)


def test_an_answer_that_began_before_it_stalled_did_begin() -> None:
    records = [*rows("a", 10, 10), row("a", 10, "", "stalled", first_answer_s=1.5, total_s=9.0)]
    late = summarize(records, ["a"])["channels"]["a"]["first_answer_s_censored"]
    assert (late["n"], late["censored"]) == (11, 0)


def test_a_reply_cut_in_its_thinking_is_later_than_its_end() -> None:
    records = [*rows("a", 10, 10), *(row("a", 10 + i, "wrong", "truncated", total_s=50.0) for i in range(10))]
    a = summarize(records, ["a"])["channels"]["a"]
    assert a["first_answer_s_censored"]["censored"] == 10
    assert a["accuracy"]["value"] == 0.5
    assert a["accuracy_without_truncated"]["value"] == 1.0
    assert re.search(r"token limit cut: a 100% .*\(10 cut\)", line(summarize(records, ["a"]), "Quality"))


def test_cached_replies_are_in_no_figure_of_time() -> None:
    records = [*rows("a", 8, 8), *(row("a", 8 + i, "right", from_cache=True, total_s=0.0) for i in range(8))]
    records += [row("a", 16, "", "stalled", from_cache=True, total_s=60.0)]
    a = summarize(records, ["a"])["channels"]["a"]
    without = summarize(records[:8], ["a"])["channels"]["a"]
    for name in ("first_answer_s", "first_answer_s_interval", "first_answer_s_censored", "time_split", "connections"):
        assert a[name] == without[name]
    assert a["n_scored"] == 16


def test_the_stages_of_a_request_add_up_to_its_whole_time() -> None:
    records = [
        row("a", i, "right", queue_s=0.1, connect_s=0.2, first_token_s=1.0, first_answer_s=4.0, total_s=4.0 + i)
        for i in range(5)
    ]
    records += [row("a", 5, "wrong", "truncated", queue_s=0.1, connect_s=0.2, first_token_s=1.0, total_s=7.0)]
    a = summarize(records, ["a"])["channels"]["a"]
    split = a["time_split"]
    assert split == pytest.approx(
        {"client_s": 0.1, "connect_s": 0.2, "wait_s": 0.7, "think_s": (5 * 3 + 6) / 6, "answer_s": 10 / 6}
    )
    assert sum(split.values()) == pytest.approx(sum(r["total_s"] for r in records) / 6)


def test_fresh_and_kept_connections_are_told_apart_and_a_local_model_has_none() -> None:
    fresh = [row("a", i, "right", connect_s=0.3, connection_reused=False, first_token_s=0.9) for i in range(3)]
    kept = [row("a", 3 + i, "right", first_token_s=0.4) for i in range(5)]
    here = [row("local:b", i, "right", connect_s=None, connection_reused=False) for i in range(8)]
    channels = summarize([*fresh, *kept, *here], ["a", "local:b"])["channels"]
    assert channels["a"]["connections"] == {
        "cold": {"n": 3, "first_token_p50_s": 0.9, "connect_p50_s": 0.3},
        "warm": {"n": 5, "first_token_p50_s": 0.4},
    }
    assert channels["local:b"]["connections"] is None


def test_percentiles_have_intervals_only_where_enough_values_bound_them() -> None:
    a = summarize(rows("a", 100, 100), ["a"])["channels"]["a"]
    for clock in ("first_token_s", "first_answer_s", "total_s"):
        sure = a[f"{clock}_interval"]
        assert set(sure) == {"p50", "p95", "p99"}
        assert sure["p50"]["low"] <= sure["p50"]["value"] == a[clock]["p50"] <= sure["p50"]["high"]
        assert sure["p99"] is None
    assert summarize([], ["a"])["channels"]["a"]["total_s_interval"] is None


def test_the_median_has_the_same_interval_in_the_figure_and_among_the_percentiles() -> None:
    # Four samples that repeat their item are worth one.
    records = [one | {"sample": sample} for one in rows("a", 30, 30) for sample in range(4)]
    several, single = (summarize(rs, ["a"])["channels"]["a"] for rs in (records, rows("a", 30, 30)))
    assert several["first_answer_median"] == several["first_answer_s_interval"]["p50"]
    widths = [c["first_answer_median"]["high"] - c["first_answer_median"]["low"] for c in (several, single)]
    assert widths[0] >= 0.95 * widths[1] > 0


def test_of_too_few_items_the_median_tells_all_that_was_seen() -> None:
    records = [one | {"sample": sample} for one in rows("a", 3, 3) for sample in range(4)]
    assert summarize(records, ["a"])["channels"]["a"]["first_answer_median"] == {
        "value": 1.001, "low": 1.0, "high": 1.002
    }  # fmt: skip


def test_several_samples_give_pass_at_k_and_a_majority() -> None:
    # Each item is right in one sample of four, the three others agree on a wrong number.
    records = [
        row("a", i, "right" if s == 0 else "wrong", sample=s, final="1" if s == 0 else "2")
        for i in range(20)
        for s in range(4)
    ]
    a = summarize(records, ["a"])["channels"]["a"]
    assert [p["k"] for p in a["pass_curve"]] == [1, 2, 4]
    assert [p["value"] for p in a["pass_curve"]] == pytest.approx([0.25, 0.5, 1.0])
    assert (a["pass_at_k"]["k"], a["pass_at_k"]["value"]) == (4, 1.0)
    assert (a["majority"]["k"], a["majority"]["value"]) == (4, 0.0)
    single = summarize(rows("a", 5, 10), ["a"])["channels"]["a"]
    assert (single["pass_at_k"], single["pass_curve"], single["majority"]) == (None, [], None)


def test_goodput_is_there_when_the_run_has_an_objective() -> None:
    records = [*rows("a", 30, 40), *(row("a", 40 + i, "", "overloaded") for i in range(10))]
    noted = RUN | {
        "objective": {"first_token_s": None, "first_answer_s": 1.0195, "inter_token_s": None, "total_s": None}
    }
    summary = summarize(records, ["a"], run=noted)
    good = summary["channels"]["a"]["goodput"]
    assert (good["met"], good["asked"]) == (20, 50)
    assert summary["objective"] == {"first_answer_s": 1.0195}
    assert "with the first answer within 1.0195 s: a 40%" in line(summary, "Goodput")
    assert summarize(records, ["a"], run=RUN)["channels"]["a"]["goodput"] is None


# --- pairs --------------------------------------------------------------------------------------------------


def test_a_difference_that_does_not_survive_correction_is_said_to_be_shown_only_taken_alone() -> None:
    # b is just shown to be worse than a; the other channels bring the number of pairs up.
    records = rows("a", 36, 40) + rows("b", 29, 40)
    alone = summarize(records, ["a", "b"])
    assert alone["pairs"][0]["differs"]
    assert alone["pairs"][0]["p_holm"] == alone["pairs"][0]["p"] < 0.05
    assert "taken alone" not in line(alone, "Quality")
    for name in "cdef":
        records += rows(name, 36, 40)
    many = summarize(records, list("abcdef"), run=RUN)
    pair = next(p for p in many["pairs"] if (p["a"], p["b"]) == ("a", "b"))
    assert pair["differs"]
    assert pair["p_holm"] > 0.05 > pair["p"]
    assert not pair["differs_after_holm"]
    assert re.search(
        r"b is \d+ to \d+ points behind a \(shown only taken alone: not after correction for 15 pairs\)",
        line(many, "Quality"),
    )
    assert any("taken alone" in said for said in many["headline"])


def test_p_and_interval_agree_and_mcnemar_is_for_single_samples() -> None:
    pair = summarize(rows("a", 30, 40) + rows("b", 22, 40), ["a", "b"])["pairs"][0]
    assert (pair["p"] < 0.05) == pair["differs"]
    assert pair["mcnemar_p"] == pytest.approx(2 * 0.5**8)
    twice = [r | {"sample": s} for r in rows("a", 30, 40) + rows("b", 22, 40) for s in (0, 1)]
    assert summarize(twice, ["a", "b"])["pairs"][0]["mcnemar_p"] is None


# --- trade-offs ---------------------------------------------------------------------------------------------


def priced(channel: str, right: int, first: float, cost: float | None, currency: str | None) -> list[dict[str, Any]]:
    return rows(channel, right, 20, first_answer_s=first, cost=cost, currency=currency)


@pytest.mark.parametrize(
    ("channels", "front"),
    [
        ([("a", 18, 1.0, 1.0, "USD"), ("b", 17, 2.0, 2.0, "USD"), ("c", 10, 0.5, 1.0, "USD")], ["a", "c"]),
        ([("a", 18, 1.0, 1.0, "USD"), ("b", 17, 2.0, 9.0, "CNY")], ["a", "b"]),  # two currencies are not compared
        ([("a", 18, 1.0, 0.0, "USD"), ("b", 17, 2.0, 9.0, "CNY")], ["a"]),  # nothing is less than any fee
        ([("a", 18, 1.0, 1.0, "USD"), ("b", 17, 2.0, None, None)], ["a", "b"]),  # an unknown price is not beaten
        ([("a", 18, 1.0, 0.0, "USD"), ("b", 18, 1.0, 0.0, "USD")], ["a", "b"]),  # equals beat each other nowhere
    ],
)
def test_the_front_is_what_no_other_channel_beats_on_all_three(channels: Sequence[Any], front: list[str]) -> None:
    records = [r for channel in channels for r in priced(*channel)]
    assert summarize(records, [c[0] for c in channels], run=RUN)["pareto"] == front


# --- the words ----------------------------------------------------------------------------------------------


def test_the_headline_tells_quality_speed_and_money_of_each_rival_in_one_sentence() -> None:
    records = rows("hosted", 90, 100, first_answer_s=3.0, cost=0.01, currency="USD")
    records += [r | {"first_answer_s": 3.0 + i / 1000} for i, r in enumerate(records)]
    records += rows("local:b", 60, 100, cost=0.0, currency="USD")
    (said,) = summarize(records, ["hosted", "local:b"], run=RUN)["headline"]
    assert re.fullmatch(
        r"local:b is \d+ to \d+ points behind hosted on arithmetic, 2\.9 times faster to the first answer "
        r"\(\d\.\d+ to \d\.\d+\), and costs nothing per request \(hardware not counted\)\.",
        said,
    )


def test_speed_is_called_different_only_where_the_interval_leaves_1_out() -> None:
    slow = rows("b", 40, 40)
    fast = [r | {"channel": "a", "first_answer_s": r["first_answer_s"] / 2} for r in slow]
    summary = summarize([*fast, *slow], ["a", "b"])
    assert re.search(r"a is 2\.0 times \(\S+ to \S+\) faster than b", line(summary, "Speed"))
    same = [r | {"channel": "a", "first_answer_s": 2.04 - r["first_answer_s"]} for r in slow]
    summary = summarize([*same, *slow], ["a", "b"], run=RUN)
    ratio = summary["pairs"][0]["first_answer_ratio_interval"]
    assert ratio["low"] <= 1 <= ratio["high"]
    assert "no difference in speed shown between" in line(summary, "Speed")
    assert "faster" not in line(summary, "Speed")
    assert "with no difference in speed shown" in summary["headline"][0]


def test_cost_has_an_interval_and_a_free_local_model_says_what_is_not_counted() -> None:
    records = rows("a", 30, 40, cost=0.01, currency="CNY") + rows("local:b", 30, 40, cost=0.0, currency="USD")
    records += rows("c", 30, 40)
    summary = summarize(records, ["a", "local:b", "c"])
    a = summary["channels"]["a"]
    assert a["cost_per_right"] == pytest.approx(0.4 / 30)
    assert a["cost_per_right_interval"]["low"] < a["cost_per_right"] < a["cost_per_right_interval"]["high"]
    money = line(summary, "Cost and availability")
    assert re.search(r"a CNY 13\.3 per 1,000 right answers \(\S+ to \S+\), 100\.0% answered", money)
    assert "local:b costs nothing per request (hardware not counted), 100.0% answered" in money
    assert "c price unknown" in money


def test_what_came_from_the_emulator_says_so_in_every_line_that_names_it() -> None:
    records = rows("mine", 30, 40, emulated=True) + rows("b", 10, 40)
    summary = summarize(records, ["mine", "b"], run=RUN)
    for said in [*summary["headline"], *summary["verdict"]]:
        assert said.count("mine") == said.count("mine (emulated)")
    assert "mine (emulated)" in " ".join(summary["headline"])


def test_published_scores_stand_beside_a_real_channel_and_never_beside_an_emulated_one() -> None:
    records = rows("a", 30, 40, model_requested="deepseek-ai/DeepSeek-R1")
    run = {"identity": {"task": "math500"}}
    summary = summarize(records, ["a"], run=run)
    assert {s["channel"] for s in summary["published"]} == {"a"}
    assert all({"model", "metric", "value", "source"} <= set(s) for s in summary["published"])
    assert re.search(r"DeepSeek-R1 97\.3% pass@1 \(.+\); measured here: a 75%", line(summary, "Published"))
    json.dumps(summary)
    emulated = summarize([r | {"emulated": True} for r in records], ["a"], run=run)
    assert emulated["published"] == []
    assert summarize(records, ["a"], run=RUN)["published"] == []


def test_a_run_that_the_client_limited_says_so() -> None:
    notes = [{"limited": ""}, {"limited": "the client was the limit; ask with fewer streams"}]
    summary = summarize(rows("a", 5, 10), ["a"], run=RUN | {"client": notes})
    assert line(summary, "Client") == "Client: the client was the limit; ask with fewer streams."
    assert summary["client"] == notes
    assert not any(s.startswith("Client") for s in summarize(rows("a", 5, 10), ["a"])["verdict"])


def test_a_channel_that_answered_nothing_leaves_the_others_told() -> None:
    records = rows("a", 5, 10) + [row("b", i, "", "overloaded") for i in range(10)]
    summary = summarize(records, ["a", "b", "never"], run=RUN)
    assert summary["pareto"] == ["a"]
    assert summary["headline"] == []
    assert "b price unknown, 0.0% answered" in line(summary, "Cost and availability")
    assert "never price unknown, nothing asked" in line(summary, "Cost and availability")
    assert verdict(summary) == summary["verdict"]


def test_no_value_of_a_summary_is_beyond_json() -> None:
    records = [row("a", 0, "right"), row("b", 0, "wrong", first_answer_s=0.0, first_token_s=0.0, total_s=0.0)]
    text = json.dumps(summarize(records, ["a", "b"], run=RUN))
    assert "NaN" not in text
    assert "Infinity" not in text
    assert math.isfinite(json.loads(text)["pairs"][0]["p"])


# --- reading slimly -----------------------------------------------------------------------------------------


def written(folder: Path, records: Sequence[dict[str, Any]]) -> Path:
    path = folder / "records.jsonl"
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    return path


def test_slim_records_summarise_to_the_same_and_know_their_texts_again(tmp_path: Path) -> None:
    records = rows("a", 20, 30) + rows("b", 10, 30, reasoning="想" * 50)
    path = written(tmp_path, records)
    slim = load_records(path)
    assert summarize(slim, ["a", "b"], run=RUN) == summarize(read_records(path), ["a", "b"], run=RUN)
    assert not {"reasoning", "answer", "question", "gold"} & set(slim[0])
    assert [slim.whole(r) for r in slim] == records


def test_a_torn_last_line_is_left_out_and_any_other_is_named(tmp_path: Path) -> None:
    path = written(tmp_path, rows("a", 2, 3))
    with path.open("ab") as file:
        file.write(b'{"channel": "a", "it')
    assert len(load_records(path)) == 3
    path.write_bytes(path.read_bytes() + b"\n" + path.read_bytes().splitlines(keepends=True)[0])
    with pytest.raises(UsageError, match="line 4: not a record"):
        load_records(path)
    with pytest.raises(UsageError, match="cannot be read"):
        load_records(tmp_path / "nowhere.jsonl")
