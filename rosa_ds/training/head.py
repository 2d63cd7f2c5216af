"""Whether the losses of a model are computed a block of tokens at a time: where that gives what its whole logits give."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import torch

from rosa_ds import distributed
from rosa_ds.config.schema import LossBlock, RunConfig
from rosa_ds.data.batches import collate
from rosa_ds.data.prepare import TokenSet
from rosa_ds.data.tokenise import Tokens
from rosa_ds.models.checks import rounding_of
from rosa_ds.models.loss import batch_logits, find_head_with, losses_of, target_losses, use_head
from rosa_ds.models.task import is_classifier
from rosa_ds.utils.logs import SAME_ON_ALL_RANKS

logger = logging.getLogger(__name__)
_LENGTH, _TARGETS, _BLOCK = 64, 8, 3


def settle_loss(settings: RunConfig, engine: Any, data: TokenSet, pad_id: int) -> RunConfig:
    """:func:`settle_head`, and the settings with what a run does. Collective."""
    if settle_head(engine, data, pad_id, settings.training.loss_block):
        return settings
    training = settings.training.model_copy(update={"loss_block": "whole"})
    return settings.model_copy(update={"training": training})


@torch.no_grad()
def settle_head(engine: Any, data: TokenSet, pad_id: int, loss_block: LossBlock) -> bool:
    """Three forward passes of short rows: one finds the head, and what the model says of others is compared with the same in
    small blocks. Collective; says why not.

    Args:
        engine: a model or its DeepSpeed engine.
        loss_block: as ``training.loss_block``.

    Returns: whether losses are computed in blocks from now on.
    """
    model = getattr(engine, "module", engine)
    use_head(model, None)
    if loss_block == "whole" or is_classifier(model):
        return False
    engine.eval()
    ids = data.sequence(int(data.lengths.argmax())).ids[:_LENGTH]
    half = ids[: max(2, len(ids) // 2)]
    small, batch = (collate([_last_trained(row) for row in rows], pad_id) for rows in ([half], [ids, half]))
    head = find_head_with(engine, small, engine.device, None if loss_block == "auto" else loss_block)
    if isinstance(head, str):
        return _refused(head)
    logits = batch_logits(engine, batch, engine.device)
    expected = losses_of(logits, distributed.send(batch.targets, logits.device))
    use_head(model, dataclasses.replace(head, block=_BLOCK))
    try:
        found = target_losses(engine, batch, engine.device)
    finally:
        use_head(model, None)
    # a loss is the difference of two numbers that are made of logits
    if not float((found - expected).abs().max()) <= 2 * rounding_of(logits):
        return _refused(f"what {type(model).__name__} makes of its head's output is another thing in blocks")
    use_head(model, head)
    logger.info("losses: the logits of %d tokens at a time", head.block)
    return True


def _last_trained(ids: list[int]) -> Tokens:
    return Tokens(ids, [len(ids) - at <= _TARGETS for at in range(len(ids))])


def _refused(reason: str) -> bool:
    logger.warning(
        "training.loss_block: %s; all logits of a micro-batch are there at once", reason, extra=SAME_ON_ALL_RANKS
    )
    return False
