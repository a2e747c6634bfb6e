"""A small HTTP/1.1 client for measuring: reads are stamped as they arrive and parsed in short slices.

One asyncio protocol over httptools: writes a request given whole, hands the response on as it comes. Knows
nothing about Chat Completions or tokens, nor how a connection is opened, kept and reused (pool.py).

Why not aiohttp or httpx: at hundreds of streams their read paths delay the time stamps by tens of
milliseconds (benchmarks/latency_truth.py shows it beside this client).
"""

from __future__ import annotations

import asyncio
import ssl
import zlib
from collections import deque
from collections.abc import Callable
from typing import Any

import httptools

_STALE_S = 2.0  # a connection closed while idle says so within a round trip of the next request
SLICE_S = 0.0005  # longest stretch of parsing before the loop may read sockets and run timers again


class Exchange:
    """One request's response as it arrives; subclasses say what to do with it.

    Every method runs inside the parsing slice, with the loop time at which the bytes were read.

    Attributes:
        unparsed: whether a slice ended before everything that arrived was parsed.
        after: what to do when it has been; the end of a response waits there for its beginning.
    """

    unparsed = False
    after: Callable[[], None] | None = None

    def on_headers(self, status: int, headers: dict[str, str], at: float) -> None:
        """Status and headers (names lower-cased) are complete."""

    def on_body(self, data: bytes, at: float) -> None:
        """A piece of the body arrived."""

    def parse_some(self, until: float) -> bool:
        """Parse what is pending until the loop time `until`; True when some is left."""
        return False

    def on_end(self, at: float) -> None:
        """The response is complete."""

    def on_lost(self, at: float, error: Exception | None) -> None:
        """The connection ended before the response was complete."""


class StaleConnection(Exception):
    """A reused connection ended before the first byte of the response: the server had closed it."""


class NotHttp(Exception):
    """What came is not an HTTP response, or breaks off being one."""


