"""One request on its way through a model: what was said, what is forced next, when it ends.

Holds R1's own rules for thinking: a cap that closes the block, and prolonging by "Wait," (budget forcing, s1,
arXiv 2501.19393). Knows token ids; nothing about tensors, text or threads.
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from dsr1kit.records import Sampling


@dataclass(frozen=True, slots=True)
class Marks:
    """Token ids with a meaning.

    Attributes:
        end_think, think: closing and opening think tag; None: the model has none.
        ends: tokens after which the model says no more.
        close: what closes the thinking and asks for the answer, the tag first.
        wait: what makes a model think on in place of closing.
    """

    end_think: int | None
    think: int | None
    ends: frozenset[int]
    close: tuple[int, ...] = ()
    wait: tuple[int, ...] = ()


def marks_of(tokenizer: Any, model: Any) -> Marks:
    """Read the marks from a tokenizer and a model's generation config."""

    def ids(text: str) -> tuple[int, ...]:
        return tuple(int(token) for token in tokenizer(text, add_special_tokens=False)["input_ids"])

    def single(text: str) -> int | None:
        found = ids(text)
        # The unknown token stands for any text, so it is no tag.
        return found[0] if len(found) == 1 and found[0] != tokenizer.unk_token_id else None

    configured = model.generation_config.eos_token_id
    listed = configured if isinstance(configured, list) else [configured]
    ends = {int(end) for end in [*listed, tokenizer.eos_token_id] if end is not None}
    end_think = single("</think>")
    close = () if end_think is None else (end_think, *ids("\n\n"))
    return Marks(end_think, single("<think>"), frozenset(ends), close, ids("\nWait,"))


@dataclass(eq=False, slots=True)
class Row:
    """A request that waits, runs or is done.

    Args:
        prompt: token ids.
        sampling: how to draw; its bounds on thinking count where the model thinks in tags.
        limit: most new tokens.
        thinking: whether the prompt has opened the thinking.
        on_token: called with each new id; True ends the row.
        on_start: called when the row leaves the queue, each time that it does.
        width: run beside at most so many rows, itself included.

    Attributes:
        made: new ids so far, the end mark included.
        thought: tokens of thinking among them, tags aside.
        cancelled: set from outside: the row ends before its next token.
        ended: resolved when the row is done; with the error, where there was one.
        generator: of its draws; made when it starts to run.
    """

    prompt: list[int]
    sampling: Sampling
    limit: int
    thinking: bool
    on_token: Callable[[int], bool]
    on_start: Callable[[], object] = lambda: None
    width: int = 1
    made: list[int] = field(default_factory=list)
    thought: int = 0
    cancelled: bool = False
    ended: Future[None] = field(default_factory=Future)
    generator: Any = None
    _forced: deque[int] = field(default_factory=deque)

    @property
    def held(self) -> int:
        """Tokens whose keys and values are held once it runs: all but the last one made."""
        return len(self.prompt) + len(self.made) - 1

    def take(self, drawn: int, marks: Marks) -> bool:
        """Take the token that was drawn, or the one that is forced in its place; True: the row is done."""
        token = self._decide(drawn, marks)
        if not self.made and token == marks.think:
            self.thinking = True
        elif self.thinking and token == marks.end_think:
            self.thinking = False
        elif self.thinking and token not in marks.ends:
            self.thought += 1
        self.made.append(token)
        stopped = self.on_token(token)
        return stopped or token in marks.ends or len(self.made) >= self.limit

    def _decide(self, drawn: int, marks: Marks) -> int:
        if self.thinking and marks.close:
            most, least = self.sampling.max_thinking_tokens, self.sampling.min_thinking_tokens
            closing = drawn == marks.end_think or drawn in marks.ends
            if most is not None and self.thought >= most:
                self._forced = deque(marks.close)  # also in the middle of what prolongs it
            elif closing and not self._forced and least is not None and self.thought < least:
                self._forced = deque(marks.wait)
        return self._forced.popleft() if self._forced else drawn
