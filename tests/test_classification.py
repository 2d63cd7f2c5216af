"""Sequence classification: rows, heads, the loss and its gradients, figures. Whole runs are in ``test_classifier_runs.py``."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    AlbertConfig,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    ModernBertConfig,
    ModernBertForMaskedLM,
)

import rosa_ds
from classifiers import (
    DECODERS,
    ENCODERS,
    NEW,
    SIZES,
    labelled,
    make_base,
    make_rows,
    make_tokenizer,
    settings,
    write_rows,
)
from rosa_ds.adapters.quantize import quantize
from rosa_ds.adapters.targets import find_targets, with_head
from rosa_ds.config.command_line import build_config
from rosa_ds.config.schema import AdapterConfig, DataSettings, ModelSettings
from rosa_ds.config.unused import settings_without_effect
from rosa_ds.data.batches import IGNORE, LabelledBatch
from rosa_ds.data.labelled import find_classes, prepare_labelled
from rosa_ds.evaluation.classification import classify, scores
from rosa_ds.models.load import identified, identify, load_model, load_tokenizer
from rosa_ds.models.loss import token_loss_sum
from rosa_ds.models.quantized import QuantizedLinear
from rosa_ds.models.stream import stream_base
from rosa_ds.models.task import settle_padding, whole_modules
from rosa_ds.training.evaluate import evaluate
from rosa_ds.training.init_adapter import open_start
from rosa_ds.training.model import check_positions

CPU = torch.device("cpu")


@pytest.mark.parametrize("kind", [*ENCODERS, *DECODERS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_new_head_hangs_on_the_seed_alone(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    given = settings(make_base(tmp_path / "base", kind), "a", "b", "c")
    torch.manual_seed(1)
    model = load_model(given, dtype, seed=5)
    torch.manual_seed(2)
    streamed, base = stream_base(given, dtype, seed=5)
    assert sorted(whole_modules(model)) == sorted(whole_modules(streamed)) == NEW[kind]
    assert {name.rpartition(".")[0] for name in base.new} == {
        n for n in _modules(model) if n.startswith(tuple(NEW[kind]))
    }
    for name, parameter in model.named_parameters():
        assert torch.equal(base.rows(name, slice(None)).to(dtype), parameter), name
    head = next(name for name in base.new if name.endswith("weight"))
    assert float(base.new[head].float().std()) == pytest.approx(0.15, rel=0.15)  # the config's initializer_range
    assert not torch.equal(load_model(given, dtype, seed=6).get_parameter(head), model.get_parameter(head))
    assert model.config.id2label == {0: "a", 1: "b", 2: "c"}


def _modules(model: torch.nn.Module) -> set[str]:
    return {name.rpartition(".")[0] for name, _ in model.named_parameters()}


def test_a_pooler_that_is_there_is_adapted_and_not_new(tmp_path: Path) -> None:
    given = settings(make_base(tmp_path / "base", "bert", bare=True))
    model, streamed = load_model(given, torch.float32), stream_base(given, torch.float32)[0]
    assert whole_modules(model) == whole_modules(streamed) == ["classifier"]
    assert "bert.pooler.dense" in find_targets(model, ["all-linear"])
    assert "classifier" not in find_targets(model, ["all-linear"])


def test_a_pooler_that_is_one_layer(tmp_path: Path) -> None:
    """ALBERT's, which its language models lack."""
    sizes = {key: value for key, value in SIZES.items() if key != "vocab_size"}
    AutoModelForMaskedLM.from_config(AlbertConfig(vocab_size=24, embedding_size=32, **sizes)).save_pretrained(tmp_path)
    config = build_config({"model": settings(tmp_path).model_dump(), "adapter": {"rank": 2}})
    model = load_model(config.model, torch.float32)
    report = rosa_ds.inject(model, with_head(config, model).adapter_config())
    assert sorted(report.trained_whole) == ["albert.pooler", "classifier"]
    assert not any("pooler" in name for name in report.adapted)


