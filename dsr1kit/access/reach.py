"""Which of a channel's addresses is the nearest, by measured connect and first-byte time; why one is not there.

Knows nothing about questions or answers.
"""

from __future__ import annotations

import asyncio
import math
import socket
import ssl
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from dsr1kit.access.fetch import fetch
from dsr1kit.access.pool import Pool, ProxyError

_ROUNDS = 3
_TIMEOUT_S = 5.0


class Reach(NamedTuple):
    """How far an address is.

    Attributes:
        connect_s: DNS, TCP, proxy and TLS on a new connection; the median of a few, in seconds.
        first_byte_s: request to response headers, likewise.
        trouble: why it cannot be reached; empty: it can.
    """

    base_url: str
    connect_s: float | None = None
    first_byte_s: float | None = None
    trouble: str = ""

    @property
    def distance_s(self) -> float:
        """Connecting and the first byte together; infinite where it cannot be reached."""
        if self.connect_s is None or self.first_byte_s is None:
            return math.inf
        return self.connect_s + self.first_byte_s


async def measure(pool: Pool, headers: Mapping[str, str], *, rounds: int = _ROUNDS) -> Reach:
    """Connect anew and ask for the model list, `rounds` times; any answer counts, also a refusal."""
    times = []
    for _ in range(rounds):
        try:
            done = await fetch(pool, "/models", dict(headers), timeout_s=_TIMEOUT_S, fresh=True)
        except (OSError, UnicodeError) as error:
            return Reach(pool.base_url, trouble=why_unreachable(pool, error))
        times.append((done.connect_s, done.first_byte_s))
    connect, first = (statistics.median(column) for column in zip(*times, strict=True))
    return Reach(pool.base_url, connect, first)


async def by_nearness(pools: Sequence[Pool], headers: Mapping[str, str]) -> tuple[list[Reach], list[Pool]]:
    """All addresses measured, and the pools in order of distance; those that cannot be reached come last."""
    reaches = await asyncio.gather(*(measure(pool, headers) for pool in pools))
    order = sorted(zip(reaches, pools, strict=True), key=lambda pair: pair[0].distance_s)
    return [reach for reach, _ in order], [pool for _, pool in order]


def why_unreachable(pool: Pool, error: Exception) -> str:
    """One clause: which address, and what stands in the way."""
    where = pool.base_url
    if isinstance(error, ProxyError):
        return f"{where}: {error}"
    if isinstance(error, socket.gaierror | UnicodeError):
        why = error.strerror if isinstance(error, OSError) else error
        return f"the name in {where} cannot be resolved ({why})"
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the certificate of {where} is not trusted ({error.verify_message})"
    if isinstance(error, ssl.SSLError) and error.reason in ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE"):
        return f"{where}: no TLS is spoken on that port; is http:// meant?"
    if isinstance(error, ConnectionRefusedError):
        return f"nothing listens at {where} (connection refused)"
    return f"{where}: {error or type(error).__name__}"
