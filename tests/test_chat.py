"""Chats: what of them is trained, with templates of the kinds that current families have."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from chat_families import TEMPLATES, byte_level, byte_level_of_gpt4, wrap
from rosa_ds.config.schema import DataSettings, ModelSettings
from rosa_ds.data.chat import choose_template, end_of_turn
from rosa_ds.data.formats import Conversation, Pair, parse_row
from rosa_ds.data.prepare import prepare
from rosa_ds.data.sources import load_rows
from rosa_ds.data.tokenise import prompt_and_reference, sequences, show_sample
from rosa_ds.models.load import load_tokenizer

CALL = {"id": "a1b2c3d4e", "type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 3}}}
TOOLS = [{"type": "function", "function": {"name": "add", "description": "adds"}}]


def read(row: dict[str, Any]) -> Conversation:
    example = parse_row(row)
    assert isinstance(example, Conversation)
    return example


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str | None, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


ROWS: dict[str, dict[str, Any]] = {
    "one": {"messages": [user("2+3?"), assistant("5")]},
    "two": {"messages": [user("2+3?"), assistant("5"), user("+1?"), assistant("6")]},
    "system": {"messages": [{"role": "system", "content": "Brief."}, user("2+3?"), assistant("5")]},
    "reasoning": {
        "messages": [
            user("2+3?"),
            assistant("5", reasoning_content="count"),
            user("+1?"),
            assistant("6", reasoning_content="more"),
        ]
    },
    "tools": {
        "messages": [
            user("2+3?"),
            assistant(None, tool_calls=[CALL]),
            {"role": "tool", "content": "5"},
            assistant("It is 5."),
        ],
        "tools": TOOLS,
    },
}

# -- templates of the usual structures, written for these tests --------------------------------------------------

_CALLS = "{{ '<tool_call>' + c.function.name + ' ' + c.function.arguments | tojson + '</tool_call>' }}"
_HEADERS = (  # as Llama 3: a header, the content without outer blanks, a mark
    "{{ bos_token }}{% if tools %}{{ '[H]system[/H]' + tools | tojson + '[E]' }}{% endif %}"
    "{% for m in messages %}{{ '[H]' + m.role + '[/H]\n\n' }}"
    "{% if m.tool_calls %}{% for c in m.tool_calls %}"
    + _CALLS
    + "{% endfor %}{% endif %}{{ m.content | trim + '[E]' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '[H]assistant[/H]\n\n' }}{% endif %}"
)
_LINES = _HEADERS.replace("[E]'", "[E]\n'")  # as ChatML: a line break behind the mark
_NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role here') }}{% endif %}" + _LINES
_TEXT_END = _LINES.replace("[/H]\n\n' }}{% endif %}", "[/H]\n\n' }}{% else %}{{ eos_token }}{% endif %}")  # as Phi 3
_LAST_THINKS = _LINES.replace(  # as Qwen 3: reasoning before the last answer only
    "{% if m.tool_calls %}",
    "{% if m.role == 'assistant' and loop.last %}{{ '<think>\n' + (m.reasoning_content or '') + '\n</think>\n\n' }}{% endif %}"
    "{% if m.tool_calls %}",
)
_OPEN_PROMPT = _LAST_THINKS.replace(
    "assistant[/H]\n\n' }}{% endif %}", "assistant[/H]\n\n<think>\n' }}{% endif %}"
)  # as Qwen 3.5
_EMPTY_PROMPT = _LINES.replace("assistant[/H]\n\n' }}{% endif %}", "assistant[/H]\n\n<think></think>\n' }}{% endif %}")
_CLOSED_CHANNEL = _LINES.replace(  # as Gemma 4
    "assistant[/H]\n\n' }}{% endif %}", "assistant[/H]\n\n<|channel>thought\n<channel|>' }}{% endif %}"
).replace(
    "{% if m.tool_calls %}",
    "{% if m.reasoning %}{{ '<|channel>thought\n' + m.reasoning + '\n<channel|>' }}{% endif %}{% if m.tool_calls %}",
    1,
)
_ONLY_CLOSED = _LINES.replace("assistant[/H]\n\n' }}{% endif %}", "assistant[/H]\n\n<think>' }}{% endif %}").replace(
    "{% if m.tool_calls %}",  # as GLM 4.7
    "{% if m.role == 'assistant' %}{{ '<think>' + m.thinking if m.thinking }}{{ '</think>' }}{% endif %}{% if m.tool_calls %}",
    1,
)
_OPEN_TOKEN = _LINES.replace(  # as Command A
    "assistant[/H]\n\n' }}{% endif %}", "assistant[/H]\n\n<|START_THINKING|>' }}{% endif %}"
)
_UNASKED = (  # as Command R7B: the heading of the next turn stands there always
    "{{ bos_token }}{% if tools %}{{ '[H]system[/H]' + tools | tojson + '[E]' }}{% endif %}"
    "{% for m in messages %}{{ '[H]' + m.role + '[/H]' }}{% if m.tool_calls %}{% for c in m.tool_calls %}"
    + _CALLS
    + "{% endfor %}{{ '[CALL]' }}{% endif %}{{ m.content + ('[C][E]' if m.role == 'assistant' else '[E]') }}{% endfor %}"
    "{{ '[H]assistant[/H]' }}"
)
_FOR_TOOLS = (  # as Hermes 2 Pro's for tool use: none without tools, and results are written otherwise once they are answered
    "{% for t in tools %}{{ t.function.name }}{% endfor %}{% for m in messages %}{{ '[H]' + m.role + '[/H]' }}"
    "{% for c in m.tool_calls %}"
    + _CALLS
    + "{% endfor %}{{ m.content + ('\n' if m.role == 'tool' and not loop.last else '') + '[E]' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[H]assistant[/H]' }}{% endif %}"
)
_DROPPED = _HEADERS.replace(
    "assistant[/H]\n\n' }}{% endif %}", "assistant[/H]\n\n<think>\n' }}{% endif %}"
)  # as DeepSeek R1
_SYSTEM_LAST = (  # as Mistral: the system prompt goes with the last question, no generation prompt, arguments as text
    "{% for m in messages %}{% if m.role == 'user' %}{{ '[H]' }}{% if loop.last and messages[0].role == 'system' %}"
    "{{ messages[0].content + '\n\n' }}{% endif %}{{ m.content + '[/H]' }}{% elif m.tool_calls %}{% for c in m.tool_calls %}"
    "{{ '[CALL]' + c.function.name + c.function.arguments + eos_token }}{% endfor %}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}{% elif m.role == 'tool' %}{{ '[R]' + m.content }}"
    "{% endif %}{% endfor %}{# tools #}"
)
_CHANNELS = (  # as gpt-oss: another mark at the end of the whole, a call ends with its own
    "{% for m in messages %}{% if m.tool_calls %}{{ '[H]assistant to=' + m.tool_calls[0].function.name + '[M]' "
    "+ m.tool_calls[0].function.arguments | tojson + '[CALL]' }}{% elif m.role == 'assistant' %}"
    "{% if m.reasoning_content and loop.last %}{{ '[H]assistant[C]analysis[M]' + m.reasoning_content + '[E]' }}{% endif %}"
    "{{ '[H]assistant[C]final[M]' + m.content + ('[RETURN]' if loop.last and not add_generation_prompt else '[E]') }}"
    "{% else %}{{ '[H]' + m.role + '[M]' + m.content + '[E]' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[H]assistant' }}{% endif %}{# tools #}"
)
_NO_END = (  # as GLM 4: the next header ends a turn
    "{% for m in messages %}{{ '[H]' + m.role + '\n' + m.content }}{% endfor %}{% if add_generation_prompt %}{{ '[H]assistant\n' }}"
    "{% endif %}"
)
_PARTS = (  # as models that see images: a content is a list
    "{% for m in messages %}{{ '[H]' + m.role + '[/H]' }}{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% endif %}"
    "{% endfor %}{{ '[E]\n' }}{% endfor %}{% if add_generation_prompt %}{{ '[H]assistant[/H]' }}{% endif %}"
)
_CALLED = '<tool_call>add {"a": 2, "b": 3}</tool_call>'
_NOT_SHOWN = "does not show that message 2 calls 'add'.*data.chat_template"
SIMPLE = {
    "one": [["5[E]"]],
    "two": [["5[E]", "6[E]"]],
    "system": [["5[E]"]],
    "reasoning": [["5[E]", "6[E]"]],
    "tools": [[_CALLED + "[E]", "It is 5.[E]"]],
}
EMPTY = "<think>\n\n</think>\n\n"
KINDS: dict[str, tuple[str, dict[str, list[list[str]] | str]]] = {
    "headers": (_HEADERS, SIMPLE),
    "lines": (_LINES, SIMPLE),
    "no system": (_NO_SYSTEM, {**SIMPLE, "system": "fails here: no system role here"}),
    "end of text at the end": (_TEXT_END, SIMPLE),
    "two tokens at the end": (  # as Command R's: of the answer and of the turn
        _HEADERS.replace(
            "m.content | trim + '[E]'", "m.content | trim + ('[C][E]' if m.role == 'assistant' else '[E]')"
        ),
        {key: [[turn.replace("[E]", "[C][E]") for turn in value[0]]] for key, value in SIMPLE.items()},
    ),
    "the last one thinks": (
        _LAST_THINKS,
        {
            "one": [[EMPTY + "5[E]"]],
            "two": [[EMPTY + "5[E]"], [EMPTY + "6[E]"]],
            "system": [[EMPTY + "5[E]"]],
            "reasoning": [["<think>\ncount\n</think>\n\n5[E]"], ["<think>\nmore\n</think>\n\n6[E]"]],
            "tools": [[EMPTY + _CALLED + "[E]"], [EMPTY + "It is 5.[E]"]],
        },
    ),
    "the prompt opens a block": (
        _OPEN_PROMPT,
        {
            "one": [["\n</think>\n\n5[E]"]],
            "two": [["\n</think>\n\n5[E]"], ["\n</think>\n\n6[E]"]],
            "system": [["\n</think>\n\n5[E]"]],
            "reasoning": [["count\n</think>\n\n5[E]"], ["more\n</think>\n\n6[E]"]],
            "tools": [[f"\n</think>\n\n{_CALLED}[E]"], ["\n</think>\n\nIt is 5.[E]"]],
        },
    ),
    "the prompt opens what is never shown": (
        _DROPPED,
        {
            "one": [["\n</think>\n\n5[E]"]],
            "two": [["\n</think>\n\n5[E]"], ["\n</think>\n\n6[E]"]],
            "system": [["\n</think>\n\n5[E]"]],
            "reasoning": [["count\n</think>\n\n5[E]"], ["more\n</think>\n\n6[E]"]],
            "tools": [[f"\n</think>\n\n{_CALLED}[E]"], ["\n</think>\n\nIt is 5.[E]"]],
        },
    ),
    "the prompt has an empty block": (
        _EMPTY_PROMPT,
        {key: [[turn] for turn in value[0]] for key, value in SIMPLE.items()},
    ),
    "the prompt has an empty channel": (
        _CLOSED_CHANNEL,
        {key: [[turn] for turn in value[0]] for key, value in SIMPLE.items()},
    ),
    "the turn has only the end of a block": (
        _ONLY_CLOSED,
        {
            "one": [["</think>5[E]"]],
            "two": [["</think>5[E]"], ["</think>6[E]"]],
            "system": [["</think>5[E]"]],
            "reasoning": [["count</think>5[E]", "more</think>6[E]"]],
            "tools": [[f"</think>{_CALLED}[E]"], ["</think>It is 5.[E]"]],
        },
    ),
    "the prompt opens a block with a token": (
        _OPEN_TOKEN,
        {
            "one": [["<|END_THINKING|>5[E]"]],
            "two": [["<|END_THINKING|>5[E]"], ["<|END_THINKING|>6[E]"]],
            "system": [["<|END_THINKING|>5[E]"]],
            "reasoning": [["count<|END_THINKING|>5[E]"], ["more<|END_THINKING|>6[E]"]],
            "tools": [[f"<|END_THINKING|>{_CALLED}[E]"], ["<|END_THINKING|>It is 5.[E]"]],
        },
    ),
    "the next heading is written unasked": (
        _UNASKED,
        {
            "one": [["5[C][E]"]],
            "two": [["5[C][E]", "6[C][E]"]],
            "system": [["5[C][E]"]],
            "reasoning": [["5[C][E]", "6[C][E]"]],
            "tools": [[_CALLED + "[CALL][C][E]", "It is 5.[C][E]"]],
        },
    ),
    "for tools alone": (
        _FOR_TOOLS,
        {
            **dict.fromkeys(("one", "two", "system", "reasoning"), "'NoneType' object is not iterable"),
            "tools": [[_CALLED + "[E]", "It is 5.[E]"]],
        },
    ),
    "the system prompt goes with the last question": (
        _SYSTEM_LAST,
        {
            "one": [[" 5</s>"]],
            "two": [[" 5</s>", " 6</s>"]],
            "system": [[" 5</s>"]],
            "reasoning": [[" 5</s>", " 6</s>"]],
            "tools": [['[CALL]add{"a": 2, "b": 3}</s>', " It is 5.</s>"]],
        },
    ),
    "channels": (
        _CHANNELS,
        {
            "one": [["[C]final[M]5[RETURN]"]],
            "two": [["[C]final[M]5[RETURN]"], ["[C]final[M]6[RETURN]"]],
            "system": [["[C]final[M]5[RETURN]"]],
            "reasoning": [
                ["[C]analysis[M]count[E][H]assistant[C]final[M]5[RETURN]"],
                ["[C]analysis[M]more[E][H]assistant[C]final[M]6[RETURN]"],
            ],
            "tools": [[' to=add[M]{"a": 2, "b": 3}[CALL]', "[C]final[M]It is 5.[RETURN]"]],
        },
    ),
    "no end of turn": (
        _NO_END,
        {
            "one": [["5</s>"]],
            "two": [["5</s>"], ["6</s>"]],
            "system": [["5</s>"]],
            "reasoning": [["5</s>"], ["6</s>"]],
            "tools": _NOT_SHOWN,
        },
    ),
    "parts": (_PARTS, {**SIMPLE, "tools": _NOT_SHOWN}),
}


def make(template: str | dict[str, str] | None) -> PreTrainedTokenizerBase:
    tokenizer = wrap(byte_level_of_gpt4(), None)
    marks = ["[H]", "[/H]", "[E]", "[M]", "[C]", "[CALL]", "[R]", "[RETURN]"]
    tokenizer.add_special_tokens({"extra_special_tokens": marks})
    tokenizer.chat_template = template
    return tokenizer


def trained_stretches(tokenizer: PreTrainedTokenizerBase, row: dict[str, Any], last: bool = False) -> list[list[str]]:
    """Of each example of a row the stretches that are trained."""
    made = [show_sample(tokens, tokenizer) for tokens in sequences(read(row), tokenizer, "\n", last)]
    return [[part.split("⟧")[0] for part in text.split("⟦")[1:]] for text in made]


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_trained(kind: str, row: str) -> None:
    template, expected = KINDS[kind]
    tokenizer, wanted = make(template), expected[row]
    if isinstance(wanted, str):
        with pytest.raises(ValueError, match=wanted):
            trained_stretches(tokenizer, ROWS[row])
        return
    assert trained_stretches(tokenizer, ROWS[row]) == wanted
    example = read(ROWS[row])
    asked, _ = prompt_and_reference(example, tokenizer, "\n")
    last = sequences(example, tokenizer, "\n")[-1]
    assert last.ids[: len(asked)] == asked
    assert all(last.trained[len(asked) :])
    assert not last.trained[len(asked) - 1]


def test_turns_whose_tokens_are_others_in_a_history() -> None:
    """An empty line and a word are merged otherwise than the line alone: what is asked later does not begin with what was trained."""
    tokenizer = wrap(byte_level(), TEMPLATES["headers"])
    first, second = sequences(read(ROWS["two"]), tokenizer, "\n")
    history = tokenizer.apply_chat_template(ROWS["two"]["messages"][:3], tokenize=False, add_generation_prompt=True)
    asked = tokenizer(history, add_special_tokens=False)["input_ids"]
    assert second.ids[: len(asked)] == asked
    assert first.ids != asked[: len(first.ids)]


def test_the_end_of_turn() -> None:
    ends = {kind: end_of_turn(make(template)) for kind, (template, _) in KINDS.items()}
    tokenizer = make(None)
    assert tokenizer.convert_ids_to_tokens([ends["lines"], ends["channels"], ends["end of text at the end"]]) == [
        "[E]",
        "[RETURN]",
        "[E]",
    ]
    assert ends["no end of turn"] is None
    assert ends["two tokens at the end"] == ends["lines"]


def test_markers_choose_what_of_a_turn_is_trained() -> None:
    template = (
        "{% for m in messages %}{{ '[H]' }}{% if m.role == 'assistant' %}{{ 'note ' }}{% generation %}{{ m.content }}{% endgeneration %}"
        "{% else %}{{ m.content }}{% endif %}{{ '[E]' }}{% endfor %}{% if add_generation_prompt %}{{ '[H]' }}{% endif %}"
    )
    assert trained_stretches(make(template), ROWS["two"]) == [["5[E]", "6[E]"]]


def test_a_content_that_holds_the_reasoning() -> None:
    row = {"messages": [user("2+3?"), assistant("<think>\ncount\n</think>\n\n5")]}
    template = _DROPPED.replace("{{ m.content | trim", "{{ m.content.split('</think>')[-1] | trim")
    assert trained_stretches(make(template), row) == [["count\n</think>\n\n5[E]"]]


def test_turns_that_are_not_trained() -> None:
    for key, value in (("weight", 0), ("train", False), ("loss_mask", 0.0)):
        row = {"messages": [user("a"), assistant("bad", **{key: value}), user("b"), assistant("good", **{key: 1})]}
        assert trained_stretches(make(_LINES), row) == [["good[E]"]]
    with pytest.raises(ValueError, match="message 2 has weight 'much': 1 or true"):
        read({"messages": [user("a"), assistant("b", weight="much")]})
    assert trained_stretches(make(_LINES), ROWS["two"], last=True) == [["6[E]"]]
    nothing = {"messages": [user("a"), assistant("b", weight=0)]}
    assert trained_stretches(make(_LINES), nothing) == [[]]


def test_a_chat_that_begins_with_the_assistant() -> None:
    row = {"messages": [assistant("Welcome!"), user("hi"), assistant("hello")]}
    assert trained_stretches(make(_LINES), row) == [["hello[E]"]]
    with pytest.raises(ValueError, match="is the only one: nothing asks for it"):
        read({"messages": [assistant("Welcome!")]})


def test_forms_of_openai() -> None:
    """Arguments as JSON, contents as parts, calls that are empty, and keys that a table filled with null."""
    call = {**CALL, "function": {"name": "add", "arguments": '{"a": 2, "b": null}'}}
    filled = {**CALL, "function": {"name": "add", "arguments": {"a": 2, "city": None, "inner": {"b": None}}}}
    for given, written in ((call, '{"a": 2, "b": null}'), (filled, '{"a": 2, "inner": {}}')):
        row = {"messages": [user("2+3?"), assistant("", tool_calls=[given])]}
        assert trained_stretches(make(_LINES), row) == [[f"<tool_call>add {written}</tool_call>[E]"]]
    parts = [{"type": "text", "text": "2+"}, {"type": "text", "text": "3?", "image_url": None}]
    row = {"messages": [{"role": "user", "content": parts}, assistant("5", tool_calls=[])]}
    assert read(row) == read(ROWS["one"])
    with pytest.raises(ValueError, match="message 1 has a content part of type 'image_url'"):
        read({"messages": [{"role": "user", "content": [{"type": "image_url"}]}, assistant("5")]})
    broken = {"function": {"name": "add", "arguments": "{a}"}}
    with pytest.raises(ValueError, match="message 2 calls 'add' with arguments that are no JSON"):
        read({"messages": [user("a"), assistant(None, tool_calls=[broken])]})


ARGUMENTS = '{"price": 1.10, "many": [1e5, 0.5, -2.50], "of": {"a": 1.0}, "n": 3}'
MARKED = (
    "{% for m in messages %}{{ '[H]' + m.role + '[/H]' }}{% generation %}{{ m.content }}{% for c in m.tool_calls or [] %}"
    + (
        _CALLS
        + "{% endfor %}{{ '[E]' }}{% endgeneration %}{% endfor %}{% if add_generation_prompt %}{{ '[H]assistant[/H]' }}{% endif %}"
    )
)


@pytest.mark.parametrize("template", [_LINES, _SYSTEM_LAST, MARKED], ids=["as an object", "as a text", "marked"])
@pytest.mark.parametrize("as_text", [False, True])
def test_numbers_of_a_call_are_written_as_in_the_row(template: str, as_text: bool, tmp_path: Path) -> None:
    arguments = json.dumps(ARGUMENTS) if as_text else ARGUMENTS
    path = tmp_path / "rows.jsonl"
    path.write_text(
        '{"messages": [{"role": "user", "content": "How much?"}, {"role": "assistant", "tool_calls": [{"type": "function", '
        f'"function": {{"name": "add", "arguments": {arguments}}}}}]}}, {{"role": "tool", "content": "1.10"}}, '
        '{"role": "assistant", "content": "1.10"}]}\n'
    )
    (row,) = load_rows(str(path), "train")
    first, second = trained_stretches(make(template), row)[0]
    assert ARGUMENTS in first
    assert second.strip().startswith("1.10")


def test_tools_reach_the_template() -> None:
    for tools in (TOOLS, json.dumps(TOOLS), [json.dumps(TOOLS[0])]):
        tokens = sequences(read({**ROWS["one"], "tools": tools}), make(_LINES), "\n")[0]
        assert '"description": "adds"' in make(_LINES).decode(tokens.ids)
    with pytest.raises(ValueError, match="'tools' is a list of objects or its JSON"):
        read({**ROWS["one"], "tools": "hammer"})


def test_tools_that_a_template_does_not_render(caplog: pytest.LogCaptureFixture) -> None:
    """As Command A's default, which names them and renders none."""
    with caplog.at_level(logging.WARNING):
        for template in (_LINES, _UNASKED, "{% set tools = [] %}" + _LINES, "{# tools #}" + TEMPLATES["headers"]):
            caplog.clear()
            text = show_sample(sequences(read({**ROWS["one"], "tools": TOOLS}), make(template), "\n")[0], make(None))
            said = "has no place for tools: the rows' tools are left out" in caplog.text
            assert said == ("adds" not in text)


