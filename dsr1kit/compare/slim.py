"""Records without their texts: what a summary needs of a run, in a tenth of the memory.

R1 thinks for thousands of tokens, so that the texts are nearly all of a run folder; a report shows a few of them,
which are read again from where they lie. Knows nothing about what the other fields mean.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dsr1kit.errors import UsageError

#: Fields that are as long as what was asked or answered, or that no figure is made of.
_LEFT_OUT = frozenset({"question", "gold", "reasoning", "answer", "attempts", "base_url", "run", "scorer", "language"})


class SlimRecords(list[dict[str, Any]]):
    """Records of one file without their texts; `at` in each is the byte at which its line begins."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def whole(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """The record as it lies in the file, texts included."""
        with self.path.open("rb") as file:
            file.seek(record["at"])
            whole: dict[str, Any] = json.loads(file.readline())
            return whole


def load_records(path: str | Path) -> SlimRecords:
    """The records of a run without their texts, line by line; a torn last line is left out.

    Raises:
        UsageError: the file cannot be read, or a line other than the last is no record.
    """
    records = SlimRecords(Path(path))
    at = 0
    try:
        with records.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    break
                records.append(_slim(line, records.path, number) | {"at": at})
                at += len(line)
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from None
    return records


def _slim(line: bytes, path: Path, number: int) -> dict[str, Any]:
    try:
        record = json.loads(line)
        _ = record["channel"], record["item"], record["sample"]
    except (ValueError, KeyError, TypeError):
        raise UsageError(f"{path}, line {number}: not a record of this kit") from None
    # One copy of each word: channels, items, kinds, outcomes and sentences repeat on every line.
    return {
        name: sys.intern(value) if type(value) is str and name != "due_at" else value
        for name, value in record.items()
        if name not in _LEFT_OUT
    }
