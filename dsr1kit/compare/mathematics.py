"""Mathematics held against mathematics: by its text where that is enough, else by math-verify and sympy.

sympy can compute without end; who cannot wait runs `score` in a process that can be ended (`judge.Judge`).
"""

from __future__ import annotations

import logging
import re
import unicodedata
from fractions import Fraction

from dsr1kit.compare.scoring import as_number, last_boxed
from dsr1kit.records import Verdict

#: The longest box, in characters, that is still read as an answer; and how much of a text without a box is.
LONGEST = 2_000

_DROPPED = re.compile(r"\\(?:left|right|displaystyle|big|Big|bigl|bigr|!|,|;|:|quad|qquad| )|[\s$~]")
_TEXT = re.compile(r"\\(?:text|textbf|mathrm|mathbf|operatorname)\s*\{([^{}]*)\}")
_SHORT_FRACTION = re.compile(r"\\frac(\d)(\d)")
_FRACTION = re.compile(r"-?\\frac\{\d+\}\{\d+\}")


def score(answer: str, gold: str) -> Verdict:
    """Whether the expression in the last box (or, without one, the last of the text) equals the gold.

    A gold that math-verify cannot read is `unscored`, unless the answer repeats it. May take any time.
    """
    known = quick(answer, gold)
    if known is not None:
        return known
    import math_verify

    # It warns, once each, that somebody else has to watch the time.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    box = last_boxed(answer)
    wanted = math_verify.parse(gold if "$" in gold or "\\boxed" in gold else f"${gold}$", parsing_timeout=None)
    if all(isinstance(one, str) for one in wanted):
        return "unscored"
    told = f"\\boxed{{{box}}}" if box is not None else answer[-LONGEST:]
    found = math_verify.parse(told, parsing_timeout=None)
    return "right" if math_verify.verify(wanted, found, timeout_seconds=None) else "wrong"


def quick(answer: str, gold: str) -> Verdict | None:
    """The verdict where the texts, or two plain numbers, decide; None where sympy has to."""
    if not gold.strip():
        return "unscored"
    box = last_boxed(answer)
    if box is None:
        return None if any(sign.isalnum() for sign in answer[-LONGEST:]) else "wrong"
    if len(box) > LONGEST or not box.strip():
        return "wrong"
    told, wanted = normal(box), normal(last_boxed(gold) or gold)
    if told == wanted:
        return "right"
    numbers = as_number(told), as_number(wanted)
    return None if None in numbers else "right" if numbers[0] == numbers[1] else "wrong"


def normal_answer(answer: str) -> str | None:
    """The content of the last box in one spelling: a number as a fraction; None where there is no box, or nothing in
    it but what LaTeX has for the eye."""
    box = last_boxed(answer)
    if box is None or len(box) > LONGEST:
        return None
    text = normal(box)
    number: Fraction | None = as_number(text)
    return text or None if number is None else str(number)


def normal(text: str) -> str:
    """An expression without the differences that LaTeX allows: spaces, sizes, kinds of fraction, `\\text{}`."""
    plain = _TEXT.sub(r"\1", unicodedata.normalize("NFKC", text).replace("\\$", "").replace("−", "-"))
    plain = plain.replace("dfrac", "frac").replace("tfrac", "frac").replace("{,}", ",").replace("\\!", "")
    plain = _SHORT_FRACTION.sub(r"\\frac{\1}{\2}", _DROPPED.sub("", plain)).rstrip(".。")
    if whole := _FRACTION.fullmatch(plain):
        top, bottom = re.findall(r"\{(\d+)\}", plain)
        plain = f"{'-' if whole.group().startswith('-') else ''}{top}/{bottom}"
    return plain
