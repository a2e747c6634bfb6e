"""Procedurally generated arithmetic with worked traces: what tiny-r1 was taught, and two tasks it was not.

A problem knows its question, a trace in which every line is true, and its answer. Every operation that a
problem performs (the operation's name and its operands) falls by a hash on the training or on the held-out
side, so that no held-out sum, bare or inside a word problem, was ever trained on.

Knows nothing about models, tokenizers or scoring.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from dsr1kit.compare import arithmetic_texts as texts
from dsr1kit.compare.arithmetic_traces import (
    SIGNS,
    apply,
    compare_numbers,
    false_statements,
    pick,
    remainder_by_seven,
    solve,
)
from dsr1kit.errors import UnknownName, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

__all__ = [
    "INSTRUCTION",
    "KINDS",
    "TAUGHT",
    "UNTAUGHT",
    "Language",
    "Problem",
    "Split",
    "false_statements",
    "generate",
    "side_of",
    "steps_of",
    "stream",
]

Split = Literal["train", "held_out"]
Language = texts.Language
#: R1's own advice for mathematics, by language.
INSTRUCTION = texts.INSTRUCTION
Step = tuple[str, tuple[int, ...]]

#: What tiny-r1 was trained on.
TAUGHT = ("sum2", "sum3", "difference", "product", "comparison", "words_en", "words_zh")
#: Never in its training data: what fine-tuning can teach.
UNTAUGHT = ("remainder7", "sum4")
KINDS = TAUGHT + UNTAUGHT

# Three-digit numbers are only 900: one in eight would leave too few to measure on.
_HELD_OUT_EIGHTHS = {"remainder": 3}
_COMMUTATIVE = frozenset({"sum", "product", "comparison"})


@dataclass(frozen=True, slots=True)
class Problem:
    """One question with its worked solution.

    Attributes:
        kind: one of `KINDS`.
        language: of question, trace and answer, `en` or `zh`.
        question: what is asked, without any instruction on form.
        reasoning: the trace, true line by line, as it stands between the think tags.
        answer: the sentence after the thinking, with the number in `\\boxed{}`.
        operands: the numbers, in the order in which the operation takes them.
        operation: `sum`, `difference`, `product`, `comparison`, `remainder`, or two joined by `_`, the
            second taking the result of the first and the last operand.
        value: the right number.
    """

    kind: str
    language: Language
    question: str
    reasoning: str
    answer: str
    operands: tuple[int, ...]
    operation: str
    value: int

    @property
    def steps(self) -> tuple[Step, ...]:
        """The operations performed, each with its operands in an order that does not matter."""
        return steps_of(self.operation, self.operands)


def steps_of(operation: str, operands: Sequence[int]) -> tuple[Step, ...]:
    """Return the single operations within `operation`, commutative operands sorted."""
    first, _, second = operation.partition("_")
    if not second:
        numbers = tuple(sorted(operands)) if first in _COMMUTATIVE else tuple(operands)
        return ((first, numbers),)
    between = apply(first, operands[:2])
    return steps_of(first, operands[:2]) + steps_of(second, (between, operands[2]))


def side_of(operation: str, operands: Sequence[int]) -> Split | None:
    """Return the side on which a problem falls; None when its two steps fall on different sides.

    A step is held out when the sha256 of its name and operands says so: one in eight (remainders: three).
    """
    sides = {_step_side(step) for step in steps_of(operation, operands)}
    return sides.pop() if len(sides) == 1 else None


def _step_side(step: Step) -> Split:
    name, numbers = step
    text = f"{name}:{','.join(map(str, numbers))}"
    held_out = hashlib.sha256(text.encode()).digest()[0] % 8 < _HELD_OUT_EIGHTHS.get(name, 1)
    return "held_out" if held_out else "train"


# --- questions -------------------------------------------------------------------------------------------


def _finish(
    kind: str,
    language: Language,
    question: str,
    lines: list[str],
    operation: str,
    operands: Sequence[int],
    value: int,
) -> Problem:
    answer = pick(language, f"The answer is \\boxed{{{value}}}.", f"答案是 \\boxed{{{value}}}。")
    return Problem(kind, language, question, "\n".join(lines), answer, tuple(operands), operation, value)


def _number(rng: random.Random, fewest: int, most: int) -> int:
    """Draw a number of `fewest` to `most` digits, every length as likely."""
    length = rng.randint(fewest, most)
    return rng.randint(10 ** (length - 1) if length > 1 else 1, 10**length - 1)


def _language(rng: random.Random) -> Language:
    return "zh" if rng.random() < 0.3 else "en"


def _bare(kind: str, operation: str, operands: Sequence[int], rng: random.Random) -> Problem:
    language = _language(rng)
    text = f" {SIGNS[operation]} ".join(map(str, operands))
    question = rng.choice(texts.BARE[language]).format(text)
    lines, value = solve(operation, operands, language)
    return _finish(kind, language, question, lines, operation, operands, value)


def _sum2(rng: random.Random) -> Problem:
    return _bare("sum2", "sum", [_number(rng, 2, 4), _number(rng, 1, 4)], rng)


def _sum3(rng: random.Random) -> Problem:
    return _bare("sum3", "sum", [_number(rng, 2, 3) for _ in range(3)], rng)


def _sum4(rng: random.Random) -> Problem:
    """Worked out as three sums of two, which tiny-r1 knows: what is new is to chain them."""
    operands = [rng.randint(10, 99) for _ in range(4)]
    problem = _bare("sum4", "sum", operands, rng)
    lines, total = ["+".join(map(str, operands))], operands[0]
    for operand in operands[1:]:
        more, total = solve("sum", (total, operand), problem.language)
        lines += more
    return replace(problem, reasoning="\n".join(lines))


def chained(operands: Sequence[int]) -> list[Step]:
    """The sums of two by which a sum of several is worked out."""
    totals = [sum(operands[:at]) for at in range(1, len(operands))]
    return [
        step for total, operand in zip(totals, operands[1:], strict=True) for step in steps_of("sum", (total, operand))
    ]


def trainable(problem: Problem) -> bool:
    """Whether none of the sums of two by which a sum of four is worked out is one that is asked to measure.

    The side that a problem is on does not tell: the two kinds are put on their sides by themselves.
    """
    return problem.kind != "sum4" or all(side_of(*step) == "train" for step in chained(problem.operands))


def _difference(rng: random.Random) -> Problem:
    numbers = sorted((_number(rng, 2, 4), _number(rng, 1, 4)), reverse=True)
    return _bare("difference", "difference", numbers, rng)


def _product(rng: random.Random) -> Problem:
    factors = [rng.randint(2, 9), _number(rng, 2, 3)]
    rng.shuffle(factors)
    return _bare("product", "product", factors, rng)


def _comparison(rng: random.Random) -> Problem:
    language, larger, length = _language(rng), rng.random() < 0.5, rng.randint(2, 4)
    first = _number(rng, length, length)
    numbers = [first]
    count = rng.randint(2, 4)
    while len(numbers) < count:
        # Neighbours share leading digits, so that the first digit alone rarely decides.
        near = first + rng.choice((-1, 1)) * rng.randint(1, 10 ** rng.randint(1, length))
        if near > 9 and near not in numbers:
            numbers.append(near)
    rng.shuffle(numbers)
    which = texts.COMPARE[language, larger]
    question = rng.choice(which).format(pick(language, ", ", "、").join(map(str, numbers)))
    lines = compare_numbers(numbers, language, larger=larger)
    value = max(numbers) if larger else min(numbers)
    return _finish("comparison", language, question, lines, "comparison", numbers, value)


def _remainder7(rng: random.Random) -> Problem:
    language, number = _language(rng), rng.randint(100, 999)
    question = rng.choice(texts.REMAINDER[language]).format(number)
    lines = remainder_by_seven(number)
    return _finish("remainder7", language, question, lines, "remainder", [number, 7], number % 7)


def _word_problem(kind: str, language: Language, rng: random.Random) -> Problem:
    operation = rng.choice(tuple(texts.STORIES[language]))
    a, b, c = _story_numbers(operation, rng)
    things, people = texts.THINGS[language], texts.PEOPLE[language]
    who, other = rng.sample(people, 2)
    question = rng.choice(texts.STORIES[language][operation]).format(
        a=a, b=b, c=c, who=who, other=other, thing=rng.choice(things)
    )
    operands = (a, b, c) if "_" in operation else (a, b)
    lines, value = solve(operation, operands, language)
    return _finish(kind, language, question, lines, operation, operands, value)


def _story_numbers(operation: str, rng: random.Random) -> tuple[int, int, int]:
    """Draw operands whose results, first and last, stay positive."""
    while True:
        product = operation.startswith("product")
        a = rng.randint(2, 9) if product else _number(rng, 2, 3)
        b, c = _number(rng, 2, 3) if not product else _number(rng, 2, 2), _number(rng, 2, 2)
        first, _, second = operation.partition("_")
        value = apply(first, (a, b))
        if value > 0 and (not second or apply(second, (value, c)) > 0):
            return a, b, c


def _words_en(rng: random.Random) -> Problem:
    return _word_problem("words_en", "en", rng)


def _words_zh(rng: random.Random) -> Problem:
    return _word_problem("words_zh", "zh", rng)


_MAKERS: dict[str, Callable[[random.Random], Problem]] = {
    "sum2": _sum2,
    "sum3": _sum3,
    "difference": _difference,
    "product": _product,
    "comparison": _comparison,
    "words_en": _words_en,
    "words_zh": _words_zh,
    "remainder7": _remainder7,
    "sum4": _sum4,
}


# --- drawing ---------------------------------------------------------------------------------------------


def stream(kind: str, split: Split, seed: int) -> Iterator[Problem]:
    """Yield problems of one kind and side without end; they may repeat. Raises UnknownName."""
    if kind not in _MAKERS:
        raise UnknownName("kind of problem", kind, _MAKERS)
    if split not in ("train", "held_out"):
        raise UnknownName("split", split, ("train", "held_out"))
    # Seeding by text is stable over Python versions; hash() is not.
    rng = random.Random(f"{kind}/{split}/{seed}")
    while True:
        problem = _MAKERS[kind](rng)
        if side_of(problem.operation, problem.operands) == split:
            yield problem


def generate(kinds: Sequence[str] | str, split: Split, n: int, seed: int = 0) -> list[Problem]:
    """Draw `n` problems in all, the kinds taking turns, the same ones for the same arguments.

    Held-out problems are unique in what they compute; training problems may repeat.

    Raises:
        UnknownName: a kind or split that does not exist.
        UsageError: more held-out problems are wanted than there are.
    """
    names = (kinds,) if isinstance(kinds, str) else tuple(kinds)
    if not names or n < 0:
        raise UsageError(f"generate needs at least one kind and n >= 0, not {names!r} and {n!r}")
    streams = [stream(name, split, seed) for name in names]
    seen: set[object] = set()
    problems: list[Problem] = []
    for index in range(n):
        for _ in range(20_000):
            problem = next(streams[index % len(streams)])
            key = (problem.kind, problem.steps)
            if split == "train" or key not in seen:
                break
        else:
            raise UsageError(f"no more held-out problems of kind {problem.kind}: ask for fewer than {n}")
        seen.add(key)
        problems.append(problem)
    return problems
