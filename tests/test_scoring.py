"""Judging answers: which number counts, in which spellings, and when there is no verdict."""

from __future__ import annotations

import time
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsr1kit.compare.scoring import (
    SCORERS,
    final_answer,
    last_boxed,
    quick_verdict,
    score_choice,
    score_date,
    score_exact,
    score_math,
    score_number,
    score_quantity,
)


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
        (r"\boxed{\frac12}", "0.5"),
        (r"\boxed{\tfrac 3 4}", "0.75"),
        (r"\boxed{43\frac{7}{11}}", "480/11"),
        (r"\boxed{-2\frac{1}{2}}", "-2.5"),
        (r"\boxed{299\ 792\ 458}", "299792458"),
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


def test_a_number_said_not_to_be_the_answer_is_no_answer() -> None:
    assert score_number("The answer is not 5", "5") == "wrong"
    assert score_number("答案不是 5", "5") == "wrong"
    assert score_number("It is not 4, it is 5.", "5") == "right"


# --- choices


@pytest.mark.parametrize(
    "answer",
    [
        r"\boxed{C}", r"\boxed{\text{C}}", r"\boxed{(C)}", r"$\boxed{\mathrm{C}}$", r"\boxed{c}", r"\boxed{C) 42}",
        r"\boxed{\text{C. Paris}}", r"\boxed{A}, no, \boxed{C}", "C", "(C)", "**C**", "C) Paris", "Answer: C",
        "**Answer:** C", "The answer is (C).", "The correct option is **C**", "Answer: A\nNo. Answer: C", "答案是C",
        "答案：C。", "应选 C", "选项 C", "\\boxed{选项C}", "The answer is C, because A and B fail.",
    ],
)  # fmt: skip
def test_a_letter_is_found_however_it_is_stated(answer: str) -> None:
    assert score_choice(answer, "C") == "right"
    assert score_choice(answer, "B") == "wrong"
    assert final_answer(answer, "choice") == "C"


@pytest.mark.parametrize(
    "answer",
    ["", "A and C", r"\boxed{A, C}", r"\boxed{A and C}", r"\boxed{AC}", "Answer: C and D", "答案：C、D",
     "Answer: C or D", "The answer is not C", "答案不是C", "I like C best of all", r"\boxed{}", r"\boxed{42}"],
)  # fmt: skip
def test_two_letters_a_denied_one_or_none_are_no_choice(answer: str) -> None:
    assert score_choice(answer, "C") == "wrong"


@pytest.mark.parametrize("gold", ["", "42", "K", "A and B"])
def test_a_gold_that_is_no_letter_gives_no_verdict(gold: str) -> None:
    assert score_choice(r"\boxed{A}", gold) == "unscored"


# --- text


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        (r"\boxed{\text{Paris}}", "Paris"), ("Answer: paris.", "Paris"), ("**Final answer:** Paris", "Paris"),
        ("Ｐａｒｉｓ", "paris"), ("  New   York! ", "New York"), ("答案是：北京。", "北京"), (r"\boxed{北 京}", "北京"),
        (r"\boxed{\textbf{London}}", "Paris | London"), ("The answer is: “Paris”", "Paris"),
    ],
)  # fmt: skip
def test_text_is_the_same_whatever_its_dress(answer: str, gold: str) -> None:
    assert score_exact(answer, gold) == "right"


@pytest.mark.parametrize("answer", ["", "Paris, Texas", "The answer is not Paris", "x" * 1_000_000, r"\boxed{}"])
def test_other_text_is_wrong(answer: str) -> None:
    assert score_exact(answer, "Paris") == "wrong"
    assert score_exact(answer, " | ") == "unscored"


# --- dates


@pytest.mark.parametrize(
    "answer",
    ["2024-03-05", "2024/3/5", "March 5, 2024", "Mar. 5th, 2024", "on 5 March 2024.", "the 5th of March, 2024",
     "2024年3月5日", r"\boxed{\text{March 5, 2024}}", "not 2023-01-01 but 2024年03月05日"],
)  # fmt: skip
def test_a_date_is_read_as_people_write_it(answer: str) -> None:
    assert score_date(answer, "2024-03-05") == "right"
    assert final_answer(answer, "date") == "2024-03-05"
    assert score_date(answer, "2024-03-06") == "wrong"


@pytest.mark.parametrize("answer", ["3/5/2024", "2024-02-30", "March 2024", "", "12024-03-05"])
def test_a_date_that_means_two_things_or_none_is_wrong(answer: str) -> None:
    assert score_date(answer, "2024-03-05") == "wrong"


