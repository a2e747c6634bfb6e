"""Connections of the measuring client: opened directly or through a proxy, with TLS, kept alive and reused.

Knows nothing about what is sent over them.
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
from urllib.parse import SplitResult, unquote, urlsplit

from dsr1kit.access.http import Connection, Exchange, Slicer

_READ_BYTES = 65536
_TURNS = 8  # connections to loopback that are opened at a time


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
        proxy: `http://host:port`, `https://host:port` (TLS to the proxy itself), or empty: then the
            environment's proxy variables count, except for loopback hosts and those that NO_PROXY names.
        connect_s: limit for DNS, TCP, proxy and TLS together, in seconds.
    """

    def __init__(self, base_url: str, *, proxy: str = "", connect_s: float = 10.0) -> None:
        self._loop = asyncio.get_running_loop()
        self.base_url = base_url
        self._url = urlsplit(base_url)
        self._host = self._url.hostname or ""
        self._tls = self._url.scheme == "https"
        self._port = _port_of(self._url)
        self._proxy = _proxy_for(self._url, proxy)
        self._connect_s = connect_s
        self._context = ssl.create_default_context() if self._tls else None
        self._slicer = Slicer(self._loop)
        self._buffer = bytearray(_READ_BYTES)
        self._idle: list[Connection] = []
        self._turns = asyncio.Semaphore(_TURNS)
        self._closed = False

    @property
    def proxy(self) -> str:
        """The proxy in use as host:port, or an empty string."""
        return f"{self._proxy.hostname}:{_port_of(self._proxy)}" if self._proxy else ""

    @property
    def tls(self) -> bool:
        """Whether the origin is spoken to over TLS."""
        return self._tls

    @property
    def door(self) -> tuple[str, int]:
        """Host and port of the first TCP connection: the proxy's where there is one, else the origin's."""
        if self._proxy is not None:
            return self._proxy.hostname or "", _port_of(self._proxy)
        return self._host, self._port

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
            raise OSError(f"no connection to {self._host}:{self._port}{via} within {self._connect_s:g} s") from None
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
        secured = ssl.create_default_context() if self._proxy.scheme == "https" else None
        try:
            _, connection = await self._loop.create_connection(
                self._new, self._proxy.hostname or "", _port_of(self._proxy), ssl=secured
            )
        except (OSError, UnicodeError) as error:  # UnicodeError: a label that no host name can have
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
        broken = f"the proxy {self.proxy} broke off the connection to {target}"
        try:
            await connection.start_tls(self._context, self._host)
        except TypeError as error:  # Python 3.11 stumbles over a failed handshake of TLS within TLS
            cause = error.__context__
            raise cause if isinstance(cause, OSError) else ProxyError(broken) from None
        if connection.told("ssl_object") is None:  # closed in the handshake, which asyncio does not always raise
            connection.abort()
            raise ProxyError(broken)


def _port_of(url: SplitResult) -> int:
    return url.port or (443 if url.scheme == "https" else 80)


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
