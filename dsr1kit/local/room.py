"""Whether a model can be opened on this machine, told before it is fetched or loaded: device, architecture, memory.

Knows configurations and the planner; nothing about hubs or how models are loaded. torch and transformers are imported
inside the functions.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from dsr1kit.errors import Dsr1kitError, ModelError, UsageError
from dsr1kit.local.bring import config_of
from dsr1kit.local.folder import series_of
from dsr1kit.local.hardware import choose_dtype, choose_quantization, look
from dsr1kit.local.memory import GIB, PRECISION_OF, available, need
from dsr1kit.local.places import require_vocabulary

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dsr1kit.local.hardware import Hardware
    from dsr1kit.local.shapes import Shape
    from dsr1kit.local.weights import Coming

PLANNED_CONTEXT = 2048  # tokens that there must be room for when a model is opened


def require_device(device: str) -> None:
    """Raise UsageError where torch knows no such device, or this machine has none."""
    import torch

    mend = "leave it at 'auto', or name cpu, cuda or cuda:N"
    try:
        named = torch.device(device)
    except RuntimeError:
        raise UsageError(f"device {device!r} is none of torch's: {mend}") from None
    there = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if hasattr(torch, "xpu"):
        there["xpu"] = torch.xpu.device_count()
    if (named.index or 0) >= (count := there.get(named.type, 0)):
        what = "this torch or machine has no CUDA" if named.type == "cuda" and not count else f"{count} are here"
        raise UsageError(f"device {device!r} is not there ({what}): {mend}")


def refuse_coming(source: str, coming: Coming, quantization: str, device: str, dtype: str) -> None:
    """Raise an error where a model that is about to be fetched could not be opened, or would not fit.

    Args:
        source: the model, as it was asked for.
        coming: what its hub says of it.
        quantization, device, dtype: as for `load`.

    Raises:
        ModelError: it would not fit, with what would; an architecture or quantization that transformers cannot load
            here. UsageError: as `require_device`, or a quantization of a GGUF file.
    """
    if device != "auto":
        require_device(device)
    if any(file.endswith(".safetensors") for file in coming.files):
        require_vocabulary(source, coming.files)
        refuse_config(source, coming.config or {}, quantization, device, dtype)
        if (coming.config or {}).get("quantization_config"):
            refuse_large(source, coming.weights_bytes, look())
        return
    refuse_quantized_gguf(quantization)
    if series := next((found for file in coming.files if (found := series_of(file))), None):
        raise ModelError(
            f"{source} is a model in {series[1]} parts, which llama.cpp alone reads: dsr1kit weights {source}, then "
            f"dsr1kit serve {source}"
        )
    refuse_large(source, coming.weights_bytes, look())


def refuse_here(source: str, place: str, quantization: str, device: str, dtype: str) -> None:
    """The same for a model in a folder of this machine."""
    if device != "auto":
        require_device(device)
    if (config := config_of(place)) is not None:
        refuse_config(source, config, quantization, device, dtype)


def refuse_config(source: str, config: Mapping[str, Any], quantization: str, device: str, dtype: str) -> None:
    """Raise ModelError where a model of this configuration cannot be loaded here. Arguments as `refuse_coming`."""
    refuse_unknown(source, config, quantization)
    if config.get("quantization_config"):
        return
    shape = shape_or_none(config)
    if device == "auto":
        device = "cuda:0" if look().gpus else "cpu"
    name = choose_dtype(0 if shape is None else shape.parameters, device).value if dtype == "auto" else dtype
    fitting(source, shape, quantization, name, device)


def refuse_unknown(source: str, config: Mapping[str, Any], quantization: str) -> None:
    """Raise ModelError where transformers has no such architecture, or lacks a package for weights that come
    quantized; UsageError where those are to be quantized in another way."""
    from transformers import CONFIG_MAPPING

    family = config.get("model_type")
    if not family:
        raise ModelError(f"config.json of {source} names no architecture (model_type): copy or fetch it again, whole")
    if not isinstance(family, str) or family not in CONFIG_MAPPING:
        raise ModelError(
            f"{source} is of the architecture {family!r}, which transformers does not know here: upgrade it (pip "
            "install -U transformers), or serve the model by an engine that does; code that comes with a model never "
            "runs"
        )
    try:
        CONFIG_MAPPING[family].from_dict(dict(config))
    except Exception as error:  # it raises what it likes
        said = " ".join(str(error).split())[:300].rstrip(".")
        raise ModelError(f"config.json of {source} is of no model that transformers reads: {said}") from None
    if packed := config.get("quantization_config"):
        _refuse_packed(source, packed, quantization)


def refuse_large(source: str, size: int, here: Hardware) -> None:
    """Raise ModelError where files of so many bytes, which are loaded as they are, exceed all memory that is free."""
    free = max(available(here), here.memory_free_bytes)
    if size > free:
        raise ModelError(
            f"{source} does not fit: its files alone have {size / GIB:.1f} GiB, and {free / GIB:.1f} GiB are free. "
            "What fits here: dsr1kit fits"
        )


def refuse_quantized_gguf(quantization: str) -> None:
    """Raise UsageError where a GGUF file is to be quantized once more."""
    if quantization not in ("none", "auto"):
        raise UsageError("a GGUF file has its own quantization: open it with quantization='none'")


def packed_by(packed: object) -> str:
    """The method that a `quantization_config` names."""
    return str(packed.get("quant_method") if isinstance(packed, dict) else getattr(packed, "quant_method", packed))


def packed_bits(packed: object) -> str:
    """What a `quantization_config` is in the kit's words: `4bit` or `8bit` of bitsandbytes, else `none` of them."""
    told = packed if isinstance(packed, dict) else vars(packed)
    return next((b for b in ("4bit", "8bit") if told.get(f"load_in_{b}") or told.get(f"_load_in_{b}")), "none")


