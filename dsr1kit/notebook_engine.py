"""Execute a notebook on a kernel with papermill, and judge how it ended.

Adds to papermill what it leaves open. A run is well only when every code cell ran to its end without an
error: a dead kernel, `sys.exit(0)` (which papermill calls a success) and a cell never reached are failures.
Limits are kept by a watchdog that kills the kernel's whole process group, so that they hold in the middle
of a cell and in native code. papermill gets no output path, so no unredacted copy ever touches the disk:
each save goes through the caller, as a cell starts and ends and every 30 seconds within one.

Imports papermill and Jupyter (about a second), so import it late. Knows nothing about files.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import nbformat
from nbclient.exceptions import DeadKernelError
from papermill import __version__ as papermill_version
from papermill.clientwrap import PapermillNotebookClient
from papermill.engines import NotebookExecutionManager
from papermill.parameterize import parameterize_notebook

from dsr1kit.keys import REDACTED, redact

_KERNEL = "python3"
_START_LIMIT_S = 120
_TICK_S = 0.05
_SHORTEST_SECRET = 8  # shorter values would redact ordinary text
_MAX_ERROR = 600
_ENDED_ITSELF = "the cell ended the notebook with sys.exit or exit; let it run to its last line"
_ANSI = re.compile(r"\x1b\[[0-9;]*m")


class Redactor:
    """Redacts texts, trees and notebooks: known keys, everything shaped like one, and `secrets`.

    Args:
        secrets: values to hide besides those that `keys.redact` knows.
    """

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        long = {secret for secret in secrets if len(secret) >= _SHORTEST_SECRET}
        # How values with quotes or line ends stand in a traceback, and in the cell papermill injects.
        forms = {form(secret)[1:-1] for secret in long for form in (repr, json.dumps)}
        self._secrets = sorted(long | forms, key=len, reverse=True)

    def text(self, text: str) -> str:
        """`text` with `[redacted]` for every secret; colour codes go where they would cut one in two."""
        plain = _ANSI.sub("", text)
        hidden = plain
        for secret in self._secrets:
            hidden = hidden.replace(secret, REDACTED)
        hidden = redact(hidden)
        return text if hidden == plain else hidden

    def tree(self, value: Any) -> Any:
        """A copy of nested mappings and lists with all texts redacted, keys too; binary data is left."""
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, Mapping):
            return {self.text(k): v if _is_binary(k) else self.tree(v) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [self.tree(v) for v in value]
        return value

    def notebook(self, nb: Any) -> str:
        """The notebook as the text of an `.ipynb` file, redacted throughout."""
        copy = dict(nb)
        copy["cells"] = [
            {**cell, "outputs": _joined(cell["outputs"])} if "outputs" in cell else cell for cell in nb["cells"]
        ]
        node = nbformat.from_dict(self.tree(copy))  # type: ignore[no-untyped-call]  # theirs
        written: str = nbformat.writes(node)  # type: ignore[no-untyped-call]  # theirs
        return written + "\n"


def _is_binary(key: str) -> bool:
    return key == "application/pdf" or (key.startswith("image/") and not key.startswith("image/svg"))


def _joined(outputs: list[Any]) -> list[Any]:
    """Outputs with neighbouring pieces of one stream joined, so that no key hides across two pieces."""
    joined: list[Any] = []
    for output in outputs:
        last = joined[-1] if joined else {}
        if output["output_type"] == "stream" and last.get("name") == output["name"]:
            joined[-1] = {**last, "text": last["text"] + output["text"]}
        else:
            joined.append(output)
    return joined


@dataclass(frozen=True, slots=True)
class Ended:
    """How an execution ended; `failing_index` counts from 0 in `nb`, the injected cell included.

    Attributes:
        interrupted: what to raise again once the books are closed (Ctrl-C).
    """

    nb: Any
    status: Literal["ok", "failed", "timeout"]
    seconds: float
    error: str = ""
    failing_index: int | None = None
    interrupted: BaseException | None = None


class _Watchdog:
    """Kills the kernel's process group when a limit, in seconds, is passed, and whatever outlives the run."""

    def __init__(self, cell_s: float | None, total_s: float | None) -> None:
        self._cell_s, self._total_s = cell_s, total_s
        self._began = time.monotonic()
        self._cell_began: float | None = None
        self._over = threading.Event()
        self._client: Any = None
        self._group: int | None = None
        self.expired = ""
        self._thread = threading.Thread(target=self._watch, name="notebook-watchdog", daemon=True)

    def start(self, client: Any) -> None:
        self._client = client
        self._thread.start()

    def cell_starts(self) -> None:
        self._cell_began = time.monotonic()

    def cell_ends(self) -> None:
        self._cell_began = None

    def stop(self) -> None:
        self._over.set()
        self._thread.join()
        self._kill()  # what a notebook started in the kernel's group does not outlive the run

    def _watch(self) -> None:
        while not self._over.wait(_TICK_S):
            self._note_group()
            now, cell_began = time.monotonic(), self._cell_began
            if self._total_s is not None and now - self._began > self._total_s:
                self.expired = f"the whole took longer than its limit of {self._total_s:g} s"
            elif self._cell_s is not None and cell_began is not None and now - cell_began > self._cell_s:
                self.expired = f"the cell took longer than its limit of {self._cell_s:g} s"
            if self.expired:
                self._kill()

    def _note_group(self) -> None:
        provisioner = getattr(getattr(self._client, "km", None), "provisioner", None)
        self._group = getattr(provisioner, "pgid", None) or self._group

    def _kill(self) -> None:
        if self._group is not None and self._group != os.getpgrp():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._group, signal.SIGKILL)


