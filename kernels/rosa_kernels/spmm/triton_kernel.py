"""Triton kernel of the product with a sparse matrix: its non-empty tiles as small dense matrices on tensor cores."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rosa_kernels.limits import tokens_at_once
from rosa_kernels.pattern.tiles import TILE
from rosa_kernels.pattern.triton_kernel import gather_columns
from rosa_kernels.spec import BYTES, Spec

# By bytes of an input; in float32 anything larger, or fewer warps, spills registers on sm_80.
LAUNCH = {
    2: {"BLOCK_T": 64, "num_warps": 4, "num_stages": 3},
    4: {"BLOCK_T": 32, "num_warps": 8, "num_stages": 3},
}


@triton.jit(do_not_specialize=["num_tokens"])
def spmm_tiles_kernel(
    y_ptr,
    x_ptr,
    blocks_ptr,
    order_ptr,
    pointers_ptr,
    members_ptr,
    num_tokens,
    x_width,
    y_stride_t,
    y_stride_c,
    TRANSPOSE: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """One program owns BLOCK_T tokens and one block of output features, and walks the tiles of that block.

    y[t, order[o]] += Σ_tiles x[t, block of the tile] · tileᵀ (or · tile with TRANSPOSE), sums in float32.
    """
    block = tl.program_id(0)
    offs_t = (tl.program_id(1).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T))[:, None]  # [BLOCK_T, 1]
    offs_i = tl.arange(0, TILE)  # [TILE]
    acc = tl.zeros([BLOCK_T, TILE], dtype=tl.float32)
    for member in range(tl.load(pointers_ptr + block), tl.load(pointers_ptr + block + 1)):
        tile = tl.load(members_ptr + 2 * member).to(tl.int64)
        inner = tl.load(members_ptr + 2 * member + 1).to(tl.int64) * TILE
        x = tl.load(x_ptr + offs_t * x_width + inner + offs_i[None, :], mask=offs_t < num_tokens, other=0.0)
        sparse = tl.load(blocks_ptr + tile * TILE * TILE + offs_i[:, None] * TILE + offs_i[None, :])  # rows, columns
        acc = tl.dot(x, sparse if TRANSPOSE else tl.trans(sparse), acc, input_precision="ieee")
    feature = tl.load(order_ptr + block * TILE + offs_i).to(tl.int64)[None, :]
    target = y_ptr + offs_t * y_stride_t + feature * y_stride_c
    inside = (offs_t < num_tokens) & (feature >= 0)
    y = tl.load(target, mask=inside, other=0.0)
    tl.store(target, (y.to(tl.float32) + acc).to(y.dtype), mask=inside)


def launch_spmm_add(y: Tensor, x: Tensor, values_Z: Tensor, transpose: bool, plan: list[Tensor]) -> None:
    """Add to ``y`` in place. Inputs are checked; ``plan``: the parts of :meth:`TilePlan.product_parts`."""
    in_order, out_order, slots, cells, pointers, members = plan
    blocks = torch.zeros(len(members) * TILE * TILE, dtype=x.dtype, device=x.device)
    blocks.index_copy_(0, cells.long(), values_Z.index_select(0, slots).to(x.dtype))
    launch = LAUNCH[x.element_size()]
    step = tokens_at_once(x.element_size() * in_order.numel())
    for start in range(0, x.shape[0], step):
        part = y[start : start + step]
        spmm_tiles_kernel[(out_order.numel() // TILE, triton.cdiv(part.shape[0], launch["BLOCK_T"]))](
            part,
            gather_columns(x[start : start + step], in_order),
            blocks,
            out_order,
            pointers,
            members,
            part.shape[0],
            in_order.numel(),
            *part.stride(),
            TRANSPOSE=transpose,
            TILE=TILE,
            **launch,
        )


def compiled_as(dtype: str) -> list[Spec]:
    """For :mod:`rosa_kernels.aot`, as they are launched here."""
    data, index = f"*{dtype}", "*i32"
    arguments = {"y_ptr": data, "x_ptr": data, "blocks_ptr": data, "order_ptr": index, "pointers_ptr": index}
    arguments |= {"members_ptr": index, "num_tokens": "i32", "x_width": "i32!"}
    arguments |= {"y_stride_t": "i32!", "y_stride_c": "1"}
    shared = {"TILE": TILE, **LAUNCH[BYTES[dtype]]}
    return [Spec(spmm_tiles_kernel, arguments, {"TRANSPOSE": way, **shared}, tiles=True) for way in (False, True)]
