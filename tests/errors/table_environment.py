"""Folders that cannot be a run's, and a bad environment."""

from __future__ import annotations

import contextlib
import fcntl
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from unittest import mock

from errors.rows import Row, adapter, both, write, write_rows

rows = write_rows("rows.jsonl")


def without(package: str) -> Callable[[], AbstractContextManager[object]]:
    """A package that is not installed."""
    return lambda: mock.patch.dict(sys.modules, {package: None})


@contextlib.contextmanager
def full_disk() -> Iterator[None]:
    """No file may grow beyond 64 KiB: the system refuses it in the middle of a write, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Another run writes to runs/default."""
    Path("runs").mkdir()
    with Path("runs/.default.lock").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        stream.write("process 4711 on elsewhere")
        stream.flush()
        yield


def unwritable(folder: Path) -> None:
    (folder / "runs").write_text("a file")


ROWS = [
    Row("no disk for an export", "export", "adapter out", ("cannot be written",), adapter, around=full_disk),
    Row(
        "no disk for an adapter",
        "export",
        "adapter out --format adapter",
        ("File too large",),
        adapter,
        around=full_disk,
    ),
    Row(
        "no disk for a PEFT folder",
        "export",
        "adapter out --format peft",
        ("cannot be written",),
        adapter,
        around=full_disk,
    ),
    Row(
        "another run writes there",
        "train",
        "--data.train rows.jsonl",
        ("training.output_dir", "a run is writing there", "process 4711", "give another folder"),
        rows,
        around=held,
    ),
    Row(
        "no bitsandbytes",
        "train",
        "--data.train rows.jsonl --model.quantization nf4",
        ("model.quantization needs bitsandbytes", "pip install"),
        rows,
        around=without("bitsandbytes"),
    ),
    Row(
        "no sacrebleu",
        "eval",
        "tiny --data rows.jsonl --metric bleu",
        ("--metric bleu needs sacrebleu", "pip install"),
        rows,
        around=without("sacrebleu"),
    ),
    Row(
        "no sqlglot",
        "eval",
        "tiny --data rows.jsonl --metric sql_match",
        ("--metric sql_match needs sqlglot", "pip install"),
        rows,
        around=without("sqlglot"),
    ),
    Row("no lm-eval", "eval", "tiny --harness arc_easy", ("--harness needs", "pip install"), around=without("lm_eval")),
    Row(
        "no matplotlib",
        "compare",
        "study.json --output out",
        ("rosa-ds compare needs matplotlib", "pip install"),
        around=without("matplotlib"),
    ),
    Row(
        "no tensorboard",
        "train",
        "--data.train rows.jsonl --training.tensorboard true",
        ("training.tensorboard needs the package tensorboard", "pip install"),
        rows,
        around=without("tensorboard"),
    ),
    Row(
        "no bitsandbytes for the optimizer",
        "train",
        "--data.train rows.jsonl --config ds.json",
        ("AdamW8bit", "bitsandbytes", "pip install"),
        both(rows, write("ds.json", {"optimizer": {"type": "AdamW8bit"}})),
        around=without("bitsandbytes"),
    ),
    Row(
        "output folder is a file",
        "train",
        "--data.train rows.jsonl --training.output_dir out",
        ("training.output_dir", "out", "folder"),
        both(rows, write("out", "x")),
    ),
    Row(
        "output folder below a file",
        "train",
        "--data.train rows.jsonl",
        ("training.output_dir", "runs/default", "give another folder"),
        both(rows, unwritable),
    ),
    Row(
        "output folder is someone's",
        "train",
        "--data.train rows.jsonl --training.output_dir out",
        ("training.output_dir out", "holds no run", "give another folder"),
        both(rows, write("out/thesis.tex", "x")),
    ),
    Row(
        "output folder is the working folder",
        "train",
        "--data.train rows.jsonl --training.output_dir .",
        ("training.output_dir .", "give another folder"),
        rows,
    ),
    Row(
        "output folder cannot be made",
        "train",
        "--data.train rows.jsonl --training.output_dir /proc/runs",
        ("training.output_dir /proc/runs", "give another folder"),
        rows,
    ),
    Row(
        "output folder empty name",
        "train",
        ["--data.train", "rows.jsonl", "--training.output_dir", ""],
        ("training.output_dir",),
        rows,
    ),
    Row(
        "WORLD_SIZE without RANK",
        "train",
        "--data.train rows.jsonl",
        ("WORLD_SIZE", "RANK", "torchrun"),
        rows,
        {"WORLD_SIZE": "2"},
    ),
    Row(
        "RANK without WORLD_SIZE",
        "train",
        "--data.train rows.jsonl",
        ("RANK", "WORLD_SIZE", "torchrun"),
        rows,
        {"RANK": "1"},
    ),
    Row(
        "RANK without MASTER_ADDR",
        "train",
        "--data.train rows.jsonl",
        ("MASTER_ADDR", "torchrun"),
        rows,
        {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"},
    ),
    Row(
        "RANK is a text",
        "train",
        "--data.train rows.jsonl",
        ("RANK", "'one'", "whole number"),
        rows,
        {"RANK": "one", "WORLD_SIZE": "2"},
    ),
    Row(
        "RANK beyond WORLD_SIZE",
        "train",
        "--data.train rows.jsonl",
        ("RANK", "5", "WORLD_SIZE", "2"),
        rows,
        {"RANK": "5", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"},
    ),
    Row(
        "MASTER_PORT is a text",
        "train",
        "--data.train rows.jsonl",
        ("MASTER_PORT", "'http'"),
        rows,
        {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "http"},
    ),
    Row("WORLD_SIZE empty", "eval", "tiny --data rows.jsonl", ("WORLD_SIZE", "whole number"), rows, {"WORLD_SIZE": ""}),
    Row(
        "SLURM without a task's number",
        "train",
        "--data.train rows.jsonl",
        ("srun started 2 tasks", "torchrun"),
        rows,
        {"SLURM_STEP_NUM_TASKS": "2"},
    ),
    Row(
        "SLURM's number is a text",
        "train",
        "--data.train rows.jsonl",
        ("SLURM_STEP_NUM_TASKS", "'two'"),
        rows,
        {"SLURM_STEP_NUM_TASKS": "two"},
    ),
]
