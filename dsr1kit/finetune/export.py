"""Take a tuned adapter away: merged into its base's own weights, as GGUF, with a Modelfile, a card and commands.

A merge is computed in fp32, layer by layer, on weights that were never quantized, also where the adapter was trained on
4-bit ones. Models below 50 million parameters are stored in fp32, in which they are run; larger ones in the dtype of
the base's own files, rounded once. Knows PEFT, llama.cpp's converter and files; nothing about training.
"""

from __future__ import annotations

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
from dsr1kit.compare.stats import Interval, PairedDifference
from dsr1kit.errors import MissingExtra, ModelError, RunError, UnknownName, UsageError
from dsr1kit.finetune.base import disk_told
from dsr1kit.finetune.gain import Change, Gain
from dsr1kit.finetune.modelcard import (
    base_of,
    modelfile,
    read_adapter,
    serve_commands,
    write,
    write_card,
)
from dsr1kit.local.adapters import WEIGHTS
from dsr1kit.local.bring import config_of
from dsr1kit.local.engine_checks import cause_in, check_weights_of
from dsr1kit.local.engine_commands import read_json
from dsr1kit.local.hardware import SMALL, Choice
from dsr1kit.local.identity import sha256_of
from dsr1kit.local.load import load, quiet

#: What a merge notes beside its weights; a folder with it may be replaced by a later merge, any other may not.
MERGED = "merged.json"
#: What `export` can make.
WHAT = ("merged", "gguf", "modelfile", "card", "commands")
#: Names a llama.cpp checkout.
LLAMA_CPP_VARIABLE = "DSR1KIT_LLAMA_CPP"
OUTTYPES = ("f32", "f16", "bf16", "q8_0", "tq1_0", "tq2_0", "auto")
_CONVERTER = "convert_hf_to_gguf.py"
_DTYPES = ("float32", "float16", "bfloat16")

__all__ = [
    "Exported", "base_of", "export", "merge", "modelfile", "noted_gain", "serve_commands", "to_gguf", "write_card",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Exported:
    """What was made, and where; None or empty: it was not asked for.

    Attributes:
        folder: that all lies in, but for the adapter's own card.
        merged, gguf, modelfile: folder of safetensors, GGUF file, Ollama's file.
        cards: README.md of the adapter and, where there is one, of the merged model.
        commands: what serves base plus adapter, by engine.
    """

    folder: Path
    merged: Path | None = None
    gguf: Path | None = None
    modelfile: Path | None = None
    cards: tuple[Path, ...] = ()
    commands: dict[str, str] = field(default_factory=dict)

    def as_data(self) -> dict[str, Any]:
        """As plain data."""
        made = {name: getattr(self, name) for name in ("folder", "merged", "gguf", "modelfile")}
        return {
            **{name: None if path is None else str(path) for name, path in made.items()},
            "cards": [str(path) for path in self.cards],
            "commands": self.commands,
        }

    def told(self) -> list[str]:
        """Lines for a person: what lies where, and what to do with it."""
        said = [f"{name}: {path}" for name in ("merged", "gguf") if (path := getattr(self, name)) is not None]
        if self.modelfile is not None:
            said.append(f"Modelfile: {self.modelfile} (ollama create NAME -f {self.modelfile})")
        said += [f"card: {path}" for path in self.cards]
        return [*said, *(f"{name}: {command}" for name, command in self.commands.items())]


def export(
    run_folder: Path,
    out: Path,
    *,
    what: Sequence[str] = ("merged", "card"),
    gain: Gain | None = None,
    base: str | None = None,
    outtype: str = "f16",
) -> Exported:
    """Make what is asked for out of a finished run: `merged/`, `model-OUTTYPE.gguf`, `Modelfile`, `commands.txt`,
    cards.

    GGUF and Modelfile are of the merged model, which is then there too. Cards stand in the merged model's folder and in
    the adapter's.

    Args:
        run_folder: of a supervised training or a reinforcement.
        out: a folder; what an earlier export made in it is replaced.
        what: names of `WHAT`.
        gain: what was measured; None: what the run's own `gain/` holds, if anything.
        base: as for `merge`.
        outtype: as for `to_gguf`.

    Raises:
        UnknownName, UsageError: nothing that can be made, or no converter to make it with.
        ModelError, RunError, MissingExtra: no finished run, and as `merge` and `to_gguf`.
    """
    if not what:
        raise UsageError(f"name what to export: {', '.join(WHAT)}")
    for name in what:
        if name not in WHAT:
            raise UnknownName("export", name, WHAT)
    run_folder, out = Path(run_folder).expanduser(), Path(out).expanduser()
    adapter = run_folder / "adapter"
    if not adapter.is_dir():
        unfinished = (run_folder / "run.json").is_file()
        raise ModelError(
            f"{run_folder} holds no adapter yet: the same training command again ends it" if unfinished else
            f"{run_folder} is no folder of a run: name what --out was in the training"
        )  # fmt: skip
    if "gguf" in what:
        converter()  # its absence is told before the minutes that a merge takes
    source = base_of(adapter, base)
    merged = gguf = ollama = None
    commands: dict[str, str] = {}
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{out} cannot be made: {error.strerror}") from None
    if {"merged", "gguf", "modelfile"} & set(what):
        merged = merge(adapter, out / "merged", base=base)
    if merged is not None and "gguf" in what:
        gguf = to_gguf(merged, out / f"model-{outtype}.gguf", outtype)
    if merged is not None and "modelfile" in what:
        ollama = write(out / "Modelfile", modelfile(gguf or merged, merged, at=out))
    if "commands" in what:
        commands = serve_commands(source, adapter, merged=merged)
        write(out / "commands.txt", "".join(f"# {name}\n{line}\n\n" for name, line in commands.items()))
    cards: tuple[Path, ...] = ()
    if "card" in what:
        measured = gain or noted_gain(run_folder)
        folders = [adapter] if merged is None else [adapter, merged]
        cards = tuple(write_card(folder, run_facts(run_folder), base=source, gain=measured) for folder in folders)
    return Exported(out, merged, gguf, ollama, cards, commands)


def noted_gain(run_folder: Path) -> Gain | None:
    """What was measured of a run, from its `gain/`; None: nothing was. Raises RunError where it cannot be read."""
    folder = Path(run_folder) / "gain"
    path = folder / "gain.json"
    if not path.is_file():
        return None
    try:
        found = [
            Change(**row | {
                "before": Interval(**row["before"]), "after": Interval(**row["after"]),
                "difference": PairedDifference(**row["difference"]),
                "whole": None if row["whole"] is None else PairedDifference(**row["whole"]),
            })
            for row in json.loads(path.read_text(encoding="utf-8"))
        ]  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path} cannot be read ({error}): measure again (dsr1kit finetune evaluate)") from None
    return Gain(tuple(found), folder)


