"""Several sources in one run: how many examples of each an epoch has, in which order, and the loss of each."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerBase

from launching import ROOT, TRAIN, go_on, losses, metrics, run
from rosa_ds.config.command_line import build_config
from rosa_ds.config.schema import DataSettings, MixedSource, ModelSettings
from rosa_ds.data.batches import BatchPlan, Part, epoch_order
from rosa_ds.data.labelled import find_classes
from rosa_ds.data.mixture import examples_an_epoch, mix
from rosa_ds.data.prepare import prepare
from rosa_ds.models.load import load_model
from rosa_ds.training.evaluate import evaluate
from rosa_ds.training.task import prepare_data


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def pairs(path: Path, word: str, count: int) -> str:
    return write(path, [{"prompt": f"{word} {n}", "completion": f"{word} {'x' * (n % 7)}"} for n in range(count)])


@pytest.mark.parametrize(
    ("counts", "sources", "expected"),
    [
        ([10, 20], [{}, {}], [10, 20]),
        ([10, 20], [{"examples": 25}, {}], [25, 20]),
        ([10, 20], [{"weight": 1}, {"weight": 1}], [15, 15]),
        ([10, 20, 3], [{"weight": 0.5}, {"weight": 0.3}, {"weight": 0.2}], [16, 10, 7]),  # of 16.5, 9.9, 6.6
        ([7, 7, 7], [{"weight": 1}, {"weight": 1}, {"weight": 2}], [5, 5, 11]),
    ],
    ids=["whole", "examples", "equal", "rounded", "sum"],
)
def test_examples_an_epoch(counts: list[int], sources: list[dict[str, Any]], expected: list[int]) -> None:
    found = examples_an_epoch(counts, [MixedSource(source="s", **source) for source in sources])
    assert found == expected


def test_a_weight_too_small_for_one_example_is_refused() -> None:
    sources = [MixedSource(source="many", weight=1000), MixedSource(source="few", weight=0.001)]
    with pytest.raises(ValueError, match="the weight of few gives it none of the 30 examples"):
        examples_an_epoch([10, 20], sources)


PARTS = (Part("a", 0, 10, 10), Part("b", 10, 20, 7), Part("c", 30, 4, 9))


def test_an_epoch_has_exactly_its_share_of_each_source() -> None:
    """And a source that is not taken whole gives all of its examples before any comes again."""
    seen: list[int] = []
    for epoch in range(20):
        order = epoch_order(PARTS, 3, epoch)
        assert [int(((order >= p.first) & (order < p.first + p.count)).sum()) for p in PARTS] == [10, 7, 9]
        assert sorted(order[order < 10]) == list(range(10))
        seen += order.tolist()
    counts = Counter(seen)
    assert {counts[number] for number in range(10, 30)} == {7}  # 20 epochs of 7 examples are 7 passes over 20
    assert {counts[number] for number in range(30, 34)} == {45}
    first = [n for epoch in range(3) for n in epoch_order(PARTS, 3, epoch) if 10 <= n < 30]
    assert max(Counter(first).values()) == 2
    assert len(set(first)) == 20


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    for epoch in (0, 5):
        epoch_order.cache_clear()
        alone = epoch_order(PARTS, 3, epoch).tolist()
        assert alone == epoch_order(PARTS, 3, epoch).tolist()
        assert alone != epoch_order(PARTS, 4, epoch).tolist()
    one = BatchPlan(np.arange(1, 35), np.arange(35), PARTS, 8, 8, 1, seed=3, batching="sorted")
    assert one.steps_per_epoch == 4  # 26 examples
    for ranks in (2, 4):
        split = BatchPlan(np.arange(1, 35), np.arange(35), PARTS, 8, 2, ranks, seed=3, batching="sorted")
        for step in range(9):
            every = np.concatenate([batch for rank in range(ranks) for batch in split.micro_batches(step, rank)])
            assert sorted(every[every >= 0]) == sorted(one.step_sequences(step))


def test_a_mixture_keeps_the_examples_of_each_source(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    names = [pairs(tmp_path / "a.jsonl", "select", 12), pairs(tmp_path / "b.jsonl", "count", 5)]
    single = [prepare(name, "train", tokenizer, DataSettings()) for name in names]
    mixed = mix(single, [MixedSource(source=names[0], examples=6), MixedSource(source=names[1])])
    assert [(part.name, part.first, part.count, part.taken) for part in mixed.parts] == [
        (names[0], 0, 12, 6),
        (names[1], 12, 5, 5),
    ]
    expected = [tokens.tokens(n) for tokens in single for n in range(len(tokens))]
    assert [mixed.tokens(n) for n in range(17)] == expected
    assert mixed.lengths.tolist() == [len(tokens.ids) for tokens in expected]
    assert mixed.shares()[1].startswith(f"{names[1]}: 5 examples an epoch of 5, ")


def test_the_evaluation_tells_the_loss_of_each_source(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """As if each were evaluated alone, and their sum is that of all."""
    names = [pairs(tmp_path / "a.jsonl", "select", 11), pairs(tmp_path / "b.jsonl", "count", 6)]
    sets = [prepare(name, "eval", tokenizer, DataSettings()) for name in names]
    model, pad = load_model(ModelSettings(), torch.float32), tokenizer.pad_token_id
    found = evaluate(model, mix(sets, [MixedSource(source=name) for name in names]), 4, pad)
    assert found is not None
    for name, tokens in zip(names, sets, strict=True):
        alone = evaluate(model, tokens, 4, pad)
        assert alone is not None
        assert found["losses"][name] == pytest.approx(alone["loss"], rel=1e-5)
        assert "losses" not in alone
    weights = [tokens.trained.sum() for tokens in sets]
    assert found["loss"] == pytest.approx(np.average(list(found["losses"].values()), weights=weights), rel=1e-6)


def test_classes_of_several_sources(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    first = write(tmp_path / "a.jsonl", [{"text": f"good {n}", "label": n % 2} for n in range(6)])
    second = write(tmp_path / "b.jsonl", [{"text": f"bad {n}", "label": 10 + n % 2} for n in range(4)])
    assert find_classes([first, second], DataSettings()) == ["0", "1", "10", "11"]
    settings = build_config(
        {"model": {"task": "classification"}, "data": {"train": [first, second], "eval": [first, second]}}
    )
    _, data, evaluation = prepare_data(settings, tokenizer)
    assert evaluation is not None
    assert data.labels().tolist() == [0, 1, 0, 1, 0, 1, 2, 3, 2, 3]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"train": []}, "an empty list of sources"),
        ({"train": ["a.jsonl", "a.jsonl"]}, "a.jsonl is named twice"),
        ({"train": [{"source": "a", "weight": 1}, "b"]}, "weights divide an epoch among all sources: b has none"),
        ({"train": [{"source": "a", "weight": 1, "examples": 3}]}, "a: weight and examples both say"),
        ({"train": [{"source": "a", "weight": 0}]}, "greater than 0"),
        ({"train": [{"sauce": "a"}]}, "source"),
        ({"train": '["a.jsonl", '}, "a list of sources is JSON"),
    ],
    ids=["empty", "twice", "one weight", "both", "zero", "unknown", "json"],
)
def test_what_is_no_mixture(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_config({"data": given})


@pytest.mark.ranks
def test_a_run_on_a_mixture_goes_on_as_it_would_have(tmp_path: Path) -> None:
    """From a checkpoint of two ranks on one rank, at another stage."""
    mixture = json.dumps(
        [
            {"source": "builtin:sql[:40]", "examples": 10},
            "builtin:sql[40:60]",
            {"source": "builtin:sql[60:63]", "examples": 7},
        ]
    )
    shared = (
        *("--data.train", mixture, "--data.eval", json.dumps(["builtin:sql[:8]", "builtin:sql[8:24]"])),
        *("--method", "lora", "--training.warmup_steps", "0", "--training.epochs", "3", "--training.save_steps", "3"),
        *("--training.keep_checkpoints", "9"),
        *("--ds.train_batch_size", "8", "--adapter.dropout", "0"),
    )
    zero2, zero3 = (("--config", str(ROOT / "ds_configs" / f"zero{stage}.json")) for stage in (2, 3))
    (tmp_path / "two").mkdir()
    output = run("fork", 2, TRAIN, *zero2, *shared, cwd=tmp_path / "two")
    assert "builtin:sql[:40]: 10 examples an epoch of 40" in output
    straight = tmp_path / "two" / "runs" / "default"
    assert len(losses(straight)) == 17  # 37 examples are five steps, and two evaluations
    figures = [line for line in metrics(straight) if line.get("event") == "eval"]
    assert all(set(line["losses"]) == {"builtin:sql[:8]", "builtin:sql[8:24]"} for line in figures)
    copy = go_on(straight, tmp_path / "one", 6)
    run("fork", 1, TRAIN, *zero3, *shared, "--resume", cwd=tmp_path / "one")
    assert [line[2] for line in losses(copy)] == pytest.approx([line[2] for line in losses(straight)], rel=1e-5)
