"""A small HTTP/1.1 client for measuring: reads are stamped as they arrive and parsed in short slices.

One asyncio protocol over httptools, with TLS, CONNECT proxies and a pool of kept-alive connections.
It speaks POST and GET with a body given whole, and hands the response on as it comes. Knows nothing
about Chat Completions, tokens or retries of anything but a connection that went stale while idle.

Why not aiohttp or httpx: at hundreds of streams their read paths delay the time stamps by tens of
milliseconds (benchmarks/latency_truth.py shows it beside this client).
"""

from __future__ import annotations

import asyncio
import base64
import errno
import os
import select
import socket
import ssl
import urllib.request
import zlib
from collections import deque
from collections.abc import Callable
from typing import Any
from urllib.parse import SplitResult, unquote, urlsplit

import httptools

_STALE_S = 2.0  # a connection closed while idle says so within a round trip of the next request
SLICE_S = 0.0005  # longest stretch of parsing before the loop may read sockets and run timers again
_READ_BYTES = 65536
_TURNS = 8  # connections to loopback that are opened at a time


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


class _Slicer:
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

    def __init__(self, loop: asyncio.AbstractEventLoop, slicer: _Slicer, buffer: bytearray) -> None:
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


class _Connect(Exchange):
    """The answer of a proxy to CONNECT."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.done: asyncio.Future[int] = loop.create_future()

    def on_headers(self, status: int, headers: dict[str, str], at: float) -> None:
        if not self.done.done():
            self.done.set_result(status)

    def on_lost(self, at: float, error: Exception | None) -> None:
        if not self.done.done():
            self.done.set_exception(error or ConnectionError("the proxy closed the connection"))


class ProxyError(OSError):
    """The proxy refused, or could not be reached."""


class Pool:
    """Connections to one origin: opened on demand, kept alive, handed out last-in first-out.

    Args:
        base_url: `http://` or `https://` URL whose host and port are connected to.
        proxy: `http://host:port`, or empty: then the environment's proxy variables count, except for
            loopback hosts and those that NO_PROXY names.
        connect_s: limit for DNS, TCP, proxy and TLS together, in seconds.
    """

    def __init__(self, base_url: str, *, proxy: str = "", connect_s: float = 10.0) -> None:
        self._loop = asyncio.get_running_loop()
        self._url = urlsplit(base_url)
        self._host = self._url.hostname or ""
        self._tls = self._url.scheme == "https"
        self._port = self._url.port or (443 if self._tls else 80)
        self._proxy = _proxy_for(self._url, proxy)
        self._connect_s = connect_s
        self._context = ssl.create_default_context() if self._tls else None
        self._slicer = _Slicer(self._loop)
        self._buffer = bytearray(_READ_BYTES)
        self._idle: list[Connection] = []
        self._turns = asyncio.Semaphore(_TURNS)
        self._closed = False

    @property
    def proxy(self) -> str:
        """The proxy in use as host:port, or an empty string."""
        return f"{self._proxy.hostname}:{self._proxy.port or 80}" if self._proxy else ""

    def request(self, method: str, path: str, headers: dict[str, str], body: bytes = b"") -> bytes:
        """The bytes of one request; `path` is appended to the base URL's own path."""
        default_port = 443 if self._tls else 80
        literal = f"[{self._host}]" if ":" in self._host else self._host
        host = literal if self._port == default_port else f"{literal}:{self._port}"
        target = self._url.path.rstrip("/") + path + (f"?{self._url.query}" if self._url.query else "")
        extra: dict[str, str] = {}
        if self._proxy and not self._tls:
            target = f"http://{host}{target}"
            extra = _proxy_login(self._proxy)
        lines = [f"{method} {target} HTTP/1.1", f"Host: {host}"]
        lines += [f"{k}: {v}" for k, v in (headers | extra).items()]
        if body or method == "POST":
            lines.append(f"Content-Length: {len(body)}")
        return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1") + body

    async def acquire(self, *, fresh: bool = False) -> tuple[Connection, float]:
        """A connection and the seconds it took to open (0.0 when reused; `connection.uses` > 0 tells).

        Raises:
            OSError: DNS, TCP, TLS or proxy failed, or took longer than `connect_s`.
        """
        while self._idle and not fresh:
            connection = self._idle.pop()
            if not connection.closed:
                return connection, 0.0
        started = self._loop.time()
        try:
            async with asyncio.timeout(self._connect_s):
                connection = await self._open()
        except TimeoutError:
            via = f" through the proxy {self.proxy}" if self._proxy else ""
            raise OSError(
                f"no connection to {self._host}:{self._port}{via} within {self._connect_s:g} s"
            ) from None
        return connection, self._loop.time() - started

    def release(self, connection: Connection, reusable: bool) -> None:
        """Take a connection back; it is closed unless it can carry another request."""
        if reusable and not self._closed:
            self._idle.append(connection)
        else:
            connection.abort()

    def close(self) -> None:
        """Close all idle connections; those in use close when their exchange ends."""
        self._closed = True
        while self._idle:
            self._idle.pop().abort()

    async def _open(self) -> Connection:
        if self._proxy is None and _is_loopback(self._host) and not self._tls:
            # Here opening is this process's own work: in turns, the average request is sent sooner.
            async with self._turns:
                sock = await _connected(self._loop, self._host, self._port)
                _, connection = await self._loop.create_connection(self._new, sock=sock)
            return connection
        if self._proxy is None:
            _, connection = await self._loop.create_connection(
                self._new, self._host, self._port, ssl=self._context,
                server_hostname=self._host if self._tls else None,
            )  # fmt: skip
            return connection
        try:
            _, connection = await self._loop.create_connection(
                self._new, self._proxy.hostname or "", self._proxy.port or 80
            )
        except OSError as error:
            raise ProxyError(f"the proxy {self.proxy} cannot be reached: {error}") from None
        if self._tls:
            await self._tunnel(connection)
        return connection

    def _new(self) -> Connection:
        return Connection(self._loop, self._slicer, self._buffer)

    async def _tunnel(self, connection: Connection) -> None:
        assert self._proxy is not None  # noqa: S101 - only called with a proxy
        assert self._context is not None  # noqa: S101 - only called for TLS
        target = f"{self._host}:{self._port}"
        login = "".join(f"{k}: {v}\r\n" for k, v in _proxy_login(self._proxy).items())
        exchange = _Connect(self._loop)
        connection.send(
            f"CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n{login}\r\n".encode("latin-1"),
            exchange,
            lambda *_: None,
        )
        try:
            status = await exchange.done
        except asyncio.CancelledError:
            connection.abort()
            raise
        except Exception as error:
            raise ProxyError(f"the proxy {self.proxy} broke off the CONNECT to {target}: {error}") from None
        if status != 200:
            connection.abort()
            raise ProxyError(f"the proxy {self.proxy} answered CONNECT {target} with status {status}")
        connection.detach()
        await connection.start_tls(self._context, self._host)


