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
from rosa_ds.models.head import BlockedHead, Targets, find_head

_HEAD = "rosa_head"


def token_loss_sum(model: Any, batch: Batch, device: torch.device) -> Tensor:
    """Sum of the negative log-likelihoods of a batch's targets, float32; 0 with gradients where there is no target.

    Args:
        model: the model or its DeepSpeed engine.
    """
    inner: Any = getattr(model, "module", model)
    if (head := blocked_head(inner)) is not None:
        # sent before the forward pass, so that the device need not wait for them behind it
        targets = _targets_of_head(inner, batch, device)
        return head.loss_sum(inner, lambda: _call(model, batch, device), targets)
    tokens = distributed.send(batch.targets, device)
    return loss_of(batch_logits(model, batch, device), tokens)


@torch.no_grad()
def target_losses(model: Any, batch: Batch, device: torch.device) -> Tensor:
    """The negative log-likelihood of every target of a batch, as :func:`losses_of`. Arguments as :func:`token_loss_sum`."""
    inner: Any = getattr(model, "module", model)
    if (head := blocked_head(inner)) is None:
        return losses_of(batch_logits(model, batch, device), distributed.send(batch.targets, device))
    found = head.losses(inner, lambda: _call(model, batch, device), _targets_of_head(inner, batch, device))
    places = batch.places()
    if places is None:
        return found.view(batch.targets.shape)
    losses = found.new_zeros(batch.targets.numel())
    if places.numel():
        losses[distributed.send(places, device)] = found
    return losses.view(batch.targets.shape)


def blocked_head(model: Any) -> BlockedHead | None:
    """What :func:`use_head` gave the model."""
    head: BlockedHead | None = getattr(model, _HEAD, None)
    return head


def use_head(model: Any, head: BlockedHead | None) -> None:
    """Have losses of the model computed in blocks, or of whole logits."""
    setattr(model, _HEAD, head)


def find_head_with(model: Any, batch: Batch, device: torch.device, block: int | None) -> BlockedHead | str:
    """:func:`rosa_ds.models.head.find_head` with a batch."""
    return find_head(getattr(model, "module", model), lambda: _call(model, batch, device), block)


def batch_logits(model: Any, batch: Batch, device: torch.device) -> Tensor:
    """What a model, or its DeepSpeed engine, says of each target of a batch.

    Shapes: result (B, K, classes or tokens), the model's dtype.
    """
    logits: Tensor = _call(model, batch, device).logits
    if isinstance(batch, LabelledBatch):
        return logits[:, None]
    selected = _has_logits_to_keep(type(getattr(model, "module", model)).forward)
    return logits if selected else logits[:, distributed.send(batch.kept, device)]


def _call(model: Any, batch: Batch, device: torch.device) -> Any:
    """Run a batch through the model, for logits of the kept positions alone if it can do so."""
    given = {
        "input_ids": batch.input_ids,
        "attention_mask": batch.attention_mask,
        "position_ids": batch.position_ids,
        "token_type_ids": batch.types if isinstance(batch, LabelledBatch) else None,
    }
    inputs: dict[str, Any] = {
        name: distributed.send(tensor, device) for name, tensor in given.items() if tensor is not None
    }
    inner: nn.Module = getattr(model, "module", model)  # an engine itself takes any arguments
    if not isinstance(batch, LabelledBatch):
        inputs["use_cache"] = False
        if _has_logits_to_keep(type(inner).forward):
            inputs["logits_to_keep"] = distributed.send(batch.kept, device)
    with of_sequences(inner, batch.position_ids, device):
        return model(**inputs)


def _targets_of_head(model: nn.Module, batch: Batch, device: torch.device) -> Targets:
    """A batch's targets as the head of ``model`` meets them. Where none is trained, one that counts for nothing."""
    rows, length = batch.input_ids.shape
    places, tokens, weight = batch.places(), batch.targets.flatten(), 1.0
    if places is not None and not places.numel():
        places, tokens, weight = torch.zeros(1, dtype=torch.int64), torch.zeros_like(tokens), 0.0
    if places is not None:
        tokens = tokens[places]
    if not _has_logits_to_keep(type(model).forward):
        positions = (torch.arange(rows)[:, None] * length + batch.kept).flatten()
        places = positions if places is None else positions[places]
    sent = None if places is None else distributed.send(places, device)
    return Targets(distributed.send(tokens, device), sent, weight)


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
