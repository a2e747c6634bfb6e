"""AWS Bedrock's Converse: its request, its signature, and its event stream read as a Chat Completions stream.

Signs and sends nothing by itself: the measuring client does the sending, because boto3's own client blocks and
keeps no times. botocore gives the credentials, the signature and the checks of a frame. Knows nothing about
connections or clocks. Converse has no seed, and no cap on thinking for R1: both are left out of the body.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import struct
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

from dsr1kit import keys
from dsr1kit.access import outcomes
from dsr1kit.access.stream import CompletionReader
from dsr1kit.errors import MissingExtra, MissingKey, UsageError
from dsr1kit.records import Message, Outcome, ReasoningMode, Sampling
from dsr1kit.thinking import Piece, mended

if TYPE_CHECKING:
    from dsr1kit.access.channels import Channel

_PRELUDE_BYTES, _CHECKSUM_BYTES = 12, 4  # before and after a frame's headers and payload
_STEPS_A_LOOK = 16  # preludes and frames read between two looks at the clock
_REGION = re.compile(r"(?:^|\.)bedrock-runtime(?:-fips)?\.([a-z0-9-]+)\.")
_HOST = "base_url (https://bedrock-runtime.REGION.amazonaws.com)"
_ADVICE = {
    Outcome.NOT_AN_ANSWER: f"this is not a Converse event stream; check {_HOST}",
    Outcome.UNKNOWN_MODEL: f"the model does not exist here; check the model's id (us.deepseek...) and {_HOST}",
}
_STOP_REASONS = {
    "end_turn": "stop",
    "stop_sequence": "stop",
    "max_tokens": "length",
    "model_context_window_exceeded": "length",
    "content_filtered": "content_filter",
    "guardrail_intervened": "content_filter",
}
#: AWS's names of errors, lower-cased, without "Exception": statuses alone would mislead (a full quota is a 400).
_ERRORS = {
    **dict.fromkeys(("throttling", "toomanyrequests", "servicequotaexceeded"), Outcome.THROTTLED),
    **dict.fromkeys(("accessdenied", "unrecognizedclient", "expiredtoken"), Outcome.UNAUTHORIZED),
    **dict.fromkeys(("invalidsignature", "incompletesignature", "missingauthenticationtoken"), Outcome.UNAUTHORIZED),
    "resourcenotfound": Outcome.UNKNOWN_MODEL,
    "validation": Outcome.BAD_REQUEST,
    **dict.fromkeys(("modelnotready", "modeltimeout", "modelerror", "modelstreamerror"), Outcome.OVERLOADED),
    **dict.fromkeys(("serviceunavailable", "internalserver"), Outcome.OVERLOADED),
}
#: Names that cover several conditions, and the conditions that their words may tell apart.
_VAGUE = (Outcome.UNAUTHORIZED, Outcome.UNKNOWN_MODEL, Outcome.BAD_REQUEST)
_TOLD_APART = (Outcome.NO_BALANCE, Outcome.RETIRED, Outcome.UNKNOWN_MODEL, Outcome.FILTERED)


class BedrockConverse:
    """The protocol for one channel: `key` is a Bedrock API key; None: AWS credentials sign each request.

    A channel that names no key variable needs neither (a gateway that signs, the emulator).

    Credentials are looked for once, here, and may be asked of the machine's metadata service (a second or two).

    Raises:
        MissingExtra: botocore (for AWS credentials: boto3) is not installed.
        MissingKey: neither a key nor AWS credentials.
        UsageError: the key cannot be sent in a header.
    """

    def __init__(self, channel: Channel, key: str | None) -> None:
        self._channel, self._key = channel, key
        self._source: Any = None
        self._credentials: Any = None
        self._region: str | None = None
        self._aws_errors: tuple[type[Exception], ...] = ()
        try:
            import botocore.eventstream  # noqa: F401 - told now, not in the middle of the first reply
        except ImportError:
            raise MissingExtra("AWS Bedrock", "bedrock", "boto3") from None
        self._open = key is None and not channel.api_key_env
        for value in (key,) if key is not None or self._open else self._find_credentials():
            if value and not (value.isascii() and value.isprintable()):
                raise UsageError(
                    f"{channel.api_key_env if key else 'one of the AWS credentials'} holds a character that no key has "
                    "(a line break, a typographic quote): copy it again"
                )

    def body(self, messages: Sequence[Message], sampling: Sampling) -> dict[str, Any]:
        """The request's JSON body; `maxTokens` is clamped to the channel's `max_output`.

        Left out: `seed` and the bounds on thinking, which Converse does not have. A temperature above 1, Bedrock's
        limit, is passed on: the service's refusal says more than a silent change would.
        """
        turns = [m for m in messages if m["role"] != "system"]
        body: dict[str, Any] = {
            "messages": [{"role": m["role"], "content": [{"text": m["content"]}]} for m in turns],
            "inferenceConfig": {
                "maxTokens": min(sampling.max_tokens, self._channel.max_output or sampling.max_tokens),
                "temperature": sampling.temperature,
                "topP": sampling.top_p,
            },
        }
        if sampling.stop:
            body["inferenceConfig"]["stopSequences"] = list(sampling.stop)
        if system := [{"text": m["content"]} for m in messages if m["role"] == "system"]:
            body["system"] = system
        return body

    def request(self, base_url: str, payload: bytes) -> tuple[str, dict[str, str]]:
        """The model's path; the key as a bearer token, or AWS's signature (version 4) made now.

        Credentials that are about to expire are renewed first, which asks their source and waits for it.
        """
        path = f"/model/{quote(self._channel.model, safe='')}/converse-stream"
        headers = {"Content-Type": "application/json"}
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key}"
        elif not self._open:
            headers = self._signed(base_url, path, headers, payload)
        return path, headers | {"Accept": "application/vnd.amazon.eventstream, application/json"}

    def reader(self, now: Callable[[], float], on_pieces: Callable[[list[Piece]], None] | None) -> ConverseReader:
        """A reader of an event stream; HTML and JSON in its place are told."""
        mode = self._channel.reasoning
        if mode == "reasoning":  # Converse's own block is handed on under one name, whatever the catalogue calls it
            mode = "reasoning_content"
        return ConverseReader(mode, now, on_pieces, thinks=self._channel.family in ("r1", "r1-distill"))

    def refusal(self, status: int, headers: Mapping[str, str], body: bytes) -> tuple[Outcome, str]:
        """By AWS's name of the error, then by status and words; the name is in the detail."""
        try:
            told = json.loads(body)
        except (ValueError, RecursionError):
            told = None
        told = told if isinstance(told, dict) else {}
        name = _name(headers.get("x-amzn-errortype") or told.get("__type"))
        if name:
            body = json.dumps({"message": _sentence(name, told)}).encode()
        return _judged(name, *outcomes.from_status(status, body))

    def _find_credentials(self) -> Sequence[str | None]:
        """Look for them and keep them; returns access key, secret key and session token."""
        try:
            import boto3
            from botocore.exceptions import BotoCoreError, ClientError
        except ImportError:
            raise MissingExtra("AWS Bedrock with AWS keys", "bedrock", "boto3") from None
        self._aws_errors = (BotoCoreError, ClientError)
        try:
            session = boto3.Session()
            self._source, self._region = session.get_credentials(), session.region_name
            self._credentials = self._source and self._source.get_frozen_credentials()
        except self._aws_errors as error:  # a profile that does not exist, a login that has expired
            raise self._missing(f"AWS's configuration cannot be used ({keys.redact(str(error))})") from None
        if self._credentials is None:
            raise self._missing("there are no AWS credentials either")
        return self._secrets()

    def _secrets(self) -> Sequence[str | None]:
        """Access key, secret key and session token: redacted from now on."""
        secrets: tuple[str | None, ...] = tuple(self._credentials[:3])  # the fourth is the account's number
        for value in secrets:
            keys.remember(value)
        return secrets

    def _missing(self, why: str) -> MissingKey:
        variable = self._channel.api_key_env or "AWS_BEARER_TOKEN_BEDROCK"
        return MissingKey(
            f"channel {self._channel.name!r} needs an API key of Bedrock and {variable} is not set, and {why}: "
            f"export {variable}=..., or AWS_ACCESS_KEY_ID=... and AWS_SECRET_ACCESS_KEY=..., or AWS_PROFILE=..."
        )

    def _signed(self, base_url: str, path: str, headers: dict[str, str], payload: bytes) -> dict[str, str]:
        from botocore.auth import SigV4Auth
        from botocore.awsrequest import AWSRequest

        # Not renewed, it is the service's to refuse them: a run of many requests then tells it as an outcome.
        with contextlib.suppress(*self._aws_errors):
            self._credentials = self._source.get_frozen_credentials()
        self._secrets()
        url = urlsplit(base_url)
        found = _REGION.search(url.hostname or "")
        region = found.group(1) if found else self._region or "us-east-1"
        # As the pool writes it, quoted once: the signature quotes the path a second time by itself. The Host line,
        # written by the pool as well, is derived from this URL by the same rule.
        url = url._replace(path=url.path.rstrip("/") + path)
        request = AWSRequest(method="POST", url=url.geturl(), data=payload, headers=headers)
        SigV4Auth(self._credentials, "bedrock", region).add_auth(request)
        return dict(request.headers.items())


