"""The kit's own questions: every answer that a solver can find is found again, and every question reads as one.

A check computes its answer from the wording, in a namespace without files, imports or the item's own answer.
"""

from __future__ import annotations

import ast
import datetime as dt
import fractions
import functools
import itertools
import json
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from fractions import Fraction
from typing import Any

import pytest
import sympy as sp

from dsr1kit.compare.scoring import SCORERS
from dsr1kit.compare.tasks import load_task
from dsr1kit.paths import data_dir

FOLDER = data_dir() / "questions"
KINDS = ("arithmetic", "algebra", "counting", "logic", "dates_units", "factual")
FIELDS = ["id", "kind", "language", "question", "answer", "scorer", "level", "check"]
ITEMS: list[dict[str, Any]] = [
    json.loads(line) for kind in KINDS for line in (FOLDER / f"{kind}.jsonl").read_text("utf-8").splitlines()
]
SOLVED = [i for i in ITEMS if i["kind"] != "factual"]

SAFE = (
    *(abs, all, any, dict, divmod, enumerate, filter, frozenset, int, iter, len, list, map, max, min, next, pow),
    *(range, reversed, round, set, sorted, str, sum, tuple, zip),
)
CJK = re.compile(r"[\u3400-\u9fff]")
OPTION = re.compile(r"^([A-D])\) (.+)$", re.MULTILINE)
ORDERS = {
    "en": re.compile(r"\b(Answer|Compute|Expand|Find|Give|Solve|Write) "),
    "zh": re.compile(r"^(计算|化简|求|解)|[，。](求|用|计算)|化成|写成|单位用|用阿拉伯数字写"),
}


def only(values: Iterable[object]) -> object:
    """The one value among these; an answer that is not unique is no answer."""
    found: list[object] = []
    for value in values:
        if value not in found:
            found.append(value)
    if len(found) != 1:
        raise ValueError(f"one value was expected, found {found[:5]}")
    return found[0]


def evaluate(check: str) -> Any:
    """The value of a check, which sees mathematics and nothing else."""
    known = {m.__name__: m for m in (dt, fractions, functools, itertools, math)}
    names = {"__builtins__": {f.__name__: f for f in SAFE}, **known, "sp": sp, "only": only}
    return eval(check, names)  # noqa: S307 - expressions of this repository, with these names alone


@functools.cache
def solution(check: str) -> Any:
    return evaluate(check)


def stem(item: dict[str, Any]) -> str:
    """The question without its options."""
    return OPTION.sub("", item["question"]).rstrip("\n")


def found_again(item: dict[str, Any]) -> str:
    """What the check computes, written as an answer to the item."""
    value = solution(item["check"])
    if item["scorer"] == "choice":
        return str(only(letter for letter, text in OPTION.findall(item["question"]) if text == str(value)))
    if item["scorer"] == "quantity":
        amount, unit = value
        return f"{float(amount):.12g} {unit}"
    if item["scorer"] == "math":
        return str(sp.latex(value))
    return str(value.isoformat() if item["scorer"] == "date" else value)


def judged(answer: str, gold: str, scorer: str) -> str:
    return SCORERS[scorer](f"\\boxed{{{answer}}}", gold)


def corrupted(item: dict[str, Any]) -> list[str]:
    """Golds near the item's own, all of them wrong."""
    gold: str = item["answer"]
    if item["scorer"] == "number":
        right = Fraction(gold)
        return [str(right + 1), str(right - 1), str(right * 10 or 10), str(-right or 2)]
    if item["scorer"] == "choice":
        return [letter for letter in "ABCD" if letter != gold]
    if item["scorer"] == "date":
        day = dt.date.fromisoformat(gold)
        return [(day + dt.timedelta(days=n)).isoformat() for n in (-1, 1, 365)]
    if item["scorer"] == "quantity":
        amount, unit = gold.split(" ", 1)
        return [f"{Fraction(amount) + 1} {unit}", f"{amount} {'kg' if unit != 'kg' else 'h'}"]
    if item["scorer"] == "math":
        return [f"{gold}+1", f"-({gold})"]
    return [other["answer"] for other in SOLVED if other["scorer"] == "exact" and other["answer"] != gold]


def plain(text: str) -> str:
    """A question for comparison: its letters and signs in lower case without punctuation, every number alike."""
    text = re.sub(r"\d+(?:[.,]\d+)*", "0", unicodedata.normalize("NFKC", text).casefold())
    return re.sub(r"[\s.,;:?!'\"“”‘’()。、…]+", "", text)


