"""Where a model lies on this machine: shipped, a folder, a GGUF file, fetched by the kit, or in the hub's own cache.

Knows names and folders; asks no network and loads nothing.
"""

from __future__ import annotations

import fnmatch
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dsr1kit.errors import ModelError, UnknownName
from dsr1kit.local.folder import HUB_ID, PICKLES, check_weights, default_folder, read_manifest, series_of, unfinished
from dsr1kit.local.hub import hub_home
from dsr1kit.paths import data_dir

_VOCABULARIES = ("tokenizer.json", "*.model", "vocab.json", "*.tiktoken")  # a tokenizer has one of these files


def locate(source: str) -> tuple[str, str | None]:
    """Return the folder of a model, and the GGUF file within it (its path below the folder), if it is one.

    For a hub id that is not on this machine the id itself; `bring` fetches it.

    Raises:
        UnknownName: neither a known name, a path nor a hub id.
        ModelError: a path that does not exist, or that holds no safetensors.
    """
    if source == "tiny-r1":
        return str(data_dir() / "tiny-r1"), None
    path = Path(source).expanduser()
    if source.endswith(".gguf"):
        if not path.is_file():
            raise ModelError(f"there is no file {path}; download the GGUF first, then name its path")
        return str(path.parent), path.name
    if path.is_dir():
        return _in_folder(path)
    if path.is_file():
        if path.suffix.lower() in PICKLES:
            raise ModelError(
                f"{path} is a pickle, which can run any code when it is loaded, and never is: take the model as "
                "safetensors or GGUF, or convert it with save_pretrained() where you trust it"
            )
        raise ModelError(f"{path} is a file: name the folder with config.json and *.safetensors, or a .gguf file")
    if HUB_ID.fullmatch(source):
        # What `dsr1kit weights` has fetched comes before what other programs have.
        fetched = (default_folder(source, origin) for origin in ("hub", "modelscope"))
        found = next((folder for folder in fetched if read_manifest(folder) is not None), None) or _cached(source)
        return (source, None) if found is None else _in_folder(found)
    if "/" in source:
        raise ModelError(f"there is no folder {path}; name a folder, a hub id (org/name) or a .gguf file")
    raise UnknownName("model", source, ["tiny-r1"], hint="(or a folder, a hub id org/name, a .gguf file)")


def read_object(path: Path) -> dict[str, Any]:
    """The object in one of a model's JSON files. Raises ModelError where it cannot be read, or is none."""
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read as JSON ({error}): copy or fetch it again, whole") from None
    if not isinstance(told, dict):
        raise ModelError(f"{path} holds no JSON object: copy or fetch it again, whole")
    return told


def is_here(source: str) -> bool:
    """Whether a model need not be fetched. Raises as `locate`."""
    return Path(locate(source)[0]).is_dir()


def is_id(source: str) -> bool:
    """Whether a name is a hub id, and no folder here that looks like one."""
    return HUB_ID.fullmatch(source) is not None and not Path(source).exists()


def _in_folder(path: Path) -> tuple[str, str | None]:
    if told := unfinished(path):
        raise ModelError(told)
    safetensors = list(path.glob("*.safetensors"))
    if not safetensors and (files := _ggufs(path)):
        if len(files) > 1:
            named = ", ".join(str(path / file) for file in files[:5])
            raise ModelError(f"{path} holds {len(files)} GGUF models: name the one to open ({named})")
        return str(path), files[0]
    if not (path / "config.json").is_file() or not safetensors:
        raise ModelError(_no_model(path))
    require_vocabulary(str(path), [file.name for file in path.iterdir()])
    return str(path), None


def require_vocabulary(source: str, files: Iterable[str]) -> None:
    """Raise ModelError where none of a model's files is a tokenizer's: transformers would make up an empty one."""
    if not _vocabularies(files):
        raise ModelError(f"{source} has no tokenizer (tokenizer.json): take it from the model's page or its base's")


def _ggufs(path: Path) -> list[str]:
    """The GGUF models of a folder, by their paths below it: files, and of split ones the first part, which names the
    others for llama.cpp. Repositories keep those in folders of their own."""
    files = sorted(file.relative_to(path).as_posix() for file in (*path.glob("*.gguf"), *path.glob("[!.]*/*.gguf")))
    firsts: dict[str, str] = {}
    for file in files:
        series = series_of(file)
        firsts.setdefault(series[0] if series else file, file)
    return list(firsts.values())


def _no_model(path: Path) -> str:
    """What a folder lacks that holds no model."""
    if not any(path.iterdir()):
        return f"{path} is empty: copy a model into it (config.json, *.safetensors, a tokenizer), or name another"
    if pickles := sorted(file.name for file in path.iterdir() if file.suffix.lower() in PICKLES):
        return (
            f"{path} needs config.json and *.safetensors; what it holds ({', '.join(pickles[:3])}) are pickles, which "
            "can run any code when they are loaded, and never are: convert them with save_pretrained() where you trust "
            "them"
        )
    lacking = [] if (path / "config.json").is_file() else ["config.json"]
    lacking += [] if list(path.glob("*.safetensors")) else ["*.safetensors (or a .gguf file)"]
    return f"{path} lacks {' and '.join(lacking)}: name the folder that holds a model's files themselves"


def _vocabularies(files: Iterable[str]) -> list[str]:
    return [file for file in files if "/" not in file and any(fnmatch.fnmatchcase(file, at) for at in _VOCABULARIES)]


def _cached(model: str) -> Path | None:
    """The main branch of a model in the cache of the hub's own client, which other programs fill, if it is all there.

    Laid out as https://huggingface.co/docs/huggingface_hub/guides/manage-cache says.
    """
    kept = _cache() / f"models--{model.replace('/', '--')}"
    try:
        commit = (kept / "refs" / "main").read_text(encoding="utf-8").strip()
        folder = kept / "snapshots" / commit
        found = (*folder.iterdir(), *folder.glob("*/*.gguf"))
        files = {file.relative_to(folder).as_posix(): file for file in found if file.is_file()}
        check_weights(files)
    except (OSError, ModelError):  # not there, or not to its end
        return None
    parts = [series for name in files if (series := series_of(name))]
    if any(parts.count(series) != series[1] for series in parts):
        return None
    if any(name.endswith(".safetensors") for name in files):
        return folder if "config.json" in files and _vocabularies(files) else None
    return folder if _ggufs(folder) else None


def _cache() -> Path:
    named = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    return hub_home() / "hub" if not named else Path(os.path.expanduser(os.path.expandvars(named)))  # noqa: PTH111
