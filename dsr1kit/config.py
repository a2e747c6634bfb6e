"""Read TOML strictly: every complaint names the file, the entry and the key, and what was expected.

Knows nothing about what the files mean; the catalogue and the weather are read through it.
"""

from __future__ import annotations

import datetime as dt
import difflib
import math
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dsr1kit.errors import ConfigError, UnknownName


def read_toml(path: Path) -> dict[str, Any]:
    """The file's tables; raises ConfigError (file, line, what was expected) where it does not parse."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as UTF-8 text: {error}") from None
    except tomllib.TOMLDecodeError as error:
        lines = path.read_text(encoding="utf-8").rstrip().count("\n") + 1
        told = str(error).replace("(at end of document)", f"(at line {lines}, where the file ends)")
        raise ConfigError(f"{path}: not valid TOML: {told}") from None


class Table:
    """One TOML table, taken apart key by key; `finish()` complains about keys nobody took.

    Args:
        path: the file, for messages.
        where: the table's dotted name, for messages.
        values: what the file holds.
    """

    def __init__(self, path: Path | str, where: str, values: object) -> None:
        self.path, self.where = path, where
        if not isinstance(values, dict):
            raise ConfigError(f"{path}: {where} must be a table, not {_shown(values)}")
        self._values = values
        self._known: set[str] = set()

    def error(self, key: str, message: str) -> ConfigError:
        """A ConfigError that names file, table and key."""
        where = f"[{self.where}]" if self.where else "top level,"
        return ConfigError(f"{self.path}: {where} {key}: {message}")

    def has(self, key: str) -> bool:
        """Whether the file gives the key."""
        return key in self._values

    def text(self, key: str, default: str = "", *, choices: Sequence[str] = (), required: bool = False) -> str:
        """A string, one of `choices` where given."""
        value = self._get(key, default, required)
        if not isinstance(value, str):
            raise self.error(key, f"expected a string, not {_shown(value)}")
        if required and not value.strip():
            raise self.error(key, "must not be empty")
        if choices and value not in choices:
            raise self.error(key, f"expected one of {', '.join(choices)}, not {value!r}")
        return value

    def texts(self, key: str) -> tuple[str, ...]:
        """A list of strings."""
        value = self._get(key, [], False)
        if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
            raise self.error(key, f"expected a list of strings, not {_shown(value)}")
        return tuple(value)

    def flag(self, key: str, default: bool = False) -> bool:
        """A boolean."""
        value = self._get(key, default, False)
        if not isinstance(value, bool):
            raise self.error(key, f"expected true or false, not {_shown(value)}")
        return value

    def number(
        self, key: str, default: float | None = None, *, low: float = 0.0, high: float = math.inf
    ) -> float | None:
        """A finite number from `low` to `high`; None where absent and without default."""
        value = self._get(key, default, False)
        if value is None:
            return None
        finite = isinstance(value, int | float) and abs(value) <= sys.float_info.max
        if not finite or isinstance(value, bool):
            raise self.error(key, f"expected a number, not {_shown(value)}")
        if not low <= value <= high:
            wanted = f"of at least {low:g}" if high == math.inf else f"from {low:g} to {high:g}"
            raise self.error(key, f"expected a number {wanted}, not {value!r}")
        return float(value)

    def whole(self, key: str, default: int | None = None, *, low: int = 0) -> int | None:
        """A whole number of at least `low`; None where absent and without default."""
        value = self._get(key, default, False)
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool):
            raise self.error(key, f"expected a whole number, not {_shown(value)}")
        if value < low:
            raise self.error(key, f"expected a whole number of at least {low}, not {value!r}")
        return value

    def date(self, key: str) -> dt.date | None:
        """A TOML date or date-time (unquoted); None where absent."""
        value = self._get(key, None, False)
        if value is None or isinstance(value, dt.date):
            return value
        raise self.error(key, f"expected a date such as 2026-11-23, without quotes, not {_shown(value)}")

    def table(self, key: str) -> Table | None:
        """A sub-table; None where absent."""
        value = self._get(key, None, False)
        return None if value is None else Table(self.path, f"{self.where}.{key}".lstrip("."), value)

    def raw(self, key: str) -> Any:
        """The value as it stands."""
        return self._get(key, None, False)

    def raw_all(self) -> dict[str, Any]:
        """All values of a table whose keys are names chosen by the person."""
        self._known.update(self._values)
        return dict(self._values)

    def finish(self) -> None:
        """Raise ConfigError for the first key that nothing asked for, with the nearest known one."""
        for key in self._values:
            if key not in self._known:
                near = UnknownName("key", key, self._known)
                raise self.error(key, str(near))

    def _get(self, key: str, default: Any, required: bool) -> Any:
        self._known.add(key)
        if key not in self._values:
            if required:
                near = difflib.get_close_matches(key, self._values, n=1)
                raise self.error(key, "is missing" + (f"; is {near[0]!r} meant to be it?" if near else ""))
            return default
        return self._values[key]


def _shown(value: object) -> str:
    kind = {str: "the string", bool: "the boolean", int: "the number", float: "the number", list: "the list"}
    if isinstance(value, dict):
        return "a table"
    return f"{kind.get(type(value), 'the value')} {value!r:.60}"
