"""How a question is put on the wire and which reader takes the response: one class a protocol.

Knows nothing about connections, clocks or limits.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from dsr1kit.access import outcomes
from dsr1kit.access.stream import CompletionReader
from dsr1kit.records import Message, Outcome, Sampling
from dsr1kit.thinking import Piece

if TYPE_CHECKING:
    from dsr1kit.access.channels import Channel


class Wire(Protocol):
    """One protocol, for one channel and one key."""

    def body(self, messages: Sequence[Message], sampling: Sampling) -> dict[str, Any]:
        """The request's JSON body."""
        ...

    def request(self, base_url: str, payload: bytes) -> tuple[str, dict[str, str]]:
        """Path below the base URL, and headers, of a question whose body is `payload`."""
        ...

    def reader(self, now: Callable[[], float], on_pieces: Callable[[list[Piece]], None] | None) -> CompletionReader:
        """A fresh reader of one response with status 200."""
        ...

    def refusal(self, status: int, headers: Mapping[str, str], body: bytes) -> tuple[Outcome, str]:
        """Outcome and detail of a response with another status."""
        ...


def wire_for(channel: Channel, key: str | None) -> Wire:
    """The protocol that the channel speaks."""
    if channel.protocol == "bedrock-converse":
        from dsr1kit.access.converse import BedrockConverse

        return BedrockConverse(channel, key)
    return ChatCompletions(channel, key)


class ChatCompletions:
    """OpenAI's Chat Completions as R1's providers speak it, streamed as server-sent events."""

    def __init__(self, channel: Channel, key: str | None) -> None:
        self._channel, self._key = channel, key

    def body(self, messages: Sequence[Message], sampling: Sampling) -> dict[str, Any]:
        """The request's JSON body; `max_tokens` is clamped to the channel's `max_output`."""
        body: dict[str, Any] = {
            "model": self._channel.model,
            "messages": [{"role": m["role"], "content": m["content"]} for m in messages],
            "stream": True,
            "stream_options": {"include_usage": True},
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": min(sampling.max_tokens, self._channel.max_output or sampling.max_tokens),
        }
        if (seed := sampling.draw_seed()) is not None:
            body["seed"] = seed
        if sampling.max_thinking_tokens is not None:
            body["thinking_budget"] = sampling.max_thinking_tokens
        if sampling.stop:
            body["stop"] = list(sampling.stop)
        return body

    def request(self, base_url: str, payload: bytes) -> tuple[str, dict[str, str]]:
        """The one path, and the key as a bearer token."""
        headers = {"Content-Type": "application/json", "Accept": "text/event-stream, application/json"}
        return "/chat/completions", headers | bearer(self._key)

    def reader(self, now: Callable[[], float], on_pieces: Callable[[list[Piece]], None] | None) -> CompletionReader:
        """A reader of server-sent events, or of one JSON body."""
        return CompletionReader(self._channel.reasoning, now, on_pieces, thinks=thinks(self._channel))

    def refusal(self, status: int, headers: Mapping[str, str], body: bytes) -> tuple[Outcome, str]:
        """By status and the body's words."""
        return outcomes.from_status(status, body)


def thinks(channel: Channel) -> bool:
    """Whether the channel's model is known to think before it answers."""
    return channel.family in ("r1", "r1-distill")


def bearer(key: str | None) -> dict[str, str]:
    """The header that carries a key; empty without one."""
    return {"Authorization": f"Bearer {key}"} if key else {}


def encode(body: Mapping[str, Any]) -> bytes:
    """A body's bytes; half a character (a lone surrogate) becomes a question mark."""
    return _to_json(body).encode("utf-8", "replace")


_to_json = json.JSONEncoder(ensure_ascii=False).encode  # json.dumps would make a new encoder each time
