"""Run a notebook headless: parameters checked first, a redacted copy, a sidecar that says how it went.

The kernel works in the caller's folder (as under papermill; nbval takes the notebook's), so that relative
paths given as parameters mean what the person typed. Every text that leaves goes through redaction first.

Knows nothing about what the notebooks do, how values are checked (`notebook_parameters`), or how a kernel
is driven (`notebook_engine`).
"""

from __future__ import annotations

import contextlib
import datetime as dt
import json
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from dsr1kit import about
from dsr1kit.errors import ConfigError, MissingExtra, NotebookFailed, UsageError
from dsr1kit.keys import REDACTED
from dsr1kit.notebook_parameters import (
    Parameter,
    Scalar,
    check_parameters,
    checked_values,
    find_notebook,
    kinds_of,
    list_parameters,
    parameters_cells,
    parameters_of,
    read_notebook,
)
from dsr1kit.paths import data_dir

__all__ = [
    "RESULTS_MIME",
    "FailingCell",
    "NotebookRun",
    "NotebookSettings",
    "Parameter",
    "check_parameters",
    "find_notebook",
    "list_parameters",
    "notebook_settings",
    "publish",
    "run_folder",
    "run_notebook",
]

RESULTS_MIME = "application/vnd.dsr1kit.results+json"
#: Called as each code cell starts: its number from 1, how many there are, its first line.
OnProgress = Callable[[int, int, str], None]
Status = Literal["ok", "failed", "timeout"]

_MAX_RESULTS_BYTES = 65_536
_SECRET_PARAMETER = re.compile(r"(?:^|_)(?:api_?key|token|secret|password|passwd)$", re.IGNORECASE)
_ANSI = re.compile(r"\x1b\[[0-9;]*m")


@dataclass(frozen=True, slots=True)
class FailingCell:
    """The cell that ended a run; `index` counts from 0 in the executed copy, injected cell included."""

    id: str
    index: int
    first_line: str
    error: str


@dataclass(frozen=True, slots=True)
class NotebookRun:
    """How a run ended.

    Attributes:
        notebook: the file that was run.
        executed: the executed, redacted copy.
        sidecar: the run's JSON: parameters, times, versions, hardware, seconds per cell, results.
        seconds: wall time with the start of the kernel.
        error: what happened and what to do; empty when well.
        results: what the notebook handed over with `publish`.
    """

    notebook: Path
    executed: Path
    sidecar: Path
    status: Status
    seconds: float
    failing_cell: FailingCell | None = None
    error: str = ""
    results: dict[str, Any] = field(default_factory=dict)

    def raise_for_status(self) -> NotebookRun:
        """Return self when the status is `ok`; raise NotebookFailed otherwise."""
        if self.status != "ok":
            raise NotebookFailed(f"{self.notebook.name}: {self.error} (executed copy: {self.executed})")
        return self


@dataclass(frozen=True, slots=True)
class NotebookSettings:
    """What `data/notebooks.yaml` says of a notebook; limits in seconds, for the test parameters."""

    cell_timeout_s: float
    total_timeout_s: float
    test_parameters: dict[str, Scalar]


def publish(**values: Any) -> None:
    """Hand small results (paths, verdict lines, numbers) from a notebook to whoever runs it.

    Paths under the working directory are published relative to it, so that no folder of a person's
    machine ends up in a saved notebook. A later value of the same name replaces the earlier one.

    Raises:
        UsageError: a value is not JSON, or all of them together exceed 64 KiB.
    """
    try:
        from IPython.display import display
    except ImportError:
        raise MissingExtra("publishing results", "notebooks", "ipython") from None
    clean = {name: _portable(value) for name, value in values.items()}
    try:
        size = len(json.dumps(clean, allow_nan=False).encode())
    except (TypeError, ValueError) as error:
        raise UsageError(f"publish takes JSON values and paths alone: {error}") from None
    if size > _MAX_RESULTS_BYTES:
        raise UsageError(f"publish got {size} bytes, at most {_MAX_RESULTS_BYTES} fit: write a file, publish its path")
    plain = "\n".join(f"{name}: {value}" for name, value in clean.items())
    display({RESULTS_MIME: clean, "text/plain": plain}, raw=True)  # type: ignore[no-untyped-call]  # IPython


