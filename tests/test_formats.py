"""Formats of rows: each recognised by its columns, and what fits none refused."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from rosa_ds.config.schema import DataSettings
from rosa_ds.config.template import Template
from rosa_ds.data.formats import Conversation, Pair, Several, find_format, parse_row
from rosa_ds.data.prepare import prepare
from rosa_ds.data.tokenise import prompt_and_reference
from rosa_ds.evaluation.causal_lm import load_questions

QUESTION, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
SYSTEM = {"role": "system", "content": "s"}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}


@pytest.mark.parametrize(
    ("row", "name", "expected"),
    [
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
            "ShareGPT",
            Conversation((QUESTION, ANSWER)),
        ),
        (
            {"conversation": [{"from": "user", "value": "a"}, {"from": "assistant", "value": "b"}], "system": "s"},
            "ShareGPT",
            Conversation((SYSTEM, QUESTION, ANSWER)),
        ),
        ({"conversations": [QUESTION, ANSWER], "system": None}, "ShareGPT", Conversation((QUESTION, ANSWER))),
        (
            {
                "conversations": [
                    {"from": "human", "value": "a"},
                    {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 2}}'},
                    {"from": "observation", "value": "2"},
                    {"from": "gpt", "value": "b", "weight": 0},
                ],
                "tools": '[{"name": "add"}]',
            },
            "ShareGPT",
            Conversation(
                (
                    QUESTION,
                    {"role": "assistant", "content": "", "tool_calls": [CALL]},
                    {"role": "tool", "content": "2"},
                    ANSWER,
                ),
                ({"name": "add"},),
                frozenset({3}),
            ),
        ),
        ({"instruction": "a", "input": "", "output": "b"}, "Alpaca", Pair("a", "b")),
        ({"instruction": "a", "input": None, "output": "b"}, "Alpaca", Pair("a", "b")),
        ({"instruction": "a", "input": "2 3", "output": 5}, "Alpaca", Pair("a\n2 3", "5")),
        ({"instruction": "a", "output": "b", "system": "s"}, "Alpaca", Conversation((SYSTEM, QUESTION, ANSWER))),
        (
            {"prompt": [SYSTEM, QUESTION, ANSWER, QUESTION], "completion": [ANSWER]},
            "prompt and completion",
            Conversation((SYSTEM, QUESTION, ANSWER, QUESTION, ANSWER), (), frozenset({0, 1, 2, 3})),
        ),
        (
            {"prompt": [QUESTION], "completion": "b"},
            "prompt and completion",
            Conversation((QUESTION, ANSWER), (), frozenset({0})),
        ),
        (
            {"prompt": "a", "completion": "b", "tools": [{"name": "add"}]},
            "prompt and completion",
            Conversation((QUESTION, ANSWER), ({"name": "add"},)),
        ),
        (
            {"prompt": "a", "completions": ["b", "c"]},
            "prompt and completions",
            Several((Pair("a", "b"), Pair("a", "c"))),
        ),
    ],
)
def test_recognised(row: dict[str, Any], name: str, expected: object) -> None:
    assert find_format(row).name == name
    assert parse_row(row) == expected


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"instruction": "a", "input": "b"}, "fit no format; the nearest, Alpaca, misses 'output': name two with"),
        ({"input": "a", "output": "b"}, "the nearest, Alpaca, misses 'instruction'"),
        ({"prompt": "a", "answer": "b"}, "the nearest, .*, misses 'completion'"),
        ({"messages": None, "id": 3}, "the nearest, messages, has nothing in 'messages'"),
        ({"chat": []}, "the columns 'chat' fit no format: name two with data.prompt_column"),
        ({"conversations": [{"from": "bot", "value": "b"}]}, "message 1 is from 'bot'; allowed are system, human"),
        ({"conversations": [{"from": "human", "value": 3}]}, "message 1 is not an object with a role and a text"),
        ({"conversations": [{"from": "function_call", "value": "{"}]}, "message 1 is a function_call that is no JSON"),
        ({"instruction": "a", "output": "b", "history": [["c", "d"]]}, "'history' holds earlier turns"),
        ({"prompt": "a", "completions": "b"}, "'completions' is a list of answers"),
    ],
)
def test_refused(row: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_row(row)


def test_named_columns_win_over_what_is_recognised() -> None:
    row = {"instruction": "a", "input": "c", "output": "b", "messages": [QUESTION, ANSWER]}
    assert parse_row(row, ("input", "output")) == Pair("c", "b")
    assert parse_row({"ask": [QUESTION], "say": [ANSWER], "tools": None}, ("ask", "say")) == Conversation(
        (QUESTION, ANSWER), (), frozenset({0})
    )


def test_a_column_of_a_template_may_be_empty() -> None:
    template = Template("{instruction}\n{input}")
    assert parse_row({"instruction": "a", "input": "", "output": "b"}, (template, "output")) == Pair("a\n", "b")
    assert parse_row({"instruction": "a", "input": None, "output": "b"}, (template, "output")) == Pair("a\n", "b")
    with pytest.raises(ValueError, match="the columns 'input', 'instruction' are all empty"):
        parse_row({"instruction": "", "input": None, "output": "b"}, (template, "output"))


def test_several_completions_are_several_examples_and_one_question(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "a", "completions": ["b", "c"]}) + "\n")
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            data = prepare(str(path), "train", tokenizer, DataSettings())
    assert len(data) == 2
    (question,) = load_questions(str(path), tokenizer, DataSettings())
    assert question.references == ("b", "c")
    assert question.prompt == prompt_and_reference(Pair("a", "b"), tokenizer, "\n")[0]
    said = [record.getMessage() for record in caplog.records if "read as" in record.getMessage()]
    assert said == [
        f"{path}: read as prompt and completions, a question, once with each of its answers, of the columns 'completions', 'prompt'"
    ]
