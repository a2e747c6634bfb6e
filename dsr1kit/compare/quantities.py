"""Numbers with units: read from a text, and held against one another across units of one dimension.

Knows units of length, mass, time, temperature, area, volume, speed and money, English and Chinese; a word that is
no unit (apples) is a dimension of its own. Currencies are never converted.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import cache

#: How far two numbers may lie apart, relative to the gold, where the gold says nothing.
TOLERANCE = Fraction(1, 10**6)
_MOST = 2_000

# Names of a unit, and how many metres, kilograms or seconds it is.
_LENGTH = {
    "nm nanometer 纳米": "1e-9", "μm micrometer micron 微米": "1e-6", "mm millimeter 毫米": "0.001",
    "cm centimeter 厘米": "0.01", "dm decimeter 分米": "0.1", "m meter 米": "1", "km kilometer 千米 公里": "1000",
    "in inch 英寸": "0.0254", "ft foot feet 英尺": "0.3048", "yd yard 码": "0.9144", "mi mile 英里": "1609.344",
    "里": "500",
}  # fmt: skip
_MASS = {
    "mg milligram 毫克": "1e-6", "g gram 克": "0.001", "kg kilogram kilo 千克 公斤": "1", "t tonne 吨": "1000",
    "lb lbs pound 磅": "0.45359237", "oz ounce 盎司": "0.028349523125", "斤": "0.5", "两": "0.05",
}  # fmt: skip
_TIME = {
    "ms millisecond 毫秒": "0.001", "s sec second 秒 秒钟": "1", "min minute 分钟 分": "60",
    "h hr hrs hour 小时 个小时 钟头": "3600", "d day 天": "86400", "week 周 星期 个星期": "604800",
}  # fmt: skip
_VOLUME = {"ml milliliter 毫升": "1e-6", "cl centiliter": "1e-5", "l liter 升": "0.001"}
_AREA = {"ha hectare 公顷": "10000", "acre 英亩": "4046.8564224", "亩": "2000/3"}
_SPEED = {"mph": "0.44704", "kph kmh 千米/时 公里/时": "5/18", "knot 节": "463/900"}
# Units of which none turns into another.
_PLAIN = {
    "usd": "$ usd us$ dollar 美元", "cny": "¥ 元 块 人民币 yuan rmb cny", "eur": "€ euro eur 欧元", "gbp": "£ gbp 英镑",
    "%": "% percent 百分之", "year": "year yr 年 岁", "month": "month 个月 月", "degree": "degree deg 度",
}  # fmt: skip
# Zero of the scale in kelvin, and kelvin a degree.
_TEMPERATURE = {
    "k kelvin 开尔文": ("0", "1"), "°c celsius 摄氏度": ("273.15", "1"), "°f fahrenheit 华氏度": ("45967/180", "5/9"),
}  # fmt: skip

_AMOUNT = r"[-−+]?(?:\d+(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?(?:/\d+)?|\.\d+)(?:(?:e|×10\^)[-+−]?\d{1,3}(?!\d))?"
# \frac{1}{2}, \frac12, 2\frac{1}{2}; a number that goes on before it, as 1.5, is none of its own.
_FRACTION = re.compile(
    r"(?:(?<![\d.,])(\d{1,18})\s*)?\\[dt]?frac\s*(?:\{\s*(-?\d{1,18})\s*\}|(\d))\s*(?:\{\s*(\d{1,18})\s*\}|(\d))"
)
_NUMBER = re.compile(
    rf"(?P<before>us\$|[$€£¥]|\b(?:usd|cny|rmb|eur|gbp)\b)?\s*(?<![\d.])(?P<number>{_AMOUNT})(?:\s*±\s*(?P<margin>{_AMOUNT}))?",
    re.ASCII | re.IGNORECASE,
)
_DRESSED = re.compile(r"\\(?:text|textbf|mathrm|mathbf|operatorname|unit|si)\s*\{([^{}]*)\}")
# What a number counts where that is no unit of the table: apples, 个苹果, m/s².
_WORD = re.compile(r"[A-Za-z]+[A-Za-z0-9²³/^·]*|[\u3400-\u9fff]{1,6}")
_JOINT = re.compile(r"\s*(?:,|and|又|零|和)?\s*")
_LONGEST_NAME = 32


@dataclass(frozen=True, slots=True)
class Unit:
    """A unit: its dimension, and the value of one of it and of zero of it in the dimension's own unit."""

    dimension: str
    factor: Fraction = Fraction(1)
    zero: Fraction = Fraction(0)


