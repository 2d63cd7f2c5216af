"""Rows of every kind of source: values as they are written, places in messages, folders, and what is refused."""

from __future__ import annotations

import bz2
import datetime
import decimal
import gzip
import json
import os
import re
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import PreTrainedTokenizerBase

from rosa_ds.config.schema import DataSettings
from rosa_ds.config.template import text_of
from rosa_ds.data import readers
from rosa_ds.data.formats import Pair, parse_row
from rosa_ds.data.labelled import find_classes
from rosa_ds.data.prepare import prepare
from rosa_ds.data.sources import load_rows

ONE, TWO = {"prompt": "a", "completion": "1"}, {"prompt": "ä", "completion": "2"}
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in (ONE, TWO))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache"


def load(path: Path | str, content: str | bytes | None = None, purpose: str = "train") -> list[dict[str, Any]]:
    if content is not None:
        Path(path).write_bytes(content if isinstance(content, bytes) else content.encode())
    return list(load_rows(str(path), purpose))


# -- JSON --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        LINES,
        LINES.rstrip("\n"),
        "\ufeff" + LINES,
        LINES.replace("\n", "\r\n"),
        LINES.replace("\n", "\r"),
        "\n\n" + LINES.replace("\n", "\n\n \n"),
        LINES.replace("\n", " "),
        "".join(json.dumps(row, indent=2) + "\n" for row in (ONE, TWO)),
        json.dumps([ONE, TWO]),
        "\n " + json.dumps([ONE, TWO], indent=1) + "\n",
    ],
    ids=["lines", "no last end", "BOM", "CRLF", "CR", "blank", "one line", "pretty", "array", "pretty array"],
)
@pytest.mark.parametrize("suffix", ["jsonl", "json"])
def test_json_in_every_layout(tmp_path: Path, content: str, suffix: str) -> None:
    assert load(tmp_path / f"rows.{suffix}", content) == [ONE, TWO]


def test_an_object_over_lines_may_end_anywhere(tmp_path: Path) -> None:
    nested = {"a": [1, {"b": None, "c": [[], {}, "x"]}, 2.5], "d": True, "e": {"f": -1}}
    text = json.dumps(nested, indent=1)
    assert load(tmp_path / "rows.jsonl", f"{text}\n{{}}\n{text}") == [nested, {}, nested]
    rows = load_rows(str(tmp_path / "rows.jsonl"), "train")
    ends = text.count("\n") + 1
    assert [rows.where(index).partition(", ")[2] for index in range(3)] == [
        "row 1",
        f"row 2 (line {ends + 1})",
        f"row 3 (line {ends + 2})",
    ]


def test_texts_of_an_array_are_plain_texts(tmp_path: Path) -> None:
    assert load(tmp_path / "rows.json", '["a", "b\\"c"]') == [{"text": "a"}, {"text": 'b"c'}]


def test_characters_that_end_a_line_elsewhere_do_not_here(tmp_path: Path) -> None:
    text = "a\u2028b\u0085c\x0bd\u0000e\U0001f600"
    for escaped in (True, False):
        assert load(tmp_path / "rows.jsonl", json.dumps({"text": text}, ensure_ascii=escaped) + "\n") == [
            {"text": text}
        ]


