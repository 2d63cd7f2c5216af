"""The state of a run as a checkpoint: ours, and DeepSpeed's beside it where that is wanted."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from rosa_ds import distributed, zero
from rosa_ds.adapters.mask import MaskCollector
from rosa_ds.adapters.state import known_positions
from rosa_ds.checkpoints import checkpoint, deepspeed_format
from rosa_ds.checkpoints.checkpoint import Checkpoint, SavedBase
from rosa_ds.methods.subspace_base import ChangedBase
from rosa_ds.models.checks import is_finite
from rosa_ds.training.context import Run
from rosa_ds.utils.errors import RunError

logger = logging.getLogger(__name__)


def save_state(
    run: Run, *, step: int, trained_tokens: int, evaluation_due: bool, collector: MaskCollector | None
) -> dict[str, Any]:
    """Write a checkpoint with all ranks, each what it owns of the trained parameters, moments and positions.

    Returns: what metrics.jsonl says of it. Raises: as :func:`rosa_ds.checkpoints.checkpoint.save`.
    """
    parameters, positions = run.state.parameters, known_positions(run.model)
    sizes = {name: zero.full_numel(tensor) for name, tensor in {**parameters, **positions}.items()}
    owners = distributed.owners_by_cost(sizes, distributed.world_size())
    moments, scalars = run.state.read_optimizer(owners)
    total, drawing = run.schedule.total_steps, run.drawing
    changed = drawing is not None and run.schedule.has_drawn(step)
    same_base = _saved_base(drawing.base) if drawing is not None and changed else None
    state = Checkpoint(
        step=step,
        phase=run.schedule.at(step).phase if step < total else "done",
        trained=run.state.read(owners),
        moments=moments,
        positions=zero.read_to_owners(positions, owners),
        collected=collector.totals if collector else {},
        base_changes=drawing.base.read(drawing.owners) if drawing is not None and changed and same_base is None else {},
        collected_steps=collector.steps if collector else 0,
        optimizer_scalars=scalars,
        loss_scaler=run.state.read_scaler(),
        trained_tokens=trained_tokens,
        evaluation_due=evaluation_due,
        config=run.record,
        batch_size=run.batches.batch_size,
        base=run.base,
        data=run.data_digest,
        drift=drawing.base.drift if drawing is not None else 0.0,
    )
    _check_finite(run, state)
    folder, size, seconds = checkpoint.save(run.folder, state, run.settings.training.keep_checkpoints, same_base)
    if drawing is not None and changed:
        with distributed.together():
            drawing.base.saved = SavedBase.of(folder)
    logger.info("saved %s: %.1f MiB, %.1f s", folder, size / 2**20, seconds)
    if run.settings.checkpoint.format == "deepspeed":
        _save_for_deepspeed(run, state, positions, collector is not None)
    return {"folder": folder.name, "bytes": size, "seconds": seconds}


def _saved_base(base: ChangedBase) -> SavedBase | None:
    """The checkpoint that has the base as it is now, unless somebody has deleted it. Collective."""
    saved = base.saved
    gone = saved is not None and distributed.is_main() and not saved.is_there()
    return None if distributed.any_rank(gone) else saved


def _check_finite(run: Run, state: Checkpoint) -> None:
    """A state that is not finite must not take the place of the good ones. Collective."""
    parts = (*state.trained.items(), *state.moments.items())
    bad = next((name for name, tensor in parts if not is_finite(tensor)), None)
    if not distributed.any_rank(bad is not None):
        return
    newest = next(iter(checkpoint.folders(run.folder).found()), None)
    raise RunError(
        f"{bad or 'a parameter on another rank'} is not finite after step {state.step}, so nothing is saved: lower the learning "
        f"rates, or train in bf16 or fp32; the last good checkpoint is {newest or 'none'}"
    )


def _save_for_deepspeed(run: Run, state: Checkpoint, positions: Mapping[str, Tensor], collecting: bool) -> None:
    if collecting:
        logger.info("DeepSpeed's files have no place for sums of gradients: none are written while they are collected")
        return
    whole = zero.read_to_owners(positions)
    keep = run.settings.training.keep_checkpoints
    logger.info("wrote %s", deepspeed_format.write(run.engine, run.folder, state, whole, run.state, keep))
