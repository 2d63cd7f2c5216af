"""Where DeepSpeed keeps gradients when a step is due."""

from __future__ import annotations

from typing import Any

from torch import nn


def gradient_bytes(engine: Any, model: nn.Module) -> tuple[int, int | None]:
    """Bytes of this rank's gradients, and at stage 3 of the buffers they are reduced in, which other stages have let go of."""
    optimizer = engine.optimizer
    flat = getattr(optimizer, "grad_partitions_flat_buffer", None)
    if flat is not None:  # stage 3
        return flat.nbytes, sum(bucket.buffer.nbytes for bucket in optimizer.ipg_buckets.values())
    averaged = getattr(optimizer, "averaged_gradients", None)
    if averaged is not None:  # stages 1 and 2
        return sum(t.nbytes for group in averaged.values() if group is not None for t in group), None
    return sum(p.grad.nbytes for p in model.parameters() if p.grad is not None), None
