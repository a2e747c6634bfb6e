"""What is asked: items with a question and a gold answer, by task name.

Knows nothing about channels; a task is a list of items and the scorer that judges their answers.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from dsr1kit.compare import arithmetic
from dsr1kit.errors import UnknownName, UsageError
from dsr1kit.records import Message

TASKS = ("arithmetic", *(f"arithmetic:{kind}" for kind in arithmetic.KINDS))


@dataclass(frozen=True, slots=True)
class Item:
    """One question.

    Attributes:
        id: stable name, the same for the same question in every run.
        prompt: what is sent, with R1's instruction for mathematics at its end.
        gold: the right answer.
        kind: the kind of question inside the task.
    """

    id: str
    prompt: str
    gold: str
    kind: str
    language: str

    def messages(self) -> list[Message]:
        """The conversation that asks it: one user turn and no system prompt, as R1's card says."""
        return [{"role": "user", "content": self.prompt}]


def load_task(name: str, items: int, seed: int = 0) -> list[Item]:
    """The first `items` items of a task, the same ones for the same seed.

    `arithmetic` takes what tiny-r1 was taught, kind by kind, from the held-out side; `arithmetic:KIND`
    one kind, the untaught `remainder7` and `sum4` included.

    Raises:
        UnknownName: no such task; UsageError: fewer than one item, or more than there are.
    """
    if name not in TASKS:
        raise UnknownName("task", name, TASKS)
    if items < 1:
        raise UsageError(f"a run needs at least one item, not {items}")
    _, _, kind = name.partition(":")
    problems = arithmetic.generate(kind or arithmetic.TAUGHT, "held_out", items, seed)
    return [
        Item(
            id=f"{p.kind}-{hashlib.sha256(p.question.encode()).hexdigest()[:10]}",
            prompt=f"{p.question} {arithmetic.INSTRUCTION[p.language]}",
            gold=str(p.value),
            kind=p.kind,
            language=p.language,
        )
        for p in problems
    ]
