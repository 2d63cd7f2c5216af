"""Where DeepSpeed keeps gradients when a step is due."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def gradient_bytes(engine: Any, model: nn.Module) -> tuple[int, int | None]:
    """Bytes of this rank's gradients, and at stage 3 of the buffers they are reduced in, which other stages have let go of."""
    optimizer = engine.optimizer
    flat = getattr(optimizer, "grad_partitions_flat_buffer", None)
    if flat is not None:  # stage 3
        return flat.nbytes, sum(bucket.buffer.nbytes for bucket in optimizer.ipg_buckets.values())
    if hasattr(optimizer, "averaged_gradients"):  # stages 1 and 2
        return sum(gradient.nbytes for gradient in averaged_gradients(optimizer)), None
    return sum(p.grad.nbytes for p in model.parameters() if p.grad is not None), None


def averaged_gradients(optimizer: Any) -> list[Tensor]:
    """What this rank will step with at stages 1 and 2; empty at others, whose gradients hang on their parameters."""
    groups = getattr(optimizer, "averaged_gradients", None) or {}
    return [gradient for group in groups.values() for gradient in group or ()]
