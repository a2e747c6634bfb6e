"""What one question is, what is known about a task, and how some of many questions are picked.

Knows nothing about where questions come from or how an answer is judged.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass

from dsr1kit.compare.arithmetic_texts import INSTRUCTION
from dsr1kit.errors import UsageError
from dsr1kit.records import Message

#: What is asked for when the answer is the letter of a choice.
_CHOICE = {
    "en": "Please reason step by step, and put the letter of your final answer within \\boxed{}.",
    "zh": "请逐步推理，并把最终答案的选项字母放在 \\boxed{} 中。",
}


@dataclass(frozen=True, slots=True)
class Item:
    """One question.

    Attributes:
        id: stable name, the same for the same question in every run.
        prompt: what is sent, with R1's instruction on the form of the answer at its end.
        gold: the right answer.
        kind: the kind of question inside the task.
        language: `en` or `zh`.
        scorer: a name in `scoring.SCORERS`.
        reference: what the scorer holds the answer against, where that is more than the gold; else empty.
    """

    id: str
    prompt: str
    gold: str
    kind: str
    language: str
    scorer: str = "number"
    reference: str = ""

    def messages(self) -> list[Message]:
        """The conversation that asks it: one user turn and no system prompt, as R1's card says."""
        return [{"role": "user", "content": self.prompt}]


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskFacts:
    """What is known about a task before anything of it is loaded.

    Attributes:
        source: where its questions come from: a hub id, a file, or words.
        revision: the commit of the source; empty where there is none, or none is pinned.
        size: how many questions there are; None: without end, or not known before loading.
        offline: whether it needs no network.
        samples: answers a question that DeepSeek's card, or custom, takes for pass@1.
        prompt_tokens, expected_completion_tokens: of one request, mean; None where nobody told.
        tokens_source: where these two were read; empty where they are None.
    """

    name: str
    title: str
    source: str
    revision: str = ""
    license: str = ""
    size: int | None = None
    offline: bool = True
    languages: tuple[str, ...] = ("en",)
    samples: int = 1
    prompt_tokens: float | None = None
    expected_completion_tokens: float | None = None
    tokens_source: str = ""


def with_instruction(question: str, scorer: str, language: str, between: str = "\n") -> str:
    """The question with R1's instruction on the form of the answer, unless it speaks of `\\boxed` itself."""
    if "\\boxed" in question:
        return question
    texts = _CHOICE if scorer == "choice" else INSTRUCTION
    return f"{question}{between}{texts['zh' if language == 'zh' else 'en']}"


def hashed(text: str) -> str:
    """Ten hex digits that name a text, for ids."""
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def digest(items: Sequence[Item]) -> str:
    """16 hex digits over all that is asked and judged, in order: equal for equal questions, golds and scorers."""
    # Where there is a reference the gold is for the reader only; some generators solve their puzzles by chance.
    told = [[i.id, i.prompt, i.reference or i.gold, i.kind, i.language, i.scorer] for i in items]
    return hashlib.sha256(json.dumps(told, ensure_ascii=True).encode()).hexdigest()[:16]


def pick(items: Sequence[Item], wanted: int, seed: int, task: str) -> list[Item]:
    """`wanted` of a task's items (0: all), the kinds in turn; the first of more are the same as of fewer.

    Raises:
        UsageError: more are wanted than there are.
    """
    if wanted > len(items):
        many = f"{len(items):,} question{'s' if len(items) > 1 else ''}"
        raise UsageError(f"task {task!r} has {many}, not {wanted:,}: ask for at most that many, or 0 for all")
    by_kind: dict[str, list[Item]] = {}
    for item in items:
        by_kind.setdefault(item.kind, []).append(item)
    for kind, group in by_kind.items():
        random.Random(f"{task}/{kind}/{seed}").shuffle(group)
    turns = max(map(len, by_kind.values()), default=0)
    picked = [group[turn] for turn in range(turns) for group in by_kind.values() if turn < len(group)]
    return picked[: wanted or len(picked)]
