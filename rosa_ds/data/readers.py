"""Text files become rows: the JSON text of each, as it is written, and the line where it begins, in an Arrow file on disk."""

from __future__ import annotations

import bz2
import codecs
import contextlib
import csv
import gzip
import io
import itertools
import json
import lzma
import os
import re
import sys
import uuid
from collections.abc import Callable, Iterable, Iterator
from json.encoder import encode_basestring
from pathlib import Path
from typing import IO, Any

import datasets
import pyarrow as pa
import xxhash

PACKED: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
_BATCH_ROWS, _BATCH_CHARACTERS = 1000, 1 << 26
_SPACE = re.compile(r"[ \t\r\n]*")
_SCHEMA = pa.schema({"row": pa.string(), "line": pa.int64()})


def store_text(path: Path, content: str) -> datasets.Dataset:
    """The rows of a file of JSON (lines, or one array) or CSV, for :func:`read_stored`; those of JSON and CSV alike.

    Args:
        content: :func:`hash_of` the file. A second call for the same content finds the rows on disk.

    Returns:
        ``row``: each row's JSON object as a text. ``line``: where it begins in the file, from 1.

    Raises:
        ValueError: the file is no text in UTF-8, or a row cannot be read, with its place; or there are no rows.
    """
    cache = Path(datasets.config.HF_DATASETS_CACHE)
    kind = file_type(path) if is_table(path) else "json"
    place = cache / f"rosa-rows-{content}-{kind.strip('.')}-v1.arrow"
    if not place.exists():
        cache.mkdir(parents=True, exist_ok=True)
        try:
            _check_text(path)
            with _open(path) as binary, io.TextIOWrapper(binary, "utf-8-sig", newline="") as lines:
                count = _write(_table_rows(path, lines) if is_table(path) else _json_rows(path, lines), place)
        except UnicodeDecodeError as error:
            raise _bad_line(path, error) from None
        except (EOFError, gzip.BadGzipFile, lzma.LZMAError) as error:
            raise ValueError(f"data source {path} cannot be unpacked: {error}") from None
        if not count:
            place.unlink()
            raise ValueError(f"data source {path} holds no rows")
    return datasets.Dataset.from_file(str(place))


def read_stored(row: str) -> dict[str, Any]:
    """A row from its JSON text. Its numbers are written (``str``) as they are there."""
    value: dict[str, Any] = _DECODER.decode(row)
    return value


def place_of(path: str | Path, row: int, line: int) -> str:
    """For messages: the row, which slices count, and the line, which editors do, where they differ; both from 1."""
    return f"{path}, row {row}" + (f" (line {line})" if line != row else "")


def file_type(path: Path) -> str:
    """The ending that says what is in a file, without that of its packing."""
    return Path(path.stem).suffix if path.suffix in PACKED else path.suffix


def is_table(path: Path) -> bool:
    """Whether its values are cells, which are texts."""
    return file_type(path) in (".csv", ".tsv")


