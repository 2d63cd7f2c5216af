"""Where a reasoning model's answer stands in what it writes: behind its reasoning, which its chat template marks."""

from __future__ import annotations

import dataclasses
import re
from typing import Literal

from transformers import PreTrainedTokenizerBase

from rosa_ds.data.reasoning import PAIRS

Choice = Literal["auto", "keep", "drop"]
CHANNELS = "<|channel|>analysis<|message|>"
"""Begins the reasoning of gpt-oss, whose messages each name their channel."""
_FINAL = "<|channel|>final<|message|>"
_ANALYSIS = re.compile(rf"(?:<\|start\|>assistant)?{re.escape(CHANNELS)}.*?<\|end\|>", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Reasoning:
    """What ``begin``s a reasoning and what ``end``s it; of channels, whose last message is the answer, there is no such end."""

    begin: str
    end: str | None

    def answer(self, text: str, prompt: str = "") -> str | None:
        """What stands behind the reasoning, or all where there is none; ``None`` where the reasoning does not end.

        Args:
            text: with its special tokens.
            prompt: before it; a generation prompt may begin the reasoning, or have it already, empty.
        """
        if prompt.rstrip().endswith(self.begin):
            text = self.begin + text
        if self.end is None:
            return self._of_channels(text)
        _, _, answer = text.rpartition(self.end)
        return None if self.begin in answer else answer.strip()

    def _of_channels(self, text: str) -> str | None:
        text = _ANALYSIS.sub("", text)
        _, _, answer = text.rpartition(_FINAL)
        return None if self.begin in answer else answer.removeprefix("<|start|>assistant").strip()


def reasoning_of(tokenizer: PreTrainedTokenizerBase, choice: Choice) -> Reasoning | None:
    """What to leave out before answers are compared; ``None``: nothing.

    Args:
        choice: ``auto`` for what the chat template names; ``drop`` takes ``<think>`` where it names nothing; ``keep``.
    """
    if choice == "keep":
        return None
    template = tokenizer.get_chat_template() if tokenizer.chat_template else ""
    if "<|channel|>" in template and "<|message|>" in template:
        return Reasoning(CHANNELS, None)
    begin, end = next((pair for pair in PAIRS if pair[1] in template), PAIRS[0] if choice == "drop" else ("", ""))
    return Reasoning(begin, end) if begin else None


def without_special(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """A text as decoding without special tokens gives it, for one that has them as text."""
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    longest_first = sorted(special, key=len, reverse=True)
    return re.sub("|".join(map(re.escape, longest_first)), "", text) if special else text
