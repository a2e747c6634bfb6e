"""How far off are the client's clocks? Its bias against a scripted server, bare aiohttp beside it.

The server runs in another process and writes the first token FIRST_MS after it has read a request, then one
every GAP_MS. Each of N streams asks five times, connects of the first wave included. Printed: mean
first-token and inter-token times less the script's own, the 99th percentile, and CPU per request.

The server stamps every first token with the moment it really wrote it, so its own lateness is shown apart
(`server`): what is left belongs to the client and the kernel.

    python benchmarks/latency_truth.py [--streams 1,16,64,256] [--repeat 3]
"""

from __future__ import annotations

import argparse
import asyncio
import heapq
import json
import multiprocessing
import statistics
import sys
import time
from dataclasses import dataclass, field

FIRST_MS, GAP_MS, TOKENS, WAVES = 50.0, 10.0, 64, 5


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


HEAD = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n"
    b"Cache-Control: no-cache\r\n\r\n" + _event(_chunk({"role": "assistant", "content": ""}))
)
TOKEN = _event(_chunk({"content": "token "}))
LAST = (
    _event(_chunk({}, "stop"))
    + _event(
        {
            "choices": [],
            "usage": {"prompt_tokens": 9, "completion_tokens": TOKENS, "total_tokens": TOKENS + 9},
        }
    )
    + b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"
)


class ScriptedServer(asyncio.Protocol):
    """One connection of the scripted server; all connections share one heap of things to write."""

    heap: list[tuple[float, int, int, ScriptedServer]] = []  # noqa: RUF012 - one server a process
    counter = 0
    late: list[float] = []  # noqa: RUF012 - see above

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self.buffer = b""

    def data_received(self, data: bytes) -> None:
        now = time.monotonic()
        self.buffer += data
        head, _, rest = self.buffer.partition(b"\r\n\r\n")
        length = next(
            (int(h.split(b":")[1]) for h in head.split(b"\r\n") if h.lower().startswith(b"content-length")), 0
        )
        if len(rest) < length:
            return
        self.buffer = b""
        if head.startswith(b"GET"):
            body = json.dumps(ScriptedServer.late).encode()
            ScriptedServer.late.clear()
            self.transport.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
            return
        self.transport.write(HEAD)
        ScriptedServer.counter += 1
        heapq.heappush(self.heap, (now + FIRST_MS / 1e3, ScriptedServer.counter, 0, self))

    @classmethod
    async def pace(cls) -> None:
        while True:
            now = time.monotonic()
            while cls.heap and cls.heap[0][0] <= now:
                due, number, sent, connection = heapq.heappop(cls.heap)
                if connection.transport.is_closing():
                    continue
                if sent == 0:
                    cls.late.append(time.monotonic() - due)
                connection.transport.write(TOKEN if sent < TOKENS - 1 else TOKEN + LAST)
                if sent < TOKENS - 1:
                    heapq.heappush(cls.heap, (due + GAP_MS / 1e3, number, sent + 1, connection))
            # The selector sleeps in whole milliseconds: near a due write the loop is polled instead.
            wait = cls.heap[0][0] - time.monotonic() if cls.heap else 0.005
            await asyncio.sleep(0.0 if wait < 0.002 else min(0.005, wait - 0.0015))


def serve(port_box: multiprocessing.connection.Connection) -> None:
    async def main() -> None:
        server = await asyncio.get_running_loop().create_server(ScriptedServer, "127.0.0.1", 0, backlog=1024)
        port_box.send(server.sockets[0].getsockname()[1])
        await ScriptedServer.pace()

    asyncio.run(main())


@dataclass
class Measured:
    first_ms: list[float] = field(default_factory=list)
    gap_ms: list[float] = field(default_factory=list)
    server_late_ms: float = 0.0
    cpu_ms: float = 0.0


MESSAGES = [{"role": "user", "content": "What is 12 + 30?"}]


