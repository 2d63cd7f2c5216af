"""Evaluation loss and accuracy of a model, divided over ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rosa_ds import distributed
from rosa_ds.data.batches import Batch
from rosa_ds.data.labelled import LabelledSet
from rosa_ds.data.prepare import TokenSet
from rosa_ds.models.loss import batch_logits, losses_of, target_losses

Visit = Callable[[NDArray[np.int64], Batch, Tensor], None]


@torch.no_grad()
def visit_batches(
    model: Any,
    data: TokenSet,
    batch_size: int,
    pad_id: int,
    visit: Visit,
    interrupted: Callable[[], bool] = bool,
    masked: bool = True,
    asked: Callable[[Any, Batch, torch.device], Tensor] = target_losses,
) -> bool:
    """Give ``visit`` this rank's batches: their sequences' numbers, themselves, and what the model is ``asked`` of their targets.

    Each rank takes every n-th batch of the sequences in order of length. All go through the model equally often, since
    under ZeRO-3 each pass gathers weights: one that has no batch left does the shortest again for nothing.

    Args:
        interrupted: asked after each batch, by all ranks; if it says so, the result is ``False``.
        masked: rows have an attention mask, see :func:`rosa_ds.training.padding.needs_mask`.
    """
    order = np.argsort(-data.lengths, kind="stable")
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    device = model.device
    ranks = distributed.world_size()
    for number in range(distributed.rank(), -(-len(batches) // ranks) * ranks, ranks):
        distributed.progress(f"evaluation, batch {number // ranks + 1}")
        indices = batches[number] if number < len(batches) else batches[-1]
        batch = data.batch(indices, pad_id, masked=masked)
        found = asked(model, batch, device)
        if number < len(batches):
            visit(indices, batch, found)
        if interrupted():
            return False
    return True


def evaluate(
    model: Any,
    data: TokenSet,
    batch_size: int,
    pad_id: int,
    interrupted: Callable[[], bool] = bool,
    masked: bool = True,
) -> dict[str, Any] | None:
    """``loss``, the mean negative log-likelihood of all targets of ``data`` in nats, and ``accuracy`` where these are classes: the
    same on every rank. Of several sources also ``losses`` and ``accuracies``, source -> its own. Arguments as
    :func:`visit_batches`; ``None`` if interrupted.
    """
    has_classes = isinstance(data, LabelledSet)
    firsts = data.firsts[[part.first for part in data.parts]]
    sums = torch.zeros(len(firsts), 2, dtype=torch.float64, device=model.device)  # losses and hits of each source

    def add(indices: NDArray[np.int64], batch: Batch, found: Tensor) -> None:
        targets = batch.targets.to(found.device)
        of_rows = [(losses_of(found, targets) if has_classes else found).double().sum(1)]
        if has_classes:
            of_rows.append((found.argmax(-1) == targets).double().sum(1))
        numbers = torch.from_numpy(np.searchsorted(firsts, indices, side="right") - 1).to(found.device)
        for column, values in enumerate(of_rows):
            for number in range(len(firsts)):
                sums[number, column] += values[numbers == number].sum()

    asked = batch_logits if has_classes else target_losses
    if not visit_batches(model, data, batch_size, pad_id, add, interrupted, masked, asked):
        return None
    totals = distributed.sum_over_ranks(sums)
    counts = np.add.reduceat(data.trained, firsts)
    names = ["loss", "accuracy"] if has_classes else ["loss"]
    means: dict[str, Any] = dict(zip(names, (totals.sum(0) / int(counts.sum())).tolist(), strict=False))
    if len(firsts) > 1:
        of_each = (totals.cpu() / torch.from_numpy(counts)[:, None]).T.tolist()
        for name, figures in zip(("losses", "accuracies")[: len(names)], of_each, strict=False):
            means[name] = {part.name: figure for part, figure in zip(data.parts, figures, strict=True)}
    return means
