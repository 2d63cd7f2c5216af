"""A data source becomes a :class:`TokenSet`: token ids, loss masks and lengths, on disk where the source is."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
from collections.abc import Sequence
from typing import Any

import datasets
import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from rosa_ds import distributed
from rosa_ds.config.schema import DataSettings
from rosa_ds.config.template import Template, quoted
from rosa_ds.data.batches import PADDING_ROW, Batch, Part, collate, pack
from rosa_ds.data.chat import end_of_turn
from rosa_ds.data.clock import stop_clock
from rosa_ds.data.formats import Columns, PlainText, examples_of, find_format, parse_row
from rosa_ds.data.sources import Rows, load_rows
from rosa_ds.data.tokenise import Tokens, sequences, show_sample
from rosa_ds.utils.logs import log_once

logger = logging.getLogger(__name__)
FEATURES = {
    "row": datasets.Value("int64"),
    "example": datasets.Value("int64"),
    "ids": datasets.List(datasets.Value("int32")),
    "length": datasets.Value("int64"),
    "full_length": datasets.Value("int64"),
    "largest_id": datasets.Value("int64"),
}
"""What is kept of every sequence; ``example`` counts those of its row."""
_FEATURES = datasets.Features(
    {
        **FEATURES,
        "trained": datasets.List(datasets.Value("bool")),
        "trained_count": datasets.Value("int64"),
        "plain": datasets.Value("bool"),
    }
)
NO_PADDING = "the model's tokenizer has no padding token: set pad_token in its tokenizer_config.json"


@dataclasses.dataclass(frozen=True)
class TokenSet:
    """Tokenised examples, of one sequence each, or of several where a chat template renders earlier turns otherwise later.

    Attributes:
        data: a row for each sequence; ``lengths`` and ``trained``: its tokens and trained tokens, (S,) int64.
        firsts: the first sequence of each example, and behind it S, (E + 1,) int64.
        dropped: how many sequences were left out and why.
        parts: the sources, and what an epoch takes of each.
    """

    data: datasets.Dataset
    lengths: NDArray[np.int64]
    trained: NDArray[np.int64]
    firsts: NDArray[np.int64]
    dropped: str
    parts: tuple[Part, ...]

    def __len__(self) -> int:
        """The number of examples."""
        return len(self.firsts) - 1

    @property
    def name(self) -> str:
        """Of its sources."""
        return ", ".join(part.name for part in self.parts)

    def digest(self) -> str:
        """A hash of all lengths and of the tokens of up to 64 sequences: the same data gives the same."""
        digest = hashlib.sha256(self.lengths.tobytes() + self.trained.tobytes())
        count = len(self.lengths)
        for index in np.linspace(0, count - 1, num=min(64, count), dtype=np.int64):
            digest.update(repr(self.sequence(index)).encode())
        return digest.hexdigest()

    def largest_id(self) -> int:
        """Of all tokens."""
        return int(column(self.data, "largest_id").max())

    def sequence(self, index: int) -> Tokens:
        row = self.data[int(index)]
        return Tokens(row["ids"], row["trained"])

    def tokens(self, example: int) -> Tokens:
        """All sequences of an example, one behind the other."""
        found = [self.sequence(index) for index in range(self.firsts[example], self.firsts[example + 1])]
        return Tokens([i for tokens in found for i in tokens.ids], [on for tokens in found for on in tokens.trained])

    def batch(
        self,
        sequences: Sequence[int] | NDArray[np.int64],
        pad_id: int | None,
        packed: bool = False,
        masked: bool = True,
    ) -> Batch:
        """A micro-batch of sequences. In place of -1, or of none, stand two padding tokens without a target.

        Args:
            packed: one behind the other instead of padded.
            masked: padded rows have an attention mask.

        Raises: ValueError without a padding token.
        """
        if pad_id is None:
            raise ValueError(NO_PADDING)
        blank = Tokens([pad_id, pad_id], [False, False])
        found = [blank if index == PADDING_ROW else self.sequence(index) for index in sequences] or [blank]
        return pack(found) if packed else collate(found, pad_id, masked)

    def summary(self) -> str:
        """How much there is to train on, in words."""
        return f"{self._size()}, {100 * self.trained.sum() / self.lengths.sum():.1f} % trained{self._left_out()}"

    def shares(self) -> list[str]:
        """What an epoch takes of each source, in words."""
        trained = np.add.reduceat(self.trained, self.firsts[:-1])
        means = [trained[part.first : part.first + part.count].mean() for part in self.parts]
        tokens = [part.taken * mean for part, mean in zip(self.parts, means, strict=True)]
        return [
            f"{part.name}: {part.taken} examples an epoch of {part.count}, {100 * share / sum(tokens):.1f} % of the trained tokens"
            for part, share in zip(self.parts, tokens, strict=True)
        ]

    def _size(self) -> str:
        sequences = "" if len(self) == len(self.lengths) else f" ({len(self.lengths)} sequences)"
        return f"{len(self)} examples{sequences}, {self.lengths.sum():,} tokens"

    def _left_out(self) -> str:
        return f" ({self.dropped})" if self.dropped else ""

    def sample(self, tokenizer: PreTrainedTokenizerBase) -> str:
        """The first example, with what is trained of it."""
        return f"an example, trained between ⟦ and ⟧:\n{show_sample(self.tokens(0), tokenizer)}"


def prepare(source: str, purpose: str, tokenizer: PreTrainedTokenizerBase, settings: DataSettings) -> TokenSet:
    """Load and tokenise a source. A second call (or another rank's) with the same arguments finds the result on disk.

    Raises:
        ValueError: a row that fits no format, is too long (``data.too_long error``), or a source whose tokens are all
            trained or not at all, each with what to do.
    """
    rows = load_rows(source, purpose)
    tokenizer = stop_clock(tokenizer, settings.template_clock)
    columns = columns_of(settings)
    log_once(logger, logging.INFO, f"{rows.name}: {_describe_format(rows, columns)}")
    if missing := _missing_end(tokenizer):
        log_once(logger, logging.WARNING, f"{rows.name}: {missing}")
    cut = settings.max_length if settings.too_long == "truncate" else None

    def encode(row: dict[str, Any], index: int) -> list[dict[str, Any]]:
        """The sequences of a row's examples."""
        try:
            made = [
                (number, tokens, isinstance(example, PlainText))
                for number, example in enumerate(examples_of(parse_row(row, columns)))
                for tokens in sequences(example, tokenizer, settings.separator, settings.train_on == "last")
            ]
        except ValueError as error:
            raise rows.refused(index, error) from None
        return [
            {
                "row": index,
                "example": number,
                "ids": np.asarray(tokens.ids[:cut], dtype=np.int32),
                "trained": np.asarray(tokens.trained[:cut]),
                "length": len(tokens.ids[:cut]),
                "full_length": len(tokens.ids),
                # the first token of a sequence is predicted by nothing
                "trained_count": sum(tokens.trained[1:cut]),
                "largest_id": max(tokens.ids[:cut], default=0),
                "plain": plain,
            }
            for number, tokens, plain in made
        ]

    encoded = rows.map(encode, fingerprint(rows, tokenizer, settings, columns), _FEATURES, worker_count(settings))
    lengths, trained = (column(encoded, name) for name in ("length", "trained_count"))
    reasons = check_lengths(encoded, rows, settings)
    if trained.sum() == 0:
        raise ValueError(f"{rows.name}: no token is trained: the completions are empty, or cut off by data.max_length")
    if not column(encoded, "plain").any() and trained.sum() >= (lengths - 1).sum():
        raise ValueError(
            f"{rows.name}: every token is trained, so no prompt was found: check columns and chat template"
        )
    keep = (lengths <= settings.max_length) & (trained > 0)
    if untrained := int(((lengths <= settings.max_length) & (trained == 0)).sum()):
        reasons.append(f"{untrained} dropped, no trained token")
    if not keep.any():
        raise ValueError(f"{rows.name}: no row is left: {', '.join(reasons)}; raise data.max_length")
    if not keep.all():
        encoded = encoded.select(np.flatnonzero(keep))
    firsts = first_sequences(encoded)
    return TokenSet(encoded, lengths[keep], trained[keep], firsts, ", ".join(reasons), whole(source, firsts))


def first_sequences(encoded: datasets.Dataset) -> NDArray[np.int64]:
    """Where each example's sequences begin, and behind it their number, (E + 1,) int64."""
    row, example = column(encoded, "row"), column(encoded, "example")
    begins = np.ones(len(encoded) + 1, dtype=bool)
    begins[1:-1] = (np.diff(row) != 0) | (np.diff(example) != 0)
    return np.flatnonzero(begins)


def whole(source: str, firsts: NDArray[np.int64]) -> tuple[Part, ...]:
    """The parts of a set that is one source, all of which an epoch takes."""
    return (Part(source, 0, len(firsts) - 1, len(firsts) - 1),)


def _describe_format(rows: Rows, columns: Columns | None) -> str:
    """How the rows are read, as the first one shows."""
    first = next(iter(rows))
    if columns is not None:
        prompt, completion = columns
        named = f"the template {prompt.text!r}" if isinstance(prompt, Template) else repr(prompt)
        return f"read as {named} and {completion!r}"
    try:
        found = find_format(first)
    except ValueError as error:
        raise rows.refused(0, error) from None
    used = [name for name in (*found.needs, *found.may_have) if name in first]
    return f"read as {found.name}, {found.becomes}, of the columns {quoted(used)}"


def _missing_end(tokenizer: PreTrainedTokenizerBase) -> str:
    """What is to be said of a template that ends no turn."""
    ends = bool(tokenizer.chat_template) and end_of_turn(tokenizer) is not None
    if tokenizer.eos_token_id is None and not ends:
        return "the tokenizer has no end-of-text token, and its chat template ends no turn: what is generated will not stop by itself"
    if tokenizer.chat_template and not ends:
        return f"the chat template ends no turn with a token: {tokenizer.eos_token!r} is trained behind each"
    return ""


def columns_of(settings: DataSettings) -> Columns | None:
    """The named prompt (or its template) and completion column, for :func:`rosa_ds.data.formats.parse_row`."""
    if settings.completion_column is None:
        return None
    if settings.prompt_template is not None:
        return Template(settings.prompt_template), settings.completion_column
    assert settings.prompt_column is not None, "they belong together"
    return settings.prompt_column, settings.completion_column


def fingerprint(rows: Rows, tokenizer: PreTrainedTokenizerBase, settings: DataSettings, *more: object) -> str:
    """A name for what these rows become with this tokenizer and these settings, and what else decides it."""
    special = repr(sorted((name, str(token)) for name, token in tokenizer.special_tokens_map.items()))
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        vocabulary = repr(sorted(tokenizer.get_vocab().items()))
    else:  # vocabulary, merges and the special tokens around a text, without what the last call asked for
        content = json.loads(backend.to_str())
        vocabulary = json.dumps({key: value for key, value in content.items() if key not in ("truncation", "padding")})
    rules = hashlib.sha256((vocabulary + special).encode()).hexdigest()
    relevant = (*more, settings.separator, settings.max_length, settings.too_long == "truncate", settings.train_on)
    key = (rows.fingerprint, rules, tokenizer.chat_template, relevant, "v7")
    return hashlib.sha256(repr(key).encode()).hexdigest()[:32]


def column(data: datasets.Dataset, name: str) -> NDArray[np.int64]:
    """The whole numbers (or truth values) of a column, (examples,) int64."""
    found = data.select_columns(name).with_format("arrow")[:][name]
    return np.asarray(found.to_numpy(), dtype=np.int64)


def worker_count(settings: DataSettings) -> int:
    """Processes that tokenise: as set, or this node's cores (those that this process may use) divided by its ranks."""
    ranks = distributed.planned_local_size(distributed.planned_world_size())
    return settings.workers or max(1, len(os.sched_getaffinity(0)) // ranks)


def check_lengths(encoded: datasets.Dataset, rows: Rows, settings: DataSettings) -> list[str]:
    """How many examples were cut, or have to be dropped. Raises: ValueError for a row that is too long, if that is an error."""
    lengths, numbers = (column(encoded, name) for name in ("length", "row"))
    long = np.flatnonzero(lengths > settings.max_length)
    if len(long) and settings.too_long == "error":
        raise ValueError(
            f"{rows.where(int(numbers[long[0]]))} has {lengths[long[0]]} tokens, data.max_length is {settings.max_length} "
            f"({len(set(numbers[long]))} of {len(rows)} rows are longer, the longest has {lengths.max()}): raise data.max_length, or "
            "set data.too_long to truncate or drop"
        )
    reasons = []
    if cut := int((column(encoded, "full_length") > lengths).sum()):
        reasons.append(f"{cut} cut to {settings.max_length} tokens")
    if len(long):
        reasons.append(f"{len(long)} dropped, longer than {settings.max_length} tokens")
    return reasons
