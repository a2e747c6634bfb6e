"""A provider that is exact, in a process of its own: the yardstick against which clients are measured.

Every request gets the same answer: the first token after a set time, then one each set time. It stamps how late
it was itself, so that its own lateness can be taken off request by request. Knows no weather and no model.

    python -m dsr1kit.emulator.scripted [--first-token-s 0.05] [--inter-token-s 0.01] [--tokens 64]

The first line of output is {"url": ...}; it ends when its standard input does.
"""

from __future__ import annotations

import argparse
import asyncio
import heapq
import json
import os
import re
import sys
import time
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import NamedTuple, Self

from dsr1kit.access.fetch import fetch
from dsr1kit.access.pool import Pool
from dsr1kit.errors import RunError
from dsr1kit.local.hardware import usable_cores

_START_S = 30.0
#: By this a question says its number, so that lateness can be matched to the request that met it.
NUMBERED = "Request {}: what is 12 + 30?"
_NUMBER = re.compile(rb"Request (\d+):")


@dataclass(frozen=True, slots=True)
class Script:
    """The one answer: seconds from a request read to the first token, from token to token, and how many."""

    first_token_s: float = 0.05
    inter_token_s: float = 0.01
    tokens: int = 64


class Late(NamedTuple):
    """How late the server wrote the first and the last token of one answer, in seconds; -1: a question unnumbered."""

    number: int
    first_s: float
    last_s: float


class ScriptedServer:
    """The server in a process of its own: `async with ScriptedServer(script) as server`, which serves `server.url`.

    Raises (on entering):
        RunError: its process did not start.
    """

    def __init__(self, script: Script | None = None) -> None:
        self.script = script or Script()
        self.url = ""
        self._process: asyncio.subprocess.Process | None = None

    async def __aenter__(self) -> Self:
        options = [f"--{name.replace('_', '-')}={value}" for name, value in asdict(self.script).items()]
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "dsr1kit.emulator.scripted", *options),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is for who started it; the server ends with its standard input
        )
        assert self._process.stdout is not None  # noqa: S101 - asked for above
        try:
            async with asyncio.timeout(_START_S):
                self.url = json.loads(await self._process.stdout.readline())["url"]
        except (TimeoutError, ValueError):
            await self._stop()
            raise RunError(
                f"the scripted server that measures the client did not start ({sys.executable} -m "
                "dsr1kit.emulator.scripted); run that command by hand to see why"
            ) from None
        except BaseException:
            await self._stop()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stop()

    async def lateness(self) -> list[Late]:
        """How late each answer was since the last call, in the order in which they ended.

        Raises:
            OSError: the server is gone.
        """
        pool = Pool(self.url)
        try:
            told = await fetch(pool, "/lateness")
        finally:
            pool.close()
        return [Late(*row) for row in told.json()]

    async def _stop(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            if process.returncode is None:
                process.kill()  # it has nothing to put in order
            await process.communicate()


class _Pacer:
    """What all connections share: one heap of tokens to write, and the loop that writes them."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.late: list[Late] = []
        self._heap: list[tuple[float, int, _Answer]] = []
        self._counter = 0
        # Polling needs a core of its own: on a single one it would only be in the client's way.
        self._poll = usable_cores() > 1
        self.head = (
            b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n"
            b"Cache-Control: no-cache\r\nx-dsr1kit-emulated: scripted\r\n\r\n"
            + _event(_chunk({"role": "assistant", "content": ""}))
        )
        self.token = _event(_chunk({"content": "token "}))
        tokens = {"prompt_tokens": 9, "completion_tokens": script.tokens, "total_tokens": script.tokens + 9}
        self.last = (
            _event(_chunk({"content": "\\boxed{42}"}))
            + _event(_chunk({}, "stop"))
            + _event({"choices": [], "usage": tokens})
            + b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"
        )

    def begin(self, transport: asyncio.WriteTransport, number: int, at: float) -> None:
        transport.write(self.head)
        self._counter += 1
        heapq.heappush(self._heap, (at + self.script.first_token_s, self._counter, _Answer(transport, number)))

    async def pace(self) -> None:
        script, heap = self.script, self._heap
        while True:
            now = time.monotonic()
            while heap and heap[0][0] <= now:
                due, order, answer = heapq.heappop(heap)
                if answer.transport.is_closing():
                    continue
                answer.sent += 1
                late_s = time.monotonic() - due
                if answer.sent == 1:
                    answer.first_late_s = late_s
                if answer.sent < script.tokens:
                    answer.transport.write(self.token)
                    heapq.heappush(heap, (due + script.inter_token_s, order, answer))
                else:
                    answer.transport.write(self.last)
                    self.late.append(Late(answer.number, answer.first_late_s, late_s))
            # The selector sleeps in whole milliseconds: near a due write the loop is polled instead.
            wait = heap[0][0] - time.monotonic() if heap else 0.005
            await asyncio.sleep(0.0 if self._poll and wait < 0.002 else max(0.0, min(0.005, wait - 0.0015)))


@dataclass(eq=False, slots=True)
class _Answer:
    transport: asyncio.WriteTransport
    number: int
    sent: int = 0
    first_late_s: float = 0.0


class _Connection(asyncio.Protocol):
    def __init__(self, pacer: _Pacer) -> None:
        self._pacer = pacer
        self._buffer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.WriteTransport)  # noqa: S101 - a TCP connection's is
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        now = time.monotonic()
        self._buffer += data
        head, _, body = self._buffer.partition(b"\r\n\r\n")
        lines = (line.lower() for line in head.split(b"\r\n"))
        length = next((int(line[15:]) for line in lines if line.startswith(b"content-length:")), 0)
        if not self._buffer.partition(b"\r\n\r\n")[1] or len(body) < length:
            return
        self._buffer = b""
        if head.startswith(b"GET"):
            told = json.dumps(self._pacer.late).encode()
            self._pacer.late.clear()
            self._transport.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(told) + told)
            return
        number = _NUMBER.search(body)
        self._pacer.begin(self._transport, int(number[1]) if number else -1, now)


def _event(payload: dict[str, object]) -> bytes:
    line = b"data: " + json.dumps(payload).encode() + b"\n\n"
    return f"{len(line):x}\r\n".encode() + line + b"\r\n"


def _chunk(delta: dict[str, str], finish: str | None = None) -> dict[str, object]:
    return {
        "id": "chatcmpl-0123456789abcdef",
        "object": "chat.completion.chunk",
        "created": 1790000000,
        "model": "scripted",
        "choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}],
    }


async def _serve(script: Script) -> None:
    loop = asyncio.get_running_loop()
    pacer = _Pacer(script)
    server = await loop.create_server(lambda: _Connection(pacer), "127.0.0.1", 0, backlog=1024)
    print(json.dumps({"url": f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"}), flush=True)
    pacing = asyncio.create_task(pacer.pace())
    stdin = sys.stdin.fileno()
    # Its end closes this pipe, however it ends; a server must not outlive who started it.
    loop.add_reader(stdin, lambda: None if os.read(stdin, 64) else pacing.cancel())
    await asyncio.wait([pacing])


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    usual = Script()
    parser.add_argument("--first-token-s", type=float, default=usual.first_token_s)
    parser.add_argument("--inter-token-s", type=float, default=usual.inter_token_s)
    parser.add_argument("--tokens", type=int, default=usual.tokens)
    asyncio.run(_serve(Script(**vars(parser.parse_args()))))


if __name__ == "__main__":
    _main()
