"""Show how a run or a download goes: a bar with the time left in a terminal, one updating line in a notebook."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

OnProgress = Callable[[str, int, int], None]
OnBytes = Callable[[int, int], None]

_EACH_S = 0.25  # between two states of a notebook's line


@contextmanager
def terminal_progress(*, quiet: bool = False) -> Iterator[OnProgress | None]:
    """A bar a stage on stderr, with count and time left; None, and silence, when `quiet`."""
    if quiet:
        yield None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description:<24}", markup=False), BarColumn(), MofNCompleteColumn(),
        TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
    )  # fmt: skip
    stages: dict[str, int] = {}
    with Progress(*columns, console=Console(file=sys.stderr)) as progress:

        def tell(stage: str, done: int, total: int) -> None:
            if stage not in stages:
                stages[stage] = int(progress.add_task(stage, total=total))
            progress.update(stages[stage], completed=done, total=total)  # type: ignore[arg-type]  # rich's own int type

        yield tell


def notebook_progress() -> OnProgress:
    """One line a stage, updated in place at most four times a second: stage, count, time left."""
    lines: dict[str, Callable[[str], None]] = {}
    began: dict[str, float] = {}
    shown: dict[str, float] = {}

    def tell(stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        began.setdefault(stage, now)
        if done < total and now - shown.get(stage, 0.0) < _EACH_S:
            return
        shown[stage] = now
        spent = now - began[stage]
        left = f", about {spent / done * (total - done):.0f} s left" if 0 < done < total else ""
        if stage not in lines:
            lines[stage] = _updated_line()
        lines[stage](f"{stage}: {done}/{total} in {spent:.0f} s{left}")

    return tell


def _updated_line() -> Callable[[str], None]:
    """A line of a notebook that is written anew by each call."""
    from IPython.display import display

    handles: list[object] = []

    def show(text: str) -> None:
        told = {"text/plain": text}
        if handles:
            handles[0].update(told, raw=True)  # type: ignore[attr-defined]  # IPython's handle is untyped
        else:
            handles.append(display(told, raw=True, display_id=True))  # type: ignore[no-untyped-call]  # IPython

    return show


@contextmanager
def fetch_progress(name: str, *, quiet: bool = False) -> Iterator[tuple[OnBytes | None, Callable[[str], None]]]:
    """How a download goes: (told of bytes there and in all, None where nobody looks; told what else is to be known).

    A bar on stderr in a terminal, one line in a notebook. The second prints its sentence, in a notebook too.

    Args:
        name: what is fetched.
        quiet: show no bytes.
    """
    notebook = _in_notebook()

    def note(text: str) -> None:
        print(text if notebook else f"dsr1kit: {text}", file=sys.stdout if notebook else sys.stderr)

    if quiet or not (notebook or sys.stderr.isatty()):
        yield None, note
        return
    if notebook:
        yield _bytes_line(name), note
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TransferSpeedColumn(),
        TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=Console(file=sys.stderr)) as progress:
        task = progress.add_task(name, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total), note


def _bytes_line(name: str) -> OnBytes:
    from rich.filesize import decimal

    show, began, at_first, shown = _updated_line(), time.monotonic(), -1, 0.0

    def tell(done: int, total: int) -> None:
        nonlocal at_first, shown
        now = time.monotonic()
        at_first = done if at_first < 0 else at_first
        if done < total and now - shown < _EACH_S:
            return
        shown = now
        spent, new = now - began, done - at_first
        left = f", about {spent / new * (total - done):.0f} s left" if new > 0 and done < total else ""
        show(f"{name}: {decimal(done)} of {decimal(total)} in {spent:.0f} s{left}")

    return tell


def _in_notebook() -> bool:
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return getattr(shell, "kernel", None) is not None
