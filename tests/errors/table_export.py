"""Exports and evaluations of what cannot be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from errors.rows import Row, adapter, base, cut, run, write, write_rows

rows = write_rows("rows.jsonl")
SETTINGS = {"data": {"train": "rows.jsonl"}}


def nothing(folder: Path) -> None:
    """Leave the folder empty."""


def checkpoint(change: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda folder: change(run(folder, **SETTINGS))


def export(name: str, arguments: str, change: Callable[[Path], object], *words: str, status: int = 1) -> Row:
    return Row(name, "export", arguments, words, change, status=status)


def evaluate(name: str, arguments: str, change: Callable[[Path], object], *words: str, status: int = 1) -> Row:
    return Row(name, "eval", arguments, words, change, status=status)


STEP = "runs/default/checkpoints/step-000001"
ROWS = [
    export("export nothing", "runs/gone out", nothing, "runs/gone", "no such folder"),
    export(
        "export an empty folder",
        "runs/default out",
        lambda f: (f / "runs/default").mkdir(parents=True),
        "runs/default holds no adapter",
        "no whole checkpoint",
    ),
    export("export a model", "base out", base, "base", "holds no adapter"),
    export("export a file", "rows.jsonl out", rows, "rows.jsonl", "folder"),
    export(
        "export a damaged adapter",
        "adapter out",
        lambda f: cut(adapter(f) / "adapter_model.safetensors"),
        "adapter",
        "adapter_model.safetensors has",
    ),
    export(
        "export an adapter without a manifest",
        "adapter out",
        lambda f: (adapter(f) / "manifest.json").unlink(),
        "adapter",
        "manifest.json is missing",
    ),
    export(
        "export an adapter whose config is broken",
        "adapter out",
        lambda f: (adapter(f), write("adapter/rosa_adapter.json", "{")(f)),
        "rosa_adapter.json",
    ),
    export(
        "export a PEFT folder",
        "adapter out",
        write("adapter/adapter_config.json", {"peft_type": "LORA"}),
        "adapter",
        "PEFT",
        "--adapter.init_from",
    ),
    export(
        "export of a base that is gone",
        "adapter out",
        lambda f: adapter(f, name_or_path="./gone"),
        "./gone",
        "no such folder",
    ),
    export(
        "export of another base",
        "adapter out",
        lambda f: adapter(f, hash="0" * 64),
        "was trained on other weights than tiny",
    ),
    export(
        "export to someone's folder",
        "adapter out",
        lambda f: (adapter(f), write("out/thesis.tex", "x")(f)),
        "out holds thesis.tex",
        "give another folder",
    ),
    export("export into itself", "adapter adapter/out", adapter, "adapter/out and adapter", "give another folder"),
    export(
        "export to a file", "adapter rows.jsonl", lambda f: (adapter(f), rows(f)), "rows.jsonl", "give another folder"
    ),
    export("export below a file", "adapter rows.jsonl/out", lambda f: (adapter(f), rows(f)), "rows.jsonl"),
    export("export where nobody may write", "adapter /proc/out", adapter, "/proc"),
    export(
        "export over a damaged export",
        "adapter out",
        lambda f: (adapter(f), write("out/rosa_ds.json", "{")(f)),
        "out",
        "rosa_ds.json",
        "give another folder",
    ),
    export("export in an unknown format", "adapter out --format gguf", adapter, "'gguf'", "merged", "peft", status=2),
    export(
        "export settings of another format",
        "adapter out --format peft --verify",
        adapter,
        "--verify",
        "--format merged",
    ),
    export(
        "export a quantised base that is none",
        "adapter out --merge-base original",
        adapter,
        "--merge-base",
        "leave it out",
    ),
    export("export a checkpoint of other names", f"{STEP} out", checkpoint(nothing), "layer.A is not in the model"),
    export("export rank 0", "adapter out --format peft --rank 0", lambda f: adapter(f), "--rank", "0"),
    evaluate("evaluate nothing", "tiny", nothing, "nothing to evaluate", "--data", "--harness"),
    evaluate("evaluate a folder that is not there", "./gone --data rows.jsonl", rows, "./gone", "no such folder"),
    evaluate(
        "evaluate an empty folder",
        "empty --data rows.jsonl",
        lambda f: (rows(f), (f / "empty").mkdir()),
        "empty",
        "config.json",
    ),
    evaluate("evaluate rows that are not there", "tiny --data rows.jsonl", nothing, "rows.jsonl", "no such file"),
    evaluate(
        "evaluate an unknown metric", "tiny --data rows.jsonl --metric rouge", rows, "'rouge'", "exact_match", status=2
    ),
    evaluate(
        "evaluate a metric of classifiers",
        "tiny --data rows.jsonl --metric f1",
        rows,
        "--metric f1",
        "a language model",
        "exact_match",
    ),
    evaluate("evaluate a temperature below 0", "tiny --data rows.jsonl --temperature -1", rows, "temperature", "-1"),
    evaluate("evaluate a batch of none", "tiny --data rows.jsonl --batch-size 0", rows, "batch", "0"),
    evaluate(
        "evaluate a damaged adapter",
        "adapter --data rows.jsonl",
        lambda f: (rows(f), cut(adapter(f) / "adapter_model.safetensors")),
        "adapter",
        "adapter_model.safetensors has",
    ),
    evaluate(
        "evaluate to a folder",
        "tiny --data rows.jsonl --output out --max-new-tokens 1",
        lambda f: (rows(f), (f / "out").mkdir()),
        "--output",
        "out",
        "folder",
    ),
    evaluate(
        "evaluate to below a file", "tiny --data rows.jsonl --output rows.jsonl/x.json", rows, "--output", "rows.jsonl"
    ),
    evaluate(
        "evaluate a run whose config is broken",
        "runs/a --data rows.jsonl",
        lambda f: (rows(f), write("runs/a/config.json", "{")(f)),
        "runs/a/config.json",
    ),
    evaluate("evaluate a length of 1", "tiny --data rows.jsonl --max-length 1", rows, "max_length", "2"),
    evaluate("unmerged model", "tiny --data rows.jsonl --unmerged", rows, "--unmerged", "tiny is a model"),
]
