"""From an example to what is trained on: token ids, and which of them the loss counts.

The prompt is, token for token, what the model reads when it is asked; behind it come the trace, the closing tag, the
answer and the end mark. Chat templates are not used for answers: R1's drops the reasoning from them. Knows
tokenizers and templates; nothing about torch or trainers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from dsr1kit.errors import UsageError
from dsr1kit.finetune.data import Example
from dsr1kit.local.prompts import ids_of, prompt_text, without_thinking
from dsr1kit.local.rows import Marks
from dsr1kit.records import Message

Loss = Literal["completion", "assistant", "all"]
LOSSES = ("completion", "assistant", "all")
IGNORED = -100


@dataclass(frozen=True, slots=True)
class Encoded:
    """One row to train on.

    Attributes:
        input_ids: of the whole text.
        labels: the same ids where the loss counts, `IGNORED` elsewhere.
    """

    input_ids: list[int]
    labels: list[int]

    @property
    def counted(self) -> int:
        """Tokens that the loss counts."""
        return sum(label != IGNORED for label in self.labels)


def completion_text(one: Example, opened: bool, end: str) -> str:
    """What the model should write after the prompt: trace, closing tag, answer, end mark.

    Args:
        opened: whether the prompt ends inside the thinking; where a model knows no thinking the trace stands
            before the answer, without tags.
        end: the text of the end mark.
    """
    if opened:
        return f"{one.reasoning}\n</think>\n\n{one.answer}{end}"
    return "\n\n".join(filter(None, (one.reasoning, one.answer))) + end


def encode(tokenizer: Any, marks: Marks, one: Example, loss: Loss = "completion") -> Encoded:
    """One example as ids and labels.

    Args:
        tokenizer, marks: the model's own.
        one: the example.
        loss: `completion`: its own answer alone, after a prompt in which earlier turns stand as they do when the
            model is asked (without their thinking); `assistant`: the earlier answers too; `all`: every token.

    Raises:
        UsageError: no such loss; or, with `assistant`, a template under which a conversation is not the
            beginning of a longer one, so that nobody can say where an answer stands.
    """
    if loss not in LOSSES:
        raise UsageError(f"the loss counts {', '.join(LOSSES)}, not {loss!r}")
    end = str(tokenizer.eos_token or "")
    text, opened = prompt_text(tokenizer, marks, one.messages)
    prompt, completion = ids_of(tokenizer, text), ids_of(tokenizer, completion_text(one, opened, end))
    ids = prompt + completion
    if loss == "all":
        return Encoded(ids, list(ids))
    labels = [IGNORED] * len(prompt) + completion
    if loss == "assistant":
        for begin, stop in _earlier_answers(tokenizer, text, one.messages):
            # Where the characters lie among the ids: the text before them, then they themselves.
            first, last = len(ids_of(tokenizer, text[:begin])), len(ids_of(tokenizer, text[:stop]))
            labels[first:last] = ids[first:last]
    return Encoded(ids, labels)


def _earlier_answers(tokenizer: Any, text: str, messages: Sequence[Message]) -> list[tuple[int, int]]:
    """Where the answers among the turns stand in the rendered prompt: (begin, end) in characters, end mark
    included."""

    def render(turns: Sequence[Message], *, ask: bool) -> str:
        return str(tokenizer.apply_chat_template(list(turns), tokenize=False, add_generation_prompt=ask))

    turns: list[Message] = [{**turn, "content": without_thinking(turn)} for turn in messages]  # as in the prompt
    end, found = str(tokenizer.eos_token or ""), []
    for at, turn in enumerate(turns):
        if turn["role"] != "assistant":
            continue
        with_it = render(turns[: at + 1], ask=False)
        begin = with_it.rfind(turn["content"].strip())
        if begin < 0 or not text.startswith(with_it.removesuffix("\n").removesuffix(end)):
            raise UsageError(
                "the model's chat template renders a conversation otherwise once more turns follow, so the loss cannot "
                "be put on its earlier answers: take loss 'completion', one row an answer"
            )
        found.append((begin, len(with_it.rstrip("\n"))))
    return found


def encode_all(tokenizer: Any, marks: Marks, examples: Sequence[Example], loss: Loss = "completion") -> list[Encoded]:
    """All examples, in their order. Raises UsageError as `encode`."""
    return [encode(tokenizer, marks, one, loss) for one in examples]


def whole_conversations(examples: Sequence[Example]) -> list[Example]:
    """Without those that are the beginning of another one of the same source: with loss `assistant` a conversation is
    one row, told by its last answer. Before anything is put behind their questions."""
    beginnings = {
        (one.source, tuple((turn["role"], turn["content"]) for turn in one.messages[:at]))
        for one in examples
        for at in range(1, len(one.messages))
    }
    return [
        one
        for one in examples
        if (one.source, tuple((turn["role"], turn["content"]) for turn in one.messages)) not in beginnings
    ]
