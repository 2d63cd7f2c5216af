"""Answers of reasoning models are compared without the reasoning that their template marks."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from rosa_ds.config.schema import DataSettings
from rosa_ds.data.reasoning import PAIRS
from rosa_ds.evaluation.causal_lm import written_metrics
from rosa_ds.evaluation.generate import Generation
from rosa_ds.evaluation.options import parse
from rosa_ds.evaluation.reasoning import CHANNELS, Reasoning, reasoning_of, without_special
from scripted import CHATML, byte_tokenizer, scripted

THINK = Reasoning("<think>", "</think>")
CHANNEL = Reasoning(CHANNELS, None)
FINAL = "<|channel|>final<|message|>"
THINKING = CHATML.replace("<im_start>assistant\n", "<im_start>assistant\n<think>\n") + "{# </think> #}"
"""Its generation prompt begins the reasoning."""
CLOSING = CHATML + "{# <think></think> #}"
"""The model writes both ends of its reasoning."""
HARMONY = (
    "{% for m in messages %}<|start|>{{ m.role }}{% if m.role == 'assistant' %}" + FINAL + "{{ m.content }}<|return|>"
    "{% else %}<|message|>{{ m.content }}<|end|>{% endif %}{% endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
HARMONY_TOKENS = ("<|start|>", "<|end|>", "<|return|>", "<|channel|>", "<|message|>")


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<think>\n\n</think>\n\napple", "apple"),
        ("<think>\nIt is 3 + 4, so 7.\n</think>\n\n7", "7"),
        ("\n<think>a</think>b", "b"),
        ("apple", "apple"),
        ("a</think>b", "b"),  # begun by a prompt that is not known
        ("<think>a</think>b<think>c</think>d", "d"),
        ("<think>\nIt is 3 + 4", None),
        ("Sure. <think>and so on", None),
        ("<think>a</think>b<think>c", None),
        ("<think>a</think>", ""),
        ("", ""),
    ],
)
def test_the_answer_stands_behind_the_reasoning(text: str, answer: str | None) -> None:
    assert THINK.answer(text) == answer


@pytest.mark.parametrize(
    ("prompt", "text", "answer"),
    [
        ("assistant\n<think>\n", "hm\n</think>\n\n7", "7"),
        ("assistant\n<think>\n", "hm", None),
        ("assistant\n<think>\n\n</think>\n\n", "7", "7"),
        ("what does <think> mean?\nassistant\n", "7", "7"),
    ],
)
def test_a_prompt_may_begin_the_reasoning(prompt: str, text: str, answer: str | None) -> None:
    assert THINK.answer(text, prompt) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (f"{FINAL}apple", "apple"),
        (f"{CHANNELS}hm, 3<|end|><|start|>assistant{FINAL}apple", "apple"),
        (f"{CHANNELS}a<|end|><|start|>assistant{CHANNELS}b<|end|><|start|>assistant{FINAL}apple", "apple"),
        (f"{CHANNELS}hm, 3", None),
        (f"{CHANNELS}a<|end|><|start|>assistant{CHANNELS}b", None),
        (f"{CHANNELS}a<|end|><|start|>assistant", ""),
        ("apple", "apple"),  # a reference
        (
            f'{CHANNELS}a<|end|><|start|>assistant to=functions.add<|channel|>commentary json<|message|>{{"a": 2}}',
            'to=functions.add<|channel|>commentary json<|message|>{"a": 2}',
        ),
    ],
)
def test_the_answer_is_the_final_channel(text: str, answer: str | None) -> None:
    assert CHANNEL.answer(text) == answer


def test_a_prompt_may_begin_the_channel() -> None:
    assert CHANNEL.answer(f"a<|end|><|start|>assistant{FINAL}7", f"<|start|>assistant{CHANNELS}") == "7"
    assert CHANNEL.answer("a", f"<|start|>assistant{CHANNELS}") is None


@pytest.mark.parametrize(("begin", "end"), PAIRS)
def test_the_template_names_its_marks(begin: str, end: str) -> None:
    tokenizer = byte_tokenizer("{{ '" + begin + "' }}{{ '" + end + "' }}")
    found = reasoning_of(tokenizer, "auto")
    assert found == reasoning_of(tokenizer, "drop") == Reasoning(begin, end)
    assert found is not None
    assert found.answer(f"{begin}\nhm{end}apple") == "apple"
    assert found.answer(f"{begin}\nhm") is None
    assert reasoning_of(tokenizer, "keep") is None


def test_what_is_dropped_where_the_template_names_nothing() -> None:
    for template in (None, CHATML):
        assert reasoning_of(byte_tokenizer(template), "auto") is None
        assert reasoning_of(byte_tokenizer(template), "drop") == THINK
    assert reasoning_of(byte_tokenizer(HARMONY), "auto") == CHANNEL
    named = byte_tokenizer()
    named.chat_template = {"default": CLOSING, "tool_use": CHATML}
    assert reasoning_of(named, "auto") == THINK


def test_special_tokens_of_a_text() -> None:
    tokenizer = byte_tokenizer()
    text = "<im_start>a<b> <response>c</response><im_end>"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert without_special(tokenizer, text) == tokenizer.decode(ids, skip_special_tokens=True) == "a<b> c"


# -- whole evaluations ---------------------------------------------------------------------------------------------


def evaluated(template: str, written: str, expected: str, folder: Path, **more: Any) -> dict[str, Any]:
    """Of one row whose model writes ``written``, up to the template's end of a turn."""
    tokenizer = byte_tokenizer(template)
    tokenizer.add_special_tokens({"extra_special_tokens": list(HARMONY_TOKENS)})
    (folder / "rows.jsonl").write_text(json.dumps({"prompt": "Say it.", "completion": expected}) + "\n")
    model = scripted(tokenizer, written)
    how = Generation(max_new_tokens=len(model.script))
    metrics = more.pop("metrics", ["exact_match", "chrf"])
    return written_metrics(model, tokenizer, str(folder / "rows.jsonl"), DataSettings(), metrics, how, 0, **more)


