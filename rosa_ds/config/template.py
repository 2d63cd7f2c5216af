"""A prompt made of several columns of a row."""

from __future__ import annotations

import dataclasses
import datetime
import decimal
import math
import string
from collections.abc import Iterable, Mapping
from typing import Any

from rosa_ds.utils.suggest import did_you_mean


@dataclasses.dataclass(frozen=True)
class Template:
    """A prompt made of several columns: ``"{context}\\n{question}"``; ``{{`` and ``}}`` are braces.

    Raises: ValueError if it names no column, or is not of this form.
    """

    text: str

    def __post_init__(self) -> None:
        try:
            fields = [field for field in string.Formatter().parse(self.text) if field[1] is not None]
        except ValueError as error:
            raise ValueError(
                f"the template {self.text!r} cannot be read ({error}): a column is {{name}}, a brace {{{{"
            ) from None
        if any(specification or conversion for _, _, specification, conversion in fields):
            raise ValueError(
                f"the template {self.text!r} formats a column: write {{name}} alone, its text is taken as it is"
            )
        if not fields or any(not name for _, name, _, _ in fields):
            raise ValueError(f"the template {self.text!r} names no column: write {{name}} where a column's text goes")

    def fill(self, row: Mapping[str, Any]) -> str:
        """The prompt of a row; a column may be empty where another is not.

        Raises: ValueError for a column that is not there or holds no text, or if all are empty.
        """
        parts = [(text, name) for text, name, _, _ in string.Formatter().parse(self.text)]
        names = {name for _, name in parts if name is not None}
        texts = {name: "" if name in row and row[name] in (None, "") else text_of(row, name) for name in names}
        if not any(texts.values()):
            raise ValueError(f"the columns {quoted(names)} are all empty: there is no prompt")
        return "".join(text + (texts[name] if name is not None else "") for text, name in parts)


def text_of(row: Mapping[str, Any], column: str) -> str:
    """A row's text in a column, a number as it is written, true and false as JSON has them, a date of a typed column as ISO 8601.

    Raises: ValueError for a column that is not there or has no text.
    """
    if column not in row:
        raise ValueError(f"there is no column {column!r}.{did_you_mean(column, row)} Columns: {quoted(row)}")
    value = row[column]
    if isinstance(value, bool):
        value = "true" if value else "false"
    if isinstance(value, (int, float, decimal.Decimal)) and math.isfinite(value):
        value = str(value)  # a column of numbers, as in a table of answers
    if isinstance(value, (datetime.date, datetime.time)):
        value = value.isoformat()
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{column!r} is a text that is not empty, given {value!r}")
    return value


def quoted(columns: Iterable[str]) -> str:
    """Names as they are written on a command line: a blank at the end of one shows."""
    return ", ".join(repr(column) for column in sorted(columns))