def test_a_system_prompt_that_a_template_does_not_render(caplog: pytest.LogCaptureFixture) -> None:
    template = (
        "{% for m in messages if m.role != 'system' %}{{ '[H]' + m.role + '[M]' + m.content + '[E]' }}{% endfor %}"
    )
    template += "{% if add_generation_prompt %}{{ '[H]assistant[M]' }}{% endif %}"
    for row, said in (("one", False), ("system", True)):
        with caplog.at_level(logging.WARNING):
            assert trained_stretches(make(template), ROWS[row]) == SIMPLE[row]
        assert ("the rows' system prompts are left out" in caplog.text) == said


def test_a_template_of_one_call_a_message() -> None:
    """As gpt-oss's, which writes the first alone."""
    template = _LINES.replace("{% for c in m.tool_calls %}", "{% for c in m.tool_calls[:1] %}")
    other = {**CALL, "function": {"name": "add", "arguments": {"a": 4, "b": 5}}}
    row = {"messages": [user("2+3? 4+5?"), assistant(None, tool_calls=[CALL, other])]}
    with pytest.raises(ValueError, match="shows 1 of the 2 times that message 2 calls 'add'.*make them a message each"):
        trained_stretches(make(template), row)
    second = _CALLED.replace("2", "4").replace("3", "5")
    assert trained_stretches(make(_LINES), row) == [[f"{_CALLED}{second}[E]"]]


