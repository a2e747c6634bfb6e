"""Replies kept and given again: `async with ReplyCache(channels["a"], "cache.sqlite") as r1`, a Backend before one.

A reply is found by SHA-256 over everything that shapes it: endpoint, model, messages, the whole sampling with its
seed and the number of the draw, the reasoning mode. The md5 of prompt and version is no such key: other models,
samplings, system prompts and draws would all collide into one answer. And md5 collisions can be made on purpose,
so that a stranger's prompt is given another's answer.

Only answers that ended `ok` are kept, without headers; the questions are kept as hashes alone. A place that serves
another model than before loses all its entries: any reply that was asked upstream tells what is served now. Equal
requests in flight are asked once; those that waited were not asked upstream either, so their replies too say
`from_cache`, with `extra={"coalesced": True}`. A store that fails in mid-run costs speed, never an answer.

Knows nothing about how an answer is got, and nothing about prices: what says `from_cache` was not charged.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import math
import time
from collections.abc import Callable, Coroutine, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import asdict, fields, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TypeVar, get_args

from dsr1kit import keys
from dsr1kit.access.cache_stores import Bounds, Store, StoreTrouble, store_for
from dsr1kit.access.channels import Channel
from dsr1kit.access.client import ChannelClient
from dsr1kit.errors import UsageError
from dsr1kit.records import (
    R1_SAMPLING,
    Backend,
    Delta,
    Message,
    OnDelta,
    Outcome,
    Reply,
    Sampling,
    Timing,
    TokenCountSource,
    Usage,
    require_messages,
)

T = TypeVar("T")
_FORMAT = 1  # of keys and entries; another number finds none of the old
_DAY_S = 86400.0
_TEXTS = ("detail", "reasoning", "answer", "channel", "model_requested")
_TEXTS_OR_NONE = ("finish_reason", "model_served")
_COUNTS = ("prompt_tokens", "reasoning_tokens", "answer_tokens")
_log = logging.getLogger("dsr1kit.cache")


class ReplyCache:
    """A Backend that asks another one only what it has no answer to yet.

    Args:
        source: a Channel, which the cache opens and closes, or any Backend that is open already and stays so.
            For limits of one's own: `channel.open(...)`. Other Backends are told apart by their `name` and, where
            they have one, their `cache_scope`: a text that says what a name alone does not (a router's channels).
        place: a path of a SQLite file, or a `redis://`, `rediss://` or `unix://` URL.
        max_entries: more than these, and the least frequently used go first (among equals the longest unused).
        max_age_s: how long an entry may be given, in seconds; default 30 days.
        limit_s: longest wait for one operation of the store, in seconds.
        pause_s: how long a store that failed is left alone, in seconds; then one request tries it.
        clock: seconds since the epoch.

    Attributes:
        hits, misses, coalesced: requests answered from the store, asked upstream, answered along with another.
        errors: operations of the store that failed.

    Raises (on entering):
        UsageError, RunError: the store cannot be used, or the channel cannot be opened; nothing was asked.
    """

    def __init__(
        self,
        source: Channel | Backend,
        place: str | Path,
        *,
        max_entries: int = 100_000,
        max_age_s: float = 30 * _DAY_S,
        limit_s: float = 0.25,
        pause_s: float = 5.0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        if not isinstance(source, Channel) and not callable(getattr(source, "ask", None)):
            raise UsageError(f"a cache stands before a Channel or an open Backend, not {type(source).__name__}")
        for name, value in (("max_entries", max_entries), ("max_age_s", max_age_s), ("limit_s", limit_s)):
            if not (value > 0 and math.isfinite(value)):
                raise UsageError(f"{name} must be a number above 0, not {value!r}")
        self.name = source.name
        self.hits = self.misses = self.coalesced = self.errors = 0
        self._source, self._place = source, place
        self._bounds = Bounds(max_entries, max_age_s, limit_s)
        self._pause_s, self._clock = pause_s, clock
        self._backend: Backend | None = None
        self._flights: dict[str, asyncio.Future[Reply | None]] = {}
        self._troubled: dict[str, float] = {}  # reading, writing: not to be tried before this loop.time()

    @property
    def channel(self) -> Channel | None:
        """The catalogue entry behind it, where there is one: its region and price are those of what answers."""
        source = self._source if isinstance(self._source, Channel) else getattr(self._source, "channel", None)
        return source if isinstance(source, Channel) else None

    async def __aenter__(self) -> Self:
        if self._backend is not None:
            raise UsageError(f"the cache before {self.name!r} is open already")
        self._troubled.clear()
        async with AsyncExitStack() as stack:
            self._store: Store = store_for(self._place, self._bounds)
            stack.push_async_callback(self._store.close)
            await self._store.open()  # first: a channel of several places is measured on opening
            source = self._source
            self._backend = await stack.enter_async_context(source.open()) if isinstance(source, Channel) else source
            self._open = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._backend = None
        await self._open.__aexit__(kind, error, trace)

    async def ask(
        self,
        messages: Sequence[Message],
        sampling: Sampling = R1_SAMPLING,
        *,
        on_delta: OnDelta | None = None,
        due: float | None = None,
    ) -> Reply:
        """Ask once; see `Backend.ask`. Without a request upstream, on_delta gets reasoning and answer whole.

        Those that wait for an equal request get its reply, good or bad; where it is cancelled or raises, one of
        them takes over. Timing counts from `due` or the call: a look-up in vain shows in `queue_s`.
        """
        if self._backend is None:
            raise UsageError(f"the cache before {self.name!r} is not open: use `async with ReplyCache(...) as r1:`")
        require_messages(messages)
        loop = asyncio.get_running_loop()
        due = loop.time() if due is None else due
        key = reply_key(*_place_of(self._source), messages, sampling)
        while (flight := self._flights.get(key)) is not None:
            reply = await asyncio.shield(flight)  # cancelling one that waits is not for the others
            if reply is not None:
                self.coalesced += 1
                return _again(reply, due, on_delta, {"coalesced": True})
        flight = self._flights[key] = loop.create_future()
        try:
            found = await self._find(key)
            if found is not None:
                self.hits += 1
                flight.set_result(found)
                return _again(found, due, on_delta, {})
            self.misses += 1
            reply = await self._backend.ask(messages, sampling, on_delta=on_delta, due=due)
            flight.set_result(reply)
            await self._keep(key, reply)
            return reply
        finally:
            del self._flights[key]
            if not flight.done():
                flight.set_result(None)

    async def _find(self, key: str) -> Reply | None:
        data = await self._try("reading", lambda: self._store.get(key, self._clock()))
        if data is None:
            return None
        reply = _unpack(data)
        if reply is None:
            _log.info("an entry of the cache %s does not parse; it is dropped and asked anew", self._store.shown)
            await self._try("writing", lambda: self._store.drop(key))
            return None
        # One endpoint and model may stand in the catalogue under several names.
        return replace(reply, channel=self.name) if _channel_of(self._source) else reply

    async def _keep(self, key: str, reply: Reply) -> None:
        data = None
        if reply.outcome is Outcome.OK:
            with suppress(TypeError, ValueError):  # a Backend's own types, which JSON lacks: not kept
                data = _pack(reply)
        # A router reaches several places under one name: each has its own model in service.
        behind = () if _channel_of(self._source) else (reply.channel, reply.model_requested)
        origin = _digest([*_place_of(self._source), *behind])
        told = reply.model_served and (reply.answer or reply.reasoning)
        served = _digest(reply.model_served) if told else None
        if data is not None or served is not None:
            await self._try("writing", lambda: self._store.put(key, origin, served, data, self._clock()))

    async def _try(
        self, what: Literal["reading", "writing"], operation: Callable[[], Coroutine[Any, Any, T]]
    ) -> T | None:
        """The operation's result; None where the store fails or is left alone after a failure."""
        loop = asyncio.get_running_loop()
        if what in self._troubled:
            if loop.time() < self._troubled[what]:
                return None
            self._troubled[what] = loop.time() + self._pause_s  # one request tries; the others do not wait for it
        try:
            result = await _within(self._bounds.limit_s, operation())
        except Exception as error:  # whatever a store comes up with, the question is answered
            self.errors += 1
            everything = not (isinstance(error, StoreTrouble) and not error.everything)
            if what not in self._troubled:
                why = f"no end within {self._bounds.limit_s:g} s" if isinstance(error, TimeoutError) else str(error)
                _log.warning(
                    "the cache %s fails in %s (%s): questions are asked upstream; it is tried again every %g s",
                    *(self._store.shown, what, why or type(error).__name__, self._pause_s),
                )
            for lost in ("reading", "writing") if everything else (what,):
                self._troubled[lost] = loop.time() + self._pause_s
            return None
        if self._troubled.pop(what, None) is not None:
            _log.info("%s works again in the cache %s", what, self._store.shown)
        return result


async def _within(limit_s: float, operation: Coroutine[Any, Any, T]) -> T:
    """Like asyncio.timeout, but not held up by an operation that swallows its cancellation, as redis-py's may."""
    task = asyncio.create_task(operation)
    task.add_done_callback(lambda ended: ended.cancelled() or ended.exception())  # which is no longer news
    try:
        await asyncio.wait((task,), timeout=limit_s)
        if not task.done():
            raise TimeoutError
        return task.result()
    finally:
        task.cancel()


def reply_key(
    endpoint: Sequence[str], model: str, reasoning: str, messages: Sequence[Message], sampling: Sampling
) -> str:
    """The name of a reply, 64 hexadecimal digits: equal for equal requests, in every process and on every machine.

    Args:
        endpoint: the channel's base URLs; a Backend's name and scope.
        model: as requested; empty for a Backend, whose name says it.
        reasoning: the channel's reasoning mode; empty for a Backend.
        messages, sampling: as asked.
    """
    drawn = {field.name: _number(getattr(sampling, field.name)) for field in fields(sampling)}
    said = [[message["role"], message["content"]] for message in messages]
    return _digest([_FORMAT, list(endpoint), model, reasoning, said, drawn])


def _number(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value == int(value) else value  # 1 and 1.0: equal, and one key


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))  # ASCII, so a lone surrogate does no harm
    return hashlib.sha256(text.encode()).hexdigest()


