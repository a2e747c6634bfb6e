"""Show how a run goes: a bar with the time left in a terminal, one updating line in a notebook."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

OnProgress = Callable[[str, int, int], None]


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
    from IPython.display import display

    handles: dict[str, object] = {}
    began: dict[str, float] = {}
    shown: dict[str, float] = {}

    def tell(stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        began.setdefault(stage, now)
        if done < total and now - shown.get(stage, 0.0) < 0.25:
            return
        shown[stage] = now
        spent = now - began[stage]
        left = f", about {spent / done * (total - done):.0f} s left" if 0 < done < total else ""
        told = {"text/plain": f"{stage}: {done}/{total} in {spent:.0f} s{left}"}
        if stage in handles:
            handles[stage].update(told, raw=True)  # type: ignore[attr-defined]  # IPython's handle is untyped
        else:
            handles[stage] = display(told, raw=True, display_id=True)  # type: ignore[no-untyped-call]  # IPython

    return tell
