"""From a name to a Backend: a catalogue entry, `emulated:FILE` or `local:MODEL`.

The one place that knows all rooms which give Backends.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

from dsr1kit.access.channels import Channel, load_channels
from dsr1kit.access.prices import Price
from dsr1kit.records import Backend

EMULATED, LOCAL = "emulated:", "local:"


def open_backend(
    name: str,
    channels: Mapping[str, Channel] | None = None,
    *,
    first_token_s: float = 120.0,
    stall_s: float = 60.0,
    deadline_s: float | None = None,
    quantization: str = "none",
    adapter: Path | None = None,
) -> AbstractAsyncContextManager[Backend]:
    """The Backend that `name` means, to be used with `async with`.

    Args:
        name: a channel of the catalogue, `emulated:FILE` (or the name of a shipped weather), or
            `local:MODEL` (`tiny-r1`, a folder, a hub id, a GGUF file; `@4bit`, `@8bit` or `@auto` after it
            quantizes).
        channels: the catalogue; None: the shipped one and the person's own.
        first_token_s, stall_s, deadline_s: limits in seconds, for hosted and emulated channels.
        quantization: for `local:` names that say none themselves.
        adapter: folder of a LoRA adapter, for `local:` names.

    Raises:
        UnknownName, ConfigError: the name, or the file behind it, is wrong.
    """
    clocks: dict[str, Any] = {"first_token_s": first_token_s, "stall_s": stall_s, "deadline_s": deadline_s}
    if name.startswith(EMULATED):
        from dsr1kit.emulator.channel import EmulatedChannel

        return EmulatedChannel(name.removeprefix(EMULATED), name=name, **clocks)
    if name.startswith(LOCAL):
        from dsr1kit.local.model import LocalModel

        source, _, quantized = name.removeprefix(LOCAL).partition("@")
        return LocalModel(
            source,
            quantization=quantized or quantization,  # type: ignore[arg-type]  # checked there
            name=name,
            adapters=None if adapter is None else {adapter.resolve().name: adapter},
        )
    catalogue = load_channels() if channels is None else channels
    return catalogue[name].open(**clocks)


def is_local(name: str) -> bool:
    """Whether the name means a model in this process."""
    return name.startswith(LOCAL)


def price_of(name: str, channels: Mapping[str, Channel]) -> Price | None:
    """What the backend charges; a local model charges nothing (hardware and power are not counted)."""
    if is_local(name):
        return Price(0.0, 0.0)
    if name.startswith(EMULATED):
        from dsr1kit.emulator.weather import load_weather

        return load_weather(name.removeprefix(EMULATED)).price
    return channels[name].price
