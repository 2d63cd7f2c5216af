"""The dense gradient of a weight a block of rows at a time, and its largest entries without ever holding all of it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from rosa_kernels.limits import sum_dtype

# A block of rows of the gradient is this large: one all-reduce of a size at which networks run near their full rate.
BLOCK_BYTES = 64 * 2**20
TOKENS_AT_ONCE = 1024
"""So many rows of 16-bit factors are made wide at a time."""


def gradient_blocks(grad_TN: Tensor, x_TM: Tensor) -> Iterator[tuple[int, Tensor]]:
    """``gradᵀ x`` as (first row, block of rows), float32 (float64 for float64), at most BLOCK_BYTES each or one row.

    Beside a block it takes TOKENS_AT_ONCE rows of its 16-bit factors in float32; wide ones are read where they are.
    Shapes: grad_TN (T, N); x_TM (T, M); a block (rows, M).
    """
    wide = sum_dtype(x_TM.dtype)
    rows = block_rows(x_TM.shape[1], wide.itemsize)
    for first in range(0, grad_TN.shape[1], rows):
        grad = grad_TN[:, first : first + rows]
        if grad.dtype == x_TM.dtype == wide:
            yield first, grad.T @ x_TM
            continue
        block = x_TM.new_zeros((grad.shape[1], x_TM.shape[1]), dtype=wide)
        for some, others in zip(grad.split(TOKENS_AT_ONCE), x_TM.split(TOKENS_AT_ONCE), strict=True):
            block.addmm_(some.to(wide).T, others.to(wide))
        yield first, block


def block_rows(columns: int, itemsize: int) -> int:
    """How many rows of a gradient (N, M) with M columns are formed at once, if it has so many."""
    return max(1, BLOCK_BYTES // (itemsize * columns))


class RunningTopK:
    """The ``count`` largest of all scores seen so far, with their positions: O(count) memory between blocks."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._scores: Tensor | None = None
        self._positions: Tensor | None = None

    def add(self, scores: Tensor, first: int) -> None:
        """Take part of the scores. Shapes: scores any; ``first`` is the flat position of their first entry."""
        best, positions = scores.flatten().topk(min(self.count, scores.numel()), sorted=False)
        positions = (positions + first).to(torch.int32)
        if self._scores is not None and self._positions is not None:
            best, positions = torch.cat([self._scores, best]), torch.cat([self._positions, positions])
            best, chosen = best.topk(min(self.count, best.numel()), sorted=False)
            positions = positions[chosen]
        self._scores, self._positions = best, positions

    def tensors(self) -> list[Tensor]:
        """What is kept at the moment: nothing, or scores and positions."""
        return [tensor for tensor in (self._scores, self._positions) if tensor is not None]

    def scores(self) -> Tensor:
        """(count,) the largest scores, in no order. Fewer while fewer were seen."""
        return torch.empty(0) if self._scores is None else self._scores

    def positions(self) -> Tensor:
        """(count,) int32, sorted."""
        return torch.empty(0, dtype=torch.int32) if self._positions is None else self._positions.sort().values
