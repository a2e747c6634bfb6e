"""What a result was made with: versions of the packages that matter, and the hardware; imports none."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
from typing import Any

from dsr1kit.local.hardware import usable_cores

_PACKAGES = (
    "dsr1kit", "aiohttp", "httptools", "torch", "transformers", "tokenizers", "bitsandbytes", "accelerate",
    "peft", "trl", "datasets", "numpy", "scipy", "pandas", "matplotlib", "papermill", "nbclient", "ipykernel",
)  # fmt: skip


def versions() -> dict[str, str]:
    """Versions of Python and of those packages that are installed."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def hardware() -> dict[str, Any]:
    """Platform, usable cores, memory in bytes, and the names of NVIDIA GPUs."""
    gpus: list[str] = []
    if smi := shutil.which("nvidia-smi"):
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            query = [smi, "--query-gpu=name", "--format=csv,noheader"]
            # Fixed arguments, a program found on the person's own PATH.
            told = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True)  # noqa: S603
            gpus = told.stdout.split("\n")[:-1]
    return {
        "platform": platform.platform(),
        "cores": usable_cores(),
        "ram_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpus": gpus,
    }
