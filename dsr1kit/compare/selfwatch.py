"""The client watches itself: its own bias before a run, its lateness during one, and whether it was the limit.

A measured time holds what the far side took and what the measuring machine added. This room measures the second
on a scripted server, and while a run goes by how late the event loop wakes. Knows nothing about tasks or files.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import count
from types import TracebackType
from typing import Any, Self

import numpy as np

from dsr1kit.access.channels import Channel
from dsr1kit.compare.load import InFlight
from dsr1kit.emulator.scripted import NUMBERED, Script, ScriptedServer
from dsr1kit.errors import RunError
from dsr1kit.records import ANSWERED, Reply

#: Above this share of one core a loop's queue grows faster than its work: at 0.85 an event waits six times as long
#: as it takes to handle, on average.
MOST_CPU_SHARE = 0.85
#: What the client may add to a first token at the 99th percentile: a tenth of it ...
MOST_LATE_SHARE = 0.1
#: ... but no less than timers and the scheduler add on a machine at rest, and no more than a reader would notice.
LEAST_LATE_MS, MOST_LATE_MS = 5.0, 100.0
#: A closed loop that holds fewer than this share of what was asked of it begins its requests too slowly.
LEAST_IN_FLIGHT = 0.9

_EVERY_S = 0.02  # to wake a loop at rest takes up to 0.1 ms of CPU: half a percent of a core, and less under load
_BINS_A_MS, _BINS = 10, 10_000
_MOST_STREAMS = 512  # beyond it the measurement is of the scripted server, and of how many files may be open
_FEW_STREAMS = 8


@dataclass(frozen=True, slots=True)
class ClientBias:
    """What this machine's client adds to what it measures, the server's own lateness taken off.

    Attributes:
        streams, requests: how many at a time, and how many in all.
        first_token_ms, first_token_p99_ms: mean and 99th percentile added to the first token; connecting included.
        inter_token_share: added to the time between tokens, as a share of it.
        cpu_ms_per_request: this process's CPU for one request.
    """

    streams: int
    requests: int
    first_token_ms: float
    first_token_p99_ms: float
    inter_token_share: float
    cpu_ms_per_request: float


async def measure_client(concurrency: int, *, seconds: float = 2.5) -> ClientBias:
    """Ask a scripted server on this machine over `concurrency` streams for about `seconds`.

    The streams begin spread over the length of one answer, as those of a run do whose answers differ in length.

    Raises:
        RunError: the server did not start, or answered nothing.
    """
    streams = max(1, min(concurrency, _MOST_STREAMS))
    # Few streams ask often, to give a mean; many ask for longer answers, or connects would be all there is.
    script = Script(tokens=16 if streams <= _FEW_STREAMS else 64)
    length_s = script.first_token_s + script.inter_token_s * (script.tokens - 1)
    loop = asyncio.get_running_loop()
    numbers = count()
    replies: dict[int, Reply] = {}
    async with ScriptedServer(script) as server:
        channel = Channel(name="scripted", base_urls=(server.url,), model="scripted", emulated=True)
        async with channel.open(first_token_s=10.0, stall_s=10.0) as client:

            async def ask() -> tuple[int, Reply]:
                number = next(numbers)
                return number, await client.ask([{"role": "user", "content": NUMBERED.format(number)}])

            async def stream(place: int, until: float) -> None:
                await asyncio.sleep(length_s * place / streams)
                while True:
                    number, reply = await ask()
                    replies[number] = reply
                    if loop.time() + length_s > until:
                        return

            await asyncio.gather(*(ask() for _ in range(min(2, streams))))  # what a process does once is no bias
            cpu = time.process_time()
            await asyncio.gather(*(stream(place, loop.time() + seconds) for place in range(streams)))
            cpu = time.process_time() - cpu
        late = {told.number: told for told in await server.lateness()}
    added_ms, gaps = [], []
    for number, reply in replies.items():
        first_s, gap_s = reply.timing.first_token_s, reply.timing.inter_token_s or 0.0  # none: all was read at once
        if reply.outcome in ANSWERED and number in late and first_s is not None:
            told = late[number]
            added_ms.append((first_s - script.first_token_s - told.first_s) * 1e3)
            gaps.append(gap_s - (told.last_s - told.first_s) / (script.tokens - 1))
    if not added_ms:
        why = next((reply.detail for reply in replies.values()), "no request was sent")
        raise RunError(f"the client could not be measured: the scripted server on this machine gave no answer ({why})")
    return ClientBias(
        streams=streams,
        requests=len(added_ms),
        first_token_ms=round(statistics.fmean(added_ms), 3),
        first_token_p99_ms=round(float(np.percentile(added_ms, 99)), 3),
        inter_token_share=round(statistics.fmean(gaps) / script.inter_token_s - 1, 5),
        cpu_ms_per_request=round(cpu * 1e3 / len(replies), 3),
    )


class LoopWatch:
    """How late the event loop wakes while a block runs: `async with LoopWatch() as watch`.

    A timer is due every 20 ms; each one that a busy loop missed counts with its own lateness. What it finds is kept
    in a fixed number of bins of 0.1 ms, for however long the block runs.
    """

    def __init__(self) -> None:
        self._counts = [0] * (_BINS + 1)
        self._most_ms = 0.0
        self._seconds = self._cpu_s = 0.0

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        self._begun, self._cpu_begun = self._loop.time(), time.process_time()
        self._due = self._begun + _EVERY_S
        self._timer = self._loop.call_at(self._due, self._tick)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._timer.cancel()
        self._count(self._loop.time())  # a block that ends in a busy stretch
        self._seconds = self._loop.time() - self._begun
        self._cpu_s = time.process_time() - self._cpu_begun

    def _tick(self) -> None:
        self._count(self._loop.time())
        self._timer = self._loop.call_at(self._due, self._tick)

    def _count(self, now: float) -> None:
        while self._due <= now:
            late_ms = (now - self._due) * 1e3
            self._counts[min(_BINS, int(late_ms * _BINS_A_MS))] += 1
            self._most_ms = max(self._most_ms, late_ms)
            self._due += _EVERY_S

    def lag_ms(self) -> dict[str, float]:
        """How late it woke, in ms: `p50`, `p99` and `max`; all 0 where the block was too short to tell."""
        return {"p50": self._percentile(0.5), "p99": self._percentile(0.99), "max": round(self._most_ms, 1)}

    def _percentile(self, q: float) -> float:
        wanted, most = q * sum(self._counts), round(self._most_ms, 1)
        for place, passed in enumerate(_running(self._counts)):
            if passed >= wanted and passed:
                # Beyond the last bin only the latest is known.
                return most if place == _BINS else min(round((place + 1) / _BINS_A_MS, 1), most)
        return 0.0

    @property
    def cpu_share(self) -> float:
        """Share of one core that this process used; known when the block has ended."""
        return self._cpu_s / self._seconds if self._seconds > 0 else 0.0


def _running(counts: Sequence[int]) -> Iterator[int]:
    total = 0
    for value in counts:
        total += value
        yield total


def client_note(
    bias: ClientBias | None,
    watch: LoopWatch,
    in_flight: InFlight,
    *,
    asked: int | None,
    queue_s: Sequence[float],
    first_token_s: Sequence[float],
) -> dict[str, Any]:
    """How the client did in one start of a run, as run.json holds it.

    Args:
        bias: measured before; None: it was not.
        watch: over the hosted part, ended.
        asked: streams of a closed loop; None: an open loop.
        queue_s: due to sent of each request, in seconds.
        first_token_s: of each request that was answered, in seconds.
    """
    late = [1e3 * q for q in queue_s]
    note: dict[str, Any] = {
        "bias": None if bias is None else asdict(bias),
        "lag_ms": watch.lag_ms(),
        "in_flight": {"asked": asked, "mean": round(in_flight.mean(), 2), "peak": in_flight.peak()},
        "cpu_share": round(watch.cpu_share, 3),
        "late_ms": {f"p{q}": round(float(np.percentile(late, q)), 2) if late else 0.0 for q in (50, 99)},
    }
    first_token_ms = 1e3 * statistics.median(first_token_s) if first_token_s else None
    return note | {"limited": client_verdict(note, first_token_ms=first_token_ms)}


def client_verdict(note: Mapping[str, Any], *, first_token_ms: float | None) -> str:
    """A sentence where the client, and not the far side, was the limit; empty where it was not.

    Args:
        note: `cpu_share`, `lag_ms`, `in_flight` and `late_ms`, as `client_note` has them.
        first_token_ms: the median time to the first token, in ms; None: no token came.
    """
    allowed_ms = MOST_LATE_MS
    if first_token_ms is not None:
        allowed_ms = min(MOST_LATE_MS, max(LEAST_LATE_MS, MOST_LATE_SHARE * first_token_ms))
    cpu_share, lag_ms, late_ms = note["cpu_share"], note["lag_ms"]["p99"], note["late_ms"]["p99"]
    asked, mean = note["in_flight"]["asked"], note["in_flight"]["mean"]
    full, lags = cpu_share > MOST_CPU_SHARE, lag_ms > allowed_ms
    short = asked is not None and mean < LEAST_IN_FLIGHT * asked
    if full or lags or short:
        facts = [f"its process used {cpu_share:.0%} of one core" + (f" (over {MOST_CPU_SHARE:.0%})" if full else "")]
        if lags:
            facts.append(f"its event loop woke {lag_ms:.1f} ms late at the 99th percentile (over {allowed_ms:.0f} ms)")
        if short:
            facts.append(f"it held {mean:.1f} requests in flight of the {asked} it was asked to")
        if lags and not full:
            mend = "something else kept this machine busy, or a computation held the event loop: ask from another one"
        else:
            mend = "ask with fewer streams or at a lower rate, from two processes, or from another machine"
        return f"the client was the limit, so that times include its own waiting: {', '.join(facts)}; {mend}"
    if late_ms > allowed_ms:
        return (
            f"requests were sent {late_ms:.0f} ms after they were due at the 99th percentile (over {allowed_ms:.0f} "
            "ms), held back by the channel's own limits (requests_per_minute, tokens_per_minute or max_in_flight "
            "in the catalogue): raise them, or ask at a lower rate"
        )
    return ""
