"""Rows of a data set become conversations or plain texts, whatever their columns are called."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from rosa_ds.suggest import did_you_mean

PAIR_COLUMNS = (("prompt", "completion"), ("question", "answer"))
ROLES = ("system", "user", "assistant", "tool")


@dataclasses.dataclass(frozen=True)
class Conversation:
    """Chat messages; the assistant's are trained."""

    messages: tuple[dict[str, Any], ...]


@dataclasses.dataclass(frozen=True)
class Pair:
    """A prompt and the completion that is trained."""

    prompt: str
    completion: str


@dataclasses.dataclass(frozen=True)
class PlainText:
    """A text that is trained whole."""

    text: str


Example = Conversation | Pair | PlainText


def parse_row(row: Mapping[str, Any], columns: tuple[str, str] | None = None) -> Example:
    """Read one row: ``messages``; prompt and completion (or question and answer); or ``text``.

    Args:
        columns: names of the prompt and the completion column, where the names do not tell.

    Raises:
        ValueError: the row fits no format, or a field has the wrong content. The caller adds file and row.
    """
    if columns is not None:
        return _pair(row, columns)
    if row.get("messages") is not None:
        return _conversation(row["messages"])
    for names in PAIR_COLUMNS:
        if all(name in row for name in names):
            return _pair(row, names)
    if row.get("text") is not None:
        return PlainText(_text(row, "text"))
    raise ValueError(
        f"the columns {', '.join(sorted(row))} fit no format (messages; prompt and completion; question and answer; text): "
        "name two with data.prompt_column and data.completion_column"
    )


def _text(row: Mapping[str, Any], column: str) -> str:
    if column not in row:
        raise ValueError(f"there is no column {column!r}.{did_you_mean(column, row)} Columns: {', '.join(sorted(row))}")
    value = row[column]
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        value = str(value)  # a column of numbers, as in a table of answers
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{column!r} is a text that is not empty, given {value!r}")
    return value


def _pair(row: Mapping[str, Any], columns: tuple[str, str]) -> Pair:
    return Pair(_text(row, columns[0]), _text(row, columns[1]))


def _conversation(messages: Any) -> Conversation:
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"'messages' is a list of {{role, content}} objects, given {messages!r}")
    cleaned = []
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise ValueError(f"message {number} is not an object with a role and a text content: {message!r}")
        if message.get("role") not in ROLES:
            raise ValueError(f"message {number} has role {message.get('role')!r}; allowed are {', '.join(ROLES)}")
        cleaned.append({key: value for key, value in message.items() if value is not None})
    if cleaned[-1]["role"] != "assistant":
        raise ValueError(f"the last message is the {cleaned[-1]['role']}'s: nothing after it could be trained")
    return Conversation(tuple(cleaned))
