"""Checkpoints that are whole or not there: sealed when all is written, looked at before one is resumed from.

Knows files alone. transformers writes a checkpoint file by file into its last place, so that a kill or a full disk
leaves a half one, which it would then take.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from pathlib import Path

_SEAL = "complete.json"


def seal(folder: Path) -> None:
    """Say that a checkpoint is whole: names and sizes of its files, in one last file put in place at once."""
    sizes = {str(path.relative_to(folder)): path.stat().st_size for path in _files(folder)}
    part = folder / f"{_SEAL}.part"
    with part.open("w", encoding="utf-8") as file:
        json.dump(sizes, file)
        file.flush()
        os.fsync(file.fileno())
    part.replace(folder / _SEAL)


def is_whole(folder: Path) -> bool:
    """Whether it was sealed and its files are still as long as they were."""
    try:
        sizes = json.loads((folder / _SEAL).read_text(encoding="utf-8"))
        return bool(sizes) and all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, AttributeError):
        return False


def newest(folder: Path) -> Path | None:
    """The whole checkpoint of the latest step; None: there is none."""
    whole = [path for path in _checkpoints(folder) if is_whole(path)]
    return max(whole, key=step_of, default=None)


def clear_halves(folder: Path) -> None:
    """Remove what is no whole checkpoint, so that nothing resumes from it and its room is free."""
    for path in _checkpoints(folder):
        if not is_whole(path):
            shutil.rmtree(path, ignore_errors=True)


def step_of(folder: Path) -> int:
    """The step after which a checkpoint was made."""
    with contextlib.suppress(ValueError):
        return int(folder.name.rpartition("-")[2])
    return -1


def _checkpoints(folder: Path) -> list[Path]:
    return [path for path in folder.glob("checkpoint-*") if path.is_dir()]


def _files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.startswith(_SEAL)]
