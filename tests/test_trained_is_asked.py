"""Token ids that are trained are those that generation is fed, and behind them what it is to write: for every family of tokenizers."""

from __future__ import annotations

import functools
import itertools

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from chat_families import FAMILIES, LOSSLESS, TEMPLATES, wrap
from rosa_ds.data.formats import Conversation, Pair, PlainText, as_chat
from rosa_ds.data.tokenise import prompt_and_reference, sequences

PROMPTS = ("Why?", "Why?\n", "Why? ", "a \n\n", " two  ", "```\n", "naïve", "The answer:", "12", "日本 🙂\n")
COMPLETIONS = ("Oslo", " Oslo", "\nOslo", "\n\nx", "42", "é", ".", "  two ", "日本", "a\n")
SEPARATORS = ("\n", "", " ", "\n\n", " => ")


@functools.cache
def family(name: str, template: str | None, around: bool = False) -> PreTrainedTokenizerFast:
    return wrap(FAMILIES[name](), TEMPLATES[template] if template else None, around)


def check_pair(name: str, template: str | None, around: bool, prompt: str, completion: str, separator: str) -> None:
    """One row: what is trained begins with what is asked, the rest and nothing else is trained, and it says the completion."""
    tokenizer = family(name, template, around)
    pair = Pair(prompt, completion)
    asked, reference = prompt_and_reference(pair, tokenizer, separator)
    (tokens,) = sequences(pair, tokenizer, separator)
    written = tokens.ids[len(asked) :]
    assert tokens.ids[: len(asked)] == asked
    assert tokens.trained == [False] * len(asked) + [True] * len(written)
    assert reference == completion
    if template is not None:  # what transformers makes of the question
        question = list(as_chat(pair).messages[:1])
        rendered = tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
        assert asked == tokenizer(rendered, add_special_tokens=False)["input_ids"]
    else:
        alone = tokenizer(prompt + separator)["input_ids"]
        assert asked == (alone[:-1] if around else alone)
    ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")]
    assert [token in ends for token in written] == [False] * (len(written) - 1) + [True]
    if name in LOSSLESS:
        text = tokenizer.decode(written[:-1])
        assert text.strip().endswith(completion.strip()), text
        if template is None:
            whole = tokenizer.decode([*asked, *written[:-1]], skip_special_tokens=True)
            assert whole.strip() == (prompt + separator + completion).strip()


@pytest.mark.parametrize("name", FAMILIES)
def test_every_pair(name: str) -> None:
    for template, prompt, completion in itertools.product(TEMPLATES, PROMPTS, COMPLETIONS):
        check_pair(name, template, False, prompt, completion, "\n")
    for around, prompt, completion, separator in itertools.product((False, True), PROMPTS, COMPLETIONS, SEPARATORS):
        check_pair(name, None, around, prompt, completion, separator)


@pytest.mark.parametrize("text", ["hi", "<s>hi", "hi</s>", "<s>hi</s>"])
def test_marks_that_a_text_has_already_are_not_put_there_again(text: str) -> None:
    tokenizer = family("byte level", None, around=True)
    (tokens,) = sequences(PlainText(text), tokenizer, "\n")
    assert tokenizer.decode(tokens.ids) == "<s>hi</s>"
    (tokens,) = sequences(Pair(text.removesuffix("</s>"), "ho"), tokenizer, "\n")
    assert tokenizer.decode(tokens.ids) == "<s>hi\nho</s>"


TEXT = st.text(st.sampled_from("ab1 \n.é日🙂:'"), min_size=1, max_size=12).filter(str.strip)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(tuple(FAMILIES)), st.sampled_from((None, *TEMPLATES)), st.booleans(), TEXT, TEXT)
def test_any_pair(name: str, template: str | None, around: bool, prompt: str, completion: str) -> None:
    check_pair(name, template, around and template is None, prompt, completion, "\n")


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(tuple(FAMILIES)), st.sampled_from(tuple(TEMPLATES)), st.lists(TEXT, min_size=2, max_size=6))
def test_any_chat(name: str, template: str, texts: list[str]) -> None:
    """Each turn of a chat stands behind what transformers makes of the messages before it."""
    tokenizer = family(name, template)
    texts = texts[: len(texts) // 2 * 2]
    messages = [{"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(texts)]
    made = sequences(Conversation(tuple(messages)), tokenizer, "\n")
    turns = 0
    for tokens in made:
        for start in (n for n, on in enumerate(tokens.trained) if on and not (n and tokens.trained[n - 1])):
            before = messages[: 2 * turns + 1]
            rendered = tokenizer.apply_chat_template(before, add_generation_prompt=True, tokenize=False)
            assert tokens.ids[:start] == tokenizer(rendered, add_special_tokens=False)["input_ids"]
            turns += 1
    assert turns == len(texts) // 2
    assert prompt_and_reference(Conversation(tuple(messages)), tokenizer, "\n")[0] == tokens.ids[:start]
