"""The generated problems: every trace true, training and held-out operations apart, draws repeatable."""

from __future__ import annotations

import re

import pytest

from dsr1kit.compare.arithmetic import (
    KINDS,
    TAUGHT,
    UNTAUGHT,
    false_statements,
    generate,
    side_of,
    steps_of,
)
from dsr1kit.errors import UnknownName, UsageError

EACH = 300


@pytest.fixture(scope="module")
def held_out():
    return generate(KINDS, "held_out", EACH * len(KINDS), seed=5)


@pytest.fixture(scope="module")
def train():
    return generate(KINDS, "train", 400 * len(KINDS), seed=5)


def value_from_scratch(operation, operands):
    """The right number by a way of its own, not by the generator's."""
    a, b, *rest = operands
    c = rest[0] if rest else 0
    return {
        "sum": sum(operands),
        "difference": a - b,
        "product": a * b,
        "sum_difference": a + b - c,
        "difference_sum": a - b + c,
        "product_sum": a * b + c,
        "product_difference": a * b - c,
        "remainder": a % 7,
    }[operation]


def test_answer_is_right_and_boxed(held_out, train):
    for problem in held_out + train:
        if problem.kind == "comparison":
            largest = re.search("larg|大", problem.question)
            expected = max(problem.operands) if largest else min(problem.operands)
        else:
            expected = value_from_scratch(problem.operation, problem.operands)
        assert problem.value == expected, problem
        assert re.findall(r"\\boxed\{(\d+)\}", problem.answer) == [str(expected)], problem


def test_every_line_of_every_trace_is_true(held_out, train):
    for problem in held_out + train:
        assert false_statements(problem.reasoning) == [], problem
        for line in problem.reasoning.splitlines():
            for left, sign, right in re.findall(r"(?<![\d+\-×])([\d+\-×]+)([=<>])(\d+)", line):
                if sign == "=":
                    # Python itself as the referee; the pattern admits digits and signs alone.
                    assert eval(left.replace("×", "*")) == int(right), (problem, line)  # noqa: S307
            carried = re.search(r"=(\d+) (?:carry |进)(\d+)$", line)
            if carried:
                assert int(carried[1]) // 10 == int(carried[2]), (problem, line)


def test_false_lines_are_found():
    assert false_statements("7+5=12 carry 1\n2+6+1=9") == []
    assert false_statements("7+5=13 carry 1\n2+6+1=9\n34 and 31: 3=3 4<1") == ["7+5=13", "4<1"]
    assert false_statements("13-8-1=5") == ["13-8-1=5"]


def test_traces_end_in_the_answer(held_out):
    for problem in held_out:
        if problem.kind != "comparison":
            assert problem.reasoning.endswith(f"={problem.value}"), problem


def test_questions_show_their_operands(held_out):
    for problem in held_out:
        shown = [int(number) for number in re.findall(r"\d+", problem.question)]
        assert sorted(shown) == sorted(problem.operands), problem


def test_training_and_held_out_share_no_operation(held_out, train):
    one = {step for problem in train for step in problem.steps}
    other = {step for problem in held_out for step in problem.steps}
    assert not one & other


def test_word_problems_fall_on_the_side_of_their_sums():
    assert steps_of("product_sum", (3, 20, 5)) == (("product", (3, 20)), ("sum", (5, 60)))
    assert steps_of("sum", (9, 2)) == steps_of("sum", (2, 9))
    assert steps_of("difference", (9, 2)) == (("difference", (9, 2)),)
    for problem in generate(("words_en", "words_zh"), "held_out", 200, 1):
        assert all(side_of(name, numbers) == "held_out" for name, numbers in problem.steps)


def test_about_one_in_eight_is_held_out():
    sides = [side_of("sum", (a, b)) for a in range(100, 200) for b in range(200, 300)]
    assert 0.11 < sides.count("held_out") / len(sides) < 0.14


def test_held_out_draw_is_unique_and_covers_every_kind(held_out):
    assert len({(p.kind, p.steps) for p in held_out}) == len(held_out)
    for kind in KINDS:
        assert sum(p.kind == kind for p in held_out) == EACH


def test_same_arguments_give_same_problems_and_other_seeds_others():
    assert generate(TAUGHT, "held_out", 50, 1) == generate(TAUGHT, "held_out", 50, 1)
    assert generate(TAUGHT, "held_out", 50, 1) != generate(TAUGHT, "held_out", 50, 2)
    assert generate("sum2", "train", 20, 1)[:10] == generate("sum2", "train", 10, 1)


def test_kinds_take_turns():
    assert [p.kind for p in generate(UNTAUGHT, "train", 5, 0)] == [*UNTAUGHT, *UNTAUGHT, UNTAUGHT[0]]


def test_languages_match_the_kind(held_out):
    for problem in held_out:
        chinese = bool(re.search(r"[\u4e00-\u9fff]", problem.question))
        assert chinese or problem.language == "en" or "=" in problem.question
        assert ("答案" in problem.answer) == (problem.language == "zh")
    assert {p.language for p in held_out if p.kind == "words_en"} == {"en"}
    assert {p.language for p in held_out if p.kind == "words_zh"} == {"zh"}


def test_mistakes_say_what_to_do():
    with pytest.raises(UnknownName, match="did you mean 'sum2'"):
        generate("sum22", "train", 1)
    with pytest.raises(UnknownName, match="held_out"):
        generate("sum2", "heldout", 1)  # type: ignore[arg-type]  # the mistake under test
    with pytest.raises(UsageError, match="ask for fewer"):
        generate("remainder7", "held_out", 1000)
