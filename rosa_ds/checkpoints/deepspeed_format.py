"""DeepSpeed's own sharded checkpoints: written beside ours for other tools, and read where only they are left.

``deepspeed/global_step12/`` holds DeepSpeed's files of every rank without the frozen base. What DeepSpeed does not keep
(positions, which are frozen too, and where the run was) goes with them as client state. Reading puts the shards of any
number of ranks together again, so that any other number can go on.
"""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rosa_ds import distributed
from rosa_ds.checkpoints.checkpoint import FORMAT_VERSION, PARTS, Checkpoint
from rosa_ds.checkpoints.step_folders import StepFolders
from rosa_ds.utils.files import MANIFEST, manifest_problem, sync_folder, write_manifest
from rosa_ds.zero.files import classes_in_files
from rosa_ds.zero.trained_state import TrainedState

logger = logging.getLogger(__name__)
FOLDER = "deepspeed"
CLIENT_KEY = "rosa_ds"
_PREFIX = "global_step"
_OPTIM = re.compile(r"zero_pp_rank_(\d+)_mp_rank_00_optim_states\.pt$")


def write(
    engine: Any, run: Path, saved: Checkpoint, positions: Mapping[str, Tensor], state: TrainedState, keep: int
) -> Path:
    """Write DeepSpeed's files of this step with all ranks, then delete all but the ``keep`` newest.

    Args:
        positions: whole, on the first rank.
    """
    plain = {field.name: getattr(saved, field.name) for field in dataclasses.fields(saved) if field.name not in PARTS}
    client = {"format_version": FORMAT_VERSION, "state": plain, "groups": state.stored_order()}
    if distributed.is_main():
        client["positions"] = dict(positions)
    steps = _folders(run)
    temporary = steps.partial(saved.step)
    with distributed.together():
        if distributed.is_main():
            steps.clean()
    try:
        engine.save_checkpoint(
            str(steps.folder),
            tag=temporary.name,
            client_state={CLIENT_KEY: client},
            save_latest=False,
            exclude_frozen_parameters=True,
        )
    except RuntimeError as error:  # torch's of a full disk
        raise OSError(f"{temporary} cannot be written: {error}") from error
    with distributed.together():
        if distributed.is_main():
            write_manifest(temporary)
            sync_folder(temporary)
            steps.complete(saved.step)
            steps.prune(saved.step, keep)
    return steps.path(saved.step)


def _folders(run: Path) -> StepFolders:
    return StepFolders(run / FOLDER, _PREFIX)


def _all_folders(run: Path) -> tuple[StepFolders, StepFolders]:
    """Where a run's may lie: in ``deepspeed/``, as we write them, or in the run's folder itself, as DeepSpeed does."""
    return _folders(run), StepFolders(run, _PREFIX)


def is_checkpoint(folder: Path) -> bool:
    """Is this a folder of DeepSpeed's, whole or not?"""
    return folder.name.startswith(_PREFIX) and folder.is_dir()


def run_of(folder: Path) -> Path:
    """The run's folder that one of its checkpoints lies in."""
    return folder.parent.parent if folder.parent.name == FOLDER else folder.parent


def set_aside_later(run: Path, step: int) -> list[Path]:
    """As :meth:`rosa_ds.checkpoints.step_folders.StepFolders.set_aside_later`."""
    return [path for folders in _all_folders(run) for path in folders.set_aside_later(step)]


def problem_of(folder: Path) -> str | None:
    """What is wrong with a checkpoint by its manifest; without one, which only ours have, its files are taken unchecked."""
    if (folder / MANIFEST).exists():
        return manifest_problem(folder)
    logger.warning("%s has no manifest: its files are used unchecked", folder)
    return None


def find(run: Path, wanted: str) -> Path | None:
    """The checkpoint to resume from: ``wanted`` itself, or the newest good one of the run, or of the run ``wanted``.

    Raises: ValueError if the wanted one is damaged.
    """
    path = Path(wanted) if wanted else run
    if is_checkpoint(path):
        if problem := problem_of(path):
            raise ValueError(f"--resume {path}: {problem}; use another checkpoint of the run")
        return path
    good = [found for folders in _all_folders(path) if (found := folders.newest_good(problem_of)) is not None]
    return max(good, key=lambda found: int(found.name.removeprefix(_PREFIX)), default=None)


def _load(path: Path) -> dict[str, Any]:
    try:
        with torch.serialization.safe_globals(classes_in_files()):
            content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler of a damaged file raises nearly anything
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path} is damaged, or holds what a checkpoint of DeepSpeed's does not: {reason}") from None
    return content


