"""Which token ends what is trained: the chat template's end of an assistant's turn, which need not be the end of text."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

_QUESTION, _ANSWER, _NEXT = "How many are there?", "There are four of them.", "And on the other side?"


def stop_tokens(configured: int | Sequence[int] | None, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids that end a generation: a model's own, in their order, then the end of text and the end of a turn that are trained.

    Args:
        configured: ``eos_token_id`` of the model's generation_config.
    """
    own = [configured] if isinstance(configured, int) else list(configured or [])
    trained = (tokenizer.eos_token_id, end_of_turn(tokenizer))
    return list(dict.fromkeys([*own, *(token for token in trained if token is not None)]))


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that ends an assistant's turn in the chat template; without a template the end of text, which ends a completion.

    ``None`` where the template writes none (the next turn's header ends the turn), or refuses a question with its answer.
    """
    if not tokenizer.chat_template:
        return tokenizer.eos_token_id
    last = _behind_answer(tokenizer)
    # what follows where the conversation goes on: "<|end|>" of "<|end|>\n<|endoftext|>" ends a turn, the other one the text
    between = _behind_answer(tokenizer, _NEXT)
    common = [one for one, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(last, between, strict=False))]
    ends = _marks(tokenizer, common)[-1:] or _marks(tokenizer, last)[:1]
    return ends[0] if ends else None


def _behind_answer(tokenizer: PreTrainedTokenizerBase, next_question: str | None = None) -> list[int]:
    """Token ids that the template writes behind an answer; none where it fails."""
    messages = [{"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _ANSWER}]
    if next_question is not None:
        messages.append({"role": "user", "content": next_question})
    try:
        text = str(tokenizer.apply_chat_template(messages, tokenize=False))
    except (TemplateError, ValueError, TypeError):  # a row of the data says so, with its number
        return []
    _, found, behind = text.rpartition(_ANSWER)
    return list(tokenizer(behind, add_special_tokens=False)["input_ids"]) if found else []


def _marks(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[int]:
    """Those of the ids that are tokens of their own in the tokenizer, not pieces of a text; some have added runs of spaces."""
    added = tokenizer.added_tokens_decoder
    return [token for token in ids if token in added and added[token].content.strip()]