class ConverseReader(CompletionReader):
    """Turns the frames of a 200 response into what CompletionReader understands; never raises on any bytes."""

    def __init__(
        self,
        mode: ReasoningMode,
        now: Callable[[], float],
        on_pieces: Callable[[list[Piece]], None] | None = None,
        *,
        thinks: bool = False,
    ) -> None:
        from botocore.eventstream import EventStreamBuffer, ParserError

        super().__init__(mode, now, on_pieces, thinks=thinks)
        self._frames: Any = EventStreamBuffer()
        self._broken_frame = (ParserError, struct.error, KeyError, ValueError)
        self._wanted = _PRELUDE_BYTES
        self._in_frame = False

    def finish(self, *, broken: str = "") -> tuple[Outcome, str]:
        """See CompletionReader.finish; the advice is Bedrock's."""
        outcome, words = super().finish(broken=broken)
        return outcome, _readvised(words, outcome, outcome)

    def _split(self, data: bytes, at: float) -> None:
        if self._wanted < sys.maxsize:
            self._tail += data
        self._read_at = at

    def _lines(self, until: float) -> bool:
        """Read frames until the clock shows `until`; True when some are left.

        A frame is handed to botocore in two steps, the prelude (whose lengths it checks) and the whole rest: its
        buffer copies what it holds with everything that is added.
        """
        steps = 0
        while len(self._tail) >= self._wanted:
            if steps and steps % _STEPS_A_LOOK == 0 and self._now() >= until:
                return True
            steps += 1
            taken = bytes(self._tail[: self._wanted])
            del self._tail[: self._wanted]
            try:
                message = self._step(taken)
            except self._broken_frame as error:
                self._stop(f"{type(error).__name__}: {error}", b"" if self._in_frame else taken)
            else:
                if message is not None:
                    self._message(message.headers, message.payload)
        return False

    def _step(self, taken: bytes) -> Any:
        """A frame's message, after its second step."""
        self._frames.add_data(taken)
        if self._in_frame:
            message = next(self._frames)
            self._in_frame, self._wanted = False, _PRELUDE_BYTES
            return message
        total, headers = struct.unpack("!II", taken[:8])
        if total < _PRELUDE_BYTES + headers + _CHECKSUM_BYTES:
            raise ValueError("its lengths do not fit together")
        next(self._frames, None)  # checks the prelude; the message is not there yet
        self._in_frame, self._wanted = True, total - _PRELUDE_BYTES
        return None

    def _stop(self, why: str, start: bytes = b"") -> None:
        """Nothing after a broken frame can be trusted, not even where the next one begins."""
        fact = f"the stream holds a broken frame ({why})"
        text = start.decode("utf-8", "replace")
        if start and start[0] and text.isprintable():  # a length of gigabytes: these are words, not a frame
            fact = f'HTTP 200 with "{text}..." in place of a frame'
        self._set_fault(Outcome.NOT_AN_ANSWER, fact)
        self._tail, self._wanted = bytearray(), sys.maxsize

    def _message(self, headers: Mapping[str, Any], payload: bytes) -> None:
        try:
            told = json.loads(payload.decode("utf-8", "replace")) if payload.strip() else {}
        except (ValueError, RecursionError):
            told = None
        kind = headers.get(":message-type")
        if kind in ("exception", "error"):
            name = _name(headers.get(":exception-type") or headers.get(":error-code")) or "an error without a name"
            said = told if isinstance(told, dict) else {}
            error = {"message": _sentence(name, {"message": headers.get(":error-message"), **said})}
            self._set_fault(*_judged(name, *outcomes.from_error_event(error)), told=True)
        elif kind != "event" or not isinstance(told, dict):
            self._stop("its payload is not a JSON object" if kind == "event" else "it does not say what it is")
        elif event := _as_chunk(headers.get(":event-type"), told):
            self._chunk(event, self._read_at)

    def _finish_stream(self, broken: str) -> None:
        """What is left: the beginning of a frame that was cut, or a few words that are none."""
        if self._tail and self._tail[0] and not self._in_frame and not broken:
            self._stop("it is shorter than a frame", bytes(self._tail))

    def _unfinished(self, broken: str) -> tuple[Outcome, str]:
        if self._form == "stream":
            broken = broken or "the stream ended without messageStop"
        return super()._unfinished(broken)


