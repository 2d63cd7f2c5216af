"""Whole runs of task classification: they learn, resume, agree on any ranks, and what is exported computes the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import rosa_ds
from classifiers import make_base, make_rows, make_tokenizer, write_rows
from launching import ROOT, losses, metrics, run
from rosa_ds.adapters.folder import open_adapter
from rosa_ds.checkpoints.source import open_source
from rosa_ds.commands import eval
from rosa_ds.export.adapted import load_adapted
from rosa_ds.export.merge import export_adapter, export_merged, export_peft
from rosa_ds.export.verify import verify

pytestmark = [
    pytest.mark.ranks,
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),  # PEFT 0.21 calls it
]

RUNS = str(ROOT / "tests" / "support" / "classifier_runs.py")
TASK = ("--model.task", "classification", "--training.learning_rate", "5e-3", "--adapter.low_rank_lr", "5e-3")
SHORT = ("--mask.warmup_steps", "2", "--training.max_steps", "5", "--training.save_steps", "1")
MORE = (*SHORT, "--training.keep_checkpoints", "20", "--adapter.rank", "4", "--adapter.density", "0.02")
PAIRS = ("--model.name_or_path", "bert", "--data.train", "pairs.jsonl", "--data.eval", "pairs_dev.jsonl")
WORDS = ("--data.train", "words.csv", "--data.eval", "words_dev.jsonl")
KINDS = ("roberta", "bert", "gpt2", "llama")
ONE = (*TASK, *PAIRS, *MORE, "--adapter.dropout", "0", "--ds.train_batch_size", "16")
ROBERTA, MERGED = ("--model.name_or_path", "roberta"), ("--model.name_or_path", "merged", "--method", "lora")
LEARNT = (
    *(*TASK, *WORDS, *ROBERTA, "--mask.warmup_steps", "4", "--training.epochs", "3"),
    *("--adapter.sparse_lr", "5e-3", "--training.output_dir", "learnt"),
)


def commands(folder: Path, *lists: tuple[str, ...]) -> str:
    path = folder / "commands.json"
    path.write_text(json.dumps(lists))
    return str(path)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``learnt``: RoBERTa told the classes; ``pairs``: BERT with its type ids, and the same resumed; short ones of the decoders."""
    folder = tmp_path_factory.mktemp("classifiers")
    for kind in KINDS:
        make_base(folder / kind, kind)
    write_rows(folder / "words.csv", make_rows(320, seed=1))
    write_rows(folder / "words_dev.jsonl", make_rows(80, seed=2))
    write_rows(folder / "pairs.jsonl", make_rows(37, seed=3, pairs=True))
    write_rows(folder / "pairs_dev.jsonl", make_rows(13, seed=4, pairs=True))
    tiny = (*TASK, *WORDS, *SHORT, "--adapter.rank", "2")
    output = run(
        "fork",
        1,
        RUNS,
        commands(
            folder,
            LEARNT,
            (*ONE, "--training.output_dir", "pairs"),
            (*ONE, "--training.output_dir", "resumed", "--resume", "pairs/checkpoints/step-000005"),
            (*tiny, "--model.name_or_path", "gpt2", "--method", "lora", "--training.output_dir", "gpt2-run"),
            (*tiny, "--model.name_or_path", "llama", "--method", "subspace", "--training.output_dir", "llama-run"),
            (*tiny, "--model.name_or_path", "bert", "--model.quantization", "nf4", "--training.output_dir", "nf4-run"),
            (*LEARNT, "--dry-run", "--gpus", "2"),
        ),
        cwd=folder,
    )
    planned = output[output.rindex("targets:") :]
    assert "2 × query (32 × 32): rank 16" in planned
    assert "words.csv: 320 examples" in planned
    assert "an example of class" in planned
    return folder


