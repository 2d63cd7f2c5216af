"""Checkpoints that know nothing of ranks or ZeRO stages: safetensors and JSON, complete or not there.

``checkpoints/step-000100/`` holds ``trained.safetensors`` (float32 masters), ``moments.safetensors``,
``positions.safetensors`` (once the mask is known), ``collect-RANK.safetensors`` (between two collect steps),
``state.json`` and ``manifest.json`` with the size and hash of each. The frozen base is never in it. It is written to
a temporary folder, brought to disk and renamed; ``checkpoints/latest`` is written last.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from rosa_ds import distributed
from rosa_ds.files import (
    manifest_problem,
    move_aside,
    read_tensors,
    sync_folder,
    write_json,
    write_manifest,
    write_tensors,
    write_text,
)

FORMAT_VERSION = 1
logger = logging.getLogger(__name__)

# Settings that a resumed run may change: they do not change what the run computes, beyond rounding.
MAY_CHANGE = frozenset(
    {
        *("training.output_dir", "training.logging_steps", "training.eval_steps", "training.eval_batch_size"),
        *(
            "training.save_steps",
            "training.keep_checkpoints",
            "training.tensorboard",
            "training.gradient_checkpointing",
            "training.stall_minutes",
            "mask.device_memory_gib",
        ),
        *("data.eval", "data.batching", "model.attn_implementation", "model.name_or_path", "model.revision"),
    }
)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """The state of a run between two steps. ``step`` is the number of the next one."""

    step: int
    trained: Mapping[str, Tensor]
    moments: Mapping[str, Tensor]
    positions: Mapping[str, Tensor]
    collected: Mapping[str, Tensor]
    collected_steps: int
    optimizer_scalars: Mapping[str, Mapping[str, float]]
    loss_scaler: Mapping[str, float]
    trained_tokens: int
    config: Mapping[str, Any]
    batch_size: int
    base: Mapping[str, Any]
    data: str


def checkpoints_folder(run: Path) -> Path:
    return run / "checkpoints"


def _name(step: int) -> str:
    return f"step-{step:06d}"


def save(run: Path, checkpoint: Checkpoint, keep: int) -> tuple[Path, int, float]:
    """Write a checkpoint together with all ranks, then delete all but the ``keep`` newest.

    Rank 0 writes everything but the collected gradients, which each owner writes.

    Returns: its folder, its bytes (on rank 0) and the seconds it took.
    Raises: OSError on the rank where writing failed, RunError on the others; the run's older
        checkpoints are then as they were.
    """
    start = time.monotonic()
    folder = checkpoints_folder(run) / _name(checkpoint.step)
    temporary = folder.with_name(f".{folder.name}.partial")
    main = distributed.is_main()
    with distributed.together():
        if main:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
    with distributed.together():
        if checkpoint.collected:
            write_tensors(temporary / f"collect-{distributed.rank()}.safetensors", checkpoint.collected)
        if main:
            _write_parts(temporary, checkpoint)
    with distributed.together():
        if main:
            write_manifest(temporary)
            sync_folder(temporary)
            if folder.exists():
                shutil.rmtree(folder)
            temporary.rename(folder)
            write_text(folder.parent / "latest", folder.name + "\n")
            older = [path for path in complete_folders(run) if path.name < folder.name]
            for path in older[keep - 1 :]:
                shutil.rmtree(path)
    size = sum(path.stat().st_size for path in folder.iterdir()) if main else 0
    return folder, size, time.monotonic() - start


def _abandon(path: Path) -> Path:
    target = path.with_name(f"abandoned-{path.name}")
    if target.exists():
        move_aside(target)
    return path.rename(target)


def set_aside_later(run: Path, step: int) -> list[Path]:
    """Rename checkpoints of steps that a resumed run will do again, so that they are not taken for its own."""
    later = [path for path in complete_folders(run) if path.name > _name(step)]
    return [_abandon(path) for path in later]


def _write_parts(folder: Path, checkpoint: Checkpoint) -> None:
    for name in ("trained", "moments", "positions"):
        tensors = getattr(checkpoint, name)
        if tensors:
            write_tensors(folder / f"{name}.safetensors", tensors)
    plain = ("step", "collected_steps", "optimizer_scalars", "loss_scaler", "trained_tokens", "config")
    state = {name: getattr(checkpoint, name) for name in (*plain, "batch_size", "base", "data")}
    write_json(folder / "state.json", {"format_version": FORMAT_VERSION, **state})


def complete_folders(run: Path) -> list[Path]:
    """Folders of finished checkpoints, newest first."""
    return sorted(checkpoints_folder(run).glob("step-*"), reverse=True)


def find(run: Path, wanted: str) -> Path:
    """The checkpoint to resume from: ``wanted`` (a checkpoint's or a run's folder), or the newest good one of the run.

    A damaged checkpoint is passed over with a line that says what is wrong with it, unless it was asked for.

    Raises:
        ValueError: there is none, or the wanted one is damaged.
    """
    path = Path(wanted) if wanted else run
    if (path / "state.json").is_file():
        if problem := manifest_problem(path):
            raise ValueError(f"--resume {path}: {problem}; use another checkpoint of the run")
        return path
    folders = complete_folders(path)
    for folder in folders:
        problem = manifest_problem(folder)
        if problem is None:
            return folder
        logger.warning("checkpoint %s is damaged (%s), trying the one before", folder, problem)
    what = "no whole checkpoint" if folders else "no checkpoint"
    raise ValueError(f"--resume: {path} holds {what}: start without --resume, or give a checkpoint's folder")


def load(folder: Path) -> Checkpoint:
    """Read a checkpoint whose manifest is good. Raises ValueError for another format version."""
    state = json.loads((folder / "state.json").read_text())
    if state.pop("format_version") != FORMAT_VERSION:
        raise ValueError(f"{folder} was written by another version of rosa_ds (format {FORMAT_VERSION} is read)")
    parts: dict[str, Any] = {}
    for name in ("trained", "moments", "positions"):
        path = folder / f"{name}.safetensors"
        parts[name] = read_tensors(path)[0] if path.exists() else {}
    collected: dict[str, Tensor] = {}
    for path in sorted(folder.glob("collect-*.safetensors")):
        collected |= read_tensors(path)[0]
    return Checkpoint(**state, **parts, collected=collected)


def _flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and not prefix:
            flat |= _flatten(value, f"{key}.")
        else:
            flat[prefix + key] = value
    return flat


def check_resumable(
    checkpoint: Checkpoint, config: Mapping[str, Any], batch_size: int, base: Mapping[str, Any], data: str
) -> None:
    """Raise ValueError unless the run can go on under these settings, naming what changed."""
    old, new = _flatten(checkpoint.config), _flatten(config)
    changed = [name for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]
    refused = [name for name in changed if name not in MAY_CHANGE]
    if refused:
        name = refused[0]
        raise ValueError(
            f"--resume: {name} was {old.get(name)!r} and is {new.get(name)!r} now: set it back, or start a new run "
            f"(changed: {', '.join(refused)})"
        )
    if checkpoint.batch_size != batch_size:
        raise ValueError(
            f"--resume: train_batch_size was {checkpoint.batch_size} and is {batch_size} now: set it back "
            "(micro-batch size and number of ranks may change)"
        )
    if checkpoint.base["hash"] != base["hash"]:
        raise ValueError(
            f"--resume: the weights of {base['name_or_path']} are not those that the run began with "
            f"({checkpoint.base['name_or_path']}): give the same base"
        )
    if checkpoint.data != data:
        raise ValueError(
            "--resume: the examples of data.train are not those that the run began with: give the same data"
        )
