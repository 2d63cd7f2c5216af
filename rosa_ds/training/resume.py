"""What a resumed run may change, and what it must have as before."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rosa_ds.config import RunConfig
from rosa_ds.training.checkpoint import Checkpoint

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
            "training.timeout_minutes",
            "training.max_bad_steps",
            "checkpoint.format",
            "adapter.partition_positions",
            "mask.device_memory_gib",
        ),
        *("data.eval", "data.batching", "model.attn_implementation", "model.name_or_path", "model.revision"),
    }
)


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
    # a setting that came later had its default then
    old, new = _flatten(RunConfig().model_dump()) | _flatten(checkpoint.config), _flatten(config)
    changed = [name for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]
    # another method has other defaults, too: it is what was meant to change
    refused = sorted((name for name in changed if name not in MAY_CHANGE), key=lambda name: name != "method")
    if refused:
        name = refused[0]
        raise ValueError(
            f"--resume: {name} was {old.get(name)!r} and is {new.get(name)!r} now: set it back, or start a new run "
            f"(changed: {', '.join(refused)})"
        )
    if checkpoint.batch_size != batch_size:
        raise ValueError(
            f"--resume: train_batch_size was {checkpoint.batch_size} and is {batch_size} now: set it back (--ds.train_batch_size "
            f"{checkpoint.batch_size} --ds.gradient_accumulation_steps auto; micro-batch size and number of ranks may change)"
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
