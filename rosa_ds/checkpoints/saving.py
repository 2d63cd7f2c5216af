"""The state of a run as a checkpoint: ours, and DeepSpeed's beside it where that is wanted."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from rosa_ds import distributed, zero
from rosa_ds.adapters.state import known_positions
from rosa_ds.checkpoints import checkpoint, deepspeed_format
from rosa_ds.checkpoints.checkpoint import Checkpoint, Identity, MethodState
from rosa_ds.models.checks import is_finite
from rosa_ds.utils.errors import RunError
from rosa_ds.zero.trained_state import TrainedState

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Progress:
    """Where a run is between two steps: ``step`` and ``phase`` are of the next one."""

    step: int
    phase: str
    trained_tokens: int
    evaluation_due: bool


def save_state(
    run: Path,
    engine: Any,
    model: nn.Module,
    state: TrainedState,
    methods: Sequence[MethodState],
    progress: Progress,
    identity: Identity,
    keep: int,
    for_deepspeed: bool,
) -> tuple[Path, dict[str, Any]]:
    """Write a checkpoint with all ranks, each what it owns of the trained parameters, moments and positions.

    Args:
        run: the run's folder.
        keep: how many checkpoints stay.
        for_deepspeed: write DeepSpeed's own files, too.

    Returns: the checkpoint's folder, and what metrics.jsonl says of it.
    Raises: as :func:`rosa_ds.checkpoints.checkpoint.save`; RunError for a state that is not finite.
    """
    positions = known_positions(model)
    sizes = {name: zero.full_numel(tensor) for name, tensor in {**state.parameters, **positions}.items()}
    owners = distributed.owners_by_cost(sizes, distributed.world_size())
    moments, scalars = state.read_optimizer(owners)
    fields: dict[str, Any] = {"collected": {}, "base_changes": {}, "collected_steps": 0}
    extra: dict[str, Any] = {}
    for method in methods:
        fields |= method.fields
        extra |= method.fields.get("extra", {})
    content = Checkpoint(
        **dataclasses.asdict(progress),
        **{**fields, "extra": extra},
        trained=state.read(owners),
        moments=moments,
        positions=zero.read_to_owners(positions, owners),
        optimizer_scalars=scalars,
        loss_scaler=state.read_scaler(),
        config=identity.config,
        batch_size=identity.batch_size,
        base=identity.base,
        data=identity.data,
    )
    _check_finite(run, content)
    same_base = next((method.same_base for method in methods if method.same_base is not None), None)
    folder, size, seconds = checkpoint.save(run, content, keep, same_base)
    logger.info("saved %s: %.1f MiB, %.1f s", folder, size / 2**20, seconds)
    if for_deepspeed:
        if left_out := [method.not_for_deepspeed for method in methods if method.not_for_deepspeed]:
            logger.info("DeepSpeed's files have no place for %s: none are written", left_out[0])
        else:
            whole: Mapping[str, Tensor] = zero.read_to_owners(positions)
            logger.info("wrote %s", deepspeed_format.write(engine, run, content, whole, state, keep))
    return folder, {"folder": folder.name, "bytes": size, "seconds": seconds}


def _check_finite(run: Path, state: Checkpoint) -> None:
    """A state that is not finite must not take the place of the good ones. Collective."""
    parts = (*state.trained.items(), *state.moments.items())
    bad = next((name for name, tensor in parts if not is_finite(tensor)), None)
    if not distributed.any_rank(bad is not None):
        return
    newest = next(iter(checkpoint.folders(run).found()), None)
    raise RunError(
        f"{bad or 'a parameter on another rank'} is not finite after step {state.step}, so nothing is saved: lower the learning "
        f"rates, or train in bf16 or fp32; the last good checkpoint is {newest or 'none'}"
    )
