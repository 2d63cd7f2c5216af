"""The dense gradient of a weight, a block of rows at a time: masks are chosen from it, and dense ones sampled from it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from rosa_kernels.limits import sum_dtype

BLOCK_BYTES = 64 * 2**20
"""Of a block in float32: an all-reduce of a size at which networks run near their full rate."""
TOKENS_AT_ONCE = 1024
"""So many rows of 16-bit factors are made wide at a time, where torch has no product of them into float32."""


def multiplies_into_float32(device: torch.device) -> bool:
    """Whether torch's product of two 16-bit matrices can give its float32 sums: CUDA from torch 2.8 on, not ROCm."""
    return (
        device.type == "cuda"
        and torch.version.hip is None
        and hasattr(torch.ops.aten.mm, "dtype")
        and not getattr(torch.backends.cuda.matmul, "allow_fp16_accumulation", False)
    )


def block_rows(columns: int) -> int:
    """How many rows of a gradient (N, M) with M columns are formed at once, if it has so many."""
    return max(1, BLOCK_BYTES // (4 * columns))


def gradient_blocks(grad_TN: Tensor, x_TM: Tensor) -> Iterator[tuple[int, Tensor]]:
    """``gradᵀ x`` as (first row, block of :func:`block_rows` rows), float32 (float64 for float64).

    The factors are read where they are; but 16-bit ones, where torch cannot multiply them into float32, as copies of
    TOKENS_AT_ONCE rows. Does not wait for the device.
    Shapes: grad_TN (T, N); x_TM (T, M); a block (rows, M).
    """
    wide = sum_dtype(x_TM.dtype)
    rows = block_rows(x_TM.shape[1])
    for first in range(0, grad_TN.shape[1], rows):
        grad = grad_TN[:, first : first + rows]
        if grad.dtype == x_TM.dtype == wide:
            yield first, grad.T @ x_TM
        elif grad.dtype == x_TM.dtype and multiplies_into_float32(x_TM.device):
            yield first, torch.mm(grad.T, x_TM, out_dtype=wide)
        else:
            block = x_TM.new_zeros((grad.shape[1], x_TM.shape[1]), dtype=wide)
            for some, others in zip(grad.split(TOKENS_AT_ONCE), x_TM.split(TOKENS_AT_ONCE), strict=True):
                block.addmm_(some.to(wide).T, others.to(wide))
            yield first, block
