"""Check and load a local model: which dtype and why, which quantization.

torch and transformers are imported inside the functions. Weights are safetensors or GGUF, never pickles, and
code that comes with a model never runs. Knows nothing about requests or replies.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import threading
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dsr1kit.errors import Dsr1kitError, MissingExtra, ModelError
from dsr1kit.local.bring import bring_now, config_of
from dsr1kit.local.hardware import choose_dtype, look
from dsr1kit.local.load_failures import why_not
from dsr1kit.local.memory import PRECISION_OF
from dsr1kit.local.places import is_id, locate
from dsr1kit.local.release import give_back_freed
from dsr1kit.local.room import (
    fitting,
    fitting_instead,
    packed_bits,
    packed_by,
    refuse_coming,
    refuse_quantized_gguf,
    refuse_unknown,
    require_device,
    seen_from,
    shape_or_none,
    with_free,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from dsr1kit.local.rows import Marks

Quantization = Literal["none", "8bit", "4bit", "auto"]
QUANTIZATIONS = ("none", "8bit", "4bit", "auto")
DTYPES = ("auto", "float32", "bfloat16", "float16")


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
        quantization, quantization_reason: `none`, `8bit` or `4bit`, and why.
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
    quantization: str
    quantization_reason: str
    load_s: float

    @property
    def precision(self) -> str:
        """The planner's name for what the weights are held in: `fp32`, `fp16`, `bf16`, `8bit` or `nf4`."""
        return PRECISION_OF[self.dtype if self.quantization == "none" else self.quantization]

    def advice(self, context: int) -> str:
        """What would fit, where one request of so many tokens did not."""
        from dsr1kit.local.fits import advise

        if (shape := shape_or_none(self.model.config.to_dict())) is None:
            return "Ask for fewer max_tokens, or open the model with quantization='4bit'."
        # The weights that are loaded stay: what they hold counts as free for the whole.
        here = with_free(seen_from(self.device), int(self.model.get_memory_footprint()))
        return advise(shape, here, precision=self.precision, context=context)


def require_local() -> None:
    """Raise MissingExtra where torch or transformers is not installed."""
    if importlib.util.find_spec("torch") is None or importlib.util.find_spec("transformers") is None:
        raise MissingExtra("a local model", "local", "torch with transformers")


def load(source: str, quantization: Quantization, device: str, dtype: str, threads: int | None) -> LoadedModel:
    """Load `source` in the calling thread; a hub id that is not here is fetched first.

    Raises:
        MissingExtra: torch or transformers is not installed.
        ModelError: it cannot be loaded; the message says why and what mends it.
    """
    started = time.perf_counter()
    require_local()
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    elif (cores := look().cores) < torch.get_num_threads():  # a container's quota, which torch does not see
        torch.set_num_threads(cores)
    with quiet():
        return _load_quietly(source, quantization, device, dtype, started)