@pytest.mark.parametrize(
    ("template", "written", "expected"),
    [
        (CLOSING, "<think>\n\n</think>\n\napple<im_end>", "apple"),
        (CLOSING, "<think>\n\n</think>\n\napple<im_end>", "<think>\nso it is\n</think>\n\napple"),
        (THINKING, "a fruit\n</think>\n\napple<im_end>", "apple"),
        (HARMONY, f"{CHANNELS}fruit<|end|><|start|>assistant{FINAL}apple<|return|>", "apple"),
    ],
    ids=["written", "in the reference too", "begun by the prompt", "channels"],
)
def test_a_right_answer_counts(template: str, written: str, expected: str, tmp_path: Path) -> None:
    found = evaluated(template, written, expected, tmp_path)
    assert (found["exact_match"], found["chrf"], found["unfinished_reasoning"]) == (1.0, pytest.approx(100.0), 0)
    (sample,) = found["samples"]
    assert (sample["answer"], sample["references"]) == ("apple", ["apple"])
    assert sample["prediction"] == written.removesuffix("<im_end>").removesuffix("<|return|>")


def test_every_metric_sees_the_answer_alone(tmp_path: Path) -> None:
    written, metrics = (
        "<think>1 + 2 is 3</think>SELECT 4<im_end>",
        ["exact_match", "sql_match", "answer_match", "bleu", "chrf"],
    )
    found = evaluated(CLOSING, written, "SELECT 4", tmp_path, metrics=metrics)
    alone = evaluated(CHATML, "SELECT 4<im_end>", "SELECT 4", tmp_path, metrics=metrics)
    assert {metric: found[metric] for metric in metrics} == {metric: alone[metric] for metric in metrics}
    assert [found[metric] for metric in metrics[:3]] == [1.0, 1.0, 1.0]
    assert "unfinished_reasoning" not in alone
    assert "answer" not in alone["samples"][0]


def test_reasoning_may_be_kept(tmp_path: Path) -> None:
    written = "<think>\n\n</think>\n\napple<im_end>"
    found = evaluated(CLOSING, written, "apple", tmp_path, reasoning="keep")
    assert found["exact_match"] == 0.0
    assert "unfinished_reasoning" not in found
    assert evaluated(CHATML, written, "apple", tmp_path)["exact_match"] == 0.0
    assert evaluated(CHATML, written, "apple", tmp_path, reasoning="drop")["exact_match"] == 1.0


def test_reasoning_that_does_not_end_is_no_answer(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        found = evaluated(THINKING, "18 is it, 18", "18", tmp_path, metrics=["answer_match"])
    assert (found["answer_match"], found["unfinished_reasoning"]) == (0.0, 1)
    assert found["samples"][0]["answer"] == ""
    assert found["samples"][0]["prediction"] == "18 is it, 18"
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith("1 of 1 predictions have no answer: their reasoning does not end")
    assert said.endswith("give more --max-new-tokens (12)")


def test_special_tokens_of_a_reference_do_not_count(tmp_path: Path) -> None:
    """What the template writes for a turn may have some, which are no text of a prediction."""
    written = '<response>[{"name": "add"}]</response><im_end>'
    assert evaluated(CHATML, written, written, tmp_path)["exact_match"] == 1.0


def test_a_template_without_an_end_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        evaluated("{% for m in messages %}<{{ m.role }}>\n{{ m.content }}{% endfor %}", "apple", "apple", tmp_path)
    (said,) = [record.getMessage() for record in caplog.records]
    assert said == (
        "the chat template writes no token that ends an assistant's turn: generation may not stop; it ends with <end>, or at "
        "--max-new-tokens"
    )


def test_the_option() -> None:
    assert parse(["tiny", "--data", "x"]).reasoning == "auto"
    assert parse(["tiny", "--data", "x", "--reasoning", "drop"]).reasoning == "drop"
