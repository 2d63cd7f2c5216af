"""Which examples each step, micro-batch and rank gets, and how they become tensors.

The order is a pure function of (seed, epoch, sample number): no state, no replay, the same for any number of ranks.
"""

from __future__ import annotations

import dataclasses
import functools
import heapq
import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rosa_ds.data.tokenise import Tokens

IGNORE = -100
PADDING_ROW = -1
Batching = Literal["tokens", "sorted", "random"]


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

    An example is one sequence, or several (``firsts``); a step takes ``batch_size`` examples, and its micro-batches hold their
    sequences. The last step of an epoch may have fewer examples, and a micro-batch none; what stands in for them trains no
    token, so that each example is seen once an epoch (of several sources: as often as :func:`epoch_order` says) and every
    rank has as many micro-batches.

    Attributes:
        lengths: tokens of every sequence, (S,).
        firsts: the first sequence of every example, and behind it S, (E + 1,).
        batching: ``tokens`` gives every rank as many tokens, without padding, see :func:`deal`; ``sorted`` rows of about one
            length; ``random`` rows as they come.
    """

    lengths: NDArray[np.int64]
    firsts: NDArray[np.int64]
    parts: tuple[Part, ...]
    batch_size: int
    micro_batch_size: int
    world_size: int
    seed: int
    batching: Batching

    @property
    def packed(self) -> bool:
        """Whether a micro-batch is one row of sequences, without padding."""
        return self.batching == "tokens"

    @property
    def steps_per_epoch(self) -> int:
        return -(-sum(part.taken for part in self.parts) // self.batch_size)

    @property
    def accumulation_steps(self) -> int:
        return -(-self.batch_size // (self.world_size * self.micro_batch_size))

    def step_sequences(self, step: int) -> NDArray[np.int64]:
        """The sequences of a step's examples, (at least one,); longest first unless they are taken as they come."""
        epoch, within = divmod(step, self.steps_per_epoch)
        order = epoch_order(self.parts, self.seed, epoch)
        examples = order[within * self.batch_size : (within + 1) * self.batch_size]
        chosen = sequences_of(self.firsts, examples)
        return chosen if self.batching == "random" else chosen[np.argsort(-self.lengths[chosen], kind="stable")]

    def micro_batches(self, step: int, rank: int) -> list[NDArray[np.int64]]:
        """The sequences of each of a rank's micro-batches of a step, of which padded ones are filled up with -1."""
        return [of_ranks[rank] for of_ranks in self.of_all_ranks(step)]

    def of_all_ranks(self, step: int) -> list[list[NDArray[np.int64]]]:
        """The sequences of a step by micro-batch and rank."""
        sequences = self.step_sequences(step)
        if self.packed:
            dealt = deal(self.lengths[sequences], self.world_size, self.accumulation_steps)
            return [[sequences[chosen] for chosen in bins] for bins in dealt]
        # neighbours go to all ranks at once, so that ranks wait little for each other
        at_once = self.world_size * self.accumulation_steps
        rows = max(self.micro_batch_size, -(-len(sequences) // at_once))
        places = np.full(at_once * rows, PADDING_ROW, dtype=np.int64)
        places[: len(sequences)] = sequences
        return [list(of_ranks) for of_ranks in places.reshape(-1, self.world_size, rows)]

    def largest_micro_batch(self) -> NDArray[np.int64]:
        """The sequences of the first rank's largest micro-batch, in the first epoch's step with most tokens or that with the
        longest sequence.
        """
        epoch = epoch_order(self.parts, self.seed, 0)
        begins = np.arange(0, len(epoch), self.batch_size)
        steps = {
            int(over.reduceat(over.reduceat(self.lengths, self.firsts[:-1])[epoch], begins).argmax())
            for over in (np.add, np.maximum)
        }
        batches = [batch for step in sorted(steps) for batch in self.micro_batches(step, 0)]
        return max(batches, key=lambda batch: int(self.lengths[batch].sum()))


def sequences_of(firsts: NDArray[np.int64], examples: NDArray[np.int64]) -> NDArray[np.int64]:
    """The sequences of examples, one example's behind the other's."""
    starts, counts = firsts[examples], firsts[examples + 1] - firsts[examples]
    before = np.cumsum(counts) - counts
    return np.repeat(starts - before, counts) + np.arange(counts.sum())


def deal(lengths: NDArray[np.int64], ranks: int, micro_batches: int) -> list[list[list[int]]]:
    """Divide sequences so that all ranks have about as many tokens in each micro-batch, and no micro-batch has many more than
    the mean or than the longest sequence.

    A micro-batch takes from the longest sequence down what its ranks have room for: as many tokens as the longest sequence
    that is left, or as the mean of what is left. So long sequences, which nothing can divide, stand beside each other on all
    ranks, and no rank waits for one. The last micro-batch takes the rest.

    Args:
        lengths: longest first, (S,).

    Returns: for every micro-batch and rank the numbers of its sequences, which may be none.
    """
    dealt: list[list[list[int]]] = []
    left = list(enumerate(lengths.tolist()))
    for following in range(micro_batches, 0, -1):
        mean = -(-sum(length for _, length in left) // (ranks * following))
        room = max(mean, left[0][1]) if left and following > 1 else math.inf
        loads = [(0, rank) for rank in range(ranks)]  # a heap: the least loaded rank stands first
        bins: list[list[int]] = [[] for _ in range(ranks)]
        rest: list[tuple[int, int]] = []
        for number, length in left:
            load, rank = loads[0]
            if load + length <= room:
                heapq.heapreplace(loads, (load + length, rank))
                bins[rank].append(number)
            else:
                rest.append((number, length))
        dealt.append(bins)
        left = rest
    return dealt


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
    """A micro-batch, on the CPU: rows that are padded on the right, or sequences one behind the other in one row.

    ``targets`` are the next tokens of the ``kept`` positions, :data:`IGNORE` where nothing is trained. Padded rows have an
    ``attention_mask`` where the model needs it; a row of several sequences has ``position_ids``, which begin again at 0 with
    each.
    Shapes: input_ids, attention_mask, position_ids (B, L) int64; kept (K,) int64; targets (B, K) int64.
    """

    input_ids: Tensor
    attention_mask: Tensor | None
    kept: Tensor
    targets: Tensor
    position_ids: Tensor | None = None

    @property
    def trained_tokens(self) -> int:
        return int((self.targets != IGNORE).sum())

    def places(self) -> Tensor | None:
        """The numbers of the targets that are trained, (T,) int64, counted row after row; ``None`` if all are."""
        trained = (self.targets != IGNORE).flatten()
        return None if trained.all() else trained.nonzero().flatten()


@dataclasses.dataclass(frozen=True)
class LabelledBatch(Batch):
    """A padded micro-batch whose rows have one target each, their class.

    Shapes: as :class:`Batch` with K = 1; types (B, L) int64, if the model has such.
    """

    types: Tensor | None = None


def collate(sequences: Sequence[Tokens], pad_id: int, masked: bool = True) -> Batch:
    """Pad on the right and keep only positions whose next token is trained in some row.

    Args:
        masked: with an ``attention_mask``; a causal model says the same of real tokens without.
    """
    length = max(len(tokens.ids) for tokens in sequences)
    input_ids = torch.full((len(sequences), length), pad_id, dtype=torch.int64)
    attention_mask = torch.zeros((len(sequences), length), dtype=torch.int64) if masked else None
    targets = torch.full((len(sequences), length), IGNORE, dtype=torch.int64)
    for row, tokens in enumerate(sequences):
        input_ids[row, : len(tokens.ids)] = torch.tensor(tokens.ids, dtype=torch.int64)
        if attention_mask is not None:
            attention_mask[row, : len(tokens.ids)] = 1
        targets[row, : len(tokens.ids)] = _targets(tokens)
    kept = _kept(targets)
    return Batch(input_ids, attention_mask, kept, targets[:, kept])


def pack(sequences: Sequence[Tokens]) -> Batch:
    """Sequences one behind the other, without padding; only positions whose next token is trained are kept."""
    input_ids = torch.cat([torch.tensor(tokens.ids, dtype=torch.int64) for tokens in sequences])
    targets = torch.cat([_targets(tokens) for tokens in sequences])[None]
    positions = torch.cat([torch.arange(len(tokens.ids)) for tokens in sequences])
    kept = _kept(targets)
    return Batch(input_ids[None], None, kept, targets[:, kept], positions[None])


def _targets(tokens: Tokens) -> Tensor:
    """The next token of each where that is trained; the last one of a sequence has none. (L,) int64."""
    following = torch.tensor([*tokens.ids[1:], IGNORE], dtype=torch.int64)
    return following.masked_fill(~torch.tensor([*tokens.trained[1:], False]), IGNORE)


def _kept(targets: Tensor) -> Tensor:
    """The positions that have a target in some row, at least one: a model cannot be asked for none."""
    kept = (targets != IGNORE).any(0).nonzero().flatten()
    return kept if kept.numel() else torch.zeros(1, dtype=torch.int64)
