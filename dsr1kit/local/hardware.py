"""What this machine has for a model, within the limits set on this process, and the choices that follow from it.

Choices (dtype, quantization, the notebooks' model) come with their reason, so that a person can disagree. torch is
imported only where there is an accelerator, or for a choice that is torch's own. Knows nothing about channels,
requests or how a model is loaded.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dsr1kit.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dsr1kit.local.shapes import Shape

TINY, DISTILL = "tiny-r1", "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"
SMALL = 50_000_000  # parameters below which half precision saves nothing worth its rounding
# What drivers leave where an accelerator could be: NVIDIA's, WSL's, AMD's.
_DEVICES = ("dev/nvidiactl", "dev/nvidia0", "proc/driver/nvidia", "dev/dxg", "dev/kfd")


class Choice(NamedTuple):
    """What was chosen, and why."""

    value: str
    reason: str


@dataclass(frozen=True, slots=True)
class Gpu:
    """One accelerator: its name, memory in bytes (what is free counts), capability, and real bfloat16 products."""

    name: str
    total_bytes: int
    free_bytes: int
    capability: tuple[int, int]
    bf16: bool


@dataclass(frozen=True, slots=True)
class Hardware:
    """What a process may use.

    Attributes:
        gpus: the accelerators that it sees.
        cores: processors, affinity and quotas honoured; at least 1.
        cpu, cpu_features: the processor's name and its instruction sets, as the kernel tells them.
        memory_bytes, memory_free_bytes: of the host or of the control group, whichever is less.
        colab: whether this is a Google Colab runtime.
        name: of a machine of data/models.toml, empty for the one at hand.
    """

    gpus: tuple[Gpu, ...]
    cores: int
    cpu: str
    cpu_features: frozenset[str]
    memory_bytes: int
    memory_free_bytes: int
    colab: bool
    name: str = ""


def look(root: Path = Path("/")) -> Hardware:
    """Look at this machine, in well under a second where there is no accelerator.

    Args:
        root: the folder that holds `proc`, `sys` and `dev`; another one than `/` describes another machine, whose
            accelerators are not asked for.
    """
    cpu, features = _processor(root)
    total, free = _memory(root)
    gpus: tuple[Gpu, ...] = ()
    if root == Path("/") and any((root / device).exists() for device in _DEVICES):
        gpus = _gpus()
    return Hardware(
        gpus, usable_cores(root), cpu, features, total, free,
        colab="google.colab" in sys.modules or "COLAB_RELEASE_TAG" in os.environ,
    )  # fmt: skip


# --- choices ---------------------------------------------------------------------------------------------------


def default_model(wanted: str = "auto", hardware: Hardware | None = None) -> Choice:
    """The local model to run: `wanted` itself, or, for `auto`, what suits the hardware (None: this machine's).

    With a GPU that torch can use R1's smallest distill (1.5B: about 3.6 GB in 16 bits, fits a T4), else the
    embedded tiny-r1, which is no R1 but runs anywhere.
    """
    if wanted != "auto":
        return Choice(wanted, "as asked")
    at = look() if hardware is None else hardware
    if not at.gpus:
        return Choice(TINY, "no GPU here: the embedded model, which is not R1")
    gpu = at.gpus[0]
    if hardware is None:
        import torch

        if not torch.cuda.is_available():
            return Choice(
                TINY, f"{gpu.name} is here but torch cannot use it (no CUDA build, or too old a driver): the embedded "
                "model, which is not R1",
            )  # fmt: skip
    from dsr1kit.local.memory import GIB, need
    from dsr1kit.local.shapes import find_shape

    half = "bfloat16" if gpu.bf16 else "float16"
    wants = need(find_shape(DISTILL), precision="bf16" if gpu.bf16 else "fp16", context=4096).total
    if wants > gpu.free_bytes:
        return Choice(
            TINY, f"{gpu.name} has {gpu.free_bytes / GIB:.1f} GiB free and R1's smallest distill needs "
            f"{wants / GIB:.1f}: the embedded model, which is not R1",
        )  # fmt: skip
    return Choice(
        DISTILL, f"a GPU is here ({gpu.name}): R1's smallest distill, in {half}: it fits, and 4-bit would be slower"
    )


def choose_dtype(parameters: int, device: str) -> Choice:
    """The dtype (torch's name for it) for a model of so many parameters on a device, and the reason for it."""
    import torch

    if device.startswith("cuda"):
        # is_bf16_supported() alone also counts emulation, which is slow (T4).
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return Choice("bfloat16", "the GPU multiplies bfloat16 natively")
        return Choice("float16", "the GPU has no native bfloat16 (compute capability below 8)")
    if parameters < SMALL:
        return Choice("float32", "so small a model is bound by calls, not by memory: rounding would buy no speed")
    if torch.backends.cpu.get_cpu_capability() == "AVX512" and "avx512_bf16" in _processor(Path("/"))[1]:
        return Choice("bfloat16", "the processor multiplies bfloat16 (avx512_bf16)")
    return Choice("float32", "the processor has no bfloat16 products")


def choose_quantization(
    shape: Shape, hardware: Hardware, context: int, purpose: str = "inference", *, unquantized: str | None = None
) -> Choice:
    """`none`, `8bit` or `4bit` for a model on a machine's first GPU, or on its processor, and the reason.

    `unquantized` is the precision it would have without: `fp32`, `fp16` or `bf16`, by default the machine's 16 bits.
    That is chosen where it fits, since 4-bit is slower there (Qwen2.5-3B on a T4, tokens/s: fp16 25.7, NF4 with
    double quantization 13.6, LLM.int8 6.0; bitsandbytes' own benchmark). When fine-tuning (`purpose` "qlora" or
    "lora"): `qlora` is always 4-bit.

    Raises:
        ModelError: it fits in none; the message says what would.
        UnknownName: no such purpose.
    """
    from dsr1kit.local.fits import advise
    from dsr1kit.local.memory import GIB, Purpose, available, half_precision, need, purpose_named
    from dsr1kit.local.shapes import least_blocks

    what: Purpose = purpose_named(purpose)
    one = Hardware(
        hardware.gpus[:1], hardware.cores, hardware.cpu, hardware.cpu_features, hardware.memory_bytes,
        hardware.memory_free_bytes, hardware.colab, hardware.name,
    )  # fmt: skip
    device = "cuda" if one.gpus else "cpu"
    room, whole = available(one), unquantized or half_precision(one)

    def wants(precision: str) -> int:
        return need(shape, precision=precision, context=context, purpose=what, device=device).total

    # bitsandbytes' 4-bit kernels on a processor are wrong for rows that are no whole blocks.
    four = device == "cuda" or least_blocks(shape, 64)
    if what != "qlora" and wants(whole) <= room:
        return Choice("none", f"{wants(whole) / GIB:.1f} GiB in {whole} fit the {room / GIB:.1f} free, and 4-bit is "
                      "slower where more bits fit")  # fmt: skip
    if what != "lora" and four and wants("nf4") <= room:
        why = "QLoRA trains on 4-bit weights" if what == "qlora" else (
            f"{whole} would need {wants(whole) / GIB:.1f} GiB, free are {room / GIB:.1f}"
        )  # fmt: skip
        return Choice("4bit", f"{why}: NF4 needs {wants('nf4') / GIB:.1f}")
    if what != "qlora" and wants("8bit") <= room:
        why = "bitsandbytes' 4-bit is wrong for these widths on a processor" if not four else "LoRA on 8-bit weights"
        return Choice("8bit", f"{whole} would need {wants(whole) / GIB:.1f} GiB, free are {room / GIB:.1f}; {why}")
    raise ModelError(advise(shape, one, precision="nf4", context=context, purpose=what))


# --- the machine -----------------------------------------------------------------------------------------------


def _read(path: Path) -> str:
    with contextlib.suppress(OSError):
        return path.read_text(encoding="utf-8", errors="replace").strip()
    return ""


def _processor(root: Path) -> tuple[str, frozenset[str]]:
    """Name and instruction sets of the first processor (`flags` on x86, `Features` on Arm)."""
    told = _read(root / "proc/cpuinfo")
    name = re.search(r"^(?:model name|Model|Processor)\s*:\s*(.+)$", told, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.*)$", told, re.MULTILINE)
    return (name[1].strip() if name else ""), frozenset(flags[1].split() if flags else ())


def _groups(root: Path, controller: str) -> Iterator[tuple[int, Path]]:
    """The control groups of this process from its own up to the root: (cgroup version, folder) each.

    In a container /proc/self/cgroup may name the host's path while the group itself is mounted at the root, so a
    folder that is not there is no reason to stop.
    """
    base = root / "sys/fs/cgroup"
    for line in _read(root / "proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        names, _, path = rest.partition(":")
        if number == "0" and not names:
            version, mounts = 2, [base, base / "unified"]
        elif controller in names.split(","):
            version, mounts = 1, [base / controller, base / names]
        else:
            continue
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for mount in dict.fromkeys(mounts):
            for depth in range(len(parts), -1, -1):
                folder = mount.joinpath(*parts[:depth])
                if folder.is_dir():
                    yield version, folder


def usable_cores(root: Path = Path("/")) -> int:
    """Processors that this process may keep busy, affinity and container quotas honoured; at least 1."""
    allowed = _allowed(_read(root / "proc/self/status"))
    if not allowed:
        with contextlib.suppress(AttributeError):  # not on macOS
            allowed = len(os.sched_getaffinity(0))
    cores = float(allowed or os.cpu_count() or 1)
    for version, folder in _groups(root, "cpu"):
        if version == 2:
            quota, _, period = _read(folder / "cpu.max").partition(" ")
        else:
            quota, period = _read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")
        if quota.isdigit() and period.isdigit() and int(period):  # "max" and -1 mean no quota
            cores = min(cores, int(quota) / int(period))
    return max(1, int(cores))


def _allowed(status: str) -> int:
    """Number of processors in the affinity mask, as /proc/self/status lists it (`0-3,8`); 0: not told."""
    found = re.search(r"^Cpus_allowed_list:\s*([\d,-]+)$", status, re.MULTILINE)
    count = 0
    for part in found[1].split(",") if found else ():
        low, _, high = part.partition("-")
        count += int(high or low) - int(low) + 1
    return count


def _memory(root: Path) -> tuple[int, int]:
    told = {key: int(kib) * 1024 for key, kib in re.findall(r"^(\w+):\s+(\d+) kB$", _read(root / "proc/meminfo"), re.M)}
    total = told.get("MemTotal", 0)
    if not total and root == Path("/"):
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    free = told.get("MemAvailable", told.get("MemFree", total))
    for version, folder in _groups(root, "memory"):
        limit = _read(folder / ("memory.max" if version == 2 else "memory.limit_in_bytes"))
        used = _read(folder / ("memory.current" if version == 2 else "memory.usage_in_bytes"))
        if not limit.isdigit() or int(limit) >= total > 0:
            continue
        total = int(limit)
        if used.isdigit():
            # Files read once count as used, but give way to a model's weights.
            key = "inactive_file" if version == 2 else "total_inactive_file"
            idle = re.search(rf"^{key} (\d+)$", _read(folder / "memory.stat"), re.MULTILINE)
            free = min(free, total - int(used) + (int(idle[1]) if idle else 0))
    return total, max(0, min(free, total))


def _gpus() -> tuple[Gpu, ...]:
    """By torch where this process has it loaded already, else by nvidia-smi, which costs no seconds of import."""
    if "torch" in sys.modules:
        return _torch_gpus()
    if found := _told_gpus():
        return found
    return _torch_gpus() if importlib.util.find_spec("torch") else ()


def _torch_gpus() -> tuple[Gpu, ...]:
    import torch

    found = []
    for number in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        facts: Any = torch.cuda.get_device_properties(number)
        free, total = torch.cuda.mem_get_info(number)
        with torch.cuda.device(number):
            bf16 = bool(torch.cuda.is_bf16_supported(including_emulation=False))
        found.append(Gpu(facts.name, total, free, (facts.major, facts.minor), bf16))
    return tuple(found)


def _told_gpus() -> tuple[Gpu, ...]:
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return ()
    query = [smi, "--query-gpu=index,uuid,name,memory.total,memory.free,compute_cap", "--format=csv,noheader,nounits"]
    try:
        # Fixed arguments, a program found on the person's own PATH.
        told = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout  # noqa: S603
    except (OSError, subprocess.SubprocessError):
        return ()
    rows = [[cell.strip() for cell in line.split(",")] for line in told.splitlines()]
    found = {}
    for row in rows:
        with contextlib.suppress(ValueError):  # "[N/A]" where a card does not tell
            index, uuid, name, total, free, capability = row
            major, minor = (int(part) for part in capability.split("."))
            gpu = Gpu(name, int(total) << 20, int(free) << 20, (major, minor), major >= 8)
            found[index] = found[uuid] = gpu
    wanted = os.environ.get("CUDA_VISIBLE_DEVICES")
    if wanted is None:
        return tuple(found[row[0]] for row in rows if row[0] in found)
    visible = []
    for key in (part.strip() for part in wanted.split(",")):
        name = next((uuid for uuid in found if key.startswith("GPU-") and uuid.startswith(key)), key)
        if name not in found:
            break  # CUDA shows the devices before the first one that it does not know
        visible.append(found[name])
    return tuple(visible)
