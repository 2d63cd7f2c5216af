"""Whether a step's sequences stand one behind the other in one row, so that a batch needs no padding: where that takes fewer
operations, and the model keeps them apart.

Attention does, by sequence (:mod:`rosa_ds.models.attention`) or where transformers makes its mask from position ids that begin
again at 0. What carries a state from token to token (Mamba, convolutions), or counts positions itself, does not; only a pass
with numbers tells.
"""

from __future__ import annotations

import dataclasses
import inspect
import logging
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from rosa_ds.config.deepspeed import DeepSpeedPlan
from rosa_ds.config.schema import RunConfig
from rosa_ds.data.batches import PADDING_ROW, Batch, BatchPlan
from rosa_ds.data.prepare import TokenSet
from rosa_ds.models.attention import BY_SEQUENCE, can_be_by_sequence, makes_mask
from rosa_ds.models.checks import distances, rounding_of
from rosa_ds.models.loss import batch_logits
from rosa_ds.utils.logs import SAME_ON_ALL_RANKS

logger = logging.getLogger(__name__)
_LENGTH, _COMPARED = 64, 8
_STEPS = 16


def plan_batches(
    data: TokenSet, settings: RunConfig, plan: DeepSpeedPlan, ranks: int, config: PreTrainedConfig
) -> BatchPlan:
    """How a run's steps become micro-batches, as far as that is known without the model's numbers.

    Args:
        config: the model's.
    """
    packed = BatchPlan(
        lengths=data.lengths,
        firsts=data.firsts,
        parts=data.parts,
        batch_size=plan.batch_size,
        micro_batch_size=plan.micro_batch_size,
        world_size=ranks,
        seed=settings.training.seed,
        batching="tokens",
    )
    padded = dataclasses.replace(packed, batching="sorted")
    wanted = settings.data.batching
    if settings.model.task == "classification" and wanted in ("auto", "tokens"):
        return padded
    if wanted != "auto":
        return dataclasses.replace(packed, batching=wanted)
    if (plan.compiler is None and can_be_by_sequence(config)) or not makes_mask(config):
        return packed
    return packed if _masks_pay(packed, config) else padded


def _masks_pay(packed: BatchPlan, config: PreTrainedConfig) -> bool:
    """Whether packed rows take fewer operations than padded ones where attention computes every pair of a row's tokens."""
    width = getattr(config.get_text_config(), "hidden_size", None)
    if width is None:
        return False
    share = _operations(packed, width) / _operations(dataclasses.replace(packed, batching="sorted"), width)
    logger.info("batches without padding take %.2f of the operations of padded ones", share)
    return share < 1


def _operations(batches: BatchPlan, width: int) -> int:
    """About what the slowest rank of each micro-batch computes in the first steps, in units of 4 ``width`` operations a layer.

    A layer's products take 24 ``width``² operations a token, and attention 4 ``width`` for each pair of a row's tokens.
    """
    steps = range(min(batches.steps_per_epoch, _STEPS))
    at_once = [of_ranks for step in steps for of_ranks in batches.of_all_ranks(step)]
    return sum(max(_of_micro_batch(batches, sequences, width) for sequences in of_ranks) for of_ranks in at_once)


def _of_micro_batch(batches: BatchPlan, sequences: NDArray[np.int64], width: int) -> int:
    lengths = batches.lengths[sequences[sequences != PADDING_ROW]]
    if not len(lengths):
        return 0
    rows, length = (1, int(lengths.sum())) if batches.packed else (len(sequences), int(lengths.max()))
    return rows * length * (6 * width + length)


def settle_batches(batches: BatchPlan, engine: Any, data: TokenSet, wanted: str, by_sequence: bool = True) -> BatchPlan:
    """The batches of a run, padded if the model does not keep packed sequences apart; says why. Collective.

    Attention is by sequence from here on where the model is right with it.

    Args:
        engine: a causal language model or its DeepSpeed engine.
        wanted: ``data.batching``.
        by_sequence: attention may be; not where it is compiled, since each row's sequences would need a graph of their own.
    """
    if not batches.packed:
        return batches
    model: PreTrainedModel = getattr(engine, "module", engine)
    padded = dataclasses.replace(batches, batching="sorted")
    if by_sequence and can_be_by_sequence(model.config):
        model.set_attn_implementation(BY_SEQUENCE)
        leak = find_leak(engine, data)
        if leak is None:
            return batches
        model.set_attn_implementation("sdpa")
        logger.info("attention by sequence: %s", leak, extra=SAME_ON_ALL_RANKS)
        if wanted == "auto" and not _masks_pay(batches, model.config):
            return padded
    leak = find_leak(engine, data)
    if leak is None:
        return batches
    message = "data.batching tokens: %s; rows are padded instead (data.batching sorted)"
    logger.warning(message, leak, extra=SAME_ON_ALL_RANKS)
    return padded


def find_leak(engine: Any, data: TokenSet) -> str | None:
    """Why packed sequences would not be as each alone, or ``None``: three forward passes of short rows, a sequence alone, and
    behind two others, which must not change what is said of it. Collective. Argument as :func:`settle_batches`.
    """
    model = getattr(engine, "module", engine)
    if "position_ids" not in inspect.signature(type(model).forward).parameters:
        return f"{type(model).__name__} takes no position_ids"
    ids = data.sequence(int(data.lengths.argmax())).ids[:_LENGTH]
    engine.eval()
    try:
        alone, behind, behind_other = (_first_logits(engine, before, ids) for before in ([], ids, ids[::-1]))
    except (TypeError, AttributeError, ValueError) as error:  # the same on every rank: the model computes with its mask
        if model.config._attn_implementation != BY_SEQUENCE:
            raise
        return f"{type(model).__name__} does not run with it ({type(error).__name__}: {error})"
    rounding = rounding_of(alone)
    if distances(behind, behind_other).max() > rounding:
        return "what is said of a sequence depends on the one before it"
    # the median: elsewhere another order of sums may choose other experts
    if distances(alone, behind).median() > rounding:
        return "what is said of a sequence depends on where it stands"
    return None


def _first_logits(engine: Any, before: list[int], ids: list[int]) -> Tensor:
    """What is said of the first tokens of ``ids``, which stand in a row behind ``before``, (K, V)."""
    kept = torch.arange(len(before), len(before) + min(_COMPARED, len(ids)))
    # alone as in a padded row: some models count positions from another number than 0
    positions = torch.tensor([[*range(len(before)), *range(len(ids))]]) if before else None
    batch = Batch(torch.tensor([[*before, *ids]]), None, kept, torch.empty(1, len(kept)), positions)
    with torch.no_grad():
        return batch_logits(engine, batch, engine.device)[0]
