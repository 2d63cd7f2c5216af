"""Which ZeRO stage, micro-batch and checkpointing fit a GPU, and what they cost."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from rosa_ds.adapters.inject import adapter_parts
from rosa_ds.config.deepspeed import plan_deepspeed
from rosa_ds.config.schema import RunConfig
from rosa_ds.memory.account import Account
from rosa_ds.memory.estimate import activation_terms, predict
from rosa_ds.memory.fake_model import ActivationPlan, build_skeleton
from rosa_ds.methods import memory_terms
from rosa_ds.models.load import read_config
from rosa_ds.models.no_numbers import Shape, with_padding
from rosa_ds.models.stream import build_on_meta
from rosa_ds.training.reach import keep_dense, look_at_base, settle_targets
from rosa_ds.zero.engine import settle_zero

logger = logging.getLogger(__name__)

GIB = 2**30
MAX_MICRO_BATCH = 64


@dataclasses.dataclass(frozen=True)
class Machine:
    """What a plan assumes of the GPUs.

    ``memory``: bytes of one. ``reserve``: of these for CUDA, NCCL and fragments. ``flops``: that a rank reaches a second.
    ``bandwidth``: bytes a second that a rank sends in a collective.
    """

    gpus: int
    memory: float
    reserve: float = 4 * GIB
    flops: float = 300e12
    bandwidth: float = 50e9


@dataclasses.dataclass(frozen=True)
class Choice:
    """One way to run: what a rank holds, what a step sends, and about how long both sides of a step take (seconds)."""

    stage: int
    micro_batch: int
    checkpointing: bool
    account: Account
    peak: int
    host: int
    fits: bool
    compute: float
    send: float

    @property
    def sent(self) -> int:
        return sum(self.account.traffic.values())


def send_seconds(traffic: Mapping[str, int], ranks: int, bandwidth: float) -> float:
    """A ring's time without latency: a gather sends (n - 1) / n of its payload, a sum of gradients twice that."""
    weighted = sum(size * (2 if name == "gradients" else 1) for name, size in traffic.items())
    return weighted * (ranks - 1) / ranks / bandwidth


class Planner:
    """Answers for one model and its settings. Nothing of the weights is read.

    Args:
        deepspeed: the user's DeepSpeed JSON; its stage and batch sizes do not count.
        config: a transformers config; by default that of ``settings.model``.

    Raises: ValueError for a model or settings that cannot be.
    """

    def __init__(self, settings: RunConfig, deepspeed: Mapping[str, Any], config: Any = None) -> None:
        config = read_config(settings.model) if config is None else config
        unused = look_at_base(settings, config)
        settings = keep_dense(settings, unused)
        if unused is not None and unused.every:
            shapes = build_on_meta(with_padding(config), settings.model, torch.bfloat16)
            settings = settle_targets(settings, shapes, unused)
        if unused is None:
            logger.warning(
                "which layers the loss depends on is not known without numbers for %s: all that are wanted are counted, and a run's "
                "first pass refuses those that no gradient reaches",
                config.model_type,
            )
        _, settled = plan_deepspeed(dict(deepspeed), settings, 1, gpu_has_bfloat16=True)
        self.dtype = getattr(torch, settled.model.dtype)
        self.settings, self.deepspeed = settings, dict(deepspeed)
        self.model, self.report = build_skeleton(config, settled, self.dtype)
        self.activations = ActivationPlan(config, settled, self.dtype)
        self.numbers = self.report.trained + self.report.frozen

    def account(self, stage: int, ranks: int, shape: Shape, checkpointing: bool, accumulation: int = 1) -> Account:
        """Every term of one rank, for micro-batches of a shape."""
        config = {key: value for key, value in self.deepspeed.items() if not key.endswith(("batch_size", "_per_gpu"))}
        config |= {
            "zero_optimization": {**config.get("zero_optimization", {}), "stage": stage},
            "train_micro_batch_size_per_gpu": shape.rows,
            "gradient_accumulation_steps": accumulation,
        }
        plan, settings = plan_deepspeed(config, self.settings, ranks, gpu_has_bfloat16=True)
        settle_zero(self.model, plan, adapter_parts(self.model))
        terms = memory_terms(self.model, plan, settings, ranks, gpu=True)
        account = predict(self.model, plan, terms, bool(settings.training.gradient_checkpointing), ranks)
        found = self.activations.of_rows(shape, checkpointing)
        account.memory |= activation_terms(found)
        return account

    def choice(self, machine: Machine, stage: int, shape: Shape, checkpointing: bool, accumulation: int) -> Choice:
        """What one way of running needs."""
        account = self.account(stage, machine.gpus, shape, checkpointing, accumulation)
        budget = machine.memory - machine.reserve
        peak, host = account.peak(budget)
        tokens = shape.rows * shape.length * accumulation
        # forward, and backward for the inputs alone, since the base is frozen; recomputing is a second forward
        passes = 3 if checkpointing else 2
        if self.settings.parts.everything:
            passes += 1
        compute = 2 * passes * self.numbers * tokens / machine.flops
        send = send_seconds(account.traffic, machine.gpus, machine.bandwidth)
        return Choice(stage, shape.rows, checkpointing, account, peak, host, peak <= budget, compute, send)

    def search(self, machine: Machine, length: int, batch: int, stages: tuple[int, ...]) -> Iterator[Choice]:
        """For every stage, with and without checkpointing, the largest micro-batch that fits, or the smallest that does not."""
        share = batch // machine.gpus
        rows = [n for n in range(min(share, MAX_MICRO_BATCH), 0, -1) if share % n == 0 and n & (n - 1) == 0]
        for stage in stages:
            for checkpointing in (False, True):
                for micro in rows:
                    shape = Shape(micro, length, length)
                    choice = self.choice(machine, stage, shape, checkpointing, share // micro)
                    if choice.fits or micro == rows[-1]:
                        yield choice
                        break


def best(choices: list[Choice]) -> Choice | None:
    """The one with the shortest step, if its two sides do not overlap at all; of equal ones that with larger micro-batches."""
    fitting = [choice for choice in choices if choice.fits]
    return min(fitting, key=lambda c: (round(c.compute + c.send, 3), -c.micro_batch, c.stage), default=None)