def test_content_beside_a_call(caplog: pytest.LogCaptureFixture) -> None:
    row = {"messages": [user("2+3?"), assistant("I add.", tool_calls=[CALL])]}
    without = _LINES.replace("{{ m.content | trim", "{{ ('' if m.tool_calls else m.content) | trim")
    for template, content in ((_LINES + "{# of this test #}", "I add."), (without, "")):
        with caplog.at_level(logging.WARNING):
            assert trained_stretches(make(template), row) == [[f"{_CALLED}{content}[E]"]]
        assert ("shows no content beside tool calls" in caplog.text) == (not content)


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
@pytest.mark.parametrize("read_by", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_under_another_key(key: str, read_by: str) -> None:
    template = _LINES.replace(
        "{{ m.content | trim",
        f"{{% if m.{read_by} %}}<think>{{{{ m.{read_by} }}}}</think>{{% endif %}}{{{{ m.content | trim",
    )
    row = {"messages": [user("2+3?"), assistant("5", **{key: "count"})]}
    assert trained_stretches(make(template), row) == [["<think>count</think>5[E]"]]


def test_reasoning_that_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    said = {
        _LINES: "the chat template shows no reasoning",
        _CLOSED_CHANNEL: "generation prompt has an empty reasoning.*enable_thinking",
    }
    with caplog.at_level(logging.WARNING):
        for template, wanted in said.items():
            caplog.clear()
            assert trained_stretches(make(template + "{# of this test #}"), ROWS["reasoning"])[0][0] == "5[E]"
            assert re.search(wanted, caplog.text)


def test_a_prompt_that_no_turn_goes_on_from() -> None:
    template = _LINES.replace("assistant[/H]\n\n' }}{% endif %}", "assistant[/H]\n\nHere I think: ' }}{% endif %}")
    with pytest.raises(
        ValueError, match=r"goes on with 'Here I think: ', the finished turn with '5\[E\]\\n'; give a template"
    ):
        trained_stretches(make(template), ROWS["one"])


def test_the_developer_is_the_system_where_the_template_knows_none(caplog: pytest.LogCaptureFixture) -> None:
    row = {"messages": [{"role": "developer", "content": "Brief."}, user("2+3?"), assistant("5")]}
    template = _LINES + "{# of this test #}"
    with caplog.at_level(logging.WARNING):
        texts = [show_sample(sequences(read(row), make(template), "\n")[0], make(None)) for _ in range(2)]
    assert "[H]system[/H]\n\nBrief." in texts[0]
    assert [record.getMessage() for record in caplog.records if "developer" in record.getMessage()] == [
        "the chat template knows no role developer: those messages are rendered as the system's"
    ]
    assert "[H]developer[/H]" in show_sample(
        sequences(read(row), make(_LINES + "{# developer #}"), "\n")[0], make(None)
    )


# -- settings -----------------------------------------------------------------------------------------------------


def test_arguments_are_kept_by_the_template(tmp_path: Path) -> None:
    """The saved tokenizer asks as training did, and a caller may still say otherwise."""
    template = _LINES.replace(
        "assistant[/H]\n\n' }}",
        "assistant[/H]\n\n' }}{% if enable_thinking is false %}{{ '<think></think>\n' }}{% endif %}",
    )
    template = "{{ style or '' }}" + template
    tokenizer = make(template)
    plain = tokenizer.apply_chat_template([user("a")], tokenize=False, add_generation_prompt=True)
    choose_template(tokenizer, DataSettings(template_arguments={"enable_thinking": False, "style": "it's {%}\n"}))
    tokenizer.save_pretrained(tmp_path)
    for kept in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        asked = kept.apply_chat_template([user("a")], tokenize=False, add_generation_prompt=True)
        assert asked == "it's {%}\n" + plain + "<think></think>\n"
        other = kept.apply_chat_template(
            [user("a")], tokenize=False, add_generation_prompt=True, enable_thinking=True, style=""
        )
        assert other == plain
        assert kept.decode(prompt_and_reference(Pair("a", "5"), kept, "\n")[0]) == asked
    with pytest.raises(
        ValueError, match="'enable_thinkin', which the chat template does not use. Did you mean enable_thinking"
    ):
        choose_template(make(template), DataSettings(template_arguments={"enable_thinkin": False}))
    with pytest.raises(ValidationError, match="name variables of the chat template, given 'a b'"):
        DataSettings(template_arguments={"a b": 1})


def test_a_template_of_the_settings(tmp_path: Path) -> None:
    own = tmp_path / "own.jinja"
    own.write_text(TEMPLATES["plain text"])
    for given in (str(own), TEMPLATES["plain text"]):
        tokenizer = load_tokenizer(ModelSettings(), DataSettings(chat_template=given))
        assert tokenizer.chat_template == TEMPLATES["plain text"]
    with pytest.raises(ValueError, match="data.chat_template .*owm.jinja: no such file.* Did you mean .*own.jinja"):
        load_tokenizer(ModelSettings(), DataSettings(chat_template=str(tmp_path / "owm.jinja")))


def test_of_several_templates_the_default() -> None:
    tokenizer = make({"default": _LINES, "tool_use": _HEADERS})
    assert trained_stretches(tokenizer, ROWS["one"]) == SIMPLE["one"]
    choose_template(tokenizer, DataSettings())
    assert tokenizer.chat_template == _LINES
    with pytest.raises(ValueError, match="the chat templates a, b and none is named default"):
        trained_stretches(make({"a": _LINES, "b": _HEADERS}), ROWS["one"])


def test_a_tokenizer_without_end_and_padding(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = make(None)
    tokenizer.eos_token = tokenizer.pad_token = None
    (tmp_path / "base").mkdir()
    tokenizer.save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "config.json").write_text('{"model_type": "llama"}')
    loaded = load_tokenizer(ModelSettings(name_or_path=str(tmp_path / "base")))
    assert loaded.pad_token == "<unk>"
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "2+3?", "completion": "5"}\n')
    with caplog.at_level(logging.WARNING):
        data = prepare(str(path), "train", loaded, DataSettings())
    assert "what is generated will not stop by itself" in caplog.text
    assert data.batch([0, -1], loaded.pad_token_id).trained_tokens == 1
    with pytest.raises(ValueError, match="has no padding token: set pad_token"):
        data.batch([0, -1], None)


