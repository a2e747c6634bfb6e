"""Judge an answer: plain functions from (answer, gold) to right, wrong or unscored.

Only the answer is judged, never the reasoning. A gold that cannot be read gives `unscored`, not `wrong`.
Knows nothing about replies, or in which process it runs.
"""

from __future__ import annotations

import datetime as dt
import re
import unicodedata
from collections.abc import Callable, Mapping
from fractions import Fraction
from types import MappingProxyType

from dsr1kit.compare import quantities
from dsr1kit.records import Verdict

# A minus behind a digit or a bracket subtracts; it is no sign.
_NUMBER = re.compile(r"(?:(?<![\d)])[-−])?(?:\d+(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?(?:/\d+)?|\.\d+)", re.ASCII)
_BRACES = re.compile(r"\\boxed\{|[{}]")
# The exponent of a unit: cm², \text{ cm}^2, m^{3}.
_UNIT_POWER = re.compile(r"(?<=[A-Za-z}])\s*(?:[²³]|\^\{?\d+\}?)")
_THIN_SPACE = re.compile(r"(?<=\d)\\[ ,;!:](?=\d{3}(?!\d))")  # between thousands
_DENIED = re.compile(r"(?:\bnot|n't|\bnever|≠|\\neq?|不是|并非|不等于)\s*(?:equal to|exactly)?\s*$", re.IGNORECASE)
# What stands behind the last of these, to the end of its line, is the answer where nothing is boxed.
_STATED = re.compile(r"(?:\banswer\b(?:\s+is\b)?|答案)\s*(?:[:：]|是|为|(?<=\bis))[ \t]*(?:\*\*)?", re.IGNORECASE)
_DRESSED = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mathsf|operatorname)\s*\{([^{}]*)\}")
_TEXT_MOST = 2_000
_EDGES = " \t\n.,;:!?。，；：！？、*_`$\"'“”‘’「」《》"
_CHINESE_SPACE = re.compile(r"(?<=[\u3400-\u9fff]) | (?=[\u3400-\u9fff])")

_LETTER = re.compile(r"\(?([A-Ja-j])\)?")
_LETTER_AND_TEXT = re.compile(r"\(?([A-J])(?:[).:：、]|\)[.:：])\s*(.+)", re.DOTALL)
_CHOSEN = re.compile(
    r"(?:\b(?i:answer|option|choice)\b|答案|选项|选择|应选|选)"
    r"\s*(?i:is|would be|:|：|是|为|应为|选|option|choice|[*_$(\s])*"
    r"([A-J])(?![A-Za-z])"
)
_ANOTHER = re.compile(r"[)*_}\s]*(?:,|/|、|&|\band\b|\bor\b|和|或|与|及)\s*[(*_]*[A-J](?![A-Za-z])")

_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_MONTH = r"(jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)[a-z]{0,6}\.?"
_DATE = re.compile(
    r"(?<!\d)(\d{4})(?:[-/.]|\s?年\s?)(\d{1,2})(?:[-/.]|\s?月\s?)(\d{1,2})(?!\d)"
    rf"|\b{_MONTH}\s+(\d{{1,2}})(?:st|nd|rd|th)?,?\s+(\d{{4}})(?!\d)"
    rf"|(?<!\d)(\d{{1,2}})(?:st|nd|rd|th)?\s+(?:of\s+)?{_MONTH},?\s+(\d{{4}})(?!\d)",
    re.IGNORECASE,
)


def score_number(answer: str, gold: str, *, boxed_only: bool = False) -> Verdict:
    """Whether the answer's number equals the gold's, exactly.

    The number is the content of the last `\\boxed{}`, or, where there is none, the last number of the text, unless
    it is said what it is not. With `boxed_only` (for answers cut off by a limit) a number outside a closed box
    counts for nothing. Thousands separators, full-width digits, a fraction and a unit behind the number are
    understood.
    """
    wanted = _number(gold)
    if wanted is None:
        return "unscored"
    box = last_boxed(answer)
    if box is None and boxed_only:
        return "wrong"
    return "right" if _number(answer if box is None else box) == wanted else "wrong"