def credentials_present(bearer_variable: str) -> bool:
    """Whether a Bedrock API key or AWS credentials are at hand, by environment and files alone.

    Credentials that a machine's metadata service would give are not seen: asking it would block.
    """
    if bearer_variable and keys.find_key(bearer_variable) is not None:
        return True

    def is_set(name: str) -> bool:
        return bool(os.environ.get(name, "").strip())

    if (is_set("AWS_ACCESS_KEY_ID") and is_set("AWS_SECRET_ACCESS_KEY")) or is_set("AWS_PROFILE"):
        return True
    path = os.environ.get("AWS_SHARED_CREDENTIALS_FILE", "").strip() or "~/.aws/credentials"
    return os.path.isfile(os.path.expanduser(path))  # noqa: PTH111, PTH113 - Path.expanduser raises without a home


def _as_chunk(kind: Any, told: dict[str, Any]) -> dict[str, Any] | None:
    """An event in the shape of a Chat Completions chunk; None: it says nothing that is needed."""
    if kind == "messageStart":
        return _choice({"role": told.get("role")})
    if kind == "contentBlockDelta":
        delta = _part(told, "delta")
        # `signature` and `redactedContent`, the other things reasoning may hold, are no text.
        return _choice(
            {"reasoning_content": _part(delta, "reasoningContent").get("text"), "content": delta.get("text")}
        )
    if kind == "messageStop":
        reason = told.get("stopReason")
        return _choice({}, _STOP_REASONS.get(reason, reason) if isinstance(reason, str) else None)
    if kind == "metadata":
        usage = _part(told, "usage")
        return {"usage": {"prompt_tokens": usage.get("inputTokens"), "completion_tokens": usage.get("outputTokens")}}
    return None


