"""Find, check and load a local model: which source, which dtype and why, which quantization.

torch and transformers are imported inside the functions. Weights are safetensors or GGUF, never pickles, and
code that comes with a model never runs. Knows nothing about requests or replies.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import re
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dsr1kit.errors import MissingExtra, ModelError, UnknownName, UsageError
from dsr1kit.paths import data_dir

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dsr1kit.local.generate import Marks

Quantization = Literal["none", "8bit", "4bit"]
QUANTIZATIONS = ("none", "8bit", "4bit")
DTYPES = ("auto", "float32", "bfloat16", "float16")
SMALL = 50_000_000  # parameters below which half precision saves nothing worth its rounding


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model that is ready, and the facts about it.

    Attributes:
        model, tokenizer, marks: transformers' objects and the special ids.
        context: most tokens of prompt and completion together.
        parameters: number of weights.
        device: where it runs, `cpu` or `cuda:0`.
        dtype: of the weights or, when quantized, of the products.
        dtype_reason: why this dtype.
        load_s: seconds it took, imports included.
    """

    model: Any
    tokenizer: Any
    marks: Marks
    context: int
    parameters: int
    device: str
    dtype: str
    dtype_reason: str
    load_s: float


def locate(source: str) -> tuple[str, str | None]:
    """Return what transformers loads, a folder or hub id, and the GGUF file within it, if it is one.

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
        if not (path / "config.json").is_file() or not list(path.glob("*.safetensors")):
            raise ModelError(
                f"{path} needs config.json and *.safetensors; other checkpoints (.bin, .pt) are pickles and "
                "never loaded: convert them with save_pretrained() where you trust them"
            )
        return str(path), None
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", source):
        return source, None
    if "/" in source:
        raise ModelError(f"there is no folder {path}; name a folder, a hub id (org/name) or a .gguf file")
    raise UnknownName("model", source, ["tiny-r1"], hint="(or a folder, a hub id org/name, a .gguf file)")


def choose_dtype(parameters: int, device: str) -> tuple[str, str]:
    """Return the dtype for a model of so many parameters on a device, and the reason for it."""
    import torch

    if device.startswith("cuda"):
        # is_bf16_supported() alone also counts emulation, which is slow (T4).
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bfloat16", "the GPU multiplies bfloat16 natively"
        return "float16", "the GPU has no native bfloat16 (compute capability below 8)"
    if parameters < SMALL:
        return "float32", "so small a model is bound by calls, not by memory: rounding would buy no speed"
    if torch.backends.cpu.get_cpu_capability() == "AVX512" and "avx512_bf16" in _cpu_flags():
        return "bfloat16", "the processor multiplies bfloat16 (avx512_bf16)"
    return "float32", "the processor has no bfloat16 products"


@contextlib.contextmanager
def threads_for(threads: int | None) -> Iterator[None]:
    """Let torch use so many threads in the block, for work begun by the calling thread; None: no change."""
    import torch

    before = torch.get_num_threads()
    if threads is None or threads == before:
        yield
        return
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _cpu_flags() -> str:
    with contextlib.suppress(OSError):
        return Path("/proc/cpuinfo").read_text(errors="replace")
    return ""


def load(source: str, quantization: Quantization, device: str, dtype: str, threads: int | None) -> LoadedModel:
    """Load `source` in the calling thread.

    Raises:
        MissingExtra: torch or transformers is not installed.
        ModelError: it cannot be loaded; the message says why and what mends it.
    """
    started = time.perf_counter()
    if importlib.util.find_spec("torch") is None or importlib.util.find_spec("transformers") is None:
        raise MissingExtra("a local model", "local", "torch with transformers")
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    with quiet():
        return _load_quietly(source, quantization, device, dtype, started)


def _load_quietly(source: str, quantization: Quantization, device: str, dtype: str, started: float) -> LoadedModel:
    import torch
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig

    from dsr1kit.local.generate import marks_of

    bits_and_bytes: Any = transformers.BitsAndBytesConfig
    place, gguf = locate(source)
    if gguf and quantization != "none":
        raise UsageError("a GGUF file has its own quantization: open it with quantization='none'")
    if gguf and importlib.util.find_spec("gguf") is None:
        raise UsageError("reading a GGUF file needs the package gguf: pip install gguf")
    if device == "auto":
        device = "cuda:0" if torch.cuda.is_available() else "cpu"
    options: dict[str, Any] = {"gguf_file": gguf} if gguf else {}
    try:
        # trust_remote_code stays off whatever the environment says.
        config = AutoConfig.from_pretrained(place, trust_remote_code=False, **options)
        name, reason = choose_dtype(_parameters(config), device) if dtype == "auto" else (dtype, "asked for")
        weights = getattr(torch, name)
        if quantization == "8bit":
            options["quantization_config"] = bits_and_bytes(load_in_8bit=True)
        elif quantization == "4bit":
            # The compute dtype's default is fp32, slow and silent on a GPU: always said.
            options["quantization_config"] = bits_and_bytes(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=weights
            )
        elif gguf:
            options["quantization_config"] = GgufConfig(dequantize=True)
        else:
            options["use_safetensors"] = True
        model: Any = AutoModelForCausalLM.from_pretrained(
            place, trust_remote_code=False, dtype=weights, device_map={"": device}, **options
        )
        model.eval()
        if quantization == "4bit" and device == "cpu":
            _refuse_wrong_products(model)
        tokenizer = AutoTokenizer.from_pretrained(
            place, trust_remote_code=False, **({"gguf_file": gguf} if gguf else {})
        )
    except (OSError, ValueError, RuntimeError, ImportError, KeyError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"could not load {source} ({quantization}, {device}): {first}. Check the name, that it is "
            "downloaded (with HF_HUB_OFFLINE set nothing is) and that it has safetensors weights"
        ) from error
    if not tokenizer.chat_template:
        raise ModelError(f"{source} has no chat template, so it cannot answer messages: use an instruct or R1 model")
    context = int(getattr(model.config.get_text_config(), "max_position_embeddings", 0) or 4096)
    parameters = sum(weight.numel() for weight in model.parameters())
    return LoadedModel(
        model,
        tokenizer,
        marks_of(tokenizer, model),
        context,
        parameters,
        device,
        name,
        reason,
        time.perf_counter() - started,
    )


def _refuse_wrong_products(model: Any) -> None:
    """Raise ModelError where bitsandbytes' 4-bit is silently wrong.

    Its processor kernels take rows as whole blocks of 64; other widths come back with an error of a quarter
    of the weights' size and more (found by comparing dequantized weights with the originals).
    """
    for name, module in model.named_modules():
        if type(module).__name__ == "Linear4bit" and module.in_features % 64:
            raise ModelError(
                f"{name} has rows of {module.in_features} weights, and bitsandbytes' 4-bit on a "
                "processor is wrong unless they are a multiple of 64; open the model with quantization='8bit'"
            )


def _parameters(config: Any) -> int:
    """Estimate a dense decoder's number of weights from its configuration."""
    text = config.get_text_config()
    width, layers = int(getattr(text, "hidden_size", 0)), int(getattr(text, "num_hidden_layers", 0))
    inner = int(getattr(text, "intermediate_size", 4 * width) or 4 * width)
    return int(text.vocab_size) * width + layers * (4 * width * width + 3 * width * inner)


@contextlib.contextmanager
def quiet(*, python_warnings: bool = True) -> Iterator[None]:
    """Keep progress bars, advice and bitsandbytes' message at every int8 product off stderr.

    Args:
        python_warnings: also silence the `warnings` module; all threads share its filters: for loading only.
    """
    from transformers.utils import logging as transformers_logging

    hf_logging: Any = transformers_logging
    level, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    cast = logging.getLogger("bitsandbytes")
    before = cast.level
    try:
        hf_logging.set_verbosity_error()
        hf_logging.disable_progress_bar()
        cast.setLevel(logging.ERROR)
        with warnings.catch_warnings() if python_warnings else contextlib.nullcontext():
            if python_warnings:
                warnings.simplefilter("ignore")
            yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()
        cast.setLevel(before)
