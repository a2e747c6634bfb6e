"""Build the wheel, install it into a clean environment, and ask the shipped model from an empty folder.

Run by `make test`. A checkout finds data and notebooks beside the package; only an installed wheel shows
that they were packed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CONSTRAINTS = str(ROOT / "constraints.txt")
ENVIRONMENT = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
SHIPPED = """
import sys
import dsr1kit
heavy = {"torch", "transformers", "pandas", "matplotlib", "aiohttp"} & set(sys.modules)
assert not heavy, f"import dsr1kit imported {heavy}"
assert "site-packages" in dsr1kit.__file__, dsr1kit.__file__
from dsr1kit.notebooks import notebook_settings
from dsr1kit.paths import notebooks_dir
shipped = {path.stem for path in notebooks_dir().glob("*.ipynb")}
assert set(notebook_settings()) <= shipped, shipped
"""


def run(title: str, *command: str, cwd: Path, **extra: str) -> str:
    """Run a command and return its stdout; its words are shown when it fails."""
    began = time.monotonic()
    ran = subprocess.run(
        command, cwd=cwd, env=ENVIRONMENT | extra, capture_output=True, text=True, check=False, timeout=900
    )
    print(f"wheel: {title}: {time.monotonic() - began:.0f} s", flush=True)
    if ran.returncode != 0:
        sys.exit(f"wheel: {title} failed with {ran.returncode}\n{ran.stdout[-4000:]}\n{ran.stderr[-4000:]}")
    return ran.stdout


def main() -> None:
    """Build, install, ask; exits non-zero with the reason."""
    with tempfile.TemporaryDirectory(prefix="dsr1kit-wheel-") as name:
        folder = Path(name)
        empty = folder / "empty"
        empty.mkdir()
        dist = str(folder / "dist")
        # The build backend under the same constraints as everything else.
        run(
            "build",
            sys.executable,
            "-m",
            "build",
            "--wheel",
            "--outdir",
            dist,
            cwd=ROOT,
            PIP_CONSTRAINT=CONSTRAINTS,
        )
        (wheel,) = (folder / "dist").glob("*.whl")
        print(f"wheel: {wheel.name}, {wheel.stat().st_size / 1e6:.1f} MB")

        venv = folder / "venv"
        run("venv", sys.executable, "-m", "venv", str(venv), cwd=empty)
        index = os.environ.get("TORCH_INDEX")
        more = ["--extra-index-url", index] if index else []
        pip = [str(venv / "bin" / "python"), "-m", "pip", "install", "--quiet", "--no-compile", *more]
        run("install", *pip, "-c", CONSTRAINTS, f"{wheel}[local]", cwd=empty)

        run("import", str(venv / "bin" / "python"), "-c", SHIPPED, cwd=empty)
        ask = [str(venv / "bin" / "dsr1kit"), "ask", "--local", "tiny-r1", "What is 12 + 30?", "--json"]
        reply = json.loads(run("ask", *ask, cwd=empty))
        print(f"wheel: asked 12 + 30, outcome {reply['outcome']}, answer {reply['answer']!r}")
        if reply["outcome"] != "ok" or not reply["answer"].strip():
            sys.exit(f"wheel: no answer: {reply}")
        if left := sorted(str(path) for path in empty.rglob("*")):
            sys.exit(f"wheel: asking left files in the caller's folder: {left}")


if __name__ == "__main__":
    main()
