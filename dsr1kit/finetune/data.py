"""Training examples: what was asked, how it was thought through, what was answered; read from any common form.

An `Example` is one answer with its reasoning. Files, hub sets, worked problems and what a teacher wrote all become
lists of them. Knows nothing about tokenizers or models.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from dsr1kit.compare.arithmetic import KINDS
from dsr1kit.compare.file_rows import rows_of
from dsr1kit.compare.items import hashed, with_instruction
from dsr1kit.compare.scoring import SCORERS
from dsr1kit.compare.task_files import guessed_scorer
from dsr1kit.errors import RunError, UnknownName, UsageError
from dsr1kit.records import Message

#: The longest line, in bytes: a trace may have a hundred thousand tokens.
LONGEST_LINE = 16_000_000
WORKED, SET = "worked:", "set:"

_CHINESE = re.compile(r"[\u3400-\u9fff]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One answer to train on.

    Attributes:
        messages: the turns before the answer; the last one is the user's.
        reasoning: what stands between the think tags, without them.
        answer: what follows the thinking.
        gold: the right answer, where it is known; else empty.
        scorer: how the answer is held against the gold: a name in `scoring.SCORERS`.
        kind: the kind of question.
        language: `en` or `zh`.
        id: stable name.
        source: where it came from, for messages: a file with its line, a set with its row, a generator, a teacher.
    """

    messages: tuple[Message, ...]
    reasoning: str
    answer: str
    gold: str = ""
    scorer: str = "math"
    kind: str = ""
    language: str = "en"
    id: str = ""
    source: str = ""

    @property
    def question(self) -> str:
        """The last user turn."""
        return self.messages[-1]["content"]


def example(
    question: str,
    reasoning: str,
    answer: str,
    *,
    before: Sequence[Message] = (),
    gold: str = "",
    scorer: str = "",
    kind: str = "",
    language: str = "",
    source: str = "",
) -> Example:
    """An Example from its texts; scorer, language and id are made up from them where not given."""
    reasoning, answer = reasoning.strip("\n"), answer.strip()
    return Example(
        messages=(*before, {"role": "user", "content": question}),
        reasoning=reasoning,
        answer=answer,
        gold=gold,
        scorer=scorer or (guessed_scorer(gold) if gold else "math"),
        kind=kind,
        language=language or ("zh" if _CHINESE.search(question) else "en"),
        id=hashed("\n".join([*(turn["content"] for turn in before), question, reasoning, answer])),
        source=source,
    )


def load_examples(names: Sequence[str], *, limit: int | None = None, seed: int = 0) -> list[Example]:
    """All examples of several sources, in their order.

    Args:
        names: each a JSONL or CSV file (the forms of `forms.read_row`), `set:NAME` (a public set of
            data/trainsets.toml, or any hub id as `set:org/name`), or `worked:TASK` (problems that the kit
            generates and works out itself, from the training side; `worked:TASK:N` for so many).
        limit: at most so many of each.
        seed: of worked problems.

    Raises:
        UnknownName, UsageError: no such source, or a line at fault.
        RunError: a public set could not be reached; MissingExtra: a package for it is not installed.
    """
    if not names:
        raise UsageError("name some data: a .jsonl or .csv file, set:NAME or worked:TASK")
    found: list[Example] = []
    for name in names:
        if name.startswith(WORKED):
            from dsr1kit.finetune import worked

            found += worked.examples_named(name.removeprefix(WORKED), limit, seed)
        elif name.startswith(SET):
            from dsr1kit.finetune import trainsets

            found += trainsets.load(name.removeprefix(SET), limit)
        else:
            found += read_file(Path(name).expanduser())[:limit]
    return found


def read_file(path: Path) -> list[Example]:
    """All examples of a JSONL or CSV file.

    Raises:
        UsageError: there is no such file, it is empty, or a line is at fault; the message names file and line.
    """
    from dsr1kit.finetune.forms import FORMS, read_row

    found: list[Example] = []
    known = {column for form in FORMS for column in form.columns}
    with rows_of(path, (), known, longest=LONGEST_LINE, what="training data", holds="training example") as rows:
        for line, row in rows:
            found += read_row(row, f"{path}, line {line}")
    if not found:
        raise UsageError(
            f'{path} holds no examples: write one a line, as {{"question": "1 + 1 = ?", "reasoning": "1+1=2", '
            '"answer": "The answer is \\\\boxed{2}."}'
        )
    return found


def write_file(examples: Iterable[Example], path: Path) -> Path:
    """Write examples as JSONL that `read_file` reads back alike; returns the path. Raises RunError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(as_row(one), ensure_ascii=False) + "\n" for one in examples)
    except OSError as error:
        raise RunError(f"{path} cannot be written: {error.strerror}") from None
    return path


def as_row(one: Example) -> dict[str, Any]:
    """An example as a line of JSONL: `question`, or `messages` where there were turns before it."""
    row = {key: value for key, value in asdict(one).items() if key not in ("messages", "id", "source") and value}
    # White space around a question stands in chats, which are read as they are.
    alone = len(one.messages) == 1 and one.question == one.question.strip()
    asked: dict[str, Any] = {"question": one.question} if alone else {"messages": [dict(turn) for turn in one.messages]}
    return asked | {"reasoning": one.reasoning, "answer": one.answer} | row


def instructed(examples: Iterable[Example], share: float = 1.0) -> list[Example]:
    """The same with R1's instruction on the form of the answer behind a share of the questions, as they are asked.

    Questions that speak of `\\boxed` keep their words. Which ones get it hangs on their ids alone.
    """
    if not 0 <= share <= 1:
        raise UsageError(f"the share of instructed questions must be from 0 to 1, not {share}")
    found = []
    for one in examples:
        if int(hashed(one.id)[:6], 16) < share * 0x1000000:
            said = with_instruction(one.question, one.scorer, one.language, " " if one.kind in KINDS else "\n")
            one = replace(one, messages=(*one.messages[:-1], {"role": "user", "content": said}))
        found.append(one)
    return found


def known_scorer(name: str, where: str) -> str:
    """The name, where it is a scorer's. Raises UsageError."""
    if name not in SCORERS:
        raise UsageError(f"{where}: {UnknownName('scorer', name, SCORERS)}")
    return name
