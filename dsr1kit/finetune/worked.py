"""Problems that the kit generates and works out itself, as training examples: `worked:TASK`.

The kinds of `arithmetic`, from the side that evaluation never asks; and reasoning-gym's chain_sum with a trace in
tens and ones. Knows nothing about tokenizers or training.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from dsr1kit.compare import arithmetic, gym
from dsr1kit.errors import UnknownName, UsageError
from dsr1kit.finetune.data import Example, example

#: Examples of one source where no number is asked for.
USUAL = 2_000
CHAIN_SUM = f"{gym.PREFIX}chain_sum"
_PATIENCE = 20_000  # draws without a new problem after which there are no more
_APART = 1_000_003  # a generator's questions hang on the seed: those trained on are not those asked to measure
_CHAIN = re.compile(r"-?\d+(?: [+-] -?\d+)+")


def examples_named(name: str, limit: int | None, seed: int) -> list[Example]:
    """The examples that `TASK` or `TASK:N` means.

    Args:
        name: `arithmetic` (all that tiny-r1 was taught, in turn), `arithmetic:KIND`, or
            `reasoning-gym:chain_sum` with options as in `gym.load`; `:N` behind it for so many.
        limit: at most so many.
        seed: of the problems.

    Raises:
        UnknownName: no such task; UsageError: fewer than one, or more than there are.
    """
    task, _, number = name.rpartition(":")
    n = USUAL
    if task and number.isdigit():
        n = int(number)
    else:
        task = name
    n = n if limit is None else min(n, limit)
    if n < 1:
        raise UsageError(f"worked:{name} must give at least one example")
    if task.partition(":")[0] == "arithmetic":
        return arithmetic_examples(task, n, seed)
    if task == CHAIN_SUM or task.startswith(f"{CHAIN_SUM}:"):
        return chain_sums(task, n, seed)
    known = ["arithmetic", *(f"arithmetic:{kind}" for kind in arithmetic.KINDS), CHAIN_SUM]
    raise UnknownName("worked task", task, known)


def arithmetic_examples(task: str, n: int, seed: int) -> list[Example]:
    """`n` problems of `arithmetic` or `arithmetic:KIND` with the traces that tiny-r1 was taught, no two alike."""
    _, _, kind = task.partition(":")
    kinds = (kind,) if kind else arithmetic.TAUGHT
    streams = [arithmetic.stream(name, "train", seed) for name in kinds]
    found: dict[str, Example] = {}
    drawn = new = 0
    while drawn - new < _PATIENCE:
        problem = next(streams[drawn % len(streams)])
        drawn += 1
        if not arithmetic.trainable(problem):
            continue  # its trace would show what is asked to see what was forgotten
        one = example(
            problem.question, problem.reasoning, problem.answer, gold=str(problem.value), scorer="number",
            kind=problem.kind, language=problem.language, source=f"worked:{task}",
        )  # fmt: skip
        if one.id not in found:
            found[one.id], new = one, drawn
        if len(found) == n:
            return list(found.values())
    raise UsageError(f"worked:{task} has {len(found):,} different problems, not {n:,}: ask for at most that many")


def chain_sums(task: str, n: int, seed: int) -> list[Example]:
    """`n` questions of reasoning-gym's chain_sum, worked out in tens and ones."""
    found = []
    for item in gym.load(task, n, seed + _APART):
        chain = _CHAIN.search(item.prompt)
        if chain is None:
            raise UsageError(f"reasoning-gym's chain_sum has other words than those known: {item.prompt[:80]!r}")
        trace, value = in_tens_and_ones(chain.group())
        found.append(
            example(
                item.prompt,
                trace,
                f"The answer is \\boxed{{{value}}}.",
                gold=item.gold,
                scorer="number",
                kind=item.kind,
                source=f"worked:{task}",
            )
        )
    return found


def in_tens_and_ones(chain: str) -> tuple[str, int]:
    """A trace for sums and differences such as `64 + 25 - 93`, every line true, and the value.

    What is added is put together, then what is taken away, then the smaller of both is taken from the larger, and the
    sign stands in the last line: a small model that counts below zero goes astray. A number is added or taken away in
    its decimal parts, the largest first, which is learnt sooner than a running total alone.
    """
    first, *rest = chain.split()
    signed = zip(["+", *rest[::2]], [first, *rest[1::2]], strict=True)
    terms = [int(text) if sign == "+" else -int(text) for sign, text in signed]
    plus, minus = [term for term in terms if term >= 0], [-term for term in terms if term < 0]
    lines: list[str] = []
    more, less = (_moved(each[0], "+", each[1:], lines) if each else 0 for each in (plus, minus))
    if minus:
        lines.append(f"{more} {'<' if more < less else '>' if more > less else '='} {less}")
        _moved(max(more, less), "-", [min(more, less)], lines)
        if more < less:
            lines.append(f"{more} - {less} = {more - less}")
    return "\n".join(lines) or first, more - less


def _moved(total: int, sign: str, numbers: Sequence[int], lines: list[str]) -> int:
    """`total` with the numbers added or taken away, part by part; each step becomes a line."""
    for number in numbers:
        digits = str(number)
        parts = [int(digit) * 10 ** (len(digits) - 1 - at) for at, digit in enumerate(digits)]
        for part in [part for part in parts if part] or [0]:
            made = total + part if sign == "+" else total - part
            lines.append(f"{total} {sign} {part} = {made}")
            total = made
    return total