def figures(text: str) -> list[Fraction]:
    """The numbers that stand in a text, in order of size."""
    return sorted(Fraction(n.replace(",", "")) for n in re.findall(r"\d+(?:,\d{3})*(?:\.\d+)?", text, re.ASCII))


@pytest.mark.parametrize("item", SOLVED, ids=lambda i: i["id"])
def test_the_check_finds_the_answer_again(item: dict[str, Any]) -> None:
    assert judged(found_again(item), item["answer"], item["scorer"]) == "right", solution(item["check"])


def test_a_corrupted_answer_disagrees_with_its_check() -> None:
    unnoticed = [
        (item["id"], gold)
        for item in SOLVED
        for gold in corrupted(item)
        if judged(found_again(item), gold, item["scorer"]) != "wrong"
    ]
    assert unnoticed == []
    assert sum(len(corrupted(item)) for item in SOLVED) > 3 * len(SOLVED)


@pytest.mark.parametrize("item", ITEMS, ids=lambda i: i["id"])
def test_the_answer_in_a_box_is_judged_right(item: dict[str, Any]) -> None:
    alternatives = item["answer"].split(" | ") if item["scorer"] == "exact" else [item["answer"]]
    assert {judged(one, item["answer"], item["scorer"]) for one in alternatives} == {"right"}


def test_a_check_computes_and_does_not_recite() -> None:
    for item in SOLVED:
        tree = ast.parse(item["check"], mode="eval")
        assert any(isinstance(node, (ast.Call, ast.BinOp)) for node in ast.walk(tree)), item["id"]
        if item["scorer"] in ("number", "date"):
            recited = {str(node.value) for node in ast.walk(tree.body) if isinstance(node, ast.Constant)}
            told = {str(n) for n in figures(item["question"])} | {str(n) for n in range(41)}
            assert item["answer"] not in recited - told, item["id"]


@pytest.mark.parametrize("check", ["open('answers')", "__import__('os')", "only(range(2))", "only([])"])
def test_a_check_reaches_nothing_outside_and_takes_no_answer_of_two(check: str) -> None:
    with pytest.raises((NameError, ValueError)):
        evaluate(check)


def test_every_item_has_all_its_fields_and_a_name_of_its_own() -> None:
    for item in ITEMS:
        factual = item["kind"] == "factual"
        assert list(item) == FIELDS + ["source"] * factual
        assert item["scorer"] in SCORERS
        assert bool(item["check"]) != factual
        assert item.get("source") != ""
    for kind in KINDS:
        for language in ("en", "zh"):
            ids = [i["id"] for i in ITEMS if (i["kind"], i["language"]) == (kind, language)]
            assert ids == [f"{kind}-{language}-{n:03d}" for n in range(1, len(ids) + 1)]


def test_there_are_enough_of_every_kind_language_and_level() -> None:
    assert len(ITEMS) >= 240
    assert {path.name for path in FOLDER.iterdir()} == {f"{kind}.jsonl" for kind in KINDS} | {"README.md"}
    assert min(Counter(i["kind"] for i in ITEMS).values()) >= 30
    assert min(Counter((i["kind"], i["language"]) for i in ITEMS).values()) >= 15
    languages = Counter(i["language"] for i in ITEMS)
    assert set(languages) == {"en", "zh"}
    assert abs(languages["en"] - languages["zh"]) <= len(ITEMS) // 20
    levels = Counter(i["level"] for i in ITEMS)
    assert set(levels) == {1, 2, 3, 4}
    assert min(levels.values()) >= len(ITEMS) // 8


def test_the_task_asks_them_all_as_they_are_written() -> None:
    asked = {i.id: i for i in load_task("questions", 0)}
    assert asked.keys() == {i["id"] for i in ITEMS}
    for item in ITEMS:
        loaded = asked[item["id"]]
        assert loaded.prompt.startswith(item["question"])
        assert "\\boxed{}" in loaded.prompt.removeprefix(item["question"])
        assert (loaded.gold, loaded.scorer, loaded.kind, loaded.language) == tuple(
            item[field] for field in ("answer", "scorer", "kind", "language")
        )
    for part in (*KINDS, "en", "zh"):
        ids = {i["id"] for i in ITEMS if part in (i["kind"], i["language"])}
        assert {i.id for i in load_task(f"questions:{part}", 0)} == ids


