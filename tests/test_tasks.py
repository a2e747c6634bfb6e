"""Tasks: the same questions for the same seed, all from the held-out side, under stable names."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from dsr1kit.compare import arithmetic, gym
from dsr1kit.compare.judge import verdict_of
from dsr1kit.compare.scoring import score_number
from dsr1kit.compare.tasks import TASKS, Item, digest, facts, load_task
from dsr1kit.errors import UnknownName, UsageError
from dsr1kit.records import Outcome, Reply


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


def test_zero_means_all_only_where_there_is_an_end() -> None:
    with pytest.raises(UsageError, match="arithmetic has no end"):
        load_task("arithmetic", 0)
    assert len(load_task("questions", 0)) == facts("questions").size


def test_every_task_has_facts_and_the_digest_tells_tasks_apart() -> None:
    for name in (*TASKS, "questions", "questions:en"):
        told = facts(name)
        assert told.name == name
        assert told.offline
        assert set(told.languages) <= {"en", "zh"}
    with pytest.raises(UnknownName, match="did you mean"):
        facts("arithmetik")
    items = load_task("arithmetic", 20)
    assert digest(items) == digest(load_task("arithmetic", 20))
    assert len(digest(items)) == 16
    others = [replace(items[0], gold="1"), replace(items[0], scorer="exact"), replace(items[0], prompt="?")]
    assert len({digest([items[0]]), *(digest([one]) for one in others), digest(items)}) == 5


# --- the kit's own questions


def test_the_own_questions_are_named_once_and_taken_by_kind_and_language() -> None:
    items = load_task("questions", 0)
    assert len({item.id for item in items}) == len({item.prompt for item in items}) == len(items) >= 200
    kinds = {item.kind for item in items}
    for kind in kinds:
        assert {item.kind for item in load_task(f"questions:{kind}", 0)} == {kind}
    for language in ("en", "zh"):
        assert {item.language for item in load_task(f"questions:{language}", 0)} == {language}
    assert {item.kind for item in load_task("questions", len(kinds))} == kinds
    assert load_task("questions", 40, seed=2)[:15] == load_task("questions", 15, seed=2)
    assert load_task("questions", 15, seed=1) != load_task("questions", 15, seed=2)
    with pytest.raises(UnknownName, match="unknown task 'questions:"):
        load_task("questions:nothing", 1)


def test_the_own_golds_are_judged_right_by_their_scorers() -> None:
    for item in load_task("questions", 0):
        gold = item.gold.split(" | ")[0]
        assert verdict_of(Reply(Outcome.OK, answer=rf"So \boxed{{{gold}}}."), item) == "right", item


# --- reasoning-gym


def test_a_generator_is_asked_by_name_and_judged_by_its_own_scorer() -> None:
    items = load_task("reasoning-gym:chain_sum", 5, seed=1)
    assert [item.kind for item in items] == ["chain_sum"] * 5
    for item in items:
        assert item.prompt.endswith("put your final answer within \\boxed{}.")
        for answer in (rf"\boxed{{{item.gold}}}", f"<answer>{item.gold}</answer>", f"Answer: {item.gold}", item.gold):
            assert verdict_of(Reply(Outcome.OK, answer=answer), item) == "right"
        for answer in ("", r"\boxed{zebra}", rf"\boxed{{{item.gold}1}}", rf"\boxed{{{item.gold}}} no, \boxed{{x}}"):
            assert verdict_of(Reply(Outcome.OK, answer=answer), item) == "wrong"
    assert load_task("reasoning-gym:chain_sum", 12, seed=1)[:5] == items
    prompts = {seed: {i.prompt for i in load_task("reasoning-gym:chain_sum", 20, seed)} for seed in (0, 1)}
    assert not prompts[0] & prompts[1]


def test_answers_that_only_the_generator_can_judge() -> None:
    (item,) = load_task("reasoning-gym:countdown", 1)
    assert verdict_of(Reply(Outcome.OK, answer=rf"\boxed{{{item.gold}}}"), item) == "right"
    written = item.gold.replace("*", r" \times ")
    assert verdict_of(Reply(Outcome.OK, answer=rf"$\boxed{{{written}}}$"), item) == "right"
    (cube,) = load_task("reasoning-gym:rubiks_cube", 1)
    assert cube.gold == ""  # there are many ways
    assert verdict_of(Reply(Outcome.OK, answer=r"\boxed{U U}"), cube) in ("right", "wrong")


@functools.cache
def first_of(generator: str) -> Item:
    return load_task(f"reasoning-gym:{generator}", 1)[0]


@pytest.mark.parametrize("name", ["countdown", "puzzle24", "polynomial_multiplication", "simple_integration"])
@pytest.mark.parametrize(
    "attack",
    ["__import__('pathlib').Path('taken').touch()", "exit(3)", "().__class__", "open('taken', 'w')", "9**9**9**9"],
)
def test_an_answer_is_never_run_as_a_program(
    name: str, attack: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    item = first_of(name)
    assert verdict_of(Reply(Outcome.OK, answer=rf"\boxed{{{attack}}}"), item) == "wrong"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["string_insertion", "spiral_matrix", "binary_matrix", "n_queens"])
def test_an_answer_that_scorers_evaluate_is_a_literal_or_wrong(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    item = first_of(name)
    attack = "[__import__('pathlib').Path('taken').touch()]"
    assert verdict_of(Reply(Outcome.OK, answer=rf"\boxed{{{attack}}}"), item) == "wrong"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["ransom_note", "knight_swap"])
def test_questions_are_the_same_in_every_process(name: str) -> None:
    code = (
        "import sys; from dsr1kit.compare.tasks import digest, load_task\n"
        "print(); print(digest(load_task(sys.argv[1], 4)))"
    )
    task = f"reasoning-gym:{name}"
    told = {
        subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code, task], env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True, text=True, timeout=120, check=True,
        ).stdout.split()[-1]
        for seed in ("1", "2")
    }  # fmt: skip
    items = load_task(task, 4)
    assert told == {digest(items)}
    for item in items:
        assert verdict_of(Reply(Outcome.OK, answer=rf"\boxed{{{item.gold}}}"), item) == "right"


@pytest.mark.slow
def test_every_generator_makes_the_same_questions_again() -> None:
    for name in gym.generators():
        items = load_task(f"reasoning-gym:{name}", 3)
        assert digest(load_task(f"reasoning-gym:{name}", 2)) == digest(items[:2])


def test_a_generator_that_does_not_exist_is_told_with_the_nearest() -> None:
    with pytest.raises(UnknownName, match=r"unknown reasoning-gym generator 'chain_sm'; did you mean 'chain_sum'"):
        load_task("reasoning-gym:chain_sm", 1)
    with pytest.raises(UnknownName, match=r"All \d+: ab, acre"):
        load_task("reasoning-gym:", 1)
    with pytest.raises(UsageError, match=r"made \d+ different questions with seed 0, not 5,000"):
        load_task("reasoning-gym:coin_flip", 5000)


def test_what_is_practised_never_shows_a_step_that_is_asked_to_measure() -> None:
    asked = load_task("practice:sum4", 600)
    for item in asked:
        operands = [int(number) for number in re.findall(r"\d+", item.prompt.replace("\\boxed{}", ""))]
        assert len(operands) == 4
        assert all(arithmetic.side_of(*step) == "train" for step in arithmetic.chained(operands))


def test_questions_of_a_generator_with_a_smaller_answer_are_left_out_where_that_is_wanted() -> None:
    pytest.importorskip("reasoning_gym")
    name = "reasoning-gym:chain_sum:max_terms=3,max_digits=2"
    every, some = load_task(name, 120), load_task(f"{name},min_answer=0", 60)
    kept = [item.id for item in every if float(item.gold) >= 0][:60]
    assert any(float(item.gold) < 0 for item in every)
    assert [item.id for item in some] == kept
    assert verdict_of(Reply(Outcome.OK, answer=f"\\boxed{{{some[0].gold}}}"), some[0]) == "right"
    with pytest.raises(UsageError, match="must be a number, not 'a'"):
        load_task(f"{name},min_answer='a'", 2)
    with pytest.raises(UsageError, match="answers that are no numbers"):
        load_task("reasoning-gym:spell_backward:min_answer=0", 2)