def test_a_row_has_its_own_keys_and_types(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"a": 1, "tools": {"city": "Oslo"}},
        {"a": "x", "tools": {"x": 1, "y": [1, "2", None]}},
        {"a": {"b": [None]}},
        {"late": float("inf"), "a": None},
    ]
    assert load(tmp_path / "rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows)) == rows
    assert load_rows(str(tmp_path / "rows.jsonl"), "train").columns == ["a", "tools", "late"]


def test_numbers_and_dates_are_written_as_in_the_file(tmp_path: Path) -> None:
    written = ["1", "4.50", "1e5", "-0.0", "12345678901234567890123", "1.10", "0.1000000000000000000001"]
    content = "".join(f'{{"prompt": "a", "completion": {number}}}\n' for number in written)
    assert [text_of(row, "completion") for row in load(tmp_path / "rows.jsonl", content)] == written
    assert load(tmp_path / "rows.jsonl", content)[1] == {"prompt": "a", "completion": 4.5}
    dates = [{"text": "2024-05-01"}, {"text": "2024-05-01T00:00:00Z"}]
    assert load(tmp_path / "dates.jsonl", "".join(json.dumps(row) + "\n" for row in dates)) == dates


def test_a_long_file_whose_keys_change_late(tmp_path: Path) -> None:
    """Behind the blocks of 10 MB in which datasets reads, and with a blank line before."""
    early, late = {"prompt": "q" * 1000, "meta": None}, {"prompt": "a", "meta": {"k": [1]}, "new": 1}
    path = tmp_path / "rows.jsonl"
    path.write_text((json.dumps(early) + "\n") * 11_000 + "\n" + json.dumps(late) + "\n")
    rows = load_rows(f"{path}[10999:]", "train")
    assert list(rows) == [early, late]
    assert rows.where(1) == f"{path}, row 11001 (line 11002)"
    path.write_text(path.read_text() + '{"text": "\\ud83d"}\n')
    with pytest.raises(ValueError, match=r"rows.jsonl, row 11002 \(line 11003\) holds .ud83d, one half of a character"):
        load(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (LINES + '{"prompt": "a", \n' + LINES, "rows.jsonl, row 3 is not JSON: .* at character 1[5678]"),
        (LINES + '\n{"prompt": "a', r"row 3 \(line 4\) is not JSON: Unterminated string starting at at character 12"),
        (LINES + "{'prompt': 1}\n", "row 3 is not JSON: .* at character 2"),
        (LINES + '{"a": 1,}\n', "row 3 is not JSON"),
        (LINES + '{"a": "\t"}\n', "row 3 is not JSON: Invalid control character"),
        (LINES + "[1]\n", "row 3 is not a JSON object but list"),
        ("3\n", "row 1 is not a JSON object but int"),
        ("[1]\n", "row 1 is not a JSON object but int"),
        ('[{"a": 1},\n {"a": 2} {"a": 3}]', "cannot be read as JSON: Expecting ',' or ']': line 2 column 11"),
        ('[{"a": 1}', "cannot be read as JSON"),
        ("[" * 100_000, "cannot be read as JSON: .*recursion"),
        ('{"a": ' + "1" * 5000 + "}\n", "row 1 cannot be read: .*digits"),
        (LINES.encode() + b'{"a": "\xff"}\n', "rows.jsonl, line 3 is not UTF-8 text"),
        ('{"a": "\\ud83d\\ude00"}\n{"a": "\\ud83d"}\n', "row 2 holds"),
        ("[]", "holds no rows"),
        ("\n \n", "holds no rows"),
        ("", "is empty"),
    ],
)
def test_what_is_no_json(tmp_path: Path, cache: Path, content: str | bytes, message: str) -> None:
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            load(tmp_path / "rows.jsonl", content)
    assert not list(cache.glob("*"))


# -- CSV ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mark", [",", ";", "\t"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_cells_are_texts_as_they_are_written(tmp_path: Path, mark: str, end: str) -> None:
    cells = ["00501", "1.10", "1e5", "NA", "None", "null", "NaN", "", "2024-05-01", "True", " x ", "-", "1,5"]
    records = [f'k{n}{mark}"{cell}"' if mark in cell else f"k{n}{mark}{cell}" for n, cell in enumerate(cells)]
    rows = load(tmp_path / "rows.csv", "\ufeff" + end.join([f"prompt{mark}completion", *records]) + end)
    assert [row["completion"] for row in rows] == cells


def test_quotes_and_long_cells(tmp_path: Path) -> None:
    content = 'prompt,completion\n"a ""b""\n\nc, d",x\n\n' + f'{"y" * 200_000},5" pipe\n'
    path = tmp_path / "rows.csv"
    assert [tuple(row.values()) for row in load(path, content)] == [('a "b"\n\nc, d', "x"), ("y" * 200_000, '5" pipe')]
    rows = load_rows(f"{path}[1:]", "train")
    assert rows.where(0) == f"{path}, row 2 (line 6)"