async def with_dsr1kit(url: str, streams: int) -> Measured:
    from dsr1kit.access.channels import Channel

    out = Measured()
    channel = Channel(name="scripted", base_urls=(url,), model="scripted")
    async with channel.open() as r1:

        async def stream() -> None:
            for _ in range(WAVES):
                reply = (await r1.ask(MESSAGES)).raise_for_outcome()
                out.first_ms.append(reply.timing.first_token_s * 1e3)
                out.gap_ms.append(reply.timing.inter_token_s * 1e3)

        cpu = time.process_time()
        await asyncio.gather(*(stream() for _ in range(streams)))
        out.cpu_ms = (time.process_time() - cpu) * 1e3 / (streams * WAVES)
    return out


async def with_aiohttp(url: str, streams: int) -> Measured:
    import aiohttp

    out = Measured()
    body = {
        "model": "scripted",
        "messages": MESSAGES,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def stream() -> None:
            for _ in range(WAVES):
                start = time.monotonic()
                first = last = None
                text = []
                async with session.post(f"{url}/chat/completions", json=body) as response:
                    async for line in response.content:
                        if not line.startswith(b"data: {"):
                            continue
                        choices = json.loads(line[6:])["choices"]
                        if choices and (piece := choices[0]["delta"].get("content")):
                            last = time.monotonic()
                            first = first or last
                            text.append(piece)
                assert len(text) == TOKENS
                out.first_ms.append((first - start) * 1e3)
                out.gap_ms.append((last - first) * 1e3 / (TOKENS - 1))

        cpu = time.process_time()
        await asyncio.gather(*(stream() for _ in range(streams)))
        out.cpu_ms = (time.process_time() - cpu) * 1e3 / (streams * WAVES)
    return out


async def server_lateness_ms(url: str) -> float:
    import aiohttp

    async with aiohttp.ClientSession() as session, session.get(url) as response:
        late = json.loads(await response.text())
    return statistics.fmean(late) * 1e3 if late else 0.0


async def main(streams: list[int], repeat: int) -> None:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=serve, args=(there,), daemon=True)
    process.start()
    url = f"http://127.0.0.1:{here.recv()}/v1"
    await with_dsr1kit(url, 2)
    await with_aiohttp(url, 2)
    await server_lateness_ms(url)
    print(f"script: first token at {FIRST_MS:g} ms, then every {GAP_MS:g} ms, {TOKENS} tokens; "
          f"{WAVES} requests a stream; medians of {repeat} runs, in turn; "
          f"Python {sys.version.split()[0]}")  # fmt: skip
    print(f"{'streams':>7}  {'client':<8} {'first token bias':>16} {'p99':>8} {'server':>8} "
          f"{'inter-token bias':>16} {'CPU/request':>12} {'CPU ratio':>9}")  # fmt: skip
    for n in streams:
        runs: dict[str, list[Measured]] = {"dsr1kit": [], "aiohttp": []}
        for _ in range(repeat):
            for name, ask in (("dsr1kit", with_dsr1kit), ("aiohttp", with_aiohttp)):
                measured = await ask(url, n)
                measured.server_late_ms = await server_lateness_ms(url)
                runs[name].append(measured)
        cpu_peer = statistics.median(m.cpu_ms for m in runs["aiohttp"])
        for name, measured_runs in runs.items():
            first = statistics.median(statistics.fmean(m.first_ms) for m in measured_runs) - FIRST_MS
            p99 = (
                statistics.median(sorted(m.first_ms)[int(len(m.first_ms) * 0.99) - 1] for m in measured_runs) - FIRST_MS
            )
            late = statistics.median(m.server_late_ms for m in measured_runs)
            gap = statistics.median(statistics.fmean(m.gap_ms) for m in measured_runs) / GAP_MS - 1
            cpu = statistics.median(m.cpu_ms for m in measured_runs)
            print(f"{n:>7}  {name:<8} {first:>+13.2f} ms {p99:>+5.1f} ms {late:>+5.2f} ms "
                  f"{gap:>+15.2%} {cpu:>9.2f} ms {cpu / cpu_peer:>9.2f}")  # fmt: skip
    process.terminate()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", default="1,16,64,256", help="numbers of streams, separated by commas")
    parser.add_argument("--repeat", type=int, default=3, help="runs of each client at each number of streams")
    arguments = parser.parse_args()
    asyncio.run(main([int(n) for n in arguments.streams.split(",")], arguments.repeat))