@pytest.mark.parametrize("kind", ["roberta", "bert"])
def test_a_head_for_the_same_classes_goes_on(tmp_path: Path, kind: str) -> None:
    make_base(tmp_path / "base", kind)
    first = load_model(settings(tmp_path / "base", "good", "bad"), torch.float32, seed=1)
    first.save_pretrained(tmp_path / "base")
    assert find_classes([write_rows(tmp_path / "rows.csv", make_rows(8))], DataSettings(), ["good", "bad"]) == [
        "good",
        "bad",
    ]
    for seed in (2, 3):
        again = load_model(settings(tmp_path / "base", "good", "bad"), torch.float32, seed)
        streamed, base = stream_base(settings(tmp_path / "base", "good", "bad"), torch.float32, seed)
        assert not base.new
        assert whole_modules(again) == whole_modules(streamed) == ["classifier"]
        assert all(torch.equal(p, first.get_parameter(name)) for name, p in again.named_parameters())
    known = load_model(ModelSettings(name_or_path=str(tmp_path / "base"), task="classification"), torch.float32)
    assert torch.equal(next(known.classifier.parameters()), next(first.classifier.parameters()))
    assert known.config.id2label == {0: "good", 1: "bad"}
    for labels in (("bad", "good"), ("good", "bad", "other"), ("yes", "no")):
        other = load_model(settings(tmp_path / "base", *labels), torch.float32, seed=2)
        _, base = stream_base(settings(tmp_path / "base", *labels), torch.float32, seed=2)
        assert {name for name, _ in other.named_parameters() if name.startswith("classifier")} == base.new.keys()
        for name, numbers in base.new.items():
            assert torch.equal(other.get_parameter(name), numbers)
            assert (
                numbers.shape != (first_ := first.get_parameter(name)).shape
                or "bias" in name
                or not torch.equal(numbers, first_)
            )


def test_a_head_that_a_language_model_has_goes_on(tmp_path: Path) -> None:
    """ModernBERT's dense layer and norm, as transformers loads them; only the classifier is new."""
    torch.manual_seed(0)
    config = ModernBertConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, pad_token_id=0
    )
    ModernBertForMaskedLM(config).save_pretrained(tmp_path)
    given = settings(tmp_path, "good", "bad")
    expected = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=2)
    model = load_model(given, torch.float32)
    _, base = stream_base(given, torch.float32)
    assert base.new.keys() == {"classifier.weight", "classifier.bias"}
    assert whole_modules(model) == ["head", "classifier"]
    for name, parameter in expected.named_parameters():
        if not name.startswith("classifier"):
            torch.testing.assert_close(model.get_parameter(name), parameter, rtol=0, atol=0)
            torch.testing.assert_close(base.rows(name, slice(None)), parameter.data, rtol=0, atol=0)
    base.close()


def test_labels_that_transformers_makes_up_are_numbers(tmp_path: Path) -> None:
    make_base(tmp_path / "base", "roberta")
    AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=2).save_pretrained(
        tmp_path / "base"
    )
    _, base = stream_base(settings(tmp_path / "base", "0", "1"), torch.float32)
    assert not base.new


def test_a_base_that_lacks_more_than_a_head_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    make_base(tmp_path / "base", "roberta")
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    lost = tensors.pop("roberta.encoder.layer.1.output.dense.weight")
    save_file(tensors, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        ValueError, match=r"no tensor of the right shape for roberta.encoder.layer.1.output.dense.weight"
    ):
        load_model(settings(tmp_path / "base"), torch.float32)
    tensors["roberta.encoder.layer.1.output.dense.weight"] = lost[:, :-1].contiguous()
    save_file(tensors, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        ValueError, match=r"no tensor of the right shape for roberta.encoder.layer.1.output.dense.weight"
    ):
        load_model(settings(tmp_path / "base"), torch.float32)


