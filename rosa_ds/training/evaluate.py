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
from rosa_ds.models.loss import batch_logits, loss_of

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
) -> bool:
    """Give ``visit`` this rank's batches: their sequences' numbers, themselves, and the model's logits of their targets.

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
        logits = batch_logits(model, batch, device)
        if number < len(batches):
            visit(indices, batch, logits)
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

    def add(indices: NDArray[np.int64], batch: Batch, logits: Tensor) -> None:
        targets = batch.targets.to(logits.device)
        numbers = np.searchsorted(firsts, indices, side="right") - 1
        for number in np.unique(numbers):
            rows = torch.from_numpy(np.flatnonzero(numbers == number)).to(logits.device)
            own, their = (logits, targets) if len(rows) == len(indices) else (logits[rows], targets[rows])
            sums[number, 0] += loss_of(own, their).double()
            if has_classes:
                sums[number, 1] += (own.argmax(-1) == their).sum()

    if not visit_batches(model, data, batch_size, pad_id, add, interrupted, masked):
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
