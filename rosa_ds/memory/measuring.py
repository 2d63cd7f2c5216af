"""What one optimizer step really holds and sends, beside what :mod:`rosa_ds.memory.estimate` predicted."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rosa_ds import distributed, zero
from rosa_ds.data.batches import Batch
from rosa_ds.data.prepare import TokenSet
from rosa_ds.memory.activation_tracer import LiveBytes, SavedBytes, Shape
from rosa_ds.memory.estimate import (
    ACTIVATIONS,
    BUCKETS,
    COLLECTED,
    GATHERED,
    Account,
    Report,
    activation_terms,
    measure_memory,
    measured_traffic,
)
from rosa_ds.memory.fake_model import ActivationPlan
from rosa_ds.models.load import read_config
from rosa_ds.training.context import Run
from rosa_ds.zero.gradients import gradient_bytes

logger = logging.getLogger(__name__)


def shape_of(batch: Batch) -> Shape:
    rows, length = batch.input_ids.shape
    return Shape(rows, length, batch.kept.numel(), padded=not bool(batch.attention_mask.all()))


def predict_activations(run: Run, shape: Shape) -> dict[str, int]:
    """Terms of the account, by tracing the model's config with the checkpointing that the run has; none, and a warning, for a
    model that cannot be traced: a run does not end for want of a prediction.
    """
    settings = run.settings
    try:
        plan = ActivationPlan(read_config(settings.model), settings, getattr(torch, run.plan.dtype))
        return activation_terms(plan.measure(shape, bool(settings.training.gradient_checkpointing)))
    except ValueError as error:
        logger.warning("the account lacks activations: %s", error)
        return {}


def longest(data: TokenSet, rows: int, pad_id: int) -> Shape:
    """The micro-batch of the longest examples."""
    return shape_of(data.batch(np.argsort(-data.lengths, kind="stable")[:rows], pad_id))


def full_account(run: Run) -> Account:
    """A run's account with the activations of its longest examples."""
    found = predict_activations(run, longest(run.data, run.plan.micro_batch_size, run.pad_id))
    return dataclasses.replace(run.account, memory=run.account.memory | found)


class Measurement:
    """Entered around one training step; the loop tells it of the first micro-batch and of the gradients."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.shape: Shape | None = None
        self.traffic = distributed.TrafficCounter()
        self.found: dict[str, int] = {}
        self._saved = SavedBytes(run.model)

    def forward(self, batch: Batch, number: int) -> AbstractContextManager[Any]:
        """To enter around the forward pass of micro-batch ``number``; the first has the longest rows."""
        if number > 1:
            return nullcontext()
        self.shape = shape_of(batch)
        return self._saved

    def gradients(self) -> None:
        """To call when the last backward is done and nothing is updated yet."""
        self.found[ACTIVATIONS] = self._saved.bytes
        bytes_of_gradients, buckets = gradient_bytes(self.run.engine, self.run.model)
        self.found |= {"gradients": bytes_of_gradients, **({} if buckets is None else {BUCKETS: buckets})}

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        with self.traffic, _watch_gathered(self.run.model, self._gathered):
            yield
        base = self.run.drawing.base if self.run.drawing else None
        self.found = measure_memory(self.run.model, self.run.state, base) | self.found

    def _gathered(self, size: int) -> None:
        self.found[GATHERED] = max(size, self.found.get(GATHERED, 0))

    def report(self) -> Report:
        """Beside what was predicted, activations for the shape of the micro-batch that was measured."""
        account, predicted = self.run.account, dict(self.run.account.memory)
        if self.shape is not None:
            predicted |= predict_activations(self.run, self.shape)
        account = dataclasses.replace(account, memory=predicted)
        return Report(account, self.found | self.run.held, measured_traffic(self.traffic))


@contextlib.contextmanager
def peak_of(run: Run, name: str) -> Iterator[None]:
    """Adds to ``run.held`` the most that operators in the block have made and not let go."""
    live = LiveBytes()
    for tensor in (*run.model.parameters(), *run.model.buffers(), *run.state.tensors()):
        live.know(tensor)
    for parameter in run.model.parameters():
        live.know(zero.own_numbers(parameter))
    with live:
        yield
    run.held[name] = max(live.peak, run.held.get(name, 0))


def note_collected(run: Run, tensors: list[Tensor]) -> None:
    """What a collector keeps between two steps, on this rank."""
    run.held[COLLECTED] = max(sum(t.nbytes for t in tensors), run.held.get(COLLECTED, 0))


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