def test_names_of_columns(tmp_path: Path) -> None:
    assert load(tmp_path / "rows.csv", "\n,text,note,note\n0,a,b,c\n") == [
        {"Unnamed: 0": "0", "text": "a", "note": "b", "note.1": "c"}
    ]
    assert load(tmp_path / "odd.csv", 'share %s,"a ""b""",{c}\n50 %,\\,\x01\n') == [
        {"share %s": "50 %", 'a "b"': "\\", "{c}": "\x01"}
    ]
    assert load(tmp_path / "one.csv", "text\na\n\n  \nb") == [{"text": "a"}, {"text": "  "}, {"text": "b"}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "a,b\n1,2\n1,2,3\n",
            r"rows.csv, row 2 \(line 3\) has 3 cells, the header 2 columns: put double quotes around",
        ),
        ("a,b\nHello, world,b\nHi, you,c\n", r"row 1 \(line 2\) has 3 cells"),
        ('a,b\n"1\n2",3\n1\n', r"row 2 \(line 4\) has 1 cells"),
        ('a,b\n1,2\n"say \\"hi\\"",3\n', r"row 2 \(line 3\) cannot be read as CSV: .*written twice"),
        ('a,b\n1,"2\n3,4\n', r"row 1 \(line 2\) cannot be read as CSV: unexpected end of data"),
        ("a,b\n\n", "holds no rows"),
        ("\n", "holds no rows"),
    ],
)
def test_what_is_no_table(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "rows.csv", content)


def test_classes_of_a_table(tmp_path: Path) -> None:
    def classes(*labels: str) -> list[str]:
        (tmp_path / "rows.csv").write_text("text,label\n" + "".join(f"x,{label}\n" for label in labels))
        return find_classes([str(tmp_path / "rows.csv")], DataSettings())

    assert classes("10", "2", "", "-1") == ["-1", "2", "10"]
    assert classes("02", "01") == ["01", "02"]
    assert classes("None", "NA", "a") == ["NA", "None", "a"]
    with pytest.raises(ValueError, match=r"floating-point numbers \(0.5\), and regression"):
        classes("1", "0.5")


# -- columns with types ------------------------------------------------------------------------------------------


def test_parquet_keeps_its_types(tmp_path: Path) -> None:
    day = datetime.date(2024, 5, 1)
    columns = {
        "prompt": pa.array(["a", "b"], pa.large_string()),
        "number": [1.1, float("nan")],
        "whole": [1, None],
        "day": [day, None],
        "price": [decimal.Decimal("1.10"), None],
        "kind": pa.array(["x", "y"]).dictionary_encode(),
        "messages": [[{"role": "user", "content": "a"}], []],
    }
    path = tmp_path / "rows[1].parquet"
    pq.write_table(pa.table(columns), path)
    rows = load_rows(str(path), "train")
    first, second = rows
    assert (first["messages"], first["kind"], second["whole"]) == ([{"role": "user", "content": "a"}], "x", None)
    assert [text_of(first, name) for name in ("number", "whole", "day", "price")] == ["1.1", "1", "2024-05-01", "1.10"]
    assert rows.where(1) == f"{path}, row 2"
    for name in ("number", "whole", "day"):
        with pytest.raises(ValueError, match=f"'{name}' is a text that is not empty, given"):
            text_of(second, name)


def test_truth_is_written_as_json_has_it(tmp_path: Path) -> None:
    (row,) = load(tmp_path / "rows.jsonl", '{"question": "Is 2 even?", "answer": true, "other": false}')
    assert [text_of(row, name) for name in ("answer", "other")] == ["true", "false"]
    assert parse_row(row) == Pair("Is 2 even?", "true")


def test_the_answer_of_a_class_label_is_its_name(tmp_path: Path) -> None:
    features = datasets.Features(
        {"prompt": datasets.Value("string"), "completion": datasets.ClassLabel(names=["no", "yes"])}
    )
    rows = [{"prompt": "a", "completion": 1}, {"prompt": "b", "completion": -1}]
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "rows.parquet")
    assert [row["completion"] for row in load(tmp_path / "rows.parquet")] == ["yes", -1]


# -- folders and several files -----------------------------------------------------------------------------------


