"""Judge an answer: plain functions from (answer, gold) to right, wrong or unscored.

Only the answer is judged, never the reasoning. A gold that cannot be read gives `unscored`, not `wrong`.
"""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction

from dsr1kit.records import Verdict

# A minus behind a digit or a bracket subtracts; it is no sign.
_NUMBER = re.compile(r"(?:(?<![\d)])[-−])?(?:\d+(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?(?:/\d+)?|\.\d+)", re.ASCII)
_BRACES = re.compile(r"\\boxed\{|[{}]")
# The exponent of a unit: cm², \text{ cm}^2, m^{3}.
_UNIT_POWER = re.compile(r"(?<=[A-Za-z}])\s*(?:[²³]|\^\{?\d+\}?)")


def score_number(answer: str, gold: str, *, boxed_only: bool = False) -> Verdict:
    """Whether the answer's number equals the gold's, exactly.

    The number is the content of the last `\\boxed{}`, or, where there is none, the last number of the text.
    With `boxed_only` (for answers cut off by a limit) a number outside a closed box counts for nothing.
    Thousands separators, full-width digits, a fraction and a unit behind the number are understood.
    """
    wanted = _number(gold)
    if wanted is None:
        return "unscored"
    box = last_boxed(answer)
    if box is None and boxed_only:
        return "wrong"
    return "right" if _number(answer if box is None else box) == wanted else "wrong"


def last_boxed(text: str) -> str | None:
    """The content of the last `\\boxed{...}` with balanced braces; None where there is none."""
    # One pass: an answer that repeats `\\boxed{` without end must not cost the square of its length.
    begun: list[int | None] = []
    last: tuple[int, int] | None = None
    for brace in _BRACES.finditer(text):
        if brace.group() != "}":
            begun.append(None if brace.group() == "{" else brace.end())
        elif begun and (start := begun.pop()) is not None and (last is None or start > last[0]):
            last = (start, brace.start())
    return None if last is None else text[slice(*last)]


def _number(text: str) -> Fraction | None:
    plain = unicodedata.normalize("NFKC", _UNIT_POWER.sub("", text)).replace("\\,", "").replace("{,}", ",")
    plain = re.sub(r"\\[dt]?frac\{(-?\d+)\}\{(\d+)\}", r"\1/\2", plain)
    found = _NUMBER.findall(plain)
    if not found:
        return None
    try:
        return Fraction(found[-1].replace(",", "").replace("−", "-"))
    except (ValueError, ZeroDivisionError):
        return None
