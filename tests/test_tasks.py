"""Tasks: the same questions for the same seed, all from the held-out side, under stable names."""

from __future__ import annotations

import pytest

from dsr1kit.compare import arithmetic
from dsr1kit.compare.scoring import score_number
from dsr1kit.compare.tasks import TASKS, load_task
from dsr1kit.errors import UnknownName, UsageError


@pytest.mark.parametrize("name", TASKS)
def test_every_question_comes_from_the_held_out_side(name: str) -> None:
    kind = name.partition(":")[2] or arithmetic.TAUGHT
    problems = arithmetic.generate(kind, "held_out", 30, 5)
    items = load_task(name, 30, seed=5)
    assert [p.question for p in problems] == [i.prompt.removesuffix(f" {_ending(i.language)}") for i in items]
    assert all(arithmetic.side_of(p.operation, p.operands) == "held_out" for p in problems)


def _ending(language: str) -> str:
    return arithmetic.INSTRUCTION[language]  # type: ignore[index]  # one of its languages


def test_an_item_has_the_same_name_in_every_run_and_length() -> None:
    assert load_task("arithmetic", 40, seed=1)[:15] == load_task("arithmetic", 15, seed=1)
    assert [i.id for i in load_task("arithmetic:sum2", 3)] == [i.id for i in load_task("arithmetic:sum2", 3, seed=0)]
    by_prompt: dict[str, str] = {}
    for seed in range(5):
        for item in load_task("arithmetic:sum2", 40, seed):
            assert by_prompt.setdefault(item.prompt, item.id) == item.id


def test_names_and_questions_are_unique_in_a_run() -> None:
    items = load_task("arithmetic", 300)
    assert len({i.id for i in items}) == len({i.prompt for i in items}) == 300


def test_another_seed_asks_other_questions() -> None:
    assert {i.id for i in load_task("arithmetic", 30, 0)} != {i.id for i in load_task("arithmetic", 30, 1)}


def test_the_whole_task_takes_the_taught_kinds_in_turn_and_a_kind_only_itself() -> None:
    kinds = [i.kind for i in load_task("arithmetic", 14)]
    assert sorted(kinds) == sorted([*arithmetic.TAUGHT, *arithmetic.TAUGHT])
    for kind in arithmetic.KINDS:
        assert {i.kind for i in load_task(f"arithmetic:{kind}", 5)} == {kind}


def test_both_languages_ask_in_their_own_words() -> None:
    items = load_task("arithmetic", 60)
    assert {i.language for i in items} == {"en", "zh"}
    assert all(i.prompt.endswith(_ending(i.language)) for i in items)


def test_the_gold_is_judged_right_and_the_conversation_is_one_user_turn() -> None:
    for item in load_task("arithmetic", 20):
        assert score_number(rf"\boxed{{{item.gold}}}", item.gold) == "right"
        assert item.messages() == [{"role": "user", "content": item.prompt}]


@pytest.mark.parametrize(
    ("name", "near"),
    [("arithmetics", "arithmetic"), ("arithmetic:sum", "arithmetic:sum"), ("arithmetic:", "arithmetic")],
)
def test_an_unknown_task_is_told_with_the_nearest(name: str, near: str) -> None:
    with pytest.raises(UnknownName, match=f"unknown task .*did you mean '{near}"):
        load_task(name, 3)


def test_fewer_than_one_item_and_more_than_there_are_are_refused() -> None:
    with pytest.raises(UsageError, match="at least one item"):
        load_task("arithmetic", 0)
    with pytest.raises(UsageError, match="no more held-out problems"):
        load_task("arithmetic:remainder7", 1000)
