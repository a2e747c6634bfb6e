"""Which model a name means, and whether two names mean one.

Knows folders, hub ids and what `dsr1kit weights` notes; nothing about what models hold.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from dsr1kit.errors import Dsr1kitError
from dsr1kit.local.folder import read_manifest
from dsr1kit.local.places import is_id, locate


def sha256_of(path: Path) -> str:
    """Of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def same_model(one: str, other: str) -> bool:
    """Whether two names mean one model: by name, place or, of two folders, their weights' bytes."""
    places = [place_of(one), place_of(other)]
    if one == other or places[0] == places[1]:
        return True
    folders = [Path(place) for place in places]
    if not all(folder.is_dir() for folder in folders):
        return False
    files = [sorted(folder.glob("*.safetensors")) for folder in folders]
    sizes = [[(file.name, file.stat().st_size) for file in each] for each in files]
    return sizes[0] == sizes[1] and all(sha256_of(a) == sha256_of(b) for a, b in zip(*files, strict=True))


def place_of(name: str) -> str:
    """Where a model lies, or the hub id it was fetched from; the name itself where it is not here."""
    try:
        place, gguf = locate(name)
    except Dsr1kitError:
        return name
    if is_id(name):
        return name
    if gguf:
        return str((Path(place) / gguf).resolve())
    return str(Path(place).resolve()) if (told := read_manifest(Path(place))) is None else told.model
