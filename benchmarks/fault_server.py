"""A loopback server whose paths are behaviours, in a process of its own: what the router's benchmark runs against.

`/MODE/v1/chat/completions` answers at once, or fails in the way MODE names. `GET /counts` tells and clears how
often each mode was asked.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import random
from collections import Counter
from contextlib import contextmanager
from typing import ClassVar

TEXT = "The answer is 42."


def _chunk(delta: dict[str, str], finish: str | None = None) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    body = {"id": "x", "object": "chat.completion.chunk", "model": "r1", "choices": [choice]}
    return b"data: " + json.dumps(body).encode() + b"\n\n"


THINK = _chunk({"reasoning_content": "12 + 30: tens 4, ones 2."})
SAY = _chunk({"content": TEXT})
STOP = _chunk({}, "stop") + b"data: [DONE]\n\n"
OPEN = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def chunked(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


SOUND = OPEN + chunked(THINK + SAY + STOP) + b"0\r\n\r\n"


def whole(status: str, body: bytes, *headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


BUSY = whole("503 Service Unavailable", b'{"error": {"message": "The server is busy."}}')
LIMITED = b'{"error": {"message": "Rate limit reached"}}'


class FaultServer(asyncio.Protocol):
    counts: ClassVar[Counter[str]] = Counter()
    rng = random.Random(1)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport, self.buffer = transport, b""

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        head, found, rest = self.buffer.partition(b"\r\n\r\n")
        if not found:
            return
        lengths = [int(h.split(b":")[1]) for h in head.split(b"\r\n") if h.lower().startswith(b"content-length")]
        if len(rest) < sum(lengths):
            return
        self.buffer = b""
        mode = head.split(b" ", 2)[1].decode().split("/")[1]
        if mode == "counts":
            self.transport.write(whole("200 OK", json.dumps(self.counts).encode()))
            self.counts.clear()
            return
        self.counts[mode] += 1
        getattr(self, mode.replace("-", "_"))()

    def later(self, delay_s: float, data: bytes, *, close: bool = False) -> None:
        def write() -> None:
            if not self.transport.is_closing():
                self.transport.write(data)
                if close:
                    self.transport.close()

        asyncio.get_running_loop().call_later(delay_s, write)

    # The behaviours.
    def sound(self) -> None:
        self.transport.write(SOUND)

    def always_429(self) -> None:
        self.transport.write(whole("429 Too Many Requests", LIMITED, "Retry-After: 2"))

    def fraction_429(self) -> None:
        self.transport.write(whole("429 Too Many Requests", LIMITED, "Retry-After: 0.2"))

    def always_503(self) -> None:
        self.transport.write(BUSY)

    def busy_40(self) -> None:
        self.transport.write(BUSY if self.rng.random() < 0.4 else SOUND)

    def hangs_5(self) -> None:
        if self.rng.random() < 0.05:
            self.later(10.0, SOUND)
        else:
            self.transport.write(SOUND)

    def queued(self) -> None:
        self.transport.write(OPEN)
        for n in range(1, 80):
            self.later(0.1 * n, chunked(b": keep-alive\n\n"))
        self.later(8.0, chunked(THINK + SAY + STOP) + b"0\r\n\r\n")

    def no_resource(self) -> None:
        end = _chunk({}, "insufficient_system_resource") + b"data: [DONE]\n\n"
        self.transport.write(OPEN + chunked(THINK + end) + b"0\r\n\r\n")

    def empty(self) -> None:
        self.transport.write(OPEN + chunked(STOP) + b"0\r\n\r\n")

    def html(self) -> None:
        self.transport.write(whole("200 OK", b"<!DOCTYPE html><title>busy</title>", "Content-Type: text/html"))

    def cut_thinking(self) -> None:
        self.transport.write(OPEN + chunked(THINK))
        self.transport.close()

    def error_event(self) -> None:
        error = b'data: {"error": {"message": "Provider returned error", "code": 502}}\n\n'
        self.transport.write(OPEN + chunked(THINK + error) + b"0\r\n\r\n")

    def stalled_answer(self) -> None:
        self.transport.write(OPEN + chunked(THINK + _chunk({"content": "The ans"})))


def serve(box: multiprocessing.connection.Connection) -> None:
    async def run() -> None:
        server = await asyncio.get_running_loop().create_server(FaultServer, "127.0.0.1", 0, backlog=1024)
        box.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(run())


@contextmanager
def running():
    """The server's address, for the length of the block."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=serve, args=(there,), daemon=True)
    process.start()
    try:
        yield f"http://127.0.0.1:{here.recv()}"
    finally:
        process.terminate()
        process.join()
