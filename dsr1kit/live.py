"""Show a reply in a terminal while it streams, and afterwards as JSON or as one line of timing."""

from __future__ import annotations

import re
from typing import Any

from rich.console import Console

from dsr1kit.keys import redact
from dsr1kit.records import Delta, Reply


class _Pipe(Console):
    def on_broken_pipe(self) -> None:
        # rich would end the process from within a callback of the connection; main() knows what to do.
        raise BrokenPipeError("the reader has left")


class LiveAnswer:
    """An answer on stdout as it arrives, thinking dimmed; each word whole, so that no key slips through."""

    _WORD = re.compile(r"(?:[Bb]earer )?[!-~]*\Z")

    def __init__(self) -> None:
        self._out = _Pipe(highlight=False, soft_wrap=True, markup=False, emoji=False)
        self._kind = self._held = ""
        self._begun = False

    def add(self, delta: Delta) -> None:
        """Show a piece, save the word that it may break."""
        if delta.kind != self._kind:
            self._release()
            if self._begun:
                self._out.print("\n\n", end="")
            self._kind, self._begun = delta.kind, False
        text = self._held + delta.text
        match = self._WORD.search(text)
        cut = match.start() if match else len(text)
        self._held = text[cut:]
        self._print(text[:cut])

    def end(self) -> None:
        """Show what was held back, and end the line."""
        self._release()
        self._out.print()

    def _release(self) -> None:
        self._print(self._held)
        self._held = ""

    def _print(self, text: str) -> None:
        text = redact(text) if self._begun else redact(text).lstrip("\n")
        if text:
            self._begun = True
            self._out.print(text, style="dim italic" if self._kind == "reasoning" else None, end="")


def reply_json(reply: Reply) -> dict[str, Any]:
    """A reply as one JSON object."""
    timing, usage = reply.timing, reply.usage
    return {
        "outcome": reply.outcome.value, "detail": reply.detail, "channel": reply.channel,
        "reasoning": reply.reasoning, "answer": reply.answer, "finish_reason": reply.finish_reason,
        "model_requested": reply.model_requested, "model_served": reply.model_served,
        "timing": {
            name: getattr(timing, name)
            for name in ("queue_s", "connect_s", "connection_reused", "first_token_s", "first_answer_s",
                         "think_s", "inter_token_s", "total_s")
        },
        "usage": {
            "prompt_tokens": usage.prompt_tokens, "reasoning_tokens": usage.reasoning_tokens,
            "answer_tokens": usage.answer_tokens, "token_count_source": usage.source,
            "token_split_source": usage.split_source,
        },
        "emulated": reply.emulated,
    }  # fmt: skip


def timing_line(reply: Reply) -> str:
    """Times, pace and token counts of a reply, for a person."""
    t, u = reply.timing, reply.usage
    parts = [reply.channel + (" (emulated)" if reply.emulated and not reply.channel.startswith("emulated:") else "")]
    for label, value in (
        ("first token", t.first_token_s),
        ("first answer", t.first_answer_s),
        ("whole", t.total_s),
    ):
        if value is not None:
            parts.append(f"{label} {value:.2f} s")
    if t.inter_token_s:
        parts.append(f"{1 / t.inter_token_s:.0f} tokens/s")
    if u.completion_tokens:
        about = "about " if u.source == "estimated" else ""
        parts.append(f"{about}{u.reasoning_tokens} thinking + {u.answer_tokens} answer tokens")
    return " · ".join(parts)
