"""Rows of a data set become conversations or plain texts, whatever their columns are called."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from rosa_ds.config.template import Template, quoted, text_of

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


def parse_row(row: Mapping[str, Any], columns: tuple[str | Template, str] | None = None) -> Example:
    """Read one row: ``messages``; prompt and completion (or question and answer); or ``text``.

    Args:
        columns: name of the prompt's column, or a template for it, and of the completion's, where the names do not tell.

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
        return PlainText(text_of(row, "text"))
    raise ValueError(
        f"the columns {quoted(row)} fit no format (messages; prompt and completion; question and answer; text): "
        "name two with data.prompt_column (or make the prompt of several with data.prompt_template) and data.completion_column"
    )


def _pair(row: Mapping[str, Any], columns: tuple[str | Template, str]) -> Pair:
    prompt, completion = columns
    return Pair(prompt.fill(row) if isinstance(prompt, Template) else text_of(row, prompt), text_of(row, completion))


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
