"""A busy provider of our own on loopback: Chat Completions and Converse, answered from a script or by a model.

What goes wrong, how fast and in which dialect is the weather's business; this room counts, paces and serves.
Everything it sends is marked `x-dsr1kit-emulated`.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import json
import socket
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from aiohttp import web

from dsr1kit.access.client import EMULATED_HEADER
from dsr1kit.emulator import dialects
from dsr1kit.emulator.answers import Answer, Answers, key_of
from dsr1kit.emulator.weather import Draw, Weather
from dsr1kit.errors import UsageError
from dsr1kit.records import require_messages

_ACCOUNT = ("unauthorized", "no_balance")  # what concerns the key, and so every path


class Emulator:
    """The provider: `async with Emulator(weather).listen(port) as url`.

    Args:
        weather: its conditions.
        now: the wall clock that peak hours and retirement are read from.
    """

    def __init__(self, weather: Weather, *, now: Callable[[], dt.datetime] | None = None) -> None:
        self.weather = weather
        self._now = now or (lambda: dt.datetime.now(dt.UTC))
        self.began = self._now()
        self._answers = Answers(weather)
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
            await stack.enter_async_context(self._answers)
            app = web.Application(client_max_size=64 * 1024 * 1024)
            app.router.add_post("/v1/chat/completions", self._chat)
            app.router.add_post("/v1/model/{model}/converse-stream", self._converse)
            app.router.add_get("/v1/models", self._models)
            app.router.add_get("/v1/user/balance", self._balance)
            app.router.add_post("/emulator/prepare", self._prepare)
            app.router.add_get("/emulator/served", self._served)
            runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1, handler_cancellation=True)
            await runner.setup()
            stack.push_async_callback(runner.cleanup)
            await web.SockSite(runner, door).start()
            host, bound = runner.addresses[0][:2]
            yield f"http://{host}:{bound}/v1"

    # What is not a question.
    async def _models(self, request: web.Request) -> web.Response:
        refused = next((o for o in _ACCOUNT if self.weather.faults.get(o, 0) >= 1), None)
        if refused is not None:
            return self._refusal(refused)
        if self.weather.models != "list":
            status = {"none": 404, "forbidden": 403}[self.weather.models]
            return _error(status, "no model list here")
        names = [self.weather.served_model] if self.weather.listed is None else self.weather.listed
        models = [{"id": name, "object": "model", "owned_by": "dsr1kit-emulator"} for name in names]
        return web.json_response({"object": "list", "data": models}, headers=_mark())

    async def _balance(self, request: web.Request) -> web.Response:
        """The account's balance, as DeepSeek tells it."""
        left = self.weather.balance
        if left is None:
            return _error(404, "no balance here")
        currency = self.weather.price.currency if self.weather.price else "USD"
        info = {"currency": currency, "total_balance": f"{left:.2f}"}
        return web.json_response({"is_available": left > 0, "balance_infos": [info]}, headers=_mark())

    async def _served(self, request: web.Request) -> web.Response:
        """How often each question was asked, and what was answered: for tests and for the curious."""
        return web.json_response({"outcomes": dict(self.served), "asked": dict(self._asked)}, headers=_mark())

    async def _prepare(self, request: web.Request) -> web.Response:
        """Generate answers beforehand; `attempt` beside a body counts how often it was asked already."""
        given = await request.json()
        bodies = [self._question(body) for body in given]
        for raw, body in zip(given, bodies, strict=True):
            self._asked[key_of(body)] = max(self._asked[key_of(body)], int(raw.get("attempt", 0)))
        await self._answers.prepare(bodies, [f"{key_of(b)}/{self._asked[key_of(b)]}" for b in bodies])
        return web.json_response({"prepared": len(bodies)}, headers=_mark())

    # Questions.
    async def _chat(self, request: web.Request) -> web.StreamResponse:
        if self.weather.protocol != "chat-completions":
            return _error(404, f"this provider speaks {self.weather.protocol}")
        return await self._ask(request)

    async def _converse(self, request: web.Request) -> web.StreamResponse:
        if self.weather.protocol != "bedrock-converse":
            return _error(404, f"this provider speaks {self.weather.protocol}")
        return await self._ask(request)

    def _question(self, body: dict[str, Any]) -> dict[str, Any]:
        """A request's body in the form of Chat Completions."""
        if self.weather.protocol == "chat-completions":
            return body
        from dsr1kit.emulator.converse import question

        return question(body)

    async def _ask(self, request: web.Request) -> web.StreamResponse:
        arrived = time.monotonic()
        try:
            body = self._question(await request.json())
            require_messages(body["messages"])
            limit = self._answers.sampling(body, "").max_tokens
        except (ValueError, KeyError, TypeError, OverflowError, UsageError, AttributeError) as error:
            self.served["bad_request"] += 1
            return self._refusal("bad_request", f"Invalid request: {error}")
        key = key_of(body)
        attempt = self._asked[key]
        self._asked[key] += 1
        weather = self.weather
        if (refused := self._refused(body)) is not None:  # before the limits: a retired model is not busy
            self.served[refused[0]] += 1
            return self._refusal(*refused)
        if (wait_s := self._over_limit(arrived)) is not None:
            self.served["throttled"] += 1
            return self._refusal("throttled", wait_s=wait_s)
        draw = weather.draw(json.dumps(body["messages"]), str(body.get("seed")), attempt, self._now())
        self.served[draw.fault or "ok"] += 1
        form = weather.form(draw.fault)
        if draw.fault and form in dialects.REFUSALS.get(draw.fault, {}):
            return self._refusal(draw.fault)
        if draw.fault == "not_an_answer":
            kind, text = dialects.NOT_ANSWERS[form]
            return web.Response(text=text, content_type=kind, headers=_mark())
        if draw.fault == "empty" and form == "body":
            return web.Response(headers=_mark())
        self._in_flight += 1
        try:
            answer = (await self._answers.answer(body, f"{key}/{attempt}")).first(limit)
            if weather.max_output is not None:
                answer = answer.first(weather.max_output)
            answer = answer.faulty(draw, form)
            headers = _mark() | self._quota(None)
            if body.get("stream"):
                return await _Stream(weather, draw, answer, arrived, headers).send(request)
            return await self._whole(request, draw, answer, arrived, headers)
        except ConnectionResetError:  # the client has gone: nothing is left to say, nor to log
            raise asyncio.CancelledError from None
        finally:
            self._in_flight -= 1

    def _over_limit(self, now: float) -> float | None:
        """Seconds after which to try again, when a limit is reached; None when the request may pass."""
        if self.weather.max_in_flight is not None and self._in_flight >= self.weather.max_in_flight:
            return 1.0
        limit = self.weather.requests_per_minute
        if limit is not None:
            while self._recent and self._recent[0] <= now - 60:
                self._recent.popleft()
            if len(self._recent) >= int(limit * self.weather.quota_left(self.began, self._now())):
                return max(0.1, self._recent[0] + 60 - now) if self._recent else 60.0
            self._recent.append(now)
        return None

    def _refused(self, body: dict[str, Any]) -> tuple[str, str] | None:
        """Outcome and words of what this provider refuses whatever the weather's draw says."""
        weather = self.weather
        if weather.quota_left(self.began, self._now()) == 0:
            return "retired", ""
        if weather.balance is not None and weather.balance <= 0:
            return "no_balance", ""
        if weather.system == "refuse" and any(m["role"] == "system" for m in body["messages"]):
            return "bad_request", "Invalid request: the role system is not supported by this model"
        if weather.refuse_above is not None and int(body.get("max_tokens") or 0) > weather.refuse_above:
            words = f"Invalid max_tokens value, the valid range of max_tokens is [1, {weather.refuse_above}]"
            return "bad_request", words
        return None

    def _refusal(self, outcome: str, words: str = "", *, wait_s: float | None = None) -> web.Response:
        forms = dialects.REFUSALS[outcome]
        status, said = forms.get(self.weather.form(outcome)) or next(iter(forms.values()))
        if outcome in ("throttled", "overloaded") and wait_s is None:
            wait_s = self.weather.retry_after_s
        quota = self._quota(wait_s)
        if self.weather.protocol == "chat-completions":
            return _error(status, words or said, quota)
        from dsr1kit.emulator.converse import refusal

        headers, body = refusal(status, outcome, words or said)
        return web.json_response(body, status=status, headers=_mark() | quota | headers)

    def _quota(self, wait_s: float | None) -> dict[str, str]:
        limit = self.weather.requests_per_minute
        if limit is not None:  # as it is granted now, which may be less than before
            limit = float(int(limit * self.weather.quota_left(self.began, self._now())))
        left = 0.0 if limit is None else max(0.0, limit - len(self._recent))
        return dialects.quota_headers(self.weather, limit, left, wait_s)

    async def _whole(
        self, request: web.Request, draw: Draw, answer: Answer, arrived: float, headers: dict[str, str]
    ) -> web.StreamResponse:
        tokens = len(answer.reasoning) + len(answer.answer)
        await _until(arrived + draw.first_token_s + sum(draw.gaps_s(tokens - 1)))
        if draw.fault in ("cut", "stalled", "queued"):
            if draw.fault != "cut":
                await _until(arrived + self.weather.queue_s)
            return _hang_up(request, web.Response(headers=headers))
        if draw.fault is not None and self.weather.form(draw.fault) == "event":
            return web.json_response(dialects.error(draw.fault), headers=headers)
        counts = dialects.usage(self.weather, answer.prompt_tokens, len(answer.reasoning), len(answer.answer))
        texts = "".join(answer.reasoning), "".join(answer.answer)
        return web.json_response(dialects.whole(self.weather, *texts, answer.finish_reason, counts), headers=headers)