def _is_loopback(host: str) -> bool:
    return host.startswith("127.") and host.replace(".", "").isdigit()


async def _connected(loop: asyncio.AbstractEventLoop, host: str, port: int) -> socket.socket:
    """A connected socket; a listener on loopback is connected when connect() returns: this rarely waits."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        try:
            sock.connect((host, port))
        except BlockingIOError:
            _, ready, _ = select.select((), (sock,), (), 0)
            error = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) if ready else errno.EINPROGRESS
            if error == errno.EINPROGRESS:
                sock.close()
                sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
                sock.setblocking(False)
                await loop.sock_connect(sock, (host, port))
            elif error:
                raise OSError(error, os.strerror(error)) from None
    except BaseException:
        sock.close()
        raise
    return sock


def _proxy_for(url: SplitResult, proxy: str) -> SplitResult | None:
    host = url.hostname or ""
    if not proxy:
        if host in ("localhost", "::1") or host.startswith("127.") or urllib.request.proxy_bypass(host):
            return None
        proxy = urllib.request.getproxies().get(url.scheme, "")
    return urlsplit(proxy) if proxy else None


def _proxy_login(proxy: SplitResult) -> dict[str, str]:
    if not proxy.username:
        return {}
    pair = f"{unquote(proxy.username)}:{unquote(proxy.password or '')}"
    return {"Proxy-Authorization": "Basic " + base64.b64encode(pair.encode()).decode()}
