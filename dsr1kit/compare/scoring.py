"""Judge an answer: plain functions from (answer, gold) to right, wrong or unscored.

Only the answer is judged, never the reasoning. A gold that cannot be read gives `unscored`, not `wrong`.
"""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction

from dsr1kit.records import Verdict

_NUMBER = re.compile(r"[-−]?\d+(?:,\d{3})+(?:\.\d+)?|[-−]?\d+(?:\.\d+)?(?:/\d+)?|[-−]?\.\d+")


def score_number(answer: str, gold: str) -> Verdict:
    """Whether the answer's number equals the gold's, exactly.

    The number is the content of the last `\\boxed{}`, or, where there is none, the last number of the text.
    Thousands separators, full-width digits, a fraction and a unit behind the number are understood.
    """
    wanted = _number(gold)
    if wanted is None:
        return "unscored"
    box = last_boxed(answer)
    return "right" if _number(answer if box is None else box) == wanted else "wrong"


def last_boxed(text: str) -> str | None:
    """The content of the last `\\boxed{...}` with balanced braces; None where there is none."""
    start = text.rfind("\\boxed{")
    while start >= 0:
        depth = 0
        for at in range(start + len("\\boxed"), len(text)):
            depth += {"{": 1, "}": -1}.get(text[at], 0)
            if depth == 0:
                return text[start + len("\\boxed{") : at]
        start = text.rfind("\\boxed{", 0, start)
    return None


def _number(text: str) -> Fraction | None:
    plain = unicodedata.normalize("NFKC", text).replace("\\,", "").replace("{,}", ",")
    plain = re.sub(r"\\[dt]?frac\{(-?\d+)\}\{(\d+)\}", r"\1/\2", plain)
    found = _NUMBER.findall(plain)
    if not found:
        return None
    try:
        return Fraction(found[-1].replace(",", "").replace("−", "-"))
    except (ValueError, ZeroDivisionError):
        return None
