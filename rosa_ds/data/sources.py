"""Where rows come from: files, folders, hub names and the built-in task."""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import functools
import glob
import hashlib
import itertools
import json
import operator
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import datasets.data_files

from rosa_ds.data.readers import file_type, hash_of, is_table, not_text, place_of, read_stored, store_text
from rosa_ds.data.sql import generate_pairs
from rosa_ds.utils.errors import RunError
from rosa_ds.utils.suggest import did_you_mean_path

FILE_TYPES = (".jsonl", ".json", ".csv", ".parquet")
TEXTS = {".jsonl", ".ndjson", ".json", ".csv", ".tsv"}
KNOWN = {*TEXTS, ".parquet"}
BUILTIN = "builtin:sql"
BUILTIN_TRAIN_ROWS, BUILTIN_EVAL_ROWS = 1600, 200
_NAME = re.compile(r"(?P<name>.+?)(?:@(?P<config>[\w.-]+))?(?::(?P<split>\w+))?(?:\[(?P<start>\d*):(?P<stop>\d*)\])?")
_ROWS_AT_ONCE, _ROWS_OF_A_WORKER = 100, 500
"""How many are in memory at once, and how many are worth the start of a process."""
_NO_ROWS = ("corresponds to no data", "BatchSize must be greater than 0, got 0")
"""What datasets says of a file without rows; the second of parquet."""


