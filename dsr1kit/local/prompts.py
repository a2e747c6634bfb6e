"""A conversation as a model's own token ids, by its own template: what it reads when asked, and when trained.

Knows tokenizers and chat templates; nothing about torch, requests or training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dsr1kit.records import Message

if TYPE_CHECKING:
    from dsr1kit.local.rows import Marks


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids of a conversation, and whether they end inside the thinking."""

    ids: list[int]
    opened: bool


def prompt_of(tokenizer: Any, marks: Marks, messages: Sequence[Message]) -> Prompt:
    """The conversation by the model's own template, earlier thinking left out, the new one opened."""
    text, opened = prompt_text(tokenizer, marks, messages)
    return Prompt(ids_of(tokenizer, text), opened)


def prompt_text(tokenizer: Any, marks: Marks, messages: Sequence[Message]) -> tuple[str, bool]:
    """As `prompt_of`, as text; and whether it ends inside the thinking.

    R1's card asks for `<think>\\n` at the start of every answer; where a template does not put it there and the
    model has the tag, it is added.
    """
    turns = [{**turn, "content": without_thinking(turn)} for turn in messages]
    text = str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
    # Where the end of thinking is no token of its own, nothing could tell it from the answer.
    opened = marks.end_think is not None and text.rstrip().endswith("<think>")
    if not opened and marks.think is not None and marks.end_think is not None:
        text, opened = f"{text}<think>\n", True
    return text, opened


def ids_of(tokenizer: Any, text: str) -> list[int]:
    """The ids of a text that holds its own special tokens."""
    return [int(token) for token in tokenizer(text, add_special_tokens=False)["input_ids"]]


def without_thinking(turn: Message) -> str:
    """An earlier answer without its reasoning, as R1's template does; some templates leave that to the caller."""
    if turn["role"] != "assistant" or "</think>" not in turn["content"]:
        return turn["content"]
    return turn["content"].rpartition("</think>")[2].lstrip("\n")
