"""Rows of a data set become conversations, pairs or plain texts, whatever their columns are called."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from typing import Any

from rosa_ds.config.template import Template, quoted, text_of
from rosa_ds.data.readers import Fraction

ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}
TRAINED_KEYS = ("weight", "train", "loss_mask")
"""Of a message: 0 or false where it is not trained."""


@dataclasses.dataclass(frozen=True)
class Conversation:
    """Chat messages; the assistant's are trained, but for those whose numbers (from 0) are ``untrained``.

    ``tools`` are the descriptions of tools that the template is given.
    """

    messages: tuple[dict[str, Any], ...]
    tools: tuple[dict[str, Any], ...] = ()
    untrained: frozenset[int] = frozenset()


@dataclasses.dataclass(frozen=True)
class Pair:
    """A prompt and the completion that is trained."""

    prompt: str
    completion: str


@dataclasses.dataclass(frozen=True)
class PlainText:
    """A text that is trained whole."""

    text: str


@dataclasses.dataclass(frozen=True)
class Several:
    """Examples of one row: a prompt with several completions."""

    examples: tuple[Conversation | Pair, ...]


Example = Conversation | Pair | PlainText
Columns = tuple[str | Template, str]


@dataclasses.dataclass(frozen=True)
class Format:
    """A way to write examples: the columns it ``needs``, those it may have, and what is made of them."""

    name: str
    needs: tuple[str, ...]
    may_have: tuple[str, ...]
    becomes: str


FORMATS = (
    Format("messages", ("messages",), ("tools",), "a chat of objects with role and content"),
    Format("ShareGPT", ("conversations",), ("system", "tools"), "a chat of objects with from and value"),
    Format("ShareGPT", ("conversation",), ("system", "tools"), "a chat of objects with from and value"),
    Format("prompt and completion", ("prompt", "completion"), ("tools",), "a question and its answer"),
    Format(
        "prompt and completions", ("prompt", "completions"), ("tools",), "a question, once with each of its answers"
    ),
    Format("question and answer", ("question", "answer"), (), "a question and its answer"),
    Format(
        "Alpaca", ("instruction", "output"), ("input", "system"), "instruction and input, a line each, and the output"
    ),
    Format("text", ("text",), (), "a text that is trained whole"),
)
"""In the order in which they are looked for. A column ``tools`` holds descriptions of tools, as a list or as JSON."""


def find_format(row: Mapping[str, Any]) -> Format:
    """The format of a row, by its columns. Raises: ValueError if it has none, with the nearest and what it misses."""
    for known in FORMATS:
        if all(name in row and (row[name] is not None or len(known.needs) > 1) for name in known.needs):
            return known

    def present(known: Format) -> tuple[int, int]:
        has = sum(name in row for name in known.needs)
        return has - len(known.needs), has + sum(name in row for name in known.may_have)

    near = [known for known in FORMATS if any(name in row for name in (*known.needs, *known.may_have))]
    said = ""
    if near:
        nearest = max(near, key=present)
        empty = [name for name in nearest.needs if name in row and row[name] is None]
        missing = [name for name in nearest.needs if name not in row]
        problem = f"has nothing in {quoted(empty)}" if empty else f"misses {quoted(missing)}"
        said = f"; the nearest, {nearest.name}, {problem}"
    known_names = "; ".join(dict.fromkeys(f"{known.name} ({', '.join(known.needs)})" for known in FORMATS))
    raise ValueError(
        f"the columns {quoted(row)} fit no format{said}: name two with data.prompt_column (or make the prompt of several with "
        f"data.prompt_template) and data.completion_column. Formats: {known_names}"
    )


def parse_row(row: Mapping[str, Any], columns: Columns | None = None) -> Example | Several:
    """Read one row, by the format that its columns have (:data:`FORMATS`).

    Args:
        columns: name of the prompt's column, or a template for it, and of the completion's, where the names do not tell.

    Raises:
        ValueError: the row fits no format, or a field has the wrong content. The caller adds file and row.
    """
    if columns is not None:
        return _pair(row, columns)
    found = find_format(row)
    if found.name == "messages":
        return _conversation(row["messages"], row)
    if found.name == "ShareGPT":
        return _conversation(row[found.needs[0]], row)
    if found.name == "prompt and completions":
        return _several(row)
    if found.name == "Alpaca":
        return _alpaca(row)
    if found.name == "text":
        return PlainText(text_of(row, "text"))
    return _pair(row, (found.needs[0], found.needs[1]))


def _pair(row: Mapping[str, Any], columns: Columns) -> Conversation | Pair:
    """Of texts, or of lists of messages."""
    prompt, completion = columns
    listed = [name for name in columns if isinstance(name, str) and _is_messages(row.get(name))]
    if not listed:
        asked = prompt.fill(row) if isinstance(prompt, Template) else text_of(row, prompt)
        pair = Pair(asked, text_of(row, completion))
        return as_chat(pair, _read_tools(row["tools"])) if row.get("tools") and "tools" not in columns else pair
    parts = []
    for name, role in zip(columns, ("user", "assistant"), strict=True):
        if isinstance(name, str) and name in listed:
            parts.append(list(row[name]))
        else:
            text = name.fill(row) if isinstance(name, Template) else text_of(row, name)
            parts.append([{"role": role, "content": text}])
    before, after = parts
    chat = _conversation([*before, *after], row)
    return dataclasses.replace(chat, untrained=chat.untrained | set(range(len(before))))


def as_chat(pair: Pair, tools: tuple[dict[str, Any], ...] = ()) -> Conversation:
    """A pair as one question and its answer."""
    question = {"role": "user", "content": pair.prompt}
    return Conversation((question, {"role": "assistant", "content": pair.completion}), tools)


def _is_messages(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def _several(row: Mapping[str, Any]) -> Several:
    completions = row["completions"]
    if not isinstance(completions, list) or not completions:
        raise ValueError(f"'completions' is a list of answers, given {completions!r}")
    rows = [{**row, "completion": completion} for completion in completions]
    return Several(tuple(_pair(each, ("prompt", "completion")) for each in rows))


def _alpaca(row: Mapping[str, Any]) -> Conversation | Pair:
    if row.get("history"):
        raise ValueError(
            "'history' holds earlier turns, which Alpaca's rows are read without: write the chat as messages"
        )
    asked = text_of(row, "instruction")
    if row.get("input") is not None and str(row["input"]).strip():
        asked += "\n" + text_of(row, "input")
    answer = text_of(row, "output")
    if not row.get("system"):
        return Pair(asked, answer)
    roles = (("system", text_of(row, "system")), ("user", asked), ("assistant", answer))
    return Conversation(tuple({"role": role, "content": content} for role, content in roles))


def examples_of(row: Example | Several) -> tuple[Example, ...]:
    """The examples of a row."""
    return row.examples if isinstance(row, Several) else (row,)


# -- chats --------------------------------------------------------------------------------------------------------


def _conversation(messages: Any, row: Mapping[str, Any]) -> Conversation:
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"'messages' is a list of {{role, content}} objects, given {messages!r}")
    if isinstance(messages[0], dict) and "from" in messages[0] and "role" not in messages[0]:
        messages = [_from_sharegpt(number, message) for number, message in enumerate(messages, start=1)]
        system = row.get("system")
        if isinstance(system, str) and system.strip() and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": system}, *messages]
    cleaned, untrained = [], set()
    for number, message in enumerate(messages, start=1):
        cleaned.append(_clean_message(number, message))
        if isinstance(message, dict) and not all(_is_trained(number, message, key) for key in TRAINED_KEYS):
            untrained.add(number - 1)
    if cleaned[-1]["role"] != "assistant":
        raise ValueError(f"the last message is the {cleaned[-1]['role']}'s: nothing after it could be trained")
    if len(cleaned) == 1:
        raise ValueError("the assistant's message is the only one: nothing asks for it")
    return Conversation(tuple(cleaned), _read_tools(row.get("tools")), frozenset(untrained))


def _clean_message(number: int, message: Any) -> dict[str, Any]:
    """A message as templates take it: its content a text, calls of tools with objects, without keys that hold nothing.

    Files of columns (parquet) fill each object with the keys of all others.
    """
    if not isinstance(message, dict):
        raise ValueError(f"message {number} is not an object with a role and a text content: {message!r}")
    if message.get("role") not in ROLES:
        raise ValueError(f"message {number} has role {message.get('role')!r}; allowed are {', '.join(ROLES)}")
    cleaned = {key: value for key, value in message.items() if value is not None and key not in TRAINED_KEYS}
    if not cleaned.get("tool_calls"):
        cleaned.pop("tool_calls", None)
    content = cleaned.get("content")
    if isinstance(content, list):
        content = "".join(_text_of_part(number, part) for part in content)
    if content is None and "tool_calls" in cleaned:
        content = ""
    if not isinstance(content, str):
        raise ValueError(f"message {number} is not an object with a role and a text content: {message!r}")
    cleaned["content"] = content
    if "tool_calls" in cleaned:
        cleaned["tool_calls"] = [_clean_call(number, call) for call in _as_list(cleaned["tool_calls"])]
    return cleaned


def _text_of_part(number: int, part: Any) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, dict) or part.get("type", "text") != "text" or not isinstance(part.get("text"), str):
        kind = part.get("type") if isinstance(part, dict) else part
        raise ValueError(f"message {number} has a content part of type {kind!r}: only parts of type text are read")
    return part["text"]


def _clean_call(number: int, call: Any) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError(f"message {number} has a tool call without a function's name: {call!r}")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments, parse_float=Fraction) if arguments.strip() else {}
        except json.JSONDecodeError as error:
            raise ValueError(
                f"message {number} calls {function['name']!r} with arguments that are no JSON ({error}): {arguments!r}"
            ) from None
    else:
        arguments = _without_nulls({} if arguments is None else arguments)
    if isinstance(call.get("function"), dict):
        return {**_without_nulls(call), "function": {**_without_nulls(function), "arguments": arguments}}
    return {**_without_nulls(call), "arguments": arguments}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _is_trained(number: int, message: Mapping[str, Any], key: str) -> bool:
    value = message.get(key)
    if value is None or value in (0, 1):
        return value is None or bool(value)
    raise ValueError(f"message {number} has {key} {value!r}: 1 or true where it is trained, 0 or false where it is not")


def _from_sharegpt(number: int, message: Any) -> dict[str, Any]:
    given = message.get("from") if isinstance(message, dict) else None
    if given not in SHAREGPT_ROLES:
        raise ValueError(f"message {number} is from {given!r}; allowed are {', '.join(SHAREGPT_ROLES)}")
    more = {key: value for key, value in message.items() if key not in ("from", "value")}
    if given != "function_call":
        return {**more, "role": SHAREGPT_ROLES[given], "content": message.get("value")}
    try:
        value = message.get("value")
        calls = json.loads(value, parse_float=Fraction) if isinstance(value, str) else value
    except json.JSONDecodeError as error:
        raise ValueError(
            f"message {number} is a function_call that is no JSON ({error}): {message['value']!r}"
        ) from None
    calls = [
        {"type": "function", "function": call.get("function", call) if isinstance(call, dict) else call}
        for call in _as_list(calls)
    ]
    return {**more, "role": "assistant", "content": "", "tool_calls": calls}


def _read_tools(tools: Any) -> tuple[dict[str, Any], ...]:
    """Descriptions of tools, given as a list or as JSON."""
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except json.JSONDecodeError as error:
            raise ValueError(f"'tools' is a list of objects or its JSON; it is no JSON ({error}): {tools!r}") from None
    elif isinstance(tools, list):
        # an entry may be JSON, too: how a list of objects with different keys is kept in a table
        tools = [json.loads(tool) if isinstance(tool, str) else _without_nulls(tool) for tool in tools]
    listed = _as_list(tools) if tools else []
    if any(not isinstance(tool, dict) for tool in listed):
        raise ValueError(f"'tools' is a list of objects or its JSON, given {tools!r}")
    return tuple(listed)


def _as_list(value: Any) -> Iterable[Any]:
    return value if isinstance(value, list) else [value]
