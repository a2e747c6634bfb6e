"""How providers say things: the shapes of a stream, the forms of a refusal, the headers of a quota.

Each is a setting of the weather; what is said here was seen at real providers (see the catalogue's notes).
Knows nothing about pacing or counting.
"""

from __future__ import annotations

import datetime as dt
import email.utils
import json
import math
import time
from typing import Any, Protocol

from dsr1kit.emulator.weather import Weather

#: Status and words of a refusal: by outcome, then by the form that the weather's [how] names.
REFUSALS: dict[str, dict[str, tuple[int, str]]] = {
    "throttled": {"429": (429, "Rate limit reached for requests")},
    "overloaded": {
        "503": (503, "The server is busy. Please try again later."),
        "500": (500, "Internal server error"),
        "529": (529, "Overloaded"),
    },
    "no_balance": {
        "402": (402, "Insufficient Balance"),
        "403": (403, "Your account is in arrears: insufficient balance"),
    },
    "unauthorized": {
        "401": (401, "Authentication Fails (no such user)"),
        "403": (403, "You have no permission to use this model"),
    },
    "unknown_model": {"404": (404, "The model does not exist"), "400": (400, "Model Not Exist")},
    "retired": {
        "410": (410, "This model has been retired"),
        "404": (404, "The model has been decommissioned and is no longer supported"),
        "400": (400, "The model deepseek-r1 has been deprecated; use a newer one"),
    },
    "bad_request": {
        "400": (400, "Invalid request: the parameters were not accepted"),
        "422": (422, "Input should be less than or equal to 1"),
    },
    "filtered": {"400": (400, "Content Exists Risk")},
}
#: Bodies sent with status 200 that are no answer.
NOT_ANSWERS = {
    "html": (
        "text/html",
        "<!DOCTYPE html><html><head><title>Service temporarily unavailable</title></head><body>busy</body></html>",
    ),
    "json": ("application/json", '{"status": "ok", "queue": 17}'),
    "text": ("text/plain", "upstream connect error or disconnect/reset before headers"),
}


class Shape(Protocol):
    """The bytes of one streamed answer."""

    content_type: str

    def begin(self) -> bytes:
        """What comes before any text."""
        ...

    def text(self, reasoning: str, answer: str) -> bytes:
        """Some text; either may be empty."""
        ...

    def end(self, finish_reason: str) -> bytes:
        """Why it ends."""
        ...

    def usage(self, prompt: int, reasoning: int, answer: int) -> bytes:
        """Token counts."""
        ...

    def done(self) -> bytes:
        """What closes the stream."""
        ...

    def keep_alive(self) -> bytes:
        """A sign of life while the request waits."""
        ...

    def error(self, outcome: str, message: str) -> bytes:
        """An error inside the stream."""
        ...


def shape_for(weather: Weather) -> Shape:
    """The shape of one answer's stream in the weather's protocol."""
    if weather.protocol == "bedrock-converse":
        from dsr1kit.emulator.converse import ConverseShape

        return ConverseShape()
    return ChatShape(weather)


