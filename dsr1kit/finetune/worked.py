"""Problems that the kit generates and works out itself, as training examples: `worked:TASK`.

The kinds of `arithmetic`, from the side that evaluation never asks; and reasoning-gym's chain_sum with a trace in
tens and ones. Knows nothing about tokenizers or training.
"""

from __future__ import annotations

import re

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
    """`n` questions of reasoning-gym's chain_sum, worked out from left to right in tens and ones."""
    found = []
    for item in gym.load(task, n, seed + _APART):
        chain = _CHAIN.search(item.prompt)
        if chain is None:
            raise UsageError(f"reasoning-gym's chain_sum has other words than those known: {item.prompt[:80]!r}")
        trace, value = tens_and_ones(chain.group())
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


def tens_and_ones(chain: str) -> tuple[str, int]:
    """A trace for sums and differences such as `64 + 25 - 3`, every line true, and the value.

    Each step takes the number away in its decimal parts, the largest first, which a small model learns sooner than
    a running total alone.
    """
    first, *rest = chain.split()
    total, lines = int(first), []
    for sign, text in zip(rest[::2], rest[1::2], strict=True):
        less = "-" if text.startswith("-") else ""
        for part in _parts(abs(int(text))):
            step = part if (sign == "+") == (not less) else -part
            lines.append(f"{total} {sign} {less}{part} = {total + step}")
            total += step
    return "\n".join(lines), total


def _parts(number: int) -> list[int]:
    digits = str(number)
    parts = [int(digit) * 10 ** (len(digits) - 1 - at) for at, digit in enumerate(digits)]
    return [part for part in parts if part] or [0]