def _refuse_packed(source: str, packed: object, quantization: str) -> None:
    """Raise ModelError where weights that come quantized need a package that is not here, UsageError where they are to
    be quantized in another way."""
    import transformers.quantizers

    if quantization not in ("none", "auto", packed_bits(packed)):
        raise UsageError(f"{source} is stored quantized ({packed_by(packed)}): open it with quantization='none'")
    found: Any = transformers.quantizers  # which says not what it exports
    try:
        found.AutoHfQuantizer.from_config(packed, pre_quantized=True).validate_environment(
            device_map=None, weights_only=False
        )
    except ImportError as error:
        said = str(error).strip().splitlines()[0].rstrip(".")
        raise ModelError(f"{source} is stored quantized: {said}; or take its unquantized original") from None
    except Exception:  # noqa: S110 - what else it asks for is told when it is loaded
        pass


def shape_or_none(config: Mapping[str, Any]) -> Shape | None:
    """The shape by which the planner counts; None for an architecture that it does not know."""
    from dsr1kit.local.shapes import shape_of_config

    try:
        return shape_of_config(config)
    except Dsr1kitError:
        return None


def fitting(source: str, shape: Shape | None, quantization: str, dtype: str, device: str) -> tuple[str, str]:
    """The quantization to load in and why; raises ModelError, with what would fit, where this one does not."""
    if shape is None:  # the loader will find out
        return ("none", "not known to the planner") if quantization == "auto" else (quantization, "asked for")
    here = seen_from(device)
    if quantization == "auto":
        named = replace(shape, title=shape.title or source)
        context = min(PLANNED_CONTEXT, shape.context)
        return choose_quantization(named, here, context, unquantized=PRECISION_OF[dtype])
    refuse_unfit(source, shape, PRECISION_OF[dtype if quantization == "none" else quantization], here)
    return quantization, "asked for"


def refuse_unfit(source: str, shape: Shape, precision: str, hardware: Hardware) -> None:
    """Raise ModelError, with what would fit, where a model's weights with what a process needs exceed what is free."""
    from dsr1kit.local.fits import advise

    context = min(PLANNED_CONTEXT, shape.context)
    wanted = need(shape, precision=precision, context=context, device="cuda" if hardware.gpus else "cpu")
    if wanted.weights + wanted.activations > available(hardware):
        raise ModelError(f"{source} does not fit: {advise(shape, hardware, precision=precision, context=context)}")


def fitting_instead(shape: Shape | None, device: str, precision: str) -> str:
    """What would fit, where memory ran out while a model was loaded."""
    from dsr1kit.local.fits import advise

    if shape is None or not precision:
        return "See what fits here: dsr1kit fits"
    return advise(shape, seen_from(device), precision=precision, context=min(PLANNED_CONTEXT, shape.context))


def seen_from(device: str) -> Hardware:
    """The machine as a model on one device sees it: that GPU alone, or none."""
    here = look()
    if not device.startswith("cuda"):
        return replace(here, gpus=())
    number = int(device.partition(":")[2] or 0)
    return replace(here, gpus=here.gpus[number : number + 1])


def with_free(here: Hardware, more: int) -> Hardware:
    """The same machine with so many more bytes free."""
    if here.gpus:
        return replace(here, gpus=(replace(here.gpus[0], free_bytes=here.gpus[0].free_bytes + more),))
    return replace(here, memory_free_bytes=here.memory_free_bytes + more)