class ChatShape:
    """Chat Completions chunks as server-sent events."""

    content_type = "text/event-stream"

    def __init__(self, weather: Weather) -> None:
        self._weather = weather
        self._end = "\r\n" if weather.crlf else "\n"
        self._envelope = envelope(weather, "chat.completion.chunk")
        self._opened = self._closed = False

    def begin(self) -> bytes:
        """A chunk that carries the role alone."""
        return self._chunk({"role": "assistant", "content": ""})

    def text(self, reasoning: str, answer: str) -> bytes:
        """Reasoning in the weather's field, or between its tags."""
        kind = self._weather.reasoning
        if kind in ("inline", "prefilled"):
            opening = "" if self._opened or kind == "prefilled" else "<think>\n"
            # The closing tag goes with the first token of the answer.
            closing = "\n</think>\n\n" if answer and not self._closed else ""
            self._opened, self._closed = True, self._closed or bool(answer)
            return self._chunk({"content": opening + reasoning + closing + answer})
        thought = self._chunk({kind: reasoning}) if reasoning else b""
        return thought + (self._chunk({"content": answer}) if answer else b"")

    def end(self, finish_reason: str) -> bytes:
        """A chunk with the finish reason."""
        return self._chunk({}, finish_reason)

    def usage(self, prompt: int, reasoning: int, answer: int) -> bytes:
        """A chunk without choices; empty where the weather counts nothing."""
        if self._weather.usage == "none":
            return b""
        return self._event(self._envelope | {"choices": [], "usage": usage(self._weather, prompt, reasoning, answer)})

    def done(self) -> bytes:
        """`[DONE]`, where this provider sends it."""
        return self._line("data: [DONE]") if self._weather.done else b""

    def keep_alive(self) -> bytes:
        """A comment or a blank line."""
        how = self._weather.keep_alive
        return b"" if how == "none" else self._end.encode() if how == "blank" else self._line(": keep-alive")

    def error(self, outcome: str, message: str) -> bytes:
        """An object with `error` in the place of a chunk."""
        return self._event(error(outcome, message))

    def _chunk(self, delta: dict[str, str], finish: str | None = None) -> bytes:
        return self._event(self._envelope | {"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]})

    def _event(self, payload: dict[str, Any]) -> bytes:
        return self._line("data: " + json.dumps(payload, ensure_ascii=False))

    def _line(self, line: str) -> bytes:
        return f"{line}{self._end}{self._end}".encode()


def error(outcome: str, message: str = "") -> dict[str, Any]:
    """An object with `error`, as it stands in a response whose status is 200."""
    kinds = {"throttled": ("rate_limit_error", 429), "bad_request": ("invalid_request_error", 400)}
    kind, code = kinds.get(outcome, ("server_error", 503))
    said = message or next(iter(REFUSALS[outcome].values()))[1]
    return {"error": {"message": said, "type": kind, "code": code}}


def whole(weather: Weather, reasoning: str, answer: str, finish_reason: str, counts: dict[str, Any]) -> dict[str, Any]:
    """A chat completion that is not streamed."""
    if weather.reasoning in ("inline", "prefilled"):
        opening = "<think>\n" if weather.reasoning == "inline" else ""
        fields = {"content": f"{opening}{reasoning}\n</think>\n\n{answer}"}
    else:
        fields = {"content": answer, weather.reasoning: reasoning}
    choice = {"index": 0, "message": {"role": "assistant", **fields}, "finish_reason": finish_reason}
    body = envelope(weather, "chat.completion") | {"choices": [choice]}
    return body if weather.usage == "none" else body | {"usage": counts}


def envelope(weather: Weather, kind: str) -> dict[str, Any]:
    """What every chunk and completion carries."""
    model = weather.serves or weather.served_model
    return {"id": "chatcmpl-emulated", "object": kind, "created": int(time.time()), "model": model}


def usage(weather: Weather, prompt: int, reasoning: int, answer: int) -> dict[str, Any]:
    """A usage block; `sum` leaves out how much of it was reasoning."""
    counts: dict[str, Any] = {
        "prompt_tokens": prompt,
        "completion_tokens": reasoning + answer,
        "total_tokens": prompt + reasoning + answer,
    }
    if weather.usage == "split":
        counts["completion_tokens_details"] = {"reasoning_tokens": reasoning}
    return counts


def quota_headers(weather: Weather, limit: float | None, left: float, wait_s: float | None) -> dict[str, str]:
    """The headers in which this provider tells its quota.

    Args:
        limit, left: requests a minute, and how many of them are left; None: no such limit.
        wait_s: seconds until a request may pass; None: one may pass now.
    """
    kind = weather.quota_headers
    total = 60.0 if limit is None else limit
    remaining = 0.0 if wait_s is not None else total if limit is None else left
    reset = 60.0 if wait_s is None else wait_s
    if kind == "openai":
        return {
            "x-ratelimit-limit-requests": f"{total:g}",
            "x-ratelimit-remaining-requests": f"{remaining:g}",
            "x-ratelimit-reset-requests": _spoken_duration(reset),
        }
    if kind == "x-ratelimit":
        return {
            "X-RateLimit-Limit": f"{total:g}",
            "X-RateLimit-Remaining": f"{remaining:g}",
            "X-RateLimit-Reset": f"{math.ceil(reset)}",
        }
    if kind == "modelscope":
        return {
            "modelscope-ratelimit-requests-limit": "2000",
            "modelscope-ratelimit-requests-remaining": "1000",
            "modelscope-ratelimit-model-requests-limit": f"{total:g}",
            "modelscope-ratelimit-model-requests-remaining": f"{remaining:g}",
        }
    if wait_s is None:
        return {}
    at = dt.datetime.now(dt.UTC) + dt.timedelta(seconds=math.ceil(wait_s))
    told = {
        "retry-after": {"Retry-After": str(math.ceil(wait_s))},
        "fraction": {"Retry-After": f"{wait_s:.1f}"},
        "retry-after-ms": {"retry-after-ms": str(math.ceil(wait_s * 1000))},
        "date": {"Retry-After": email.utils.format_datetime(at, usegmt=True)},
    }
    return told.get(kind, {})


def _spoken_duration(seconds: float) -> str:
    """As OpenAI writes it: `1m30s`, `12s`, `350ms`."""
    if seconds < 1:
        return f"{math.ceil(seconds * 1000)}ms"
    minutes, rest = divmod(math.ceil(seconds), 60)
    return (f"{minutes}m" if minutes else "") + f"{rest}s"
