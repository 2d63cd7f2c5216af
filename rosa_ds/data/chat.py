"""A conversation's assistant turns as the chat template shows them: what is asked, and what is to be written then."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from rosa_ds.config.schema import DataSettings
from rosa_ds.data import reasoning
from rosa_ds.data.clock import reads_clock
from rosa_ds.data.formats import Conversation
from rosa_ds.data.readers import Fraction
from rosa_ds.utils.logs import log_once
from rosa_ds.utils.suggest import did_you_mean, did_you_mean_path
from rosa_ds.utils.texts import shared_length

logger = logging.getLogger(__name__)

_PROBE = "Zq7probe"
_HOLDER = ("730184629571", "618403927551")
"""Digits around the number of a number, which no text has by chance."""
_HELD = re.compile(rf"{_HOLDER[0]}(?P<number>\d{{6}}){_HOLDER[1]}")
_DRAWN = re.compile(r"\|\s*random\b|\blipsum\s*\(")
"""What of Jinja is random."""
_PROBE_TOOL = {
    "type": "function",
    "function": {"name": _PROBE, "description": _PROBE, "parameters": {"type": "object"}},
}
_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclasses.dataclass(frozen=True)
class Turn:
    """An assistant's turn.

    Attributes:
        prompt: the text that generation is fed.
        pieces: the text that is to follow, to the end-of-turn token, in pieces with whether each is trained.
        ended: an end-of-turn token is the last of it.
    """

    prompt: str
    pieces: tuple[tuple[str, bool], ...]
    ended: bool


def assistant_turns(
    conversation: Conversation, tokenizer: PreTrainedTokenizerBase, chosen: Iterable[int]
) -> list[Turn]:
    """The turns of the messages with the numbers ``chosen``, which are the assistant's and not the first.

    The prompt of a turn is the rendering of everything before it with the generation prompt. What follows is the rest of
    the rendering up to the turn as the last one, so with the reasoning that a template leaves out of earlier turns.

    Raises:
        ValueError: the template fails, or does not show where a turn stands.
    """
    template = template_of(tokenizer)
    numbers: list[str] = []
    messages = _adapt([_hold_numbers(message, numbers) for message in conversation.messages], tokenizer, template)
    if conversation.tools and not _shows(tokenizer, template, "tools"):
        _say(template, "the chat template has no place for tools: the rows' tools are left out")
    if any(message["role"] == "system" for message in messages) and not _shows(tokenizer, template, "system"):
        _say(template, "the chat template has no place for a system prompt: the rows' system prompts are left out")
    render = functools.partial(_render, tokenizer, template, tools=conversation.tools, numbers=numbers)
    found = []
    for index in chosen:
        prompt, _ = render(messages[:index], prompt=True)
        text, marks = render(messages[: index + 1])
        start, opening = reasoning.find_start(prompt, text, conversation.messages[index])
        if start is None:
            start = _start_after_another_prompt(tokenizer, template, text, render, messages[:index])
        if start is None:
            same = shared_length(prompt, text)
            raise ValueError(
                f"the chat template does not show where message {index + 1} (assistant) stands in the rendered text: what asks for "
                f"it goes on with {_shortened(prompt[same:])}, the finished turn with {_shortened(text[same:])}; give a template "
                "that renders the messages in their order, and begins a turn as it asks for it, as data.chat_template"
            )
        body, end, ended = _find_end(text, start, _form_of(tokenizer, template))
        _check_shown(opening + text[start:end], text, conversation.messages[index], index, template)
        pieces = [(opening, True)] if opening else []
        if marks is None:
            pieces.append((text[start:end], True))
        else:
            pieces += _marked_pieces(text, start, body, end, marks)
        found.append(Turn(prompt, tuple(pieces), ended))
    return found


def template_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """The chat template; of several named ones that is ``default``.

    Raises: ValueError if there is none, or one that renders a chat otherwise each time.
    """
    template = tokenizer.chat_template
    if isinstance(template, Mapping) and template:
        if "default" not in template and len(template) > 1:
            raise ValueError(
                f"the model's tokenizer has the chat templates {', '.join(sorted(template))} and none is named default: give one "
                "as data.chat_template"
            )
        template = template.get("default", next(iter(template.values())))
    if not template:
        raise ValueError(
            "the row holds chat messages, but the model's tokenizer has no chat template: use an instruct model, give one as "
            "data.chat_template, or use rows with prompt and completion"
        )
    if drawn := _DRAWN.search(template):
        raise ValueError(
            f"the chat template draws at random ({drawn.group().strip('| (')}), so nobody asks as it was trained: give one that does not "
            "as data.chat_template"
        )
    return str(template)


def choose_template(tokenizer: PreTrainedTokenizerBase, settings: DataSettings) -> None:
    """Give the tokenizer the chat template of the settings, else the one named default of its own.

    The arguments of the settings become what the template's variables are unless a caller says otherwise: the template
    alone, which is saved with the tokenizer, asks as training did.

    Raises:
        ValueError: there is no such file, the template has no such variable, there is no template to give arguments to, or a
            time is given to one that reads no clock.
    """
    if settings.chat_template is not None:
        tokenizer.chat_template = _read_template(settings.chat_template)
    elif isinstance(tokenizer.chat_template, Mapping) and "default" in tokenizer.chat_template:
        names = ", ".join(sorted(tokenizer.chat_template))
        tokenizer.chat_template = template_of(tokenizer)
        _say(tokenizer.chat_template, f"of the tokenizer's chat templates ({names}) the one named default is used")
    if settings.template_clock is not None and not reads_clock(tokenizer):
        raise ValueError(
            f"data.template_clock is given ({settings.template_clock}), but no chat template here reads the clock (strftime_now): "
            "leave it out"
        )
    if settings.template_arguments:
        template = template_of(tokenizer)
        for name in settings.template_arguments:
            if re.search(rf"\b{name}\b", template) is None:
                words = set(re.findall(r"\b[a-z]\w+\b", template))
                raise ValueError(
                    f"data.template_arguments gives {name!r}, which the chat template does not use.{did_you_mean(name, words)}"
                )
        # templates are rendered with trim_blocks, so these lines leave no trace in the text
        defaults = (
            f"{{% set {name} = {name} | default({value!r}) %}}\n" for name, value in settings.template_arguments.items()
        )
        tokenizer.chat_template = "".join(defaults) + template


def _read_template(given: str) -> str:
    if "{" in given:
        return given
    path = Path(given).expanduser()
    if not path.is_file():
        raise ValueError(
            f"data.chat_template {given}: no such file, and a template's text has braces.{did_you_mean_path(path)}"
        )
    return path.read_text(encoding="utf-8")


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that ends an assistant's turn by the chat template; None if the template ends it with none."""
    form = _form_of(tokenizer, template_of(tokenizer))
    added = {token.content: index for index, token in tokenizer.added_tokens_decoder.items()}
    return added.get(form.stop)


