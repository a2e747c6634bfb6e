"""Where the kit's own data and notebooks lie, in a checkout and in an installed wheel alike."""

from __future__ import annotations

from pathlib import Path

from dsr1kit.errors import RunError

_PACKAGE = Path(__file__).resolve().parent


def _shipped(in_wheel: str, in_checkout: str) -> Path:
    for candidate in (_PACKAGE / in_wheel, _PACKAGE.parent / in_checkout):
        if candidate.is_dir():
            return candidate
    raise RunError(f"the kit's {in_checkout}/ folder is missing beside {_PACKAGE}; reinstall dsr1kit")


def data_dir() -> Path:
    """Folder of the shipped data: channels.toml, tiny-r1/, weather/, questions/, notebooks.yaml."""
    return _shipped("_data", "data")


def notebooks_dir() -> Path:
    """Folder of the shipped notebooks."""
    return _shipped("_notebooks", "notebooks")
