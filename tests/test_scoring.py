"""Judging answers: which number counts, in which spellings, and when there is no verdict."""

from __future__ import annotations

import time
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsr1kit.compare.scoring import last_boxed, score_number


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        (r"The answer is \boxed{42}.", "42"),
        (r"First \boxed{7}, no, \boxed{42}.", "42"),
        ("It is 42.", "42"),
        ("12 + 30 = 42", "42"),
        ("50-8=42", "42"),
        (r"\boxed{x = -5}", "-5"),
        (r"\boxed{−5}", "-5"),
        (r"\boxed{1,234,567}", "1234567"),
        (r"\boxed{1{,}234}", "1234"),
        (r"\boxed{1\,234}", "1234"),
        (r"\boxed{42.0}", "42"),
        (r"\boxed{\frac{1}{2}}", "0.5"),
        (r"\boxed{-\dfrac{6}{4}}", "-3/2"),
        (r"\boxed{.5}", "1/2"),
        (r"\boxed{42\text{ apples}}", "42"),
        (r"\boxed{42\text{ cm}^2}", "42"),
        (r"\boxed{42 m^{3}}", "42"),
        ("The area is 42 cm².", "42"),
        (r"\boxed{\boxed{42}}", "42"),
        ("答案是 \\boxed{４２}。", "42"),
        ("一共有42个苹果。", "42"),
        ("from 40-42", "42"),
        ("2 \\boxed{42} and 17 more words", "42"),
    ],
)
def test_a_right_number_is_right_however_it_is_written(answer: str, gold: str) -> None:
    assert score_number(answer, gold) == "right"


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("", "42"),
        ("I do not know.", "42"),
        (r"\boxed{}", "42"),
        (r"\boxed{43}", "42"),
        (r"\boxed{-42}", "42"),
        (r"42 is close, but \boxed{41}", "42"),
        (r"\boxed{42/0}", "42"),
        (r"\boxed{42.5}", "42"),
        ("9" * 6000, "42"),
        ("420", "42"),
    ],
)
def test_anything_else_is_wrong(answer: str, gold: str) -> None:
    assert score_number(answer, gold) == "wrong"


@pytest.mark.parametrize("gold", ["", "no number", "1/0"])
def test_a_gold_that_is_no_number_gives_no_verdict(gold: str) -> None:
    assert score_number(r"\boxed{42}", gold) == "unscored"


def test_the_last_box_with_balanced_braces_counts() -> None:
    assert last_boxed(r"a \boxed{1} b \boxed{\frac{1}{2}} c") == r"\frac{1}{2}"
    assert last_boxed(r"\boxed{1} then \boxed{2") == "1"
    assert last_boxed(r"} {{ \boxed{1}") == "1"
    assert last_boxed("nothing") is None


@pytest.mark.parametrize("piece", [r"\boxed{", "{", "}", "1,1", "-", "12"])
def test_an_answer_that_repeats_itself_without_end_is_judged_at_once(piece: str) -> None:
    began = time.process_time()
    score_number(piece * 20_000, "42")
    assert time.process_time() - began < 2


@settings(max_examples=60)
@given(st.fractions(max_denominator=1000))
def test_every_fraction_equals_itself_and_not_its_neighbour(value: Fraction) -> None:
    assert score_number(rf"so \boxed{{{value}}}", str(value)) == "right"
    assert score_number(rf"so \boxed{{{value + 1}}}", str(value)) == "wrong"


@settings(max_examples=60)
@given(st.text())
def test_any_text_at_all_gets_a_verdict(answer: str) -> None:
    assert score_number(answer, "42") in ("right", "wrong")


def test_an_answer_cut_off_by_a_limit_counts_only_what_it_boxed():
    assert score_number("The answer is 12", "12", boxed_only=True) == "wrong"
    assert score_number("so \\boxed{12} and then", "12", boxed_only=True) == "right"
    assert score_number("so \\boxed{12", "12", boxed_only=True) == "wrong"
