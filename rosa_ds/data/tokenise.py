"""Examples become token ids with a mask of the tokens that are trained.

What generation is fed and what it is to write are encoded apart, and training sees the one behind the other: a tokenizer
that would merge the last character of a prompt with the first of its completion cannot make them different.
"""

from __future__ import annotations

import dataclasses
import functools
import string
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from rosa_ds.data.chat import Turn, assistant_turns
from rosa_ds.data.formats import Conversation, Example, Pair, PlainText, as_chat

_ANCHORS = ("", "\n", *string.punctuation, *string.ascii_letters)
"""What a text is encoded behind, to be encoded as no beginning of a text."""


@dataclasses.dataclass(frozen=True)
class Tokens:
    """``ids`` of an example and, for each, whether it is ``trained`` (predicted with a loss)."""

    ids: list[int]
    trained: list[bool]


def tokenise(example: Example, tokenizer: PreTrainedTokenizerBase, separator: str) -> Tokens:
    """As :func:`sequences`, of an example that becomes one sequence."""
    (tokens,) = sequences(example, tokenizer, separator)
    return tokens


def sequences(
    example: Example, tokenizer: PreTrainedTokenizerBase, separator: str, last_turn_only: bool = False
) -> list[Tokens]:
    """Token ids and loss masks of one example, which becomes one sequence or several.

    Conversations (and pairs, where the tokenizer has a chat template): every turn of the assistant is trained behind the
    prompt that generation is fed for it. Turns share a sequence where the later prompt begins with the earlier turn, token by
    token; where the template renders earlier turns otherwise (without their reasoning), each has a sequence of its own. Other
    pairs: prompt and separator, completion and end of text. Plain texts are trained whole.

    Raises:
        ValueError: messages without a chat template, or a template that hides where an assistant's turn stands.
    """
    if isinstance(example, PlainText):
        begin, ids, end = _surrounded(tokenizer, example.text)
        ids = [*begin, *ids, *end]
        return [Tokens(ids, [True] * len(ids))]
    chat, chosen = _as_chat(example, tokenizer, last_turn_only)
    if chat is None:
        assert isinstance(example, Pair)
        asked = [_ask_pair(example, tokenizer, separator)]
    elif chosen:
        asked = _ask_turns(assistant_turns(chat, tokenizer, chosen), tokenizer)
    else:  # none is trained: the row stays, to be counted
        last = _ask_last(chat, tokenizer)
        asked = [dataclasses.replace(last, trained=[False] * len(last.written))]
    made: list[Tokens] = []
    for turn in asked:
        shared = made.pop() if made else Tokens([], [])
        if turn.prompt[: len(shared.ids)] != shared.ids:
            made.append(shared)
            shared = Tokens([], [])
        between = [False] * (len(turn.prompt) - len(shared.ids))
        made.append(Tokens([*turn.prompt, *turn.written], [*shared.trained, *between, *turn.trained]))
    return made


def prompt_and_reference(example: Example, tokenizer: PreTrainedTokenizerBase, separator: str) -> tuple[list[int], str]:
    """Token ids that ask for the last completion, as training has them before it, and the completion that is expected.

    Raises:
        ValueError: a plain text, which asks for nothing.
    """
    if isinstance(example, PlainText):
        raise ValueError("a row with only 'text' has no prompt to generate from: use metric perplexity")
    chat, _ = _as_chat(example, tokenizer, last_turn_only=True)
    if chat is None:
        assert isinstance(example, Pair)
        return _ask_pair(example, tokenizer, separator).prompt, example.completion
    asked = _ask_last(chat, tokenizer)
    content = str(chat.messages[-1]["content"])
    return asked.prompt, content if content.strip() else str(tokenizer.decode(asked.written, skip_special_tokens=True))


@dataclasses.dataclass(frozen=True)
class _Asked:
    """Token ids that generation is fed, those that it is to write, and which of these are trained."""

    prompt: list[int]
    written: list[int]
    trained: list[bool]


def _as_chat(
    example: Conversation | Pair, tokenizer: PreTrainedTokenizerBase, last_turn_only: bool
) -> tuple[Conversation | None, list[int]]:
    """The example as a chat, None for a pair without a template, and the numbers of the messages that are trained."""
    if isinstance(example, Pair):
        if not tokenizer.chat_template:
            return None, []
        example = as_chat(example)
    turns = [number for number, message in enumerate(example.messages) if number and message["role"] == "assistant"]
    if last_turn_only:
        turns = turns[-1:]
    return example, [number for number in turns if number not in example.untrained]


def _ask_last(chat: Conversation, tokenizer: PreTrainedTokenizerBase) -> _Asked:
    return _ask_turns(assistant_turns(chat, tokenizer, [len(chat.messages) - 1]), tokenizer)[0]


