"""A real loopback server that plays scripts, so that the client is tested over sockets and not over mocks.

A script is a list of steps, played for one request: `(delay_s, bytes)` is written after the delay; CLOSE ends
the connection, RESET ends it with a TCP reset, HANG waits until the client goes away. A callable that takes
the Request and returns such a list does as well.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import socket
import ssl
import struct
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dsr1kit.access.channels import Channel

CLOSE, RESET, HANG = "close", "reset", "hang"
Step = tuple[float, bytes] | str


@dataclass
class Request:
    """One request as the server read it."""

    method: str
    target: str
    headers: dict[str, str]
    body: bytes
    connection: int
    at: float

    @property
    def json(self) -> Any:
        return json.loads(self.body)


Script = Sequence[Step] | Callable[[Request], Sequence[Step]]


def delta(finish: str | None = None, **fields: Any) -> bytes:
    """One streamed chunk as a server-sent event."""
    choice = {"index": 0, "delta": fields, "finish_reason": finish}
    return event({"model": "served-r1", "choices": [choice]})


def event(payload: Any) -> bytes:
    return b"data: " + json.dumps(payload, ensure_ascii=False).encode() + b"\n\n"


def usage(completion: int, reasoning: int | None = None, prompt: int = 7) -> bytes:
    """The usage event, with its empty `choices`."""
    counted: dict[str, Any] = {"prompt_tokens": prompt, "completion_tokens": completion}
    if reasoning is not None:
        counted["completion_tokens_details"] = {"reasoning_tokens": reasoning}
    return event({"model": "served-r1", "choices": [], "usage": counted})


DONE = b"data: [DONE]\n\n"
ROLE = delta(role="assistant", content="")
ANSWER = (
    ROLE
    + delta(reasoning_content="17 + 25 is 42.")
    + delta(content="The answer is 42.")
    + delta(finish="stop")
    + usage(9, 5)
    + DONE
)


def response(
    *steps: Step | bytes, status: int = 200, framing: str = "chunked", headers: dict[str, str] | None = None
) -> list[Step]:
    """A response whose body is the steps; bytes alone come at once. `framing`: chunked, length or close."""
    timed = [(0.0, step) if isinstance(step, bytes) else step for step in steps]
    lines = {"Content-Type": "text/event-stream", **(headers or {})}
    whole = not any(isinstance(step, str) for step in timed)
    if framing == "chunked":
        lines["Transfer-Encoding"] = "chunked"
    elif framing == "length":
        lines["Content-Length"] = str(sum(len(step[1]) for step in timed if not isinstance(step, str)))
    else:
        lines["Connection"] = "close"
    head = f"HTTP/1.1 {status} Scripted\r\n" + "".join(f"{k}: {v}\r\n" for k, v in lines.items()) + "\r\n"
    out: list[Step] = [(0.0, head.encode())]
    for step in timed:
        if framing == "chunked" and not isinstance(step, str) and step[1]:
            out.append((step[0], f"{len(step[1]):x}\r\n".encode() + step[1] + b"\r\n"))
        else:
            out.append(step)
    if framing == "chunked" and whole:
        out.append((0.0, b"0\r\n\r\n"))
    if framing == "close" and whole:
        out.append(CLOSE)
    return out


def refusal(status: int, message: str = "no", **headers: str) -> list[Step]:
    """An error response in OpenAI's shape."""
    body = json.dumps({"error": {"message": message}}).encode()
    return response(body, status=status, framing="length", headers=headers)