@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows of a source.

    Attributes:
        stored: as :func:`rosa_ds.data.readers.store_text` makes them, or a data set of columns with types.
        name: of the source, without its slice.
        fingerprint: the same for the same rows, wherever their file lies.
        first: how many rows of the source are before these.
        files: of text, each with how many rows of the source are before its own; none where the columns have types.
    """

    stored: datasets.Dataset
    name: str
    fingerprint: str
    first: int = 0
    files: tuple[tuple[Path, int], ...] = ()

    def __len__(self) -> int:
        return len(self.stored)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if not self.files:
            return map(self._read, self.stored)
        batches = self.stored.with_format("arrow").iter(batch_size=100)
        return (read_stored(row) for batch in batches for row in batch["row"].to_pylist())

    def map(
        self,
        function: Callable[[dict[str, Any], int], list[dict[str, Any]]],
        fingerprint: str,
        features: datasets.Features,
        workers: int = 1,
    ) -> datasets.Dataset:
        """What ``function`` makes of each row and its index, one record or several. A second call with this ``fingerprint``
        finds it on disk, whatever its ``workers``.

        Args:
            features: types of the records.
            workers: processes at most; few rows take fewer.

        Raises:
            RunError: a worker was ended by the system.
        """
        cache = Path(datasets.config.HF_DATASETS_CACHE)
        cache.mkdir(parents=True, exist_ok=True)

        def records(stored: Mapping[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
            rows = (self._read(dict(zip(stored, values, strict=True))) for values in zip(*stored.values(), strict=True))
            made = [record for row, index in zip(rows, indices, strict=True) for record in function(row, index)]
            return {name: [record[name] for record in made] for name in features}

        processes = min(workers, -(-len(self) // _ROWS_OF_A_WORKER))
        try:
            with _same_environment():
                return self.stored.map(
                    records,
                    with_indices=True,
                    batched=True,
                    batch_size=_ROWS_AT_ONCE,
                    remove_columns=self.stored.column_names,
                    features=features,
                    new_fingerprint=fingerprint,
                    cache_file_name=str(cache / f"rosa-{fingerprint}.arrow"),
                    num_proc=processes if processes > 1 else None,
                    desc=f"tokenising {self.name}",
                )
        except RuntimeError as error:
            if "abruptly died" not in str(error):
                raise
            raise RunError(
                f"{self.name}: one of {processes} processes that tokenise was ended from outside (out of memory? Ctrl-C?): set "
                "data.workers lower, or run rosa-ds prepare first where there is more memory"
            ) from None

    def _read(self, stored: Mapping[str, Any]) -> dict[str, Any]:
        """A row as its source has it, and the names of its classes, of which Arrow keeps the numbers."""
        if self.files:
            return read_stored(stored["row"])
        row = dict(stored)
        for column, names in self._classes.items():
            if row[column] is not None and 0 <= row[column] < len(names):
                row[column] = names[row[column]]
        return row

    @functools.cached_property
    def _classes(self) -> dict[str, list[str]]:
        features = {} if self.files else self.stored.features
        return {
            column: feature.names for column, feature in features.items() if isinstance(feature, datasets.ClassLabel)
        }

    @functools.cached_property
    def columns(self) -> list[str]:
        """All that occur, in the order of their first rows."""
        return list(dict.fromkeys(itertools.chain(*self))) if self.files else list(self.stored.column_names)

    @property
    def untyped(self) -> bool:
        """Whether values have no types of their own: the cells of a CSV file."""
        return any(is_table(path) for path, _ in self.files)

    def values(self, column: str) -> Iterator[Any]:
        """Of one column, None where a row has none."""
        if self.files:
            return (row.get(column) for row in self)
        return (row[column] for row in self.stored.select_columns(column))

    def class_names(self, column: str) -> list[str] | None:
        """Of a ClassLabel, in its order; else None."""
        return self._classes.get(column)

    def where(self, index: int) -> str:
        """File, row and line (from 1), for messages."""
        number = self.first + index
        if not self.files:
            return f"{self.name}, row {number + 1}"
        path, before = self.files[bisect.bisect_right(self.files, number, key=operator.itemgetter(1)) - 1]
        return place_of(path, number - before + 1, self.stored[index]["line"])

    def refused(self, index: int, error: ValueError) -> ValueError:
        """What is wrong with a row, with its place."""
        if isinstance(error, UnicodeDecodeError):
            return not_text(self.where(index), error)
        return ValueError(f"{self.where(index)}: {error}")

    def slice(self, start: int, stop: int) -> Rows:
        """Rows from ``start`` up to ``stop``."""
        if (start, stop) == (0, len(self)):
            return self
        fingerprint = f"{self.fingerprint}[{start}:{stop}]"
        return dataclasses.replace(
            self, stored=self.stored.select(range(start, stop)), first=self.first + start, fingerprint=fingerprint
        )


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
    rows = _load_whole(name, config, split, purpose)
    stop = len(rows) if stop is None else min(stop, len(rows))
    if start >= stop:
        raise ValueError(f"{source}: no rows from {start} to {stop}; there are {len(rows)}")
    return rows.slice(start, stop)


def _load_whole(name: str, config: str | None, split: str | None, purpose: str) -> Rows:
    if name == BUILTIN:
        data = datasets.Dataset.from_list(_builtin_rows(purpose))
        return Rows(data, name, data._fingerprint)
    path = Path(name)
    matches = [path] if path.exists() else map(Path, sorted(glob.glob(name, recursive=True)))
    if found := [file for file in matches if file.is_file()]:
        if config or split:
            raise ValueError(f"data source {name}: files have no {'split ' + split if split else 'configuration'}")
        return _load_files(name, found)
    if not path.is_dir() and (
        file_type(path) in FILE_TYPES or name.startswith((".", "/", "~")) or glob.has_magic(name)
    ):
        raise ValueError(f"data source {name}: no such file or folder.{did_you_mean_path(path)}")
    wanted = split or ("train" if purpose == "train" else "validation")
    if (path / "dataset_dict.json").is_file():
        splits = json.loads((path / "dataset_dict.json").read_text())["splits"]
        return _load_saved(name, path / _existing(wanted, splits, name))
    if (path / "state.json").is_file():
        if split:
            raise ValueError(f"data source {name}: what Dataset.save_to_disk has written has no split {split}")
        return _load_saved(name, path)
    try:
        with _quiet():
            if path.is_dir():
                files = _files_of_splits(path, config)
            else:
                loaded = datasets.load_dataset(name, config)
    except Exception as error:  # the hub client raises many types; all mean that there is nothing to train on
        text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if path.is_dir():
            names = sorted(entry.name for entry in path.iterdir())
            there = f"{', '.join(names[:3])}{', ...' if len(names) > 3 else ''}" if names else "nothing"
            text = f"it holds {there}, and no {', '.join(FILE_TYPES)} file that can be read ({text})"
        raise ValueError(f"data source {name!r} could not be loaded from this folder or the hub: {text}") from error
    if path.is_dir():
        return _load_files(name, files[_existing(wanted, files, name)], config, wanted)
    data = loaded[_existing(wanted, loaded, name)]
    return Rows(data, name, data._fingerprint)


def _existing(split: str, splits: Iterable[str], name: str) -> str:
    if split not in splits:
        raise ValueError(
            f"data source {name} has no split {split!r}: write {name}:SPLIT with one of {', '.join(splits)}"
        )
    return split


def _files_of_splits(folder: Path, config: str | None) -> dict[str, list[Path]]:
    """By the README's configurations, or else by the names of files and folders, as datasets knows them."""
    cards = [folder / "README.md", folder / ".huggingface.yaml"]
    if config or any("configs:" in card.read_text(errors="replace") for card in cards if card.is_file()):
        return _found_by_datasets(folder, config)
    patterns = datasets.data_files.get_data_patterns(str(folder.resolve()))
    named = datasets.data_files.DataFilesDict.from_patterns(patterns, base_path=str(folder.resolve()))
    # datasets takes those of the most frequent type, and leaves the others out
    every = {
        str(split): [folder / os.path.relpath(file, folder.resolve()) for file in files]
        for split, files in named.items()
    }
    found = {split: [path for path in paths if file_type(path) in KNOWN] for split, paths in every.items()}
    plain = {split: [path for path in paths if file_type(path) == ".txt"] for split, paths in every.items()}
    if sum(map(len, plain.values())) >= max(1, sum(map(len, found.values()))):  # no notes beside the data, but data
        found = {split: [*paths, *plain[split]] for split, paths in found.items()}
    return {split: paths for split, paths in found.items() if paths} or _found_by_datasets(folder, config)


