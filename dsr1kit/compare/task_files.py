"""A person's own questions: JSONL or CSV with `question` and `answer`, read line by line, each fault with its line.

Optional columns: `id`, `kind`, `language` (`en` or `zh`), `scorer`. Knows nothing about what the answers will be.
"""

from __future__ import annotations

import csv
import datetime as dt
import difflib
import json
import re
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

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
    if place.is_dir():
        raise UsageError(f"{place} is a folder; a task is one file, .jsonl or .csv")
    try:
        with place.open("rb") as file:
            rows = _csv_rows(file, place) if place.suffix.lower() in (".csv", ".tsv") else _json_rows(file, place)
            items = list(_items(rows, place))
    except FileNotFoundError:
        near = difflib.get_close_matches(place.name, _names(place.parent), n=3, cutoff=0.5)
        hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
        raise UsageError(f"there is no file {place}{hint}") from None
    except OSError as error:
        raise UsageError(f"{place} cannot be read ({error.strerror or error})") from None
    if not items:
        raise UsageError(f'{place} holds no questions: write one a line, as {{"question": "1 + 1 = ?", "answer": "2"}}')
    return items


def _names(folder: Path) -> list[str]:
    try:
        return [one.name for one in folder.iterdir()]
    except OSError:
        return []


def _items(rows: Iterable[tuple[int, dict[str, Any]]], path: Path) -> Iterator[Item]:
    lines: dict[str, int] = {}
    for line, row in rows:
        where = f"{path}, line {line}"
        for column in ("question", "answer"):
            if column not in row:
                raise UsageError(
                    f"{where}: no {column!r}{_meant(column, row)}; a line needs 'question' and 'answer' and has "
                    f"{', '.join(map(repr, list(row)[:10])) or 'nothing'}"
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


def _meant(column: str, row: dict[str, Any]) -> str:
    others = [name for name in row if isinstance(name, str) and name not in COLUMNS]
    near = difflib.get_close_matches(column, others, n=1, cutoff=0.6)
    return f" (is {near[0]!r} meant?)" if near else ""


def _text(value: Any, column: str, where: str) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        kind = {dict: "an object", list: "a list", bool: "true or false"}.get(type(value), type(value).__name__)
        raise UsageError(f"{where}: {column} must be text or a number, not {kind}")
    return str(value).strip()


def _lines(file: BinaryIO, path: Path) -> Iterator[str]:
    number = 0
    while line := file.readline(LONGEST_LINE + 1):
        number += 1
        if len(line) > LONGEST_LINE:
            raise UsageError(
                f"{path}, line {number}: longer than {LONGEST_LINE:,} bytes; a line holds one question and its answer"
            )
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise UsageError(
                f"{path}, line {number}: byte {error.start + 1} is not UTF-8; save the file as UTF-8 "
                f"(iconv -f GB18030 -t UTF-8 for one from a Chinese Windows)"
            ) from None


def _json_rows(file: BinaryIO, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(_lines(file, path), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            told = (
                f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else "nested too deep"
            )
            whole = "; write one object a line (JSONL), not one document" if line.strip() in ("[", "{") else ""
            raise UsageError(f"{path}, line {number}: no JSON ({told}){whole}") from None
        if not isinstance(row, dict):
            raise UsageError(
                f"{path}, line {number}: a line holds one object with question and answer, not {line[:40]!r}"
            )
        yield number, row


def _csv_rows(file: BinaryIO, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    lines = _lines(file, path)
    first = next(lines, "")
    # Spreadsheets write what the country's comma leaves free.
    delimiter = max(",;\t", key=lambda sign: len({"question", "answer"} & set(_header(first, sign))))
    reader = csv.reader(chain([first], lines), delimiter=delimiter, strict=True)
    names: list[str] = []
    begins = 1
    try:
        for cells in reader:
            number, begins = begins, reader.line_num + 1
            if not any(cell.strip() for cell in cells):
                continue
            if not names:
                names = (
                    _header(first, delimiter) if number == reader.line_num else [cell.strip().lower() for cell in cells]
                )
                if missing := sorted({"question", "answer"} - set(names)):
                    row = dict.fromkeys(names)
                    raise UsageError(
                        f"{path}, line {number}: no column {missing[-1]!r}{_meant(missing[-1], row)}; the first line "
                        f"names the columns, and they are {', '.join(map(repr, names))}"
                    )
                if twice := [name for name in names if name in COLUMNS and names.count(name) > 1]:
                    raise UsageError(f"{path}, line {number}: two columns are named {twice[0]!r}")
                continue
            if len(cells) != len(names):
                raise UsageError(
                    f"{path}, line {number}: {len(cells)} cells where the first line names {len(names)} columns; text "
                    f"with a {delimiter!r} in it stands in double quotes"
                )
            yield number, dict(zip(names, cells, strict=True))
    except csv.Error as error:
        raise UsageError(f"{path}, line {begins}: no CSV ({error}); is a quotation mark never closed?") from None


def _header(line: str, delimiter: str) -> list[str]:
    return [cell.strip().strip('"').lower() for cell in line.strip().split(delimiter)]