def _portable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _portable(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_portable(v) for v in value]
    if isinstance(value, os.PathLike) or (isinstance(value, str) and value.startswith("/")):
        path = Path(value)
        with contextlib.suppress(ValueError):
            return path.absolute().relative_to(Path.cwd()).as_posix()
        return os.fspath(value)
    return value


def run_notebook(
    notebook: str | Path,
    parameters: Mapping[str, object] | None = None,
    *,
    out_dir: str | Path,
    cell_timeout_s: float | None = None,
    total_timeout_s: float | None = None,
    on_progress: OnProgress | None = None,
) -> NotebookRun:
    """Execute a notebook into `out_dir` as `NAME.ipynb` with `NAME.run.json` beside it.

    A notebook that declares a parameter `out_dir` gets this one's, unless `parameters` names another.

    Args:
        notebook: a path, or the name of a shipped notebook.
        parameters: values by name, texts or scalars; all checked before anything runs.
        out_dir: made where missing; an earlier run's files of the same name are replaced.
        cell_timeout_s: seconds one cell may take; None: no limit.
        total_timeout_s: seconds the whole may take, start of the kernel included; None: no limit.
        on_progress: called as each code cell starts.

    Raises:
        UsageError: unknown notebook or parameter, a wrong value, a limit that is not above 0, or an
            `out_dir` in which the copy would replace the notebook itself.
    """
    source, out = find_notebook(notebook), Path(out_dir)
    for name, limit in (("cell_timeout_s", cell_timeout_s), ("total_timeout_s", total_timeout_s)):
        if limit is not None and not limit > 0:
            raise UsageError(f"{name} must be above 0 seconds, or None for no limit, not {limit!r}")
    nb = read_notebook(source)
    passed = checked_values(nb, source, parameters or {})
    declared = parameters_of(nb, source) if len(parameters_cells(nb)) == 1 else []
    if "out_dir" not in passed and any(p.name == "out_dir" and "str" in kinds_of(p.annotation) for p in declared):
        passed["out_dir"] = str(out)
    executed, sidecar = out / source.name, out / f"{source.stem}.run.json"
    if executed.exists() and executed.samefile(source):
        raise UsageError(f"{executed} is the notebook itself; name another folder with --out")
    out.mkdir(parents=True, exist_ok=True)
    for stale in (executed, sidecar):  # a run killed half-way must not wear an earlier run's result
        stale.unlink(missing_ok=True)

    effective = {p.name: p.default for p in declared} | passed
    secret = {n for n, v in effective.items() if isinstance(v, str) and v and _SECRET_PARAMETER.search(n)}
    defaults = [p.default for p in declared if p.name in secret and p.default]

    # Imported here: papermill and Jupyter take about a second.
    from dsr1kit.notebook_engine import Redactor, execute, first_line

    clean = Redactor([*(str(effective[n]) for n in secret), *map(str, defaults)])

    def save(copy: Any) -> None:
        _write(executed, clean.notebook(copy))

    def tell(number: int, count: int, line: str) -> None:
        if on_progress is not None:
            on_progress(number, count, clean.text(line))

    started = dt.datetime.now(dt.UTC)
    ended = execute(nb, passed, save=save, on_cell=tell, cell_timeout_s=cell_timeout_s, total_timeout_s=total_timeout_s)
    failing = None
    if ended.failing_index is not None:
        cell = ended.nb.cells[ended.failing_index]
        line = clean.text(first_line(cell.source))
        failing = FailingCell(cell.id, ended.failing_index, line, clean.text(ended.error))
    error = clean.text(ended.error)
    if failing is not None:
        error = f"cell {failing.index} (id {failing.id}, {failing.first_line!r}): {error}"
    results: dict[str, Any] = clean.tree(_results(ended.nb))
    run = NotebookRun(source, executed, sidecar, ended.status, ended.seconds, failing, error, results)
    told = {
        "notebook": _portable(source),
        "executed": _portable(executed),
        "status": run.status,
        "error": error or None,
        "failing_cell": asdict(failing) if failing else None,
        "parameters": {n: REDACTED if n in secret else v for n, v in effective.items()},
        "limits": {"cell_timeout_s": cell_timeout_s, "total_timeout_s": total_timeout_s},
        "started_at": started.isoformat(timespec="milliseconds"),
        "finished_at": dt.datetime.now(dt.UTC).isoformat(timespec="milliseconds"),
        "seconds": round(run.seconds, 3),
        "cells": _seconds_per_cell(ended.nb),
        "results": results,
        "versions": about.versions(),
        "hardware": about.hardware(),
    }
    _write(sidecar, json.dumps(clean.tree(told), indent=2, ensure_ascii=False) + "\n")
    if ended.interrupted is not None:
        raise ended.interrupted
    return run


