"""Bringing in parameters that we have divided, one use ahead of time."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from rosa_ds.zero.sharded import partition_of, start_gather


class GatherAhead:
    """Makes divided parameters whole for as long as a block runs, and starts the gather of the next one meanwhile.

    Which one is next is learned: what followed the last two uses before follows them again. So it goes up through the
    layers in forward and down in backward, also where activations are recomputed. All ranks use the same parameters in
    the same order, as with any collective; a parameter fetched in vain stays until it is used.
    """

    def __init__(self) -> None:
        self._last: tuple[Any, Any] = (None, None)
        self._follower: dict[tuple[int, int], Any] = {}
        self._pending: dict[int, Callable[[], Tensor]] = {}

    @contextlib.contextmanager
    def whole(self, parameter: Any) -> Iterator[None]:
        """Inside the block ``parameter.data`` is all of it. Collective."""
        before, last = self._last
        self._follower[id(before), id(last)] = parameter
        self._last = (last, parameter)
        wait = self._pending.pop(id(parameter), None) or self._start(parameter)
        following = self._follower.get((id(last), id(parameter)))
        if following is not None and following is not parameter and id(following) not in self._pending:
            self._pending[id(following)] = self._start(following)
        parameter.data = wait()
        try:
            yield
        finally:
            parameter.data = torch.empty(0, dtype=parameter.dtype, device=parameter.device)

    @staticmethod
    def _start(parameter: Any) -> Callable[[], Tensor]:
        partition = partition_of(parameter)
        assert partition is not None
        return start_gather(parameter, partition.share)