# -- where a turn begins ------------------------------------------------------------------------------------------


def _start_after_another_prompt(
    tokenizer: PreTrainedTokenizerBase, template: str, text: str, render: Any, before: Sequence[dict[str, Any]]
) -> int | None:
    """As :func:`reasoning.find_start` where the template writes the earlier messages otherwise once they are answered (a system prompt
    that goes with the last user message): found with an answer of our own in the turn's place.
    """
    form = _form_of(tokenizer, template)
    if form.lead is None:
        return None
    other, _ = render([*before, *_adapt([{"role": "assistant", "content": _PROBE}], tokenizer, template)])
    start = other.rfind(_PROBE) - len(form.lead)
    if start <= 0 or not other.startswith(form.lead, start) or text[:start] != other[:start]:
        return None
    return int(start)


def _check_shown(written: str, text: str, message: Mapping[str, Any], index: int, template: str) -> None:
    """Raise ValueError for a turn of whose tool calls the template leaves one out; say it once where it leaves out other things.

    Args:
        text: the whole rendering with what is ``written``.
    """
    names = [call.get("function", call)["name"] for call in message.get("tool_calls", ())]
    for name in dict.fromkeys(names):
        if name not in written:
            raise ValueError(
                f"the chat template does not show that message {index + 1} calls {name!r}: give one that renders tool_calls as "
                "data.chat_template"
            )
        if (shown := written.count(name)) < (calls := names.count(name)):
            raise ValueError(
                f"the chat template shows {shown} of the {calls} times that message {index + 1} calls {name!r}: give one that renders "
                "several tool_calls as data.chat_template, or make them a message each"
            )
    if names and message["content"].strip() not in written:
        _say(template, "the chat template shows no content beside tool calls: what the rows have of it is left out")
    thought = reasoning.reasoning_of(message)
    if thought in written:
        return
    if thought in text:
        _say(
            template,
            "the chat template's generation prompt has an empty reasoning: what the rows have of it is left out. Where a variable "
            'of the template changes that, set it, such as data.template_arguments {"enable_thinking": true}',
        )
    else:
        _say(template, "the chat template shows no reasoning: what the rows have of it is left out")


def _shortened(text: str) -> str:
    return repr(text[:40]) + ("..." if len(text) > 40 else "")


# -- where it ends ------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Form:
    """How a template writes an answer.

    Attributes:
        lead: the text between generation prompt and content; None: not known.
        end: the text that ends the turn; empty: none.
        stop: the token that is the last of ``end``; empty: none.
        after: what stands behind ``end`` where no message follows.
        marks: what an end may be made of, longest first.
    """

    lead: str | None
    end: str
    stop: str
    after: str
    marks: tuple[str, ...]