def read(folder: Path) -> Checkpoint:
    """Put the shards of all ranks together.

    Raises: ValueError for files that are missing, damaged or not written by a run of ours.
    """
    models = sorted(folder.glob("*mp_rank_00_model_states.pt"))
    if not models:
        raise ValueError(f"{folder} holds no *_model_states.pt: it is no checkpoint of DeepSpeed's")
    model = _load(models[0])
    if CLIENT_KEY not in model:
        raise ValueError(f"{folder} was not written by a run of rosa_ds: masks and the run's settings are not in it")
    client = model[CLIENT_KEY]
    if (version := client.get("format_version")) != FORMAT_VERSION:
        raise ValueError(
            f"{folder} has format {version}, this rosa_ds reads {FORMAT_VERSION}: go on with the one that wrote it"
        )
    shards = _shards(folder)
    groups: dict[str, dict[str, tuple[int, ...]]] = client["groups"]
    try:
        trained, moments = _divided(shards, groups) if shards else _undivided(model, groups)
    except (KeyError, TypeError, AttributeError, IndexError, RuntimeError) as error:
        raise ValueError(
            f"{folder} is laid out in a way that is not read here ({error!r}): files are missing, or another of DeepSpeed's "
            "optimizers wrote it"
        ) from None
    return Checkpoint(
        **client["state"],
        trained=trained,
        moments=moments,
        positions=client.get("positions", {}),
        collected={},
        base_changes={},
    )


def _shards(folder: Path) -> list[dict[str, Any]]:
    """The optimizer's part of every rank, in order. Raises: ValueError if one is missing."""
    files = {int(found[1]): path for path in folder.glob("*_optim_states.pt") if (found := _OPTIM.search(path.name))}
    shards = [_load(files[rank])["optimizer_state_dict"] for rank in sorted(files)]
    for shard in shards:
        count = shard["partition_count"]
        ranks = max(count) if isinstance(count, list) else count
        if sorted(files) != list(range(ranks)):
            raise ValueError(f"{folder} was written by {ranks} ranks, and the files of ranks {sorted(files)} are there")
    return shards


Parts = tuple[dict[str, Tensor], dict[str, Tensor]]
"""Masters by parameter name, moments by ``"parameter/key"``."""


def _undivided(model: Mapping[str, Any], groups: Mapping[str, Mapping[str, tuple[int, ...]]]) -> Parts:
    """Stage 0: in 16 bits with masters of its own, else the model's tensors are the masters."""
    optimizer = model["optimizer"]
    names = [name for group in groups.values() for name in group]
    masters = optimizer.get("fp32_groups")
    flat = [master for group in masters for master in group] if masters else [model["module"][name] for name in names]
    trained = {name: tensor.float() for name, tensor in zip(names, flat, strict=True)}
    states = optimizer.get("optimizer_state_dict", optimizer)["state"]
    by_name = {name: states.get(index, {}) for index, name in enumerate(names)}
    moments = {f"{n}/{key}": t for n, state in by_name.items() for key, t in state.items() if t.ndim}
    return trained, moments


def _divided(shards: list[dict[str, Any]], groups: Mapping[str, Mapping[str, tuple[int, ...]]]) -> Parts:
    """Stages 1 to 3. Flat vectors of every rank: the masters, and each of the optimizer's moments."""
    partitioned = "fp32_flat_groups" in shards[0]  # stage 3
    masters = "fp32_flat_groups" if partitioned else "single_partition_of_fp32_groups"
    inner = [shard["optimizer_state_dict" if partitioned else "base_optimizer_state"]["state"] for shard in shards]
    keys = sorted({key for state in inner[0].values() for key, value in state.items() if value.ndim})
    put = _join_shares if partitioned else _join_groups
    paddings = shards[0].get("param_alignment_paddings")
    trained = put([shard[masters] for shard in shards], groups, paddings)
    moments: dict[str, Tensor] = {}
    for key in keys:
        vectors = [[state[index][key] for index in sorted(state)] for state in inner]
        moments |= {f"{name}/{key}": tensor for name, tensor in put(vectors, groups, paddings).items()}
    return trained, moments


def _join_groups(
    ranks: list[list[Tensor]], groups: Mapping[str, Mapping[str, tuple[int, ...]]], paddings: list[list[int]] | None
) -> dict[str, Tensor]:
    """Stages 1 and 2: the ranks' vectors of a group one after another are its parameters one after another."""
    result: dict[str, Tensor] = {}
    for number, members in enumerate(groups.values()):
        whole, start = torch.cat([vectors[number].float() for vectors in ranks]), 0
        for index, (name, shape) in enumerate(members.items()):
            numel = torch.Size(shape).numel()
            result[name] = whole[start : start + numel].view(shape)
            start += numel + (paddings[number][index] if paddings else 0)
    return result


def _join_shares(
    ranks: list[list[Tensor]], groups: Mapping[str, Mapping[str, tuple[int, ...]]], paddings: object
) -> dict[str, Tensor]:
    """Stage 3: each rank's vectors one after another are its shares of all parameters, the last ranks' padded."""
    flat = [torch.cat([vector.float() for vector in vectors]) for vectors in ranks]
    result: dict[str, Tensor] = {}
    start = 0
    shapes: Iterable[tuple[str, tuple[int, ...]]] = ((n, s) for members in groups.values() for n, s in members.items())
    for name, shape in shapes:
        numel = torch.Size(shape).numel()
        share = -(-numel // len(flat))
        result[name] = torch.cat([vector[start : start + share] for vector in flat])[:numel].view(shape)
        start += share
    return result
