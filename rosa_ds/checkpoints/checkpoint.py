"""Checkpoints that know nothing of ranks or ZeRO stages: safetensors and JSON, complete or not there.

``checkpoints/step-000100/`` holds ``PART-RANK.safetensors`` of the parts in :data:`PARTS`, each with what that rank wrote,
``state.json``, and ``manifest.json`` with the size and hash of each file. The frozen base is never in it; what draws have
made of it is, written once and linked by the checkpoints up to the next draw. All ranks write
into a temporary folder at once; when everything is on the disk it is renamed; ``checkpoints/latest`` is written last.
"""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from rosa_ds import distributed
from rosa_ds.checkpoints.step_folders import StepFolders
from rosa_ds.utils.files import (
    Entries,
    TensorFiles,
    describe_files,
    link_file,
    manifest_problem,
    read_manifest,
    sync_files,
    write_json,
    write_manifest,
    write_tensors,
)
from rosa_ds.utils.json_files import read_json
from rosa_ds.utils.suggest import did_you_mean_path

FORMAT_VERSION = 2
PARTS = ("trained", "moments", "positions", "collected", "base_changes")


@dataclasses.dataclass(frozen=True)
class SavedBase:
    """A checkpoint's files of a base that training changed; ``files`` as its manifest has them."""

    folder: Path
    files: Entries

    @classmethod
    def of(cls, folder: Path) -> SavedBase:
        """Raises: ValueError for a damaged manifest."""
        return cls(folder, base_files(folder))

    def is_there(self) -> bool:
        """Whether these files are still those that the folder has: another run may have taken its name."""
        try:
            return base_files(self.folder) == self.files
        except ValueError:
            return False


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
        drift: of the base, by :class:`rosa_ds.methods.subspace.Drawing`.
        extra: what other methods keep, as JSON by their names.
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
    drift: float = 0.0
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def release(self) -> None:
        """Let go of the tensors and the files that they are read from."""
        for part in PARTS:
            tensors = getattr(self, part)
            tensors.close() if isinstance(tensors, TensorFiles) else tensors.clear()


@dataclasses.dataclass(frozen=True)
class Identity:
    """What a resumed run must have again.

    Attributes:
        config: the resolved settings, and under ``deepspeed`` what its file adds to them.
        batch_size: examples of an optimizer step.
        base: name and hash of the base; ``data``: digest of the tokenised examples.
    """

    config: Mapping[str, Any]
    batch_size: int
    base: Mapping[str, Any]
    data: str


@dataclasses.dataclass(frozen=True)
class MethodState:
    """What a checkpoint has of a method.

    Attributes:
        fields: fields of :class:`Checkpoint`; a method without one of its own has an entry of ``extra``.
        same_base: an earlier checkpoint whose changed base this one has, too: its files are linked and not written again.
        not_for_deepspeed: what DeepSpeed's own files have no place for, so that none are written; empty where they have all.
    """

    fields: dict[str, Any]
    same_base: SavedBase | None = None
    not_for_deepspeed: str = ""


_PLAIN = tuple(field.name for field in dataclasses.fields(Checkpoint) if field.name not in PARTS)


def folders(run: Path) -> StepFolders:
    """The checkpoints of a run."""
    return StepFolders(run / "checkpoints", "step-", digits=6)


def save(run: Path, checkpoint: Checkpoint, keep: int, same_base: SavedBase | None = None) -> tuple[Path, int, float]:
    """Write a checkpoint together with all ranks, then delete all but the ``keep`` newest.

    Args:
        same_base: of another checkpoint, which this one has, too: its files are linked and not written again.

    Returns: its folder, the bytes of what was written and the manifest lists, and the seconds it took.
    Raises: OSError on the rank where writing failed, RunError on the others; the run's older checkpoints are then as
        they were.
    """
    start = time.monotonic()
    steps, step = folders(run), checkpoint.step
    temporary, main = steps.partial(step), distributed.is_main()
    linked: Entries = same_base.files if same_base is not None else {}
    try:
        with distributed.together():
            if main:
                steps.clean()
                temporary.mkdir(parents=True)
                for name in linked:
                    assert same_base is not None
                    link_file(same_base.folder / name, temporary / name)
        written = []
        with distributed.together():
            for part in PARTS:
                distributed.progress(f"writing {part} of step {step}")
                if tensors := getattr(checkpoint, part):
                    written.append(temporary / f"{part}-{distributed.rank():05d}.safetensors")
                    write_tensors(written[-1], tensors)
            sync_files(written)
            mine = describe_files(written)
        distributed.progress(f"completing step {step}")
        entries = {name: entry for part in distributed.gather_objects(mine) for name, entry in part.items()} | linked
        with distributed.together():
            if main:
                state = {name: getattr(checkpoint, name) for name in _PLAIN}
                if not state["extra"]:
                    del state["extra"]  # readers of this format that do not know it have nothing to miss
                write_json(temporary / "state.json", {"format_version": FORMAT_VERSION, **state})
                entries |= describe_files([temporary / "state.json"])
                write_manifest(temporary, dict(sorted(entries.items())))
                sync_files([temporary])
                steps.complete(step)
    except BaseException as error:
        if main:
            shutil.rmtree(temporary, ignore_errors=True)
        if not isinstance(error, OSError):
            raise
        raise OSError(
            f"the checkpoint of step {step} is not written: {error}; earlier ones are whole: make room in {run}, and go on with --resume"
        ) from error
    with distributed.together():
        if main:
            steps.prune(step, keep)
    size = sum(entry["bytes"] for name, entry in entries.items() if name not in linked)
    return steps.path(step), size, time.monotonic() - start


def base_files(folder: Path) -> Entries:
    """What a checkpoint's manifest says of the files of its changed base. Raises: ValueError for a damaged manifest."""
    return {name: entry for name, entry in read_manifest(folder).items() if name.startswith("base_changes-")}


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
    if wanted and not path.exists():
        raise ValueError(f"--resume {path}: no such folder.{did_you_mean_path(path)}")
    if is_checkpoint(path):
        if problem := manifest_problem(path):
            raise ValueError(f"--resume {path}: {problem}; use another checkpoint of the run")
        return path
    steps = folders(path)
    if (good := steps.newest_good()) is not None:
        return good
    what = "no whole checkpoint" if steps.found() else "no checkpoint"
    raise ValueError(f"--resume: {path} holds {what}: start without --resume, or give a checkpoint's folder")


def load(folder: Path) -> Checkpoint:
    """Open a checkpoint whose manifest is good. Raises ValueError for another format version."""
    state = read_json(folder / "state.json")
    version = state.pop("format_version", None)
    if version != FORMAT_VERSION or (set(state) - set(_PLAIN)):
        more = f" with {', '.join(sorted(set(state) - set(_PLAIN)))}" if version == FORMAT_VERSION else ""
        newer = more or (isinstance(version, int) and version > FORMAT_VERSION)
        raise ValueError(
            f"{folder} has format {version}{more}, this rosa_ds reads {FORMAT_VERSION}: it was written by "
            + ("a newer one, update this one (pip install -U rosa-ds)" if newer else "an older one, go on with that")
        )
    names = sorted(read_manifest(folder))
    parts: dict[str, Any] = {
        part: TensorFiles(folder / name for name in names if name.startswith(f"{part}-")) for part in PARTS
    }
    return Checkpoint(**state, **parts)
