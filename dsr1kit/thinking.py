"""Tell R1's reasoning from its answer, whichever way a provider sends them.

Text arrives in pieces that may split a tag anywhere; every piece keeps the time of its arrival, so that
first-token and first-answer times stay exact. Knows nothing about HTTP or JSON.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from dsr1kit.records import ReasoningMode

OPEN, CLOSE = "<think>", "</think>"
Kind = Literal["reasoning", "answer"]


class Piece(NamedTuple):
    """Text of one kind and the time at which it arrived."""

    kind: Kind
    text: str
    at: float


class ThinkSplitter:
    """Collects the text of one reply as pieces of reasoning and of answer.

    Args:
        mode: where the reasoning is. `auto` takes fields when they come and inline tags otherwise;
            `inline` also takes text before a lone closing tag as reasoning while it streams, because the
            chat templates of R1's distills pre-fill the opening tag; the two field modes leave tags alone.
        thinks: whether the model is known to think: text that was stopped before any tag or field came is then
            its thinking, not its answer.

    A closing tag without an opening one makes everything before it reasoning, in `auto` as well; there it
    is known only when the tag comes, so pieces shown live until then were called answer.
    """

    def __init__(self, mode: ReasoningMode = "auto", *, thinks: bool = False) -> None:
        self._mode, self._thinks = mode, thinks
        self._pieces: list[Piece] = []
        self._inline = mode in ("auto", "inline")
        self._state: Literal["start", "think", "prefilled", "open_answer", "answer"] = "start"
        self._held: list[tuple[str, float]] = []
        self._bare = ""  # what is held at the start, without the white space before it
        self._tag_seen = False
        self._skip_white = False

    def add_reasoning(self, text: str, at: float) -> list[Piece]:
        """Text of a reasoning field; returns the pieces it gave."""
        if not text:
            return []
        # Once fields speak, tags in the answer are the answer's own words.
        self._inline = False
        return [*self._flush(), self._emit("reasoning", text, at)]

    def add_content(self, text: str, at: float) -> list[Piece]:
        """Text of the content field, in which tags may be inline; returns the pieces it gave."""
        if not text:
            return []
        if not self._inline:
            return [self._emit("answer", text, at)]
        if not self._held and not self._skip_white and self._state != "start" and "<" not in text:
            return [self._emit(self._kind(), text, at)]
        if self._state == "answer" and not self._skip_white:
            return [self._emit("answer", text, at)]
        self._held.append((text, at))
        return self._advance()

    def finish(self, *, truncated: bool = False) -> list[Piece]:
        """End of the text; `truncated`: something stopped it, a limit or a cut. Returns the last pieces."""
        last = self._flush()
        if self._state == "prefilled" and not self._tag_seen and not truncated:
            # Declared inline, ended by itself, and no tag anywhere: the model did not think.
            self._relabel("answer")
        if self._state == "open_answer" and self._thinks and truncated:
            # Stopped before the closing tag that a model of this family would have written.
            self._relabel("reasoning")
        return last

    @property
    def pieces(self) -> list[Piece]:
        """All pieces so far, in order of arrival."""
        return self._pieces

    @property
    def reasoning(self) -> str:
        """The reasoning so far; with inline tags, without the line breaks that hug them."""
        text = self._joined("reasoning")
        return text.strip("\n") if self._tag_seen or self._state == "prefilled" else text

    @property
    def answer(self) -> str:
        """The answer so far."""
        return self._joined("answer")

    def first_at(self, kind: Kind | None = None) -> float | None:
        """When the first text came; for `answer`, the first that is not white space. None: not yet."""
        for piece in self._pieces:
            if kind is None or (piece.kind == kind and (kind == "reasoning" or not piece.text.isspace())):
                return piece.at
        return None

    def _joined(self, kind: Kind) -> str:
        return mended("".join(p.text for p in self._pieces if p.kind == kind))

    def _emit(self, kind: Kind, text: str, at: float) -> Piece:
        piece = Piece(kind, text, at)
        self._pieces.append(piece)
        return piece

    def _relabel(self, kind: Kind) -> None:
        self._pieces[:] = [Piece(kind, p.text, p.at) for p in self._pieces]

    def _take(self, count: int) -> list[tuple[str, float]]:
        """Remove the first `count` held characters, each fragment with its own time."""
        whole = 0
        while whole < len(self._held) and len(self._held[whole][0]) <= count:
            count -= len(self._held[whole][0])
            whole += 1
        taken, self._held = self._held[:whole], self._held[whole:]
        if count:
            text, at = self._held[0]
            taken.append((text[:count], at))
            self._held[0] = (text[count:], at)
        return taken

    def _kind(self) -> Kind:
        return "reasoning" if self._state in ("think", "prefilled") else "answer"

    def _flush(self) -> list[Piece]:
        kind = self._kind()
        held, self._held = self._held, []
        return [self._emit(kind, text, at) for text, at in held]

    def _advance(self) -> list[Piece]:
        out: list[Piece] = []
        if self._state == "start":
            # Only the newest text: models that write line breaks without end would make this quadratic.
            bare = self._bare = (self._bare + self._held[-1][0]).lstrip()
            if bare.startswith(OPEN):
                self._take(sum(len(t) for t, _ in self._held) - len(bare) + len(OPEN))
                self._state, self._tag_seen = "think", True
            elif OPEN.startswith(bare):
                return out  # may still become the tag
            else:
                self._state = "prefilled" if self._mode == "inline" else "open_answer"
        if self._state != "answer":
            text = "".join(t for t, _ in self._held)
            at = text.find(CLOSE)
            if at < 0:
                keep = _partial_tag(text)
                kind = self._kind()
                out += [self._emit(kind, t, when) for t, when in self._take(len(text) - keep)]
                return out
            if self._state == "open_answer":
                self._relabel("reasoning")
            self._state, self._tag_seen = "think", True
            out += [self._emit("reasoning", t, when) for t, when in self._take(at)]
            self._take(len(CLOSE))
            self._state, self._skip_white = "answer", True
        if self._skip_white:
            text = "".join(t for t, _ in self._held)
            self._take(len(text) - len(text.lstrip()))
            self._skip_white = not self._held
        out += self._flush()
        return out


def mended(text: str) -> str:
    """Text that can be written: JSON can hold halves of a character; pairs are joined, lone ones replaced."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def _partial_tag(text: str) -> int:
    """Length of the longest end of `text` that could grow into the closing tag."""
    for size in range(min(len(CLOSE) - 1, len(text)), 0, -1):
        if CLOSE.startswith(text[-size:]):
            return size
    return 0