@dataclass(frozen=True, slots=True)
class Quantity:
    """A number and what it counts.

    Attributes:
        number: as written, in `unit`.
        unit: None: no unit was given.
        margin: how far off a number may be, in `unit`; None: `TOLERANCE` of the number.
    """

    number: Fraction
    unit: Unit | None
    margin: Fraction | None = None

    @property
    def value(self) -> Fraction:
        """The number in its dimension's own unit."""
        return self.number if self.unit is None else self.unit.zero + self.number * self.unit.factor

    def allows(self, other: Quantity) -> bool:
        """Whether another quantity is this one, within its margin."""
        margin = abs(self.number) * TOLERANCE if self.margin is None else self.margin
        if other.unit is None or self.unit is None:
            return (other.unit is None or self.unit is None) and abs(other.number - self.number) <= margin
        if other.unit.dimension != self.unit.dimension:
            return False
        return abs(other.value - self.value) <= margin * self.unit.factor

    def normal(self) -> str:
        """A string that is the same for the same quantity in another unit."""
        try:
            number = f"{float(self.value):.9g}"
        except OverflowError:
            number = str(self.value)
        return f"{number} {self.unit.dimension if self.unit else ''}".strip()


def read(text: str, *, whole: bool) -> Quantity | None:
    """The last quantity of a text; "1 h 30 min" is one. None where there is no number.

    Args:
        text: an answer, the content of a box, or a gold.
        whole: the text is nothing but a quantity, so that an unknown word behind the number is what it counts; in
            running text such a word says nothing.
    """
    plain = _cleaned(text[-_MOST:])
    found: Quantity | None = None
    end = 0
    for one in _NUMBER.finditer(plain):
        number = _fraction(one["number"])
        if number is None:
            continue
        unit, at = _unit_at(plain, one.end(), whole=whole)
        if unit is None and one["before"]:
            unit = _units()[one["before"].lower()]
        joined = found is not None and _JOINT.fullmatch(plain, end, one.start()) is not None
        last = Quantity(number, unit, _fraction(one["margin"]) if one["margin"] else None)
        found, end = _added(found if joined else None, last), at
    return found


def _unit_at(text: str, start: int, *, whole: bool) -> tuple[Unit | None, int]:
    """The unit that stands at a place, the longest name first, and where it ends."""
    at = start
    while text[at : at + 1] in (" ", "\n", "-"):  # a 5-km run
        at += 1
    for length in range(min(_LONGEST_NAME, len(text) - at), 0, -1):
        last, after = text[at + length - 1], text[at + length : at + length + 1]
        goes_on = after in tuple("²³/·^") or (last.isascii() and last.isalpha() and after.isascii() and after.isalpha())
        if last != " " and not goes_on and (unit := _known(text[at : at + length])) is not None:
            return unit, at + length
    if whole and (word := _WORD.match(text, at)):
        return Unit("=" + re.sub(r"(?<=[a-z]{2})s$", "", word.group().casefold())), word.end()
    return None, start


def _known(text: str) -> Unit | None:
    """A unit by its name; capitals, the plural and British spelling make no difference."""
    name = " ".join(text.casefold().split()).replace(" / ", "/").replace("metre", "meter").replace("litre", "liter")
    for ending in ("", r"(?<=[a-z]{2})s\b", r"(?<=[a-z]{3})es\b"):
        if (unit := _units().get(re.sub(ending, "", name) if ending else name)) is not None:
            return unit
    return None


def _added(before: Quantity | None, last: Quantity) -> Quantity:
    """`1 h` and then `30 min` are 90 min; anything else is the last one alone."""
    if before is None or before.unit is None or last.unit is None or before.unit.zero or last.unit.zero:
        return last
    if before.unit.dimension != last.unit.dimension or before.unit.factor <= last.unit.factor:
        return last
    return Quantity(last.number + before.number * before.unit.factor / last.unit.factor, last.unit, last.margin)


def plain_fractions(text: str) -> str:
    """A text with LaTeX's fractions as 7/11, those with a whole number before them as one fraction too."""
    return _FRACTION.sub(_plain_fraction, text)


