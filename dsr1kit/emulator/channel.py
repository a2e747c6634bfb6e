"""`emulated:FILE`: a channel served by an emulator in a process of its own; its user starts and stops it."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from dsr1kit.access.channels import Channel
from dsr1kit.access.client import ChannelClient
from dsr1kit.emulator.weather import Weather, load_weather
from dsr1kit.errors import RunError, UsageError
from dsr1kit.records import R1_SAMPLING, Message, OnDelta, Reply, Sampling

_START_S = 120.0
_PREPARED_AT_A_TIME = 64


def channel_of(weather: Weather, url: str, name: str, began: dt.datetime) -> Channel:
    """The channel of an emulator of this weather that serves at `url` and began at `began`."""
    return Channel(
        name=name,
        title=weather.title,
        base_urls=(url,),
        model=weather.served_model,
        protocol=weather.protocol,
        reasoning="inline" if weather.reasoning == "prefilled" else "auto",
        price=weather.price,
        balance_path="" if weather.balance is None else "/user/balance",
        retires=weather.retirement(began),
        region="local",
        emulated=True,
    )


class EmulatedChannel:
    """A Backend that brings its own provider: starts it on entering, stops it on leaving.

    Args:
        weather: a weather file, or the name of a shipped one.
        name: the channel's name; default `emulated:<weather>`.
        clocks: what `Channel.open()` takes (first_token_s, stall_s, deadline_s, connect_s).

    Raises:
        ConfigError: the weather file does not parse or holds a wrong value.
        RunError (on entering): the emulator's process did not start.
    """

    emulated = True

    def __init__(self, weather: str | Path, *, name: str | None = None, **clocks: float | None) -> None:
        self.weather: Weather = load_weather(weather)
        self.name = name or f"emulated:{weather}"
        self._clocks = clocks
        self._began = dt.datetime.now(dt.UTC)
        self._process: asyncio.subprocess.Process | None = None
        self._client: ChannelClient | None = None
        self._log: IO[bytes] | None = None
        self.channel = channel_of(self.weather, "http://127.0.0.1:0/v1", self.name, self._began)

    async def __aenter__(self) -> Self:
        self.channel.open(**self._clocks)  # type: ignore[arg-type]  # a dict of limits has one type; raises early
        # A file: a pipe that nobody reads would stop a talkative emulator.
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed in _stop
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "dsr1kit", "emulate", str(self.weather.path)),
            *("--port", "0", "--with-parent"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=self._log,
        )
        assert self._process.stdout is not None  # noqa: S101 - asked for above
        try:
            async with asyncio.timeout(_START_S):
                line = await self._process.stdout.readline()
            self.channel = channel_of(self.weather, json.loads(line)["url"], self.name, self._began)
            self._client = self.channel.open(**self._clocks)  # type: ignore[arg-type]  # as above
            await self._client.__aenter__()
        except (TimeoutError, ValueError, KeyError):
            told = await self._stop()
            raise RunError(f"the emulator for {self.weather.path} did not start: {told or 'no word from it'}") from None
        except BaseException:
            await self._stop()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._client is not None:
            await self._client.__aexit__(kind, error, trace)
            self._client = None
        await self._stop()

    async def _stop(self) -> str:
        """End the process; returns the tail of its log."""
        process, self._process = self._process, None
        file, self._log = self._log, None
        if process is None or file is None:
            return ""
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        try:
            async with asyncio.timeout(5.0):
                await process.communicate()
        except TimeoutError:
            process.kill()
            await process.communicate()
        with file:
            file.seek(0)
            log = file.read()
        return log.decode("utf-8", "replace").strip()[-400:]

    async def ask(
        self,
        messages: Sequence[Message],
        sampling: Sampling = R1_SAMPLING,
        *,
        on_delta: OnDelta | None = None,
        due: float | None = None,
    ) -> Reply:
        """Ask once; see `Backend.ask`."""
        if self._client is None:
            raise UsageError(f"{self.name} is not open: use `async with`")
        return await self._client.ask(messages, sampling, on_delta=on_delta, due=due)

    async def prepare(
        self,
        questions: Sequence[tuple[Sequence[Message], Sampling, int]],
        on_done: Callable[[int], None] | None = None,
    ) -> None:
        """Have the emulator's model answer the questions now, so that its computing is in no latency.

        Args:
            questions: what will be asked, its sampling, and how often it was asked of an earlier emulator.
            on_done: called with the number of questions answered since the last call.

        Raises:
            RunError: the emulator's model failed.
        """
        if self._client is None:
            return
        import aiohttp

        url = self.channel.base_urls[0].removesuffix("/v1") + "/emulator/prepare"
        timeout = aiohttp.ClientTimeout(total=None)
        async with aiohttp.ClientSession(timeout=timeout) as session:
            for begin in range(0, len(questions), _PREPARED_AT_A_TIME):
                part = questions[begin : begin + _PREPARED_AT_A_TIME]
                bodies = [self._client.body(messages, sampling) | {"attempt": n} for messages, sampling, n in part]
                try:
                    async with session.post(url, json=bodies) as response:
                        response.raise_for_status()
                except aiohttp.ClientError as error:
                    raise RunError(f"{self.name}: its model could not answer beforehand: {error}") from None
                if on_done is not None:
                    on_done(len(part))
