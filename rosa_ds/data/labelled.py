"""Rows with a class: texts or pairs of texts become token ids, and labels numbers."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rosa_ds.config.schema import DataSettings
from rosa_ds.data.batches import IGNORE, PADDING_ROW, LabelledBatch
from rosa_ds.data.prepare import FEATURES, NO_PADDING, TokenSet, check_lengths, column, fingerprint, whole, worker_count
from rosa_ds.data.sources import Rows, load_rows
from rosa_ds.data.tokenise import Tokens
from rosa_ds.utils.suggest import did_you_mean

PAIRS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question", "sentence"),
    ("question1", "question2"),
    ("question", "passage"),
)
SINGLE = ("text", "sentence")
_FEATURES = datasets.Features(
    {**FEATURES, "types": datasets.List(datasets.Value("int8")), "class": datasets.Value("int64")}
)
LABEL = "label"
NUMBER = re.compile(r"[+-]?(\d+|\d*\.\d+|\d+\.)([eE][+-]?\d+)?")


@dataclasses.dataclass(frozen=True)
class LabelledSet(TokenSet):
    """Tokenised examples with a class each: ``trained`` is 1 for all, ``classes`` are their names."""

    classes: tuple[str, ...]

    def sequence(self, index: int) -> LabelledTokens:
        row = self.data[int(index)]
        return LabelledTokens(row["ids"], [False] * len(row["ids"]), row["types"], row["class"])

    def tokens(self, example: int) -> LabelledTokens:
        return self.sequence(example)

    def labels(self) -> NDArray[np.int64]:
        """The class of each example."""
        return column(self.data, "class")

    def batch(
        self,
        sequences: Sequence[int] | NDArray[np.int64],
        pad_id: int | None,
        packed: bool = False,
        masked: bool = True,
    ) -> LabelledBatch:
        assert not packed, "a class belongs to a row"
        assert masked, "a classifier finds a row's end, or its tokens, by the mask"
        if pad_id is None:
            raise ValueError(NO_PADDING)
        has_types = bool(self.sequence(0).types)
        blank = LabelledTokens([pad_id, pad_id], [False, False], [0, 0] if has_types else [], IGNORE)
        examples = [blank if index == PADDING_ROW else self.sequence(index) for index in sequences]
        length = max(len(example.ids) for example in examples)

        def padded(rows: list[list[int]], with_: int) -> Tensor:
            return torch.tensor([[*row, *[with_] * (length - len(row))] for row in rows], dtype=torch.int64)

        return LabelledBatch(
            input_ids=padded([example.ids for example in examples], pad_id),
            attention_mask=padded([[1] * len(example.ids) for example in examples], 0),
            kept=torch.zeros(1, dtype=torch.int64),
            targets=torch.tensor([[example.label] for example in examples], dtype=torch.int64),
            types=padded([example.types for example in examples], 0) if has_types else None,
        )

    def digest(self) -> str:
        content = f"{super().digest()} {self.classes}".encode() + self.labels().tobytes()
        return hashlib.sha256(content).hexdigest()

    def summary(self) -> str:
        counts = np.bincount(self.labels(), minlength=len(self.classes))
        shares = ", ".join(f"{name} {count}" for name, count in zip(self.classes, counts, strict=True))
        return f"{self._size()}; {shares}{self._left_out()}"

    def sample(self, tokenizer: PreTrainedTokenizerBase) -> str:
        first = self.sequence(0)
        return f"an example of class {self.classes[first.label]}:\n{tokenizer.decode(first.ids)}"


@dataclasses.dataclass(frozen=True)
class LabelledTokens(Tokens):
    """An example: ``types`` are 0 and 1 for a pair's tokens where the model tells them apart, else empty."""

    types: list[int]
    label: int


def find_classes(sources: Sequence[str], settings: DataSettings, known: Sequence[str] = ()) -> list[str]:
    """The classes of training data, in order: those of its ClassLabel, or all that occur, numbers and texts sorted.

    Args:
        known: of a base that is a classifier: its order, where it has the same ones.

    Raises: ValueError for fewer than two, for labels that are no classes, or if none are there.
    """
    found = [_classes_of(load_rows(source, "train"), settings) for source in sources]
    classes, every = found[0], {name for names in found for name in names}
    if set(classes) < every:
        numbers = all(name.lstrip("+-").isdigit() for name in every)
        classes = sorted(every, key=lambda name: (int(name), name) if numbers else name)
    if len(classes) < 2:
        raise ValueError(
            f"{', '.join(sources)}: {settings.label_column or LABEL!r} has {'one class, ' + classes[0] if classes else 'no class'}: a classifier tells "
            "two or more apart; name those that do not occur with model.labels"
        )
    return list(known) if set(known) == set(classes) else classes


def _classes_of(rows: Rows, settings: DataSettings) -> list[str]:
    column = find_columns(rows, settings).label
    return rows.class_names(column) or _classes_that_occur(rows, column)


def _classes_that_occur(rows: Rows, column: str) -> list[str]:
    found: dict[str, Any] = {}
    for index, value in enumerate(rows.values(column)):
        try:
            found.setdefault(_class_name(value, column), value)
        except ValueError as error:
            raise rows.refused(index, error) from None
    found.pop("", None)
    if rows.untyped and all(NUMBER.fullmatch(name) for name in found):
        if fraction := next((name for name in found if not name.lstrip("+-").isdigit()), None):
            raise ValueError(f"{rows.name}: {_regression(column, fraction)}")
        return sorted(found, key=lambda name: (int(name), name))
    whole = all(isinstance(value, int) and not isinstance(value, bool) for value in found.values())
    return sorted(found, key=lambda name: found[name] if whole else name)


