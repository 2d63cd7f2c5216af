"""The number that a text gives as its answer, as GSM8K's solutions and the models that are asked write it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from decimal import Decimal

_MINUS = "\\-\u2212\u2010\u2011\u2012\u2013\ufe63\uff0d"
"""Hyphens, dashes and the minus sign itself, all of which are written for it; inside a regular expression's brackets."""
_NUMBER = re.compile(
    # a minus is a sign where nothing stands before it that it could take a number from, or that it joins: "10-18", "x-5", "5%-10%"
    rf"(?:(?<![\w.,)\]}}%°{_MINUS}])(?<!\d[$€£])(?P<sign>[{_MINUS}]))?[$€£]?"
    # commas are thousands' where each is followed by three digits, and the number is none of a list: "1,2,180"
    r"(?P<digits>(?<!\d)(?<!\d,)\d{1,3}(?:,\d{3})+(?!,?\d)(?:\.\d+)?|\d+(?:\.\d+)?|(?<![\w.])\.\d+)"
    r"(?P<exponent>[eE][+-]?\d{1,3}(?!\w))?"
)
_MARK = re.compile(r"#{4,}")
_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_STEP = re.compile(r"\W*(?:step|part|case|question|problem|example|solution|method)\b", re.IGNORECASE)
"""Begins a heading, which some write with four ``#``, too."""


def answer_number(text: str) -> Decimal | None:
    r"""The number behind the first ``####`` that one follows, else in the first ``\boxed{}``, else the last of the text.

    What comes behind that mark, another question with its answer for one, does not count. ``1,200.0`` is ``1200``.
    """
    text = _plain(text)
    for found in (_behind(_MARK, text), _in_lines(text), _behind(_BOX, text)):
        if found is not None:
            return found
    numbers = list(_numbers(text))
    return numbers[-1] if numbers else None


def _plain(text: str) -> str:
    r"""Without TeX's ways to write thousands: ``1{,}200``, ``1,\!200``, ``1\,200``."""
    return re.sub(r"(?<=\d)\\[,;: ](?=\d{3}(?!\d))", "", text.replace("{,}", ",").replace("\\!", ""))


def _behind(mark: re.Pattern[str], text: str) -> Decimal | None:
    """The first number that comes right behind such a mark: no word is between."""
    end = 0
    for number in _NUMBER.finditer(text):
        before, end = text[end : number.start()], number.end()
        behind = mark.split(before)[1:]
        if behind and not re.search(r"\w", behind[-1]):
            return _value(number)
    return None


def _in_lines(text: str) -> Decimal | None:
    """The first number in the first line with ``####`` that has one and is no step's heading: ``#### The answer is 18``."""
    for line in text.splitlines():
        _, *behind = _MARK.split(line, maxsplit=1)
        if behind and _STEP.match(behind[0]) is None and (number := next(_numbers(behind[0]), None)) is not None:
            return number
    return None


def _numbers(text: str) -> Iterator[Decimal]:
    return (_value(found) for found in _NUMBER.finditer(text))


def _value(found: re.Match[str]) -> Decimal:
    return Decimal(("-" if found["sign"] else "") + found["digits"].replace(",", "") + (found["exponent"] or ""))
