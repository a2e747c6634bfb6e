"""Ask one hosted channel and measure it: the Backend behind `Channel.open()`.

Speaks Chat Completions with streaming over the measuring HTTP client. Every condition of the far side
becomes a Reply with an outcome; three clocks watch a request: first token (which keep-alives do not feed),
stall (silence between tokens) and the deadline of the whole. Knows nothing about retries or other channels.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from dsr1kit import keys
from dsr1kit.access import outcomes
from dsr1kit.access.fetch import PLAIN_HEADERS, Fetched, fetch
from dsr1kit.access.http import Connection, Exchange, NotHttp, StaleConnection
from dsr1kit.access.limits import Limits
from dsr1kit.access.pool import Pool
from dsr1kit.access.quota import Quota, read_quota
from dsr1kit.access.reach import Reach, by_nearness, why_unreachable
from dsr1kit.access.wire import Wire, bearer, encode, wire_for
from dsr1kit.errors import UsageError
from dsr1kit.records import (
    BUSY,
    R1_SAMPLING,
    Attempt,
    Delta,
    Message,
    OnDelta,
    Outcome,
    Reply,
    Sampling,
    Timing,
    Usage,
    require_messages,
)
from dsr1kit.thinking import Piece

if TYPE_CHECKING:
    from dsr1kit.access.channels import Channel

#: The kit's emulator marks its responses with it, so that no catalogue entry can pass one off as a provider.
EMULATED_HEADER = "x-dsr1kit-emulated"
_MOST_ERROR_BYTES = 256 * 1024
_AFTER_DONE_S = 0.5  # how long a response may stay open after [DONE] before its connection is given up
_ERROR_BODY_S = 2.0  # longest wait for the words of an error status


class ChannelClient:
    """A hosted channel, opened: an async context manager and a Backend.

    Args:
        channel: what the catalogue says.
        first_token_s: longest wait for reasoning or answer text, from the moment the request is dispatched.
        stall_s: longest silence between two pieces of text.
        deadline_s: limit for the whole request; None: none.
        connect_s: limit for DNS, TCP, proxy and TLS together.

    Raises (on entering):
        MissingKey: the channel's key variable is not set.
    """

    def __init__(
        self,
        channel: Channel,
        *,
        first_token_s: float = 120.0,
        stall_s: float = 60.0,
        deadline_s: float | None = None,
        connect_s: float = 10.0,
    ) -> None:
        for name, value in (("first_token_s", first_token_s), ("stall_s", stall_s), ("connect_s", connect_s)):
            if not value > 0:
                raise UsageError(f"{name} must be above 0 seconds, not {value!r}")
        if deadline_s is not None and not deadline_s > 0:
            raise UsageError(f"deadline_s must be above 0 seconds, not {deadline_s!r}")
        self.channel = channel
        self.name = channel.name
        self._first_token_s, self._stall_s = first_token_s, stall_s
        self._deadline_s, self._connect_s = deadline_s, connect_s
        self._key: str | None = None
        self._pools: list[Pool] = []
        self._answered_at_once = 0
        self.reaches: list[Reach] = []
        self._limits = Limits(channel.requests_per_minute, channel.tokens_per_minute, channel.max_in_flight)

    async def __aenter__(self) -> Self:
        channel = self.channel
        if channel.protocol == "bedrock-converse" and channel.api_key_env:
            self._key = keys.find_key(channel.api_key_env)  # AWS keys do as well
        elif channel.api_key_env and not channel.retired_on():  # nobody needs a key for what is gone
            self._key = keys.require_key(channel.api_key_env, self.name)
        self.wire: Wire = wire_for(channel, self._key)
        self._pools = [Pool(url, proxy=channel.proxy, connect_s=self._connect_s) for url in channel.base_urls]
        if len(self._pools) > 1 and not channel.retired_on():
            self.reaches, self._pools = await by_nearness(self._pools, bearer(self._key))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for pool in self._pools:
            pool.close()
        self._pools = []

    async def ask(
        self,
        messages: Sequence[Message],
        sampling: Sampling = R1_SAMPLING,
        *,
        on_delta: OnDelta | None = None,
        due: float | None = None,
    ) -> Reply:
        """Ask once; see `Backend.ask`. `max_tokens` is clamped to the channel's `max_output`."""
        if not self._pools:
            raise UsageError(f"channel {self.name!r} is not open: use `async with channel.open() as r1:`")
        require_messages(messages)
        loop = asyncio.get_running_loop()
        start = loop.time()
        due = start if due is None else due
        call = _Call(self, due, on_delta, due_at=time.time() - (start - due))
        retired = self.channel.retired_on()
        if retired:
            return call.reply(Outcome.RETIRED, outcomes.detail(Outcome.RETIRED, f"retired on {retired}"))
        call.prompt = "\n".join(m["content"] for m in messages)
        try:
            limit = asyncio.timeout_at(None if self._deadline_s is None else due + self._deadline_s)
            async with limit, self._limits.slot():
                reply = await self._exchange(call, messages, sampling)
                self._limits.spent(reply.usage)
                if reply.answer:
                    self._answered_at_once = max(self._answered_at_once, self._limits.in_flight)
                return reply
        except TimeoutError:
            if not limit.expired():
                raise  # the caller's own, out of on_delta
            call.close()
            return call.reply(
                Outcome.DEADLINE,
                outcomes.detail(Outcome.DEADLINE, f"no whole answer in {self._deadline_s} s"),
            )
        except asyncio.CancelledError:
            call.close()
            raise

    def body(self, messages: Sequence[Message], sampling: Sampling) -> dict[str, Any]:
        """The request's JSON body."""
        return self.wire.body(messages, sampling)

    async def _exchange(self, call: _Call, messages: Sequence[Message], sampling: Sampling) -> Reply:
        loop = asyncio.get_running_loop()
        dispatched = loop.time()
        payload = encode(self.body(messages, sampling))
        why = ""
        for pool in tuple(self._pools):
            path, headers = self.wire.request(pool.base_url, payload)
            request = pool.request("POST", path, {**headers, **PLAIN_HEADERS}, payload)
            for fresh in (False, True):
                try:
                    connection, connect_s = await pool.acquire(fresh=fresh)
                except (OSError, UnicodeError) as error:  # UnicodeError: a label that no host name can have
                    why = "; ".join(filter(None, (why, why_unreachable(pool, error))))
                    if len(self._pools) > 1:  # the next nearest; this one is tried again when all others fail
                        self._pools.sort(key=lambda other: other is pool)
                    break
                call.start(pool, connection, connect_s, dispatched)
                connection.send(request, call, pool.release)
                reply = await call.done
                if reply is not None:
                    return reply
        return call.reply(Outcome.UNREACHABLE, outcomes.detail(Outcome.UNREACHABLE, why))

    async def fetch(self, path: str, *, timeout_s: float = 10.0) -> Fetched:
        """GET `path` below the (nearest) base URL with the channel's key, the way its questions go.

        Raises:
            OSError: no connection, no HTTP, or not whole within `timeout_s` seconds.
        """
        return await fetch(self._pools[0], path, bearer(self._key), timeout_s=timeout_s)

    def quota(self, headers: Mapping[str, str]) -> Quota:
        """What response headers, and failing those the requests in flight, tell about the channel's quota."""
        return read_quota(headers, in_flight=self._limits.in_flight, most_answered=self._answered_at_once)

    @property
    def pool(self) -> Pool:
        """Connections to the (nearest) base URL; only while open."""
        return self._pools[0]

    def hide_key(self, text: str) -> str:
        """`text` without this channel's key; cheaper than `keys.redact` on the measured path."""
        return text.replace(self._key, keys.REDACTED) if self._key else text

    @property
    def clocks(self) -> tuple[float, float]:
        """First-token and stall limits, in seconds."""
        return self._first_token_s, self._stall_s


