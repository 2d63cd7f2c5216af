"""Triton kernel that copies the wanted columns of a matrix together, so that tiles of them load in whole lines."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rosa_kernels.spec import BYTES, Spec

# A row of at most this many bytes is permuted through shared memory (64 KiB is all an AMD CU has); a longer one
# through the L1 cache.
SHARED_ROW_BYTES = 64 * 2**10


@triton.jit
def gather_columns_kernel(
    source_ptr,
    order_ptr,
    target_ptr,
    width,
    target_width,
    source_stride_t,
    source_stride_c,
    SHARED: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """target[t, c] = source[t, order[c]], 0 where order[c] < 0. One program a token.

    Example: source [[3, 4, 5]], order [2, 0, -1] -> [[5, 3, 0]].
    """
    token = tl.program_id(0).to(tl.int64)
    row_ptr = source_ptr + token * source_stride_t
    if SHARED:
        offs_w = tl.arange(0, BLOCK_W)  # [BLOCK_W]
        row = tl.load(row_ptr + offs_w.to(tl.int64) * source_stride_c, mask=offs_w < width, other=0.0)
    for start in range(0, target_width, BLOCK_C):
        offs_c = start + tl.arange(0, BLOCK_C)  # [BLOCK_C]
        column = tl.load(order_ptr + offs_c, mask=offs_c < target_width, other=-1)
        if SHARED:
            picked = tl.where(column >= 0, tl.gather(row, tl.maximum(column, 0), 0), 0.0)
        else:
            picked = tl.load(row_ptr + column.to(tl.int64) * source_stride_c, mask=column >= 0, other=0.0)
        tl.store(target_ptr + token * target_width + offs_c, picked, mask=offs_c < target_width)


def gather_launch(itemsize: int, width: int, target_width: int) -> dict[str, int]:
    """Blocks for a row of ``width`` numbers of which ``target_width`` are wanted."""
    padded = triton.next_power_of_2(width)
    return {
        "SHARED": padded * itemsize <= SHARED_ROW_BYTES,
        "BLOCK_W": padded,
        "BLOCK_C": min(triton.next_power_of_2(target_width), 8192),
        "num_warps": 4 if padded <= 4096 else 16,
    }


def gather_columns(source_TC: Tensor, order: Tensor) -> Tensor:
    """The columns of ``source_TC`` in ``order`` (-1: zeros), contiguous, of its dtype."""
    (tokens, width), target_width = source_TC.shape, order.numel()
    target = torch.empty(tokens, target_width, dtype=source_TC.dtype, device=source_TC.device)
    gather_columns_kernel[(tokens,)](
        source_TC,
        order,
        target,
        width,
        target_width,
        source_TC.stride(0),
        source_TC.stride(1),
        **gather_launch(source_TC.element_size(), width, target_width),
    )
    return target


def compiled_as(dtype: str) -> list[Spec]:
    """For :mod:`rosa_kernels.aot`, as they are launched here."""
    data = f"*{dtype}"
    arguments = {"source_ptr": data, "order_ptr": "*i32", "target_ptr": data, "width": "i32", "target_width": "i32!"}
    arguments |= {"source_stride_t": "i32!", "source_stride_c": "1"}
    launches = (gather_launch(BYTES[dtype], width, width * 3 // 4) for width in (4096, 11008, 128256))
    return [Spec(gather_columns_kernel, arguments, launch) for launch in launches]
