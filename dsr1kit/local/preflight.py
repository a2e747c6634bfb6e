"""Look for what breaks a local model before it is loaded: versions that clash, a GPU that torch cannot use, a quantizer
that is wrong.

Each finding says what is so and what mends it. Imports torch and bitsandbytes for the one check that needs them, in
the function. Knows nothing about models.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dsr1kit.local.hardware import Hardware, look

_TORCHAO = (0, 16)  # PEFT raises ImportError for an older one that is installed


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing looked at: whether it is well, what was seen, and what mends it (empty where nothing is to mend)."""

    name: str
    ok: bool
    detail: str
    fix: str = ""


def preflight(
    *, hardware: Hardware | None = None, installed: Callable[[str], str | None] | None = None
) -> list[Finding]:
    """Examine this process and machine for local models; takes the seconds of importing torch.

    Args:
        hardware: what is there; None: look.
        installed: gives the version of a package, None where it is not installed; None: of this environment.
    """
    at = look() if hardware is None else hardware
    version = installed or _installed
    found = [_torch(version, at), *_versions(version, at), _torchao(version), _processor(at), _threads(at), _offline()]
    if version("torch"):
        found += [_driver(at), _bitsandbytes(version, at)]
    return [finding for finding in found if finding is not None]


def _installed(name: str) -> str | None:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(name)
    return None


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:3])


