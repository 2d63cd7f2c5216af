"""The methods: what each trains, and which modules work around its steps. A new method is one entry here."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Literal


@dataclasses.dataclass(frozen=True)
class Parts:
    """What a method trains.

    Attributes:
        summary: for ``--help``.
        low_rank: trains ``B A`` beside the base; ``sparse``: chosen entries of it.
        resampled: the low-rank part is a piece of the base, which changes each time it is drawn again.
        everything: trains the base itself and has no adapter.
        around_steps: modules of :mod:`rosa_ds.methods` whose ``Method`` acts between optimizer steps, in this order.
    """

    summary: str
    low_rank: bool = False
    sparse: bool = False
    resampled: bool = False
    everything: bool = False
    around_steps: tuple[str, ...] = ()


METHODS = {
    "full": Parts("everything", everything=True),
    "lora": Parts("low-rank", low_rank=True),
    "sparse": Parts("sparse", sparse=True, around_steps=("sparse",)),
    "robust": Parts("RoSA: low-rank + sparse", low_rank=True, sparse=True, around_steps=("sparse",)),
    "subspace": Parts("ROSA: low-rank, drawn again", low_rank=True, resampled=True, around_steps=("subspace",)),
    "robust-subspace": Parts("both", low_rank=True, sparse=True, resampled=True, around_steps=("subspace", "sparse")),
}

if TYPE_CHECKING:
    Method = str
else:
    Method = Literal[tuple(METHODS)]

SUMMARIES = ", ".join(f"{name} ({parts.summary})" for name, parts in METHODS.items())