def _found_by_datasets(folder: Path, config: str | None) -> dict[str, list[Path]]:
    builder = datasets.load_dataset_builder(str(folder), config)
    return {str(split): [Path(file) for file in files] for split, files in builder.config.data_files.items()}


def _load_files(name: str, files: Sequence[Path], config: str | None = None, split: str | None = None) -> Rows:
    """Rows of all files, one after the other. ``split`` is that of the folder which they are in."""
    types = {file_type(path): path for path in files}
    if split is None and (odd := next((path for path in files if file_type(path) not in KNOWN), None)):
        plain = ' (plain texts: a .jsonl file with one {"text": ...} a line)' if odd.suffix == ".txt" else ""
        raise ValueError(f"data source {odd}: files end in {', '.join(FILE_TYPES)}; this one in {odd.suffix!r}{plain}")
    if empty := next((path for path in files if path.stat().st_size == 0), None):
        raise ValueError(f"data source {empty} is empty")
    if types.keys() <= TEXTS:
        return _load_texts(name, files)
    if len(types) > 1:
        most, _ = Counter(map(file_type, files)).most_common(1)[0]
        raise ValueError(
            f"data source {name} has files of several types, whose rows cannot be put together "
            f"({', '.join(path.name for path in types.values())}): name one type, as in '{_pattern(name, files, most)}'"
        )
    return _load_typed(name, files, config, split)


def _pattern(name: str, files: Sequence[Path], kind: str) -> str:
    """What names the files of one type in a folder, which may lie in folders below it."""
    folder = Path(name) if Path(name).is_dir() else files[0].parent
    flat = all(path.parent == folder for path in files if file_type(path) == kind)
    return f"{folder}/{'' if flat else '**/'}*{kind}"


def _load_texts(name: str, files: Sequence[Path]) -> Rows:
    contents = [hash_of(path) for path in files]
    stored = [store_text(path, content) for path, content in zip(files, contents, strict=True)]
    before = itertools.accumulate((len(rows) for rows in stored), initial=0)
    places = tuple(zip(files, before, strict=False))  # the last is the sum
    return Rows(
        datasets.concatenate_datasets(stored),
        name,
        repr([*zip(contents, map(is_table, files), strict=True)]),
        files=places,
    )


def _load_typed(name: str, files: Sequence[Path], config: str | None, split: str | None) -> Rows:
    """Of parquet, or of what else datasets reads from a folder. Its own cache knows files by their paths and times."""
    content = "-".join(hash_of(path) for path in files)
    place = hashlib.sha256(content.encode()).hexdigest()[:32]
    cache = str(Path(datasets.config.HF_DATASETS_CACHE) / f"rosa-{place}")
    try:
        with _quiet():
            if file_type(files[0]) == ".parquet":
                names = [glob.escape(str(path)) for path in files]
                data = datasets.load_dataset("parquet", data_files=names, split="train", cache_dir=cache)
            else:
                data = datasets.load_dataset(name, config, split=split, cache_dir=cache)
    except Exception as error:  # arrow, pandas and datasets each raise their own
        cause = error.__cause__ or error
        if any(said in str(cause) for said in _NO_ROWS):
            raise ValueError(f"data source {name} holds no rows") from error
        raise ValueError(f"data source {name} cannot be read as {file_type(files[0])}: {cause}") from error
    return Rows(data, name, f"{content} {split}")


def _load_saved(name: str, folder: Path) -> Rows:
    """What Dataset.save_to_disk has written."""
    try:
        data = datasets.load_from_disk(str(folder))
    except Exception as error:
        raise ValueError(f"data source {name}, as Dataset.save_to_disk writes it, cannot be read: {error}") from error
    files = [Path(file["filename"]) for file in data.cache_files]
    return Rows(data, name, "-".join(hash_of(path) for path in [folder / "state.json", *files]))


@contextlib.contextmanager
def _same_environment() -> Iterator[None]:
    """datasets puts a copy in the place of os.environ once it has started processes: whoever holds it would not see changes."""
    environ, parallelism = os.environ, os.environ.get("TOKENIZERS_PARALLELISM")
    try:
        yield
    finally:
        os.environ = environ  # noqa: B003 - the object itself is wanted back
        if parallelism is None:
            environ.pop("TOKENIZERS_PARALLELISM", None)
        else:
            environ["TOKENIZERS_PARALLELISM"] = parallelism


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """What datasets logs of an error stands in ours."""
    level = datasets.utils.logging.get_verbosity()
    datasets.utils.logging.set_verbosity(datasets.utils.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.utils.logging.set_verbosity(level)


@functools.cache
def _builtin_rows(purpose: str) -> list[dict[str, Any]]:
    """The generated training rows, or held-out ones, none of which is a training row."""
    train = generate_pairs(BUILTIN_TRAIN_ROWS, seed=1)
    if purpose == "train":
        return train
    candidates = generate_pairs(2 * BUILTIN_EVAL_ROWS, seed=2)
    return [row for row in candidates if row not in train][:BUILTIN_EVAL_ROWS]
