"""Checkpoints that know nothing of ranks or ZeRO stages: safetensors and JSON, complete or not there.

``checkpoints/step-000100/`` holds ``PART-RANK.safetensors`` of the parts in :data:`PARTS`, each with what that rank wrote,
``state.json``, and ``manifest.json`` with the size and hash of each file. The frozen base is never in it. All ranks write
into a temporary folder at once; when everything is on the disk it is renamed; ``checkpoints/latest`` is written last.
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
    Entries,
    TensorFiles,
    describe_files,
    manifest_problem,
    move_aside,
    read_manifest,
    sync_files,
    write_json,
    write_manifest,
    write_tensors,
    write_text,
)

FORMAT_VERSION = 2
PARTS = ("trained", "moments", "positions", "collected", "base_changes")
logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """The state of a run between two steps.

    The tensors are, when it is saved, those that this rank writes, each name on one rank; when it is loaded, those of all
    ranks, read from the disk when they are asked for.

    Attributes:
        step: number of the next step; ``phase``: what that step does.
        trained: float32 masters by parameter name; moments: ``"parameter/key"``; positions: by weight name.
        collected: sums of gradients for the mask, by layer name, between two collect steps.
        base_changes: what training has changed in the base, which is not in a checkpoint itself.
        evaluation_due: the evaluation that belongs to this step was not done yet.
    """

    step: int
    phase: str
    trained: Mapping[str, Tensor]
    moments: Mapping[str, Tensor]
    positions: Mapping[str, Tensor]
    collected: Mapping[str, Tensor]
    base_changes: Mapping[str, Tensor]
    collected_steps: int
    optimizer_scalars: Mapping[str, Mapping[str, float]]
    loss_scaler: Mapping[str, float]
    trained_tokens: int
    evaluation_due: bool
    config: Mapping[str, Any]
    batch_size: int
    base: Mapping[str, Any]
    data: str

    def release(self) -> None:
        """Let go of the tensors and the files that they are read from."""
        for part in PARTS:
            tensors = getattr(self, part)
            tensors.close() if isinstance(tensors, TensorFiles) else tensors.clear()


_PLAIN = tuple(field.name for field in dataclasses.fields(Checkpoint) if field.name not in PARTS)


def checkpoints_folder(run: Path) -> Path:
    return run / "checkpoints"


def _name(step: int) -> str:
    return f"step-{step:06d}"


def save(run: Path, checkpoint: Checkpoint, keep: int) -> tuple[Path, int, float]:
    """Write a checkpoint together with all ranks, then delete all but the ``keep`` newest.

    Returns: its folder, the bytes of what the manifest lists, and the seconds it took.
    Raises: OSError on the rank where writing failed, RunError on the others; the run's older checkpoints are then as
        they were.
    """
    start = time.monotonic()
    folder = checkpoints_folder(run) / _name(checkpoint.step)
    temporary = folder.with_name(f".{folder.name}.partial")
    main = distributed.is_main()
    try:
        with distributed.together():
            if main:
                _clean(folder.parent)
                temporary.mkdir(parents=True)
        with distributed.together():
            mine = _write_parts(temporary, checkpoint)
        distributed.progress(f"completing {folder.name}")
        entries = {name: entry for part in distributed.gather_objects(mine) for name, entry in part.items()}
        with distributed.together():
            if main:
                _complete(temporary, folder, checkpoint, entries)
    except BaseException:
        if main:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    with distributed.together():
        if main:
            older = [path for path in complete_folders(run) if _step_of(path) < checkpoint.step]
            for path in older[keep - 1 :]:
                _discard(path)
    size = sum(entry["bytes"] for entry in entries.values())
    return folder, size, time.monotonic() - start


def _write_parts(folder: Path, checkpoint: Checkpoint) -> Entries:
    """This rank's files, on the disk; what the manifest says of them."""
    written = []
    for part in PARTS:
        distributed.progress(f"writing {part} of step {checkpoint.step}")
        if tensors := getattr(checkpoint, part):
            written.append(folder / f"{part}-{distributed.rank():05d}.safetensors")
            write_tensors(written[-1], tensors)
    sync_files(written)
    return describe_files(written)


