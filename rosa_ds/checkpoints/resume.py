"""A run that goes on: from which checkpoint, what may have changed, and what must be as before."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rosa_ds import distributed
from rosa_ds.checkpoints import checkpoint, deepspeed_format
from rosa_ds.checkpoints.checkpoint import Checkpoint, Identity
from rosa_ds.config.schema import RunConfig

logger = logging.getLogger(__name__)

# Settings that a resumed run may change: they do not change what the run computes, beyond rounding.
MAY_CHANGE = frozenset(
    {
        "training.output_dir",
        "training.logging_steps",
        "training.eval_steps",
        "training.eval_batch_size",
        "training.save_steps",
        "training.keep_checkpoints",
        "training.tensorboard",
        "training.gradient_checkpointing",
        "training.deterministic",
        "training.compile",
        "training.loss_block",
        "training.stall_minutes",
        "training.timeout_minutes",
        "training.max_bad_steps",
        "checkpoint.format",
        "adapter.partition_positions",
        "mask.device_memory_gib",
        "data.eval",
        "data.batching",
        "data.workers",
        "data.template_clock",  # if it changes an example, that is told
        "model.attn_implementation",
        "model.name_or_path",
        "model.revision",
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


def check_resumable(saved: Checkpoint, identity: Identity) -> None:
    """Raise ValueError unless the run can go on under these settings, naming what changed."""
    # a setting that came later had its default then
    old, new = _flatten(RunConfig().model_dump()) | _flatten(saved.config), _flatten(identity.config)
    changed = [name for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]
    # another method has other defaults, too: it is what was meant to change
    refused = sorted((name for name in changed if name not in MAY_CHANGE), key=lambda name: name != "method")
    if new.get("training.max_steps") is not None and old.get("training.max_steps") is not None:
        refused = [name for name in refused if name != "training.epochs"]  # it has no effect
    if refused:
        name = refused[0]
        raise ValueError(
            f"--resume: {name} was {old.get(name)!r} and is {new.get(name)!r} now: set it back, or start a new run, which may begin "
            f"with what this one has learnt (--adapter.init_from RUN) (changed: {', '.join(refused)})"
        )
    if saved.batch_size != identity.batch_size:
        raise ValueError(
            f"--resume: train_batch_size was {saved.batch_size} and is {identity.batch_size} now: set it back (--ds.train_batch_size "
            f"{saved.batch_size} --ds.gradient_accumulation_steps auto; micro-batch size and number of ranks may change)"
        )
    if saved.base["hash"] != identity.base["hash"]:
        raise ValueError(
            f"--resume: the weights of {identity.base['name_or_path']} are not those that the run began with "
            f"({saved.base['name_or_path']}): give the same base"
        )
    if saved.data != identity.data:
        showed, shows = old.get("data.template_clock"), new.get("data.template_clock")
        clock = ""
        if showed is None and shows is not None:
            clock = (
                "; their chat template writes the date, and the run has not kept which: give it as data.template_clock"
            )
        elif showed != shows:
            clock = f", and leave data.template_clock as it was, {showed}"
        raise ValueError(
            f"--resume: the examples of data.train are not those that the run began with: give the same data{clock}"
        )


def run_of(found: Path) -> Path:
    """The run's folder that a checkpoint, ours or DeepSpeed's, lies in."""
    return deepspeed_format.run_of(found) if deepspeed_format.is_checkpoint(found) else found.parent.parent


def _find_checkpoint(run: Path, wanted: str) -> Path:
    """One of ours, or where none is whole DeepSpeed's newest. Raises: ValueError if there is neither."""
    path = Path(wanted) if wanted else run
    try:
        return checkpoint.find(run, wanted)
    except ValueError:
        theirs = None if checkpoint.is_checkpoint(path) else deepspeed_format.find(run, wanted)
        if theirs is None:
            raise
        return theirs


def read_checkpoint(settings: RunConfig, wanted: str) -> tuple[Path, Checkpoint]:
    """The checkpoint to go on from. The first rank looks for it and checks all files; the others take its word."""
    found: Path | None = None
    begun = time.monotonic()
    with distributed.together():
        if distributed.is_main():
            found = _find_checkpoint(Path(settings.training.output_dir), wanted)
    source: Path = distributed.gather_objects(found)[0]
    with distributed.together():
        if not source.is_dir():
            raise ValueError(f"--resume: this rank does not see {source}: is the file system shared?")
        saved = deepspeed_format.read(source) if deepspeed_format.is_checkpoint(source) else checkpoint.load(source)
    logger.info("resuming from %s, step %d (checked in %.2f s)", source, saved.step, time.monotonic() - begun)
    return source, saved