def _choice(delta: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
    return {"choices": [{"delta": delta, "finish_reason": finish_reason}]}


def _part(value: dict[str, Any], key: str) -> dict[str, Any]:
    part = value.get(key)
    return part if isinstance(part, dict) else {}


def _name(value: Any) -> str:
    """An error's name alone, of `com.amazon...#ThrottlingException:http://...`."""
    return value.split(":")[0].rpartition("#")[2].strip()[:80] if isinstance(value, str) else ""


def _sentence(name: str, told: Mapping[str, Any]) -> str:
    said = next((t for t in map(told.get, ("message", "Message", "originalMessage")) if isinstance(t, str) and t), "")
    # Redacted before anything is shortened: AWS quotes the signed headers, and a cut token is not recognized.
    return mended(keys.redact(f"{name}: {said}" if said else name))


def _judged(name: str, guess: Outcome, words: str) -> tuple[Outcome, str]:
    """The outcome that an error's name means; `guess` is what status and words mean without it."""
    outcome = _ERRORS.get(name.lower().removesuffix("exception"), guess)
    if outcome in _VAGUE and guess in _TOLD_APART:
        outcome = guess
    return outcome, _readvised(words, guess, outcome)


def _readvised(words: str, was: Outcome, outcome: Outcome) -> str:
    """A detail that ends in the advice for `was`, with Bedrock's advice for `outcome` instead."""
    general = outcomes.detail(was)
    if not general or not words.endswith(general):
        return words
    return words.removesuffix(general) + (_ADVICE.get(outcome) or outcomes.detail(outcome))
