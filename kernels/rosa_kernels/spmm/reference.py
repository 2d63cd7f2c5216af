"""Product with a sparse matrix in plain PyTorch, by the dense matrix: the definition that the op is held to."""

from __future__ import annotations

from torch import Tensor


def spmm_reference(x: Tensor, values_Z: Tensor, positions_Z: Tensor, shape: tuple[int, int], transpose: bool) -> Tensor:
    """``x Sᵀ`` of S (N, M), or with ``transpose`` ``x S``.

    Shapes: x (T, M), or (T, N) with transpose; values_Z, positions_Z (Z,); result (T, N), or (T, M). Dtypes: kept.
    Example: x = [[3, 4, 5]], S = [[0, 0, 2], [7, 0, 0]] (positions [2, 3]) -> [[10, 21]].
    """
    dense = x.new_zeros(shape[0] * shape[1]).index_add(0, positions_Z.long(), values_Z.to(x.dtype)).view(shape)
    return x @ dense if transpose else x @ dense.T
