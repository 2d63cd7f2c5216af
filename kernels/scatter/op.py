"""Sparse values written into a dense weight for a while, in place and exactly undone: O(Z), no second weight."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import Tensor


def _check_inputs(weight: Tensor, values_Z: Tensor, positions_Z: Tensor) -> None:
    if values_Z.shape != positions_Z.shape or values_Z.ndim != 1:
        raise ValueError(
            f"values and positions are both (Z,), given {tuple(values_Z.shape)} and {tuple(positions_Z.shape)}"
        )
    if not weight.is_contiguous():
        raise ValueError("the weight must be contiguous, since positions index its flat memory: call .contiguous()")


@contextlib.contextmanager
def scattered(weight: Tensor, values_Z: Tensor, positions_Z: Tensor) -> Iterator[Tensor]:
    """Inside the block ``weight[positions] + values`` stands in ``weight``; after it the old numbers, bit for bit.

    The sum is rounded once, to the weight's dtype. Autograd does not see the change (the version counter stays),
    so nothing inside the block may save the weight for a backward that runs after it.

    Shapes: weight any, contiguous, indexed flat; values_Z and positions_Z (Z,), each position once.
    Raises: ValueError for shapes that do not fit or a weight that is not contiguous.
    """
    _check_inputs(weight, values_Z, positions_Z)
    flat, index = weight.data.view(-1), positions_Z.long()
    old = flat[index]
    flat[index] = (old.float() + values_Z.detach().float() if old.dtype.itemsize < 4 else old + values_Z.detach()).to(
        old.dtype
    )
    try:
        yield weight
    finally:
        flat[index] = old