def _plain_fraction(found: re.Match[str]) -> str:
    whole, top, bottom = found[1], found[2] or found[3], found[4] or found[5]
    if whole is None:
        return f"{top}/{bottom}"
    if top.startswith("-"):
        return found[0]
    return f"{int(whole) * int(bottom) + int(top)}/{bottom}"


def _cleaned(text: str) -> str:
    plain = _DRESSED.sub(r" \1 ", text.replace("\\$", "US$"))
    if plain.replace("US$", "").count("$") % 2 == 0:  # they delimit mathematics
        plain = re.sub(r"(?<!US)\$", " ", plain)
    for old, new in (
        ("{,}", ","), ("\\!", ""), ("\\,", " "), ("\\;", " "), ("\\ ", " "), ("~", " "), ("\\%", "%"),
        ("^{\\circ}", "°"), ("^\\circ", "°"), ("\\degree", "°"), ("\\pm", "±"), ("+/-", "±"), ("\\times", "×"),
        ("\\cdot", "×"), ("\\mu", "μ"), ("\\euro", "€"), ("\\left", ""), ("\\right", ""), ("µ", "μ"), ("￥", "¥"),
    ):  # fmt: skip
        plain = plain.replace(old, new)
    plain = plain_fractions(plain)
    plain = re.sub(r"(?<=[A-Za-z])[\s·]+(s|h|min)\s*\^\s*\{?\s*[-−]1\s*\}?", r"/\1", plain)  # m s^{-1}
    # The powers of units are set apart before compatibility forms make plain digits of them.
    plain = re.sub(r"(?<=[A-Za-z])\s*\^\s*\{?([23])\}?", lambda m: "²³"[int(m[1]) - 2], plain)
    plain = plain.replace("²", "\ue002").replace("³", "\ue003").replace("℃", "°c").replace("℉", "°f")
    plain = unicodedata.normalize("NFKC", plain).replace("\ue002", "²").replace("\ue003", "³")
    plain = re.sub(r"(?<=\d) (?=\d{3}(?!\d))", "", plain)
    plain = re.sub(r"\s*×\s*10\s*\^\s*\{?\s*([-+−]?\d{1,3})\s*\}?", r"×10^\1", plain)
    return re.sub(r"°\s*([CF])(?![A-Za-z])", r"°\1", plain.replace("{", "").replace("}", ""))


def _fraction(text: str) -> Fraction | None:
    plain = text.replace(",", "").replace("−", "-").replace("×10^", "e").replace("*10^", "e")
    mantissa, _, power = plain.lower().partition("e")
    try:
        return Fraction(mantissa) * Fraction(10) ** int(power or 0)
    except (ValueError, ZeroDivisionError):
        return None


@cache
def _units() -> dict[str, Unit]:
    units: dict[str, Unit] = {}

    def names_of(table: dict[str, str]) -> Iterator[tuple[str, Fraction]]:
        for names, factor in table.items():
            yield from ((name, Fraction(factor)) for name in names.split())

    tables = {"length": _LENGTH, "mass": _MASS, "time": _TIME, "volume": _VOLUME, "area": _AREA, "speed": _SPEED}
    for dimension, table in tables.items():
        units |= {name: Unit(dimension, factor) for name, factor in names_of(table)}
    for length, factor in names_of(_LENGTH):
        for power, dimension, sign, words in (
            (2, "area", "²", ("square ", "sq ", "sq. ", "平方")),
            (3, "volume", "³", ("cubic ", "cu ", "立方")),
        ):
            for name in (length + sign, *(word + length for word in words)):
                units[name] = Unit(dimension, factor**power)
        for time, seconds in names_of(_TIME):
            for joint in ("/", " per ", " an ", "每"):
                units[length + joint + time] = Unit("speed", factor / seconds)
    units |= {name: Unit(dimension) for dimension, names in _PLAIN.items() for name in names.split()}
    for names, (zero, factor_text) in _TEMPERATURE.items():
        scale = Unit("temperature", Fraction(factor_text), Fraction(zero))
        units |= dict.fromkeys(names.split(), scale)
        units |= dict.fromkeys((f"degree {name}" for name in names.split() if name.isascii()), scale)
    units["°"] = units["degree"]
    return units
