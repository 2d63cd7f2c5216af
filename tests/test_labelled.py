"""Rows with a class: columns, labels, pairs, lengths, and the settings of a run that classifies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from classifiers import labelled, make_base, make_rows, make_tokenizer, write_rows
from rosa_ds.config.command_line import build_config
from rosa_ds.config.schema import DataSettings, ModelSettings
from rosa_ds.data.labelled import find_classes, prepare_labelled
from rosa_ds.models.load import load_tokenizer
from rosa_ds.training.task import prepare_data


def as_parquet(path: Path, rows: list[dict[str, Any]], names: list[str]) -> str:
    features = datasets.Features({"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=names)})
    datasets.Dataset.from_list(rows, features=features).to_parquet(path)
    return str(path)


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        (["b", "a", "b"], ["a", "b"]),
        ([10, 2, -1], ["-1", "2", "10"]),
        ([True, False, True], ["False", "True"]),
        ([" x", "x", "y "], ["x", "y"]),
    ],
    ids=["texts", "numbers", "truth", "spaces"],
)
def test_classes_are_found_in_order(tmp_path: Path, labels: list[Any], classes: list[str]) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"text": "fine day", "label": label} for label in labels]
    assert find_classes([write_rows(path, rows)], DataSettings()) == classes
    data = labelled(path, "roberta", rows)
    assert [classes[label] for label in data.labels()] == [str(label).strip() for label in labels]
    assert data.trained.tolist() == [1, 1, 1]


def test_class_labels_keep_their_order_and_names(tmp_path: Path) -> None:
    rows = [{"sentence": "fine day", "label": 2}, {"sentence": "dull day", "label": 0}]
    path = as_parquet(tmp_path / "rows.parquet", rows, ["z", "never", "a"])
    assert find_classes([path], DataSettings()) == ["z", "never", "a"]
    data = prepare_labelled(path, "eval", make_tokenizer("bert"), DataSettings(), ["a", "z"])
    assert data.labels().tolist() == [0, 1]


@pytest.mark.parametrize(
    ("columns", "given"),
    [
        ({"text": "fine"}, {}),
        ({"sentence": "fine", "idx": 3}, {}),
        ({"sentence1": "fine", "sentence2": "soup"}, {}),
        ({"premise": "fine", "hypothesis": "soup"}, {}),
        ({"question": "fine", "sentence": "soup"}, {}),
        ({"question1": "fine", "question2": "soup", "text": "no"}, {}),
        ({"one": "fine", "two": "soup", "text": "no"}, {"text_column": "one", "pair_column": "two"}),
        ({"one": "fine", "text": "no"}, {"text_column": "one"}),
        ({"one": 7}, {"text_column": "one"}),
    ],
    ids=lambda given: "+".join(given) if isinstance(given, dict) and "label_column" not in given else None,
)
def test_columns(tmp_path: Path, columns: dict[str, Any], given: dict[str, str]) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{**columns, "kind": "x"}, {**columns, "kind": "y"}])
    named = DataSettings(label_column="kind", **given)
    tokenizer = make_tokenizer("bert")
    data = prepare_labelled(path, "train", tokenizer, named, find_classes([path], named), True)
    pair = "soup" in columns.values()
    assert tokenizer.decode(data.tokens(1).ids) == ("<s> fine </s> soup </s>" if pair else data_text(columns))
    assert data.tokens(1).types == ([0, 0, 0, 1, 1] if pair else [0, 0, 0])
    assert data.tokens(1).label == 1


def data_text(columns: dict[str, Any]) -> str:
    return "<s> <unk> </s>" if columns.get("one") == 7 else "<s> fine </s>"


def test_a_tokenizer_that_cannot_part_texts_gets_the_separator(tmp_path: Path) -> None:
    rows = [{"premise": "fine day", "hypothesis": "soup", "label": label} for label in (0, 1)]
    path, tokenizer = write_rows(tmp_path / "rows.jsonl", rows), make_tokenizer("gpt2")
    data = prepare_labelled(path, "train", tokenizer, DataSettings(separator=" and "), ["0", "1"])
    assert tokenizer.decode(data.tokens(0).ids) == "fine day and soup"
    assert data.tokens(0).types == []
    other = prepare_labelled(path, "train", tokenizer, DataSettings(separator=" very "), ["0", "1"])
    assert tokenizer.decode(other.tokens(0).ids) == "fine day very soup"


def test_too_long_rows(tmp_path: Path) -> None:
    rows = [{"text": "fine " * length, "label": length % 2} for length in (3, 8, 4)]
    path = tmp_path / "rows.jsonl"
    with pytest.raises(ValueError, match="row 2 has 10 tokens, data.max_length is 7"):
        labelled(path, "roberta", rows, max_length=7)
    cut = labelled(path, "roberta", rows, max_length=7, too_long="truncate")
    assert cut.lengths.tolist() == [5, 7, 6]
    assert cut.tokens(1).ids[0] == 0
    assert cut.tokens(1).ids[-1] == 2  # the special tokens stay
    assert "1 cut to 7 tokens" in cut.summary()
    dropped = labelled(path, "roberta", rows, max_length=7, too_long="drop")
    assert (dropped.lengths.tolist(), dropped.labels().tolist()) == ([5, 6], [1, 0])
    assert "0 1, 1 1 (1 dropped, longer than 7 tokens)" in dropped.summary()
    with pytest.raises(ValueError, match="no row is left: 3 dropped"):
        labelled(path, "roberta", rows, max_length=4, too_long="drop")


def test_other_labels_are_other_data(tmp_path: Path) -> None:
    rows = make_rows(100)
    one = labelled(tmp_path / "one.jsonl", "bert", rows)
    rows[77] = {**rows[77], "label": "good" if rows[77]["label"] == "bad" else "bad"}
    assert labelled(tmp_path / "two.jsonl", "bert", rows).digest() != one.digest()


ROW = {"text": "fine", "label": "x"}


@pytest.mark.parametrize(
    ("rows", "given", "message"),
    [
        ([ROW, ROW], {}, "'label' has one class, x: a classifier tells two or more apart"),
        (
            [{"text": "fine", "label": 0.5}] * 2,
            {},
            r"row 1: 'label' is a column of floating-point numbers \(0.5\), and regression",
        ),
        ([{"text": "fine", "label": ["x"]}] * 2, {}, "'label' holds list: a class is a whole number or a text"),
        ([{"text": "fine"}] * 2, {}, "no column 'label'.* Name the one with the class: data.label_column"),
        ([ROW], {"label_column": "lable"}, "no column 'lable'. Did you mean label"),
        ([ROW], {"text_column": "txt"}, "no column 'txt'. Did you mean text"),
        (
            [{"words": "fine", "label": "x"}],
            {},
            "the columns words, label hold no text to classify .*name it with data.text_column",
        ),
    ],
    ids=["one class", "regression", "list", "no label", "label", "text", "unknown"],
)
def test_rows_that_name_no_classes(
    tmp_path: Path, rows: list[dict[str, Any]], given: dict[str, str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        find_classes([write_rows(tmp_path / "rows.jsonl", rows)], DataSettings(**given))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"text": "fine", "label": "goood"},
            "row 2: 'label' is 'goood', which is none of the classes bad, good that data.train or model.labels have. Did you mean good",
        ),
        ({"text": "fine", "label": None}, "row 2: 'label' is a class, given None"),
        ({"text": None, "label": "bad"}, "row 2: 'text' is a text, given None"),
    ],
    ids=["unknown", "no class", "no text"],
)
def test_rows_that_cannot_be_classified(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"text": "fine", "label": "good"}, row])
    with pytest.raises(ValueError, match=message):
        prepare_labelled(path, "eval", make_tokenizer("bert"), DataSettings(), ["bad", "good"])


def test_a_text_without_tokens(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"text": " ", "label": "good"}])
    with pytest.raises(ValueError, match="row 1: 'text' ' ' has no token"):
        prepare_labelled(path, "eval", make_tokenizer("gpt2"), DataSettings(), ["bad", "good"])
    prepare_labelled(path, "eval", make_tokenizer("bert"), DataSettings(), ["bad", "good"])  # has its special ones


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"model": {"labels": ["a", "b"]}}, "model.labels are of model.task classification, given is causal-lm"),
        ({"model": {"task": "classification", "labels": ["a"]}}, "model.labels names two or more different classes"),
        ({"model": {"task": "classification", "labels": ["a", "a", "b"]}}, "model.labels names two or more different"),
        ({"data": {"text_column": "a"}}, "data.text_column has no meaning with model.task causal-lm"),
        ({"data": {"label_column": "a"}}, "data.label_column has no meaning with model.task causal-lm"),
        (
            {"model": {"task": "classification"}, "data": {"prompt_column": "a", "completion_column": "b"}},
            "data.prompt_column has no meaning with model.task classification",
        ),
        (
            {"model": {"task": "classification"}, "data": {"pair_column": "b"}},
            "data.pair_column is the second text of a pair: give data.text_column",
        ),
    ],
    ids=["labels", "one", "twice", "text", "label", "prompt", "pair"],
)
def test_rejects_settings(section: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_config(section)


def test_classes_come_from_the_training_rows_or_the_settings(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "roberta")
    train = write_rows(tmp_path / "train.csv", make_rows(20))
    dev = write_rows(tmp_path / "dev.jsonl", [{"text": "fine", "label": "other"}])
    section: dict[str, Any] = {
        "model": {"name_or_path": base, "task": "classification"},
        "data": {"train": train, "eval": dev},
    }
    tokenizer = load_tokenizer(ModelSettings(name_or_path=base))
    with pytest.raises(
        ValueError, match="dev.jsonl, row 1: 'label' is 'other', which is none of the classes bad, good"
    ):
        prepare_data(build_config(section), tokenizer)
    section["model"]["labels"] = ["good", "other", "bad"]
    found, data, evaluation = prepare_data(build_config(section), tokenizer)
    assert found.model.labels == ["good", "other", "bad"]
    assert evaluation is not None
    assert evaluation.tokens(0).label == 1  # type: ignore[attr-defined]
    assert set(np.asarray(data.data["class"])) == {0, 2}
    section["data"] = {}
    with pytest.raises(ValueError, match="data.train builtin:sql has no classes: give rows with a text and a label"):
        prepare_data(build_config(section), tokenizer)
