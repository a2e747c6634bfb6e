"""The errors of the kit, one tree; every message says what failed, the likely cause and what mends it.

    Dsr1kitError
    ├── UsageError            the caller's mistake; the command line exits with 2
    │   ├── ConfigError       a file that does not parse or holds a wrong value (file, key)
    │   ├── MissingKey        an API key that is not in the environment
    │   ├── UnknownName       a channel, task, parameter ... that does not exist (with the nearest)
    │   └── MissingExtra      an optional package that is not installed
    ├── RunError              it ran and failed; the command line exits with 1
    │   ├── NotebookFailed    an executed notebook with a failing or unfinished cell
    │   └── ModelError        a local model that cannot be loaded or run
    └── OutcomeError          what `Reply.raise_for_outcome()` raises

Knows nothing about the rest of the package.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class Dsr1kitError(Exception):
    """Base of all errors raised on purpose by dsr1kit."""


class UsageError(Dsr1kitError):
    """The caller asked for something that cannot be meant: wrong name, type, value or file."""


class ConfigError(UsageError):
    """A configuration file does not parse, or one of its keys has a wrong type or value."""


class MissingKey(UsageError):
    """An API key was needed and its environment variable is not set."""


class MissingExtra(UsageError):
    """A feature needs an optional package that is not installed."""

    def __init__(self, feature: str, extra: str, missing: str) -> None:
        super().__init__(f"{feature} needs {missing}, which is not installed: pip install 'dsr1kit[{extra}]'")


class UnknownName(UsageError):
    """A name that does not exist, told with the nearest one that does."""

    def __init__(self, kind: str, name: str, known: Iterable[str], *, hint: str = "") -> None:
        self.kind, self.name, self.known = kind, name, sorted(known)
        near = difflib.get_close_matches(name, self.known, n=1, cutoff=0.5)
        message = f"unknown {kind} {name!r}"
        if near:
            message += f"; did you mean {near[0]!r}?"
        elif self.known:
            message += "; known: " + ", ".join(self.known[:20]) + (", ..." if len(self.known) > 20 else "")
        if hint:
            message += f" {hint}"
        super().__init__(message)


class RunError(Dsr1kitError):
    """Something ran and failed for a reason outside the caller's command."""


class NotebookFailed(RunError):
    """An executed notebook has a failing, unfinished or silently ended cell."""


class ModelError(RunError):
    """A local model could not be loaded or run."""


class OutcomeError(Dsr1kitError):
    """A reply whose outcome is not `ok`, raised only on request by `Reply.raise_for_outcome()`.

    Attributes:
        outcome: the outcome's name, for instance `throttled`.
        detail: the sentence that says what happened and what to do.
    """

    def __init__(self, outcome: str, detail: str) -> None:
        self.outcome, self.detail = outcome, detail
        super().__init__(f"{outcome}: {detail}" if detail else outcome)