def test_a_gold_that_is_no_date_gives_no_verdict() -> None:
    assert score_date("2024-03-05", "2024-13-05") == "unscored"


# --- quantities


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        (r"\boxed{1.5 \text{ hours}}", "1.5 h"), (r"\boxed{90 \text{ minutes}}", "1.5 h"), (r"\boxed{1.5}", "1.5 h"),
        (r"\boxed{1 \text{ hour } 30 \text{ minutes}}", "1.5 h"), (r"\boxed{1小时30分钟}", "1.5 h"),
        ("1 小时 30 分", "1.5 h"), (r"\boxed{2\frac{2}{5}\text{小时}}", "2.4 h"),
        (r"\boxed{72\,\text{千米/时}}", "72 km/h"),
        (r"\boxed{25\,m\,s^{-1}}", "25 m/s"),
        ("It takes 1.5 hours to arrive.", "1.5 h"), (r"\boxed{36 km/h}", "10 m/s"),
        (r"\boxed{10 meters per second}", "36 km/h"), (r"\boxed{100^\circ\text{C}}", "212 °F"),
        (r"\boxed{100 °C}", "373.15 K"), (r"\boxed{10000\text{ cm}^2}", "1 m²"),
        (r"\boxed{1 square metre}", "10000 cm²"),
        (r"\boxed{5 \text{ liters}}", "5000 mL"), (r"\boxed{5000 cm^3}", "5 L"), ("答案是 5 千克。", "5000 克"),
        (r"\boxed{6 feet 2 inches}", "74 in"), (r"\boxed{1/2 h}", "30 min"), (r"\boxed{1{,}234 \text{ m}}", "1.234 km"),
        (r"\boxed{3\times 10^{8} m/s}", "3e8 m/s"), (r"\boxed{\$5}", "5 USD"), (r"\boxed{30元}", "¥30"),
        (r"\boxed{25\%}", "25%"), (r"\boxed{12 \text{ apples}}", "12 apples"), (r"\boxed{12}", "12 apples"),
        (r"\boxed{9.85 m/s}", "9.8 ± 0.1 m/s"), (r"\boxed{9.8 m/s^2}", "9.8 m/s²"), ("$5 \\text{ kg}$", "5 kg"),
        (r"\boxed{33.33333333}", "33.333333333 km"), (r"\boxed{-40^{\circ}F}", "-40 °C"),
    ],
)  # fmt: skip
def test_a_quantity_is_right_in_any_unit_of_its_dimension(answer: str, gold: str) -> None:
    assert score_quantity(answer, gold) == "right"


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        (r"\boxed{1.5 km}", "1.5 h"), (r"\boxed{90}", "1.5 h"), (r"\boxed{12 pears}", "12 apples"), ("", "5 kg"),
        (r"\boxed{9.8 m/s}", "9.8 m/s²"), (r"\boxed{5 EUR}", "5 USD"), (r"\boxed{9.95 m/s}", "9.8 ± 0.1 m/s"),
        (r"\boxed{5 m}", "5 m²"), (r"\boxed{5 °C}", "5 K"), (r"\boxed{about an hour}", "1 h"), (r"\boxed{0.25}", "25%"),
        (r"\boxed{33.333}", "33.333333333 km"),
    ],
)  # fmt: skip
def test_another_number_or_dimension_is_wrong(answer: str, gold: str) -> None:
    assert score_quantity(answer, gold) == "wrong"


def test_equal_quantities_have_one_final_answer_and_a_gold_without_a_number_gives_no_verdict() -> None:
    assert len({final_answer(text, "quantity") for text in ("1.5 h", "90 min", r"\boxed{1 h 30 min}")}) == 1
    assert score_quantity("5 kg", "a lot") == "unscored"


@settings(max_examples=60)
@given(
    st.fractions(min_value=-1000, max_value=1000, max_denominator=100),
    st.sampled_from([("km", "m", 1000), ("h", "min", 60), ("kg", "g", 1000), ("m²", "cm²", 10_000), ("L", "mL", 1000)]),
)
def test_a_quantity_converted_is_itself_and_a_hundredth_more_is_not(
    value: Fraction, units: tuple[str, str, int]
) -> None:
    big, small, factor = units
    gold = f"{value} {big}"
    assert score_quantity(rf"\boxed{{{value * factor} {small}}}", gold) == "right"
    assert score_quantity(rf"\boxed{{{value * factor + abs(value) * factor / 100 + 1} {small}}}", gold) == "wrong"


