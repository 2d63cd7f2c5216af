"""Bad data files, and bad rows in them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from errors.rows import PAIRS, Row, both, write, write_rows

LINES = "".join(json.dumps(row) + "\n" for row in PAIRS)


def row(name: str, source: str, *words: str, make: Callable[[Path], object] | None = None, more: str = "") -> Row:
    """What a run says of ``data.train``."""
    return Row(name, "train", f"--data.train {source} {more}", words, make)


def parquet(name: str, columns: dict[str, Any]) -> Callable[[Path], object]:
    return lambda folder: pq.write_table(pa.table(columns), folder / name)


def truncated(name: str, columns: dict[str, Any]) -> Callable[[Path], object]:
    def made(folder: Path) -> None:
        parquet(name, columns)(folder)
        (folder / name).write_bytes((folder / name).read_bytes()[:-20])

    return made


COLUMNS = {"prompt": ["a"] * 8, "completion": ["b"] * 8}
CLASSES = "--model.task classification"
ROWS = [
    row(
        "file missing",
        "trian.jsonl",
        "data source trian.jsonl",
        "no such file",
        "Did you mean train.jsonl",
        make=write_rows("train.jsonl"),
    ),
    row(
        "file missing, sliced",
        "trian.jsonl[:10]",
        "data source trian.jsonl",
        "no such file",
        "Did you mean train.jsonl",
        make=write_rows("train.jsonl"),
    ),
    row(
        "slice beyond the end",
        "rows.jsonl[100:]",
        "rows.jsonl[100:]",
        "no rows",
        "there are 16",
        make=write_rows("rows.jsonl"),
    ),
    row(
        "slice backwards",
        "rows.jsonl[10:5]",
        "rows.jsonl[10:5]",
        "no rows from 10 to 5",
        "there are 16",
        make=write_rows("rows.jsonl"),
    ),
    row("slice of another form", "rows.jsonl[-5:]", "rows.jsonl[-5:]", "[start:stop]", make=write_rows("rows.jsonl")),
    row("folder without data", "data", "data source", "data", "files", make=write("data/notes.md", "x")),
    row("folder empty", "data", "'data'", make=lambda folder: (folder / "data").mkdir()),
    row(
        "other ending", "rows.txt", "rows.txt", ".jsonl, .json, .csv, .parquet", "'.txt'", make=write("rows.txt", LINES)
    ),
    row("jsonl empty", "rows.jsonl", "rows.jsonl", "empty", make=write("rows.jsonl", "")),
    row("jsonl of blank lines", "rows.jsonl", "rows.jsonl", "no rows", make=write("rows.jsonl", "\n\n\n")),
    row(
        "jsonl cut", "rows.jsonl", "rows.jsonl, row 16 is not JSON", "character", make=write("rows.jsonl", LINES[:-12])
    ),
    row(
        "jsonl with a number",
        "rows.jsonl",
        "row 17 is not a JSON object but int",
        make=write("rows.jsonl", LINES + "3\n"),
    ),
    row(
        "jsonl in Latin-1",
        "rows.jsonl",
        "rows.jsonl",
        "line 17",
        "UTF-8",
        make=write("rows.jsonl", LINES.encode() + b'{"prompt": "caf\xe9", "completion": "b"}\n'),
    ),
    row("jsonl in UTF-16", "rows.jsonl", "rows.jsonl", "UTF-8", make=write("rows.jsonl", LINES.encode("utf-16"))),
    row(
        "jsonl that is gzip",
        "rows.jsonl",
        "rows.jsonl",
        "UTF-8",
        make=write("rows.jsonl", b"\x1f\x8b\x08\x00" + bytes(range(200, 256))),
    ),
    row(
        "jsonl whose types change",
        "rows.jsonl",
        "rows.jsonl, row 17",
        "'completion'",
        make=write("rows.jsonl", LINES + '{"prompt": "a", "completion": {"text": "b"}}\n'),
    ),
    row(
        "jsonl whose columns change",
        "rows.jsonl",
        "rows.jsonl, row 17",
        "completion",
        make=write("rows.jsonl", LINES + '{"prompt": "a", "answer": "b"}\n'),
    ),
    row(
        "json is an object",
        "rows.json",
        "rows.json",
        "fit no format",
        make=write("rows.json", '{"version": 1, "name": "x"}'),
    ),
    row("json is an empty list", "rows.json", "rows.json", "no rows", make=write("rows.json", "[]")),
    row("json broken", "rows.json", "rows.json", "cannot be read", make=write("rows.json", '[{"prompt": "a",')),
    row("csv with a header alone", "rows.csv", "rows.csv", "no rows", make=write("rows.csv", "prompt,completion\n")),
    row(
        "csv ragged",
        "rows.csv",
        "rows.csv, row 2 (line 3)",
        "3 cells",
        "2 columns",
        make=write("rows.csv", "prompt,completion\na,b\na,b,c\n"),
    ),
    row(
        "csv by bars",
        "rows.csv",
        "rows.csv, row 1",
        "prompt|completion",
        "fit no format",
        make=write("rows.csv", "prompt|completion\na|b\n"),
    ),
    row("csv not UTF-8", "rows.csv", "rows.csv", "UTF-8", make=write("rows.csv", b"prompt,completion\ncaf\xe9,b\n")),
    row("csv of binary zeros", "rows.csv", "rows.csv", make=write("rows.csv", bytes(100))),
    row(
        "csv without a value",
        "rows.csv",
        "rows.csv, row 2",
        "'completion'",
        "given ''",
        make=write("rows.csv", "prompt,completion\na,b\nc,\n"),
    ),
    row(
        "parquet is a text",
        "rows.parquet",
        "rows.parquet",
        "cannot be read as .parquet",
        make=write("rows.parquet", LINES),
    ),
    row(
        "parquet cut",
        "rows.parquet",
        "rows.parquet",
        "cannot be read as .parquet",
        make=truncated("rows.parquet", COLUMNS),
    ),
    row(
        "parquet of no rows",
        "rows.parquet",
        "rows.parquet",
        "no rows",
        make=parquet("rows.parquet", {"prompt": pa.array([], pa.string()), "completion": pa.array([], pa.string())}),
    ),
    row(
        "parquet of lists",
        "rows.parquet",
        "rows.parquet, row 1",
        "'prompt'",
        "text",
        make=parquet("rows.parquet", {"prompt": [["a"]], "completion": ["b"]}),
    ),
    row(
        "odd columns",
        "rows.jsonl",
        "rows.jsonl, row 1",
        "'input', 'output'",
        "data.prompt_column",
        "data.completion_column",
        make=write_rows("rows.jsonl", [{"input": "a", "output": "b"}]),
    ),
    row(
        "messages as a text",
        "rows.jsonl",
        "rows.jsonl, row 1",
        "'messages'",
        "role",
        make=write_rows("rows.jsonl", [{"messages": "hello"}]),
    ),
    row(
        "messages of ShareGPT that end with the user's",
        "rows.jsonl",
        "rows.jsonl, row 1",
        "the last message is the user's",
        "nothing after it could be trained",
        make=write_rows("rows.jsonl", [{"messages": [{"from": "human", "value": "a"}]}]),
    ),
    row(
        "conversations of ShareGPT that end with the user's",
        "rows.jsonl",
        "rows.jsonl, row 1",
        "the last message is the user's",
        "nothing after it could be trained",
        make=write_rows("rows.jsonl", [{"conversations": [{"from": "human", "value": "a"}]}]),
    ),
    row(
        "messages begin with the assistant",
        "rows.jsonl",
        "rows.jsonl, row 1",
        make=write_rows("rows.jsonl", [{"messages": [{"role": "user", "content": "a"}]}]),
    ),
    row(
        "blank completion",
        "rows.jsonl",
        "rows.jsonl, row 17",
        "'completion'",
        "not empty",
        "given ' '",
        make=write_rows("rows.jsonl", [*PAIRS, {"prompt": "a", "completion": " "}]),
    ),
    row(
        "null prompt",
        "rows.jsonl",
        "rows.jsonl, row 17",
        "'prompt'",
        "given None",
        make=write_rows("rows.jsonl", [*PAIRS, {"prompt": None, "completion": "b"}]),
    ),
    row(
        "too long",
        "rows.jsonl",
        "rows.jsonl, row 1 has",
        "data.max_length is 6",
        "data.too_long to truncate or drop",
        make=write_rows("rows.jsonl"),
        more="--data.max_length 6",
    ),
    row(
        "all dropped",
        "rows.jsonl",
        "rows.jsonl",
        "data.max_length",
        make=write_rows("rows.jsonl"),
        more="--data.max_length 6 --data.too_long drop",
    ),
    row(
        "completions cut off",
        "rows.jsonl",
        "rows.jsonl",
        "no token is trained",
        "data.max_length",
        make=write_rows("rows.jsonl"),
        more="--data.max_length 4 --data.too_long truncate",
    ),
    row(
        "column that is not there",
        "rows.jsonl",
        "rows.jsonl, row 1",
        "'promt'",
        "Did you mean prompt",
        make=write_rows("rows.jsonl"),
        more="--data.prompt_column promt --data.completion_column completion",
    ),
    row(
        "template that names none",
        "rows.jsonl",
        "the template '{}'",
        "{name}",
        make=write_rows("rows.jsonl"),
        more="--data.prompt_template {} --data.completion_column completion",
    ),
    row(
        "template of a column that is not there",
        "rows.jsonl",
        "rows.jsonl, row 1",
        "'quest'",
        "Columns: 'completion', 'prompt'",
        make=write_rows("rows.jsonl"),
        more="--data.prompt_template {quest} --data.completion_column completion",
    ),
    row(
        "evaluation file missing",
        "rows.jsonl",
        "data source dev.jsonl",
        "no such file",
        make=write_rows("rows.jsonl"),
        more="--data.eval dev.jsonl",
    ),
    row(
        "evaluation file broken",
        "rows.jsonl",
        "dev.jsonl, row 1 is not JSON",
        make=both(write_rows("rows.jsonl"), write("dev.jsonl", "{")),
        more="--data.eval dev.jsonl",
    ),
    row("built-in name misspelt", "builtin:sqll", "'builtin:sqll'", "builtin:sql"),
    row("hub name without a hub", "nobody/nothing", "'nobody/nothing'", "hub"),
    row("text of the home folder", "~/nowhere/rows.jsonl", "nowhere/rows.jsonl", "no such file"),
    row(
        "one class",
        "rows.jsonl",
        "rows.jsonl",
        "one class, a",
        "two",
        "model.labels",
        make=write_rows("rows.jsonl", [{"text": "x", "label": "a"}] * 4),
        more=CLASSES,
    ),
    row(
        "label missing",
        "rows.jsonl",
        "rows.jsonl",
        "'label'",
        "data.label_column",
        make=write_rows("rows.jsonl", [{"text": "x", "klass": "a"}] * 4),
        more=CLASSES,
    ),
    row(
        "labels are floats",
        "rows.jsonl",
        "rows.jsonl",
        "0.5",
        "whole numbers or texts",
        make=write_rows("rows.jsonl", [{"text": "x", "label": 0.5}] * 4),
        more=CLASSES,
    ),
    row(
        "class not among the labels",
        "rows.jsonl",
        "row 2",
        "'c'",
        "none of the classes a, b",
        make=write_rows("rows.jsonl", [{"text": "x", "label": "a"}, {"text": "x", "label": "c"}]),
        more=CLASSES + ' --model.labels ["a","b"]',
    ),
    row(
        "built-in rows have no classes",
        "builtin:sql",
        "builtin:sql",
        "label",
        "model.task classification",
        more=CLASSES,
    ),
]
