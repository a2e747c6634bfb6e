"""The words every room speaks: messages, sampling, outcomes, timing, usage, replies, verdicts.

All frozen dataclasses; behaviour lives elsewhere. Durations are seconds and end in `_s`.
Knows nothing about HTTP, models, files or statistics.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal, Protocol, TypedDict

from dsr1kit.errors import OutcomeError, UsageError


class Message(TypedDict):
    """One turn of a conversation, in Chat Completions form."""

    role: str
    content: str


class Outcome(StrEnum):
    """How a request ended: the far side's conditions, then the caller's own three."""

    OK = "ok"
    TRUNCATED = "truncated"
    FILTERED = "filtered"
    THROTTLED = "throttled"
    OVERLOADED = "overloaded"
    QUEUED = "queued"
    STALLED = "stalled"
    CUT = "cut"
    EMPTY = "empty"
    NOT_AN_ANSWER = "not_an_answer"
    NO_BALANCE = "no_balance"
    UNAUTHORIZED = "unauthorized"
    UNKNOWN_MODEL = "unknown_model"
    RETIRED = "retired"
    BAD_REQUEST = "bad_request"
    UNREACHABLE = "unreachable"
    DEADLINE = "deadline"
    OVER_BUDGET = "over_budget"
    CANCELLED = "cancelled"


#: Outcomes that hold an answer to judge; one stopped by length counts too, as it stands.
ANSWERED = frozenset({Outcome.OK, Outcome.TRUNCATED})
#: Outcomes that mean "come back later", in the sense of the famous message.
BUSY = frozenset({Outcome.THROTTLED, Outcome.OVERLOADED, Outcome.QUEUED, Outcome.STALLED})

Verdict = Literal["right", "wrong", "unscored"]
ReasoningMode = Literal["auto", "reasoning_content", "reasoning", "inline"]
TokenCountSource = Literal["provider", "tokenizer", "estimated"]


def require_messages(messages: Sequence[Message]) -> None:
    """Raise UsageError unless `messages` is a non-empty sequence of role and content strings."""
    if isinstance(messages, str) or not messages:
        raise UsageError('messages must be a list such as [{"role": "user", "content": "..."}]')
    for number, message in enumerate(messages):
        role, content = (message.get(k) if isinstance(message, Mapping) else None for k in ("role", "content"))
        if role not in ("system", "user", "assistant") or not isinstance(content, str):
            raise UsageError(
                f"message {number} needs a role (system, user or assistant) and a content string, not {message!r:.80}"
            )


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to draw an answer; the defaults are those of DeepSeek R1's model card.

    Args:
        temperature: 0 means greedy; R1's card recommends 0.5 to 0.7.
        top_p: nucleus sampling mass, above 0 and at most 1.
        max_tokens: cap on reasoning and answer tokens together; clamped to a channel's `max_output`.
        seed: makes draws repeatable where the far side honours it; None leaves it to the far side.
        max_thinking_tokens: close the thinking after this many tokens (where supported); None: no cap.
        sample: which of several independent draws of one question this is, counted from 0.
        min_thinking_tokens: a local model that would close its thinking sooner is made to go on with "Wait,"
            (budget forcing, arXiv 2501.19393); hosted channels have no such thing and are asked without it.
        stop: the answer ends before the first of these strings; they are not looked for in the reasoning.
            Hosted channels are handed them as they are.
    """

    temperature: float = 0.6
    top_p: float = 0.95
    max_tokens: int = 32768
    seed: int | None = None
    max_thinking_tokens: int | None = None
    sample: int = 0
    min_thinking_tokens: int | None = None
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        def check(name: str, ok: bool, wanted: str) -> None:
            if not ok:
                raise UsageError(f"Sampling.{name} must be {wanted}, not {getattr(self, name)!r}")

        check("temperature", _is_number(self.temperature) and self.temperature >= 0, "a number of at least 0")
        check("top_p", _is_number(self.top_p) and 0 < self.top_p <= 1, "a number above 0 and at most 1")
        check("max_tokens", _is_int(self.max_tokens) and self.max_tokens >= 1, "a whole number of at least 1")
        check("seed", self.seed is None or _is_int(self.seed), "a whole number or None")
        for name, value in (("max", self.max_thinking_tokens), ("min", self.min_thinking_tokens)):
            ok = value is None or (_is_int(value) and value >= 1)
            check(f"{name}_thinking_tokens", ok, "a whole number of at least 1, or None")
        if self.max_thinking_tokens is not None and self.min_thinking_tokens is not None:
            fits = self.min_thinking_tokens <= self.max_thinking_tokens
            check("min_thinking_tokens", fits, f"at most max_thinking_tokens ({self.max_thinking_tokens})")
        strings = isinstance(self.stop, tuple) and all(isinstance(word, str) and word for word in self.stop)
        check("stop", strings, "a tuple of strings that are not empty")
        check("sample", _is_int(self.sample) and self.sample >= 0, "a whole number of at least 0")

    def draw_seed(self) -> int | None:
        """The seed of this very draw, in 0 .. 2**31-1: `seed` and `sample` mixed, so samples differ."""
        if self.seed is None:
            return None
        digest = hashlib.sha256(f"{self.seed}/{self.sample}".encode()).digest()
        return int.from_bytes(digest[:4], "big") >> 1


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