# --- mathematics


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        (r"\boxed{\dfrac12}", r"\frac{1}{2}"), (r"\boxed{0.5}", r"\frac{1}{2}"), (r"\boxed{1,234}", "1234"),
        (r"\boxed{\text{east}}", r"\text{east}"), (r"\boxed{ x + 1 }", "x+1"), (r"\boxed{-\frac{3}{4}}", "-3/4"),
        (r"\boxed{ \left( 3, \frac{\pi}{2} \right) }", r"(3,\frac{\pi}{2})"),
        (r"\boxed{1}, no, \boxed{18.90}", r"\$18.90"),
    ],
)  # fmt: skip
def test_most_mathematics_needs_no_algebra(answer: str, gold: str) -> None:
    assert quick_verdict(answer, gold, "math") == "right"
    assert score_math(answer, gold) == "right"


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        (r"\boxed{x+1}", "1+x"), (r"\boxed{(3,\pi/2)}", r"\left( 3, \frac{\pi}{2} \right)"), (r"\boxed{5}", "x=5"),
        (r"\boxed{\frac{\sqrt{2}}{2}}", r"\frac{1}{\sqrt{2}}"), (r"\boxed{5.4}", r"5.4 \text{ cents}"),
        ("so the value is $\\frac{1}{2}$.", "1/2"), (r"\boxed{\{3, 1\}}", r"\{1, 3\}"),
    ],
)  # fmt: skip
def test_equal_expressions_are_right(answer: str, gold: str) -> None:
    assert quick_verdict(answer, gold, "math") is None
    assert score_math(answer, gold) == "right"


@pytest.mark.parametrize("answer", ["", r"\boxed{}", r"\boxed{x+2}", r"\boxed{3}", "I do not know", r"\boxed{x"])
def test_other_expressions_are_wrong_and_an_unreadable_gold_gives_no_verdict(answer: str) -> None:
    assert score_math(answer, "x+1") == "wrong"
    assert score_math(r"\boxed{1}", r"\foo{") == "unscored"
    assert score_math(r"\boxed{1}", " ") == "unscored"


def test_numbers_and_equal_texts_have_one_final_answer() -> None:
    assert final_answer(r"\boxed{\dfrac{2}{4}}", "math") == final_answer(r"\boxed{0.5}", "math") == "1/2"
    assert final_answer(r"\boxed{x + 1}", "math") == final_answer(r"\boxed{x+1}", "math") == "x+1"
    assert final_answer("no box", "math") is None
    assert all(final_answer(rf"\boxed{{{empty}}}", "math") is None for empty in ("", " ", "$", r"\text{}", r"\!", "."))


# --- all of them

GOLDS = {
    "number": "42", "choice": "C", "exact": "Paris", "date": "2024-03-05", "quantity": "1.5 h", "math": "x+1",
}  # fmt: skip


@pytest.mark.parametrize("scorer", GOLDS)
@pytest.mark.parametrize(
    "piece",
    [r"\boxed{", "{", "}", "1,1", "-", "12", "x", "Answer: ", "答案是", "(", "1 h ", "5 March ", r"\text{", "\n"],
)
def test_a_megabyte_of_anything_is_judged_at_once(scorer: str, piece: str) -> None:
    text = piece * (1_000_000 // len(piece))
    began = time.process_time()
    assert quick_verdict(text, GOLDS[scorer], scorer) in ("wrong", None)
    assert quick_verdict(rf"\boxed{{{text}}}", GOLDS[scorer], scorer) in ("wrong", None)
    final_answer(text, scorer)
    assert time.process_time() - began < 4


@pytest.mark.parametrize("scorer", GOLDS)
@settings(max_examples=60, deadline=None)
@given(answer=st.text(), gold=st.text(), nested=st.integers(0, 30))
def test_any_answer_to_any_gold_gets_a_verdict_and_a_final_answer(
    scorer: str, answer: str, gold: str, nested: int
) -> None:
    for text in (answer, rf"\boxed{{{answer}}}", "{" * nested + answer + "}" * nested):
        assert quick_verdict(text, gold, scorer) in ("right", "wrong", "unscored", None)
        assert quick_verdict(text, GOLDS[scorer], scorer) in ("right", "wrong", None)
        assert final_answer(text, scorer) is None or final_answer(text, scorer)


@pytest.mark.parametrize("scorer", GOLDS)
def test_the_gold_in_a_box_is_right_and_the_last_of_several_boxes_counts(scorer: str) -> None:
    gold = GOLDS[scorer]
    assert SCORERS[scorer](rf"\boxed{{{gold}}}", gold) == "right"
    assert SCORERS[scorer](rf"\boxed{{7}} then \boxed{{{gold}}}", gold) == "right"
    assert SCORERS[scorer](rf"\boxed{{{gold}}} then \boxed{{7}}", gold) == "wrong"