def _form_of(tokenizer: PreTrainedTokenizerBase, template: str) -> _Form:
    return _form(tokenizer, template, len(tokenizer), repr(tokenizer.special_tokens_map))


@functools.lru_cache(maxsize=4)
def _form(tokenizer: PreTrainedTokenizerBase, template: str, size: int, special: str) -> _Form:
    """``size`` and ``special`` tell a tokenizer from itself before tokens were added."""
    added = [(token.content, token.special) for token in tokenizer.added_tokens_decoder.values()]
    lead, end, stop, after = None, "", "", ""
    question, answer = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": _PROBE}
    chat = _adapt([question, answer, question], tokenizer, template)

    def render(count: int, prompt: bool = False) -> str:
        """Empty where it is no template for so simple a chat."""
        for tools in ((), (_PROBE_TOOL,)):
            try:
                return _render(tokenizer, template, chat[:count], tools, prompt)[0]
            except ValueError:
                continue
        return ""

    prompt, text, longer = render(1, prompt=True), render(2), render(3)
    if prompt and _PROBE in text:
        before, _, behind = text.rpartition(_PROBE)
        lead = before[len(prompt) :] if before.startswith(prompt) else None
        asked = prompt.rpartition(str(question["content"]))[2]
        kept = shared_length(behind, longer.rpartition(_PROBE)[2])
        last = _last_token(behind, kept, text, asked, [content for content, _ in added if content])
        if last:
            stop, end, after = last.group(), behind[: last.end()].lstrip(), behind[last.end() :].rstrip()
        else:
            end = behind.strip()
    marks = {content for content, special in added if special} | {end}
    return _Form(lead, end, stop, after, tuple(sorted(marks - {""}, key=len, reverse=True)))


def _last_token(behind: str, kept: int, text: str, asked: str, contents: Sequence[str]) -> re.Match[str] | None:
    """The last token of a turn in the text ``behind`` its content; None if there is none.

    Args:
        kept: how much of that text stands there when the chat goes on, too.
        text: the whole rendering.
        asked: what asks for an answer, behind a question.
        contents: of the tokens.
    """
    token = "|".join(map(re.escape, sorted(contents, key=len, reverse=True))) or r"(?!)"
    heading = re.match(rf"(?:\s*(?:{token}))*", text)
    assert heading is not None
    tokens: list[re.Match[str]] = []
    for found in re.finditer(token, behind):
        # some templates write the heading of a next turn unasked: it begins as the whole text does
        if tokens and found.group() in heading.group() and behind[found.start() :].strip() in asked:
            break
        tokens.append(found)
    return next((found for found in reversed(tokens) if found.end() <= kept), tokens[0] if tokens else None)


def _find_end(text: str, start: int, form: _Form) -> tuple[int, int, bool]:
    """Where a turn's body ends, where the end-of-turn token behind it does, and whether there is one.

    What a template writes behind that token (a line break, an end of text when no message follows) is not the turn's.
    """
    text = text.rstrip().removesuffix(form.after) if form.after else text
    body = len(text)
    while True:
        body = start + len(text[start:body].rstrip())
        mark = next((mark for mark in form.marks if text.endswith(mark, start, body)), None)
        if mark is None:
            break
        body -= len(mark)
    behind = text[body:]
    if form.end and form.end in behind:
        return body, body + behind.index(form.end) + len(form.end), bool(form.stop)
    if behind.strip():
        return body, body + len(behind.rstrip()), True
    return len(text), len(text), False


def _marked_pieces(
    text: str, start: int, body: int, end: int, marks: Sequence[tuple[int, int]]
) -> list[tuple[str, bool]]:
    """A turn cut where the template's generation markers begin and end. The end of the turn belongs to what is marked."""
    inside = [(max(a, start), min(b, end)) for a, b in marks if a < end and b > start and max(a, start) < min(b, end)]
    if inside and body < end:
        inside.append((max(body, inside[-1][0]), end))
    pieces, at = [], start
    for a, b in inside:
        if a > at:
            pieces.append((text[at:a], False))
        if b > at and pieces and pieces[-1][1] and a <= at:
            pieces[-1] = (pieces[-1][0] + text[at:b], True)
        elif b > at:
            pieces.append((text[max(a, at) : b], True))
        at = max(at, b)
    return pieces if at == end else [*pieces, (text[at:end], False)]


# -- rendering ----------------------------------------------------------------------------------------------------


