"""A day in seconds: the emulator and the watch on one clock that jumps from question to question.

Answers still travel over real HTTP and are measured in real time; only the waiting between them is left out.
"""

from __future__ import annotations

import datetime as dt
from dataclasses import replace
from pathlib import Path

from dsr1kit.compare.watch import Watched, WatchSettings, watch
from dsr1kit.emulator.channel import channel_of
from dsr1kit.emulator.server import Emulator
from dsr1kit.emulator.weather import load_weather


class JumpingClock:
    """A clock that stands still but for its own sleeping.

    Args:
        begin: what it shows at first (timezone-aware).
    """

    def __init__(self, begin: dt.datetime) -> None:
        self._now = begin.timestamp()

    def __call__(self) -> float:
        """Seconds since the epoch."""
        return self._now

    def now(self) -> dt.datetime:
        """The moment, in UTC."""
        return dt.datetime.fromtimestamp(self._now, dt.UTC)

    async def sleep(self, seconds: float) -> None:
        """Let `seconds` have passed."""
        self._now += seconds


async def rehearse_day(
    weather: str | Path, out: str | Path, *, begin: dt.datetime, every_s: float = 600.0, promised: float | None = None
) -> Watched:
    """Watch an emulated provider through one day of its weather.

    Args:
        weather: a weather file, or the name of a shipped one, with peak hours.
        out: the watch's folder.
        begin: when the day begins (timezone-aware).
        every_s: seconds between questions, on the day's clock.
        promised: the availability that its contract promises, to be held against what is measured.
    """
    clock, conditions = JumpingClock(begin), load_weather(weather)
    name = f"emulated:{conditions.path.stem}"
    async with Emulator(conditions, now=clock.now).listen() as url:
        channel = replace(channel_of(conditions, url, name, begin), availability=promised)
        settings = WatchSettings(channels=(name,), every_s=every_s, for_s=86400.0)
        return await watch(settings, out, channels={name: channel}, clock=clock, sleep=clock.sleep)
