"""An adapted layer at the kernels' level, whose step several stages repeat, capture, compile and sanitise."""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch
from torch import Tensor

import rosa_kernels
from rosa_ds.planning.gpu_check.stage import randn
from rosa_kernels.testing import random_positions

SparseProduct = Literal["scatter", "separate"]


@dataclasses.dataclass(frozen=True)
class Layer:
    """Shapes: ``x`` (T, M), ``grad`` (T, N), ``weight`` (N, M), ``A`` (R, M), ``B`` (N, R), ``values`` and ``positions`` (Z,)."""

    x: Tensor
    grad: Tensor
    weight: Tensor
    A: Tensor
    B: Tensor
    values: Tensor
    positions: Tensor
    plan: rosa_kernels.Plan | None

    @classmethod
    def make(
        cls, tokens: int, rows: int, columns: int, dtype: torch.dtype, device: torch.device, density: float = 0.006
    ) -> Layer:
        """Random numbers, rank 16, as many entries as a run has by default."""
        positions = random_positions(rows, columns, density).to(device)
        trained = {
            "A": randn(16, columns, dtype=dtype, device=device, seed=3),
            "B": randn(rows, 16, dtype=dtype, device=device, seed=4),
            "values": randn(positions.numel(), dtype=dtype, device=device, seed=5),
        }
        return cls(
            x=randn(tokens, columns, dtype=dtype, device=device, seed=0).requires_grad_(),
            grad=randn(tokens, rows, dtype=dtype, device=device, seed=1),
            weight=randn(rows, columns, dtype=dtype, device=device, seed=2),
            positions=positions,
            plan=rosa_kernels.make_plan(positions, rows, columns, dtype),
            **{name: tensor.requires_grad_() for name, tensor in trained.items()},
        )

    def forward(self, x: Tensor, dropout: float = 0.0, sparse_product: SparseProduct = "scatter") -> Tensor:
        return rosa_kernels.adapter_linear(
            x,
            self.weight,
            A=self.A,
            B=self.B,
            scale=2.0,
            values=self.values,
            positions=self.positions,
            dropout=dropout,
            plan=self.plan,
            sparse_product=sparse_product,
        )

    def step(self, dropout: float = 0.0, sparse_product: SparseProduct = "scatter") -> dict[str, Tensor]:
        """The output and all gradients."""
        y = self.forward(self.x, dropout, sparse_product)
        given = {"x": self.x, "A": self.A, "B": self.B, "values": self.values}
        return {
            "y": y.detach(),
            **dict(zip(given, torch.autograd.grad(y, list(given.values()), self.grad), strict=True)),
        }

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """T, N, M, R, Z."""
        return self.x.shape[0], *self.weight.shape, self.A.shape[0], self.positions.numel()