def test_it_learns(runs: Path) -> None:
    evaluations = [line for line in metrics(runs / "learnt") if line.get("event") == "eval"]
    assert evaluations[0]["accuracy"] < 0.7
    assert evaluations[-1]["accuracy"] > 0.85
    assert evaluations[-1]["loss"] < 0.4 < evaluations[0]["loss"]
    step = next(line for line in metrics(runs / "learnt") if line["step"] == 1 and "event" not in line)
    assert step["trained_tokens"] == 16
    assert step["lr"].keys() == {"low_rank", "sparse", "whole"}
    saved = open_adapter(runs / "learnt" / "adapter").trained
    assert {name for name in saved if name.startswith("classifier.")} == {
        f"classifier.{part}" for part in ("dense.weight", "dense.bias", "out_proj.weight", "out_proj.bias")
    }
    config = json.loads((runs / "learnt" / "adapter" / "rosa_adapter.json").read_text())
    assert (config["base"]["task"], config["base"]["labels"]) == ("classification", ["bad", "good"])
    assert config["config"]["modules_to_save"] == ["classifier"]
    account = json.loads((runs / "learnt" / "accounting.json").read_text())
    for part in ("whole modules", "optimizer", "activations"):
        assert account["measured"]["memory"][part] == pytest.approx(account["predicted"]["memory"][part], rel=0.02), (
            part
        )


