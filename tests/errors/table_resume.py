"""Bad checkpoints to go on from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file, save_file

from errors.rows import Row, base, both, change_json, cut, run, sign, write_rows

rows = write_rows("rows.jsonl")
SAME = "--data.train rows.jsonl --adapter.rank 2 --adapter.density 0.001 --resume"
SETTINGS = {"data": {"train": "rows.jsonl"}}


def nothing(folder: Path) -> None:
    """Leave it as it is."""


def resumed(name: str, change: Callable[[Path], object], *words: str, more: str = "", start: str = SAME) -> Row:
    return Row(name, "train", f"{start} {more}", words, both(rows, change))


def checkpoint(change: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda folder: change(run(folder, **SETTINGS))


def resigned(name: str, change: Callable[[Path], object]) -> Callable[[Path], object]:
    def made(folder: Path) -> None:
        change(folder / name)
        sign(folder)

    return made


STEP = "runs/default/checkpoints/step-000001"


def other_base(folder: Path) -> None:
    """The built-in model with one number changed."""
    path = base(folder) / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, path, {"format": "pt"})


ROWS = [
    resumed("resume nothing", nothing, "--resume", "runs/default", "no checkpoint", "start without --resume"),
    resumed("resume a path that is not there", nothing, "--resume", "runs/gone", "no such folder", more="runs/gone"),
    resumed("resume a file", nothing, "--resume", "rows.jsonl", "checkpoint", more="rows.jsonl"),
    resumed(
        "checkpoint cut",
        checkpoint(lambda c: cut(c / "trained-00000.safetensors")),
        "holds no whole checkpoint",
    ),
    resumed(
        "checkpoint cut, asked for",
        checkpoint(lambda c: cut(c / "trained-00000.safetensors")),
        STEP,
        "trained-00000.safetensors has",
        "use another checkpoint",
        more=STEP,
    ),
    resumed(
        "checkpoint without a file",
        checkpoint(lambda c: (c / "trained-00000.safetensors").unlink()),
        "trained-00000.safetensors is missing",
        "use another checkpoint",
        more=STEP,
    ),
    resumed(
        "checkpoint without a manifest",
        checkpoint(lambda c: (c / "manifest.json").unlink()),
        "manifest.json is missing",
        more=STEP,
    ),
    resumed(
        "checkpoint without a state",
        checkpoint(lambda c: (c / "state.json").unlink()),
        "holds no checkpoint",
        "give a checkpoint's folder",
        more=STEP,
    ),
    resumed(
        "checkpoint of another hash",
        checkpoint(lambda c: change_json(c / "state.json", step=2)),
        "state.json",
        more=STEP,
    ),
    resumed(
        "checkpoint's manifest damaged",
        checkpoint(lambda c: change_json(c / "manifest.json", sha256="0")),
        "manifest.json is damaged",
        more=STEP,
    ),
    resumed(
        "checkpoint of a newer format",
        checkpoint(resigned("state.json", lambda p: change_json(p, format_version=9))),
        "format",
        "9",
        "newer",
        "update",
    ),
    resumed(
        "checkpoint of an unknown field",
        checkpoint(resigned("state.json", lambda p: change_json(p, wings=1))),
        "step-000001",
        "wings",
    ),
    resumed(
        "checkpoint of another method",
        checkpoint(nothing),
        "method was 'robust' and is 'lora'",
        "set it back",
        more="--method lora",
        start="--data.train rows.jsonl --adapter.rank 2 --resume",
    ),
    resumed(
        "checkpoint of another rank",
        checkpoint(nothing),
        "adapter.rank was 2 and is 4",
        "set it back, or start a new run",
        start="--data.train rows.jsonl --adapter.rank 4 --adapter.density 0.001 --resume",
    ),
    resumed(
        "checkpoint of another batch",
        checkpoint(nothing),
        "train_batch_size was 16 and is 8",
        "set it back",
        more=" --ds.train_batch_size 8",
    ),
    resumed(
        "checkpoint of another model",
        both(checkpoint(nothing), other_base),
        "the weights of base",
        "give the same base",
        more=" --model.name_or_path base",
    ),
    resumed("checkpoint of other data", checkpoint(nothing), "examples of data.train", "give the same data"),
]
