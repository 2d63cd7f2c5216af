"""Which token ends what is trained: the chat template's end of an assistant's turn, which need not be the end of text."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from rosa_ds.data import chat


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
    return chat.end_of_turn(tokenizer) if tokenizer.chat_template else tokenizer.eos_token_id
