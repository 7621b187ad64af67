"""Numbers as people write them, read whole.

The grammar of a *value*: a sign; a currency sign; an integer, with thousands separated by commas,
spaces, underscores or apostrophes, or a decimal number with a point; a fraction (1/2,
\\frac{1}{2}), a mixed number (1 1/2), a power (10^2) or scientific notation (1e-3, 3 x 10^2,
3 \\times 10^{2}); a factor (thousand, million, dozen); % (a hundredth) or a unit. Small numbers may
be words. "3,5", dates, times, ranges and lists are no values: each can be read in two ways.
"""

from __future__ import annotations

import math
import re
from typing import NamedTuple

from megatron_mm.evaluation.final_answer import normal_text, plain

# dimension -> factor to its basic unit -> names
_UNITS: dict[str, dict[float, str]] = {
    "length": {
        1e-3: "mm millimeter millimetre millimeters millimetres",
        1e-2: "cm centimeter centimetre centimeters centimetres",
        1.0: "m meter metre meters metres",
        1e3: "km kilometer kilometre kilometers kilometres",
        0.0254: "inch inches",
        0.3048: "ft foot feet",
        1609.344: "mile miles",
    },
    "mass": {
        1e-3: "mg milligram milligrams",
        1.0: "g gram grams",
        1e3: "kg kilogram kilograms",
    },
    "time": {
        1e-3: "ms millisecond milliseconds",
        1.0: "s sec second seconds",
        60.0: "min minute minutes",
        3600.0: "h hr hour hours",
        86400.0: "day days",
    },
    "volume": {
        1e-3: "ml mL milliliter millilitre milliliters millilitres",
        1.0: "l L liter litre liters litres",
    },
    "area": {1.0: "m^2 m2", 1e-4: "cm^2 cm2", 1e6: "km^2 km2"},
    "space": {1.0: "m^3 m3", 1e-6: "cm^3 cm3"},
    "speed": {1.0: "m/s", 1 / 3.6: "km/h kph"},
    "angle": {1.0: "\u00b0 degree degrees deg"},
    "dollars": {1.0: "$ USD dollar dollars", 0.01: "cent cents"},
    "euros": {1.0: "\u20ac EUR euro euros"},
    "pounds": {1.0: "\u00a3 GBP"},
    "yen": {1.0: "\u00a5 JPY yen"},
    "temperature": {1.0: "\u00b0C"},
    "temperature F": {1.0: "\u00b0F"},
    "morning": {1.0: "am a.m. AM"},
    "afternoon": {1.0: "pm p.m. PM"},
}
_UNIT = {
    name: (dimension, factor)
    for dimension, factors in _UNITS.items()
    for factor, names in factors.items()
    for name in names.split()
}
_FACTORS = {"dozen": 12, "hundred": 100, "thousand": 1e3, "million": 1e6, "billion": 1e9}
_FACTORS |= {"trillion": 1e12}
_SMALL = [
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    *("eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen"),
    "nineteen",
]
_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
NUMBER_WORDS = _SMALL + _TENS
_NOT_UNITS = {"or", "and", "of", "to", "than", "half", "halves", "third", "thirds", "quarter"}
_NOT_UNITS |= {"quarters", "fifths", "tenths", *NUMBER_WORDS}