def run_facts(run_folder: Path) -> dict[str, Any]:
    """What a run noted of itself. Raises ModelError where it is none."""
    facts = read_json(Path(run_folder) / "run.json")
    if not facts.get("identity"):
        raise ModelError(f"{run_folder} holds no run.json: name the folder of a run (--out of its training)")
    return facts


def merge(adapter: Path, out: Path, *, base: str | None = None, dtype: str = "auto") -> Path:
    """Put an adapter into its base's weights and save a whole model: safetensors, tokenizer, generation_config.json.

    Written to `out.part` and put in place at once. An earlier merge in `out` is replaced; any other folder is not.

    Args:
        adapter: folder of a LoRA as PEFT writes it.
        out: the merged model's folder.
        base: the model that it was trained on, as for `LocalModel`; None: as the run or the adapter names it.
        dtype: to store it in: `float32`, `float16`, `bfloat16`, or `auto` (see above).

    Returns:
        `out`.

    Raises:
        UnknownName, UsageError: no such dtype; or `out` holds something else.
        ModelError: no adapter there, a pickle, another base than the adapter's, or one that is stored quantized.
        RunError: the model could not be written; nothing is put in place.
        MissingExtra: PEFT is not installed.
    """
    if importlib.util.find_spec("peft") is None:
        raise MissingExtra("merging", "finetune", "peft")
    if dtype not in ("auto", *_DTYPES):
        raise UnknownName("dtype", dtype, ("auto", *_DTYPES))
    adapter, out = Path(adapter).expanduser(), Path(out).expanduser()
    read_adapter(adapter)
    if out.exists() and not (out / MERGED).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} exists and is no earlier merge: name a new folder, or remove it")
    source = base_of(adapter, base)
    with quiet():
        model, tokenizer, stored = _merged(adapter, source, dtype)
        noted = {
            "base": source, "adapter": str(adapter), "adapter_sha256": sha256_of(adapter / WEIGHTS),
            "dtype": stored.value, "dtype_reason": stored.reason, "versions": about.versions(),
        }  # fmt: skip
        _put(model, tokenizer, noted, out)
    return out


def _merged(adapter: Path, source: str, dtype: str) -> tuple[Any, Any, Choice]:
    """Model, tokenizer, and the dtype to store it in with the reason."""
    import torch
    from peft import PeftConfig, PeftModelForCausalLM

    loaded = load(source, "none", "cpu", _own_dtype(source), None)
    model: Any = loaded.model
    if dtype != "auto":
        stored = Choice(dtype, "asked for")
    elif loaded.parameters < SMALL:
        stored = Choice("float32", "below 50 million parameters: it is run in fp32")
    else:
        stored = Choice(loaded.dtype, "the dtype of the base's own files, rounded once")
    kept = getattr(torch, stored.value)
    peft: Any = PeftModelForCausalLM
    try:
        tuned = peft(model, PeftConfig.from_pretrained(str(adapter)), "default")
        found = tuned.load_adapter(str(adapter), "default", is_trainable=False)
        if wrong := sorted([*found.missing_keys, *found.unexpected_keys]):
            raise ValueError(f"{len(wrong)} of its weights have no counterpart, such as {wrong[0]}")
    except Exception as error:  # PEFT raises what it likes where shapes or names differ
        said = " ".join(str(error).split())[:300]
        raise ModelError(
            f"the adapter in {adapter} does not go with {source}: {said}. Name the model that it was trained on "
            "(--base)"
        ) from None
    for name, module in tuned.named_modules():
        if hasattr(module, "merge") and hasattr(module, "get_base_layer"):
            layer = module.get_base_layer()
            layer.to(torch.float32)
            module.merge()
            layer.to(kept)
            if not torch.isfinite(layer.weight).all():
                raise ModelError(
                    f"merged, {name} holds values that {stored.value} cannot: has the training diverged? Look at its "
                    "loss, and train with a lower learning rate"
                )
    return tuned.merge_and_unload().to(kept), loaded.tokenizer, stored