def _bounds(extra: str) -> dict[str, str]:
    """The lower bounds that the kit's own metadata names for an extra: {package: version}."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        lines = importlib.metadata.requires("dsr1kit") or []
        pairs = (re.match(r"([\w.-]+)>=([\w.]+).*extra == ['\"]([\w-]+)", line) for line in lines)
        return {pair[1].lower(): pair[2] for pair in pairs if pair and pair[3] == extra}
    return {}


def _torch(version: Callable[[str], str | None], at: Hardware) -> Finding:
    on_disk = version("torch")
    if on_disk is None:
        return Finding("torch", False, "torch is not installed", "pip install 'dsr1kit[local]'")
    loaded = getattr(sys.modules.get("torch"), "__version__", None)
    if loaded and str(loaded).partition("+")[0] != on_disk.partition("+")[0]:
        how = "Runtime > Restart session" if at.colab else "restart the kernel or the process"
        return Finding("torch", False, f"torch {loaded} is loaded, but {on_disk} was installed since", how)
    return Finding("torch", True, f"torch {on_disk}")


def _versions(version: Callable[[str], str | None], at: Hardware) -> list[Finding]:
    found = []
    needed = _bounds("local")
    for name, low in sorted((_bounds("finetune") | needed).items()):
        told = version(name)
        # Without its dependencies, pip cannot replace what Colab has loaded.
        install = f"pip install -U{' --no-deps' if at.colab else ''} '{name}>={low}'"
        if name in ("torch", "bitsandbytes") or (told is None and name not in needed):
            continue
        if told is None:
            found.append(Finding(name, False, f"{name} is not installed", install))
        elif _numbers(told) < _numbers(low):
            found.append(Finding(name, False, f"{name} {told} is older than {low}", install))
        else:
            found.append(Finding(name, True, f"{name} {told}"))
    bound, torch = needed.get("torch", ""), version("torch")
    if torch and _numbers(torch) < _numbers(bound):
        # Colab's torch is part of its image: a newer runtime is the only safe way to a newer torch.
        newer = "Runtime > Change runtime type > the latest runtime version" if at.colab else (
            f"pip install -U 'torch>={bound}'"
        )  # fmt: skip
        found.append(Finding("torch version", False, f"torch {torch} is older than {bound}", newer))
    return found


def _torchao(version: Callable[[str], str | None]) -> Finding | None:
    told = version("torchao")
    if told is None or _numbers(told) >= _TORCHAO or version("peft") is None:
        return None
    return Finding("torchao", False, f"torchao {told} is installed, and PEFT raises ImportError below 0.16",
                   "pip uninstall -y torchao   (or: pip install -U 'torchao>=0.16')")  # fmt: skip


def _processor(at: Hardware) -> Finding | None:
    has = at.cpu_features
    if at.gpus or not has:
        return None
    if "avx512_bf16" in has:
        return Finding("processor", True, "it multiplies bfloat16 (avx512_bf16)")
    if "avx2" in has:
        return Finding("processor", True, "no avx512_bf16: models run in float32, twice the memory of 16 bits; a GGUF "
                       "file by llama.cpp takes a quarter")  # fmt: skip
    if "asimd" in has:
        return Finding("processor", True, "Arm: models run in float32; a GGUF file by llama.cpp takes a quarter")
    return Finding("processor", False, "no avx2: products run many times slower",
                   "use tiny-r1, or a hosted R1: dsr1kit channels")  # fmt: skip


def _threads(at: Hardware) -> Finding | None:
    told = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    if not told.isdigit() or int(told) <= at.cores:
        return None
    return Finding("threads", False, f"OMP_NUM_THREADS is {told}, and {at.cores} cores may be used: threads wait for "
                   "one another", f"export OMP_NUM_THREADS={at.cores}   (before Python starts)")  # fmt: skip


def _offline() -> Finding | None:
    value = os.environ.get("HF_HUB_OFFLINE", "")
    if value.upper() not in ("1", "ON", "YES", "TRUE"):
        return None
    return Finding("offline", True, f"HF_HUB_OFFLINE={value}: nothing is downloaded, models must be here already")


def _driver(at: Hardware) -> Finding | None:
    if not at.gpus:
        return None
    import torch

    name = at.gpus[0].name
    if torch.cuda.is_available():
        return Finding("GPU", True, f"{name}, {at.gpus[0].free_bytes / 2**30:.1f} GiB free")
    if torch.version.cuda is None:
        fix = ("Runtime > Disconnect and delete runtime, then connect again" if at.colab else
               "install torch's CUDA build, as https://pytorch.org/get-started/locally/ tells")  # fmt: skip
        return Finding("GPU", False, f"{name} is here, but this torch {torch.__version__} was built without CUDA", fix)
    fix = ("Runtime > Disconnect and delete runtime, then connect again" if at.colab else
           f"update the NVIDIA driver to one for CUDA {torch.version.cuda} (nvidia-smi tells the newest it can), or "
           "install a torch built for an older CUDA")  # fmt: skip
    return Finding("GPU", False, f"{name} is here, but torch (CUDA {torch.version.cuda}) cannot use it: most often the "
                   "driver is too old", fix)  # fmt: skip


def _bitsandbytes(version: Callable[[str], str | None], at: Hardware) -> Finding:
    low = _bounds("local").get("bitsandbytes", "0.49")
    fix = f"pip install -U --no-deps 'bitsandbytes>={low}'" if at.colab else f"pip install -U 'bitsandbytes>={low}'"
    told = version("bitsandbytes")
    if told is None:
        return Finding("bitsandbytes", False, "it is not installed: no 4-bit and 8-bit weights", fix)
    if _numbers(told) < _numbers(low):
        return Finding("bitsandbytes", False, f"bitsandbytes {told} is older than {low}", fix)
    try:
        error = _product_error()
    except Exception as problem:  # a native library that does not load fails in many ways
        first = (str(problem).strip().splitlines() or [type(problem).__name__])[0]
        return Finding("bitsandbytes", False, f"bitsandbytes {told} does not work here: {first}", fix)
    if error > 0.02:
        return Finding("bitsandbytes", False, f"bitsandbytes {told} multiplies 4-bit weights wrongly here (off by "
                       f"{error:.0%})", "open models with --quantization none or 8bit, or: " + fix)  # fmt: skip
    return Finding("bitsandbytes", True, f"bitsandbytes {told}: a 4-bit product agrees with its weights")


def _product_error() -> float:
    """Relative error of a small NF4 product against that of its dequantized weights, on the device in use."""
    log = logging.getLogger("bitsandbytes")
    before = log.level
    log.setLevel(logging.ERROR)  # it advises an optional package on every processor
    try:
        return _compared()
    finally:
        log.setLevel(before)


def _compared() -> float:
    import bitsandbytes
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float16 if device == "cuda" else torch.float32
    chance = torch.Generator().manual_seed(0)
    bits: Any = bitsandbytes
    layer = bits.nn.Linear4bit(256, 128, bias=False, compute_dtype=dtype, quant_type="nf4")
    weight = torch.randn(128, 256, generator=chance).to(dtype)
    layer.weight = bits.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
    layer = layer.to(device)
    plain = bits.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
    rows = torch.randn(4, 256, generator=chance).to(device, dtype)
    with torch.no_grad():
        product = layer(rows).float()
    wanted = rows.float() @ plain.T
    return float((product - wanted).norm() / wanted.norm())
