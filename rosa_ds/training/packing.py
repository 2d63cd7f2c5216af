"""Whether a model keeps sequences apart that stand one behind the other in one row, so that a batch needs no padding.

Attention does, where transformers makes its mask from position ids that begin again at 0. What carries a state from token to
token (Mamba, convolutions), or counts positions itself, does not; only a pass with numbers tells.
"""

from __future__ import annotations

import inspect
import logging
from typing import Any

import torch
from torch import Tensor

from rosa_ds.data.batches import Batch
from rosa_ds.data.prepare import TokenSet
from rosa_ds.models.checks import ROUNDING
from rosa_ds.models.loss import batch_logits

logger = logging.getLogger(__name__)
_LENGTH, _COMPARED = 64, 8


def keeps_sequences_apart(engine: Any, data: TokenSet) -> bool:
    """Three forward passes of short rows: a sequence alone, and behind two others, which must not change what is said of it.
    Collective; says why not.

    Args:
        engine: a causal language model or its DeepSpeed engine.
    """
    model = getattr(engine, "module", engine)
    if "position_ids" not in inspect.signature(type(model).forward).parameters:
        return _refused(f"{type(model).__name__} takes no position_ids")
    ids = data.sequence(int(data.lengths.argmax())).ids[:_LENGTH]
    engine.eval()
    alone, behind, behind_other = (_first_logits(engine, before, ids) for before in ([], ids, ids[::-1]))
    rounding = ROUNDING.get(alone.dtype, 1e-4) * float(alone.float().std())
    if _distances(behind, behind_other).max() > rounding:
        return _refused("what is said of a sequence depends on the one before it")
    # the median: elsewhere another order of sums may choose other experts
    if _distances(alone, behind).median() > rounding:
        return _refused("what is said of a sequence depends on where it stands")
    return True


def _first_logits(engine: Any, before: list[int], ids: list[int]) -> Tensor:
    """What is said of the first tokens of ``ids``, which stand in a row behind ``before``, (K, V)."""
    kept = torch.arange(len(before), len(before) + min(_COMPARED, len(ids)))
    positions = torch.tensor([*range(len(before)), *range(len(ids))])
    batch = Batch(torch.tensor([[*before, *ids]]), None, kept, torch.empty(1, len(kept)), positions[None])
    with torch.no_grad():
        return batch_logits(engine, batch, engine.device)[0]


def _distances(first: Tensor, second: Tensor) -> Tensor:
    """The largest difference at each position, float32 (K,)."""
    return (first.float() - second.float()).abs().amax(dim=-1)


def _refused(reason: str) -> bool:
    logger.warning("data.batching tokens: %s; rows are padded instead (data.batching sorted)", reason)
    return False
