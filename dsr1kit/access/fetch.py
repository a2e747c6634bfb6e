"""One plain HTTP request over the measuring client's own connections, so that it takes the same way: same
proxy, same TLS, same clock. For model lists, balances and the choice of the nearest address.

Knows nothing about Chat Completions.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from typing import Any

from dsr1kit.access.http import Exchange, NotHttp, StaleConnection
from dsr1kit.access.pool import Pool

PLAIN_HEADERS = {"Accept-Encoding": "identity", "User-Agent": "dsr1kit"}
_MOST_BYTES = 16 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Fetched:
    """A whole response.

    Attributes:
        headers: names lower-cased.
        connect_s: DNS, TCP, proxy and TLS; 0.0 on a reused connection.
        first_byte_s: request written to headers read.
        total_s: everything, connecting included.
    """

    status: int
    headers: dict[str, str]
    body: bytes
    connect_s: float
    first_byte_s: float
    total_s: float

    def json(self) -> Any:
        """The body as JSON; None where it is not."""
        try:
            return json.loads(self.body.decode("utf-8", "replace"))
        except (ValueError, RecursionError):
            return None


class _Whole(Exchange):
    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.done: asyncio.Future[None] = loop.create_future()
        self.status = 0
        self.headers: dict[str, str] = {}
        self.body = bytearray()
        self.first_at = 0.0

    def on_headers(self, status: int, headers: dict[str, str], at: float) -> None:
        self.status, self.headers, self.first_at = status, headers, at

    def on_body(self, data: bytes, at: float) -> None:
        if len(self.body) < _MOST_BYTES:
            self.body += data

    def on_end(self, at: float) -> None:
        if not self.done.done():
            self.done.set_result(None)

    def on_lost(self, at: float, error: Exception | None) -> None:
        if self.done.done():
            return
        if isinstance(error, StaleConnection):
            self.done.set_exception(error)
        elif isinstance(error, NotHttp):
            self.done.set_exception(OSError(f"the answer is not HTTP ({error})"))
        else:
            self.done.set_exception(OSError(f"the connection ended before the response did ({error or 'closed'})"))


async def fetch(
    pool: Pool,
    path: str,
    headers: dict[str, str] | None = None,
    *,
    timeout_s: float = 10.0,
    fresh: bool = False,
) -> Fetched:
    """GET `path` below the pool's base URL.

    Args:
        headers: beside the usual ones; names and values ASCII.
        timeout_s: for everything, in seconds.
        fresh: whether to open a new connection.

    Raises:
        OSError: no connection, no HTTP, or not whole within `timeout_s`.
    """
    loop = asyncio.get_running_loop()
    began = loop.time()
    request = pool.request("GET", path, {"Accept": "application/json", **PLAIN_HEADERS, **(headers or {})})
    exchange = _Whole(loop)
    connection = None
    try:
        async with asyncio.timeout(timeout_s):
            try:
                connection, connect_s = await pool.acquire(fresh=fresh)
                sent = loop.time()
                connection.send(request, exchange, pool.release)
                await exchange.done
            except StaleConnection:  # the server closed it while it was idle: once more, on a new one
                exchange = _Whole(loop)
                connection, connect_s = await pool.acquire(fresh=True)
                sent = loop.time()
                connection.send(request, exchange, pool.release)
                await exchange.done
    except TimeoutError:
        raise OSError(f"no whole response to GET {path} within {timeout_s:g} s") from None
    finally:
        if connection is not None:
            connection.drop(exchange)
    first_byte_s, total_s = exchange.first_at - sent, loop.time() - began
    return Fetched(exchange.status, exchange.headers, bytes(exchange.body), connect_s, first_byte_s, total_s)