def test_rows_that_become_several_sequences(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [ROWS["one"], ROWS["two"], {"messages": [user("q" * 90), assistant("5")]}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = make(_LAST_THINKS)
    data = prepare(str(path), "train", tokenizer, DataSettings())
    assert (len(data), data.data["row"][:], data.firsts.tolist()) == (3, [0, 1, 1, 2], [0, 1, 3, 4])
    assert data.tokens(1).ids == [*data.sequence(1).ids, *data.sequence(2).ids]
    assert data.summary().startswith("3 examples (4 sequences), ")
    again = prepare(str(path), "train", tokenizer, DataSettings(train_on="last"))
    assert (len(again), again.data["row"][:]) == (3, [0, 1, 2])
    limit = int(data.lengths[2])
    dropped = prepare(str(path), "train", tokenizer, DataSettings(max_length=limit, too_long="drop"))
    assert (dropped.data["row"][:], dropped.firsts.tolist()) == ([0, 1, 1], [0, 1, 3])
    with pytest.raises(ValueError, match=rf"row 3 has \d+ tokens, data.max_length is {limit} \(1 of 3 rows"):
        prepare(str(path), "train", tokenizer, DataSettings(max_length=limit))


def test_the_built_in_rows_have_the_tokens_of_before(tokenizer: PreTrainedTokenizerBase) -> None:
    """Losses of runs are pinned by them."""
    digests = [prepare("builtin:sql", purpose, tokenizer, DataSettings()).digest() for purpose in ("train", "eval")]
    assert [digest[:16] for digest in digests] == ["9be9acec1ceb65b0", "fcd6c1d3a93143b6"]


def test_line_breaks_as_a_shell_gives_them() -> None:
    settings = DataSettings(separator="\\n", prompt_template="{a}\\n\\t{b}", completion_column="c")
    assert (settings.separator, settings.prompt_template) == ("\n", "{a}\n\t{b}")
    assert DataSettings(**settings.model_dump()) == settings
