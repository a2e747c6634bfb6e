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
import json
import statistics
import sys
import time
from dataclasses import dataclass, field

from dsr1kit.emulator.scripted import Script, ScriptedServer

SCRIPT = Script()
FIRST_MS, GAP_MS, TOKENS, WAVES = SCRIPT.first_token_s * 1e3, SCRIPT.inter_token_s * 1e3, SCRIPT.tokens, 5


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


async def server_lateness_ms(server: ScriptedServer) -> float:
    late = await server.lateness()
    return statistics.fmean(told.first_s for told in late) * 1e3 if late else 0.0


async def main(streams: list[int], repeat: int) -> None:
    async with ScriptedServer(SCRIPT) as server:
        await measure(server, streams, repeat)


async def measure(server: ScriptedServer, streams: list[int], repeat: int) -> None:
    url = server.url
    await with_dsr1kit(url, 2)
    await with_aiohttp(url, 2)
    await server.lateness()
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
                measured.server_late_ms = await server_lateness_ms(server)
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


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", default="1,16,64,256", help="numbers of streams, separated by commas")
    parser.add_argument("--repeat", type=int, default=3, help="runs of each client at each number of streams")
    arguments = parser.parse_args()
    asyncio.run(main([int(n) for n in arguments.streams.split(",")], arguments.repeat))
