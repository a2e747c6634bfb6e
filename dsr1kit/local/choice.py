"""Which files of a model are downloaded: safetensors or GGUF, and the small files beside them; never pickles or code.

Knows paths, sizes and checksums as a hub lists them; nothing about networks or disks.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence
from pathlib import PurePosixPath

from dsr1kit.errors import ModelError, UsageError
from dsr1kit.local.folder import PICKLES, WEIGHTS, safe_path, series_of
from dsr1kit.local.hub import Listing, RemoteFile

_BESIDE = (
    "config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*",
    "merges.txt", "*.jinja", "*.safetensors.index.json", "README*", "LICENSE*", "LICENCE*", "NOTICE*",
)  # fmt: skip
# Code is never run; the others are for frameworks that are not used here.
_NEVER = (*PICKLES, ".py", ".msgpack", ".h5", ".onnx", ".npz", ".so")


def select(model: str, files: Sequence[RemoteFile], patterns: Sequence[str] = ()) -> list[RemoteFile]:
    """Return the files of a model that are downloaded: weights, and the small ones beside them.

    Without patterns these are the safetensors at the top, or the one GGUF there is. A pattern that finds one part of
    a split file takes all of them.

    Raises:
        UsageError: a pattern finds nothing, or only what is never downloaded; several GGUF files and no pattern.
        ModelError: the model has neither safetensors nor GGUF.
    """
    usable = [file for file in files if not file.path.lower().endswith(_NEVER)]
    small = beside(usable)
    if patterns:
        found = [file for file in usable if _matches(file.path, patterns)]
        for pattern in patterns:
            if not any(_matches(file.path, (pattern,)) for file in usable):
                raise _nothing_found(model, pattern, files)
        split = {series[0] for file in found if (series := series_of(file.path))}
        found += [file for file in usable if (series := series_of(file.path)) and series[0] in split]
        return list({file.path: file for file in (*found, *small)}.values())
    safetensors = [
        file for file in usable
        if file.path.endswith(".safetensors") and "/" not in file.path and not file.path.startswith("consolidated")
    ]  # fmt: skip
    if safetensors:
        return list({file.path: file for file in (*safetensors, *small)}.values())
    ggufs = [file for file in usable if file.path.endswith(".gguf")]
    if not ggufs:
        pickles = [file.path for file in files if file.path.lower().endswith(PICKLES)]
        if pickles:
            raise ModelError(
                f"{model} holds its weights only as pickles ({', '.join(pickles[:3])}), which can run any code when "
                "they are loaded and are never downloaded: look for a repository of the same model with safetensors, "
                "or for a converted branch (--revision refs/pr/N)"
            )
        raise ModelError(f"{model} holds no *.safetensors at its top and no *.gguf: name what you mean with --file")
    choices: dict[str, list[RemoteFile]] = {}
    for file in ggufs:
        series = series_of(file.path)
        choices.setdefault(series[0] if series else file.path, []).append(file)
    if len(choices) > 1:
        raise _several(model, choices)
    return [*ggufs, *small]


def beside(files: Sequence[RemoteFile]) -> list[RemoteFile]:
    """Return the small files that a model is loaded with: configurations, tokenizer, template, licence."""
    return [
        file for file in files
        if "/" not in file.path and _matches(file.path, _BESIDE) and not file.path.lower().endswith(_NEVER)
    ]  # fmt: skip


def size_text(count: int) -> str:
    """Return a size in bytes as people write it: 512 B, 1.2 MB, 3.6 GB."""
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            break
        size, unit = size / 1000, {"B": "kB", "kB": "MB", "MB": "GB", "GB": "TB"}[unit]
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"


def _matches(path: str, patterns: Sequence[str]) -> bool:
    name = PurePosixPath(path).name
    return any(fnmatch.fnmatchcase(path, pattern) or fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _nothing_found(model: str, pattern: str, files: Sequence[RemoteFile]) -> UsageError:
    if any(_matches(file.path, (pattern,)) for file in files):
        return UsageError(
            f"--file {pattern} finds in {model} only what is never downloaded (pickles and code can do anything to "
            "this machine): choose *.safetensors or *.gguf"
        )
    there = sorted(file.path for file in files if file.path.endswith(WEIGHTS))
    shown = ", ".join(there[:12]) + (", ..." if len(there) > 12 else "")
    return UsageError(f"--file {pattern} finds nothing in {model}; it holds {shown or 'no safetensors and no GGUF'}")


def _several(model: str, choices: dict[str, list[RemoteFile]]) -> UsageError:
    by_size = sorted(choices.items(), key=lambda choice: sum(file.size for file in choice[1]))
    lines = [f"  {size_text(sum(file.size for file in parts)):>9}  {name}" for name, parts in by_size]
    usual = next((name for name, _ in by_size if "q4_k_m" in name.lower()), by_size[0][0])
    why = ", the usual balance of size and quality" if "q4_k_m" in usual.lower() else ""
    return UsageError(
        f"{model} holds {len(choices)} GGUF models; choose with --file:\n" + "\n".join(lines)
        + f"\nfor instance{why}: dsr1kit weights {model} --file '{usual}'"
    )  # fmt: skip


def sound(wanted: dict[str, RemoteFile], distinct: int, listing: Listing, title: str) -> tuple[RemoteFile, ...]:
    """Return the wanted files, or raise ModelError where the listing is one that no honest hub gives."""
    if distinct != len(listing.files):
        raise ModelError(f"{title} lists a file twice: this is no hub to trust, take another (HF_ENDPOINT, --source)")
    for file in wanted.values():
        if not safe_path(file.path):
            raise ModelError(
                f"{title} lists a file called {file.path[:80]!r}, which would be written outside of its folder: this "
                "is no hub to trust, take another (HF_ENDPOINT, --source)"
            )
        if file.size < 0 or not re.fullmatch(r"sha256:[0-9a-f]{64}|git:[0-9a-f]{40}", file.digest):
            raise ModelError(
                f"{title} states no checksum for {file.path}, so it cannot be checked: take another source"
            )
    for path in wanted:
        series = series_of(path)
        if series and sum(series == series_of(other) for other in wanted) != series[1]:
            raise ModelError(f"{title} lists not all {series[1]} parts of {series[0]}: the repository is incomplete")
    return tuple(wanted[path] for path in sorted(wanted))
