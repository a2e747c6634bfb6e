"""The template linter: does the text that will be trained on still hold the reasoning, and where does the loss start?

Looks at one example as a model will meet it, by the kit's way and by the way of the chat template alone, which under
R1's template silently trains without the reasoning. Knows tokenizers; nothing about torch or trainers.
"""

from __future__ import annotations

import html
from dataclasses import dataclass
from typing import Any

from dsr1kit.finetune.data import Example
from dsr1kit.finetune.encode import IGNORED, Encoded, Loss, encode
from dsr1kit.local.prompts import ids_of, prompt_of, prompt_text
from dsr1kit.local.rows import Marks


@dataclass(frozen=True, slots=True)
class Piece:
    """Neighbouring tokens as text, and whether the loss counts them."""

    text: str
    counted: bool


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that the linter looked at: whether it holds, and what it means."""

    holds: bool
    said: str


@dataclass(frozen=True, slots=True)
class Lint:
    """One example as it will be trained on.

    Attributes:
        pieces: its text, cut where the loss begins or ends.
        findings: what was looked at.
        tokens, counted: of the example, and of them those that the loss counts.
    """

    pieces: tuple[Piece, ...]
    findings: tuple[Finding, ...]
    tokens: int
    counted: int

    @property
    def sound(self) -> bool:
        """Whether everything holds."""
        return all(finding.holds for finding in self.findings)

    def _repr_html_(self) -> str:
        """For notebooks: the masked part greyed, the findings below."""
        grey = "color:#767676"
        shown = "".join(
            f'<span style="{"" if piece.counted else grey}">{html.escape(piece.text)}</span>' for piece in self.pieces
        )
        listed = "".join(f"<li>{'✓' if f.holds else '✗'} {html.escape(f.said)}</li>" for f in self.findings)
        told = f"{self.counted:,} of {self.tokens:,} tokens count in the loss; those in grey are read only"
        return (
            f'<pre style="white-space:pre-wrap;border-left:3px solid #0072B2;padding-left:0.8em">{shown}</pre>'
            f"<p>{told}.</p><ul>{listed}</ul>"
        )


def lint(tokenizer: Any, marks: Marks, one: Example, loss: Loss = "completion") -> Lint:
    """Look at an example as the kit will train on it.

    Raises:
        UsageError: as `encode.encode`.
    """
    row = encode(tokenizer, marks, one, loss)
    return _looked_at(tokenizer, marks, one, row)


def lint_template(tokenizer: Any, marks: Marks, one: Example) -> Lint:
    """Look at the same example as plain training through the model's chat template would meet it: the answer as an
    assistant turn with its thinking in tags, the loss behind the longest common beginning with the prompt."""
    turn = {"role": "assistant", "content": f"<think>\n{one.reasoning}\n</think>\n\n{one.answer}"}
    turns = [dict(before) for before in one.messages]
    whole = ids_of(tokenizer, str(tokenizer.apply_chat_template([*turns, turn], tokenize=False)))
    asked = ids_of(tokenizer, str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)))
    shared = next(
        (at for at, (a, b) in enumerate(zip(whole, asked, strict=False)) if a != b), min(map(len, (whole, asked)))
    )
    return _looked_at(tokenizer, marks, one, Encoded(whole, [IGNORED] * shared + whole[shared:]))


def _looked_at(tokenizer: Any, marks: Marks, one: Example, row: Encoded) -> Lint:
    pieces: list[Piece] = []
    begins = 0
    flags = [label != IGNORED for label in row.labels]
    for at in range(1, len(flags) + 1):
        if at == len(flags) or flags[at] != flags[begins]:
            pieces.append(Piece(_decoded(tokenizer, row.input_ids[begins:at]), flags[begins]))
            begins = at
    return Lint(tuple(pieces), tuple(_findings(tokenizer, marks, one, row)), len(row.input_ids), row.counted)


def _findings(tokenizer: Any, marks: Marks, one: Example, row: Encoded) -> list[Finding]:
    counted = _decoded(tokenizer, [label for label in row.labels if label != IGNORED])
    prompt = prompt_of(tokenizer, marks, one.messages)
    begins = next((at for at, label in enumerate(row.labels) if label != IGNORED), len(row.labels))
    last = next((at for at in range(len(row.labels) - 1, -1, -1) if row.labels[at] != IGNORED), -1)
    asked, opened = prompt_text(tokenizer, marks, one.messages)
    joint = ids_of(tokenizer, asked + _decoded(tokenizer, row.input_ids[len(prompt.ids) :]))
    # As the tokenizer writes it: many compose accents and signs (NFC).
    holds = _decoded(tokenizer, ids_of(tokenizer, one.reasoning)).strip() in counted
    found = [
        Finding(
            holds,
            "the loss counts the whole reasoning"
            if holds
            else "the reasoning is gone from what the loss counts: the model would learn to answer without thinking",
        )
    ]
    same = row.input_ids[: len(prompt.ids)] == prompt.ids
    found.append(
        Finding(
            same,
            "the prompt is, token for token, what the model reads when it is asked"
            if same
            else "the prompt is another one than the model reads when it is asked",
        )
    )
    where = _decoded(tokenizer, row.input_ids[max(0, begins - 4) : begins])
    right = same and begins <= len(prompt.ids)
    if not right:
        place = ", not where the model goes on"
    elif begins < len(prompt.ids):
        place = ", before the last answer: the loss counts earlier answers too, and the template shows those without "
        place += "their thinking"
    else:
        place = ", inside the thinking" if opened else ", where the answer begins"
    starts = f"behind {where!r}" if begins else "with the first token"
    found.append(Finding(right, f"the loss starts {starts}{place}"))
    ends = last >= 0 and row.input_ids[last] in marks.ends and last == len(row.input_ids) - 1
    found.append(
        Finding(ends, "the end mark is trained" if ends else "the end mark is not trained: answers would not end")
    )
    if same:
        merged = joint == row.input_ids
        found.append(
            Finding(
                True,
                "trace and prompt are cut into tokens as one text would be"
                if merged
                else "as one text prompt and trace would share a token; what is trained is what it can write",
            )
        )
    return found


def _decoded(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
