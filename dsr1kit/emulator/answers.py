"""What the emulated provider says, whole: from scripts, or by a model, before anything is paced.

A model's answers are generated many at once, so that its computing never shows in the latency. Knows nothing
about HTTP, weather faults' words or dialects.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from dsr1kit.access.stream import estimate_tokens
from dsr1kit.emulator.weather import Draw, Weather
from dsr1kit.records import Message, Reply, Sampling
from dsr1kit.thinking import ThinkSplitter

if TYPE_CHECKING:
    from collections.abc import Awaitable


class Generator(Protocol):
    """What the emulator needs of a local model."""

    def generate_many(
        self, conversations: Sequence[Sequence[Message]], samplings: Sequence[Sampling]
    ) -> Awaitable[list[Reply]]:
        """Answers to many conversations, in their order."""
        ...


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer before it is paced: tokens of reasoning, tokens of answer."""

    reasoning: tuple[str, ...]
    answer: tuple[str, ...]
    prompt_tokens: int
    finish_reason: str = "stop"

    def first(self, count: int) -> Answer:
        """Only the first `count` tokens, stopped by length."""
        if count >= len(self.reasoning) + len(self.answer):
            return self
        said = self.answer[: max(0, count - len(self.reasoning))]
        return Answer(self.reasoning[:count], said, self.prompt_tokens, "length")

    def faulty(self, draw: Draw, form: str) -> Answer:
        """What is left of it by a fault, in one of its forms, that concerns the text."""
        if draw.fault == "empty":
            return replace(self, reasoning=self.reasoning if form == "thinking" else (), answer=())
        if draw.fault == "filtered":
            return replace(self, finish_reason="content_filter")
        if draw.fault == "overloaded" and form == "finish_reason":
            return replace(self.first(self._share(draw)), finish_reason="insufficient_system_resource")
        if draw.fault == "truncated":
            return replace(self.first(self._share(draw)), finish_reason="length")
        return self

    def _share(self, draw: Draw) -> int:
        return max(1, int(draw.cut_at * (len(self.reasoning) + len(self.answer))))

    def also(self, words: str) -> Answer:
        """The same, with `words` at its end."""
        return replace(self, answer=(*self.answer, *_words(f" {words}")))


class Answers:
    """The answers of one weather's provider; a context manager that opens its model, if it has one."""

    def __init__(self, weather: Weather) -> None:
        self._weather = weather
        self._model: Generator | None = None
        self._opened: AbstractAsyncContextManager[Any] | None = None
        self._prepared: dict[str, Answer] = {}

    async def __aenter__(self) -> Answers:
        if self._weather.model is not None:
            from dsr1kit.local.model import LocalModel

            self._opened = LocalModel(self._weather.model, quantization=self._weather.quantization)
            self._model = await self._opened.__aenter__()
        return self

    async def __aexit__(self, *error: Any) -> None:
        if self._opened is not None:
            await self._opened.__aexit__(*error)

    async def answer(self, body: dict[str, Any], key: str) -> Answer:
        """The answer to a request's body; `key` names the attempt, which is made once."""
        if self._weather.scripts:
            answer = self._scripted(body, key)
        else:
            await self.prepare([body], [key])
            answer = self._prepared.pop(key)
        wanted = re.search(r'the word "(\w+)"', _system(body)) if self._weather.system == "obey" else None
        return answer.also(wanted[1]) if wanted else answer

    async def prepare(self, bodies: Sequence[dict[str, Any]], keys: Sequence[str]) -> None:
        """Have the model answer what is not there yet, all together, and keep it under the keys."""
        missing = {key: body for key, body in zip(keys, bodies, strict=True) if key not in self._prepared}
        if not missing or self._model is None:
            return
        samplings = [self.sampling(body, key) for key, body in missing.items()]
        replies = await self._model.generate_many([b["messages"] for b in missing.values()], samplings)
        for key, reply in zip(missing, replies, strict=True):
            self._prepared[key] = _spoken(reply)

    def sampling(self, body: dict[str, Any], key: str) -> Sampling:
        """The sampling that the request asks for, with a seed of its own for each attempt."""
        top_p = body.get("top_p")
        return Sampling(
            temperature=self._temperature(body),
            top_p=0.95 if top_p is None else float(top_p),
            max_tokens=int(body.get("max_tokens") or 32768),
            seed=int.from_bytes(hashlib.sha256(f"{self._weather.seed}/{key}".encode()).digest()[:4], "big") >> 1,
        )

    def _temperature(self, body: dict[str, Any]) -> float:
        wanted = body.get("temperature") if self._weather.temperature is None else self._weather.temperature
        return 0.6 if wanted is None else float(wanted)

    def _scripted(self, body: dict[str, Any], key: str) -> Answer:
        """The script; of several the first at temperature 0, otherwise one drawn for this attempt."""
        scripts = self._weather.scripts
        drawn = random.Random(f"{self._weather.seed}/{key}").choice(scripts)
        splitter = ThinkSplitter("auto")
        splitter.add_content(drawn if self._temperature(body) > 0 else scripts[0], 0.0)
        splitter.finish()
        prompt = estimate_tokens("\n".join(m["content"] for m in body["messages"]))
        return Answer(_words(splitter.reasoning), _words(splitter.answer), prompt)


def key_of(body: dict[str, Any]) -> str:
    """Names a draw of a question: equal for requests that ask for the very same."""
    wanted = {k: body.get(k) for k in ("messages", "seed", "temperature", "top_p", "max_tokens")}
    return json.dumps(wanted, sort_keys=True, ensure_ascii=False)


def _system(body: dict[str, Any]) -> str:
    return "\n".join(m["content"] for m in body["messages"] if m["role"] == "system")


def _words(text: str) -> tuple[str, ...]:
    """Pieces of about a token: a word with the space before it, a Chinese character, a line break."""
    return tuple(re.findall(r"\s?[^\s\u2e80-\uffff]{1,6}|\s?[\u2e80-\uffff]|\s", text))


def _spoken(reply: Reply) -> Answer:
    return Answer(
        _evenly(reply.reasoning, reply.usage.reasoning_tokens or 0),
        _evenly(reply.answer, reply.usage.answer_tokens or 0),
        reply.usage.prompt_tokens or 0,
        reply.finish_reason or "stop",
    )


def _evenly(text: str, pieces: int) -> tuple[str, ...]:
    """`text` in as many pieces as the model's tokens, so that pace and token counts agree."""
    pieces = min(max(pieces, 1), len(text))
    return tuple(text[len(text) * i // pieces : len(text) * (i + 1) // pieces] for i in range(pieces))
