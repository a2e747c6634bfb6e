"""Client-side limits of a channel: requests and tokens a minute, requests in flight.

Waiting here is the client's own choice and shows up in `queue_s`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

from dsr1kit.records import Usage


class _Bucket:
    """A token bucket that starts full with a minute's allowance and may be overdrawn by one request."""

    def __init__(self, per_minute: float) -> None:
        self._rate = per_minute / 60.0
        self._level = self._most = max(1.0, per_minute)  # a smaller bucket would never hold one request
        self._at = asyncio.get_running_loop().time()

    def _refill(self) -> float:
        now = asyncio.get_running_loop().time()
        self._level = min(self._most, self._level + (now - self._at) * self._rate)
        self._at = now
        return self._level

    async def wait_for(self, amount: float) -> None:
        while self._refill() < amount:  # noqa: ASYNC110 - time is what it waits for, no event
            await asyncio.sleep(max(0.001, (amount - self._level) / self._rate))

    def take(self, amount: float) -> None:
        self._refill()
        self._level -= amount


class Limits:
    """Holds requests back until the channel's limits allow them; None means no limit of that kind.

    Args:
        requests_per_minute: requests begun in any minute, roughly (a bucket of that size).
        tokens_per_minute: prompt and completion tokens; counted when a reply is complete.
        max_in_flight: requests at a time.
    """

    def __init__(
        self, requests_per_minute: float | None, tokens_per_minute: float | None, max_in_flight: int | None
    ) -> None:
        self._wanted = (requests_per_minute, tokens_per_minute)
        self._requests: _Bucket | None = None
        self._tokens: _Bucket | None = None
        self._turns = asyncio.Lock()
        self._flight = asyncio.Semaphore(max_in_flight) if max_in_flight else None
        self._ready = False
        self.in_flight = 0

    @asynccontextmanager
    async def slot(self) -> AsyncIterator[None]:
        """Wait until a request may be sent; hold its place in flight until the block ends."""
        if not self._ready:
            self._ready = True
            per_minute, tokens = self._wanted
            self._requests = _Bucket(per_minute) if per_minute else None
            self._tokens = _Bucket(tokens) if tokens else None
        async with AsyncExitStack() as stack:
            if self._flight is not None:
                await stack.enter_async_context(self._flight)
            if self._requests is not None or self._tokens is not None:
                async with self._turns:  # first come, first served
                    if self._requests is not None:
                        await self._requests.wait_for(1.0)
                        self._requests.take(1.0)
                    if self._tokens is not None:
                        await self._tokens.wait_for(1.0)
            self.in_flight += 1
            try:
                yield
            finally:
                self.in_flight -= 1

    def spent(self, usage: Usage) -> None:
        """Count a reply's tokens against the limit."""
        if self._tokens is not None:
            self._tokens.take((usage.prompt_tokens or 0) + (usage.completion_tokens or 0))
