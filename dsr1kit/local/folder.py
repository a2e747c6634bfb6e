"""The folder of a downloaded model: its manifest, whether it is whole, and how a new state takes the old one's place.

A manifest (`.dsr1kit-weights.json`) says what a whole folder holds; it is written last and taken away first. What is
on its way lies in `.incoming`, so that the old model stays usable until the new one is complete. Knows no network.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import os
import re
import shutil
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from dsr1kit.errors import ModelError, UsageError

MANIFEST, INCOMING = ".dsr1kit-weights.json", ".incoming"
WEIGHTS = (".safetensors", ".gguf")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib")  # they run code when they are loaded
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_LOCK, _BEFORE, _PLAN = ".dsr1kit-weights.lock", "before.json", "plan.json"
_SERIES = re.compile(r"(.+)-(\d{5})-of-(\d{5})(\.safetensors|\.gguf)")
_MOST_HEADER_BYTES = 100_000_000  # what the safetensors library itself accepts


@dataclass(frozen=True, slots=True)
class Kept:
    """A file that was downloaded: size in bytes, digest, and when it was last changed, in nanoseconds."""

    size: int
    digest: str
    mtime_ns: int

    def untouched(self, path: Path) -> bool:
        """Whether the file is as it was written, by size and time."""
        try:
            stat = path.stat()
        except OSError:
            return False
        return (stat.st_size, stat.st_mtime_ns) == (self.size, self.mtime_ns)


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a folder holds, and of which model.

    Attributes:
        revision: what was asked for, a branch, tag or commit; `commit` is what it was then.
        patterns: the `--file` patterns in force; empty: the usual choice.
        files: by path below the folder.
    """

    model: str
    source: str
    revision: str
    commit: str
    licence: str
    patterns: tuple[str, ...]
    files: Mapping[str, Kept]

    def command(self, folder: Path) -> str:
        """Return the command that finishes or renews this folder."""
        where = "" if folder.resolve() == default_folder(self.model, self.source).resolve() else f" --to {folder}"
        return f"dsr1kit weights {self.model}" + (" --source modelscope" if self.source == "modelscope" else "") + where


def default_folder(model: str, source: str) -> Path:
    """Return where a model lies unless the person says otherwise: below `$XDG_CACHE_HOME` or `~/.cache`."""
    cache = os.environ.get("XDG_CACHE_HOME", "")
    try:
        root = Path(cache) if cache.startswith("/") else Path.home() / ".cache"
    except RuntimeError:
        raise UsageError(
            "there is no home directory to keep models in: export HOME=... or XDG_CACHE_HOME=..."
        ) from None
    return root / "dsr1kit" / "models" / source / model


def read_manifest(folder: Path) -> Manifest | None:
    """Return the manifest of a whole folder; None where there is none, or none that can be read."""
    return _read(folder / MANIFEST)


def read_earlier(folder: Path) -> Manifest | None:
    """Return the last manifest, also that of a folder which was left in the middle of a change."""
    return read_manifest(folder) or _read(folder / INCOMING / _BEFORE)


def read_plan(folder: Path) -> Manifest | None:
    """Return what an unfinished download was for; its files are not filled in."""
    return _read(folder / INCOMING / _PLAN)


def unfinished(folder: Path) -> str:
    """Return why `folder` must not be used as a model: a download into it is not complete. "" where that is not so.

    A folder that dsr1kit did not download is never unfinished. Sizes are compared, checksums are not.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        if not (folder / INCOMING).is_dir() and not (folder / MANIFEST).exists():
            return ""
        plan = read_plan(folder) or read_earlier(folder)
        again = plan.command(folder) if plan else f"dsr1kit weights MODEL --to {folder}"
        return f"{folder} is not downloaded to the end: run {again} again to finish it"
    short = [path for path, kept in manifest.files.items() if _size(folder / path) != kept.size]
    if not short:
        return ""
    return (
        f"{folder} is not whole: {len(short)} of {len(manifest.files)} files are missing or have another size "
        f"({', '.join(short[:3])}{', ...' if len(short) > 3 else ''}): run {manifest.command(folder)} --sync to mend it"
    )


def safe_path(path: str) -> bool:
    """Whether a hub's path stays below the folder it is written to, and is none of our own."""
    parts = path.split("/")
    return (
        0 < len(path) <= 1024
        and path.isprintable()
        and "\\" not in path
        and all(part not in ("", ".", "..") and len(part.encode("utf-8", "replace")) <= 200 for part in parts)
        and parts[0] not in (MANIFEST, INCOMING, _LOCK)
    )


def series_of(path: str) -> tuple[str, int] | None:
    """Return (what the parts of a split file have in common, how many there are); None for a file that is not split."""
    found = _SERIES.fullmatch(path)
    return (f"{found[1]}-*-of-{found[3]}{found[4]}", int(found[3])) if found else None


