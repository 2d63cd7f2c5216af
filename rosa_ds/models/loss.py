"""The loss: a sum over trained tokens, or classified rows, so that its mean does not depend on how a batch is split."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from rosa_ds.data.batches import IGNORE, Batch


def accepts_kept_positions(model: nn.Module) -> bool:
    """Whether the model computes logits of chosen positions alone (transformers' ``logits_to_keep``)."""
    return "logits_to_keep" in inspect.signature(model.forward).parameters


def token_loss_sum(model: Any, batch: Batch, device: torch.device, selects: bool) -> Tensor:
    """Sum of the negative log-likelihoods of a batch's targets, float32; 0 with gradients where there is no target.

    Args:
        model: the model or its DeepSpeed engine.
        selects: see :func:`accepts_kept_positions`.
    """
    return loss_of(batch.logits(model, device, selects), batch.targets.to(device))


def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum of the negative log-likelihoods of targets that are not :data:`IGNORE`, float32.

    Shapes: logits (B, K, classes); targets (B, K) int64.
    """
    return nn.functional.cross_entropy(
        logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORE, reduction="sum"
    )


def losses_of(logits: Tensor, targets: Tensor) -> Tensor:
    """The negative log-likelihood of every target, float32 (B, K), 0 where it is :data:`IGNORE`. Shapes as :func:`loss_of`."""
    return nn.functional.cross_entropy(logits.transpose(1, 2).float(), targets, ignore_index=IGNORE, reduction="none")
