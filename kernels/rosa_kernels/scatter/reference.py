"""A sparse matrix added to a dense one, in plain PyTorch and out of place: what the op in place is held to."""

from __future__ import annotations

from torch import Tensor


def scatter_add_reference(weight: Tensor, values_Z: Tensor, positions_Z: Tensor) -> Tensor:
    """``W + S``, rounded once to the weight's dtype, as a new tensor.

    Shapes: weight any; values_Z and positions_Z (Z,), flat indices into the weight, each once.
    Example: weight [1, 2, 3], positions [0, 2], values [10, 20] -> [11, 2, 23].
    """
    wide = weight.double().flatten()
    return wide.index_add(0, positions_Z.long(), values_Z.double()).to(weight.dtype).view_as(weight)
