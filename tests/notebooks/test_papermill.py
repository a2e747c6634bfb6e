"""Every notebook runs to its end under papermill, small, from a folder that holds nothing."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from dsr1kit.notebooks import notebook_settings, run_notebook

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = notebook_settings()
CASES = [
    # The runner's own limit ends a run first, with the cell named; pytest's is for a runner that hangs.
    pytest.param(path, marks=pytest.mark.timeout(SETTINGS[path.stem].total_timeout_s + 120), id=path.stem)
    for path in sorted((ROOT / "notebooks").glob("*.ipynb"), reverse=True)  # the long ones, which train, begin first
    if path.stem in SETTINGS  # test_static.py complains about those that are missing there
]


@pytest.mark.parametrize("path", CASES)
def test_runs_with_its_test_parameters(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = SETTINGS[path.stem]
    monkeypatch.chdir(tmp_path)
    # Set, it would keep figures out of the outputs.
    monkeypatch.delenv("MPLBACKEND", raising=False)
    keep = os.environ.get("NOTEBOOK_RUNS")  # where the Makefile keeps the executed copies
    run = run_notebook(
        path,
        settings.test_parameters,
        out_dir=Path(keep) / path.stem if keep else "out",
        cell_timeout_s=settings.cell_timeout_s,
        total_timeout_s=settings.total_timeout_s,
    )
    run.raise_for_status()
    told = json.loads(run.sidecar.read_text(encoding="utf-8"))
    assert told["status"] == "ok"
    assert {cell["status"] for cell in told["cells"]} == {"completed"}