class _Manager(NotebookExecutionManager):  # type: ignore[misc]  # papermill has no types
    """papermill's book-keeping, saving through the caller and keeping to what truly ran."""

    def __init__(
        self, nb: Any, save: Callable[[Any], None], on_cell: Callable[[int, int, str], None], dog: _Watchdog
    ) -> None:
        super().__init__(nb, progress_bar=False)
        self._save, self._on_cell, self._dog = save, on_cell, dog
        self._code = [index for index, cell in enumerate(nb.cells) if _runs(cell)]
        self.current: int | None = None
        self.left_at: int | None = None

    def executed(self, *, cell_index: int, execute_reply: Mapping[str, Any], **_: Any) -> None:
        """nbclient's hook: IPython's `exit()` raises nothing, it asks its front end to leave."""
        payload = execute_reply["content"].get("payload", [])
        if self.left_at is None and any(item.get("source") == "ask_exit" for item in payload):
            self.left_at = cell_index

    def save(self, **_: Any) -> None:
        self._save(self.nb)
        self.last_save_time = self.now()

    def cell_start(self, cell: Any, cell_index: int = 0, **kwargs: Any) -> None:
        if _runs(cell):
            self.current = cell_index
            self._on_cell(self._code.index(cell_index) + 1, len(self._code), first_line(cell.source))
            super().cell_start(cell, cell_index, **kwargs)
            self._dog.cell_starts()

    def cell_complete(self, cell: Any, cell_index: int = 0, **kwargs: Any) -> None:
        self._dog.cell_ends()
        if _runs(cell):
            super().cell_complete(cell, cell_index, **kwargs)
        else:
            cell.metadata.papermill["status"] = self.COMPLETED

    def notebook_complete(self, **_: Any) -> None:
        # papermill's own marks every pending cell as completed here.
        self.end_time = self.now()
        self.nb.metadata.papermill["end_time"] = self.end_time.isoformat()
        self.nb.metadata.papermill["duration"] = (self.end_time - self.start_time).total_seconds()


def first_line(source: str) -> str:
    """The line that names a cell to a person: its first that is no comment, else its first."""
    lines = [line.strip() for line in source.splitlines() if line.strip()]
    return next((line for line in lines if not line.startswith("#")), lines[0] if lines else "")


def _runs(cell: Any) -> bool:
    return bool(cell.cell_type == "code" and cell.source.strip())