def test_a_folder_of_several_kinds_of_text(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "a.jsonl").write_text(json.dumps(ONE) + "\n")
    (folder / "b.csv").write_text("prompt,completion\nx,y\n")
    (folder / "c.csv").write_text("prompt,completion\n\nx2,y2\n")
    (folder / "README.md").write_text("# Rows\n")
    assert [row["prompt"] for row in load(folder)] == ["a", "x", "x2"]
    rows = load_rows(f"{folder}[1:]", "train")
    assert [rows.where(index) for index in (0, 1)] == [
        f"{folder}/b.csv, row 1 (line 2)",
        f"{folder}/c.csv, row 1 (line 3)",
    ]
    pq.write_table(pa.table({"prompt": ["a"]}), folder / "d.parquet")
    with pytest.raises(
        ValueError, match=r"data has files of several types, .*\(.*d.parquet.*name one type, .*data/\*.csv'$"
    ):
        load(folder)
    assert load(f"{folder}/*.parquet") == [{"prompt": "a"}]


@pytest.mark.parametrize("under", ["", "data"])
def test_what_lies_beside_parquet(under: str, tmp_path: Path) -> None:
    """Descriptions of the data set are none of its rows; of any other file the message says how to leave it out."""
    folder = tmp_path / "rows"
    (folder / under).mkdir(parents=True)
    for number in (0, 1):
        pq.write_table(pa.table({"prompt": [str(number)]}), folder / under / f"{number}.parquet")
    for name in ("README.md", "LICENSE", "dataset_info.json", "dataset_infos.json", ".gitattributes"):
        (folder / name).write_text('{"default": {}}')
    assert [row["prompt"] for row in load(folder)] == ["0", "1"]
    for name in ("stats.json", "more.csv"):
        (folder / under / name).write_text('{"a": 1}\n')
        with pytest.raises(
            ValueError, match=f"several types, .*{re.escape(name)}.*: name one type, as in '.*'"
        ) as refused:
            load(folder)
        pattern = str(refused.value).rsplit("as in ")[1].strip("'")
        assert [row["prompt"] for row in load(pattern)] == ["0", "1"]
        (folder / under / name).unlink()


def test_splits_with_different_columns(tmp_path: Path) -> None:
    texts, typed = tmp_path / "texts", tmp_path / "typed"
    texts.mkdir()
    (texts / "train.jsonl").write_text('{"text": "a"}\n')
    (texts / "dev.jsonl").write_text('{"prompt": 1, "completion": {"a": 2}}\n')
    assert load(texts) == [{"text": "a"}]
    assert load(texts, purpose="eval") == [{"prompt": 1, "completion": {"a": 2}}]
    typed.mkdir()
    pq.write_table(pa.table({"text": ["a"]}), typed / "train.parquet")
    pq.write_table(pa.table({"other": [1]}), typed / "test.parquet")
    assert (load(typed), load(f"{typed}:test")) == ([{"text": "a"}], [{"other": 1}])
    with pytest.raises(ValueError, match="has no split 'validation': write .*:SPLIT with one of train, test"):
        load(typed, purpose="eval")


def test_layouts_of_folders(tmp_path: Path) -> None:
    outer = tmp_path / "outer"
    inner = outer / "data"
    inner.mkdir(parents=True)
    for number in (0, 1):
        (inner / f"train-0000{number}-of-00002.jsonl").write_text(json.dumps({"text": str(number)}) + "\n")
    assert [row["text"] for row in load(outer)] == ["0", "1"]
    packed = tmp_path / "packed"
    packed.mkdir()
    (packed / "train.jsonl.gz").write_bytes(gzip.compress(b'{"text": "t"}\n'))
    (packed / "validation.csv.bz2").write_bytes(bz2.compress(b"text\n01\n"))
    assert (load(packed), load(packed, purpose="eval")) == ([{"text": "t"}], [{"text": "01"}])
    (packed / "train.jsonl.gz").write_bytes(gzip.compress(b'{"text": "t"}\n')[:-9])
    with pytest.raises(ValueError, match=r"train.jsonl.gz cannot be unpacked"):
        load(packed)
    sub = tmp_path / "sub"
    for split, suffix in (("train", "jsonl"), ("test", "json")):
        (sub / split).mkdir(parents=True)
        (sub / split / f"rows.{suffix}").write_text(LINES)
    (sub / "notes.txt").write_text("not data")
    assert (load(sub), load(f"{sub}:test[1:]")) == ([ONE, TWO], [TWO])
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "train.txt").write_text("a\nb\n")
    assert load(plain) == [{"text": "a"}, {"text": "b"}]
    (plain / "train.jsonl").write_text(LINES)
    with pytest.raises(ValueError, match="files of several types, .*train.jsonl, train.txt"):
        load(plain)