def hash_of(path: Path) -> str:
    """Of a file's content."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def not_text(where: str, error: UnicodeDecodeError) -> ValueError:
    byte = error.object[error.start]
    return ValueError(
        f"{where} is not UTF-8 text (byte 0x{byte:02x} at {error.start}): save the file as UTF-8, not packed "
        "(Excel: 'CSV UTF-8'; iconv -f cp1252 -t utf-8)"
    )


class Fraction(float):
    """A number with a point or an exponent, written as in the file: 1.10 is not 1.1, nor 1e5 100000.0."""

    text: str

    def __new__(cls, text: str) -> Fraction:
        made = super().__new__(cls, text)
        made.text = text
        return made

    def __str__(self) -> str:
        return self.text

    def __reduce__(self) -> tuple[type[Fraction], tuple[str]]:
        return Fraction, (self.text,)


_DECODER = json.JSONDecoder(parse_float=Fraction)


def _open(path: Path) -> IO[bytes]:
    opened: IO[bytes] = PACKED[path.suffix](path, "rb") if path.suffix in PACKED else path.open("rb")
    return opened


def _check_text(path: Path) -> None:
    """Raise ValueError for a file that begins as no UTF-8 text does: in UTF-16, packed, or binary."""
    with _open(path) as stream:
        begin = stream.read(1 << 16)
    try:
        codecs.getincrementaldecoder("utf-8")().decode(begin)
    except UnicodeDecodeError as error:
        if error.start < 2 or b"\0" in begin:
            raise not_text(f"data source {path}", error) from None
    if b"\0" in begin:
        raise ValueError(f"data source {path} is not UTF-8 text (byte 0x00 at {begin.index(0)}): is it a binary file?")


def _bad_line(path: Path, error: UnicodeDecodeError) -> ValueError:
    with _open(path) as stream:
        for number, line in enumerate(stream, start=1):
            try:
                line.decode()
            except UnicodeDecodeError as here:
                return not_text(f"{path}, line {number}", here)
    return not_text(f"data source {path}", error)


def _write(rows: Iterable[tuple[str, int]], place: Path) -> int:
    """Writes texts and lines to ``place``, whole or not at all; returns how many."""
    count = 0
    name = f"{place}.{uuid.uuid4().hex}.tmp"
    try:
        with pa.OSFile(name, "wb") as sink, pa.ipc.new_stream(sink, _SCHEMA) as writer:
            for texts, lines in _batches(rows):
                writer.write_batch(pa.record_batch([pa.array(texts, pa.string()), pa.array(lines)], schema=_SCHEMA))
                count += len(texts)
        os.replace(name, place)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
    return count


def _batches(rows: Iterable[tuple[str, int]]) -> Iterator[tuple[list[str], list[int]]]:
    texts: list[str] = []
    lines: list[int] = []
    size = 0
    for text, line in rows:
        texts.append(text)
        lines.append(line)
        size += len(text)
        if len(texts) == _BATCH_ROWS or size > _BATCH_CHARACTERS:
            yield texts, lines
            texts, lines, size = [], [], 0
    if texts:
        yield texts, lines


def _json_rows(path: Path, lines: Iterator[str]) -> Iterator[tuple[str, int]]:
    """Objects one a line, over several lines or several on one; or the elements of an array, objects or texts."""
    first = next(lines, "")
    blank = 0
    while first and not first.strip():
        first, blank = next(lines, ""), blank + 1
    values = _array if first.lstrip().startswith("[") else _values
    for number, (text, value, line) in enumerate(values(path, itertools.chain([first], lines), blank), start=1):
        if values is _array and isinstance(value, str):
            value, text = {"text": value}, f'{{"text": {text}}}'
        if not isinstance(value, dict):
            raise ValueError(f"{place_of(path, number, line)} is not a JSON object but {type(value).__name__}")
        if "\\ud" in text or "\\uD" in text:
            try:
                json.dumps(value, ensure_ascii=False).encode()
            except UnicodeEncodeError as error:
                half = ascii(error.object[error.start])[1:-1]
                raise ValueError(
                    f"{place_of(path, number, line)} holds {half}, one half of a character (a surrogate without the other): "
                    "it is no text; write the character itself, or both halves"
                ) from None
        yield text, line


def _values(path: Path, lines: Iterator[str], blank: int) -> Iterator[tuple[str, Any, int]]:
    """JSON values with their texts, and the lines where they begin. A value that does not end with its line goes on."""
    count, behind = 0, blank
    for line in lines:
        text, taken, start = line, 1, _skip(line, 0)
        while start < len(text):
            problem: json.JSONDecodeError | None = None
            while True:
                try:
                    value, end = _decode(text, start)
                    break
                except json.JSONDecodeError as error:
                    problem = problem or error
                    more = list(itertools.islice(lines, taken)) if error.pos >= len(text.rstrip()) else []
                    if not more:
                        place = place_of(path, count + 1, behind + 1 + _ends(text, start))
                        at = problem.pos - max(text.rfind("\n", 0, start), text.rfind("\r", 0, start))
                        raise ValueError(f"{place} is not JSON: {problem.msg} at character {at}") from None
                    text, taken = text + "".join(more), taken + len(more)
                except (ValueError, RecursionError) as error:  # more digits than int() takes; too deep
                    place = place_of(path, count + 1, behind + 1 + _ends(text, start))
                    raise ValueError(f"{place} cannot be read: {error}") from None
            count += 1
            yield text[start:end], value, behind + 1 + _ends(text, start)
            start = _skip(text, end)
        behind += taken


def _array(path: Path, lines: Iterator[str], blank: int) -> Iterator[tuple[str, Any, int]]:
    """The elements of an array that is the whole file, with their texts, and the lines where they begin."""
    text = "\n" * blank + "".join(lines)
    start = _skip(text, text.index("[") + 1)
    line, counted = 1, 0
    try:
        while text[start : start + 1] != "]":
            value, end = _decode(text, start)
            line, counted = line + _ends(text, start, counted), start
            yield text[start:end], value, line
            start = _skip(text, end)
            if text[start : start + 1] == ",":
                start = _skip(text, start + 1)
            elif text[start : start + 1] != "]":
                raise json.JSONDecodeError("Expecting ',' or ']'", text, start)
        if _skip(text, start + 1) < len(text):
            raise json.JSONDecodeError("There is more behind the array", text, start + 1)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"data source {path} cannot be read as JSON: {error}") from None


def _decode(text: str, start: int) -> tuple[Any, int]:
    return _DECODER.raw_decode(text, start)


def _skip(text: str, start: int) -> int:
    space = _SPACE.match(text, start)
    assert space is not None, "it matches nothing too"
    return space.end()


def _ends(text: str, end: int, start: int = 0) -> int:
    """How many lines end there."""
    return text.count("\n", start, end) or text.count("\r", start, end)


def _table_rows(path: Path, lines: Iterator[str]) -> Iterator[tuple[str, int]]:
    """Records as JSON objects of texts. All have as many cells as the header."""
    head = []
    for line in lines:
        head.append(line)
        if line.strip():
            break
    # where the first line has no comma: what spreadsheets write in countries with a decimal comma
    marks = "\t" if file_type(path) == ".tsv" else ",;\t"
    separator = next((mark for mark in marks if head and mark in head[-1]), marks[0])
    reader = csv.reader(itertools.chain(head, lines), delimiter=separator, strict=True)
    columns: list[str] = []
    form = ""  # json.dumps of a record takes five times as long
    limit = csv.field_size_limit(sys.maxsize)
    count = 0
    try:
        while True:
            begin = reader.line_num + 1
            try:
                cells = next(reader)
            except StopIteration:
                break
            except csv.Error as error:
                place = place_of(path, count + 1, begin) if columns else f"{path}, line {begin}"
                raise ValueError(
                    f"{place} cannot be read as CSV: {error}; a quoted cell ends with its quote, and a quote inside it is "
                    'written twice ("")'
                ) from None
            if not cells or (len(cells) == 1 and len(columns) != 1 and not cells[0].strip()):
                continue
            if not columns:
                columns = _names(cells)
                names = (encode_basestring(name).replace("%", "%%") for name in columns)
                form = "{" + ", ".join(f"{name}: %s" for name in names) + "}"
                continue
            count += 1
            if len(cells) != len(columns):
                raise ValueError(
                    f"{place_of(path, count, begin)} has {len(cells)} cells, the header {len(columns)} columns: put double quotes around a cell "
                    f"with {separator!r} or a new line in it"
                )
            yield form % tuple(map(encode_basestring, cells)), begin
    finally:
        csv.field_size_limit(limit)


def _names(header: list[str]) -> list[str]:
    """Of columns: one without a name, as an index has, and one more of the same name get the names that pandas gives."""
    names: list[str] = []
    for number, cell in enumerate(header):
        name = cell or f"Unnamed: {number}"
        again = (f"{name}.{n}" for n in itertools.count(1))
        names.append(name if name not in names else next(other for other in again if other not in names))
    return names
