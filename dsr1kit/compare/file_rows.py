"""Rows of a person's JSONL or CSV, read line by line, each fault told with its file and line.

Knows nothing about what the rows mean beyond the columns that they must have.
"""

from __future__ import annotations

import csv
import difflib
import json
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

from dsr1kit.errors import UsageError

#: (line, row); lines count from 1.
Row = tuple[int, dict[str, Any]]


@contextmanager
def rows_of(
    path: Path, needed: Sequence[str], known: Collection[str], *, longest: int, what: str, holds: str
) -> Iterator[Iterator[Row]]:
    """The rows of a file, to be read inside the `with`: CSV where its name ends so, JSONL else.

    Args:
        needed: columns that a CSV must have; rows of a JSONL are the caller's to look at.
        known: columns that have a meaning.
        longest: bytes of a line; a file without line ends must not fill the memory.
        what: the file in words for the person, such as "a task".
        holds: what a line holds, likewise, such as "question and its answer".

    Raises:
        UsageError: there is no such file, or a line is at fault; the message names file and line.
    """
    if path.is_dir():
        raise UsageError(f"{path} is a folder; {what} is one file, .jsonl or .csv")
    try:
        with path.open("rb") as file:
            lines = _lines(file, path, longest, holds)
            table = path.suffix.lower() in (".csv", ".tsv")
            yield _csv_rows(lines, path, needed, known) if table else _json_rows(lines, path, holds)
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, _names(path.parent), n=3, cutoff=0.5)
        hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
        raise UsageError(f"there is no file {path}{hint}") from None
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror or error})") from None


def meant(column: str, row: dict[str, Any], known: Collection[str]) -> str:
    """ " (is 'x' meant?)" where a row has a name near a missing column's; else empty."""
    others = [name for name in row if isinstance(name, str) and name not in known]
    near = difflib.get_close_matches(column, others, n=1, cutoff=0.6)
    return f" (is {near[0]!r} meant?)" if near else ""


def _names(folder: Path) -> list[str]:
    try:
        return [one.name for one in folder.iterdir()]
    except OSError:
        return []


def _lines(file: BinaryIO, path: Path, longest: int, holds: str) -> Iterator[str]:
    number = 0
    while line := file.readline(longest + 1):
        number += 1
        if len(line) > longest:
            raise UsageError(f"{path}, line {number}: longer than {longest:,} bytes; a line holds one {holds}")
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise UsageError(
                f"{path}, line {number}: byte {error.start + 1} is not UTF-8; save the file as UTF-8 "
                f"(iconv -f GB18030 -t UTF-8 for one from a Chinese Windows)"
            ) from None


def _json_rows(lines: Iterator[str], path: Path, holds: str) -> Iterator[Row]:
    for number, line in enumerate(lines, 1):
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
            raise UsageError(f"{path}, line {number}: a line holds one object with a {holds}, not {line[:40]!r}")
        yield number, row


def _csv_rows(lines: Iterator[str], path: Path, needed: Sequence[str], known: Collection[str]) -> Iterator[Row]:
    first = next(lines, "")
    # Spreadsheets write what the country's comma leaves free.
    delimiter = max(",;\t", key=lambda sign: len(set(known) & set(_header(first, sign))))
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
                if missing := [name for name in needed if name not in names]:
                    row = dict.fromkeys(names)
                    raise UsageError(
                        f"{path}, line {number}: no column {missing[0]!r}{meant(missing[0], row, known)}; the first "
                        f"line names the columns, and they are {', '.join(map(repr, names))}"
                    )
                if twice := [name for name in names if name in known and names.count(name) > 1]:
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
