"""A run's memory on disk: run.json and records.jsonl, so that a killed run goes on where it was.

A record is appended and flushed as its request ends; a line torn by a kill is cut off on opening. Warm-ups, and
records taken out to be asked again, lie in files of their own beside. Knows nothing about what a record means
beyond its key (channel, item, sample) and its outcome.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import fcntl
import json
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from dsr1kit.errors import RunError, UsageError
from dsr1kit.keys import redact_texts
from dsr1kit.records import Outcome

Key = tuple[str, str, int]
SOUND = (Outcome.OK.value, Outcome.TRUNCATED.value, Outcome.FILTERED.value)


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

    def __init__(self, folder: Path, identity: Mapping[str, Any], about: Mapping[str, Any] | None = None) -> None:
        self.folder = folder
        self.records_path = folder / "records.jsonl"
        self.run_path = folder / "run.json"
        self._retired_path = folder / "retried.jsonl"
        self._warm_path = folder / "warm-up.jsonl"
        # Redacted as it will lie on disk, or a run whose settings hold a secret would not know itself again.
        self._identity = redact_texts(json.loads(json.dumps(identity)))
        self._about = dict(about or {})
        self._file: IO[bytes] | None = None
        self._run: dict[str, Any] = {}
        self.run_id = ""
        self.repaired_bytes = 0
        self._outcomes: dict[Key, str] = {}

    def __enter__(self) -> Self:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._file = self.records_path.open("a+b")
        except OSError as error:
            raise self._unwritable(error) from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise UsageError(f"{self.folder} is in use by a run that is still going on") from None
        try:
            self._open_run()
            self._read_back()
        except OSError as error:
            self.__exit__(None, None, None)
            raise self._unwritable(error) from None
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

    def forget_unused(self) -> None:
        """Leave no trace of a run that holds nothing yet, so that its folder can be another's."""
        if self._outcomes or self._warm_path.exists():
            return
        for path in (self.run_path, self.records_path):
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # it holds what is not ours
            self.folder.rmdir()

    def done(self) -> set[Key]:
        """Keys that have a record."""
        return set(self._outcomes)

    def failed(self) -> set[Key]:
        """Keys whose record is no reply that could be judged."""
        return {key for key, outcome in self._outcomes.items() if outcome not in SOUND}

    def append(self, record: Mapping[str, Any], *, warm_up: bool = False) -> None:
        """Write one record and hand it to the operating system before returning.

        Args:
            warm_up: it counts for nothing but its cost, and goes to warm-up.jsonl.

        Raises:
            RunError: the disk is full or gone; everything written before is whole.
        """
        assert self._file is not None  # noqa: S101 - only called inside the with block
        # Channel and item are the record's key; they come from the person and the task, never from a server.
        clean = redact_texts(record) | {name: record[name] for name in ("channel", "item")}
        line = _line({"run": self.run_id, **clean})
        try:
            if warm_up:
                with self._warm_path.open("ab") as file:
                    file.write(line)
                return
            self._file.write(line)
            self._file.flush()
        except OSError as error:
            raise RunError(f"{error.filename or self.records_path} cannot be written: {error.strerror}") from None
        self._outcomes[_key(record)] = str(record["outcome"])

    def read(self) -> list[dict[str, Any]]:
        """All records, in the order in which they ended."""
        return read_records(self.records_path)

    def retired(self) -> list[dict[str, Any]]:
        """Records that were taken out to be asked again, in the order in which they ended."""
        return read_records(self._retired_path) if self._retired_path.exists() else []

    def warm_ups(self) -> list[dict[str, Any]]:
        """Records of warm-ups, of all starts."""
        return read_records(self._warm_path) if self._warm_path.exists() else []

    def note(self, **facts: Any) -> None:
        """Write facts about the run into run.json, over those of the same names.

        Raises:
            RunError: it cannot be written.
        """
        self._run |= facts
        try:
            self._write_run()
        except OSError as error:
            raise RunError(f"{self.run_path} cannot be written: {error.strerror}") from None

    def noted(self, name: str) -> Any:
        """A fact of run.json; None where it has none of that name."""
        return self._run.get(name)

    def forget_failed(self) -> int:
        """Take failed records out, into retried.jsonl, so that they are asked again; returns how many."""
        return self._forget(self.failed())

    def forget_unasked(self) -> int:
        """Take out the records of requests that the budget kept back, likewise."""
        return self._forget({key for key, o in self._outcomes.items() if o == Outcome.OVER_BUDGET.value})

    def _forget(self, keys: set[Key]) -> int:
        if not keys:
            return 0
        records, aside = self.read(), self.retired()
        # A kill between the two files below leaves a record in both; it is moved once.
        moved = {_line(r) for r in aside}
        aside += [r for r in records if _key(r) in keys and _line(r) not in moved]
        _replace(self._retired_path, aside).close()
        file = _replace(self.records_path, [r for r in records if _key(r) not in keys])
        assert self._file is not None  # noqa: S101 - only called inside the with block
        self._file.close()
        self._file = file
        for key in keys:
            del self._outcomes[key]
        return len(keys)

    def _unwritable(self, error: OSError) -> UsageError:
        why = f"cannot be written ({error.strerror}); choose another with --out"
        return UsageError(f"the output folder {self.folder} {why}")

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
            if differing and not self._began():
                # Nothing was asked yet (a model that did not load, a clock that was mistyped): begin anew.
                run = {"run": self.run_id, "identity": self._identity, **self._about}
            elif differing:
                raise UsageError(
                    f"{self.folder} holds another run; it differs in {'; '.join(differing)}. "
                    "Choose another folder with --out, or repeat the command it was begun with"
                )
            run["starts"] = [*run.get("starts", []), now]
        else:
            if self._began():
                raise UsageError(f"{self.folder} holds records but no run.json; choose another folder with --out")
            self.run_id = f"{now[:10]}-{secrets.token_hex(4)}"
            run = {"run": self.run_id, "identity": self._identity, **self._about, "starts": [now]}
        self._run = run
        self._write_run()

    def _write_run(self) -> None:
        draft = self.run_path.with_suffix(".tmp")
        draft.write_text(json.dumps(redact_texts(self._run), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        draft.replace(self.run_path)

    def _began(self) -> bool:
        assert self._file is not None  # noqa: S101 - opened just before
        return self._file.seek(0, os.SEEK_END) > 0 or self._retired_path.exists()

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
                    raise UsageError(f"{self.records_path}, line {number}: not a record of this kit") from None
                self.repaired_bytes = len(line) + len(rest)
                break
            good += len(line)
        if self.repaired_bytes:
            self._file.truncate(good)
        self._file.seek(0, os.SEEK_END)
        if self._warm_path.exists():
            with self._warm_path.open("r+b") as file:
                whole, _, torn = file.read().rpartition(b"\n")
                if torn:
                    file.truncate(len(whole) + bool(whole))


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
            record = json.loads(line)
            _key(record)
            records.append(record)
        except (ValueError, KeyError, TypeError):
            raise UsageError(f"{path}, line {number}: not a record of this kit") from None
    return records


def _replace(path: Path, records: Sequence[Mapping[str, Any]]) -> IO[bytes]:
    """Put a new file in the place of `path` in one step; returns it open, at its end and locked."""
    draft = path.with_suffix(".tmp")
    file = draft.open("w+b")
    # Locked before it takes the old one's place: at no moment is the run's file free.
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    file.writelines(_line(record) for record in records)
    file.flush()
    os.fsync(file.fileno())
    draft.replace(path)
    return file


def _line(record: Mapping[str, Any]) -> bytes:
    # A lone surrogate (half an emoji from a far side) has no UTF-8 form.
    return json.dumps(record, ensure_ascii=False).encode("utf-8", "replace") + b"\n"


def _key(record: Mapping[str, Any]) -> Key:
    return (record["channel"], record["item"], record["sample"])


_SHOWN = 60  # characters of a value in a message
# What a person calls them, where the name in run.json says little.
_CALLED = {"digest": "the questions themselves", "facts": "what is known of the channels"}


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], inside: str = "") -> list[str]:
    """What differs, down to the single setting, with both values."""
    found = []
    for name in sorted({*old, *new}):
        there, now = old.get(name), new.get(name)
        called = f"{inside}.{name}" if inside else _CALLED.get(name, name)
        if isinstance(there, Mapping) and isinstance(now, Mapping):
            found += _differences(there, now, called)
        elif there != now:
            found.append(f"{called} ({_short(there, now)} there, {_short(now, there)} now)")
    return found


def _short(value: Any, other: Any) -> str:
    """A value as text; of a long one the part with which it begins to differ from the other."""
    text, beside = (json.dumps(one, ensure_ascii=False) for one in (value, other))
    if len(text) <= _SHOWN:
        return text
    alike = next((at for at, (a, b) in enumerate(zip(text, beside, strict=False)) if a != b), 0)
    begin = max(0, alike - _SHOWN // 2)
    return ("…" if begin else "") + text[begin : begin + _SHOWN] + ("…" if begin + _SHOWN < len(text) else "")