def test_no_question_is_asked_twice() -> None:
    assert len({plain(i["question"]) for i in ITEMS}) == len(ITEMS)
    for language, n, most in (("en", 5, 0.6), ("zh", 2, 0.6)):
        group = [(i["id"], plain(stem(i))) for i in ITEMS if i["language"] == language]
        pieces = [(name, {text[k : k + n] for k in range(len(text) - n + 1)}) for name, text in group]
        alike = [
            (a, b) for (a, one), (b, two) in itertools.combinations(pieces, 2) if len(one & two) > most * len(one | two)
        ]
        assert alike == []


def test_at_most_a_quarter_are_one_question_in_two_languages() -> None:
    def gist(item: dict[str, Any]) -> tuple[object, ...]:
        return (item["kind"], item["answer"], *figures(stem(item)))

    english = {gist(i) for i in ITEMS if i["language"] == "en" and figures(stem(i))}
    pairs = [i["id"] for i in ITEMS if i["language"] == "zh" and gist(i) in english]
    assert 2 * len(pairs) <= len(ITEMS) // 4, pairs


@pytest.mark.parametrize("item", ITEMS, ids=lambda i: i["id"])
def test_the_wording_is_a_question_or_an_order_in_its_language(item: dict[str, Any]) -> None:
    question, language = item["question"], item["language"]
    assert question == question.strip()
    assert not re.search(r"[ \t]\n|\n\n|  |\t", question)
    assert ("\n" in question) == (item["scorer"] == "choice")
    assert unicodedata.is_normalized("NFC", question)
    assert stem(item).endswith({"en": ("?", "."), "zh": ("？", "。")}[language])
    assert "?" in question or "？" in question or ORDERS[language].search(stem(item))
    if language == "en":
        assert not CJK.search(question)
    else:
        assert len(CJK.findall(question)) >= 2
        assert not re.search(r"(?!log)[a-z]{3}", question), "an English word"
        assert not re.search(r"[\u3400-\u9fff][,.?;:!]|[,?;:][\u3400-\u9fff]", question)


@pytest.mark.parametrize("item", ITEMS, ids=lambda i: i["id"])
def test_the_question_does_not_give_its_answer_away(item: dict[str, Any]) -> None:
    answer, question = item["answer"], item["question"]
    if item["scorer"] in ("number", "quantity"):
        amount = answer.split(" ")[0]
        assert {str(n) for n in figures(question)} != {amount}
        assert Fraction(amount) == Fraction(re.sub(r"^-?0*(?=\d)", lambda m: "-" * m[0].count("-"), amount))
        assert "/" not in amount or str(Fraction(amount)) == amount
    if item["scorer"] == "exact":
        assert not any(
            re.search(rf"(?<![A-Za-z]){re.escape(one)}(?![A-Za-z])", question) for one in answer.split(" | ")
        )


def test_choices_are_four_different_ones_and_no_letter_is_favoured() -> None:
    choices = [i for i in ITEMS if i["scorer"] == "choice"]
    for item in choices:
        options = OPTION.findall(item["question"])
        assert "".join(letter for letter, _ in options) == "ABCD", item["id"]
        assert len({text for _, text in options}) == 4
        assert item["question"].split("\n")[1:] == [f"{letter}) {text}" for letter, text in options]
    for language in ("en", "zh"):
        letters = Counter(i["answer"] for i in choices if i["language"] == language)
        assert set(letters) == set("ABCD")
        assert max(letters.values()) - min(letters.values()) <= 1, letters


def test_the_readme_counts_what_is_there() -> None:
    readme = (FOLDER / "README.md").read_text("utf-8")
    told = {
        cells[0]: [int(c.replace(",", "")) for c in cells[1:]]
        for line in readme.splitlines()
        if len(cells := [c.strip(" `*") for c in line.strip("|").split("|")]) == 8 and cells[1].isdigit()
    }

    def row(items: list[dict[str, Any]]) -> list[int]:
        languages, levels = Counter(i["language"] for i in items), Counter(i["level"] for i in items)
        return [languages["en"], languages["zh"], *(levels[n] for n in range(1, 5)), len(items)]

    assert told == {kind: row([i for i in ITEMS if i["kind"] == kind]) for kind in KINDS} | {"all": row(ITEMS)}
