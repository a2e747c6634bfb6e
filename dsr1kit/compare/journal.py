"""A run's memory on disk: run.json and records.jsonl, so that a killed run goes on where it was.

A record is appended and flushed as its request ends; a line torn by a kill is cut off on opening. Knows
nothing about what a record means beyond its key (channel, item, sample) and its outcome.
"""

from __future__ import annotations

import datetime as dt
import fcntl
import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from dsr1kit.errors import RunError, UsageError
from dsr1kit.keys import redact
from dsr1kit.records import Outcome

Key = tuple[str, str, int]
_SOUND = (Outcome.OK.value, Outcome.TRUNCATED.value, Outcome.FILTERED.value)


class Journal:
    """The folder of one run, locked while open.

    Args:
        folder: made if it is not there.
        identity: what makes this run this run (channels, task, items, seeds, sampling, ...); a folder
            that holds a run of another identity is refused.
        about: versions and hardware, noted beside.

    Raises (on entering):
        UsageError: the folder cannot be written, is in use, or holds another run (says what differs).
    """

    def __init__(
        self, folder: Path, identity: Mapping[str, Any], about: Mapping[str, Any] | None = None
    ) -> None:
        self.folder = folder
        self.records_path = folder / "records.jsonl"
        self.run_path = folder / "run.json"
        self._identity = json.loads(json.dumps(identity))
        self._about = dict(about or {})
        self._file: IO[bytes] | None = None
        self.run_id = ""
        self.repaired_bytes = 0
        self._outcomes: dict[Key, str] = {}

    def __enter__(self) -> Self:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._file = self.records_path.open("a+b")
        except OSError as error:
            raise UsageError(
                f"the output folder {self.folder} cannot be written ({error.strerror}); choose another with --out"
            ) from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise UsageError(f"{self.folder} is in use by a run that is still going on") from None
        try:
            self._open_run()
            self._read_back()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def done(self) -> set[Key]:
        """Keys that have a record."""
        return set(self._outcomes)

    def failed(self) -> set[Key]:
        """Keys whose record is no reply that could be judged."""
        return {key for key, outcome in self._outcomes.items() if outcome not in _SOUND}

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one record and hand it to the operating system before returning.

        Raises:
            RunError: the disk is full or gone; everything written before is whole.
        """
        assert self._file is not None  # noqa: S101 - only called inside the with block
        line = redact(json.dumps({"run": self.run_id, **record}, ensure_ascii=False)).encode() + b"\n"
        try:
            self._file.write(line)
            self._file.flush()
        except OSError as error:
            raise RunError(f"{self.records_path} cannot be written: {error.strerror}") from None
        self._outcomes[_key(record)] = str(record["outcome"])

    def read(self) -> list[dict[str, Any]]:
        """All records, in the order in which they ended."""
        return read_records(self.records_path)

    def forget_failed(self) -> int:
        """Take failed records out, into retried.jsonl, so that they are asked again; returns how many."""
        failed = self.failed()
        if not failed:
            return 0
        records = self.read()
        with (self.folder / "retried.jsonl").open("a", encoding="utf-8") as aside:
            for record in records:
                if _key(record) in failed:
                    aside.write(json.dumps(record, ensure_ascii=False) + "\n")
            aside.flush()
            os.fsync(aside.fileno())
        kept = self.records_path.with_suffix(".tmp")
        with kept.open("w", encoding="utf-8") as file:
            for record in records:
                if _key(record) not in failed:
                    file.write(json.dumps(record, ensure_ascii=False) + "\n")
        assert self._file is not None  # noqa: S101 - only called inside the with block
        old = self._file
        kept.replace(self.records_path)
        self._file = self.records_path.open("a+b")
        fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        old.close()
        for key in failed:
            del self._outcomes[key]
        return len(failed)

    def _open_run(self) -> None:
        now = dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
        if self.run_path.exists():
            try:
                run = json.loads(self.run_path.read_text(encoding="utf-8"))
                identity, self.run_id = run["identity"], run["run"]
            except (OSError, ValueError, KeyError, TypeError):
                raise UsageError(
                    f"{self.run_path} is not a run of this kit; choose another folder with --out"
                ) from None
            differing = _differences(identity, self._identity)
            if differing:
                raise UsageError(
                    f"{self.folder} holds another run; it differs in {'; '.join(differing)}. "
                    "Choose another folder with --out, or repeat the command it was begun with"
                )
            run["starts"] = [*run.get("starts", []), now]
        else:
            assert self._file is not None  # noqa: S101 - opened just before
            if self._file.seek(0, os.SEEK_END) > 0:
                raise UsageError(
                    f"{self.folder} holds records but no run.json; choose another folder with --out"
                )
            self.run_id = f"{now[:10]}-{secrets.token_hex(4)}"
            run = {"run": self.run_id, "identity": self._identity, **self._about, "starts": [now]}
        draft = self.run_path.with_suffix(".tmp")
        draft.write_text(redact(json.dumps(run, indent=2, ensure_ascii=False)) + "\n", encoding="utf-8")
        draft.replace(self.run_path)

    def _read_back(self) -> None:
        assert self._file is not None  # noqa: S101 - opened just before
        self._file.seek(0)
        good = 0
        for number, line in enumerate(self._file, 1):
            try:
                if not line.endswith(b"\n"):
                    raise ValueError("torn")
                record = json.loads(line)
                self._outcomes[_key(record)] = str(record["outcome"])
            except (ValueError, KeyError, TypeError):
                rest = self._file.read()
                if rest.strip():
                    raise UsageError(
                        f"{self.records_path}, line {number}: not a record of this kit"
                    ) from None
                self.repaired_bytes = len(line) + len(rest)
                break
            good += len(line)
        if self.repaired_bytes:
            self._file.truncate(good)
        self._file.seek(0, os.SEEK_END)


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a run; a torn last line is left out.

    Raises:
        UsageError: the file cannot be read, or a line other than the last is no record.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from None
    records = []
    for number, line in enumerate(lines[:-1], 1):
        try:
            records.append(json.loads(line))
        except ValueError:
            raise UsageError(f"{path}, line {number}: not a record of this kit") from None
    return records


def _key(record: Mapping[str, Any]) -> Key:
    return (record["channel"], record["item"], record["sample"])


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    out = []
    for name in sorted({*old, *new}):
        if old.get(name) != new.get(name):
            out.append(f"{name} ({_short(old.get(name))} there, {_short(new.get(name))} now)")
    return out


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:59] + "…"
