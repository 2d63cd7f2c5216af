"""Which examples each step, micro-batch and rank gets, and how they become tensors.

The order is a pure function of (seed, epoch, sample number): no state, no replay, the same for any number of ranks.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rosa_ds.data.tokenise import Tokens

IGNORE = -100
PADDING_ROW = -1


@dataclasses.dataclass(frozen=True)
class Part:
    """A source's examples in a set: ``count`` of them from number ``first`` on, of which an epoch takes ``taken``."""

    name: str
    first: int
    count: int
    taken: int


@dataclasses.dataclass(frozen=True)
class BatchPlan:
    """Divides each optimizer step's examples into micro-batches for all ranks.

    The last step of an epoch may have fewer examples, and the ranks' micro-batches more places than examples; rows
    without any trained token stand in for the missing ones, so that each example is seen once an epoch (of several
    sources: as often as :func:`epoch_order` says) and every rank has as many micro-batches.
    """

    lengths: NDArray[np.int64]
    parts: tuple[Part, ...]
    batch_size: int
    micro_batch_size: int
    world_size: int
    seed: int
    sort_by_length: bool

    @property
    def steps_per_epoch(self) -> int:
        return -(-sum(part.taken for part in self.parts) // self.batch_size)

    def step_indices(self, step: int) -> NDArray[np.int64]:
        """The examples of a step, (batch_size,), padded with -1; longest first if ``sort_by_length``."""
        epoch, within = divmod(step, self.steps_per_epoch)
        order = epoch_order(self.parts, self.seed, epoch)
        chosen = order[within * self.batch_size : (within + 1) * self.batch_size]
        if self.sort_by_length:
            chosen = chosen[np.argsort(-self.lengths[chosen], kind="stable")]
        padding = np.full(self.batch_size - len(chosen), PADDING_ROW, dtype=np.int64)
        return np.concatenate([chosen, padding])

    def micro_batches(self, step: int, rank: int) -> NDArray[np.int64]:
        """This rank's share of a step, (accumulation steps, micro_batch_size), padded with -1.

        Neighbours in :meth:`step_indices` go to all ranks at once, so that ranks wait little for each other.
        """
        at_once = self.world_size * self.micro_batch_size
        places = np.full(-(-self.batch_size // at_once) * at_once, PADDING_ROW, dtype=np.int64)
        places[: self.batch_size] = self.step_indices(step)
        return places.reshape(-1, self.world_size, self.micro_batch_size)[:, rank]


@functools.lru_cache(maxsize=2)
def epoch_order(parts: tuple[Part, ...], seed: int, epoch: int) -> NDArray[np.int64]:
    """The examples of an epoch in their order, which depends on these arguments alone.

    Of each part ``taken``, cut from its passes one behind the other: each pass has all of its examples in another order.
    """
    chosen = np.concatenate([_of_part(part, seed, number, epoch) for number, part in enumerate(parts)])
    return chosen[np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(len(chosen))]


def _of_part(part: Part, seed: int, number: int, epoch: int) -> NDArray[np.int64]:
    if part.taken == part.count:
        return np.arange(part.first, part.first + part.count)
    start, stop = epoch * part.taken, (epoch + 1) * part.taken
    passes = range(start // part.count, -(-stop // part.count))
    orders = [np.random.default_rng([seed, number, which]).permutation(part.count) for which in passes]
    begin = start - passes.start * part.count
    return part.first + np.concatenate(orders)[begin : begin + part.taken]


@dataclasses.dataclass(frozen=True)
class Batch:
    """A padded micro-batch, on the CPU.

    ``targets`` are the next tokens of the ``kept`` positions, :data:`IGNORE` where nothing is trained.
    Shapes: input_ids, attention_mask (B, L) int64; kept (K,) int64; targets (B, K) int64.
    """

    input_ids: Tensor
    attention_mask: Tensor
    kept: Tensor
    targets: Tensor

    @property
    def trained_tokens(self) -> int:
        return int((self.targets != IGNORE).sum())


@dataclasses.dataclass(frozen=True)
class LabelledBatch(Batch):
    """A padded micro-batch whose rows have one target each, their class.

    Shapes: as :class:`Batch` with K = 1; types (B, L) int64, if the model has such.
    """

    types: Tensor | None


def collate(examples: Sequence[Tokens], pad_id: int) -> Batch:
    """Pad on the right and keep only positions whose next token is trained in some row."""
    length = max(len(tokens.ids) for tokens in examples)
    input_ids = torch.full((len(examples), length), pad_id, dtype=torch.int64)
    attention_mask = torch.zeros((len(examples), length), dtype=torch.int64)
    targets = torch.full((len(examples), length), IGNORE, dtype=torch.int64)
    for row, tokens in enumerate(examples):
        ids = torch.tensor(tokens.ids, dtype=torch.int64)
        input_ids[row, : len(ids)] = ids
        attention_mask[row, : len(ids)] = 1
        following = ids[1:].masked_fill(~torch.tensor(tokens.trained[1:], dtype=torch.bool), IGNORE)
        targets[row, : len(following)] = following
    kept = (targets != IGNORE).any(0).nonzero().flatten()
    if kept.numel() == 0:
        kept = torch.zeros(1, dtype=torch.int64)
    return Batch(input_ids, attention_mask, kept, targets[:, kept])
