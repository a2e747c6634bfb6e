"""The doctor over several channels, by name: catalogue entries and emulated ones. Prints as it goes, on request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dsr1kit.access.channels import Channel
from dsr1kit.access.doctor import diagnose
from dsr1kit.access.findings import Diagnosis
from dsr1kit.access.probe import Conformance
from dsr1kit.backends import EMULATED, is_local, open_backend
from dsr1kit.emulator.weather import load_weather
from dsr1kit.errors import UsageError
from dsr1kit.keys import require_key


async def diagnose_all(
    names: Sequence[str],
    catalogue: Mapping[str, Channel],
    clocks: Mapping[str, Any],
    *,
    trace: bool = False,
    show: bool = False,
) -> list[Diagnosis]:
    """Examine channels one after the other; without names, all that are open to this person.

    Raises:
        UnknownName: no such channel; UsageError: a local model, a limit that cannot be meant, nothing to examine.
    """
    from dsr1kit.commands.show import name_line, step_line, verdict_line

    chosen = list(names) or [c.name for c in catalogue.values() if not c.closed_because()]
    if not chosen:
        raise UsageError(
            "no channel is open to you now: set a key (dsr1kit channels names the variables), run a server of your "
            "own, or name a channel: dsr1kit doctor openrouter"
        )
    found = []
    _known(chosen, catalogue, clocks)
    for name in chosen:
        if show:
            name_line(name)
        async with _Served(name, catalogue) as channel:
            one = await diagnose(channel, trace=trace, on_step=step_line if show else None, **clocks)
        if show:
            verdict_line(one)
        found.append(one)
    return found


async def probe_all(
    names: Sequence[str],
    catalogue: Mapping[str, Channel],
    ceiling_tokens: int,
    clocks: Mapping[str, float],
    *,
    show: bool = False,
) -> list[Conformance]:
    """Probe channels one after the other.

    Raises:
        UsageError: as `diagnose_all`; a channel that cannot be opened. Before the first is asked.
    """
    from dsr1kit.access.probe import probe
    from dsr1kit.commands.show import check_line, conformance_line, name_line

    results = []
    _known(names, catalogue, clocks)
    if ceiling_tokens < 1:
        raise UsageError(f"--ceiling-tokens must be at least 1, not {ceiling_tokens}")
    for name in names:
        if not name.startswith(EMULATED):
            _openable(catalogue[name])
    for name in names:
        if show:
            name_line(name)
        async with _Served(name, catalogue) as channel:
            tell = check_line if show else None
            one = await probe(channel, ceiling_tokens=ceiling_tokens, on_check=tell, **clocks)
        if show:
            conformance_line(one)
        results.append(one)
    return results


def _known(names: Sequence[str], catalogue: Mapping[str, Channel], clocks: Mapping[str, float]) -> None:
    """Raise for names and limits that mean nothing before the first channel is asked."""
    for limit, value in clocks.items():
        if not value > 0:
            raise UsageError(f"{limit} must be above 0 seconds, not {value:g}")
    for name in names:
        if is_local(name):
            raise UsageError(f"{name} runs in this process; the doctor examines channels: dsr1kit ask --local tries it")
        if name.startswith(EMULATED):
            load_weather(name.removeprefix(EMULATED))
        else:
            _ = catalogue[name]


def _openable(channel: Channel) -> None:
    channel.open()  # raises where something is still to fill in
    if channel.protocol == "chat-completions" and channel.api_key_env:
        require_key(channel.api_key_env, channel.name)


class _Served:
    """The channel of a name; an emulated one's provider runs for the length of the block."""

    def __init__(self, name: str, catalogue: Mapping[str, Channel]) -> None:
        self._name, self._catalogue = name, catalogue
        self._backend: Any = None

    async def __aenter__(self) -> Channel:
        if not self._name.startswith(EMULATED):
            return self._catalogue[self._name]
        self._backend = await open_backend(self._name, self._catalogue).__aenter__()
        channel: Channel = self._backend.channel
        return channel

    async def __aexit__(self, *error: Any) -> None:
        if self._backend is not None:
            await self._backend.__aexit__(*error)