class _Stream:
    """One answer, paced token by token as the weather has it."""

    def __init__(self, weather: Weather, draw: Draw, answer: Answer, arrived: float, headers: dict[str, str]) -> None:
        self._weather, self._draw, self._answer, self._arrived = weather, draw, answer, arrived
        self._form = weather.form(draw.fault)
        self._shape = dialects.shape_for(weather)
        self._headers = {"Content-Type": self._shape.content_type, "Cache-Control": "no-cache", **headers}

    async def send(self, request: web.Request) -> web.StreamResponse:
        weather, draw, answer, shape = self._weather, self._draw, self._answer, self._shape
        response = web.StreamResponse(headers=self._headers)
        await response.prepare(request)
        await response.write(shape.begin())
        if draw.fault in ("queued", "stalled") and (draw.fault == "queued" or self._form == "before"):
            await self._wait(response, self._arrived + weather.queue_s, alive=draw.fault == "queued")
            return _hang_up(request, response)
        at = self._arrived + draw.first_token_s
        await self._wait(response, at, alive=weather.keep_alive != "none")
        at = max(at, time.monotonic())  # an answer that was late is paced from when it is there
        tokens = [("reasoning", t) for t in answer.reasoning] + [("answer", t) for t in answer.answer]
        broken = draw.fault in ("cut", "stalled") or (draw.fault is not None and self._form == "event")
        stop = self._stop(tokens) if broken else len(tokens)
        await self._tokens(response, tokens[:stop], at, draw.gaps_s(len(tokens)))
        if draw.fault == "cut":
            return _hang_up(request, response)
        if draw.fault == "stalled":
            await _until(self._arrived + weather.queue_s)
            return _hang_up(request, response)
        if draw.fault is not None and self._form == "event":
            await response.write(shape.error(draw.fault, next(iter(dialects.REFUSALS[draw.fault].values()))[1]))
        else:
            counts = shape.usage(answer.prompt_tokens, len(answer.reasoning), len(answer.answer))
            await response.write(shape.end(answer.finish_reason) + counts + shape.done())
        await response.write_eof()
        return response

    def _stop(self, tokens: Sequence[tuple[str, str]]) -> int:
        """How many tokens come before the stream breaks."""
        if self._form == "before":
            return 0
        if self._form == "answer":  # inside the answer, after all of the thinking
            return len(self._answer.reasoning) + max(1, int(self._draw.cut_at * len(self._answer.answer)))
        return max(1, int(len(tokens) * self._draw.cut_at))

    async def _tokens(
        self, response: web.StreamResponse, tokens: Sequence[tuple[str, str]], at: float, gaps: Sequence[float]
    ) -> None:
        """Write tokens at their moments; in a burst, all of them at the last one's."""
        step = len(tokens) or 1 if self._weather.burst else self._weather.tokens_per_chunk
        gaps = [0.0, *gaps]
        for begin in range(0, len(tokens), step):
            at += sum(gaps[begin : begin + step])
            await _until(at)
            part = tokens[begin : begin + step]
            thought, said = ("".join(t for kind, t in part if kind == which) for which in ("reasoning", "answer"))
            await response.write(self._shape.text(thought, said))

    async def _wait(self, response: web.StreamResponse, until: float, *, alive: bool) -> None:
        # A queue that sends nothing would be silence: it is kept alive by comments where nothing else is said.
        sign = (self._shape.keep_alive() or b": keep-alive\n\n") if alive else b""
        if self._weather.protocol != "chat-completions":
            sign = b""
        while sign and time.monotonic() + self._weather.keep_alive_s < until:
            await asyncio.sleep(self._weather.keep_alive_s)
            await response.write(sign)
        await _until(until)


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
