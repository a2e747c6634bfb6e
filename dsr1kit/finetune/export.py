"""Take a tuned adapter away: merged into its base's own weights, as GGUF, with an Ollama Modelfile and a model card.

A merge is computed in fp32, layer by layer, on weights that were never quantized, also where the adapter was trained on
4-bit ones. Models below 50 million parameters are stored in fp32, in which they are run; larger ones in the dtype of
the base's own files, rounded once. Knows PEFT, llama.cpp's converter and files; nothing about training.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dsr1kit import about
from dsr1kit.errors import Dsr1kitError, MissingExtra, ModelError, RunError, UnknownName, UsageError
from dsr1kit.finetune.base import disk_told
from dsr1kit.local.engine_checks import check_adapter
from dsr1kit.local.engine_commands import read_json
from dsr1kit.local.folder import read_manifest
from dsr1kit.local.hardware import SMALL, TINY, Choice
from dsr1kit.local.load import load, locate, quiet

#: What a merge notes beside its weights; a folder with it may be replaced by a later merge, any other may not.
MERGED = "merged.json"
_WEIGHTS = "adapter_model.safetensors"
_DTYPES = ("float32", "float16", "bfloat16")


def merge(adapter: Path, out: Path, *, base: str | None = None) -> Path:
    """Put an adapter into its base's weights and save a whole model: safetensors, tokenizer, generation_config.json.

    Written to `out.part` and put in place at once. An earlier merge in `out` is replaced; any other folder is not.

    Args:
        adapter: folder of a LoRA as PEFT writes it.
        out: the merged model's folder.
        base: the model that it was trained on, as for `LocalModel`; None: as the run or the adapter names it.

    Returns:
        `out`.

    Raises:
        UsageError: `out` holds something else.
        ModelError: no adapter there, a pickle, another base than the adapter's, or one that is stored quantized.
        RunError: the model could not be written; nothing is put in place.
        MissingExtra: PEFT is not installed.
    """
    if importlib.util.find_spec("peft") is None:
        raise MissingExtra("merging", "finetune", "peft")
    adapter, out = Path(adapter).expanduser(), Path(out).expanduser()
    read_adapter(adapter)
    if out.exists() and not (out / MERGED).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} exists and is no earlier merge: name a new folder, or remove it")
    source = base_of(adapter, base)
    with quiet():
        model, tokenizer, stored = _merged(adapter, source)
        noted = {
            "base": source, "adapter": str(adapter), "adapter_sha256": _sha256(adapter / _WEIGHTS),
            "dtype": stored.value, "dtype_reason": stored.reason, "versions": about.versions(),
        }  # fmt: skip
        _put(model, tokenizer, noted, out)
    return out


def base_of(adapter: Path, base: str | None = None) -> str:
    """The model that an adapter belongs to, as `LocalModel` takes it.

    The run's own name for it (`../run.json`) comes before the path that the adapter records, which is that of the
    machine it was trained on.

    Args:
        base: what it must be, where that is known.

    Raises:
        ModelError: `base` is another model, or none can be found.
    """
    adapter = Path(adapter)
    recorded = str(read_adapter(adapter).get("base_model_name_or_path") or "")
    names = [name for name in (run_model(adapter.resolve().parent), recorded) if name]
    if Path(recorded).name == TINY and not Path(recorded).exists():
        names.append(TINY)  # where it lay in another installation
    if base is not None:
        locate(base)
        if names and not any(_same(base, name) for name in names):
            raise ModelError(
                f"the adapter in {adapter} was trained on {names[0]}, not on {base}: put into another model's weights "
                f"it would mean nothing. Name {names[0]}, or leave the base out"
            )
        return base
    for name in names:
        try:
            locate(name)
        except Dsr1kitError:
            continue
        return name
    raise ModelError(
        f"the adapter in {adapter} was trained on {names[0]}, which is not on this machine: name it (--base FOLDER or "
        "hub id)" if names else f"the adapter in {adapter} names no base model: name it (--base FOLDER or hub id)"
    )  # fmt: skip


def read_adapter(folder: Path) -> dict[str, Any]:
    """An adapter's configuration.

    Raises:
        ModelError: none there, damaged, a pickle, or not a LoRA.
    """
    check_adapter(folder)
    if not (folder / "adapter_config.json").is_file():
        raise ModelError(f"{folder} holds no adapter_config.json: name the folder that PEFT's save_pretrained wrote")
    if not (folder / _WEIGHTS).is_file():
        raise ModelError(
            f"{folder} needs {_WEIGHTS}; adapter_model.bin is a pickle and never loaded: save it again with a PEFT of "
            "today where you trust it"
        )
    config = read_json(folder / "adapter_config.json")
    if config.get("peft_type") != "LORA":
        raise ModelError(f"{folder} holds {config.get('peft_type') or 'nothing that PEFT names'}, not a LoRA")
    return config


def run_model(folder: Path) -> str:
    """The model that a run's run.json names; empty where there is none."""
    identity = read_json(folder / "run.json").get("identity")
    settings = [identity.get(kind) for kind in ("sft", "grpo")] if isinstance(identity, dict) else []
    return next((str(one["model"]) for one in settings if isinstance(one, dict) and one.get("model")), "")