_INT = (
    r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d{1,3}(?: \d{3})+(?!\d)|\d{1,3}(?:'\d{3})+(?!\d)"
    r"|\d{1,3}(?:_\d{3})+(?!\d)|\d+)"
)
_DEC = rf"(?:{_INT}(?:\.\d+)?|\.\d+)"
_EXPONENT = (
    r"\s?(?:\^|\*\*)\s?(?:\{\s?(?P<%s1>[-+]?\d{1,4})\s?\}"
    r"|\(\s?(?P<%s2>[-+]?\d{1,4})\s?\)|(?P<%s3>[-+]?\d{1,4}))"
)
_POWER_OF_TEN = _EXPONENT.replace("%s", "e")
_POWER_OF_ANY = _EXPONENT.replace("%s", "p")
_NAMES = "|".join(sorted((re.escape(name) for name in _UNIT if name != "$"), key=len, reverse=True))
NUMBER = re.compile(
    r"(?:(?<![\w)])(?P<sign>[-+]))?(?P<currency>[$\u20ac\u00a3\u00a5])?(?P<late>(?<=[$\u20ac\u00a3\u00a5])-)?"
    r"(?:"
    rf"(?:(?P<whole>\d+)\s?)?\\frac\s?(?:\{{\s?(?P<top>-?{_DEC})\s?\}}|(?P<top1>\d))"
    rf"\s?(?:\{{\s?(?P<under>{_DEC})\s?\}}|(?P<under1>\d))"
    rf"|(?P<mixed>\d+)[ -](?P<upper>\d+)/(?P<lower>\d+)"
    rf"|(?P<over>{_DEC}) ?/ ?(?P<below>{_DEC})"
    rf"|(?:(?P<lead>{_DEC})\s?(?:[xX\u00d7*\u00b7\u22c5]|\\times|\\cdot)\s?)?10{_POWER_OF_TEN}"
    rf"|(?P<base>\d{{1,9}}){_POWER_OF_ANY}"
    rf"|(?P<plain>{_DEC})(?:[eE](?P<exponent>[-+]?\d{{1,4}}))?"
    r")"
    rf"(?:\s(?P<times>{'|'.join(_FACTORS)})\b)?"
    rf"(?:\s?(?P<percent>%|percent\b|per cent\b)|\s?(?P<unit>{_NAMES})(?![\w^/.\u00b0]*\w))?"
)
_WORDS_AFTER = re.compile(
    r"(?!\s*(?:or|and|to|not|nor|of|out|than|minus|plus|times|over|by|per)\b)"
    r"(?!\s*(?:january|february|march|april|may|june|july|august|september|october|november|"
    r"december|jan|feb|mar|apr|jun|jul|aug|sept?|oct|nov|dec)\b)"
    r"\s+[A-Za-z\u00b0\u00b5][A-Za-z\u00b5/. -]{1,60}(?:\^\{?[23]\}?)?",
    re.IGNORECASE,
)
_VARIABLE = re.compile(r"(?<![A-Za-z\\])[A-Za-z](?![A-Za-z])")
_DIGIT = re.compile(r"\d")
_INDEXED = re.compile(r"\s*[A-Za-z](?:_?\{?\d\}?|\(\d+\))\s*")
LEAD = re.compile(
    r"\s*(?:(?:approximately|approx\.?|about|around|roughly|exactly|only|just|precisely|simply|"
    r"clearly|therefore|thus|then|now|actually|equal to|a total of|the number|"
    r"(?:it|that)(?:'s|\u2019s| is| must be| should be)|[\u2248~=:])\s*)*",
    re.IGNORECASE,
)


class Value(NamedTuple):
    """A number with its unit; `dimension` is None where no known unit stands."""

    amount: float
    dimension: str | None = None
    factor: float = 1.0


def parse_value(text: str) -> Value | None:
    """Returns the value that a text is as a whole, with a name before = and unknown words after it
    left aside ("x = 7", "7 apples"); None if it is none. Where = joins several numbers, as in
    "8 = 7", they have to be the same."""
    text = " ".join(plain(text[:1000]).split()).lstrip("\"' ").rstrip(".,;\"' ")
    if "=" in text:
        sides = [side for side in text.split("=") if side.strip()]
        values = [parse_value(side) for side in sides]
        last = values[-1] if values else None
        same = all(v is None or last is None or close(v, last) for v in values)
        # x = 7, a + b = 7 and 3 + 4 = 7 say 7; 2x = 7 and x^2 = 7 say it of something else.
        scaled = any(_VARIABLE.search(side) and _DIGIT.search(side) for side in sides[:-1])
        named = any(_INDEXED.fullmatch(side) for side in sides[:-1])
        return last if same and (named or not scaled) else None
    text = text[LEAD.match(text).end() :]  # type: ignore[union-attr]
    if text.startswith("(") and text.endswith(")"):
        text = text[1:-1].strip()
    found = NUMBER.match(re.sub(r"^([-+])\s+(?=[\d.$\\])", r"\1", text))
    if found is None:
        return in_words(text)
    rest = found.string[found.end() :]
    if rest and (found["unit"] or found["percent"] or not _WORDS_AFTER.fullmatch(rest)):
        return None
    return value_of(found)


def close(one: Value, other: Value, tolerance: float = 1e-9, relative: float = 1e-9) -> bool:
    """Whether two values are within tolerance + relative * |other|, in the unit of `other`. A value
    without a unit fits any; values of different dimensions never do."""
    if one.dimension and other.dimension:
        if one.dimension != other.dimension:
            return False
        amount = one.amount * (one.factor / other.factor)
    else:
        amount = one.amount
    # The last digits of a binary fraction are not the model's fault.
    slack = 1e-12 * max(abs(amount), abs(other.amount))
    return abs(amount - other.amount) <= tolerance + relative * abs(other.amount) + slack


def in_words(text: str) -> Value | None:
    words = normal_text(text).replace("-", " ").split()
    if not words or len(words) > 4:
        return None
    negative = words[0] in ("minus", "negative")
    words = words[negative:]
    if words and words[0] in _TENS:
        amount = 20 + 10 * _TENS.index(words[0])
        units = words[1:2] if words[1:2] and words[1] in _SMALL[1:10] else []
        amount, words = amount + (_SMALL.index(units[0]) if units else 0), words[1 + len(units) :]
    elif words and words[0] in _SMALL:
        amount, words = _SMALL.index(words[0]), words[1:]
    else:
        return None
    factor = _FACTORS.get(words[0], 1) if words else 1
    words = words[factor != 1 :]
    if words and (len(words) > 1 or words[0] in _NOT_UNITS):
        return None
    dimension, scale = _UNIT.get(words[0], (None, 1.0)) if words else (None, 1.0)
    return Value(float(-amount if negative else amount) * factor, dimension, scale)


def value_of(found: re.Match[str]) -> Value | None:
    try:
        amount = _amount(found)
    except (ZeroDivisionError, OverflowError):
        return None
    if "-" in (found["sign"] or "", found["late"] or ""):
        amount = -amount
    amount *= _FACTORS.get(found["times"] or "", 1)
    if found["percent"]:
        amount /= 100
    if not math.isfinite(amount):
        return None
    unit = found["unit"] or found["currency"]
    return Value(amount, *(_UNIT[unit] if unit else (None, 1.0)))


def _amount(found: re.Match[str]) -> float:
    top, under = found["top"] or found["top1"], found["under"] or found["under1"]
    if top:
        return _float(found["whole"] or "0") + _float(top) / _float(under)
    if found["mixed"]:
        return _float(found["mixed"]) + _float(found["upper"]) / _float(found["lower"])
    if found["over"]:
        return _float(found["over"]) / _float(found["below"])
    power = found["e1"] or found["e2"] or found["e3"]
    if power:
        return float(f"{_digits(found['lead'] or '1')}e{power}")
    power = found["p1"] or found["p2"] or found["p3"]
    if power:
        return _float(found["base"]) ** int(power)
    return float(f"{_digits(found['plain'])}e{found['exponent'] or 0}")


def _digits(text: str) -> str:
    return re.sub(r"[,_' ]", "", text)


def _float(text: str) -> float:
    return float(_digits(text))