def _own_dtype(source: str) -> str:
    """The dtype of a model's own files; fp32, which loses nothing, where its configuration does not say.

    Raises:
        ModelError: the files are quantized.
    """
    if (config := config_of(source)) is None:
        return "float32"  # a GGUF file: the loader takes the folder that it is converted to
    if config.get("quantization_config"):
        raise ModelError(
            f"{source} is stored quantized, and a merge into quantized weights would round the adapter away: tune and "
            "merge on its 16-bit original (--method qlora quantizes that while loading)"
        )
    own = str(config.get("dtype") or config.get("torch_dtype") or "").removeprefix("torch.")
    return own if own in _DTYPES else "float32"


def _put(model: Any, tokenizer: Any, noted: dict[str, Any], out: Path) -> None:
    part, earlier = out.with_name(f"{out.name}.part"), out.with_name(f"{out.name}.earlier")
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        model.save_pretrained(str(part))
        tokenizer.save_pretrained(str(part))
        (part / MERGED).write_text(json.dumps(noted, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        if out.exists():  # a whole model stands at `out` or beside it at every moment
            shutil.rmtree(earlier, ignore_errors=True)
            out.replace(earlier)
        part.replace(out)
        shutil.rmtree(earlier, ignore_errors=True)
    except Exception as error:
        full = disk_told(error)
        shutil.rmtree(part, ignore_errors=True)
        if earlier.exists() and not out.exists():
            earlier.replace(out)
        if full is None:
            raise
        raise RunError(
            f"the merged model could not be written to {out}: {full}. Nothing was put in place; make room, or name a "
            "folder on another disk (--out)"
        ) from None


def to_gguf(folder: Path, out: Path, outtype: str = "f16") -> Path:
    """Convert a folder of safetensors to a GGUF file by llama.cpp's own converter; put in place at once.

    Args:
        folder: a whole model, such as a merged one.
        out: the file.
        outtype: of the weights; one of `OUTTYPES`.

    Returns:
        `out`.

    Raises:
        UnknownName, UsageError: no such type; or there is no converter, and how to get it.
        ModelError: no model in the folder.
        RunError: the converter failed (its last words are told), or the disk is full.
    """
    if outtype not in OUTTYPES:
        raise UnknownName("GGUF type", outtype, OUTTYPES)
    program = converter()
    folder, out = Path(folder).expanduser(), Path(out).expanduser()
    check_weights_of(folder)
    part = out.with_name(f"{out.name}.part")
    command = [*program, str(folder), "--outfile", str(part), "--outtype", outtype]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        # A program that the person named or has on the path; no shell.
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)  # noqa: S603
        if done.returncode:
            said = cause_in(done.stderr) or f"it ended with code {done.returncode}"
            raise RunError(
                f"llama.cpp's converter made no GGUF of {folder}: {said}. Is the checkout new enough for this model "
                "(git pull), are its packages here (pip install gguf sentencepiece), is there room? The command was: "
                + " ".join(command)
            )
        with part.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise RunError(f"what {program[-1]} made of {folder} is no GGUF file: is it llama.cpp's own converter?")
        part.replace(out)
    except OSError as error:
        raise RunError(
            f"{out} could not be written: {error.strerror or error}. Make room, or name a folder on another disk"
        ) from None
    finally:
        part.unlink(missing_ok=True)
    return out


def converter() -> list[str]:
    """The words that start llama.cpp's converter. Raises UsageError where it is not here."""
    if named := os.environ.get(LLAMA_CPP_VARIABLE, "").strip():
        script = Path(named).expanduser() / _CONVERTER
        if not script.is_file():
            raise UsageError(
                f"{LLAMA_CPP_VARIABLE} is {named}, which holds no {_CONVERTER}: name the folder of a llama.cpp checkout"
            )
        return [sys.executable, str(script)]
    if found := shutil.which(_CONVERTER):
        return [found]
    raise UsageError(
        f"a GGUF is made by llama.cpp's {_CONVERTER}, which is not here: git clone --depth 1 "
        f"https://github.com/ggml-org/llama.cpp, then export {LLAMA_CPP_VARIABLE}=llama.cpp"
    )