def test_resume_is_bit_equal(runs: Path) -> None:
    later = [entry for entry in losses(runs / "pairs") if entry[0] > 5]
    assert len(later) == 4
    assert losses(runs / "resumed") == later
    files = [(runs / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in ("pairs", "resumed")]
    assert files[0] == files[1]
    changed = open_adapter(runs / "pairs" / "adapter").trained["bert.pooler.dense.weight"]
    first = load_file(runs / "pairs" / "checkpoints" / "step-000001" / "trained-00000.safetensors")
    assert not torch.equal(changed, first["bert.pooler.dense.weight"])


@pytest.fixture(scope="module")
def ranks(runs: Path) -> Path:
    """The pairs on two ranks at stages 2 and 3, and runs that begin with what ``learnt`` left; the last one is refused."""
    few = (*TASK, *WORDS, "--training.max_steps", "1", "--training.warmup_steps", "0")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(runs)
        export_merged("learnt", "merged", None)
        export_peft("learnt", "peft-start", None)
    write_rows(runs / "three.csv", [*make_rows(320, seed=1), {"text": "the soup", "label": "neither"}])
    output = run(
        "fork",
        2,
        RUNS,
        commands(
            runs,
            (*ONE, "--ds.zero_optimization.stage", "2", "--training.output_dir", "stage2"),
            (*ONE, "--ds.zero_optimization.stage", "3", "--training.output_dir", "stage3"),
            (*few, *ROBERTA, "--adapter.init_from", "learnt/adapter", "--training.output_dir", "from-ours"),
            (*few, *ROBERTA, "--adapter.init_from", "peft-start", "--training.output_dir", "from-peft"),
            (*few, *MERGED, "--training.output_dir", "from-merged"),
            (*few, *MERGED, "--training.output_dir", "from-merged3", "--ds.zero_optimization.stage", "3"),
            (*LEARNT, "--data.train", "three.csv", "--resume"),
        ),
        cwd=runs,
        status=1,
    )
    assert "--resume: data.train was 'words.csv' and is 'three.csv' now" in output
    assert "(changed: data.train, model.labels)" in output
    return runs


def test_two_ranks_are_one(ranks: Path) -> None:
    """Stages 2 and 3; the last step of an epoch has 5 rows, so that rows stand in for missing ones."""
    alone = losses(ranks / "pairs")
    for name in ("stage2", "stage3"):
        found = losses(ranks / name)
        assert [entry[:2] for entry in found] == [entry[:2] for entry in alone]
        assert [entry[2] for entry in found] == pytest.approx([entry[2] for entry in alone], rel=1e-5)
        accuracies = [[line.get("accuracy") for line in metrics(ranks / run)] for run in ("pairs", name)]
        assert accuracies[0] == accuracies[1]


def test_a_run_goes_on_from_what_another_left(ranks: Path) -> None:
    """With the adapter of ours and of PEFT as its start, and with a merged classifier as its base, whose head is not new."""
    last = [line for line in metrics(ranks / "learnt") if line.get("event") == "eval"][-1]
    for name in ("from-ours", "from-peft", "from-merged", "from-merged3"):
        first = next(line for line in metrics(ranks / name) if line.get("event") == "eval")
        assert first["accuracy"] == last["accuracy"], name
        assert first["loss"] == pytest.approx(last["loss"], rel=1e-4), name


def inputs(kind: str) -> dict[str, Tensor]:
    """Three padded rows."""
    ids = torch.randint(4, 20, (3, 7), generator=torch.Generator().manual_seed(0))
    pad = make_tokenizer(kind).pad_token_id
    pad = 2 if pad is None else pad
    ids[0, 4:], ids[2, 6:] = pad, pad
    return {"input_ids": ids, "attention_mask": (ids != pad).long()}


@torch.no_grad()
def logits(model: torch.nn.Module, kind: str) -> Tensor:
    result: Tensor = model.eval()(**inputs(kind)).logits
    return result


def plain(base: Path) -> torch.nn.Module:
    """As a user loads a base to classify with."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    model: torch.nn.Module = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2, pad_token_id=pad)
    return model


def test_exports_compute_what_the_run_has(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(runs)
    for name, kind in (
        *(("learnt", "roberta"), ("pairs", "bert"), ("pairs/checkpoints/step-000004", "bert")),
        *(("gpt2-run", "gpt2"), ("llama-run", "llama"), ("nf4-run", "bert")),
    ):
        expected = logits(load_adapted(open_source(name), torch.float32), kind)
        out = export_merged(name, f"out/{name}", None)
        merged, report = AutoModelForSequenceClassification.from_pretrained(out, output_loading_info=True)
        assert not any(report.values()), (name, report)
        assert torch.allclose(logits(merged, kind), expected, rtol=1e-5, atol=1e-5), name
        names = ["0", "1"] if name.startswith("pairs") else ["bad", "good"]
        assert merged.config.id2label == dict(enumerate(names))
        assert merged.config.label2id == {label: number for number, label in enumerate(names)}
        config = json.loads((out / "config.json").read_text())
        assert config["architectures"] == [type(merged).__name__]
        assert config["pad_token_id"] == merged.config.pad_token_id == AutoTokenizer.from_pretrained(out).pad_token_id
    assert verify("learnt", "out/learnt").passed
    assert verify("llama-run", "out/llama-run").passed
    last = [line["accuracy"] for line in metrics(Path("learnt")) if line.get("event") == "eval"][-1]
    evaluate = eval.main
    for model in (["learnt"], ["learnt", "--unmerged"], ["out/learnt"]):
        evaluate([*model, "--data", "words_dev.jsonl", "--batch-size", "7", "--output", "figures.json"])
        figures = json.loads(Path("figures.json").read_text())
        assert figures["accuracy"] == pytest.approx(last)
        assert (
            figures["accuracy"] == sum(sample["scores"]["accuracy"] for sample in figures["samples"]) / figures["rows"]
        )
        assert figures["mcc"] > 0.7
        low, high = figures["mcc_interval"]
        assert low <= figures["mcc"] <= high
    with pytest.raises(ValueError, match="--metric bleu: learnt is a classifier, whose metrics are accuracy"):
        evaluate(["learnt", "--data", "words_dev.jsonl", "--metric", "bleu"])


def test_adapters_and_peft_folders_compute_it_too(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(runs)
    for name, kind, rank in (
        ("learnt", "roberta", None),
        ("pairs", "bert", None),
        ("gpt2-run", "gpt2", None),
        ("llama-run", "llama", 4),
    ):
        expected = logits(load_adapted(open_source(name), torch.float32), kind)
        ours = plain(Path(kind))
        rosa_ds.load_adapter(ours, export_adapter(name, f"adapter/{name}"))
        assert torch.equal(logits(ours, kind), expected), name
        folder = export_peft(name, f"peft/{name}", rank)
        written = json.loads((folder / "adapter_config.json").read_text())
        assert written["task_type"] == "SEQ_CLS"
        assert written["modules_to_save"] == {"bert": ["bert.pooler", "classifier"], "roberta": ["classifier"]}.get(
            kind, ["score"]
        )
        bound = 1e-5 if rank is None else 1e-2  # a difference to the base of any rank, as LoRA of rank 4
        assert torch.allclose(
            logits(PeftModel.from_pretrained(plain(Path(kind)), folder), kind), expected, atol=bound
        ), name
        back = plain(Path(kind))
        rosa_ds.load_adapter(back, folder)
        assert torch.allclose(logits(back, kind), expected, atol=bound), name
