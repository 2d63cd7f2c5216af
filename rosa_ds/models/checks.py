"""Whether the numbers of a base, or of what is trained, are finite, and how much rounding changes what a model says."""

from __future__ import annotations

import torch
from torch import Tensor

_ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-2}
"""Of the logits' standard deviation: more than the order of a sum makes of it, less than a token that is seen."""


def rounding_of(logits: Tensor) -> float:
    """How far logits of a model may lie from those that the same numbers give in another order of sums."""
    return _ROUNDING.get(logits.dtype, 1e-4) * float(logits.float().std())


def distances(first: Tensor, second: Tensor) -> Tensor:
    """The largest difference of logits at each position, float32. Shapes: both (..., V); result (...)."""
    return (first.float() - second.float()).abs().amax(dim=-1)


def is_finite(tensor: Tensor) -> bool:
    """Whether no number of a tensor is infinite or NaN: a sum first, which reads it once and keeps nothing."""
    return bool(tensor.sum(dtype=torch.float64).isfinite()) or bool(tensor.isfinite().all())


def not_finite(name: str, base: str) -> ValueError:
    return ValueError(
        f"model.name_or_path {base!r}: {name} is not finite (it has NaN or infinite numbers): the file is damaged, or what trained it "
        "has diverged; get the base again"
    )
