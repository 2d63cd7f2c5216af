"""A turn's reasoning: where a message holds it, and what is to be written of it behind a generation prompt that begins it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from rosa_ds.utils.texts import shared_length

KEYS = ("reasoning_content", "reasoning", "thinking")
"""Keys of a message that hold what is thought before its content."""
PAIRS = (
    ("<think>", "</think>"),  # DeepSeek R1, Qwen 3, SmolLM 3, Nemotron, OLMo 3, GLM 4.5, Granite
    ("[THINK]", "[/THINK]"),  # Magistral
    ("<|START_THINKING|>", "<|END_THINKING|>"),  # Cohere Command A
    ("<|channel>thought", "<channel|>"),  # Gemma 4
    ("<seed:think>", "</seed:think>"),  # Seed-OSS
    ("<|inner_prefix|>", "<|inner_suffix|>"),  # Apertus
)
"""What begins and what ends a reasoning."""


def reasoning_of(message: Mapping[str, Any]) -> str:
    """The reasoning under one of :data:`KEYS`; empty if there is none."""
    return next((str(message[key]).strip() for key in KEYS if message.get(key)), "")


def under_all_keys(message: Mapping[str, Any]) -> dict[str, Any]:
    """The message with its reasoning under each of :data:`KEYS`: templates read one of them."""
    reasoning = next((message[key] for key in KEYS if message.get(key)), None)
    return {**dict.fromkeys(KEYS, reasoning), **message} if reasoning else dict(message)


def find_start(prompt: str, text: str, message: Mapping[str, Any]) -> tuple[int | None, str]:
    """Where in ``text`` begins what is to follow the prompt, and what is to be written before that.

    The two differ where the generation prompt begins a block of reasoning that the template leaves out of the finished turn.
    Of a block that the generation prompt ends already, nothing is to be written.

    Args:
        text: the prompt's messages and ``message``, rendered.

    Returns:
        None for a text that does not go on as the prompt begins.
    """
    if text.startswith(prompt):
        return len(prompt), ""
    if (marks := _marks_at_the_end(prompt)) is None:
        return None, ""
    begin, end = map(re.escape, marks)
    block = re.search(rf"(?:{begin}\s*)?{end}\s*\Z|{begin}\s*\Z", prompt)
    assert block is not None
    start = block.start()
    if not text.startswith(prompt[:start]):
        return None, ""
    of_prompt, of_text = block.group(), text[start:]
    if of_prompt.rstrip().endswith(marks[1]):
        shown = re.match(rf"(?:{begin}.*?)?{end}", of_text, re.DOTALL)
        if shown is None:
            return start, ""
        blanks = of_prompt[len(of_prompt.rstrip()) :]
        return start + shown.end() + shared_length(blanks, of_text[shown.end() :]), ""
    if shown := re.match(rf"{begin}\s*", of_text):
        return start + shown.end(), ""
    reasoning = reasoning_of(message)
    if not reasoning and marks[1] in message["content"]:
        reasoning = message["content"].split(marks[1])[0].split(marks[0])[-1].strip()
    if of_text.startswith(marks[1]):
        return start, reasoning
    if not of_prompt[-1].isspace():
        return start, reasoning + marks[1]
    return start, f"{reasoning}\n{marks[1]}" + ("" if of_text[:1].isspace() else "\n\n")


def _marks_at_the_end(prompt: str) -> tuple[str, str] | None:
    """The pair with one of which the prompt ends: a known one, else any tag with its end."""
    prompt = prompt.rstrip()
    known = next((pair for pair in PAIRS if prompt.endswith(pair)), None)
    tag = re.search(r"</?([\w:]+)>\Z", prompt)
    return known or ((f"<{tag[1]}>", f"</{tag[1]}>") if tag else None)
