"""Read one Chat Completions response, streamed or whole, from bytes to text, usage and an ending.

Takes any byte stream and never raises on one. Follows the server-sent events format of the HTML standard
and the Chat Completions shapes that R1's providers send. Knows nothing about sockets.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable
from typing import Any, Literal

from dsr1kit.access import outcomes
from dsr1kit.records import Outcome, ReasoningMode, Usage
from dsr1kit.thinking import Kind, Piece, ThinkSplitter, mended

_MOST_BYTES = 64 * 1024 * 1024  # of a body that is not a stream, or of one line of a stream
_LINES_A_LOOK = 16  # lines parsed between two looks at the clock
_MOST_TOKENS = 2**53  # no reply is longer; from here on floats stop counting, and far above they overflow


class CompletionReader:
    """Turns the bytes of a 200 response into pieces of text and facts.

    Args:
        mode, thinks: where the reasoning is, and whether there ought to be some (see ThinkSplitter).
        now: the clock that slices are measured by, in seconds.
        on_pieces: called with each new list of pieces, as they are read.
    """

    def __init__(
        self,
        mode: ReasoningMode,
        now: Callable[[], float],
        on_pieces: Callable[[list[Piece]], None] | None = None,
        *,
        thinks: bool = False,
    ) -> None:
        self.splitter = ThinkSplitter(mode, thinks=thinks)
        self._mode = mode
        self._now = now
        self._on_pieces = on_pieces
        self._form: Literal["unknown", "stream", "json", "html"] = "unknown"
        self._pending: deque[tuple[float, bytes]] = deque()
        self._read: deque[bytes] = deque()
        self._read_at = 0.0
        self._tail = bytearray()
        self._half: tuple[Kind, str] | None = None
        self._body = bytearray()
        self._whole_at = 0.0
        self._in_event = self._in_comment = False
        self._data: list[str] = []
        self._event = ""
        self._fault: tuple[Outcome, str] | None = None
        self._usage: dict[str, Any] | None = None
        self._garbage = ""
        self.keep_alives = 0
        self.chunks = 0
        self.done = False
        self.finish_reason: str | None = None
        self.model_served: str | None = None
        self.last_text_at: float | None = None

    @property
    def complete(self) -> bool:
        """Whether the far side said that it was done: `[DONE]`, a finish reason, a whole JSON answer."""
        return self.done or self.finish_reason is not None or self._fault is not None

    def feed(self, data: bytes, at: float) -> None:
        """Bytes of the body, read at the time `at`; parsed by `parse_some`."""
        self._pending.append((at, data))

    def parse_some(self, until: float) -> bool:
        """Parse what was fed until the clock shows `until`; True when some is left."""
        while not self._lines(until):
            if not self._pending:
                return False
            at, data = self._pending.popleft()
            if self._form == "unknown":
                data = self._sniff(data)
            if self._form in ("json", "html"):
                self._whole(data, at)
            elif self._form == "stream":
                self._split(data, at)
        return True

    def _sniff(self, data: bytes) -> bytes:
        """Learn the form from the first byte that is not white space; earlier line ends are keep-alives."""
        bare = data.lstrip(b" \t\r\n\xef\xbb\xbf")
        self.keep_alives += data[: len(data) - len(bare)].count(b"\n")
        if not bare:
            return b""
        first = bare[:1]
        self._form = "json" if first in b"{[" else "html" if first == b"<" else "stream"
        return bare

    def _whole(self, data: bytes, at: float) -> None:
        if len(self._body) < _MOST_BYTES:
            self._body += data
        self._whole_at = at

    def _split(self, data: bytes, at: float) -> None:
        first, line_end, rest = data.partition(b"\n")
        self._tail += first  # in place: a long line in many reads would be copied with each of them
        if line_end:
            *lines, tail = rest.split(b"\n")
            self._read.append(bytes(self._tail))
            self._read.extend(lines)
            self._tail = bytearray(tail)
        self._read_at = at
        if len(self._tail) > _MOST_BYTES:
            self._set_fault(Outcome.NOT_AN_ANSWER, "a line of over 64 MiB")
            self._tail = bytearray()

    def _lines(self, until: float) -> bool:
        """Parse lines until the clock shows `until`; True when some are left."""
        number = 0
        while self._read:
            for part in self._read.popleft().removesuffix(b"\r").split(b"\r"):
                self._line(part, self._read_at)
            number += 1
            if number % _LINES_A_LOOK == 0 and self._read and self._now() >= until:
                return True
        return False

    def _line(self, line: bytes, at: float) -> None:
        if line.startswith(b"data:"):
            self._in_event, self._in_comment = True, False
            text = line[5:].decode("utf-8", "replace")
            self._data.append(text[1:] if text.startswith(" ") else text)
            # One line is one event nearly everywhere; waiting for the blank line would cost time.
            if len(self._data) == 1:
                self._event_data(at, last=False)
        elif not line:
            if self._data:
                self._event_data(at, last=True)
            elif not self._in_event and not self._in_comment:
                self.keep_alives += 1
            self._in_event, self._in_comment, self._event = False, False, ""
        elif line.startswith(b":"):
            if not self._in_event:  # the blank line after it belongs to it
                self.keep_alives += 1
                self._in_comment = True
        elif line.startswith(b"event:"):
            self._event = line[6:].strip().decode("utf-8", "replace")
        elif not line.startswith((b"id:", b"retry:")):
            self._garbage = self._garbage or line[:120].decode("utf-8", "replace")

    def _event_data(self, at: float, *, last: bool) -> None:
        text = "\n".join(self._data).strip()
        if text == "[DONE]":
            self.done = True
        elif text and not self.done:
            try:
                event = _parse(text)
            except (ValueError, RecursionError):
                if not last:
                    return  # may go on in the next data line
                if self._event == "error":
                    self._set_error(text)
                else:
                    self._set_fault(Outcome.NOT_AN_ANSWER, f'the stream holds broken JSON "{text[:80]}"')
            else:
                self._chunk(event, at)
        self._data = []

    def _chunk(self, event: Any, at: float) -> None:
        if not isinstance(event, dict):
            self._set_fault(Outcome.NOT_AN_ANSWER, f"the stream holds {type(event).__name__} instead of an object")
            return
        if event.get("error") or self._event == "error" or event.get("object") == "error":
            self._set_error(event.get("error") or event)
            return
        if isinstance(event.get("usage"), dict):
            self._usage = event["usage"]
        model = event.get("model")
        if isinstance(model, str) and model and model != self.model_served:
            self.model_served = mended(model)
        choices = event.get("choices")
        choice = choices[0] if isinstance(choices, list) and choices else None
        if isinstance(choice, dict) and choice.get("index"):
            return  # a second answer, which nobody asked for
        if not isinstance(choice, dict):
            return
        message = choice.get("delta") or choice.get("message")
        if isinstance(message, dict):
            self._text(message, at)
        reason = choice.get("finish_reason")
        if isinstance(reason, str) and reason:
            self.finish_reason = mended(reason)
        if isinstance(choice.get("error"), dict):
            self._set_error(choice["error"])

    def _text(self, message: dict[str, Any], at: float) -> None:
        reasoning = ""
        if self._mode in ("auto", "reasoning_content", "inline"):
            reasoning = _flat(message.get("reasoning_content"))
        if not reasoning and self._mode in ("auto", "reasoning", "inline"):
            reasoning = _flat(message.get("reasoning"))
        content = _flat(message.get("content"))
        if not reasoning and not content:
            return
        self.chunks += 1
        self.last_text_at = at
        pieces = self._add("reasoning", reasoning, at) if reasoning else []
        if content:
            pieces += self._add("answer", content, at)
        if pieces and self._on_pieces is not None:
            self._on_pieces(pieces)

    def _add(self, field: Kind, text: str, at: float) -> list[Piece]:
        """Text of a field to the splitter, in whole characters.

        JSON can hold halves of a character, and providers that count in UTF-16 cut between them: a first half
        waits for the field's next text. Whoever is shown the pieces live could not write halves.
        """
        add = self.splitter.add_reasoning if field == "reasoning" else self.splitter.add_content
        if self._half is None and text.isascii():
            return add(text, at)
        pieces = []
        if self._half is not None:
            waiting, half = self._half
            self._half = None
            if waiting == field:
                text = half + text
            else:
                pieces = self._add(waiting, "\ufffd", at)
        if "\ud800" <= text[-1] <= "\udbff":
            self._half = field, text[-1]
            text = text[:-1]
        return pieces + add(mended(text), at)

    def _set_error(self, error: Any) -> None:
        try:
            outcome, words = outcomes.from_error_event(error)
        except (ValueError, RecursionError):  # digits that make no number, nesting that can be read but not told
            outcome, words = _told(Outcome.OVERLOADED, "error in the response")
        self._set_fault(outcome, words, told=True)

    def _set_fault(self, outcome: Outcome, fact: str, *, told: bool = False) -> None:
        if self._fault is None:
            self._fault = (outcome, fact if told else outcomes.detail(outcome, fact))

    def finish(self, *, broken: str = "") -> tuple[Outcome, str]:
        """The body is over; `broken` says how, when the connection ended before the response did.

        Returns the outcome and its detail.
        """
        while self.parse_some(float("inf")):
            pass
        if self._form == "json":
            self._finish_json(broken)
        elif self._form == "stream":
            self._finish_stream(broken)
        stopped = self.finish_reason in ("length", "max_tokens") or not self.complete
        pieces = []
        if self._half is not None:
            field, self._half = self._half[0], None
            pieces = self._add(field, "\ufffd", self.last_text_at or 0.0)
        pieces += self.splitter.finish(truncated=stopped)
        if pieces and self._on_pieces is not None:
            self._on_pieces(pieces)
        outcome, words = self._verdict(broken)
        return outcome, mended(words)

    def _finish_stream(self, broken: str) -> None:
        """The last line, when no line end came after it; all lines, where they end in CR alone."""
        at = self._read_at
        *lines, last = bytes(self._tail).split(b"\r")
        for line in lines:
            self._line(line, at)
        if last.startswith(b"data:") or (last and not broken):
            self._line(last, at)
        self._tail = bytearray()
        if self._data and not broken:
            text = "\n".join(self._data).strip()
            if not text.startswith("{") or self._event == "error":
                self._event_data(at, last=True)
            # An object that never closes: the stream was cut inside its last line.

    def _finish_json(self, broken: str) -> None:
        try:
            whole = json.loads(self._body.decode("utf-8", "replace"))
        except (ValueError, RecursionError):
            if not broken:
                self._set_fault(Outcome.NOT_AN_ANSWER, "the body is broken JSON")
            return
        told = isinstance(whole, dict) and ("choices" in whole or "error" in whole or whole.get("object") == "error")
        if not told:
            keys = ", ".join(key[:40] for key in list(whole)[:5]) if isinstance(whole, dict) else type(whole).__name__
            self._set_fault(Outcome.NOT_AN_ANSWER, f"the body is JSON without choices ({keys})")
            return
        self.done = True
        self._chunk(whole, self._whole_at)

    def _verdict(self, broken: str) -> tuple[Outcome, str]:
        if self._form == "html":
            return _told(Outcome.NOT_AN_ANSWER, "HTTP 200 with an HTML page")
        if self._fault is not None:
            return self._fault
        reason = self.finish_reason
        if reason in ("length", "max_tokens"):
            return _told(Outcome.TRUNCATED, f"finish_reason {reason}")
        if reason in ("content_filter", "sensitive"):
            return _told(Outcome.FILTERED, f"finish_reason {reason}")
        if reason in ("insufficient_system_resource", "error", "aborted"):
            return _told(Outcome.OVERLOADED, f"finish_reason {reason} in an HTTP 200")
        if not self.complete:
            return self._unfinished(broken)
        if not self.splitter.answer.strip():
            what = "reasoning but no answer" if self.splitter.reasoning.strip() else "no text at all"
            return _told(Outcome.EMPTY, f"the response holds {what}")
        return Outcome.OK, ""

    def _unfinished(self, broken: str) -> tuple[Outcome, str]:
        if self._form == "unknown" and not broken and not self.keep_alives:
            return _told(Outcome.EMPTY, "HTTP 200 with an empty body")
        if self._garbage and self.chunks == 0:
            return _told(Outcome.NOT_AN_ANSWER, f'HTTP 200 with "{self._garbage}"')
        where = "before any text"
        if self.chunks:
            where = "inside the answer" if self.splitter.answer.strip() else "inside the reasoning"
        waited = f" after {self.keep_alives} keep-alives" if self.keep_alives and not self.chunks else ""
        return _told(Outcome.CUT, f"{broken or 'the stream ended without finish_reason or [DONE]'}, {where}{waited}")

    def usage(self, prompt: str) -> Usage:
        """Token counts: the provider's where it sent them, otherwise estimated from the text's length."""
        reasoning_text, answer_text = self.splitter.reasoning, self.splitter.answer
        told = self._usage or {}
        completion = _count(told.get("completion_tokens"))
        if completion is None:
            if not self.chunks:
                return Usage()
            return Usage(estimate_tokens(prompt), estimate_tokens(reasoning_text), estimate_tokens(answer_text))
        details = told.get("completion_tokens_details")
        reasoning = _count(details.get("reasoning_tokens")) if isinstance(details, dict) else None
        split_known = reasoning is not None and (reasoning > 0 or not reasoning_text)
        if not split_known or reasoning is None:
            about = estimate_tokens(reasoning_text)
            reasoning = round(completion * about / max(1, about + estimate_tokens(answer_text)))
        reasoning = min(reasoning, completion)
        return Usage(
            prompt_tokens=_count(told.get("prompt_tokens")),
            reasoning_tokens=reasoning,
            answer_tokens=completion - reasoning,
            source="provider",
            split_source="provider" if split_known else "estimated",
        )


_raw_decode = json.JSONDecoder().raw_decode


def _parse(text: str) -> Any:
    """What json.loads gives for text without white space around it, at half the cost."""
    value, end = _raw_decode(text)
    if end != len(text):
        raise ValueError("more than one value")
    return value


def estimate_tokens(text: str) -> int:
    """Tokens in `text` by DeepSeek's rule of thumb: 0.6 a Chinese character, 0.3 any other."""
    if not text:
        return 0
    # The count goes over every character, in the event loop; the usual text needs none.
    wide = 0 if text.isascii() else sum(1 for c in text if c >= "\u2e80")
    return max(1, round(0.6 * wide + 0.3 * (len(text) - wide)))


def _told(outcome: Outcome, fact: str) -> tuple[Outcome, str]:
    return outcome, outcomes.detail(outcome, fact)


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _MOST_TOKENS else None


def _flat(value: Any) -> str:
    """Text of a field that is a string, null, or a list of text parts."""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        # Text alone, not lists again: nesting that JSON can be read with is too deep to follow by calls.
        texts = (part.get("text") for part in value if isinstance(part, dict))
        return "".join(text for text in texts if isinstance(text, str))
    return ""