def _complete(temporary: Path, folder: Path, checkpoint: Checkpoint, entries: Entries) -> None:
    """The files that are written once, and the new name. An older checkpoint of the same step goes only then."""
    state = {name: getattr(checkpoint, name) for name in _PLAIN}
    write_json(temporary / "state.json", {"format_version": FORMAT_VERSION, **state})
    entries |= describe_files([temporary / "state.json"])
    write_manifest(temporary, dict(sorted(entries.items())))
    sync_files([temporary])
    hidden = _hidden(folder)
    if folder.exists():
        folder.rename(hidden)
    temporary.rename(folder)
    sync_files([folder.parent])
    if hidden.exists():
        _delete(hidden)
    write_text(folder.parent / "latest", folder.name + "\n")


def _hidden(path: Path) -> Path:
    return path.with_name(f".{path.name}.discarded")


def _delete(path: Path) -> None:
    """Delete a folder that nobody needs; that it cannot be is no reason to end a run."""
    try:
        shutil.rmtree(path)
    except OSError as error:
        logger.warning("%s cannot be deleted: %s", path, error)


def _discard(path: Path) -> None:
    """Delete a folder; one that is half deleted does not have its name any more."""
    _delete(path.rename(_hidden(path)))


def _take_back(folder: Path) -> None:
    """Between two renames a checkpoint that was saved again has no name: give it its own back."""
    for hidden in folder.glob(".step-*.discarded"):
        path = hidden.with_name(hidden.name[1:].removesuffix(".discarded"))
        if not path.exists() and manifest_problem(hidden) is None:
            hidden.rename(path)


def _clean(folder: Path) -> None:
    """Remove what interrupted savings have left."""
    _take_back(folder)
    for pattern in (".step-*.partial", ".step-*.discarded"):
        for path in folder.glob(pattern):
            _delete(path)


def _step_of(path: Path) -> int:
    return int(path.name[5:])


def abandon(path: Path) -> Path:
    """Rename a checkpoint so that no run goes on from it."""
    target = path.with_name(f"abandoned-{path.name}")
    if target.exists():
        move_aside(target)
    return path.rename(target)


def set_aside_later(run: Path, step: int) -> list[Path]:
    """Rename checkpoints of steps that a resumed run will do again, so that they are not taken for its own."""
    later = [path for path in complete_folders(run) if _step_of(path) > step]
    return [abandon(path) for path in later]


def complete_folders(run: Path) -> list[Path]:
    """Folders of finished checkpoints, newest first."""
    folders = (path for path in checkpoints_folder(run).glob("step-*") if path.name[5:].isdecimal())
    return sorted(folders, key=_step_of, reverse=True)


def is_checkpoint(path: Path) -> bool:
    """Is this the folder of one of our checkpoints, whole or not?"""
    return (path / "state.json").is_file()


def find(run: Path, wanted: str) -> Path:
    """The checkpoint to resume from: ``wanted`` (a checkpoint's or a run's folder), or the newest good one of the run.

    A damaged checkpoint is passed over with a line that says what is wrong with it, unless it was asked for.

    Raises:
        ValueError: there is none, or the wanted one is damaged.
    """
    path = Path(wanted) if wanted else run
    if is_checkpoint(path):
        if problem := manifest_problem(path):
            raise ValueError(f"--resume {path}: {problem}; use another checkpoint of the run")
        return path
    _take_back(checkpoints_folder(path))
    folders = complete_folders(path)
    for folder in folders:
        problem = manifest_problem(folder)
        if problem is None:
            return folder
        logger.warning("checkpoint %s is damaged (%s), trying the one before", folder, problem)
    what = "no whole checkpoint" if folders else "no checkpoint"
    raise ValueError(f"--resume: {path} holds {what}: start without --resume, or give a checkpoint's folder")


def load(folder: Path) -> Checkpoint:
    """Open a checkpoint whose manifest is good. Raises ValueError for another format version."""
    state = json.loads((folder / "state.json").read_text())
    if state.pop("format_version", None) != FORMAT_VERSION:
        raise ValueError(f"{folder} was written by another version of rosa_ds (format {FORMAT_VERSION} is read)")
    names = sorted(read_manifest(folder))
    parts: dict[str, Any] = {
        part: TensorFiles(folder / name for name in names if name.startswith(f"{part}-")) for part in PARTS
    }
    return Checkpoint(**state, **parts)