@dataclass
class Scripted:
    """The server: `async with Scripted(script, ...) as server`; the last script is played from then on."""

    scripts: Sequence[Script]
    tls: ssl.SSLContext | None = None
    close_after_response: bool = False
    requests: list[Request] = field(default_factory=list)
    connections: int = 0
    open_connections: int = 0
    gone: list[int] = field(default_factory=list)

    def __init__(self, *scripts: Script, tls: ssl.SSLContext | None = None, close_after_response: bool = False) -> None:
        self.scripts, self.tls, self.close_after_response = scripts, tls, close_after_response
        self.requests, self.gone = [], []
        self.connections = self.open_connections = 0

    async def __aenter__(self) -> Scripted:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self.tls)
        self.port = self._server.sockets[0].getsockname()[1]
        self._tasks: set[asyncio.Task[None]] = set()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def url(self) -> str:
        return f"{'https' if self.tls else 'http'}://127.0.0.1:{self.port}/v1"

    def channel(self, **fields: Any) -> Channel:
        return Channel(**{"name": "scripted", "base_urls": (self.url,), "model": "r1", **fields})

    async def until(self, condition: Callable[[], bool], within_s: float = 5.0) -> None:
        """Wait for what the server will have noticed soon."""
        async with asyncio.timeout(within_s):
            while not condition():  # noqa: ASYNC110 - what is waited for happens in many places
                await asyncio.sleep(0.002)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.connections += 1
        self.open_connections += 1
        number = self.connections
        try:
            while True:
                request = await _read_request(reader, number)
                self.requests.append(request)
                script = self.scripts[min(len(self.requests), len(self.scripts)) - 1]
                steps = script(request) if callable(script) else script
                if not await self._play(steps, reader, writer) or self.close_after_response:
                    break
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            self.open_connections -= 1
            self.gone.append(number)
            self._tasks.discard(task)
            with contextlib.suppress(Exception):
                writer.close()

    async def _play(self, steps: Sequence[Step], reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        for step in steps:
            if step == CLOSE:
                return False
            if step == RESET:
                reset(writer)
                return False
            if step == HANG:
                await reader.read(1)
                return False
            delay_s, data = step  # type: ignore[misc]  # strings are done with
            if delay_s:
                await asyncio.sleep(delay_s)
            writer.write(data)  # type: ignore[arg-type]  # likewise
            await writer.drain()
        return True


def reset(writer: asyncio.StreamWriter) -> None:
    """End a connection by RST."""
    sock = writer.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


async def _read_request(reader: asyncio.StreamReader, connection: int) -> Request:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    at = asyncio.get_running_loop().time()
    first, *lines = head.rstrip().split("\r\n")
    method, target, _ = first.split(" ")
    headers = {k.lower(): v for k, v in (line.split(": ", 1) for line in lines)}
    body = await reader.readexactly(int(headers.get("content-length", 0)))
    return Request(method, target, headers, body, connection, at)


class ConnectProxy:
    """A proxy that knows CONNECT alone; every tunnel leads to `to_port` on loopback, whatever was asked."""

    def __init__(self, to_port: int, status: int = 200) -> None:
        self.to_port, self.status = to_port, status
        self.asked: list[Request] = []

    async def __aenter__(self) -> ConnectProxy:
        self._tasks: set[asyncio.Task[None]] = set()
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            self.asked.append(await _read_request(reader, len(self.asked) + 1))
            writer.write(f"HTTP/1.1 {self.status} Proxy\r\n\r\n".encode())
            await writer.drain()
            if self.status == 200:
                to_reader, to_writer = await asyncio.open_connection("127.0.0.1", self.to_port)
                await asyncio.gather(_copy(reader, to_writer), _copy(to_reader, writer))
        writer.close()
        self._tasks.discard(task)


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()
    writer.close()


def certificate(folder: Path) -> tuple[ssl.SSLContext, Path] | None:
    """A server context with a self-signed certificate, and the certificate's file; None: no openssl."""
    openssl = shutil.which("openssl")
    if openssl is None:
        return None
    cert, key = folder / "cert.pem", folder / "key.pem"
    subprocess.run(
        [openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
         "-days", "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1,DNS:r1.example",
         "-keyout", str(key), "-out", str(cert)],
        check=True, capture_output=True, timeout=30,
    )  # fmt: skip
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    return context, cert


def free_port() -> int:
    """A port on which nothing listens."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])
