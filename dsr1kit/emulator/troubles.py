"""The shipped troubles: one emulated condition each, with the outcome that a client ought to see.

Read from data/troubles.toml. What the access notebook plays and the doctor has to name, over real HTTP.
"""

from __future__ import annotations

import copy
import datetime as dt
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from dsr1kit.access.channels import Channel
from dsr1kit.config import Table, read_toml
from dsr1kit.emulator.channel import channel_of
from dsr1kit.emulator.server import Emulator
from dsr1kit.emulator.weather import Weather, read_weather
from dsr1kit.paths import data_dir
from dsr1kit.records import Outcome


@dataclass(frozen=True, slots=True)
class Trouble:
    """One condition.

    Attributes:
        outcome: what it is.
        says: what can be seen of it on the wire.
        seen: where such a thing was met.
        changes: what of the channel is changed: base_url, scheme, proxy, retires.
    """

    name: str
    outcome: Outcome
    says: str
    seen: str
    weather: Weather
    changes: dict[str, Any] = field(default_factory=dict)


def load_troubles() -> dict[str, Trouble]:
    """All shipped troubles by name, in the order of the file."""
    path = data_dir() / "troubles.toml"
    top = Table(path, "", read_toml(path))
    calm, entries = top.raw("calm"), top.raw("trouble")
    top.finish()
    return {name: _trouble(path, name, calm, values) for name, values in entries.items()}


def _trouble(path: Any, name: str, calm: Mapping[str, Any], values: dict[str, Any]) -> Trouble:
    t = Table(path, f"trouble.{name}", values)
    outcome, says, seen = (t.text(key, required=True) for key in ("outcome", "says", "seen"))
    changes = t.table("channel")
    weather: dict[str, Any] = copy.deepcopy(dict(calm))
    for key, table in t.raw_all().items():
        if key not in ("outcome", "says", "seen", "channel"):
            weather[key] = {**weather.get(key, {}), **table}
    wanted: dict[str, Any] = {}
    if changes is not None:
        wanted = {key: changes.text(key) for key in ("base_url", "scheme", "proxy") if changes.has(key)}
        if (retires := changes.date("retires")) is not None:
            wanted["retires"] = retires
        changes.finish()
    read = read_weather(path, f"trouble.{name}", weather)
    return Trouble(name, Outcome(outcome), says, seen, replace(read, title=name), wanted)


@asynccontextmanager
async def play(trouble: Trouble) -> AsyncIterator[Channel]:
    """Serve the trouble in this process for the length of the block; yields the channel that meets it."""
    began = dt.datetime.now(dt.UTC)
    async with Emulator(trouble.weather).listen() as url:
        changes = dict(trouble.changes)
        if scheme := changes.pop("scheme", ""):
            url = url.replace("http", scheme, 1)
        channel = channel_of(trouble.weather, changes.pop("base_url", url), trouble.name, began)
        yield replace(channel, **changes)
