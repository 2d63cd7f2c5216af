"""The loss: a sum over trained tokens, or classified rows, so that its mean does not depend on how a batch is split."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from rosa_ds import distributed
from rosa_ds.data.batches import IGNORE, Batch, LabelledBatch
from rosa_ds.models.attention import of_sequences


def token_loss_sum(model: Any, batch: Batch, device: torch.device) -> Tensor:
    """Sum of the negative log-likelihoods of a batch's targets, float32; 0 with gradients where there is no target.

    Args:
        model: the model or its DeepSpeed engine.
    """
    # sent before the forward pass, so that the device need not wait for them behind it
    targets = distributed.send(batch.targets, device)
    return loss_of(batch_logits(model, batch, device), targets)


def batch_logits(model: Any, batch: Batch, device: torch.device) -> Tensor:
    """What a model, or its DeepSpeed engine, says of each target of a batch.

    Shapes: result (B, K, classes or tokens), the model's dtype.
    """
    given = {
        "input_ids": batch.input_ids,
        "attention_mask": batch.attention_mask,
        "position_ids": batch.position_ids,
        "token_type_ids": batch.types if isinstance(batch, LabelledBatch) else None,
    }
    inputs = {name: distributed.send(tensor, device) for name, tensor in given.items() if tensor is not None}
    if isinstance(batch, LabelledBatch):
        classes: Tensor = model(**inputs).logits
        return classes[:, None]
    kept = distributed.send(batch.kept, device)
    inner: nn.Module = getattr(model, "module", model)  # an engine itself takes any arguments
    with of_sequences(inner, batch.position_ids, device):
        if _has_logits_to_keep(type(inner).forward):
            selected: Tensor = model(**inputs, use_cache=False, logits_to_keep=kept).logits
            return selected
        logits: Tensor = model(**inputs, use_cache=False).logits
    return logits[:, kept]


@functools.cache
def _has_logits_to_keep(forward: Callable[..., Any]) -> bool:
    """Whether a class's forward computes logits of chosen positions alone (an argument of transformers)."""
    return "logits_to_keep" in inspect.signature(forward).parameters


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
