"""Where rows come from: files, folders, hub names and the built-in task."""

from __future__ import annotations

import codecs
import contextlib
import dataclasses
import functools
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets

from rosa_ds.data.sql import generate_pairs
from rosa_ds.utils.suggest import did_you_mean_path

FILE_TYPES = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
BUILTIN = "builtin:sql"
BUILTIN_TRAIN_ROWS, BUILTIN_EVAL_ROWS = 1600, 200
_NAME = re.compile(r"(?P<name>.+?)(?:@(?P<config>[\w.-]+))?(?::(?P<split>\w+))?(?:\[(?P<start>\d*):(?P<stop>\d*)\])?")
_NO_ROWS = ("corresponds to no data", "BatchSize must be greater than 0, got 0")
"""What datasets says of a file without rows; the second of parquet."""


@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows of a source.

    Attributes:
        name: of the source, without its slice.
        fingerprint: the same for the same rows, wherever their file lies.
        untyped: values have no types of their own: the cells of a CSV file.
    """

    stored: datasets.Dataset
    name: str
    first: int
    fingerprint: str
    untyped: bool = False

    def __len__(self) -> int:
        return len(self.stored)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return map(self._read, self.stored)

    def map(self, function: Callable[[dict[str, Any], int], Mapping[str, Any]], fingerprint: str) -> datasets.Dataset:
        """What ``function`` makes of each row and its index. A second call with this ``fingerprint`` finds it on disk."""
        cache = Path(datasets.config.HF_DATASETS_CACHE)
        cache.mkdir(parents=True, exist_ok=True)
        return self.stored.map(
            lambda stored, index: function(self._read(stored), index),
            with_indices=True,
            remove_columns=self.stored.column_names,
            new_fingerprint=fingerprint,
            cache_file_name=str(cache / f"rosa-{fingerprint}.arrow"),
            desc=f"tokenising {self.name}",
        )

    def _read(self, stored: Mapping[str, Any]) -> dict[str, Any]:
        """A row as its source has it, and the names of its classes, of which Arrow keeps the numbers."""
        row = dict(stored)
        for column, names in self._classes.items():
            if row[column] is not None and 0 <= row[column] < len(names):
                row[column] = names[row[column]]
        return row

    @functools.cached_property
    def _classes(self) -> dict[str, list[str]]:
        features = self.stored.features.items()
        return {column: feature.names for column, feature in features if isinstance(feature, datasets.ClassLabel)}

    @functools.cached_property
    def columns(self) -> list[str]:
        """All that occur."""
        return list(self.stored.column_names)

    def values(self, column: str) -> Iterator[Any]:
        """Of one column, None where a row has none."""
        return (row[column] for row in self.stored.select_columns(column))

    def class_names(self, column: str) -> list[str] | None:
        """Of a ClassLabel, in its order; else None."""
        return self._classes.get(column)

    def where(self, index: int) -> str:
        """File and row (from 1), for messages."""
        return f"{self.name}, row {self.first + index + 1}"

    def refused(self, index: int, error: ValueError) -> ValueError:
        """What is wrong with a row, with its place."""
        if isinstance(error, UnicodeDecodeError):
            return _not_text(self.where(index), error)
        return ValueError(f"{self.where(index)}: {error}")


def load_rows(source: str, purpose: str) -> Rows:
    """Load a source.

    Args:
        source: file, folder or hub name, each with optional ``@configuration``, ``:split`` and ``[start:stop]`` (from 0);
            or ``builtin:sql``.
        purpose: ``train`` or ``eval``: which split where none is named, and which built-in rows.

    Raises:
        ValueError: nothing is there, it cannot be read (file and row named), or the slice is empty.
    """
    source = str(Path(source).expanduser()) if source.startswith("~") else source
    if Path(source).exists():
        name, config, split, start, stop = source, None, None, 0, None
    elif source.startswith(BUILTIN):
        match = re.fullmatch(r"(?:\[(\d*):(\d*)\])?", source.removeprefix(BUILTIN))
        if match is None:
            raise ValueError(
                f"{source!r}: the built-in task is {BUILTIN}, with a slice such as {BUILTIN}[:100] if wanted"
            )
        name, config, split, start, stop = BUILTIN, None, None, int(match[1] or 0), int(match[2]) if match[2] else None
    else:
        match = _NAME.fullmatch(source)
        if match is None:
            raise ValueError(f"data source {source!r} is not a name")
        name, config, split = match["name"], match["config"], match["split"]
        if name.endswith("]"):
            raise ValueError(
                f"data source {source!r}: a slice is [start:stop], rows counted from 0, each end a whole number or left out"
            )
        start, stop = int(match["start"] or 0), int(match["stop"]) if match["stop"] else None
    data = _load_whole(name, config, split, purpose)
    stop = len(data) if stop is None else min(stop, len(data))
    if start >= stop:
        raise ValueError(f"{source}: no rows from {start} to {stop}; there are {len(data)}")
    whole = start == 0 and stop == len(data)
    rows = data if whole else data.select(range(start, stop))
    return Rows(rows, name, start, rows._fingerprint)


def _load_whole(name: str, config: str | None, split: str | None, purpose: str) -> datasets.Dataset:
    if name == BUILTIN:
        return datasets.Dataset.from_list(_builtin_rows(purpose))
    path = Path(name)
    if path.is_file():
        return _load_file(path)
    if not path.is_dir() and (path.suffix in FILE_TYPES or name.startswith((".", "/", "~"))):
        raise ValueError(f"data source {name}: no such file or folder.{did_you_mean_path(path)}")
    try:
        with _quiet():
            loaded = datasets.load_dataset(name, config)
    except Exception as error:  # the hub client raises many types; all mean that there is nothing to train on
        text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if path.is_dir():
            names = sorted(entry.name for entry in path.iterdir())
            there = f"{', '.join(names[:3])}{', ...' if len(names) > 3 else ''}" if names else "nothing"
            text = f"it holds {there}, and no {', '.join(FILE_TYPES)} file that can be read ({text})"
        raise ValueError(f"data source {name!r} could not be loaded from this folder or the hub: {text}") from error
    wanted = split or ("train" if purpose == "train" else "validation")
    if wanted not in loaded:
        raise ValueError(
            f"data source {name} has no split {wanted!r}: write {name}:SPLIT with one of {', '.join(loaded)}"
        )
    return loaded[wanted]


@functools.cache
def _builtin_rows(purpose: str) -> list[dict[str, Any]]:
    """The generated training rows, or held-out ones, none of which is a training row."""
    train = generate_pairs(BUILTIN_TRAIN_ROWS, seed=1)
    if purpose == "train":
        return train
    candidates = generate_pairs(2 * BUILTIN_EVAL_ROWS, seed=2)
    return [row for row in candidates if row not in train][:BUILTIN_EVAL_ROWS]


def _load_file(path: Path) -> datasets.Dataset:
    if path.suffix not in FILE_TYPES:
        plain = ' (plain texts: a .jsonl file with one {"text": ...} a line)' if path.suffix == ".txt" else ""
        raise ValueError(
            f"data source {path}: files end in {', '.join(FILE_TYPES)}; this one in {path.suffix!r}{plain}"
        )
    if path.stat().st_size == 0:
        raise ValueError(f"data source {path} is empty")
    if path.suffix != ".parquet":
        _check_text(path)
    options = {}
    if path.suffix == ".csv":
        with path.open(encoding="utf-8-sig", errors="replace") as stream:
            header = stream.readline()
        # where the first line has no comma: what spreadsheets write in countries with a decimal comma
        separator = next((mark for mark in ",;\t" if mark in header), ",")
        options = {"sep": separator} if separator != "," else {}
    try:
        with _quiet():
            return datasets.load_dataset(FILE_TYPES[path.suffix], data_files=str(path), split="train", **options)
    except Exception as error:  # arrow, pandas and datasets each raise their own
        if path.suffix != ".parquet":
            _find_bad_line(path, path.suffix == ".jsonl")
        cause = error.__cause__ or error
        if any(said in str(cause) for said in _NO_ROWS):
            raise ValueError(f"data source {path} holds no rows") from error
        raise ValueError(f"data source {path} cannot be read as {path.suffix}: {cause}") from error


def _check_text(path: Path) -> None:
    """Raise ValueError for a file that begins as no UTF-8 text does: in UTF-16, packed, or binary."""
    with path.open("rb") as stream:
        begin = stream.read(1 << 16)
    try:
        codecs.getincrementaldecoder("utf-8")().decode(begin)
    except UnicodeDecodeError as error:
        if error.start < 2 or b"\0" in begin:
            raise _not_text(f"data source {path}", error) from None
    if b"\0" in begin:
        raise ValueError(f"data source {path} is not UTF-8 text (byte 0x00 at {begin.index(0)}): is it a binary file?")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """What datasets logs of an error stands in ours."""
    level = datasets.utils.logging.get_verbosity()
    datasets.utils.logging.set_verbosity(datasets.utils.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.utils.logging.set_verbosity(level)


def _find_bad_line(path: Path, is_json: bool) -> None:
    """Raise ValueError that names the first line that is not UTF-8 or, of lines of JSON, not an object."""
    with path.open("rb") as stream:
        for number, content in enumerate(stream, start=1):
            try:
                line = content.decode()
                row = json.loads(line) if line.strip() and is_json else {}
            except UnicodeDecodeError as error:
                raise _not_text(f"{path}, row {number}", error) from None
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{path}, row {number} is not JSON: {error.msg} at character {error.pos + 1}"
                ) from None
            if not isinstance(row, dict):
                raise ValueError(f"{path}, row {number} is not a JSON object but {type(row).__name__}")


def _not_text(where: str, error: UnicodeDecodeError) -> ValueError:
    byte = error.object[error.start]
    return ValueError(
        f"{where} is not UTF-8 text (byte 0x{byte:02x} at {error.start}): save the file as UTF-8, not packed "
        "(Excel: 'CSV UTF-8'; iconv -f cp1252 -t utf-8)"
    )
