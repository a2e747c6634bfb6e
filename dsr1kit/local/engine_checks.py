"""What is looked at before an engine is started, and the cause of its end in its log.

Whether a model's files are whole, whether its weights fit, and over how many GPUs. Knows nothing about command lines,
processes or requests.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from dsr1kit.errors import Dsr1kitError, ModelError, UsageError
from dsr1kit.local.engine_commands import Quantization, chat_template, read_json
from dsr1kit.local.folder import check_weights
from dsr1kit.local.hardware import Hardware
from dsr1kit.local.memory import PRECISION_OF, half_precision, need
from dsr1kit.local.places import read_object
from dsr1kit.local.room import refuse_unfit
from dsr1kit.local.shapes import Shape, shape_of_config

_EXCEPTION = re.compile(r"(?:^|(?<=\s))(?:\w+\.)*\w*(?:Error|Exception): \S.*")
_FAILURE = re.compile(r"\berror\b|\bfailed\b", re.IGNORECASE)
# transformers' table of what it loaded: of a weight that it did not find it takes random numbers.
_MADE_UP = re.compile(r"^(\S.*?)\s*\|\s*MISSING\b", re.MULTILINE)
_POINTS_BACK = re.compile(r"see root cause above|see (?:the )?(?:stack )?trace", re.IGNORECASE)
_OUT_OF_MEMORY = re.compile(
    r"out of memory|OutOfMemory|cannot allocate memory|failed to allocate|bad_alloc|MemoryError|"
    r"no available memory for the cache|larger than the (?:maximum number of tokens|available KV cache)",
    re.IGNORECASE,
)
_KILLED, _ILLEGAL = 128 + signal.SIGKILL, 128 + signal.SIGILL
#: Exit codes of a program that could not say why it ends.
ENDED_BY_OTHERS = (_KILLED, _ILLEGAL, 128 + signal.SIGTERM, 128 + signal.SIGINT)
_MOST_CAUSE = 400  # characters
_MENDS = (
    (re.compile(r"safetensor|deserializ|header|corrupted or incomplete|gguf_init", re.IGNORECASE),
     "its weights are damaged: copy or download it again"),
    (re.compile(r"chat.?template", re.IGNORECASE), "it has no usable chat template: serve an instruct or R1 model"),
    (re.compile(r"size mismatch|shape|must be equal|divisible", re.IGNORECASE),
     "its weights, or the adapter's, and config.json are not of one model: take all files from one place"),
    (re.compile(r"No module named|ImportError|cannot import", re.IGNORECASE),
     "a package of the engine is missing or does not suit it: install the engine anew"),
)  # fmt: skip


def check_weights_of(folder: Path) -> None:
    """Look at what can be seen of a model, a folder or a GGUF file, without loading it.

    Raises:
        ModelError: config.json does not parse, a weights file is cut short or none, or no chat template is there.
    """
    if folder.is_file():
        _check_files(folder.parent, [folder])
        return
    read_object(folder / "config.json")
    _check_files(folder, [*folder.glob("*.safetensors"), *folder.glob("*.safetensors.index.json")])
    if not chat_template(folder):
        raise ModelError(
            f"{folder} has no chat template, so it cannot answer messages: use an instruct or R1 model, or copy "
            "tokenizer_config.json and chat_template.jinja from the model's page into the folder"
        )


def check_adapter(adapter: Path) -> None:
    """Look at what can be seen of a LoRA without loading it.

    Raises:
        ModelError: there is none, its configuration does not parse, or its weights are cut short.
    """
    if not adapter.exists():
        raise ModelError(f"there is no adapter {adapter}; name the folder that save_pretrained() wrote")
    if adapter.is_dir():
        if (adapter / "adapter_config.json").is_file():
            read_object(adapter / "adapter_config.json")
        _check_files(adapter, list(adapter.glob("*.safetensors")))


def own_context(source: str, config: Mapping[str, Any], asked: int | None) -> int:
    """A model's own context, 0 where its configuration does not say; raises UsageError where more was asked for."""
    told = config.get("max_position_embeddings")
    most = told if isinstance(told, int) else 0
    if asked and most and asked > most:
        raise UsageError(f"{source} has a context of {most} tokens, so {asked} cannot be served")
    return most