def check_weights(files: Mapping[str, Path], mend: str = "the repository is broken, take another") -> None:
    """Check that weights are what they call themselves and that no shard is missing.

    Args:
        files: where each path of the model lies now.
        mend: what to do about one that is not.

    Raises:
        ModelError: a file is no safetensors or GGUF, is cut short, or an index names a shard that is not there.
    """
    for name, path in files.items():
        if name.endswith(".safetensors"):
            _check_safetensors(name, path, mend)
        elif name.endswith(".gguf"):
            with path.open("rb") as opened:
                if opened.read(4) != b"GGUF":
                    raise ModelError(f"{name} does not begin as a GGUF file does: {mend}")
        elif name.endswith(".safetensors.index.json"):
            try:
                shards = set(json.loads(path.read_bytes())["weight_map"].values())
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                raise ModelError(f"{name} is no index of shards: {mend}") from None
            parent = PurePosixPath(name).parent
            if missing := sorted(shard for shard in shards if str(parent / str(shard)) not in files):
                raise ModelError(
                    f"{name} names {missing[0]} ({len(missing)} shards in all) that are not among the files: unless "
                    f"--file left them out, {mend}"
                )


def _check_safetensors(name: str, path: Path, mend: str) -> None:
    size = path.stat().st_size
    broken = f"{name} is no whole safetensors file ({size} bytes): {mend}"
    with path.open("rb") as opened:
        start = opened.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(size - 8, _MOST_HEADER_BYTES):
            raise ModelError(broken)
        try:
            header = json.loads(opened.read(length))
            end = max(
                (int(entry["data_offsets"][1]) for key, entry in header.items() if key != "__metadata__"), default=0
            )
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
            raise ModelError(broken) from None
    if 8 + length + end != size:
        raise ModelError(f"{name} is no whole safetensors file ({size} bytes of {8 + length + end}): {mend}")


class Change:
    """A change of a folder, prepared in `.incoming`; a kill leaves the old state or one told unfinished.

    Args:
        folder: the model's, which exists.
        manifest: what the folder holds when the change is done; of its files only the digest and size count yet.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self._folder, self._manifest = folder, manifest
        self.staging = folder / INCOMING

    def begin(self, keep: set[str]) -> None:
        """Make the staging folder and drop what an earlier change left there, but for the names in `keep`."""
        self.staging.mkdir(exist_ok=True)
        for entry in self.staging.iterdir():
            if entry.name not in keep | {_BEFORE}:
                entry.unlink()
        _write(self.staging / _PLAN, self._manifest)

    def commit(self, arrived: Mapping[str, Path], gone: set[str], earlier: Manifest | None) -> None:
        """Put the staged files in place, take away those in `gone`, and write the manifest last.

        Args:
            arrived: the whole, checked file for each path that is new or changed.
            gone: paths of the earlier manifest that the model no longer has.
            earlier: what the folder held before, to know what is the person's own: a small file that was changed by
                hand is kept as `NAME.yours`, and one that is gone from the hub stays if it was changed.
        """
        known = dict(earlier.files) if earlier else {}
        self.staging.mkdir(exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            (self._folder / MANIFEST).replace(self.staging / _BEFORE)
        for name, staged in arrived.items():
            target = self._folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            ours = name in known and known[name].untouched(target)
            if target.is_file() and not ours and target.suffix not in WEIGHTS:
                target.replace(_free_name(target))
            staged.replace(target)
        for name in gone:
            target = self._folder / name
            if safe_path(name) and name in known and known[name].untouched(target):
                target.unlink()
        files = {}
        for name, kept in self._manifest.files.items():
            stat = (self._folder / name).stat()
            files[name] = Kept(stat.st_size, kept.digest, stat.st_mtime_ns)
        _write(self._folder / MANIFEST, self._manifest, files)
        shutil.rmtree(self.staging)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[bool]:
    """Try to be the only one who changes `folder`, which exists; says whether that is so, without waiting.

    Raises:
        UsageError: the folder cannot be written to.
    """
    try:
        descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise UsageError(f"{folder} cannot be written to ({error.strerror}); name another with --to DIR") from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        except OSError as error:
            raise ModelError(
                f"{folder} lies where files cannot be locked ({error.strerror}): name another --to DIR"
            ) from None
        yield True
    finally:
        os.close(descriptor)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1


def _free_name(path: Path) -> Path:
    names = (path.with_name(f"{path.name}.yours{number or ''}") for number in itertools.count())
    return next(name for name in names if not name.exists())


def _write(path: Path, manifest: Manifest, files: Mapping[str, Kept] | None = None) -> None:
    told: dict[str, Any] = {
        "format": 1,
        "model": manifest.model,
        "source": manifest.source,
        "revision": manifest.revision,
        "commit": manifest.commit,
        "licence": manifest.licence,
        "patterns": list(manifest.patterns),
        "files": {
            name: {"size": kept.size, "digest": kept.digest, "mtime_ns": kept.mtime_ns}
            for name, kept in (files if files is not None else manifest.files).items()
        },
    }
    draft = path.with_name(path.name + ".new")
    with draft.open("w", encoding="utf-8") as opened:
        json.dump(told, opened, ensure_ascii=False, indent=1)
        opened.flush()
        os.fsync(opened.fileno())
    draft.replace(path)
    # The order of the renames before it must outlive a power cut, not only a kill.
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read(path: Path) -> Manifest | None:
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        return Manifest(
            model=str(told["model"]),
            source=str(told["source"]),
            revision=str(told["revision"]),
            commit=str(told["commit"]),
            licence=str(told["licence"]),
            patterns=tuple(map(str, told["patterns"])),
            files={
                str(name): Kept(int(kept["size"]), str(kept["digest"]), int(kept["mtime_ns"]))
                for name, kept in told["files"].items()
            },
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
