"""Evaluation loss of a model, divided over ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from rosa_ds import distributed
from rosa_ds.data.batches import load_batch
from rosa_ds.data.prepare import TokenSet
from rosa_ds.training.loss import token_loss_sum


@torch.no_grad()
def evaluate_loss(
    model: Any, data: TokenSet, batch_size: int, pad_id: int, selects: bool, interrupted: Callable[[], bool] = bool
) -> float | None:
    """Mean negative log-likelihood of all trained tokens of ``data``, in nats a token: the same on every rank.

    Each rank takes every n-th batch of the examples in order of length. All go through the model equally often, since
    under ZeRO-3 each pass gathers weights: one that has no batch left does the shortest again for nothing.

    Args:
        interrupted: asked after each batch, by all ranks; if it says so, the result is ``None``.
    """
    order = np.argsort(-data.lengths, kind="stable")
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    device = model.device
    total = torch.zeros((), dtype=torch.float64, device=device)
    ranks = distributed.world_size()
    for number in range(distributed.rank(), -(-len(batches) // ranks) * ranks, ranks):
        distributed.progress(f"evaluation, batch {number // ranks + 1}")
        indices = batches[number] if number < len(batches) else batches[-1]
        loss = token_loss_sum(model, load_batch(data, indices, pad_id), device, selects).double()
        total += loss if number < len(batches) else 0.0
        if interrupted():
            return None
    return float(distributed.sum_over_ranks(total)) / int(data.trained.sum())