def execute(
    nb: Any,
    parameters: Mapping[str, Any],
    *,
    save: Callable[[Any], None],
    on_cell: Callable[[int, int, str], None],
    cell_timeout_s: float | None,
    total_timeout_s: float | None,
) -> Ended:
    """Run all code cells of `nb` on a fresh kernel in the caller's folder; never raises for what they do.

    Args:
        nb: the notebook; changed in place.
        parameters: injected as one cell after the one tagged `parameters`.
        save: given the unredacted notebook each time a copy should be published.
        on_cell: called as each code cell starts: its number from 1, how many there are, its first line.
        cell_timeout_s: seconds; None: no limit.
        total_timeout_s: seconds, start of the kernel included; None: no limit.
    """
    began = time.monotonic()
    for cell in nb.cells:
        cell.metadata.setdefault("tags", [])
    nb.metadata["papermill"] = {"version": papermill_version, "parameters": {}}
    nb.metadata.pop("widgets", None)
    if parameters:
        nb = parameterize_notebook(nb, dict(parameters), kernel_name=_KERNEL, language="python")
    dog = _Watchdog(cell_timeout_s, total_timeout_s)
    manager = _Manager(nb, save, on_cell, dog)
    client = PapermillNotebookClient(
        manager,
        kernel_name=_KERNEL,
        timeout=None,  # the watchdog's part
        startup_timeout=_START_LIMIT_S,
        coalesce_streams=True,
        on_cell_executed=manager.executed,
        store_widget_state=False,  # megabytes that no viewer of a saved copy shows
        extra_arguments=["--log-level=ERROR"],  # ipykernel warns about plain TCP, which never leaves loopback
        skip_cells_with_tag="",  # a cell that does not run is a failure, not an option
    )
    raised: BaseException | None = None
    manager.notebook_start()
    dog.start(client)
    try:
        # The kernel's own stdout would mix with what `--json` prints.
        client.execute(stdout=subprocess.DEVNULL)
    except BaseException as error:  # Ctrl-C too: the books are closed, then it is raised again
        raised = error
    finally:
        dog.stop()
    manager.notebook_complete()
    status, error_text, index = _judge(manager, dog.expired, raised)
    if index is not None:
        nb.cells[index].metadata.papermill["status"] = manager.FAILED
        nb.cells[index].metadata.papermill["exception"] = True
    nb.metadata.papermill["exception"] = status != "ok"
    manager.save()
    interrupted = raised if raised is not None and not isinstance(raised, Exception) else None
    return Ended(nb, status, time.monotonic() - began, error_text, index, interrupted)


def _judge(
    manager: _Manager, expired: str, raised: BaseException | None
) -> tuple[Literal["ok", "failed", "timeout"], str, int | None]:
    if expired:
        return (
            "timeout",
            f"{expired}, and its kernel was killed; raise the limit or lower the parameters",
            (manager.current),
        )
    if manager.left_at is not None:
        return "failed", _ENDED_ITSELF, manager.left_at
    if isinstance(raised, DeadKernelError):
        return (
            "failed",
            "the kernel died: the process ended itself, crashed, or ran out of memory",
            manager.current,
        )
    if raised is not None and not isinstance(raised, Exception):
        return "failed", f"interrupted ({type(raised).__name__})", manager.current
    if raised is not None:
        return "failed", f"{type(raised).__name__}: {raised!s:.{_MAX_ERROR}}", manager.current
    for index, cell in enumerate(manager.nb.cells):
        for output in cell.get("outputs", []):
            if output["output_type"] != "error":
                continue
            if output["ename"] == "SystemExit":
                return (
                    "failed",
                    _ENDED_ITSELF,
                    index,
                )
            if "raises-exception" not in cell.metadata.tags:
                return "failed", f"{output['ename']}: {output['evalue']:.{_MAX_ERROR}}", index
    for index, cell in enumerate(manager.nb.cells):
        done = cell.metadata.papermill["status"] == manager.COMPLETED
        if _runs(cell) and not (done and cell.execution_count):
            return "failed", "the cell was never executed", index
    return "ok", "", None
