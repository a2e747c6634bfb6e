"""Run notebooks with their own defaults, from an empty folder, and save them with their outputs.

python tests/notebooks/refresh.py [NAME ...]     (no name: all; `make notebooks` does that)
"""

import os
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parents[2] / "notebooks"


def refresh(path: Path) -> None:
    nb = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as empty:
        NotebookClient(nb, timeout=900, kernel_name="python3", resources={"metadata": {"path": empty}}).execute()
    for cell in nb.cells:
        cell.metadata.pop("execution", None)  # time stamps change with every run and say nothing
    nb.metadata.pop("widgets", None)
    nb.metadata["language_info"] = {"name": "python"}
    nbformat.write(nb, path)
    print(path.name)


if __name__ == "__main__":
    os.environ.pop("MPLBACKEND", None)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    for name in sys.argv[1:] or sorted(p.stem for p in FOLDER.glob("*.ipynb")):
        refresh(FOLDER / f"{name}.ipynb")
