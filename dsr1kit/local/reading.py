"""From token ids to a Reply: text without half characters, reasoning and answer, outcome, timing.

The switch between reasoning and answer is the id of the tag, so no text can be mistaken for it. Knows
nothing about torch, models or threads.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from dsr1kit.records import Outcome, Reply, Sampling, Timing, Usage

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from dsr1kit.local.load import LoadedModel

Kind = Literal["reasoning", "answer"]
_LONG, _LONGEST = 16, 64  # tokens decoded anew: from the first on settled where it can be, from the second always


class Detokenizer:
    """Turns token ids into text one by one; never gives half a character.

    The last few ids are decoded anew with each token, because the text of a token depends on its left
    neighbours; what ends in a replacement character waits for the rest of its bytes.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._shown = 0  # characters of the decoded ids that were given out
        self._anchor = 0  # first id decoded anew; what lies before is settled

    def push(self, token: int) -> str:
        """Return the text that became certain with `token`, often but not always that of the token."""
        self._ids.append(token)
        text, span = self._decode(), len(self._ids) - self._anchor
        # Replacement characters at the end may become characters, unless there are more than any text has.
        certain = text.rstrip("\ufffd") if span <= _LONGEST else text
        piece, self._shown = certain[self._shown :], max(self._shown, len(certain))
        if span > _LONG and certain == text:
            self._anchor = len(self._ids) - 4
            self._shown = len(self._decode())
        return piece

    def flush(self) -> str:
        """Return what is still held, incomplete bytes as replacement characters."""
        text = self._decode()
        piece, self._shown = text[self._shown :], len(text)
        return piece

    def _decode(self) -> str:
        return str(
            self._tokenizer.decode(
                self._ids[self._anchor :], skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )


@dataclass(slots=True)
class Text:
    """What one row gave so far, as (kind, text, time) pieces and token counts; written by the worker.

    Attributes:
        opened: whether the prompt has opened the thinking.
        ended, stopped: whether the end mark, or one of the strings that stop it, came.
    """

    opened: bool
    pieces: list[tuple[Kind, str, float]] = field(default_factory=list)
    reasoning_tokens: int = 0
    answer_tokens: int = 0
    ended: bool = False
    stopped: bool = False

    def text(self, kind: Kind) -> str:
        """Return all text of one kind."""
        return "".join(text for piece, text, _ in self.pieces if piece == kind)


def read(
    loaded: LoadedModel,
    text: Text,
    show: Callable[[Kind, str, float], Any],
    clock: Callable[[], float],
    stop: Sequence[str] = (),
) -> tuple[Callable[[int], bool], Callable[[], None]]:
    """Return (take one token, end): tokens become text, counted and split at the tags' ids, tags left out.

    White space around the tags is no text, as where hosted replies are split. Taking a token tells whether the
    answer has reached one of the strings in `stop`; what might become one is held back until it is known.
    """
    marks = loaded.marks
    kind: Kind = "reasoning" if text.opened else "answer"
    decoder, begun, held = Detokenizer(loaded.tokenizer), False, ""

    def give(piece: str, *, last: bool = False) -> None:
        nonlocal begun, held
        if not begun and not held:
            piece = piece.lstrip()
        if kind == "reasoning":
            # Line breaks wait for what follows: before the closing tag they are dropped.
            piece, held = held + piece, ""
            kept = piece.rstrip("\n")
            piece, held = kept, piece[len(kept) :]
        elif stop:
            piece, held = held + piece, ""
            found = [at for at in (piece.find(word) for word in stop) if at >= 0]
            if found:
                piece, text.stopped = piece[: min(found)], True
            elif not last:
                unsure = _beginning(piece, stop)
                piece, held = piece[: len(piece) - unsure], piece[len(piece) - unsure :]
        if piece:
            begun = True
            show(kind, piece, clock())

    def switch(to: Kind) -> None:
        nonlocal kind, decoder, begun, held
        give(decoder.flush())
        kind, decoder, begun, held = to, Detokenizer(loaded.tokenizer), False, ""

    def feed(token: int) -> bool:
        if token in marks.ends:
            text.ended = True
        elif token == marks.end_think and kind == "reasoning":
            switch("answer")
        elif token == marks.think and text.reasoning_tokens == 0 and not begun:
            switch("reasoning")
        else:
            if kind == "reasoning":
                text.reasoning_tokens += 1
            else:
                text.answer_tokens += 1
            give(decoder.push(token))
        return text.stopped

    def finish() -> None:
        if not text.stopped:
            give(decoder.flush(), last=True)

    return feed, finish


def _beginning(text: str, words: Sequence[str]) -> int:
    """How many characters at the end of `text` may be the beginning of one of the words."""
    most = max(len(word) for word in words) - 1
    sizes = range(min(most, len(text)), 0, -1)
    return next((size for size in sizes if any(word.startswith(text[-size:]) for word in words)), 0)


def judged(base: Reply, text: Text, prompt_tokens: int, limit: int, sampling: Sampling) -> Reply:
    """Fill in text, usage and outcome of a finished row."""
    answer = text.text("answer")
    outcome, detail = Outcome.OK, ""
    stopped = text.ended or text.stopped
    if not stopped:
        outcome = Outcome.TRUNCATED
        detail = (
            f"stopped at max_tokens={limit}; ask for more"
            if limit == sampling.max_tokens
            else f"stopped after {limit} tokens, where the context was full; shorten the prompt"
        )
    elif not answer.strip():
        outcome, detail = Outcome.EMPTY, "the model ended without an answer; ask again with another seed"
    return replace(
        base,
        outcome=outcome,
        detail=detail,
        reasoning=text.text("reasoning"),
        answer=answer,
        finish_reason="stop" if stopped else "length",
        usage=Usage(prompt_tokens, text.reasoning_tokens, text.answer_tokens, "tokenizer", "tokenizer"),
    )


def timing_of(text: Text, due: float, started: float, now: float) -> Timing:
    """Return when things happened, in seconds from `due`; `now` stands in where no text came."""
    times = [at for _, _, at in text.pieces]
    queue_s = started - due
    if not times:
        return Timing(queue_s=queue_s, total_s=now - due)
    first_answer = next((at for kind, piece, at in text.pieces if kind == "answer" and piece.strip()), None)
    tokens = text.reasoning_tokens + text.answer_tokens
    return Timing(
        queue_s=queue_s,
        first_token_s=times[0] - due,
        first_answer_s=None if first_answer is None else first_answer - due,
        think_s=None if first_answer is None else first_answer - times[0],
        inter_token_s=(times[-1] - times[0]) / (tokens - 1) if tokens > 1 else None,
        total_s=times[-1] - due,
        gaps_s=tuple(later - earlier for earlier, later in itertools.pairwise(times)),
    )