def score_choice(answer: str, gold: str) -> Verdict:
    """Whether the letter chosen, A to J, is the gold's.

    The letter is that of the last box, or of the last "Answer: C", "the answer is (C)" or "答案是C", or all there
    is. Two letters are no choice.
    """
    wanted = _letter(gold)
    if wanted is None:
        return "unscored"
    return "right" if _letter(answer) == wanted else "wrong"


def score_exact(answer: str, gold: str) -> Verdict:
    """Whether the answer's text is the gold's, or one of several separated by " | ".

    Width, case, spaces, final punctuation and `\\text{}` make no difference. The text is that of the last box, or
    what follows the last "Answer:", or all of it.
    """
    wanted = {plain_text(one) for one in gold.split(" | ")} - {""}
    if not wanted:
        return "unscored"
    return "right" if plain_text(stated(answer)) in wanted else "wrong"


def score_date(answer: str, gold: str) -> Verdict:
    """Whether the answer's date is the gold's, which is written as 2024-03-05.

    Understood are ISO dates, "March 5, 2024", "5 March 2024" and "2024年3月5日", of the last box or the last of the
    text; figures such as 3/5/2024 mean two things and are wrong.
    """
    wanted = _date(gold)
    if wanted is None:
        return "unscored"
    return "right" if _date(stated(answer)) == wanted else "wrong"


def score_quantity(answer: str, gold: str) -> Verdict:
    """Whether the answer's number and unit are the gold's, such as "1.5 h" or "9.8 ± 0.1 m/s".

    Another unit of the same dimension is converted; an answer without a unit is right if its number is; a unit of
    another dimension is wrong. Numbers may differ by a millionth, or by what the gold allows behind "±".
    """
    wanted = quantities.read(gold, whole=True)
    if wanted is None:
        return "unscored"
    box = last_boxed(answer)
    found = quantities.read(answer if box is None else box, whole=box is not None)
    return "right" if found is not None and wanted.allows(found) else "wrong"


def score_math(answer: str, gold: str) -> Verdict:
    """Whether the answer's expression equals the gold's as mathematics; see `mathematics.score`."""
    from dsr1kit.compare import mathematics

    return mathematics.score(answer, gold)


def score_gym(answer: str, reference: str) -> Verdict:
    """Whether a reasoning-gym generator gives the answer its full score; see `gym.score`."""
    from dsr1kit.compare import gym

    return gym.score(answer, reference)


#: All scorers by name: plain functions of the answer and what it is held against.
SCORERS: Mapping[str, Callable[[str, str], Verdict]] = MappingProxyType({
    "number": score_number,
    "choice": score_choice,
    "exact": score_exact,
    "date": score_date,
    "quantity": score_quantity,
    "math": score_math,
    "reasoning-gym": score_gym,
})  # fmt: skip
#: Those that may compute for long, or without end.
COSTLY = frozenset({"math", "reasoning-gym"})


def quick_verdict(answer: str, gold: str, scorer: str) -> Verdict | None:
    """The verdict where it costs next to nothing; None where a costly scorer has to compute."""
    if scorer not in COSTLY:
        return SCORERS[scorer](answer, gold)
    if scorer == "math":
        from dsr1kit.compare import mathematics

        return mathematics.quick(answer, gold)
    return None


def final_answer(answer: str, scorer: str) -> str | None:
    """The final answer, normalised so that equal answers give equal strings; None where there is none.

    Nothing costly is computed: two expressions that are equal only by algebra give two strings.
    """
    if scorer == "number":
        box = last_boxed(answer)
        found = _number(answer if box is None else box)
        return None if found is None else str(found)
    if scorer == "choice":
        return _letter(answer)
    if scorer == "date":
        day = _date(stated(answer))
        return None if day is None else day.isoformat()
    if scorer == "quantity":
        box = last_boxed(answer)
        quantity = quantities.read(answer if box is None else box, whole=box is not None)
        return None if quantity is None else quantity.normal()
    if scorer == "math":
        from dsr1kit.compare import mathematics

        return mathematics.normal_answer(answer)
    return plain_text(stated(answer)) or None


