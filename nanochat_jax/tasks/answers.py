"""Parsing of the number after `####`, to evaluate replies to questions in a user's own files.

GSM8K and SpellingBee use upstream's rule, which compares the first such number as text:
`gsm8k.final_answer`.
"""

import re
from fractions import Fraction

_MARK = re.compile(r"(?<!#)####(?!#)")
_AROUND = r"[\s*_`$€£¥\\({]{0,20}(?:boxed\{)?"  # Markdown, LaTeX and currencies
_MINUS = "\u2212\u2013\uff0d-"  # the hyphen last, for character classes
_START = rf"{_AROUND}(?P<sign>[+{_MINUS}]?){_AROUND}"
_BEGUN = re.compile(rf"{_START}\.?\d")
_NUMBER = re.compile(
    rf"{_START}"
    r"(?P<number>(?:\d{1,3}(?:[,\u00a0\u2009\u202f]\d{3})+|\d+)?(?:\.\d+)?)(?<=\d)"
    r"(?:[eE](?P<exponent>[-+]?\d{1,3}))?(?:\s?/\s?(?P<divisor>\d+))?"
    # Not a prefix of something else: 1,2 or 1 000 or 10:30 or 5-3 or 2^5 or 1e9999.
    rf"(?!\d|[eE][-+]?\d|[,.:^*x×/+{_MINUS}]\d| \d)"
)


def has_answer(text: str) -> bool:
    """Whether the text contains `####`."""
    return _MARK.search(text) is not None


def last_answer(text: str) -> Fraction | None:
    """The exact value of the last number that follows `####`; None if there is none or it is
    malformed.

    Supports thousands separators, decimals, exponents, fractions, and currencies or Markdown around
    the number.
    """
    for mark in reversed(list(_MARK.finditer(text))):
        if not _BEGUN.match(text, mark.end()):
            continue
        number = _NUMBER.match(text, mark.end())
        return None if number is None else _value(number)
    return None


def _value(match: re.Match[str]) -> Fraction | None:
    digits = re.sub("[,\u00a0\u2009\u202f]", "", match["number"])
    try:
        value = Fraction(digits) * Fraction(10) ** int(match["exponent"] or 0)
        value /= int(match["divisor"] or 1)
    except (ValueError, ZeroDivisionError):  # too many digits, or division by 0
        return None
    return value if match["sign"] in ("", "+") else -value


def same_text(reply: str, reference: str) -> bool:
    """Whether two texts are equal except for case and white space."""
    return " ".join(reply.split()).casefold() == " ".join(reference.split()).casefold()
