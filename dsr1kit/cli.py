"""The command line. Exit 0: well; 1: it ran and the answer is bad; 2: usage. Data on stdout, talk on stderr.

Each command parses, calls one function of the package and prints; nothing is decided here.
"""

from __future__ import annotations

import contextlib
import os
import sys

from dsr1kit.commands import (  # noqa: F401 - they register their commands
    access,
    finetune,
    fits,
    load,
    plan,
    runs,
    serve,
    weights,
)
from dsr1kit.commands.shared import (
    app,
    fail,
)
from dsr1kit.errors import Dsr1kitError, UsageError

_STOPPED = 130  # the exit code of a process that was ended by Ctrl-C


def main() -> None:
    """Entry point: runs the command and turns the kit's errors into a message and an exit code."""
    # Read when torch is loaded: threads that wait without spinning, since cores are usually shared here.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        app(args=_pairs_joined(sys.argv[1:]))
    except UsageError as error:
        fail(str(error), 2)
    except Dsr1kitError as error:
        fail(str(error), 1)
    except KeyboardInterrupt:
        try:
            fail("stopped; what was finished is kept", _STOPPED)
        finally:
            _leave()
    except SystemExit as left:
        if left.code == _STOPPED:  # typer's own answer to Ctrl-C
            _leave()
        raise
    except BrokenPipeError:
        # The reader (head, less) has left; the interpreter must not complain about it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0) from None


def _leave() -> None:
    """End at once: the interpreter would wait for a library's threads that still fetch gigabytes."""
    with contextlib.suppress(OSError):  # the reader may have left as well
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(_STOPPED)


def _pairs_joined(arguments: list[str]) -> list[str]:
    """`-p NAME VALUE` as `-p NAME=VALUE`: typer has no option of two values that may be repeated."""
    out: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        out.append(argument)
        if argument in ("-p", "--parameter") and arguments[0] == "run":
            name = next(rest, None)
            if name is None:
                break
            value = next(rest, None) if name.isidentifier() else None
            out.append(name if value is None else f"{name}={value}")
    return out
