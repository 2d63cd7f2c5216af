"""What a run works with, and the random streams of its steps."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from rosa_ds.config.deepspeed import DeepSpeedPlan
from rosa_ds.config.schema import RunConfig
from rosa_ds.data.batches import BatchPlan
from rosa_ds.data.prepare import TokenSet
from rosa_ds.memory.estimate import Account
from rosa_ds.methods.subspace import Drawing
from rosa_ds.training.interrupt import Interruption
from rosa_ds.training.schedule import Schedule
from rosa_ds.zero.trained_state import TrainedState


@dataclasses.dataclass
class Run:
    """Everything that a loop works with; built by :mod:`rosa_ds.training.run`."""

    settings: RunConfig
    folder: Path
    model: PreTrainedModel
    engine: Any
    state: TrainedState
    schedule: Schedule
    batches: BatchPlan
    data: TokenSet
    data_digest: str
    eval_data: TokenSet | None
    pad_id: int
    base: dict[str, Any]
    account: Account
    interruption: Interruption
    record: dict[str, Any]
    """The resolved settings and what the DeepSpeed file adds to them: a resumed run must have the same."""
    drawing: Drawing | None
    whole_at_start: dict[str, Tensor]
    """What this rank keeps of the modules that are trained whole, as the base has them: a restart goes back to them."""
    plan: DeepSpeedPlan
    held: dict[str, int] = dataclasses.field(default_factory=dict)
    """Measured so far, for the account: bytes of this rank in collect steps and in a draw."""


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed every random stream for one step. Dropout then depends on (seed, step, rank), so nothing of it has to be saved."""
    number = int(np.random.SeedSequence([seed, step, rank]).generate_state(1, dtype=np.uint64)[0])
    torch.manual_seed(number)
    random.seed(number)
    np.random.seed(number % 2**32)