def gpus_for(folder: Path, hardware: Hardware, *, dtype: str, quantization: Quantization, context: int) -> int:
    """How many GPUs a model is spread over: 1 where one holds it, else all of them, as a power of two.

    The number also divides the model's attention heads, which are what is spread.
    """
    if len(hardware.gpus) < 2:
        return 1
    if (planned := _planned(read_json(folder / "config.json"), hardware, dtype, quantization)) is None:
        return 1
    shape, precision = planned
    if need(shape, precision=precision, context=context).total <= min(gpu.free_bytes for gpu in hardware.gpus):
        return 1
    many = 1
    while 2 * many <= len(hardware.gpus) and shape.heads % (2 * many) == 0:
        many *= 2
    return many


def check_room(
    source: str, config: Mapping[str, Any], hardware: Hardware, *, dtype: str, quantization: Quantization
) -> None:
    """Raise ModelError, with what would fit, where a model's weights alone exceed what is free on `hardware`.

    Args:
        source: the model, as the person named it.
        config: the content of its config.json.
        hardware, dtype, quantization: what it is to be loaded on, and as what.
    """
    if (planned := _planned(config, hardware, dtype, quantization)) is not None:
        refuse_unfit(source, *planned, hardware)


def _planned(
    config: Mapping[str, Any], hardware: Hardware, dtype: str, quantization: Quantization
) -> tuple[Shape, str] | None:
    """Shape and precision as the planner knows them; None for what it does not know: the engine will find out."""
    try:
        shape = shape_of_config(config)
    except Dsr1kitError:
        return None
    if packed := config.get("quantization_config"):  # weights that come quantized stay as they are
        return (
            (replace(shape, native="fp8"), "8bit")
            if isinstance(packed, dict) and packed.get("quant_method") == "fp8"
            else None
        )
    chosen = dtype if quantization == "none" else quantization
    return shape, PRECISION_OF.get(chosen, half_precision(hardware))


def _check_files(folder: Path, files: list[Path]) -> None:
    try:
        check_weights({file.name: file for file in files}, "copy it again, whole")
    except ModelError as error:
        raise ModelError(f"{folder} was not copied to its end or is damaged: {error}") from None
    except OSError as error:
        raise ModelError(f"{folder} cannot be read: {error}") from None


def cause_in(log: str) -> str:
    """The line of a log that tells best why a program ended; empty where the log is.

    The last exception that does not point back to an earlier one, else the first line that speaks of an error, else
    the last line.
    """
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    raised = [found[0] for line in lines if (found := _EXCEPTION.search(line))]
    last = [line for line in raised if not _POINTS_BACK.search(line)] or raised
    failures = [line for line in lines if _FAILURE.search(line)]
    cause = last[-1] if last else failures[0] if failures else lines[-1] if lines else ""
    return cause if len(cause) <= _MOST_CAUSE else cause[:_MOST_CAUSE] + "…"


def made_up_in(log: str) -> str:
    """The first weight that transformers did not find, by its log, and filled with random numbers; empty: none."""
    return next((name for name in _MADE_UP.findall(log) if "lora_" not in name), "")


def advice_for(source: str, code: int, cause: str, tail: str = "") -> str:
    """What mends the end of an engine, as a sentence with a space behind it; empty where that is not known.

    Args:
        source: the model, as the person named it.
        code: the engine's exit code.
        cause: the line of its log that tells why.
        tail: the last lines of its log.
    """
    bits = "a file of fewer bits" if source.endswith(".gguf") else "--quantization 4bit"
    less = f"dsr1kit fits {source} says what fits here; less --context or --batch, or {bits}, helps"
    if _OUT_OF_MEMORY.search(cause) or _OUT_OF_MEMORY.search(tail):
        return f"It ran out of memory: {less}. "
    if code == _KILLED:
        return f"It was killed from outside; where the kernel did it for want of memory, {less}. "
    if "address already in use" in tail.lower():
        return "Its port was taken meanwhile: try again. "
    if code == _ILLEGAL:
        return "It was built for another processor: install one that was built for this one. "
    return next((f"Likely {mend}. " for words, mend in _MENDS if words.search(cause)), "")
