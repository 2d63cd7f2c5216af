"""Whether rows that are padded on the right need an attention mask.

A causal model says nothing of a row's tokens that hangs on the padding behind them. With a mask, attention makes one of rows ×
length × length instead of its causal kernel, and the host waits to see what is in it. What reads the mask in another way (a
pooled row, experts that share room, attention that sees both sides) needs it; only a pass with numbers tells.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from rosa_ds.data.batches import IGNORE, collate
from rosa_ds.data.labelled import LabelledSet
from rosa_ds.data.prepare import TokenSet
from rosa_ds.data.tokenise import Tokens
from rosa_ds.models.checks import distances, rounding_of
from rosa_ds.models.loss import batch_logits

logger = logging.getLogger(__name__)
_LENGTH, _COMPARED = 64, 8


def needs_mask(model: Any, data: TokenSet, pad_id: int) -> bool:
    """Two forward passes of a long and a short row, with a mask and without, which must say the same of the last real tokens. Collective
    where the model is divided; the log has what was found.

    Args:
        model: the model or its DeepSpeed engine.
    """
    if isinstance(data, LabelledSet):
        return True
    ids = data.sequence(int(data.lengths.argmax())).ids[:_LENGTH]
    short = max(1, len(ids) // 2)
    rows = [Tokens(row, [number >= len(row) - _COMPARED for number in range(len(row))]) for row in (ids, ids[:short])]
    training = getattr(model, "module", model).training
    model.eval()
    with torch.no_grad():
        given, left_out = (_of_real_tokens(model, rows, pad_id, masked) for masked in (True, False))
    model.train(training)
    apart, rounding = float(distances(given, left_out).max()), rounding_of(given)
    needed = not apart <= rounding  # NaN: needed
    logger.info(
        "padded rows have %s attention mask: without it the logits differ by %.2g, rounding by %.2g",
        "an" if needed else "no",
        apart,
        rounding,
    )
    return needed


def _of_real_tokens(model: Any, rows: list[Tokens], pad_id: int, masked: bool) -> Tensor:
    """What is said at every position with a target, (T, V)."""
    batch = collate(rows, pad_id, masked)
    logits = batch_logits(model, batch, model.device)
    return logits[(batch.targets != IGNORE).to(logits.device)]
