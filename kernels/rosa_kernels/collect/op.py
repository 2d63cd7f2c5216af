"""The largest entries of a dense gradient, without ever holding all of it."""

from __future__ import annotations

import torch
from torch import Tensor


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