def test_the_head_is_trained_whole_and_stays_dense(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_base(tmp_path / "base", "bert")
    config = build_config({"model": settings(tmp_path / "base").model_dump(), "method": "robust"})
    model = load_model(config.model, torch.float32)
    assert config.adapter.modules_to_save == []
    assert "training.learning_rate" not in " ".join(settings_without_effect(config))
    config = with_head(config, model)
    assert config.adapter.modules_to_save == ["classifier", "bert.pooler"]
    assert with_head(config, model) == config
    assert with_head(config.model_copy(update={"method": "full"}), model).adapter == config.adapter
    quantized = quantize(copy.deepcopy(model), "int8", skip=whole_modules(model))
    kinds = {name for name, module in quantized.named_modules() if isinstance(module, QuantizedLinear)}
    assert len(kinds) == 12
    assert not any(name.startswith(("classifier", "bert.pooler")) for name in kinds)
    idle = copy.deepcopy(model)
    caplog.clear()
    report = rosa_ds.inject(model, config.adapter_config())
    assert report.trained_whole == ("bert.pooler", "classifier")
    assert len(report.adapted) == 12
    assert not caplog.records
    rosa_ds.inject(idle, AdapterConfig(method="lora", rank=2))
    assert "the classifier's head (classifier) stays as it is: modules_to_save would train it" in caplog.text


def test_an_adapter_says_its_task_and_classes(tmp_path: Path) -> None:
    make_base(tmp_path / "base", "llama")
    given = settings(tmp_path / "base")
    base = identify(given)
    assert (base["task"], base["labels"]) == ("classification", ["bad", "good"])
    assert identified(base) == given
    assert not {"task", "labels"} & identify(ModelSettings(name_or_path=str(tmp_path / "base"))).keys()
    model = load_model(given, torch.float32)
    rosa_ds.inject(model, AdapterConfig(method="lora", rank=2, modules_to_save=["score"]))
    rosa_ds.save_adapter(model, tmp_path / "adapter", base)
    for other, kind in (
        (load_model(ModelSettings(name_or_path=str(tmp_path / "base")), torch.float32), "LlamaForCausalLM"),
        (load_model(settings(tmp_path / "base", "a", "b", "c"), torch.float32), "a classifier of 3 classes"),
    ):
        before = {name: p.clone() for name, p in other.named_parameters()}
        with pytest.raises(
            ValueError, match=rf"belongs to a classifier of 2 classes \(bad, good\), the model is {kind}: load"
        ):
            rosa_ds.load_adapter(other, tmp_path / "adapter")
        assert all(torch.equal(before[name], p) for name, p in other.named_parameters())
    start = {"init_from": str(tmp_path / "adapter")}
    for task, message in (
        ({"task": "causal-lm"}, "was trained for task classification, model.task is causal-lm"),
        (
            {"task": "classification", "labels": ["x", "y"]},
            "tells apart the classes bad, good, this run x, y: give --model.labels",
        ),
    ):
        run = build_config({"model": {"name_or_path": given.name_or_path, **task}, "adapter": start})
        with pytest.raises(ValueError, match=message):
            open_start(run, model, base)


def test_the_examples_of_a_file_that_says_ours_is_older(tmp_path: Path) -> None:
    """Adapters that were written before there were tasks are language models'."""
    old = json.loads((Path(__file__).parent / "data" / "adapter_v1" / "robust" / "adapter_config.json").read_text())
    assert "task" not in old["base"]
    assert identified({"name_or_path": "tiny", **old["base"]}).task == "causal-lm"


def reference(model: torch.nn.Module, batch: LabelledBatch) -> tuple[dict[str, Tensor], float]:
    """Gradients of every dense weight, and the loss, of the model with its adapter merged: plain autograd."""
    plain = rosa_ds.merge(copy.deepcopy(model)).train()
    plain.requires_grad_(True)
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    if batch.types is not None:
        inputs["token_type_ids"] = batch.types
    logits = plain(**inputs).logits
    rows = batch.targets[:, 0] != IGNORE
    loss = -logits.log_softmax(-1)[rows, batch.targets[rows, 0]].sum()
    loss.backward()
    return {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}, loss.item()


@pytest.mark.parametrize("kind", [*ENCODERS, *DECODERS])
def test_gradients_are_those_of_a_dense_model(tmp_path: Path, kind: str) -> None:
    """float64: the loss is cast to float32, as in training, so that its rounding bounds the comparison."""
    model = load_model(settings(make_base(tmp_path / "base", kind), "0", "1"), torch.float64)
    pad = settle_padding(
        model, make_tokenizer(kind) if kind in ENCODERS else load_tokenizer(settings(tmp_path / "base"))
    )
    data = labelled(tmp_path / "rows.jsonl", kind, make_rows(6, pairs=True))
    batch = data.batch([0, 1, -1, 2, 3], pad)
    assert isinstance(batch, LabelledBatch)
    whole = whole_modules(model)
    rosa_ds.inject(model, AdapterConfig(method="robust", rank=3, density=0.05, dropout=0.0, modules_to_save=whole))
    rosa_ds.set_mask(model, rosa_ds.compute_mask(model, [], score="random"))
    model.double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    expected, loss = reference(model, batch)
    found = token_loss_sum(model.train(), batch, CPU)
    assert found.item() == pytest.approx(loss, rel=1e-6)
    found.backward()
    checked = 0
    for name, layer in rosa_ds.adapted_layers(model).items():
        dense = expected[layer.weight_name]
        logical = dense.T if layer.transposed else dense
        pairs = {
            "A": layer.scale * layer.B.detach().T @ logical,
            "B": layer.scale * logical @ layer.A.detach().T,
            "values": dense.flatten()[layer.positions.long()],
        }
        for part, wanted in pairs.items():
            assert_near(getattr(layer, part).grad, wanted, f"{name}.{part}")
            checked += 1
    for name, parameter in model.named_parameters():
        if name.startswith(tuple(f"{module}." for module in whole)):
            assert_near(parameter.grad, expected[name], name)
            checked += 1
    assert checked == 3 * len(rosa_ds.adapted_layers(model)) + {"bert": 4, "roberta": 4, "gpt2": 1, "llama": 1}[kind]


def assert_near(found: Tensor, wanted: Tensor, what: str) -> None:
    error = float((found.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-9))
    assert error < 2e-6, f"{what}: {error}"


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_the_loss_does_not_hang_on_the_split(tmp_path: Path, kind: str) -> None:
    model = load_model(settings(make_base(tmp_path / "base", kind)), torch.float32)
    pad = settle_padding(model, load_tokenizer(settings(tmp_path / "base")))
    data = labelled(tmp_path / "rows.jsonl", kind, make_rows(10))
    splits = [
        [list(range(10))],
        [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, -1, -1]],
        [[i] for i in reversed(range(10))],
        [[-1, -1]],
    ]
    sums = [sum(token_loss_sum(model, data.batch(part, pad), CPU).item() for part in split) for split in splits]
    assert sums[1] == pytest.approx(sums[0], rel=1e-6)
    assert sums[2] == pytest.approx(sums[0], rel=1e-6)
    assert sums[3] == 0.0
    assert sum(data.batch(part, pad).trained_tokens for part in splits[1]) == 10 == int(data.trained.sum())
    figures = evaluate(model, data, 3, pad)
    assert figures is not None
    assert figures["loss"] == pytest.approx(sums[0] / 10, rel=1e-6)


