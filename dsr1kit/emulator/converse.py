"""Bedrock's Converse as the far side speaks it: event stream frames, refusals, and its question's body.

Frames are written here by hand, so that what reads them is checked against another hand. Knows nothing about
HTTP, pacing or weather.
"""

from __future__ import annotations

import json
import struct
import time
import zlib
from typing import Any

_PADDING = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
_STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "content_filter": "content_filtered"}
_ERRORS = {
    "throttled": "ThrottlingException",
    "overloaded": "ServiceUnavailableException",
    "no_balance": "AccessDeniedException",
    "unauthorized": "UnrecognizedClientException",
    "unknown_model": "ResourceNotFoundException",
    "retired": "ResourceNotFoundException",
    "bad_request": "ValidationException",
}


class ConverseShape:
    """Writes one streamed answer, frame by frame."""

    content_type = "application/vnd.amazon.eventstream"

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._block = 0
        self._open: str | None = None
        self._frames = 0

    def begin(self) -> bytes:
        """The first frame."""
        self._began = time.monotonic()
        return self._event("messageStart", {"role": "assistant"})

    def text(self, reasoning: str, answer: str) -> bytes:
        """Some of the reasoning, then some of the answer; either may be empty. Each kind is a block of its own."""
        return self._delta("reasoning", {"reasoningContent": {"text": reasoning}}, reasoning) + self._delta(
            "answer", {"text": answer}, answer
        )

    def end(self, finish_reason: str) -> bytes:
        """Why it stopped, by OpenAI's names: stop, length, content_filter."""
        return self._close() + self._event(
            "messageStop", {"stopReason": _STOP_REASONS.get(finish_reason, finish_reason)}
        )

    def usage(self, prompt: int, reasoning: int, answer: int) -> bytes:
        """Token counts; Bedrock counts reasoning and answer together."""
        counted = {
            "inputTokens": prompt,
            "outputTokens": reasoning + answer,
            "totalTokens": prompt + reasoning + answer,
        }
        latency_ms = round((time.monotonic() - self._began) * 1000)
        return self._event("metadata", {"usage": counted, "metrics": {"latencyMs": latency_ms}})

    def done(self) -> bytes:
        """Nothing: the response just ends."""
        return b""

    def keep_alive(self) -> bytes:
        """Nothing: this protocol has none."""
        return b""

    def error(self, outcome: str, message: str) -> bytes:
        """An exception in the middle of the stream, for the name of an outcome."""
        name = _ERRORS.get(outcome, "InternalServerException")
        kind = name[0].lower() + name[1:]
        headers = {":exception-type": kind, ":content-type": "application/json", ":message-type": "exception"}
        return frame(headers, json.dumps({"message": message}).encode())

    def _delta(self, kind: str, delta: dict[str, Any], text: str) -> bytes:
        if not text:
            return b""
        closing = self._close() if self._open != kind else b""
        self._open = kind
        return closing + self._event("contentBlockDelta", {"contentBlockIndex": self._block, "delta": delta})

    def _close(self) -> bytes:
        if self._open is None:
            return b""
        self._open = None
        self._block += 1
        return self._event("contentBlockStop", {"contentBlockIndex": self._block - 1})

    def _event(self, kind: str, payload: dict[str, Any]) -> bytes:
        self._frames += 1
        padding = _PADDING[: 1 + self._frames * 7 % len(_PADDING)]  # Bedrock hides the text's length with it
        headers = {":event-type": kind, ":content-type": "application/json", ":message-type": "event"}
        return frame(headers, json.dumps(payload | {"p": padding}, ensure_ascii=False).encode("utf-8", "replace"))


def frame(headers: dict[str, str], payload: bytes) -> bytes:
    """One frame of AWS's event stream: lengths, their checksum, headers, payload, checksum of it all."""
    named = b""
    for name, value in headers.items():
        key, told = name.encode(), value.encode()
        named += struct.pack("!B", len(key)) + key + struct.pack("!BH", 7, len(told)) + told  # 7: a string
    prelude = struct.pack("!II", 16 + len(named) + len(payload), len(named))
    whole = prelude + struct.pack("!I", zlib.crc32(prelude)) + named + payload
    return whole + struct.pack("!I", zlib.crc32(whole))


def refusal(status: int, outcome: str, message: str) -> tuple[dict[str, str], dict[str, str]]:
    """Headers and JSON body of an HTTP error, for the name of an outcome."""
    name = _ERRORS.get(outcome, "InternalServerException" if status >= 500 else "ValidationException")
    return {"x-amzn-errortype": f"{name}:http://internal.amazon.com/coral/com.amazon.bedrock/"}, {"message": message}


def question(body: dict[str, Any]) -> dict[str, Any]:
    """A Converse request's body as the Chat Completions body that the emulator works with.

    Raises:
        KeyError, TypeError, AttributeError: it is no Converse body.
    """
    messages = [{"role": "system", "content": part["text"]} for part in body.get("system") or ()]
    for message in body["messages"]:
        text = "".join(part["text"] for part in message["content"])
        messages.append({"role": message["role"], "content": text})
    asked = body.get("inferenceConfig") or {}
    names = (("temperature", "temperature"), ("topP", "top_p"), ("maxTokens", "max_tokens"))
    wanted = {name: asked[theirs] for theirs, name in names if asked.get(theirs) is not None}
    return {"messages": messages, "stream": True, **wanted}