def _load_quietly(source: str, quantization: Quantization, device: str, dtype: str, started: float) -> LoadedModel:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from dsr1kit.local.gguf import dequantized
    from dsr1kit.local.rows import marks_of

    bring_now(source, on_plan=lambda coming: refuse_coming(source, coming, quantization, device, dtype))
    place, gguf = locate(source)
    if device != "auto":
        require_device(device)
    if gguf:
        refuse_quantized_gguf(quantization)
    else:  # whether it fits is asked below, of what transformers has read
        refuse_unknown(source, config_of(place) or {}, quantization)
    if device == "auto":
        device = "cuda:0" if torch.cuda.is_available() else "cpu"
    if gguf:
        place = str(dequantized(Path(place) / gguf))
    shape, precision, model = None, "", None
    try:
        # trust_remote_code stays off whatever the environment says.
        config = AutoConfig.from_pretrained(place, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=False)
        shape = shape_or_none(config.to_dict())
        counted = 0 if shape is None else shape.parameters
        name, reason = choose_dtype(counted, device) if dtype == "auto" else (dtype, "asked for")
        if packed := getattr(config, "quantization_config", None):
            bits, why = packed_bits(packed), f"stored quantized ({packed_by(packed)})"
        else:
            bits, why = fitting(source, shape, "none" if gguf else quantization, name, device)
        precision = PRECISION_OF[name if bits == "none" else bits]
        options = {} if packed else _quantized(bits, getattr(torch, name))
        came: Any = AutoModelForCausalLM.from_pretrained(
            place,
            trust_remote_code=False,
            use_safetensors=True,
            dtype=getattr(torch, name),
            device_map={"": device},
            output_loading_info=True,
            **options,
        )
        model, found = came
        refuse_lacking(source, found)
        model.eval()
        if bits == "4bit" and device == "cpu":
            _refuse_wrong_products(model)
        if device == "cpu":
            give_back_freed()
        if not tokenizer.chat_template:
            again = f"; if its page has one, dsr1kit weights {source} fetches it whole" if is_id(source) else ""
            raise ModelError(
                f"{source} has no chat template, so it cannot answer messages: use an instruct or R1 model{again}"
            )
    except Dsr1kitError:
        model = came = None  # a notebook keeps the last error, and with it what this frame holds
        raise
    except Exception as error:  # damaged files and networks make the libraries raise what they like
        model = came = None
        # Without its traceback, whose frames hold what was loaded by then.
        told = why_not(source, quantization, device, error, lambda: fitting_instead(shape, device, precision))
        raise ModelError(told) from error.with_traceback(None)
    context = int(getattr(model.config.get_text_config(), "max_position_embeddings", 0) or 4096)
    parameters = int(model.num_parameters())  # which knows how 4-bit weights are packed
    return LoadedModel(
        model,
        tokenizer,
        marks_of(tokenizer, model),
        context,
        parameters,
        device,
        name,
        reason,
        bits,
        why,
        time.perf_counter() - started,
    )


def _quantized(quantization: str, compute: Any) -> dict[str, Any]:
    """What `from_pretrained` needs for a quantization."""
    import transformers

    bits_and_bytes: Any = transformers.BitsAndBytesConfig
    if quantization == "8bit":
        return {"quantization_config": bits_and_bytes(load_in_8bit=True)}
    if quantization == "4bit":
        # The compute dtype's default is fp32, slow and silent on a GPU: always said.
        return {
            "quantization_config": bits_and_bytes(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=compute,
            )
        }
    return {}


def refuse_lacking(source: str | Path, found: Any) -> None:
    """Raise ModelError where weights are missing, which transformers fills with random numbers, silently.

    Args:
        found: its loading info.
    """
    if lacking := sorted(found["missing_keys"]):
        raise ModelError(
            f"{source} lacks {len(lacking)} of its weights, such as {lacking[0]}, and would answer from random numbers "
            "in their place: it is a part of a model; copy or fetch it again, whole (dsr1kit weights checks every byte)"
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


@contextlib.contextmanager
def quiet(*, python_warnings: bool = True) -> Iterator[None]:
    """Keep progress bars, advice and bitsandbytes' message at every int8 product off stderr.

    Several threads may be quiet at a time: things are as before when the last one ends.

    Args:
        python_warnings: also silence the `warnings` module; all threads share its filters: for loading only.
    """
    with _QUIET:
        if not _hushed:
            _hushed.append(_hush())
        _hushed.append(lambda: None)
    try:
        with warnings.catch_warnings() if python_warnings else contextlib.nullcontext():
            if python_warnings:
                warnings.simplefilter("ignore")
            yield
    finally:
        with _QUIET:
            _hushed.pop()
            if len(_hushed) == 1:
                _hushed.pop()()


_QUIET = threading.Lock()
_hushed: list[Callable[[], None]] = []  # what undoes it, and one entry for each that is quiet


def _hush() -> Callable[[], None]:
    """Lower what libraries say; returns what undoes it."""
    from transformers.utils import logging as transformers_logging

    hf_logging: Any = transformers_logging
    level, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    cast = logging.getLogger("bitsandbytes")
    before = cast.level
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    cast.setLevel(logging.ERROR)

    def undo() -> None:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()
        cast.setLevel(before)

    return undo