def _ask_turns(turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase) -> list[_Asked]:
    asked = []
    text, whole = "", list[int]()  # what was rendered last, and its ids as one text
    for turn in turns:
        text, whole = turn.prompt, _encode(tokenizer, turn.prompt, text, whole)
        ids, trained = whole, list[bool]()
        for piece, on in turn.pieces:
            text, whole = text + piece, _encode_on(tokenizer, text, whole, piece)
            written = _behind(tokenizer, ids, whole, piece)
            ids = [*ids, *written]
            trained += [on] * len(written)
        if not turn.ended and tokenizer.eos_token_id is not None:  # nothing else would end what is generated
            ids = [*ids, tokenizer.eos_token_id]
            trained.append(True)
        asked.append(_Asked(ids[: len(ids) - len(trained)], ids[len(ids) - len(trained) :], trained))
    return asked


def _ask_pair(pair: Pair, tokenizer: PreTrainedTokenizerBase, separator: str) -> _Asked:
    text = pair.prompt + separator
    begin, ids, end = _surrounded(tokenizer, text)
    whole = _encode_on(tokenizer, text, ids, pair.completion)
    written = [*_behind(tokenizer, ids, whole, pair.completion), *end]
    return _Asked([*begin, *ids], written, [True] * len(written))


def _surrounded(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], list[int], list[int]]:
    """What the tokenizer puts before a text that is no chat, the text's own token ids, and what ends it.

    A token that the text begins or ends with already is not put there again; the end-of-text token ends every text.
    """
    ids = _encode(tokenizer, text)
    whole = list(tokenizer(text)["input_ids"])
    at = next((n for n in range(len(whole) - len(ids) + 1) if whole[n : n + len(ids)] == ids), None)
    assert at is not None, "special tokens stand before and behind a text"
    begin, end = whole[:at], whole[at + len(ids) :]
    if begin and ids[: len(begin)] == begin:
        begin = []
    if end and ids[-len(end) :] == end:
        end = []
    last = end or ids
    if tokenizer.eos_token_id is not None and (not last or last[-1] != tokenizer.eos_token_id):
        end = [*end, tokenizer.eos_token_id]
    return begin, ids, end


# -- encoding -----------------------------------------------------------------------------------------------------


def _encode(tokenizer: PreTrainedTokenizerBase, text: str, known: str = "", known_ids: Sequence[int] = ()) -> list[int]:
    """Token ids without special tokens around them.

    Args:
        known: a text with its ids. Where ``text`` begins with it and it ends with a special token, only the rest is encoded:
            tokenizers cut a text at such tokens before anything else.
    """
    if known_ids and text.startswith(known):
        last = known_ids[-1]
        mark = _cutting_tokens(tokenizer, len(tokenizer)).get(last)
        if mark is not None and known.endswith(mark):
            ids = list(tokenizer(mark + text[len(known) :], add_special_tokens=False)["input_ids"])
            if ids and ids[0] == last:
                return [*known_ids, *ids[1:]]
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


@functools.lru_cache(maxsize=4)
def _cutting_tokens(tokenizer: PreTrainedTokenizerBase, size: int) -> dict[int, str]:
    """The tokens (of ``size`` in all) at which a text is cut whatever follows: special ones that are no part of another."""
    if not tokenizer.is_fast:
        return {}
    added = tokenizer.added_tokens_decoder
    contents = [token.content for token in added.values()]
    return {
        index: token.content
        for index, token in added.items()
        if not (token.normalized or token.single_word)
        and not any(token.content in other and token.content != other for other in contents)
    }


def _encode_on(tokenizer: PreTrainedTokenizerBase, text: str, ids: Sequence[int], more: str) -> list[int]:
    """Token ids of a text with more behind it, given its own: only what follows its last special token is encoded."""
    marks = _cutting_tokens(tokenizer, len(tokenizer))
    for count in range(len(ids), 0, -1):
        if mark := marks.get(ids[count - 1]):
            end = text.rfind(mark) + len(mark)
            return _encode(tokenizer, text + more, text[:end], ids[:count])
    return _encode(tokenizer, text + more)


def _behind(tokenizer: PreTrainedTokenizerBase, ids: list[int], whole: list[int], text: str) -> list[int]:
    """Token ids of a text that follows ``ids``; ``whole`` are those of both as one text.

    They are the rest of the whole, if that begins with ``ids``. If the tokenizer merges across the border, they are as it
    encodes the text alone, but without the blank that some tokenizers put before a text.
    """
    if whole[: len(ids)] == ids:
        return whole[len(ids) :]
    wanted = tokenizer.decode(whole)
    for anchor in _ANCHORS:
        head = _encode(tokenizer, anchor) if anchor else []
        alone = _encode(tokenizer, anchor + text)
        if alone[: len(head)] == head and tokenizer.decode([*ids, *alone[len(head) :]]) == wanted:
            return alone[len(head) :]
    return _encode(tokenizer, text)


def show_sample(tokens: Tokens, tokenizer: PreTrainedTokenizerBase) -> str:
    """The example as text, trained stretches between ``⟦`` and ``⟧``."""
    parts, start = [], 0
    for end in range(1, len(tokens.ids) + 1):
        if end == len(tokens.ids) or tokens.trained[end] != tokens.trained[start]:
            text = tokenizer.decode(tokens.ids[start:end], skip_special_tokens=False)
            parts.append(f"⟦{text}⟧" if tokens.trained[start] else text)
            start = end
    return "".join(parts)