def test_figures(tmp_path: Path) -> None:
    """Of a classifier that says what the first word is: by hand."""
    tokenizer = make_tokenizer("llama")
    base = make_base(tmp_path / "base", "llama")
    model = load_model(settings(base, "fine", "poor", "soup"), torch.float32)

    def first_word(input_ids: Tensor, **_: Any) -> Any:
        words = torch.tensor([tokenizer.convert_tokens_to_ids(word) for word in ("fine", "poor", "soup")])
        return type("Output", (), {"logits": (input_ids[:, :1] == words).float()})

    model.forward = first_word
    pairs = [("fine", "fine")] * 5 + [("poor", "poor")] * 2 + [("poor", "fine")] * 1 + [("soup", "poor")] * 2
    rows = [{"text": f"{said} day " + "warm " * (n % 4), "label": true} for n, (true, said) in enumerate(pairs)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    result = classify(model, tokenizer, path, DataSettings(), 3)
    assert result["accuracy"] == pytest.approx(0.7)
    f1 = (2 * 5 / (5 + 6), 2 * 2 / (3 + 4), 0.0)
    assert result["f1"] == pytest.approx(sum(f1) / 3)
    covariance = 7 * 10 - (5 * 6 + 3 * 4 + 2 * 0)
    spread = (100 - (25 + 9 + 4)) * (100 - (36 + 16))
    assert result["mcc"] == pytest.approx(covariance / spread**0.5)
    assert (result["rows"], len(result["samples"])) == (10, 10)
    assert result["samples"][7] == {
        "prompt": "fine day warm warm warm",
        "references": ["poor"],
        "prediction": "fine",
        "scores": {"accuracy": 0.0},
    }
    data = prepare_labelled(path, "eval", tokenizer, DataSettings(), ["fine", "poor", "soup"])
    figures = evaluate(model, data, 4, int(tokenizer.pad_token_id))
    assert figures is not None
    assert figures["accuracy"] == pytest.approx(0.7)
    assert scores(np.array([1, 1]), np.array([1, 1]))["mcc"] == 0.0


def test_who_cannot_classify(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "llama")
    path = write_rows(tmp_path / "rows.jsonl", make_rows(2))
    language = load_model(ModelSettings(name_or_path=base), torch.float32)
    with pytest.raises(ValueError, match="LlamaForCausalLM has no classes to tell apart: give a run with model.task"):
        classify(language, make_tokenizer("llama"), path, DataSettings(), 2)
    model, tokenizer = load_model(settings(base), torch.float32), make_tokenizer("llama")
    tokenizer.eos_token = None
    with pytest.raises(
        ValueError, match="have no padding token and no end-of-text token: set pad_token_id in its config"
    ):
        settle_padding(model, tokenizer)
    model.config.pad_token_id = 1
    assert settle_padding(model, tokenizer) == 1
    assert tokenizer.pad_token == "<pad>"


@pytest.mark.parametrize(("kind", "known"), [("bert", 40), ("roberta", 38), ("gpt2", 40), ("llama", None)])
def test_rows_beyond_the_positions(tmp_path: Path, kind: str, known: int | None) -> None:
    model = load_model(settings(make_base(tmp_path / "base", kind), "0", "1"), torch.float32)
    words = 40 - (2 if kind in ENCODERS else 0)
    rows = [{"text": "fine " * count, "label": count % 2} for count in (words - 2, words - 1, words, words + 1)]
    for count in range(1, 5):
        data = prepare_labelled(
            write_rows(tmp_path / f"{count}.jsonl", rows[:count]),
            "train",
            make_tokenizer(kind),
            DataSettings(),
            ["0", "1"],
        )
        if known is not None and int(data.lengths.max()) > known:
            with pytest.raises(
                ValueError, match=rf"rows has a row of {data.lengths.max()} tokens, .* has positions for {known}: set"
            ):
                check_positions(model, {"rows": data})
        else:
            check_positions(model, {"rows": data})
            pad = settle_padding(model, load_tokenizer(settings(tmp_path / "base")))
            assert torch.isfinite(token_loss_sum(model, data.batch(range(count), pad), CPU))
