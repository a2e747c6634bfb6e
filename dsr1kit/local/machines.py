"""Machines known by name, for planning without having one, and how fast their memory is.

Knows the [hardware] tables of data/models.toml; nothing about models.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from types import MappingProxyType
from typing import NamedTuple

from dsr1kit.config import Table, read_toml
from dsr1kit.errors import UnknownName
from dsr1kit.local.hardware import Gpu, Hardware
from dsr1kit.paths import data_dir

_GIB = 1 << 30
# Instruction sets of the named computers: what any x86 processor of the last ten years has.
_USUAL = frozenset({"sse4_2", "fma", "avx2"})


class Machine(NamedTuple):
    """A machine by name: its title, what it has, bytes a second from the memory that holds weights (of one GPU)."""

    title: str
    hardware: Hardware
    bandwidth: float
    gpu: str


@cache
def machines() -> Mapping[str, Machine]:
    """All machines of data/models.toml by name. Raises ConfigError where the file is wrong."""
    path = data_dir() / "models.toml"
    found = {}
    for name, values in Table(path, "", read_toml(path)).raw_all().get("hardware", {}).items():
        table = Table(path, f"hardware.{name}", values)
        title, gpu = table.text("title", required=True), table.text("gpu")
        memory = table.number("memory_gib", low=1) or 0.0
        free = table.number("free_gib", memory) or 0.0
        cards: tuple[Gpu, ...] = ()
        if gpu:
            usable = int((table.number("usable_gib") or 0.0) * _GIB)
            major, minor = (int(part) for part in table.text("capability", required=True).split("."))
            cards = (Gpu(title, usable, usable, (major, minor), major >= 8),) * (table.whole("count", 1) or 1)
        hardware = Hardware(
            cards, table.whole("cores", 1, low=1) or 1, title, _USUAL, int(memory * _GIB), int(free * _GIB),
            colab=False, name=name,
        )  # fmt: skip
        found[name] = Machine(title, hardware, 1e9 * (table.number("bandwidth_gb_s") or 0.0), gpu)
        table.text("source", required=True)
        table.date("as_of")
        table.finish()
    return MappingProxyType(found)


def find_hardware(name: str) -> Hardware:
    """The machine of that name. Raises UnknownName."""
    known = machines()
    if (key := name.strip().casefold()) not in known:
        raise UnknownName("hardware", name, known, hint="(dsr1kit fits without --on looks at this machine)")
    return known[key].hardware


def bandwidth(hardware: Hardware) -> float | None:
    """Bytes a second that one GPU, or the processor, reads of its memory, by its maker; None where unknown.

    A card that is here is found by its name; of two with like names (40 and 80 GB) the one nearer in size.
    """
    known = machines()
    if hardware.name:
        return known[hardware.name].bandwidth
    if not hardware.gpus:
        return None
    gpu = hardware.gpus[0]
    words = gpu.name.replace("-", " ")
    alike = [m for m in known.values() if m.gpu and f" {m.gpu} " in f" {words} "]
    if not alike or {"Laptop", "Ti", "SUPER", "Q"} & set(words.split()):  # other cards than their namesakes
        return None
    return min(alike, key=lambda m: abs(m.hardware.gpus[0].total_bytes - gpu.total_bytes)).bandwidth
