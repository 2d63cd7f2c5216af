"""Rows of data as questions: a prompt, and every answer that the data holds as right."""

from __future__ import annotations

import dataclasses

from transformers import PreTrainedTokenizerBase

from rosa_ds.config.schema import DataSettings
from rosa_ds.data.formats import parse_row
from rosa_ds.data.prepare import columns_of
from rosa_ds.data.sources import load_rows
from rosa_ds.data.tokenise import prompt_and_reference


@dataclasses.dataclass(frozen=True)
class Question:
    """``prompt`` as token ids, and its ``references`` without outer white space, in the order of the data."""

    prompt: list[int]
    references: tuple[str, ...]


def load_questions(source: str, tokenizer: PreTrainedTokenizerBase, settings: DataSettings) -> list[Question]:
    """The questions of a source, as ``data.train`` names one. Rows with the same prompt are one question.

    Raises: ValueError for a row that has no prompt and answer, with its number.
    """
    rows = load_rows(source, "eval")
    found: dict[tuple[int, ...], list[str]] = {}
    for index, row in enumerate(rows):
        try:
            ids, reference = prompt_and_reference(parse_row(row, columns_of(settings)), tokenizer, settings.separator)
        except ValueError as error:
            raise ValueError(f"{rows.where(index)}: {error}") from None
        found.setdefault(tuple(ids), []).append(reference.strip())
    return [Question(list(prompt), tuple(references)) for prompt, references in found.items()]