def _channel_of(source: Channel | Backend) -> Channel | None:
    if isinstance(source, Channel):
        return source
    return source.channel if isinstance(source, ChannelClient) else None


def _place_of(source: Channel | Backend) -> tuple[tuple[str, ...], str, str]:
    channel = _channel_of(source)
    if channel is None:
        return (source.name, str(getattr(source, "cache_scope", ""))), "", ""
    return channel.base_urls, channel.model, channel.reasoning


def _again(reply: Reply, due: float, on_delta: OnDelta | None, extra: dict[str, Any]) -> Reply:
    """A reply given once more: timed from `due` to now, shown whole."""
    spent_s = asyncio.get_running_loop().time() - due
    if on_delta is not None and reply.reasoning:
        on_delta(Delta("reasoning", reply.reasoning, spent_s))
    if on_delta is not None and reply.answer:
        on_delta(Delta("answer", reply.answer, spent_s))
    timing = Timing(
        first_token_s=spent_s if reply.reasoning or reply.answer else None,
        first_answer_s=spent_s if reply.answer.strip() else None,
        total_s=spent_s,
    )
    due_at = time.time() - spent_s
    return replace(reply, timing=timing, due_at=due_at, attempts=(), from_cache=True, extra=extra)


def _pack(reply: Reply) -> bytes:
    entry = {name: getattr(reply, name) for name in (*_TEXTS, *_TEXTS_OR_NONE, "http_status", "emulated")}
    # A far side may say back the key that it was sent; no key lies on a disk.
    return json.dumps({"format": _FORMAT, **keys.redact_texts(entry), "usage": asdict(reply.usage)}).encode()


def _unpack(data: bytes) -> Reply | None:
    """The reply of an entry; None for what `_pack` cannot have written."""
    try:
        entry = json.loads(data)
        counted = entry.pop("usage")
        usage = Usage(**{field.name: counted[field.name] for field in fields(Usage)})
        wrong = (
            entry.pop("format") != _FORMAT
            or not all(isinstance(entry[name], str) for name in _TEXTS)
            or not all(isinstance(entry[name], str | None) for name in _TEXTS_OR_NONE)
            or not all(_is_count(getattr(usage, name)) for name in _COUNTS)
            or not {usage.source, usage.split_source} <= set(get_args(TokenCountSource))
            or not (_is_count(entry["http_status"]) and isinstance(entry["emulated"], bool))
        )
        return None if wrong else Reply(Outcome.OK, usage=usage, **entry)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


def _is_count(value: object) -> bool:
    return value is None or (isinstance(value, int) and not isinstance(value, bool))
