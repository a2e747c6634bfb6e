"""The common forms of training data, each read into Examples: by the names of its columns, never by guess of content.

    plain     question, reasoning, answer (problem, prompt; thinking, trace; response, completion, output)
    chat      messages: [{"role": ..., "content": ...}], thinking in tags or in a field of its own
    ShareGPT  conversations: [{"from": "human", "value": ...}, {"from": "gpt", "value": ...}]
    Alpaca    instruction, input, output

Knows nothing about files, models or what makes an example good.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dsr1kit.compare.file_rows import meant
from dsr1kit.errors import UsageError
from dsr1kit.finetune.data import Example, example, known_scorer
from dsr1kit.records import Message
from dsr1kit.thinking import CLOSE, OPEN

_QUESTION = ("question", "problem", "prompt")
_REASONING = ("reasoning", "thinking", "reasoning_content", "trace")
_ANSWER = ("answer", "response", "completion", "output")
_GOLD = ("gold", "expected", "final_answer")
_EXTRAS = (*_GOLD, "scorer", "kind", "language", "source")
_ROLES = {
    "system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant",
    "model": "assistant", "chatgpt": "assistant", "bing": "assistant",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Form:
    """One form: its name, a column that tells it, what a line of it has, and all columns that it knows."""

    name: str
    told_by: str
    needs: str
    columns: tuple[str, ...]
    read: Callable[[Mapping[str, Any], str], list[Example]]


def read_row(row: Mapping[str, Any], where: str) -> list[Example]:
    """The examples of one row; a conversation gives one for each answer in it, with the turns before that.

    Args:
        row: a line as data.
        where: file and line, for messages.

    Raises:
        UsageError: the row has none of the forms, or a value of a wrong type; says what was expected.
    """
    for form in FORMS:
        if row.get(form.told_by) is not None:
            return form.read(row, where)
    if any(row.get(name) is not None for name in _QUESTION):
        return _plain(row, where)
    names = ", ".join(map(repr, list(row)[:10])) or "nothing"
    known = {column for form in FORMS for column in form.columns}
    near = "".join(meant(column, dict(row), known) for column in ("question", "messages"))
    expected = "; or ".join(f"{form.needs} ({form.name})" for form in FORMS)
    raise UsageError(f"{where}: no training example; expected {expected}; the line has {names}{near}")


def split(text: str, where: str) -> tuple[str, str]:
    """Reasoning and answer of a text with inline think tags (the opening one may be missing, as R1's template
    pre-fills it); without a closing tag all of it is the answer.

    Raises:
        UsageError: the thinking is opened and never closed.
    """
    if CLOSE not in text:
        if OPEN in text:
            raise UsageError(f"{where}: {OPEN} is opened and never closed with {CLOSE}: the trace was cut off")
        return "", text
    head, _, answer = text.rpartition(CLOSE)
    return head.strip().removeprefix(OPEN), answer


def _text(value: Any, name: str, where: str) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        kind = {dict: "an object", list: "a list", bool: "true or false", type(None): "nothing"}
        raise UsageError(f"{where}: {name} must be text, not {kind.get(type(value), type(value).__name__)}")
    return str(value)


def _thought(row: Mapping[str, Any], where: str) -> str:
    """The reasoning in a field of its own, without tags around it."""
    text = _first(row, _REASONING, where)
    bare = text.strip()
    tagged = bare.startswith(OPEN) or bare.endswith(CLOSE)
    return bare.removeprefix(OPEN).removesuffix(CLOSE) if tagged else text


def _first(row: Mapping[str, Any], names: Sequence[str], where: str) -> str:
    name = next((name for name in names if row.get(name) is not None), None)
    return "" if name is None else _text(row[name], name, where)


def _extras(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    found: dict[str, Any] = {"gold": _first(row, _GOLD, where).strip(), "source": where}
    for name in ("scorer", "kind", "language"):
        found[name] = _first(row, (name,), where).strip()
    if found["scorer"]:
        known_scorer(found["scorer"], where)
    if found["language"] not in ("", "en", "zh"):
        raise UsageError(f"{where}: the language is en or zh, not {found['language']!r:.40}")
    return found


def _plain(row: Mapping[str, Any], where: str) -> list[Example]:
    answers = [name for name in _ANSWER if row.get(name) is not None]
    if not answers:
        raise UsageError(
            f"{where}: no 'answer'{meant('answer', dict(row), _ANSWER)}; a plain line needs question, reasoning and "
            f"answer and has {', '.join(map(repr, list(row)[:10]))}"
        )
    # TRL's prompt and completion may be conversations.
    question_name = next(name for name in _QUESTION if row.get(name) is not None)
    asked, told = row[question_name], row[answers[0]]
    if isinstance(asked, list) or isinstance(told, list):
        both = [*(asked if isinstance(asked, list) else [{"role": "user", "content": asked}]),
                *(told if isinstance(told, list) else [{"role": "assistant", "content": told}])]  # fmt: skip
        return _conversation(both, row, where, ("role",), ("content",))
    reasoning, answer = _thought(row, where), _text(told, answers[0], where)
    if not reasoning:
        reasoning, answer = split(answer, where)
    return [example(_text(asked, question_name, where).strip(), reasoning, answer, **_extras(row, where))]


def _chat(row: Mapping[str, Any], where: str) -> list[Example]:
    turns = row["messages"]
    if row.get("answer") is not None and isinstance(turns, list) and turns:
        # What `data.write_file` writes for an answer with turns before it.
        answer = {"role": "assistant", "content": row["answer"], "reasoning": row.get("reasoning") or ""}
        return _conversation([*turns, answer], row, where, ("role",), ("content",))[-1:]
    return _conversation(turns, row, where, ("role",), ("content",))


def _sharegpt(row: Mapping[str, Any], where: str) -> list[Example]:
    return _conversation(row["conversations"], row, where, ("from", "role"), ("value", "content"))


def _conversation(
    turns: Any, row: Mapping[str, Any], where: str, roles: Sequence[str], contents: Sequence[str]
) -> list[Example]:
    if not isinstance(turns, list) or not turns:
        raise UsageError(f"{where}: a conversation is a list of turns that is not empty, not {str(turns)[:40]!r}")
    before: list[Message] = []
    found: list[Example] = []
    extras = _extras(row, where)
    for number, turn in enumerate(turns, 1):
        place = f"{where}, turn {number}"
        if not isinstance(turn, dict):
            raise UsageError(f"{place}: a turn is an object with {roles[0]} and {contents[0]}, not {str(turn)[:40]!r}")
        named = _first(turn, roles, place).lower()
        if named not in _ROLES:
            raise UsageError(f"{place}: {roles[0]} is system, user or assistant (human, gpt), not {named!r:.40}")
        role, content = _ROLES[named], _first(turn, contents, place)
        if role != "assistant":
            before.append({"role": role, "content": content})
            continue
        if not before or before[-1]["role"] != "user":
            raise UsageError(f"{place}: an answer stands where a question was expected")
        reasoning, answer = _thought(turn, place), content
        if not reasoning:
            reasoning, answer = split(content, place)
        found.append(example(before[-1]["content"], reasoning, answer, before=before[:-1], **extras))
        # As at inference: what was thought before is not seen again.
        before.append({"role": "assistant", "content": answer.strip()})
    if not found:
        raise UsageError(f"{where}: the conversation holds no answer to train on")
    # The gold is that of the last question.
    return [*(replace(one, gold="") for one in found[:-1]), found[-1]]


def _alpaca(row: Mapping[str, Any], where: str) -> list[Example]:
    asked = "\n\n".join(filter(None, (_first(row, (name,), where).strip() for name in ("instruction", "input"))))
    if row.get("output") is None:
        raise UsageError(f"{where}: no 'output'; an Alpaca line has instruction, input (may be empty) and output")
    reasoning, answer = _thought(row, where), _text(row["output"], "output", where)
    if not reasoning:
        reasoning, answer = split(answer, where)
    return [example(asked, reasoning, answer, **_extras(row, where))]


FORMS = (
    Form("chat", "messages", "messages", ("messages", "reasoning", "answer", *_EXTRAS), _chat),
    Form("ShareGPT", "conversations", "conversations", ("conversations", *_EXTRAS), _sharegpt),
    Form(
        "Alpaca", "instruction", "instruction and output", ("instruction", "input", "output", *_REASONING, *_EXTRAS),
        _alpaca,
    ),
    Form(
        "plain", "question", "question, reasoning and answer", (*_QUESTION, *_REASONING, *_ANSWER, *_EXTRAS), _plain
    ),
)  # fmt: skip