def test_configurations_of_a_readme(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": name}) + "\n")
    entries = "".join(f"- config_name: {name}\n  data_files: {name}.jsonl\n" for name in "ab")
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{entries}---\n")
    assert load(f"{tmp_path}@b") == [{"text": "b"}]


def test_patterns(tmp_path: Path) -> None:
    for name in ("b", "a"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": name}) + "\n")
    (tmp_path / "notes.md").write_text("x")
    assert load(f"{tmp_path}/*.jsonl") == [{"text": "a"}, {"text": "b"}]
    assert load(f"{tmp_path}/?.jsonl[1:]") == [{"text": "b"}]
    with pytest.raises(ValueError, match=r"data source .*/\*.csv: no such file"):
        load(f"{tmp_path}/*.csv")
    with pytest.raises(ValueError, match=r"data source .*notes.md: files end in"):
        load(f"{tmp_path}/*")


def test_a_name_with_brackets_is_a_file(tmp_path: Path) -> None:
    assert load(tmp_path / "rows[1].jsonl", LINES) == [ONE, TWO]
    assert load(f"{tmp_path}/rows[1].jsonl[1:]") == [TWO]
    with pytest.raises(ValueError, match="files have no split train"):
        load(f"{tmp_path}/rows[1].jsonl:train")


def test_what_save_to_disk_has_written(tmp_path: Path) -> None:
    one, two = datasets.Dataset.from_list([ONE, TWO]), datasets.Dataset.from_list([{"text": "v"}])
    one.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": one, "validation": two}).save_to_disk(tmp_path / "both")
    assert load(f"{tmp_path}/one[1:]") == [TWO]
    assert (load(tmp_path / "both"), load(tmp_path / "both", purpose="eval")) == ([ONE, TWO], [{"text": "v"}])
    with pytest.raises(ValueError, match="has no split 'test': write .*:SPLIT with one of train, validation"):
        load(f"{tmp_path}/both:test")
    with pytest.raises(ValueError, match="has written has no split test"):
        load(f"{tmp_path}/one:test")


# -- the cache ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_a_file_is_known_by_its_content(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    path = tmp_path / f"rows.{suffix}"

    def write(answer: str) -> None:
        if suffix == "parquet":
            pq.write_table(pa.table({"prompt": ["a"], "completion": [answer]}), path)
        elif suffix == "jsonl":
            path.write_text(json.dumps({"prompt": "a", "completion": answer}) + "\n")
        else:
            path.write_text(f"prompt,completion\na,{answer}\n")
        os.utime(path, (1_700_000_000, 1_700_000_000))

    def digest() -> str:
        return prepare(str(path), "train", tokenizer, DataSettings()).digest()

    write("one")
    first = digest()
    write("two")
    assert load(path)[0]["completion"] == "two"
    assert digest() != first
    write("one")
    path = path.rename(tmp_path / f"moved.{suffix}")
    monkeypatch.setattr("rosa_ds.data.prepare.sequences", None)
    assert digest() == first
    with pytest.raises(TypeError):
        prepare(f"{path}[:1]", "train", tokenizer, DataSettings(separator="; "))


def test_slices_are_other_data(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    (tmp_path / "rows.jsonl").write_text(LINES)
    sources = [f"{tmp_path}/rows.jsonl{part}" for part in ("", "[:1]", "[1:]")]
    assert len({prepare(source, "train", tokenizer, DataSettings()).digest() for source in sources}) == 3
    assert len({load_rows(source, "train").fingerprint for source in [*sources, f"{sources[0]}[:2]"]}) == 3


def test_a_text_file_is_read_once(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load(tmp_path / "rows.jsonl", LINES) == [ONE, TWO]
    monkeypatch.setattr(readers, "_write", None)
    assert load(tmp_path / "copy.jsonl", LINES) == [ONE, TWO]
    assert [entry.suffix for entry in cache.iterdir()] == [".arrow"]