def last_boxed(text: str) -> str | None:
    """The content of the last `\\boxed{...}` with balanced braces; None where there is none."""
    if "\\boxed{" not in text:
        return None
    # One pass: an answer that repeats `\\boxed{` without end must not cost the square of its length.
    begun: list[int | None] = []
    last: tuple[int, int] | None = None
    for brace in _BRACES.finditer(text):
        if brace.group() != "}":
            begun.append(None if brace.group() == "{" else brace.end())
        elif begun and (start := begun.pop()) is not None and (last is None or start > last[0]):
            last = (start, brace.start())
    return None if last is None else text[slice(*last)]


def stated(answer: str) -> str:
    """What the answer states: its last box, else what follows the last "Answer:" on its line, else all of it."""
    box = last_boxed(answer)
    if box is not None:
        return box
    tail = answer[-_TEXT_MOST:]
    for found in _STATED.finditer(tail):
        line = tail[found.end() :].partition("\n")[0]
        if line.strip(_EDGES):
            answer = line
    return answer


def plain_text(text: str) -> str:
    """A text without the differences that do not count: width, case, spaces, outer punctuation, `\\text{}`."""
    if len(text) > 2 * _TEXT_MOST:
        return ""  # no short answer
    plain = _DRESSED.sub(r"\1", unicodedata.normalize("NFKC", text)).replace("\\ ", " ").casefold()
    return _CHINESE_SPACE.sub("", " ".join(plain.split()).strip(_EDGES))


def as_number(text: str) -> Fraction | None:
    """The number that a text is, all of it; None where it is anything else."""
    plain = _plain_number(text).strip()
    found = _NUMBER.fullmatch(plain)
    return None if found is None else _fraction(found.group())


def _plain_number(text: str) -> str:
    text = _THIN_SPACE.sub("", _UNIT_POWER.sub("", text))
    return quantities.plain_fractions(unicodedata.normalize("NFKC", text).replace("\\,", "").replace("{,}", ","))


def _number(text: str) -> Fraction | None:
    plain = _plain_number(text)
    last = None
    for last in _NUMBER.finditer(plain):  # noqa: B007 - the last one is what is wanted
        pass
    if last is None or _DENIED.search(plain, max(0, last.start() - 30), last.start()):
        return None
    return _fraction(last.group())


def _fraction(text: str) -> Fraction | None:
    try:
        return Fraction(text.replace(",", "").replace("−", "-"))
    except (ValueError, ZeroDivisionError):
        return None


def _letter(answer: str) -> str | None:
    box = last_boxed(answer)
    text = answer if box is None else box
    whole = _DRESSED.sub(r"\1", unicodedata.normalize("NFKC", text[-_TEXT_MOST:])).strip(_EDGES)
    if alone := _LETTER.fullmatch(whole):
        return alone.group(1).upper()
    if (named := _LETTER_AND_TEXT.fullmatch(whole)) and not _LETTER.fullmatch(named.group(2).strip(_EDGES)):
        return named.group(1)
    last = None
    for last in _CHOSEN.finditer(whole):  # noqa: B007 - the last one is what is wanted
        pass
    return None if last is None or _ANOTHER.match(whole, last.end()) else last.group(1)


def _date(text: str) -> dt.date | None:
    last = None
    for last in _DATE.finditer(_DRESSED.sub(r"\1", unicodedata.normalize("NFKC", text[-_TEXT_MOST:]))):  # noqa: B007
        pass
    if last is None:
        return None
    year, month, day, name, name_day, name_year, day_first, day_name, day_year = last.groups()
    if name or day_name:
        month = str(_MONTHS.index((name or day_name).lower()) + 1)
        year, day = name_year or day_year, name_day or day_first
    try:
        return dt.date(int(year), int(month), int(day))
    except ValueError:
        return None
