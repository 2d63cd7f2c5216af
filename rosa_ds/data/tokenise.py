"""Examples become token ids with a mask of the tokens that are trained."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from rosa_ds.data.formats import Conversation, Example, Pair, PlainText


@dataclasses.dataclass(frozen=True)
class Tokens:
    """``ids`` of an example and, for each, whether it is ``trained`` (predicted with a loss)."""

    ids: list[int]
    trained: list[bool]


def tokenise(example: Example, tokenizer: PreTrainedTokenizerBase, separator: str) -> Tokens:
    """Token ids and loss mask of one example.

    Conversations (and pairs, where the tokenizer has a chat template): the template's text; trained are the
    assistant's contents and the end-of-turn token after each. Other pairs: prompt, separator, completion, end of
    text; trained are the last two. Plain texts are trained whole.

    Raises:
        ValueError: messages without a chat template, or a template that hides where an assistant's turn stands.
    """
    if isinstance(example, PlainText):
        return _with_end(tokenizer, _encode(tokenizer, example.text, [(0, len(example.text), 0)], special=True))
    if isinstance(example, Pair) and not tokenizer.chat_template:
        start = len(example.prompt) + len(separator)
        text = example.prompt + separator + example.completion
        return _with_end(tokenizer, _encode(tokenizer, text, [(start, len(text), 0)], special=True))
    _require_template(tokenizer)
    assert isinstance(tokenizer.chat_template, str), "it was required"
    messages = as_messages(example)
    try:
        if "{% generation" in tokenizer.chat_template or "{%- generation" in tokenizer.chat_template:
            encoded = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
            trained = [bool(flag) for flag in encoded["assistant_masks"]]
            return _with_end_of_turn(tokenizer, Tokens(list(encoded["input_ids"]), trained))
        text = _render(tokenizer, messages)
        spans = assistant_spans(tokenizer, messages, text)
    except TemplateError as error:
        raise ValueError(f"the chat template of the model's tokenizer fails here: {error}") from None
    return _encode(tokenizer, text, spans, special=False)


def assistant_spans(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, Any]], text: str
) -> list[tuple[int, int, int]]:
    """Where the assistant's turns stand in the rendered ``text``: begin, end of the content, end of the turn.

    A turn begins where the rendering of everything before it (with the generation prompt) ends, and ends where that
    of everything up to it does. Where a template renders a last turn differently from an earlier one, the turn is
    taken to end with its content.
    """
    spans = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _render(tokenizer, messages[:index], prompt=True)
        content = message["content"].strip()
        at = text.find(content, len(before)) if text.startswith(before) else -1
        if at < 0:
            raise ValueError(
                f"the chat template does not show where message {index + 1} (assistant) stands in the rendered text: use a "
                "template with {% generation %} markers, or one row per assistant turn"
            )
        end = at + len(content)
        upto = _render(tokenizer, messages[: index + 1])
        spans.append((len(before), end, max(end, len(upto)) if text.startswith(upto) else end))
    return spans


def _encode(tokenizer: PreTrainedTokenizerBase, text: str, spans: list[tuple[int, int, int]], special: bool) -> Tokens:
    """Token ids of ``text``; of each span (begin, end of content, end of turn) its content is trained, and what follows
    up to the first special token (the end-of-turn token), inside the turn or right behind the content."""
    if not tokenizer.is_fast:
        raise ValueError(f"{type(tokenizer).__name__} gives no character offsets: load a fast tokenizer for this model")
    encoded = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
    ids, offsets = list(encoded["input_ids"]), encoded["offset_mapping"]
    trained = [False] * len(ids)
    specials = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    for begin, end, turn_end in spans:
        for i, (a, b) in enumerate(offsets):
            if b <= begin or a == b:
                continue
            behind = a >= end
            if behind and a >= turn_end and not (a == end and ids[i] in specials):
                break
            trained[i] = True
            if behind and ids[i] in specials:
                break
    return Tokens(ids, trained)


def _with_end_of_turn(tokenizer: PreTrainedTokenizerBase, tokens: Tokens) -> Tokens:
    """Also train the end-of-text token that ends a turn, where a template's markers leave it out."""
    trained = list(tokens.trained)
    for i in range(1, len(trained)):
        if tokens.trained[i - 1] and not tokens.trained[i] and tokens.ids[i] == tokenizer.eos_token_id:
            trained[i] = True
    return Tokens(tokens.ids, trained)


def _with_end(tokenizer: PreTrainedTokenizerBase, tokens: Tokens) -> Tokens:
    """The tokens with a trained end-of-text token, if the tokenizer did not put one there."""
    if tokenizer.eos_token_id is None or (tokens.ids and tokens.ids[-1] == tokenizer.eos_token_id):
        return Tokens(tokens.ids, [*tokens.trained[:-1], True])
    return Tokens([*tokens.ids, tokenizer.eos_token_id], [*tokens.trained, True])


def prompt_and_reference(example: Example, tokenizer: PreTrainedTokenizerBase, separator: str) -> tuple[list[int], str]:
    """Token ids that ask for the last completion, and the completion that is expected.

    Raises:
        ValueError: a plain text, which asks for nothing.
    """
    if isinstance(example, PlainText):
        raise ValueError("a row with only 'text' has no prompt to generate from: use metric perplexity")
    if isinstance(example, Pair) and not tokenizer.chat_template:
        ids = tokenizer(example.prompt + separator)["input_ids"]
        if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:
            ids = ids[:-1]
        return list(ids), example.completion
    _require_template(tokenizer)
    messages = as_messages(example)
    text = _render(tokenizer, messages[:-1], prompt=True)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"]), str(messages[-1]["content"])


def _require_template(tokenizer: PreTrainedTokenizerBase) -> None:
    if not tokenizer.chat_template:
        raise ValueError(
            "the row holds chat messages, but the model's tokenizer has no chat template: use an instruct model, or rows "
            "with prompt and completion"
        )


def as_messages(example: Example) -> list[dict[str, Any]]:
    """The example as chat messages."""
    if isinstance(example, Conversation):
        return [dict(message) for message in example.messages]
    assert isinstance(example, Pair)
    return [{"role": "user", "content": example.prompt}, {"role": "assistant", "content": example.completion}]


def _render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, Any]], prompt: bool = False) -> str:
    return str(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=prompt))


def show_sample(tokens: Tokens, tokenizer: PreTrainedTokenizerBase) -> str:
    """The example as text, trained stretches between ``⟦`` and ``⟧``."""
    parts, start = [], 0
    for end in range(1, len(tokens.ids) + 1):
        if end == len(tokens.ids) or tokens.trained[end] != tokens.trained[start]:
            text = tokenizer.decode(tokens.ids[start:end], skip_special_tokens=False)
            parts.append(f"⟦{text}⟧" if tokens.trained[start] else text)
            start = end
    return "".join(parts)
