"""The low-rank products around a dropped input in plain PyTorch, with the dropout's factors given."""

from __future__ import annotations

from torch import Tensor


def down_reference(x_TM: Tensor, A_RM: Tensor, factors_TM: Tensor) -> Tensor:
    """``(factors · x) Aᵀ``, (T, R). Example: x = [[1, 2]], factors = [[2, 0]], A = [[3, 4]] -> [[6]]."""
    return (factors_TM * x_TM) @ A_RM.T


def backward_reference(grad_h_TR: Tensor, x_TM: Tensor, A_RM: Tensor, factors_TM: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x, ``factors · (grad_h A)`` (T, M), and of A, ``grad_hᵀ (factors · x)`` (R, M).

    Example: grad_h = [[5]], x = [[1, 2]], factors = [[2, 0]], A = [[3, 4]] -> [[30, 0]] and [[10, 0]].
    """
    return factors_TM * (grad_h_TR @ A_RM), grad_h_TR.T @ (factors_TM * x_TM)