def prepare_labelled(
    source: str,
    purpose: str,
    tokenizer: PreTrainedTokenizerBase,
    settings: DataSettings,
    classes: Sequence[str],
    types: bool = False,
) -> LabelledSet:
    """Load and tokenise rows with a class. A second call with the same arguments finds the result on disk.

    Args:
        types: the model tells a pair's texts apart by type ids.

    Raises:
        ValueError: a text or a class is not there or none of ``classes``, a row is too long (``data.too_long error``), or none is
            left.
    """
    rows = load_rows(source, purpose)
    columns = find_columns(rows, settings)
    numbers = {name: number for number, name in enumerate(classes)}

    def encode(text: str, pair: str | None, **cut: Any) -> Mapping[str, list[int]]:
        if pair is not None and tokenizer.sep_token is None:  # nothing to part the two with: they are one text
            text, pair = text + settings.separator + pair, None
        made: Mapping[str, list[int]] = tokenizer(text, pair, return_token_type_ids=types, verbose=False, **cut)
        return made

    def encode_row(row: dict[str, Any], index: int) -> list[dict[str, Any]]:
        try:
            pair = None if columns.pair is None else _read_text(row, columns.pair)
            texts = _read_text(row, columns.text), pair
            name = _class_name(row.get(columns.label), columns.label)
            if not name:
                raise ValueError(f"{columns.label!r} is a class, given {row.get(columns.label)!r}")
            if name not in numbers:
                raise ValueError(
                    f"{columns.label!r} is {name!r}, which is none of the classes {', '.join(numbers)} that data.train or model.labels "
                    f"have.{did_you_mean(name, numbers)}"
                )
            encoded = encode(*texts)
            full = len(encoded["input_ids"])
            if full > settings.max_length and settings.too_long == "truncate":
                encoded = encode(*texts, truncation=True, max_length=settings.max_length)
            if not full:
                raise ValueError(f"{columns.text!r} {texts[0]!r} has no token")
        except ValueError as error:
            raise rows.refused(index, error) from None
        ids = list(encoded["input_ids"])
        record = {
            "row": index,
            "example": 0,
            "ids": ids,
            "types": list(encoded["token_type_ids"]) if types else [],
            "class": numbers[name],
            "length": len(ids),
            "full_length": full,
            "largest_id": max(ids),
        }
        return [record]

    probe = (encode("a", None)["input_ids"], encode("a", "b")["input_ids"])  # special tokens are not in the vocabulary
    key = fingerprint(rows, tokenizer, settings, columns, tuple(classes), types, probe)
    encoded = rows.map(encode_row, key, _FEATURES, worker_count(settings))
    reasons = check_lengths(encoded, rows, settings)
    lengths = column(encoded, "length")
    keep = lengths <= settings.max_length
    if not keep.any():
        raise ValueError(f"{rows.name}: no row is left: {', '.join(reasons)}; raise data.max_length")
    if not keep.all():
        encoded = encoded.select(np.flatnonzero(keep))
    lengths, firsts = lengths[keep], np.arange(len(encoded) + 1)
    return LabelledSet(
        encoded, lengths, np.ones_like(lengths), firsts, ", ".join(reasons), whole(source, firsts), tuple(classes)
    )


@dataclasses.dataclass(frozen=True)
class Columns:
    """Where a text, the second one of a pair, and the class stand."""

    text: str
    pair: str | None
    label: str


def find_columns(rows: Rows, settings: DataSettings) -> Columns:
    """The columns that the settings name, or that have the usual names. Raises: ValueError if there are none."""
    names = rows.columns
    for name in (settings.text_column, settings.pair_column, settings.label_column or LABEL):
        if name is not None and name not in names:
            remedy = (
                "" if settings.label_column or name != LABEL else " Name the one with the class: data.label_column."
            )
            raise ValueError(
                f"{rows.name}: there is no column {name!r}.{did_you_mean(name, names)} Columns: {', '.join(names)}.{remedy}"
            )
    label = settings.label_column or LABEL
    if settings.text_column is not None:
        return Columns(settings.text_column, settings.pair_column, label)
    for first, second in PAIRS:
        if first in names and second in names:
            return Columns(first, second, label)
    single = next((name for name in SINGLE if name in names), None)
    if single is None:
        known = (*SINGLE, *(" and ".join(pair) for pair in PAIRS))
        raise ValueError(
            f"{rows.name}: the columns {', '.join(names)} hold no text to classify ({'; '.join(known)}): name it with "
            "data.text_column, and the second one of a pair with data.pair_column"
        )
    return Columns(single, None, label)


def _class_name(value: Any, column: str) -> str:
    """A row's class, "" if it has none. Raises: ValueError for a label that is no class."""
    if isinstance(value, float):
        raise ValueError(_regression(column, value))
    if not isinstance(value, (int, str, type(None))):
        raise ValueError(f"{column!r} holds {type(value).__name__}: a class is a whole number or a text")
    return "" if value is None else str(value).strip()


def _regression(column: str, value: object) -> str:
    return (
        f"{column!r} is a column of floating-point numbers ({value}), and regression is not trained here: give classes as "
        "whole numbers or texts"
    )


def _read_text(row: Mapping[str, Any], column: str) -> str:
    value = row.get(column)
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return str(value)  # a column of numbers
    if not isinstance(value, str):
        raise ValueError(f"{column!r} is a text, given {value!r}")
    return value
