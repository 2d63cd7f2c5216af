"""What one optimizer step really holds and sends, beside what :mod:`rosa_ds.memory.estimate` predicted."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from rosa_ds import distributed, zero
from rosa_ds.config.schema import RunConfig
from rosa_ds.data.batches import Batch, BatchPlan, LabelledBatch
from rosa_ds.data.prepare import TokenSet
from rosa_ds.memory.account import ACTIVATIONS, BUCKETS, GATHERED, Account
from rosa_ds.memory.activation_tracer import LiveBytes, SavedBytes
from rosa_ds.memory.estimate import activation_terms, named_parts
from rosa_ds.memory.fake_model import ActivationPlan
from rosa_ds.models.attention import joins_results, makes_mask
from rosa_ds.models.load import read_config
from rosa_ds.models.no_numbers import Shape
from rosa_ds.zero.gradients import gradient_bytes

if TYPE_CHECKING:
    from rosa_ds.zero.trained_state import TrainedState

logger = logging.getLogger(__name__)


class StepMeasurement:
    """Entered around one training step; the loop tells it of the first micro-batch and of the gradients.

    Attributes:
        memory: bytes of this rank by the account's names, once the step is over; ``traffic``: what it sent.
        shape: of the micro-batch that was looked at.
    """

    def __init__(self, model: PreTrainedModel, engine: Any, state: TrainedState) -> None:
        self.model, self.engine, self.state = model, engine, state
        self.shape: Shape | None = None
        self.memory: dict[str, int] = {}
        self._counter = distributed.TrafficCounter()
        self._saved = SavedBytes(model)

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        def gathered(size: int) -> None:
            self.memory[GATHERED] = max(size, self.memory.get(GATHERED, 0))

        with self._counter, _watch_gathered(self.model, gathered):
            yield
        self.memory = resident_memory(self.model, self.state) | self.memory

    def forward(self, batch: Batch, number: int) -> AbstractContextManager[Any]:
        """To enter around the forward pass of micro-batch ``number``; the first has the longest sequences."""
        if number > 1:
            return nullcontext()
        self.shape = shape_of(batch, makes_mask(self.model.config), joins_results(self.model))
        return self._saved

    def gradients(self) -> None:
        """To call when the last backward is done and nothing is updated yet."""
        gradients, buckets = gradient_bytes(self.engine, self.model)
        self.memory |= {ACTIVATIONS: self._saved.bytes, "gradients": gradients}
        if buckets is not None:
            self.memory[BUCKETS] = buckets

    @property
    def traffic(self) -> dict[str, int]:
        """Kind and dtype -> bytes, e.g. ``all_gather int32`` (positions). A group of one, which DeepSpeed asks too, sends nothing."""
        if distributed.world_size() == 1:
            return {}
        return {
            f"{kind} {str(dtype).removeprefix('torch.')}": size
            for (kind, dtype), size in sorted(self._counter.bytes.items(), key=str)
            if size
        }


def resident_memory(model: nn.Module, state: TrainedState) -> dict[str, int]:
    """Bytes of this rank's parameters and optimizer state, between two steps."""
    memory: Counter[str] = Counter()
    for name, parameter in named_parts(model):
        memory[name] += parameter.nbytes  # all of it, or what of it is gathered
        if (partition := zero.partition_of(parameter)) is not None:
            memory[name] += partition.share.nbytes
    memory["optimizer"] = state.bytes()
    return dict(memory)


@contextlib.contextmanager
def peak_beside(model: nn.Module, state: TrainedState) -> Iterator[LiveBytes]:
    """Counts the most bytes that operators in the block have made and not let go, beside model and optimizer: ``peak``."""
    live = LiveBytes()
    for tensor in (*model.parameters(), *model.buffers(), *state.tensors()):
        live.know(tensor)
    for parameter in model.parameters():
        live.know(zero.own_numbers(parameter))
    with live:
        yield live


def with_activations(account: Account, settings: RunConfig, dtype: str, shape: Shape) -> Account:
    """An account with the activations of a micro-batch, by tracing the model's config with the checkpointing that the run has.

    As it was, and a warning, for a model that cannot be traced: a run does not end for want of a prediction.

    Args:
        dtype: what the model computes in.
    """
    try:
        plan = ActivationPlan(read_config(settings.model), settings, getattr(torch, dtype))
        found = activation_terms(plan.measure(shape, bool(settings.training.gradient_checkpointing)))
    except ValueError as error:
        logger.warning("the account lacks activations: %s", error)
        return account
    return dataclasses.replace(account, memory=account.memory | found)


def shape_of(batch: Batch, masked_rows: bool, joined_rows: bool = False) -> Shape:
    """A micro-batch's shape.

    ``masked_rows``: attention has a mask in a row of several sequences; ``joined_rows``: it copies their results into one.
    """
    rows, length = batch.input_ids.shape
    masked = batch.attention_mask is not None and not bool(batch.attention_mask.all())
    several = batch.position_ids is not None and int((batch.position_ids == 0).sum()) > rows
    kept, places = batch.kept.numel(), batch.places()
    trained = None if places is None or isinstance(batch, LabelledBatch) else places.numel()
    return Shape(rows, length, kept, masked or (several and masked_rows), several and joined_rows, trained)


def largest(
    data: TokenSet, batches: BatchPlan, pad_id: int, masked: bool, masked_rows: bool, joined_rows: bool = False
) -> Shape:
    """The shape of the largest micro-batch: of the longest sequences, or without padding of the step with most tokens.

    ``masked``: padded rows have an attention mask; the last arguments as :func:`shape_of`.
    """
    if batches.packed:
        return shape_of(data.batch(batches.largest_micro_batch(), pad_id, packed=True), masked_rows, joined_rows)
    rows = len(batches.micro_batches(0, 0)[0])
    longest = np.argsort(-data.lengths, kind="stable")[:rows]
    return shape_of(data.batch(longest, pad_id, masked=masked), masked_rows)


@contextlib.contextmanager
def _watch_gathered(model: nn.Module, take: Callable[[int], None]) -> Iterator[None]:
    """Gives the bytes of what is gathered at stage 3, after the forward of each module that has parameters."""
    divided = [p for p in model.parameters() if zero.comes_and_goes(p)]
    if not divided:
        yield
        return

    def count(*_: Any) -> None:
        take(sum(p.nbytes for p in divided))

    # prepended: before DeepSpeed lets the module's parameters go
    hooks = [
        module.register_forward_hook(count, prepend=True)
        for module in model.modules()
        if next(module.parameters(recurse=False), None) is not None
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
