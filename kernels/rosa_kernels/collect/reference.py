"""Positions of a matrix product's largest entries, by the whole product: what the running choice is held to."""

from __future__ import annotations

from torch import Tensor


def top_positions_reference(grad_TN: Tensor, x_TM: Tensor, count: int) -> Tensor:
    """Flat row-major positions of the ``count`` entries of ``gradᵀ x`` with the largest square, sorted, (count,) int64.

    Example: grad = [[1, -3]], x = [[1, 2]], count 2: gradᵀ x = [[1, 2], [-3, -6]] -> [2, 3].
    """
    return (grad_TN.T @ x_TM).square().flatten().topk(count).indices.sort().values
