"""Distilling from a teacher: right, whole answers with their reasoning are kept, resumably and within a budget."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from dsr1kit.compare import gym
from dsr1kit.compare.journal import read_records
from dsr1kit.compare.settings import RunSettings
from dsr1kit.compare.tasks import load_task
from dsr1kit.errors import RunError, UnknownName, UsageError
from dsr1kit.finetune.checks import check
from dsr1kit.finetune.collect import Collected, collect, keep
from dsr1kit.finetune.data import read_file
from dsr1kit.records import Sampling

TASK = "practice:sum2"
GOLD = load_task(TASK, 1)[0].gold


def weather(path: Path, *, script: str = "", rest: str = "") -> str:
    """A teacher: tiny-r1, or one who always says the same."""
    model = f"script = {json.dumps(script)}" if script else 'name = "tiny-r1"'
    path.write_text(f"[model]\n{model}\n[latency]\nfirst_token_s = 0.001\ninter_token_s = 0.0001\n{rest}")
    return f"emulated:{path}"


def ask(teacher: str, out: Path, *, most: int = 1, on_progress: Any = None, **settings: Any) -> Collected:
    usual: dict[str, Any] = {"task": TASK, "items": 8, "sampling": Sampling(max_tokens=300)}
    wanted = RunSettings(channels=(teacher,), **(usual | settings))
    return asyncio.run(collect(wanted, out, most=most, on_progress=on_progress))


# --- a real teacher ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Collected]:
    """Eight questions three times over to tiny-r1, behind an emulated provider."""
    folder = tmp_path_factory.mktemp("taught")
    prices = "[price]\ninput = 0.5\noutput = 2.0\ncurrency = 'USD'\n"
    teacher = weather(folder / "teacher.toml", rest=prices)
    return teacher, folder / "run", ask(teacher, folder / "run", samples=3, most=2)


def test_what_is_kept_is_right_whole_and_reasoned_and_no_more_than_asked_for(
    taught: tuple[str, Path, Collected],
) -> None:
    _, out, found = taught
    records = read_records(found.run.records)
    assert found.asked == len(records) == 24
    assert len(found.examples) + sum(found.dropped.values()) == 24
    assert found.questions_asked == 8
    assert 4 <= found.questions == len({one.question for one in found.examples})
    assert max(Counter(one.question for one in found.examples).values()) <= 2
    assert len({one.id for one in found.examples}) == len(found.examples)
    by_text = {(r["question"], r["reasoning"].strip("\n"), r["answer"].strip()): r for r in records}
    for one in found.examples:
        record = by_text[one.question, one.reasoning, one.answer]
        assert (record["outcome"], record["verdict"]) == ("ok", "right")
        assert one.reasoning.strip()
        assert (one.gold, one.scorer, one.kind, one.language) == (
            record["gold"], "number", "sum2", record["language"],
        )  # fmt: skip
        assert one.source == "emulated:teacher.toml", "no folder of the machine goes into the data"
    assert found.currency == "USD"
    assert found.cost == pytest.approx(sum(r["cost"] for r in records))
    assert found.path == out / "examples.jsonl"


def test_what_was_kept_reads_back_and_passes_the_checks_against_what_is_measured(
    taught: tuple[str, Path, Collected],
) -> None:
    _, _, found = taught
    back = read_file(found.path)
    assert [(one.id, one.gold, one.scorer) for one in back] == [(e.id, e.gold, e.scorer) for e in found.examples]
    assert str(Path.home()) not in found.path.read_text()
    checked = asyncio.run(check(back, evaluation=load_task("arithmetic:sum2", 300)))
    assert len(checked.kept) == len(back), checked.counts
    assert checked.unscored == 0


def test_what_came_of_it_is_told_in_a_line(taught: tuple[str, Path, Collected]) -> None:
    _, _, found = taught
    (line,) = found.told()
    assert line.startswith(f"{len(found.examples)} of 24 answers kept")
    assert f"{found.questions} of 8 questions have one; cost USD " in line
    assert all(f"{n} {reason}" in line for reason, n in found.dropped.items())


def test_a_second_call_asks_nothing_and_more_may_be_kept_of_what_came(taught: tuple[str, Path, Collected]) -> None:
    teacher, out, found = taught
    before = (out / "records.jsonl").read_bytes()
    stages: list[str] = []
    again = ask(teacher, out, samples=3, most=2, on_progress=lambda stage, *_: stages.append(stage))
    assert stages == []
    assert (out / "records.jsonl").read_bytes() == before
    assert (again.examples, again.dropped, again.cost) == (found.examples, found.dropped, found.cost)
    fewer = ask(teacher, out, samples=3, most=1)
    assert len(fewer.examples) == fewer.questions == found.questions
    assert len(read_file(fewer.path)) == len(fewer.examples)
    with pytest.raises(UsageError, match="holds another run"):
        ask(teacher, out, samples=2)


def test_a_budget_ends_the_asking_cleanly_keeps_what_came_and_more_money_goes_on(tmp_path: Path) -> None:
    prices = "[price]\ninput = 0.0\noutput = 1000.0\ncurrency = 'CNY'\n"
    script = f"<think>\nOne and two.\n</think>\n\nThe answer is \\boxed{{{GOLD}}}."
    teacher = weather(tmp_path / "w.toml", script=script, rest=prices)
    first = ask(teacher, tmp_path / "run", concurrency=1, max_cost=0.001)
    assert [one.gold for one in first.examples] == [GOLD], "the first question of the task is answered right"
    assert first.dropped == {"over_budget": 7}
    assert first.currency == "CNY"
    assert first.cost is not None
    assert first.cost >= 0.001
    more = ask(teacher, tmp_path / "run", concurrency=1, max_cost=1000.0)
    assert more.examples == first.examples
    assert more.dropped == {"wrong": 7}
    assert more.asked == 8


@pytest.mark.parametrize(
    ("script", "rest", "told"),
    [
        ("<think>\nHm.\n</think>\n\n\\boxed{-1}", "", r"\(ended: 8 ok; dropped: 8 wrong\)"),
        (
            f"<think>\nHm.\n</think>\n\n\\boxed{{{GOLD}}}",
            "[faults]\noverloaded = 1.0\n",
            r"\(ended: 8 overloaded; dropped: 8 overloaded\)",
        ),
        (
            f"<think>\nHm, and hm.\n</think>\n\n\\boxed{{{GOLD}}}",
            "[limits]\nmax_output = 3\n",
            r"\(ended: 8 truncated; dropped: 8 truncated\)",
        ),
    ],
    ids=["always wrong", "always busy", "always cut off"],
)
def test_a_teacher_who_gives_nothing_to_keep_is_an_error_that_says_how_it_ended(
    script: str, rest: str, told: str, tmp_path: Path
) -> None:
    teacher = weather(tmp_path / "w.toml", script=script, rest=rest)
    with pytest.raises(RunError, match=rf"gave nothing to keep {told}.*report\.html"):
        ask(teacher, tmp_path / "run")
    assert not (tmp_path / "run" / "examples.jsonl").exists()


def test_a_teacher_who_hides_its_reasoning_gives_nothing_to_learn(tmp_path: Path) -> None:
    teacher = weather(tmp_path / "w.toml", script=f"The answer is \\boxed{{{GOLD}}}.")
    with pytest.raises(RunError, match=r"\(ended: 1 ok; dropped: 1 no reasoning shown\)"):
        ask(teacher, tmp_path / "run", items=1)


def test_failed_requests_are_asked_again_where_that_is_wanted(tmp_path: Path) -> None:
    script = f"<think>\nHm.\n</think>\n\n\\boxed{{{GOLD}}}"
    teacher = weather(tmp_path / "w.toml", script=script, rest="[faults]\noverloaded = 0.6\n")
    wanted = RunSettings(channels=(teacher,), task=TASK, items=1, samples=6, sampling=Sampling(max_tokens=100))
    first = asyncio.run(collect(wanted, tmp_path / "run", most=6))
    failed = first.dropped["overloaded"]
    assert 0 < failed < 6
    again = asyncio.run(collect(wanted, tmp_path / "run", most=6, retry_failed=True))
    assert again.dropped.get("overloaded", 0) < failed
    assert again.asked == 6


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"task": "practise:sum2"}, UnknownName),
        ({"items": -1}, UsageError),
        ({"samples": 0}, UsageError),
        ({"most": 0}, UsageError),
    ],
)
def test_what_cannot_be_meant_is_refused_before_anything_is_asked(
    settings: dict[str, Any], error: type[Exception], tmp_path: Path
) -> None:
    with pytest.raises(error):
        ask("emulated:scripted", tmp_path / "run", **settings)
    assert not (tmp_path / "run").exists()


# --- which records are worth training on ---------------------------------------------------------------------------


def record(**changed: Any) -> dict[str, Any]:
    usual = {
        "channel": "teacher", "item": "a", "sample": 0, "outcome": "ok", "verdict": "right", "question": "1 + 1 = ?",
        "reasoning": "1+1=2", "answer": "\\boxed{2}", "gold": "2", "scorer": "number", "kind": "sum2",
        "language": "en", "emulated": False,
    }  # fmt: skip
    return usual | changed


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"outcome": "truncated"}, "truncated"),
        ({"outcome": "cut", "verdict": "unscored"}, "cut"),
        ({"outcome": "over_budget", "verdict": "unscored"}, "over_budget"),
        ({"verdict": "wrong"}, "wrong"),
        ({"verdict": "unscored"}, "unscored"),
        ({"reasoning": ""}, "no reasoning shown"),
        ({"reasoning": " \n"}, "no reasoning shown"),
        ({"reasoning": None}, "no reasoning shown"),
    ],
)
def test_each_record_that_is_not_kept_has_its_reason(changed: dict[str, Any], reason: str) -> None:
    kept, dropped = keep([record(**changed), record()])
    assert len(kept) == 1
    assert dropped == {reason: 1}


def test_of_one_question_the_first_right_answers_are_kept_and_no_two_alike() -> None:
    other = {"reasoning": "1+1 is 2"}
    records = [record(sample=3, reasoning="two"), record(sample=2, **other), record(sample=1), record(sample=0)]
    kept, dropped = keep(records, most=2)
    assert [one.reasoning for one in kept] == ["1+1=2", "1+1 is 2"]
    assert dropped == {"more than enough": 2}
    assert [one.reasoning for one in keep(records)[0]] == ["1+1=2"]
    assert keep(list(reversed(records)), most=2)[0] == kept, "in the order of asking, not of arrival"


def test_answers_are_in_the_order_of_asking_the_first_draws_of_all_questions_before_the_second() -> None:
    records = [
        record(item=item, sample=sample, question=item, reasoning=f"{item}{sample}")
        for item in "ba"
        for sample in (1, 0)
    ]
    assert [one.reasoning for one in keep(records, most=2)[0]] == ["a0", "b0", "a1", "b1"]


def test_a_puzzle_that_its_generator_alone_can_judge_loses_its_gold(tmp_path: Path) -> None:
    (puzzle,) = keep([record(scorer="reasoning-gym", gold="one of many")])[0]
    assert (puzzle.gold, puzzle.scorer) == ("", "math")
    (plain,) = keep([record()])[0]
    assert (plain.gold, plain.scorer) == ("2", "number")
    assert gym.PREFIX.startswith("reasoning-gym"), "the scorer's name that is looked for"


@pytest.mark.parametrize(
    ("channel", "emulated", "told"),
    [
        ("openrouter", False, "openrouter"),
        ("openrouter", True, "openrouter (emulated)"),
        ("emulated:/home/me/secret/calm.toml", True, "emulated:calm.toml"),
        ("local:/home/me/models/r1", False, "local:r1"),
        ("local:tiny-r1", False, "local:tiny-r1"),
    ],
)
def test_a_teacher_is_named_without_folders_and_an_emulated_one_as_such(
    channel: str, emulated: bool, told: str
) -> None:
    (one,) = keep([record(channel=channel, emulated=emulated)])[0]
    assert one.source == told