def notebook_settings() -> dict[str, NotebookSettings]:
    """What `data/notebooks.yaml` says, by notebook name without `.ipynb`.

    Raises:
        ConfigError: naming the file, the notebook and the key.
    """
    import yaml

    path = data_dir() / "notebooks.yaml"
    try:
        entries = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read as YAML: {error}") from None
    return {str(name): _settings_of(path, str(name), entry) for name, entry in _mapping(path, "", entries).items()}


def _mapping(path: Path, where: str, value: object, keys: tuple[str, ...] = ()) -> dict[str, Any]:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ConfigError(f"{path}: {where or 'the file'} must be a mapping, not {value!r:.60}")
    if keys and (odd := set(value) ^ set(keys)):
        raise ConfigError(f"{path}: {where} must have exactly {', '.join(keys)}; see to {', '.join(sorted(odd))}")
    return value


def _settings_of(path: Path, name: str, entry: object) -> NotebookSettings:
    fields = _mapping(path, name, entry, ("timeout_s", "test_parameters"))
    limits = _mapping(path, f"{name}.timeout_s", fields["timeout_s"], ("cell", "total"))
    for key, limit in limits.items():
        if isinstance(limit, bool) or not isinstance(limit, int | float) or not 0 < limit < math.inf:
            raise ConfigError(f"{path}: {name}.timeout_s.{key} must be seconds above 0, not {limit!r}")
    parameters = _mapping(path, f"{name}.test_parameters", fields["test_parameters"])
    for key, value in parameters.items():
        if not isinstance(value, str | int | float | bool | None):
            raise ConfigError(f"{path}: {name}.test_parameters.{key} must be a scalar, not {value!r:.60}")
    return NotebookSettings(float(limits["cell"]), float(limits["total"]), parameters)


def _results(nb: Any) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for cell in nb.cells:
        for output in cell.get("outputs", []):
            results |= output.get("data", {}).get(RESULTS_MIME, {})
    return results


def _seconds_per_cell(nb: Any) -> list[dict[str, Any]]:
    return [
        {
            "index": index,
            "id": cell.id,
            "status": cell.metadata.papermill.status,
            "seconds": cell.metadata.papermill.duration,
        }
        for index, cell in enumerate(nb.cells)
        if cell.cell_type == "code"
    ]


def _write(path: Path, text: str) -> None:
    """Replace the file in one step: a reader, or a kill, never meets half of it."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def run_folder(out_dir: str, name: str) -> Path:
    """The folder a notebook writes to: `out_dir`, or, where that is empty, a new one under `runs/`.

    Relative to the working directory, so that it can be shown in a saved notebook.
    """
    if out_dir:
        return Path(out_dir)
    return Path("runs") / f"{name}-{dt.datetime.now(dt.UTC):%Y%m%d-%H%M%S}"