class Slicer:
    """Runs the parsing of all connections of a client in slices, in order of arrival."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._reads: deque[tuple[Connection, float, bytes | None]] = deque()
        self._unfinished: deque[Exchange] = deque()
        self._scheduled = False

    def put(self, connection: Connection, at: float, data: bytes | None) -> None:
        self._reads.append((connection, at, data))
        self._schedule()

    def more(self, exchange: Exchange) -> None:
        exchange.unparsed = True
        self._unfinished.append(exchange)
        self._schedule()

    def _schedule(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._run)

    def _run(self) -> None:
        self._scheduled = False
        now = self._loop.time
        until = now() + SLICE_S
        # What was left over goes first: it arrived earlier.
        while self._unfinished:
            exchange = self._unfinished.popleft()
            if exchange.parse_some(until):
                self._unfinished.appendleft(exchange)
                break
            exchange.unparsed = False
            if exchange.after is not None:
                exchange.after()
        else:
            while self._reads:
                connection, at, data = self._reads.popleft()
                connection.consume(data, at, until)
                if self._unfinished or now() >= until:
                    break
        if self._reads or self._unfinished:
            self._schedule()


class Connection(asyncio.BufferedProtocol):
    """One TCP or TLS connection; carries one exchange at a time."""

    def __init__(self, loop: asyncio.AbstractEventLoop, slicer: Slicer, buffer: bytearray) -> None:
        self._now = loop.time
        self._slicer = slicer
        self._view = memoryview(buffer)
        self._transport: asyncio.Transport | None = None
        self._exchange: Exchange | None = None
        self._parser: Any = None
        self._headers: dict[str, str] = {}
        self._inflate: Any = None
        self._until_close = False
        self._started = False
        self._close_error: Exception | None = None
        self._at = 0.0
        self._until = 0.0
        self._sent_at = 0.0
        self.closed = False
        self.uses = 0
        self.on_idle: Callable[[Connection, bool], None] | None = None

    # What asyncio calls.
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]  # asyncio types it by its base class

    def get_buffer(self, sizehint: int) -> memoryview:
        # Shared: buffer_updated follows at once. A view: asyncio's TLS reads into slices of it, and a
        # bytearray's slices are copies.
        return self._view

    def buffer_updated(self, nbytes: int) -> None:
        self._slicer.put(self, self._now(), bytes(self._view[:nbytes]))

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True
        self._close_error = exc
        self._slicer.put(self, self._now(), None)

    # What the client calls.
    def send(self, request: bytes, exchange: Exchange, on_idle: Callable[[Connection, bool], None]) -> None:
        """Write a request; `exchange` gets the response, then `on_idle(connection, reusable)` is called."""
        assert self._transport is not None  # noqa: S101 - connections are handed out connected
        self._exchange, self.on_idle = exchange, on_idle
        self._parser = httptools.HttpResponseParser(self)
        self._headers, self._inflate = {}, None
        self._until_close = self._started = False
        self.uses += 1
        self._sent_at = self._now()
        self._transport.write(request)

    def detach(self) -> None:
        """Forget the exchange and count the connection as unused, after a proxy's CONNECT."""
        self._exchange, self.uses = None, 0

    def abort(self) -> None:
        """Close at once and tell nobody."""
        self._exchange = None
        self.closed = True
        if self._transport is not None:
            self._transport.abort()

    def drop(self, exchange: Exchange) -> None:
        """Close at once if it still carries `exchange`; it may carry another one by now."""
        if self._exchange is exchange:
            self.abort()

    async def start_tls(self, context: ssl.SSLContext, host: str) -> None:
        """Upgrade the connection, after a proxy's CONNECT."""
        loop = asyncio.get_running_loop()
        assert self._transport is not None  # noqa: S101 - see send
        upgraded = await loop.start_tls(self._transport, self, context, server_hostname=host)
        self._transport = upgraded

    def told(self, name: str) -> Any:
        """What the transport knows: `peercert`, `ssl_object`, `peername` (see asyncio's get_extra_info)."""
        return None if self._transport is None else self._transport.get_extra_info(name)

    # What the slicer calls.
    def consume(self, data: bytes | None, at: float, until: float) -> None:
        """Feed what was read (None: the end) to the HTTP parser and the exchange."""
        exchange = self._exchange
        if exchange is None:
            if data is not None:  # bytes nobody asked for: this connection cannot be trusted again
                self.abort()
            return
        self._at, self._until = at, until
        if data is None:
            self._lost(exchange, at)
            return
        self._started = True
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self._finish(False)
        except httptools.HttpParserError as error:
            if self._exchange is exchange:
                self._exchange = None
                self.abort()
                lost = NotHttp(str(error))
                _when_parsed(exchange, lambda: exchange.on_lost(at, lost))

    def _lost(self, exchange: Exchange, at: float) -> None:
        self._exchange = None
        if self._until_close and self._close_error is None:
            _when_parsed(exchange, lambda: exchange.on_end(at))
        elif not self._started and self.uses > 1 and at - self._sent_at < _STALE_S:
            exchange.on_lost(at, StaleConnection())
        else:
            error = self._close_error
            _when_parsed(exchange, lambda: exchange.on_lost(at, error))

    def _finish(self, reusable: bool) -> None:
        exchange, self._exchange = self._exchange, None
        on_idle, self.on_idle = self.on_idle, None
        if exchange is not None:
            at = self._at
            _when_parsed(exchange, lambda: exchange.on_end(at))
        if on_idle is not None:
            on_idle(self, reusable and not self.closed)

    # What httptools calls.
    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        if status < 200:
            return
        encoding = self._headers.get("content-encoding", "").lower()
        if encoding in ("gzip", "deflate"):  # asked for identity; some proxies compress all the same
            self._inflate = zlib.decompressobj(wbits=47 if encoding == "gzip" else zlib.MAX_WBITS)
        self._until_close = (
            "content-length" not in self._headers
            and "chunked" not in self._headers.get("transfer-encoding", "").lower()
            and status not in (204, 304)
        )
        if self._exchange is not None:
            self._exchange.on_headers(status, self._headers, self._at)

    def on_body(self, body: bytes) -> None:
        exchange = self._exchange
        if exchange is None:
            return
        if self._inflate is not None:
            try:
                body = self._inflate.decompress(body)
            except zlib.error:
                self._inflate = None
        exchange.on_body(body, self._at)
        if not exchange.unparsed and exchange.parse_some(self._until):
            self._slicer.more(exchange)

    def on_message_complete(self) -> None:
        if self._parser.get_status_code() < 200:  # 100 Continue, 103 Early Hints
            self._headers = {}
            return
        self._finish(self._parser.should_keep_alive() and not self._until_close)


def _when_parsed(exchange: Exchange, call: Callable[[], None]) -> None:
    if exchange.unparsed:
        exchange.after = call
    else:
        call()