def _same(one: str, other: str) -> bool:
    """Whether two names mean one model: by name, place or, for two folders, their weights' bytes."""
    places = [_place(one), _place(other)]
    if one == other or places[0] == places[1]:
        return True
    folders = [Path(place) for place in places]
    if not all(folder.is_dir() for folder in folders):
        return Path(other).name == TINY and not folders[1].exists() and places[0] == _place(TINY)
    files = [sorted(folder.glob("*.safetensors")) for folder in folders]
    sizes = [[(file.name, file.stat().st_size) for file in each] for each in files]
    return sizes[0] == sizes[1] and all(_sha256(a) == _sha256(b) for a, b in zip(*files, strict=True))


def _place(name: str) -> str:
    """Where a model lies, or the hub id it was fetched from; the name itself where it is not here."""
    try:
        place, gguf = locate(name)
    except Dsr1kitError:
        return name
    if gguf:
        return str((Path(place) / gguf).resolve())
    if not Path(place).is_dir():
        return place
    manifest = read_manifest(Path(place))
    return str(Path(place).resolve()) if manifest is None else manifest.model


def _merged(adapter: Path, source: str) -> tuple[Any, Any, Choice]:
    """Model, tokenizer, and the dtype to store it in with the reason."""
    import torch
    from peft import PeftConfig, PeftModelForCausalLM

    loaded = load(source, "none", "cpu", _own_dtype(source), None)
    model: Any = loaded.model
    if loaded.parameters < SMALL:
        stored = Choice("float32", "below 50 million parameters: it is run in fp32")
        model = model.float()
    else:
        stored = Choice(loaded.dtype, "the dtype of the base's own files, rounded once")
    dtype = getattr(torch, stored.value)
    peft: Any = PeftModelForCausalLM
    try:
        tuned = peft(model, PeftConfig.from_pretrained(str(adapter)), "default")
        found = tuned.load_adapter(str(adapter), "default", is_trainable=False)
        if wrong := sorted([*found.missing_keys, *found.unexpected_keys]):
            raise ValueError(f"{len(wrong)} of its weights have no counterpart, such as {wrong[0]}")
    except Exception as error:  # PEFT raises what it likes where shapes or names differ
        said = " ".join(str(error).split())[:300]
        raise ModelError(
            f"the adapter in {adapter} does not go with {source}: {said}. Name the model that it was trained on (--base)"
        ) from None
    for name, module in tuned.named_modules():
        if hasattr(module, "merge") and hasattr(module, "get_base_layer"):
            layer = module.get_base_layer()
            layer.to(torch.float32)
            module.merge()
            layer.to(dtype)
            if not torch.isfinite(layer.weight).all():
                raise ModelError(f"merged, {name} holds values that {stored.value} cannot: the adapter has diverged")
    return tuned.merge_and_unload().to(dtype), loaded.tokenizer, stored


def _own_dtype(source: str) -> str:
    """The dtype of a model's own files; fp32, which loses nothing, where its configuration does not say.

    Raises:
        ModelError: the files are quantized.
    """
    from transformers import AutoConfig

    place, gguf = locate(source)
    if gguf:
        return "float32"  # the loader takes the folder that it is converted to
    try:
        config = AutoConfig.from_pretrained(place, trust_remote_code=False).to_dict()
    except Exception:  # damaged or not reached: the loader says why
        return "float32"
    if config.get("quantization_config"):
        raise ModelError(
            f"{source} is stored quantized, and a merge into quantized weights would round the adapter away: tune and "
            "merge on its 16-bit original (--method qlora quantizes that while loading)"
        )
    own = str(config.get("dtype") or config.get("torch_dtype") or "").removeprefix("torch.")
    return own if own in _DTYPES else "float32"


def _put(model: Any, tokenizer: Any, noted: dict[str, Any], out: Path) -> None:
    part = out.with_name(f"{out.name}.part")
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        model.save_pretrained(str(part))
        tokenizer.save_pretrained(str(part))
        (part / MERGED).write_text(json.dumps(noted, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        if out.exists():
            shutil.rmtree(out)
        part.replace(out)
    except Exception as error:
        full = disk_told(error)
        shutil.rmtree(part, ignore_errors=True)
        if full is None:
            raise
        raise RunError(
            f"the merged model could not be written to {out}: {full}. Nothing was put in place; make room, or name a "
            "folder on another disk (--out)"
        ) from None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