R1_SAMPLING = Sampling()


@dataclass(frozen=True, slots=True)
class Timing:
    """When things happened, in seconds from the moment the request was due; None: it never happened.

    Attributes:
        queue_s: due to sent, less `connect_s`: a late dispatch is the client's own fault and shows here.
        connect_s: DNS, TCP, proxy and TLS; 0.0 on a reused connection.
        connection_reused: whether a kept-alive connection carried the request.
        first_token_s: first chunk with reasoning or answer text (not role-only, empty or keep-alive).
        first_answer_s: first answer text that is not white space, after any reasoning.
        think_s: `first_answer_s - first_token_s`.
        inter_token_s: (last chunk - first chunk) / (completion tokens - 1).
        total_s: last chunk with text; where none came, the moment the outcome was known.
        gaps_s: time between consecutive chunks with text; chunks may hold several tokens.
    """

    queue_s: float | None = None
    connect_s: float | None = None
    connection_reused: bool = False
    first_token_s: float | None = None
    first_answer_s: float | None = None
    think_s: float | None = None
    inter_token_s: float | None = None
    total_s: float | None = None
    gaps_s: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts, and who counted them.

    Attributes:
        source: `provider` (its usage block), `tokenizer` (the model's own) or `estimated` (from text length).
        split_source: who told reasoning from answer tokens; a provider may count only their sum.
    """

    prompt_tokens: int | None = None
    reasoning_tokens: int | None = None
    answer_tokens: int | None = None
    source: TokenCountSource = "estimated"
    split_source: TokenCountSource = "estimated"

    @property
    def completion_tokens(self) -> int | None:
        """Reasoning and answer tokens together."""
        if self.reasoning_tokens is None and self.answer_tokens is None:
            return None
        return (self.reasoning_tokens or 0) + (self.answer_tokens or 0)


@dataclass(frozen=True, slots=True)
class Attempt:
    """One upstream call made on behalf of a request."""

    channel: str
    outcome: Outcome
    total_s: float | None


@dataclass(frozen=True, slots=True)
class Reply:
    """What came back for one request, whatever it was: `outcome` says how it ended, `detail` what to do.

    Attributes:
        due_at: seconds since the epoch at which the request was due.
        http_status: status of the last response, None when none came.
        headers: response headers, lower-cased; quota headers are read from here.
        extra: facts about the exchange that have no field of their own (keep-alives seen, chunks, ...).
    """

    outcome: Outcome
    detail: str = ""
    reasoning: str = ""
    answer: str = ""
    finish_reason: str | None = None
    channel: str = ""
    model_requested: str = ""
    model_served: str | None = None
    timing: Timing = Timing()
    usage: Usage = Usage()
    due_at: float | None = None
    http_status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    attempts: tuple[Attempt, ...] = ()
    from_cache: bool = False
    emulated: bool = False
    extra: dict[str, Any] = field(default_factory=dict)

    def raise_for_outcome(self) -> Reply:
        """Return self when the outcome is `ok`; raise OutcomeError otherwise."""
        if self.outcome is not Outcome.OK:
            raise OutcomeError(self.outcome.value, self.detail)
        return self


@dataclass(frozen=True, slots=True)
class Delta:
    """A piece of text as it arrives, `at_s` seconds after the request was due.

    Attributes:
        attempt: a router that asks again counts it up; text under a lower number is void.
    """

    kind: Literal["reasoning", "answer"]
    text: str
    at_s: float
    attempt: int = 0


OnDelta = Callable[[Delta], None]


class Backend(Protocol):
    """A way to R1: a hosted channel, a router, a cache before one, a model in the process."""

    name: str

    async def ask(
        self,
        messages: Sequence[Message],
        sampling: Sampling = R1_SAMPLING,
        *,
        on_delta: OnDelta | None = None,
        due: float | None = None,
    ) -> Reply:
        """Ask once and return a Reply for every condition of the far side.

        Args:
            messages: the conversation, last turn the user's.
            sampling: how to draw.
            on_delta: called with each piece of text as it arrives.
            due: `loop.time()` at which the request was due; None: now. Timing counts from it.

        Raises:
            UsageError: the call itself cannot be meant.
        """
        ...