def _render(
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    messages: Sequence[dict[str, Any]],
    tools: Sequence[dict[str, Any]] = (),
    prompt: bool = False,
    numbers: Sequence[str] = (),
) -> tuple[str, list[tuple[int, int]] | None]:
    """The rendered text, and where generation markers stand in it; None for a template without them.

    Args:
        numbers: as :func:`_hold_numbers` has found them.
    """
    marked = _MARKED.search(template) is not None and not prompt
    try:
        (text,), marks = render_jinja_template(
            conversations=[list(messages)],
            tools=list(tools) or None,
            chat_template=template,
            add_generation_prompt=prompt,
            return_assistant_tokens_mask=marked,
            **tokenizer.special_tokens_map,
        )
    except (TemplateError, TypeError, LookupError, AttributeError) as error:
        raise ValueError(f"the chat template of the model's tokenizer fails here: {error}") from None

    def written(upto: int | None = None) -> str:
        return _HELD.sub(lambda held: numbers[int(held["number"])], text[:upto]) if numbers else text[:upto]

    return written(), [(len(written(a)), len(written(b))) for a, b in marks[0]] if marked else None


def _hold_numbers(message: dict[str, Any], numbers: list[str]) -> dict[str, Any]:
    """The message with whole numbers in its tool calls where JSON would write a fraction otherwise than the row does (1.10).

    A template writes them as they are, and they become the text of the row, which is appended to ``numbers``, in what is
    rendered.
    """

    def held(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: held(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [held(inner) for inner in value]
        if isinstance(value, Fraction) and float.__repr__(value) != value.text:
            numbers.append(value.text)
            return int(f"{_HOLDER[0]}{len(numbers) - 1:06d}{_HOLDER[1]}")
        return value

    return {**message, "tool_calls": held(message["tool_calls"])} if "tool_calls" in message else message


def _adapt(
    messages: Sequence[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, template: str
) -> list[dict[str, Any]]:
    """The messages in the form that the template takes."""
    adapted = []
    for message in messages:
        if message["role"] == "developer" and "developer" not in template:
            _say(template, "the chat template knows no role developer: those messages are rendered as the system's")
            message = {**message, "role": "system"}
        if message.get("tool_calls") and _takes_arguments_as_text(tokenizer, template):
            message = {**message, "tool_calls": [_with_text_arguments(call) for call in message["tool_calls"]]}
        adapted.append(reasoning.under_all_keys(message))
    if _takes_parts(tokenizer, template):
        return [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in adapted]
    return adapted


def _say(template: str, what: str) -> None:
    """Once of a template."""
    log_once(logger, logging.WARNING, what, of=template)


def _with_text_arguments(call: dict[str, Any]) -> dict[str, Any]:
    function = call.get("function", call)
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        return call
    function = {**function, "arguments": json.dumps(arguments, ensure_ascii=False)}
    return {**call, "function": function} if "function" in call else function


@functools.lru_cache(maxsize=4)
def _takes_arguments_as_text(tokenizer: PreTrainedTokenizerBase, template: str) -> bool:
    """Whether the template cannot render a tool call whose arguments are an object, but one whose arguments are a text."""

    def renders(arguments: dict[str, Any] | str) -> bool:
        call = {"id": "a1b2c3d4e", "type": "function", "function": {"name": "add", "arguments": arguments}}
        text = _try_to_render(tokenizer, template, {"content": "", "tool_calls": [call]})
        return text is not None and "{'" not in text  # an object written by Python is no JSON

    return not renders({"a": 1}) and renders('{"a": 1}')


@functools.lru_cache(maxsize=8)
def _shows(tokenizer: PreTrainedTokenizerBase, template: str, what: Literal["tools", "system"]) -> bool:
    """Whether the descriptions of tools, or a system prompt, stand in what the template renders."""
    chat = [{"role": "user", "content": "Why?"}]
    if what == "system":
        chat = [{"role": "system", "content": _PROBE}, *chat]
    tools = (_PROBE_TOOL,) if what == "tools" else ()
    try:
        return _PROBE in _render(tokenizer, template, _adapt(chat, tokenizer, template), tools, prompt=True)[0]
    except ValueError:  # the rows' own will tell what is wrong with them
        return True


@functools.lru_cache(maxsize=4)
def _takes_parts(tokenizer: PreTrainedTokenizerBase, template: str) -> bool:
    """Whether the template shows a content only where it is a list of parts (those of models that see images)."""

    def shows(content: Any) -> bool:
        return _PROBE in (_try_to_render(tokenizer, template, {"content": content}, content) or "")

    return not shows(_PROBE) and shows([{"type": "text", "text": _PROBE}])


def _try_to_render(
    tokenizer: PreTrainedTokenizerBase, template: str, answer: dict[str, Any], question: Any = "Why?"
) -> str | None:
    messages = [{"role": "user", "content": question}, {"role": "assistant", **answer}]
    try:
        return _render(tokenizer, template, messages)[0]
    except ValueError:
        return None
