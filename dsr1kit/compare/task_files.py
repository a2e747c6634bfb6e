"""A person's own questions: JSONL or CSV with `question` and `answer`, read line by line, each fault with its line.

Optional columns: `id`, `kind`, `language` (`en` or `zh`), `scorer`. Knows nothing about what the answers will be.
"""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from dsr1kit.compare.file_rows import meant, rows_of
from dsr1kit.compare.items import Item, hashed, with_instruction
from dsr1kit.compare.scoring import SCORERS, as_number
from dsr1kit.errors import UnknownName, UsageError

PREFIX = "file:"
#: The longest line, in bytes: no question is that long, and a file without line ends must not fill the memory.
LONGEST_LINE = 1_000_000
COLUMNS = ("question", "answer", "id", "kind", "language", "scorer")

_CHINESE = re.compile(r"[\u3400-\u9fff]")
_LATEX = re.compile(r"[\\$^]|_\{")
_NAMED = tuple(name for name in SCORERS if name != "reasoning-gym")


def load(path: str | Path) -> list[Item]:
    """All items of a file, in its order.

    A missing scorer is guessed from the answer: a number is a `number`, one letter from A to E a `choice`, an ISO
    date a `date`, anything with LaTeX in it `math`, the rest `exact`. A missing language is `zh` where the question
    holds Chinese, else `en`; a missing kind is the file's name; a missing id comes from the question.

    Raises:
        UsageError: there is no such file, it is empty, or a line is at fault; the message names file and line.
    """
    place = Path(path).expanduser()
    needed = ("question", "answer")
    with rows_of(place, needed, COLUMNS, longest=LONGEST_LINE, what="a task", holds="question and its answer") as rows:
        items = list(_items(rows, place))
    if not items:
        raise UsageError(f'{place} holds no questions: write one a line, as {{"question": "1 + 1 = ?", "answer": "2"}}')
    return items


def _items(rows: Iterable[tuple[int, dict[str, Any]]], path: Path) -> Iterator[Item]:
    lines: dict[str, int] = {}
    for line, row in rows:
        where = f"{path}, line {line}"
        for column in ("question", "answer"):
            if column not in row:
                raise UsageError(
                    f"{where}: no {column!r}{meant(column, row, COLUMNS)}; a line needs 'question' and 'answer' and "
                    f"has {', '.join(map(repr, list(row)[:10])) or 'nothing'}"
                )
        texts = {name: _text(row[name], name, where) for name in COLUMNS if row.get(name) is not None}
        question, gold = texts.get("question", ""), texts.get("answer", "")
        if not question:
            raise UsageError(f"{where}: the question is empty")
        if not gold:
            raise UsageError(f"{where}: the answer is empty")
        scorer = texts.get("scorer") or guessed_scorer(gold)
        if scorer not in _NAMED:
            raise UsageError(f"{where}: {UnknownName('scorer', scorer, _NAMED)}")
        language = texts.get("language") or ("zh" if _CHINESE.search(question) else "en")
        if language not in ("en", "zh"):
            raise UsageError(f"{where}: the language is en or zh, not {language!r:.40}")
        name = texts.get("id") or hashed(question)
        if name in lines:
            what = f"the id {name!r:.80}" if texts.get("id") else "this question"
            raise UsageError(f"{where}: {what} is on line {lines[name]} already; every question is asked once")
        lines[name] = line
        yield Item(
            id=name,
            prompt=with_instruction(question, scorer, language),
            gold=gold,
            kind=texts.get("kind") or path.stem,
            language=language,
            scorer=scorer,
        )


def guessed_scorer(gold: str) -> str:
    """The scorer that suits an answer; the rules are those of `load`."""
    if as_number(gold) is not None:
        return "number"
    if re.fullmatch(r"[A-E]", gold):
        return "choice"
    try:
        dt.date.fromisoformat(gold)
    except ValueError:
        return "math" if _LATEX.search(gold) else "exact"
    return "date"


def _text(value: Any, column: str, where: str) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        kind = {dict: "an object", list: "a list", bool: "true or false"}.get(type(value), type(value).__name__)
        raise UsageError(f"{where}: {column} must be text or a number, not {kind}")
    return str(value).strip()
