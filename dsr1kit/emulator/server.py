"""A busy provider of our own: Chat Completions on loopback, answering from a script or by a model.

What goes wrong, how fast and in which dialect is the weather's business. A model's answers are generated
before they are paced (`POST /emulator/prepare` generates many at once), so that its computing never shows
in the latency. Everything it sends is marked `x-dsr1kit-emulated`.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import hashlib
import json
import math
import re
import socket
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from aiohttp import web

from dsr1kit.access.client import EMULATED_HEADER
from dsr1kit.access.stream import estimate_tokens
from dsr1kit.emulator.weather import Draw, Weather
from dsr1kit.errors import UsageError
from dsr1kit.records import Message, Reply, Sampling, require_messages
from dsr1kit.thinking import ThinkSplitter

if TYPE_CHECKING:
    from collections.abc import Awaitable

_STATUS = {
    "throttled": (429, "Rate limit reached for requests"),
    "overloaded": (503, "The server is busy. Please try again later."),
    "no_balance": (402, "Insufficient Balance"),
    "unauthorized": (401, "Authentication Fails (no such user)"),
    "unknown_model": (404, "The model does not exist"),
    "retired": (410, "This model has been retired"),
    "bad_request": (400, "Invalid request: the parameters were not accepted"),
}
_HTML = "<!DOCTYPE html><html><head><title>Service temporarily unavailable</title></head><body>busy</body></html>"


class Generator(Protocol):
    """What the emulator needs of a local model."""

    def generate_many(
        self, conversations: Sequence[Sequence[Message]], samplings: Sequence[Sampling]
    ) -> Awaitable[list[Reply]]:
        """Answers to many conversations, in their order."""
        ...


@dataclass(frozen=True, slots=True)
class _Answer:
    """A whole answer before it is paced: tokens of reasoning, tokens of answer."""

    reasoning: tuple[str, ...]
    answer: tuple[str, ...]
    prompt_tokens: int
    finish_reason: str = "stop"

    def first(self, count: int) -> _Answer:
        """Only the first `count` tokens, stopped by length."""
        if count >= len(self.reasoning) + len(self.answer):
            return self
        said = self.answer[: max(0, count - len(self.reasoning))]
        return _Answer(self.reasoning[:count], said, self.prompt_tokens, "length")

    def faulty(self, draw: Draw) -> _Answer:
        """What is left of it by a fault that concerns the text."""
        if draw.fault == "empty":
            return replace(self, reasoning=(), answer=())
        if draw.fault == "filtered":
            return replace(self, finish_reason="content_filter")
        if draw.fault == "truncated":
            whole = len(self.reasoning) + len(self.answer)
            return replace(self.first(max(1, int(draw.cut_at * whole))), finish_reason="length")
        return self


class Emulator:
    """The provider: `async with Emulator(weather).listen(port) as url`.

    Args:
        weather: its conditions.
        now: the wall clock that peak hours are read from.
    """

    def __init__(self, weather: Weather, *, now: Callable[[], dt.datetime] | None = None) -> None:
        self.weather = weather
        self._now = now or (lambda: dt.datetime.now(dt.UTC))
        self._model: Generator | None = None
        self._prepared: dict[str, _Answer] = {}
        self._asked: Counter[str] = Counter()
        self._recent: deque[float] = deque()
        self._in_flight = 0
        self.served: Counter[str] = Counter()

    @asynccontextmanager
    async def listen(self, port: int = 0) -> AsyncIterator[str]:
        """Serve on 127.0.0.1; yields the base URL. Port 0 picks a free one.

        Raises:
            UsageError: the port is taken.
        """
        async with AsyncExitStack() as stack:
            try:  # before the model is loaded: a port that is taken is known at once
                door = socket.create_server(("127.0.0.1", port), backlog=1024)
            except OSError as error:
                raise UsageError(
                    f"port {port} on 127.0.0.1 cannot be used ({error.strerror or error}); "
                    "choose another with --port, or 0 for any free one"
                ) from None
            stack.callback(door.close)
            if self.weather.model is not None:
                self._model = await stack.enter_async_context(self._open_model())
            app = web.Application(client_max_size=64 * 1024 * 1024)
            app.router.add_post("/v1/chat/completions", self._chat)
            app.router.add_get("/v1/models", self._models)
            app.router.add_post("/emulator/prepare", self._prepare)
            app.router.add_get("/emulator/served", self._served)
            runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1, handler_cancellation=True)
            await runner.setup()
            stack.push_async_callback(runner.cleanup)
            await web.SockSite(runner, door).start()
            host, bound = runner.addresses[0][:2]
            yield f"http://{host}:{bound}/v1"

    def _open_model(self) -> AbstractAsyncContextManager[Any]:
        from dsr1kit.local.model import LocalModel

        assert self.weather.model is not None  # noqa: S101 - the caller has checked it
        return LocalModel(self.weather.model, quantization=self.weather.quantization)

    # Answers, whole.
    async def _answer(self, body: dict[str, Any], key: str) -> _Answer:
        if self.weather.script is not None:
            return _scripted(self.weather.script, body["messages"])
        await self._answers([body], [key])
        return self._prepared.pop(key)  # an attempt is made once

    async def _answers(self, bodies: Sequence[dict[str, Any]], keys: Sequence[str]) -> None:
        """Have the model answer what is not there yet, all together, and keep it under the keys."""
        missing = {key: body for key, body in zip(keys, bodies, strict=True) if key not in self._prepared}
        if not missing:
            return
        if self._model is None:
            return
        samplings = [self._sampling(body, key) for key, body in missing.items()]
        replies = await self._model.generate_many([b["messages"] for b in missing.values()], samplings)
        for key, reply in zip(missing, replies, strict=True):
            self._prepared[key] = _spoken(reply)

    def _sampling(self, body: dict[str, Any], key: str) -> Sampling:
        wanted = body.get("temperature") if self.weather.temperature is None else self.weather.temperature
        top_p = body.get("top_p")
        return Sampling(
            temperature=0.6 if wanted is None else float(wanted),
            top_p=0.95 if top_p is None else float(top_p),
            max_tokens=int(body.get("max_tokens") or 32768),
            seed=int.from_bytes(hashlib.sha256(f"{self.weather.seed}/{key}".encode()).digest()[:4], "big") >> 1,
        )

    # HTTP.
    async def _models(self, request: web.Request) -> web.Response:
        model = {"id": self.weather.served_model, "object": "model", "owned_by": "dsr1kit-emulator"}
        return web.json_response({"object": "list", "data": [model]}, headers=_mark())

    async def _served(self, request: web.Request) -> web.Response:
        """How often each question was asked, and what was answered: for tests and for the curious."""
        return web.json_response({"outcomes": dict(self.served), "asked": dict(self._asked)}, headers=_mark())

    async def _prepare(self, request: web.Request) -> web.Response:
        """Generate answers beforehand; `attempt` beside a body counts how often it was asked already."""
        bodies = await request.json()
        for body in bodies:
            self._asked[_key(body)] = max(self._asked[_key(body)], int(body.get("attempt", 0)))
        await self._answers(bodies, [f"{_key(b)}/{self._asked[_key(b)]}" for b in bodies])
        return web.json_response({"prepared": len(bodies)}, headers=_mark())

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        arrived = time.monotonic()
        try:
            body = await request.json()
            require_messages(body["messages"])
            limit = self._sampling(body, "").max_tokens
        except (ValueError, KeyError, TypeError, UsageError, AttributeError) as error:
            self.served["bad_request"] += 1
            return _error(400, f"Invalid request: {error}")
        key = _key(body)
        attempt = self._asked[key]
        self._asked[key] += 1
        if (wait_s := self._over_limit(arrived)) is not None:
            self.served["throttled"] += 1
            return _error(*_STATUS["throttled"], {"Retry-After": str(math.ceil(wait_s))})
        draw = self.weather.draw(json.dumps(body["messages"]), str(body.get("seed")), attempt, self._now())
        self.served[draw.fault or "ok"] += 1
        if draw.fault in _STATUS:
            headers = {"Retry-After": "1"} if draw.fault in ("throttled", "overloaded") else {}
            return _error(*_STATUS[draw.fault], headers)
        if draw.fault == "not_an_answer":
            return web.Response(text=_HTML, content_type="text/html", headers=_mark())
        self._in_flight += 1
        try:
            answer = (await self._answer(body, f"{key}/{attempt}")).first(limit).faulty(draw)
            if body.get("stream"):
                return await _Stream(self.weather, draw, answer, arrived).send(request)
            return await self._whole(request, draw, answer, arrived)
        finally:
            self._in_flight -= 1

    def _over_limit(self, now: float) -> float | None:
        """Seconds after which to try again, when a limit is reached; None when the request may pass."""
        if self.weather.max_in_flight is not None and self._in_flight >= self.weather.max_in_flight:
            return 1.0
        if self.weather.requests_per_minute is not None:
            while self._recent and self._recent[0] <= now - 60:
                self._recent.popleft()
            if len(self._recent) >= self.weather.requests_per_minute:
                return max(0.1, self._recent[0] + 60 - now)
            self._recent.append(now)
        return None

    async def _whole(self, request: web.Request, draw: Draw, answer: _Answer, arrived: float) -> web.StreamResponse:
        tokens = len(answer.reasoning) + len(answer.answer)
        await _until(arrived + draw.first_token_s + sum(draw.gaps_s(tokens - 1)))
        if draw.fault in ("cut", "stalled", "queued"):
            if draw.fault != "cut":
                await _until(arrived + self.weather.queue_s)
            return _hang_up(request, web.Response(headers=_mark()))
        message: dict[str, Any] = {"role": "assistant"}
        message |= _fields(self.weather, "".join(answer.reasoning), "".join(answer.answer))
        body = _envelope(self.weather, "chat.completion") | {
            "choices": [{"index": 0, "message": message, "finish_reason": answer.finish_reason}],
            "usage": _usage(answer),
        }
        return web.json_response(body, headers=_mark())


class _Stream:
    """One answer, paced token by token as the weather has it."""

    def __init__(self, weather: Weather, draw: Draw, answer: _Answer, arrived: float) -> None:
        self._weather, self._draw, self._answer, self._arrived = weather, draw, answer, arrived
        self._end = "\r\n" if weather.crlf else "\n"
        self._envelope = _envelope(weather, "chat.completion.chunk")

    async def send(self, request: web.Request) -> web.StreamResponse:
        weather, draw, answer = self._weather, self._draw, self._answer
        headers = {"Content-Type": "text/event-stream", "Cache-Control": "no-cache", **_mark()}
        response = web.StreamResponse(headers=headers)
        await response.prepare(request)
        await self._chunk(response, {"role": "assistant", "content": ""})
        if draw.fault == "queued":
            how = "comment" if weather.keep_alive == "none" else weather.keep_alive
            await self._wait(response, self._arrived + weather.queue_s, how)
            return _hang_up(request, response)
        at = self._arrived + draw.first_token_s
        await self._wait(response, at, weather.keep_alive)
        tokens = [("reasoning", t) for t in answer.reasoning] + [("answer", t) for t in answer.answer]
        stop = len(tokens)
        if draw.fault in ("cut", "stalled"):
            stop = max(1, int(stop * draw.cut_at))
        step = weather.tokens_per_chunk
        gaps = [0.0, *draw.gaps_s(len(tokens))]
        for begin in range(0, stop, step):
            at += sum(gaps[begin : begin + step])
            await _until(at)
            await self._tokens(response, tokens[begin : min(stop, begin + step)], begin == 0)
        if draw.fault == "cut":
            return _hang_up(request, response)
        if draw.fault == "stalled":
            await _until(self._arrived + weather.queue_s)
            return _hang_up(request, response)
        await self._chunk(response, {}, answer.finish_reason)
        if weather.usage:
            await self._event(response, self._envelope | {"choices": [], "usage": _usage(answer)})
        if weather.done:
            await self._line(response, "data: [DONE]")
        await response.write_eof()
        return response

    async def _wait(self, response: web.StreamResponse, until: float, how: str) -> None:
        while how != "none" and time.monotonic() + self._weather.keep_alive_s < until:
            await asyncio.sleep(self._weather.keep_alive_s)
            await (self._line(response, ": keep-alive") if how == "comment" else response.write(self._end.encode()))
        await _until(until)

    async def _tokens(self, response: web.StreamResponse, tokens: Sequence[tuple[str, str]], first: bool) -> None:
        thought = "".join(t for kind, t in tokens if kind == "reasoning")
        said = "".join(t for kind, t in tokens if kind == "answer")
        kind = self._weather.reasoning
        if kind in ("inline", "prefilled"):
            opening = "<think>\n" if first and kind == "inline" else ""
            # The closing tag goes with the first token of the answer.
            closing = "\n</think>\n\n" if said and not self._closed else ""
            self._closed = self._closed or bool(said)
            await self._chunk(response, {"content": opening + thought + closing + said})
            return
        if thought:
            await self._chunk(response, {kind: thought})
        if said:
            await self._chunk(response, {"content": said})

    _closed = False

    async def _chunk(self, response: web.StreamResponse, delta: dict[str, str], finish: str | None = None) -> None:
        choice = {"index": 0, "delta": delta, "finish_reason": finish}
        await self._event(response, self._envelope | {"choices": [choice]})

    async def _event(self, response: web.StreamResponse, payload: dict[str, Any]) -> None:
        await self._line(response, "data: " + json.dumps(payload, ensure_ascii=False))

    async def _line(self, response: web.StreamResponse, line: str) -> None:
        await response.write(f"{line}{self._end}{self._end}".encode())


def _hang_up(request: web.Request, response: web.StreamResponse) -> web.StreamResponse:
    if request.transport is not None:
        request.transport.close()
    return response


async def _until(at: float) -> None:
    wait_s = at - time.monotonic()
    if wait_s > 0:
        await asyncio.sleep(wait_s)


def _mark() -> dict[str, str]:
    return {EMULATED_HEADER: "1"}


def _error(status: int, message: str, headers: dict[str, str] | None = None) -> web.Response:
    body = {"error": {"message": message, "type": "emulated_error", "code": status}}
    return web.json_response(body, status=status, headers=_mark() | (headers or {}))


def _envelope(weather: Weather, kind: str) -> dict[str, Any]:
    return {
        "id": "chatcmpl-emulated",
        "object": kind,
        "created": int(time.time()),
        "model": weather.served_model,
    }


def _usage(answer: _Answer) -> dict[str, Any]:
    completion = len(answer.reasoning) + len(answer.answer)
    return {
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": completion,
        "total_tokens": answer.prompt_tokens + completion,
        "completion_tokens_details": {"reasoning_tokens": len(answer.reasoning)},
    }


def _fields(weather: Weather, reasoning: str, answer: str) -> dict[str, str]:
    if weather.reasoning == "inline":
        return {"content": f"<think>\n{reasoning}\n</think>\n\n{answer}"}
    if weather.reasoning == "prefilled":
        return {"content": f"{reasoning}\n</think>\n\n{answer}"}
    return {"content": answer, weather.reasoning: reasoning}


def _key(body: dict[str, Any]) -> str:
    """Names a draw of a question: equal for requests that ask for the very same."""
    wanted = {k: body.get(k) for k in ("messages", "seed", "temperature", "top_p", "max_tokens")}
    return json.dumps(wanted, sort_keys=True, ensure_ascii=False)


def _scripted(script: str, messages: Sequence[Message]) -> _Answer:
    splitter = ThinkSplitter("auto")
    splitter.add_content(script, 0.0)
    splitter.finish()
    prompt = estimate_tokens("\n".join(m["content"] for m in messages))
    return _Answer(_words(splitter.reasoning), _words(splitter.answer), prompt)


def _words(text: str) -> tuple[str, ...]:
    """Pieces of about a token: a word with the space before it, a Chinese character, a line break."""
    return tuple(re.findall(r"\s?[^\s\u2e80-\uffff]{1,6}|\s?[\u2e80-\uffff]|\s", text))


def _spoken(reply: Reply) -> _Answer:
    return _Answer(
        _evenly(reply.reasoning, reply.usage.reasoning_tokens or 0),
        _evenly(reply.answer, reply.usage.answer_tokens or 0),
        reply.usage.prompt_tokens or 0,
        reply.finish_reason or "stop",
    )


def _evenly(text: str, pieces: int) -> tuple[str, ...]:
    """`text` in as many pieces as the model's tokens, so that pace and token counts agree."""
    pieces = min(max(pieces, 1), len(text))
    return tuple(text[len(text) * i // pieces : len(text) * (i + 1) // pieces] for i in range(pieces))