class _Call(Exchange):
    """One request on the wire: reads the response, keeps the clocks, ends as a Reply."""

    def __init__(self, client: ChannelClient, due: float, on_delta: OnDelta | None, *, due_at: float) -> None:
        self._client = client
        self._loop = asyncio.get_running_loop()
        self._due, self._due_at = due, due_at
        self._on_delta = on_delta
        self.prompt = ""
        self.done: asyncio.Future[Reply | None] = self._loop.create_future()
        self._reader = client.wire.reader(self._loop.time, None if on_delta is None else self._show)
        self._base_url = ""
        self._status: int | None = None
        self._headers: dict[str, str] = {}
        self._error_body = bytearray()
        self._connection: Connection | None = None
        self._connect_s: float | None = None
        self._reused = False
        self._queue_s: float | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._ending = self._flowing = False

    def start(self, pool: Pool, connection: Connection, connect_s: float, dispatched: float) -> None:
        """The connection is there and the request is about to be written."""
        self._base_url = pool.base_url
        self.done = self._loop.create_future()
        self._connection = connection
        self._reused = connection.uses > 0
        self._connect_s = connect_s
        self._queue_s = max(0.0, dispatched - self._due)
        first_token_s, _ = self._client.clocks
        self._timer = self._loop.call_at(dispatched + first_token_s, self._first_token_clock)

    # What the connection calls.
    def on_headers(self, status: int, headers: dict[str, str], at: float) -> None:
        self._status, self._headers = status, headers
        if status != 200:  # the status says it; its words are waited for, but not for long
            self._stop_timer()
            self._timer = self._loop.call_later(_ERROR_BODY_S, self._give_up, Outcome.STALLED, "no end of the error")

    def on_body(self, data: bytes, at: float) -> None:
        if self._status == 200:
            self._reader.feed(data, at)
        elif len(self._error_body) < _MOST_ERROR_BYTES:
            self._error_body += data

    def parse_some(self, until: float) -> bool:
        if self.done.done():  # given up, or on_delta raised: nobody reads the rest
            return False
        left = self._reader.parse_some(until)
        if self.done.done():
            return left
        if self._reader.complete and not self._ending:
            self._ending = True
            self._stop_timer()
            self._timer = self._loop.call_later(_AFTER_DONE_S, self._complete)
        elif not self._flowing and not self._ending and self._reader.last_text_at is not None:
            self._flowing = True  # from the first text on, the stall clock alone counts
            self._stop_timer()
            self._stall_clock()
        return left

    def on_end(self, at: float) -> None:
        if self.done.done():
            return
        if self._status == 200:
            self._finish(at)
        else:
            refusal = self._client.wire.refusal(self._status or 0, self._headers, bytes(self._error_body))
            self._end(*refusal, at)

    def on_lost(self, at: float, error: Exception | None) -> None:
        if self.done.done():
            return
        if isinstance(error, StaleConnection):
            self._stop_timer()
            self.done.set_result(None)
            return
        how = f"the connection broke ({error})" if error and str(error) else "the connection was closed early"
        if self._status not in (None, 200):
            self.on_end(at)
            return
        if isinstance(error, NotHttp) and self._status is None:
            fact = f"the answer is not HTTP ({error})"
            self._end(Outcome.NOT_AN_ANSWER, outcomes.detail(Outcome.NOT_AN_ANSWER, fact), at)
            return
        self._finish(at, broken=how)

    # The clocks.
    def _first_token_clock(self) -> None:
        first_token_s, _ = self._client.clocks
        waited = f"no token within {first_token_s:g} s"
        if self._reader.keep_alives:
            self._give_up(Outcome.QUEUED, f"{waited}, only {self._reader.keep_alives} keep-alives")
        else:
            self._give_up(Outcome.STALLED, f"{waited}, and no keep-alive")

    def _stall_clock(self) -> None:
        _, stall_s = self._client.clocks
        last = self._reader.last_text_at or 0.0
        if self._loop.time() < last + stall_s:
            self._timer = self._loop.call_at(last + stall_s, self._stall_clock)
            return
        self._give_up(Outcome.STALLED, f"silence for {stall_s:g} s in the middle of the answer")

    def _give_up(self, outcome: Outcome, fact: str) -> None:
        if self._reader.complete:
            self._complete()
            return
        if self._status not in (None, 200):  # an error whose body does not end
            self.on_end(self._loop.time())
        if not self.done.done():
            self._reader.finish(broken=fact)
            self._end(outcome, outcomes.detail(outcome, fact), self._loop.time())
        self._drop()

    def _complete(self) -> None:
        """The answer is whole but the far side does not end the response."""
        if not self.done.done():
            self._finish(self._loop.time())
        self._drop()

    def _finish(self, at: float, *, broken: str = "") -> None:
        outcome, detail = self._reader.finish(broken=broken)
        self._end(outcome, detail, at)

    def _end(self, outcome: Outcome, detail: str, at: float) -> None:
        self._stop_timer()
        if not self.done.done():  # on_delta may have raised at the last piece
            self.done.set_result(self.reply(outcome, detail, at=at))

    def _drop(self) -> None:
        if self._connection is not None:
            self._connection.drop(self)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def close(self) -> None:
        """Give the request up: the connection is closed, which tells the far side to stop."""
        self._stop_timer()
        self._drop()  # `done` is cancelled already: the task that waits for it was
        if not self.done.done():
            self.done.cancel()
        self._reader.finish(broken="given up")

    def _show(self, pieces: list[Piece]) -> None:
        assert self._on_delta is not None  # noqa: S101 - only handed on when there is one
        if self.done.done():
            return
        try:
            for piece in pieces:
                self._on_delta(Delta(piece.kind, piece.text, piece.at - self._due))
        except Exception as error:
            self._stop_timer()
            self.done.set_exception(error)
            self._drop()

    def reply(self, outcome: Outcome, detail: str, *, at: float | None = None) -> Reply:
        """The Reply as things stand."""
        channel = self._client.channel
        usage = self._reader.usage(self.prompt)
        quota = self._client.quota(self._headers)
        if outcome in BUSY and (warning := channel.retirement_warning()):
            detail = f"{detail}. {warning}"
        if outcome is Outcome.THROTTLED:
            detail = f"{detail} ({quota})"
        timing = self._timing(usage, self._loop.time() if at is None else at)
        return Reply(
            outcome=outcome,
            detail=detail,
            reasoning=self._reader.splitter.reasoning,
            answer=self._reader.splitter.answer,
            finish_reason=self._reader.finish_reason,
            channel=channel.name,
            model_requested=channel.model,
            model_served=self._reader.model_served,
            timing=timing,
            usage=usage,
            due_at=self._due_at,
            http_status=self._status,
            headers={name: self._client.hide_key(value) for name, value in self._headers.items()},
            attempts=(Attempt(channel.name, outcome, timing.total_s),),
            emulated=channel.emulated or EMULATED_HEADER in self._headers,
            extra={
                "keep_alives": self._reader.keep_alives,
                "chunks": self._reader.chunks,
                "quota": quota,
                "base_url": self._base_url,
            },
        )

    def _timing(self, usage: Usage, ended: float) -> Timing:
        splitter, due = self._reader.splitter, self._due
        times = sorted({piece.at for piece in splitter.pieces})
        first, answer = splitter.first_at(), splitter.first_at("answer")
        tokens = usage.completion_tokens or 0
        last = times[-1] if times else None
        return Timing(
            queue_s=self._queue_s,
            connect_s=self._connect_s,
            connection_reused=self._reused,
            first_token_s=None if first is None else first - due,
            first_answer_s=None if answer is None else answer - due,
            think_s=None if answer is None or first is None else answer - first,
            inter_token_s=(last - first) / (tokens - 1) if last and first and tokens > 1 and len(times) > 1 else None,
            total_s=(ended if last is None else last) - due,
            gaps_s=tuple(b - a for a, b in pairwise(times)),
        )
