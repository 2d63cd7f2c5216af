"""What is measured: linear layers of known models, and the tensors that an op reads of one."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

import rosa_kernels
from rosa_kernels.pattern.plan import Plan
from rosa_kernels.pattern.tiles import TilePlan

Role = Literal["attention", "widening", "narrowing"]
"""Where a layer stands: beside the residual stream, or as up or down projection of a SwiGLU block."""


class Layer(NamedTuple):
    """A weight (N, M) and where it stands in its model, which shapes its gradient."""

    rows: int
    columns: int
    role: Role

    def __str__(self) -> str:
        return f"{self.rows}x{self.columns}"


MODELS: dict[str, tuple[Layer, ...]] = {
    "smollm2": (  # SmolLM2-135M
        Layer(576, 576, "attention"),
        Layer(192, 576, "attention"),
        Layer(1536, 576, "widening"),
        Layer(576, 1536, "narrowing"),
    ),
    "llama-7b": (  # LLaMA and Llama 2
        Layer(4096, 4096, "attention"),
        Layer(11008, 4096, "widening"),
        Layer(4096, 11008, "narrowing"),
    ),
    "llama-8b": (  # Llama 3
        Layer(4096, 4096, "attention"),
        Layer(1024, 4096, "attention"),
        Layer(14336, 4096, "widening"),
        Layer(4096, 14336, "narrowing"),
    ),
    "llama-70b": (
        Layer(8192, 8192, "attention"),
        Layer(28672, 8192, "widening"),
        Layer(8192, 28672, "narrowing"),
        Layer(1024, 8192, "attention"),
    ),
}


def parse_shape(text: str) -> Layer:
    """``NxM`` (out-features x in-features). The role is that of a known layer of this shape, else follows from it.

    Raises: ValueError for anything else.
    """
    match = re.fullmatch(r"([1-9]\d*)[x×]([1-9]\d*)", text.strip().lower())
    if match is None:
        raise ValueError(f"{text!r} is no shape: give out-features x in-features, such as 1536x576")
    rows, columns = int(match[1]), int(match[2])
    for layer in (layer for layers in MODELS.values() for layer in layers):
        if layer[:2] == (rows, columns):
            return layer
    if rows == columns:
        return Layer(rows, columns, "attention")
    return Layer(rows, columns, "widening" if rows > columns else "narrowing")


@dataclass(frozen=True, eq=False)
class Case:
    """One measurement's sizes. ``positions_Z``: the mask, sorted int32, on ``device``; ``mask``: where it comes from."""

    layer: Layer
    tokens: int
    dtype: torch.dtype
    device: torch.device
    positions_Z: Tensor
    mask: str
    rank: int = 8
    dropout: float = 0.05

    @property
    def entries(self) -> int:
        return self.positions_Z.numel()

    @property
    def shape(self) -> tuple[int, int]:
        return self.layer.rows, self.layer.columns


@dataclass(frozen=True, eq=False)
class Inputs:
    """The tensors of one layer, of the case's dtype; those that the op does not read are empty.

    ``y_TN`` and ``grad_x_TM`` are targets of sums in place, ``grad_h_TR`` is the gradient of ``x Aᵀ``.
    """

    case: Case
    grad_TN: Tensor
    x_TM: Tensor
    y_TN: Tensor
    weight_NM: Tensor
    values_Z: Tensor
    A_RM: Tensor
    B_NR: Tensor
    grad_h_TR: Tensor
    grad_x_TM: Tensor
    positions_Z: Tensor
    plan: Plan | None

    def tensors(self) -> list[Tensor]:
        """All but the plan's."""
        return [value for value in vars(self).values() if isinstance(value, Tensor)]

    def nbytes(self) -> int:
        """Device memory of the set, the plan included."""
        plan = self.plan
        parts = [] if plan is None else [value for value in vars(plan).values() if isinstance(value, Tensor)]
        if isinstance(plan, TilePlan):
            parts += [*plan.by_row, *plan.by_column]
        return sum(tensor.nbytes for tensor in (*self.tensors(), *parts))


def make_inputs(case: Case, reads: tuple[str, ...], seed: int) -> Inputs:
    """Normal numbers, scaled so that no part of a result is lost beside another: a wrong part fails the gate.

    Args:
        reads: names of the tensors to fill, and ``plan``.
    """
    generator = torch.Generator(device=case.device).manual_seed(seed)
    (rows, columns), tokens, rank = case.shape, case.tokens, case.rank
    sizes: dict[str, tuple[tuple[int, ...], float]] = {
        "grad_TN": ((tokens, rows), 1.0),
        "x_TM": ((tokens, columns), 1.0),
        "y_TN": ((tokens, rows), 1.0),
        "weight_NM": ((rows, columns), columns**-0.5),
        "values_Z": ((case.entries,), columns**-0.5),
        "A_RM": ((rank, columns), columns**-0.5),
        "B_NR": ((rows, rank), rank**-0.5),
        "grad_h_TR": ((tokens, rank), 1.0),
        "grad_x_TM": ((tokens, columns), 1.0),
    }
    filled = {
        name: torch.randn(size, generator=generator, device=case.device).mul_(scale).to(case.dtype)
        if name in reads
        else torch.empty(0, dtype=case.dtype, device=case.device)
        for name, (size, scale) in sizes.items()
    }
    positions = case.positions_Z.clone()  # every set has its own, so that they are as cold as the rest
    plan = rosa_kernels.make_plan(positions, rows, columns, case.dtype) if "plan" in reads else None
    return Inputs(case=case, positions_Z=positions, plan=plan, **filled)
