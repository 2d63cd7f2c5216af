"""Triton kernels of the sampled product: tiles on tensor cores, and a gather for the entries between them.

Nothing here waits for the device, allocates on another stream or uses atomics: launches can be captured in a CUDA graph,
and the same input gives the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rosa_kernels.limits import sum_dtype, token_splits, tokens_at_once
from rosa_kernels.pattern.tiles import TILE
from rosa_kernels.pattern.triton_kernel import gather_columns
from rosa_kernels.spec import BYTES, Spec

# By bytes of an input. In 16 bits both (BLOCK_T, 64) operands are loaded ahead in three stages on sm_90, 48 KiB of shared
# memory; sm_80 loads x alone ahead. 32 tokens of float32, whose products run on ordinary cores, spill registers on sm_80.
TILES_LAUNCH = {
    2: {"BLOCK_T": 64, "BLOCK_Z": 256, "num_warps": 4, "num_stages": 3},
    4: {"BLOCK_T": 16, "BLOCK_Z": 256, "num_warps": 4, "num_stages": 3},
}
GATHER_LAUNCH = {"BLOCK_Z": 64, "BLOCK_T": 16, "num_warps": 4}


@triton.jit(do_not_specialize=["num_tokens"])
def sddmm_tiles_kernel(
    grad_ptr,
    x_ptr,
    tiles_ptr,
    starts_ptr,
    slots_ptr,
    cells_ptr,
    values_ptr,
    num_tokens,
    tokens_per_split,
    num_entries,
    grad_width,
    x_width,
    ACCUMULATE: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_Z: tl.constexpr,
):
    """One program owns one tile and one share of the tokens: a dense (TILE, TILE) product, of which the entries are kept.

    values[split, slots[z]] = Σ_t grad[t, tile row of cells[z]] · x[t, tile column of cells[z]], t in the split's share.
    """
    tile = tl.program_id(0)
    split = tl.program_id(1).to(tl.int64)
    offs_n = tl.load(tiles_ptr + 2 * tile) * TILE + tl.arange(0, TILE)  # [TILE]
    offs_m = tl.load(tiles_ptr + 2 * tile + 1) * TILE + tl.arange(0, TILE)  # [TILE]
    first = split * tokens_per_split
    last = tl.minimum(first + tokens_per_split, num_tokens)
    acc = tl.zeros([TILE, TILE], dtype=tl.float32)
    for start in range(first, last, BLOCK_T):
        offs_t = start + tl.arange(0, BLOCK_T)  # [BLOCK_T], int64
        inside = (offs_t < last)[:, None]
        grad = tl.load(grad_ptr + offs_t[:, None] * grad_width + offs_n[None, :], mask=inside, other=0.0)
        x = tl.load(x_ptr + offs_t[:, None] * x_width + offs_m[None, :], mask=inside, other=0.0)
        acc = tl.dot(tl.trans(grad), x, acc, input_precision="ieee")
    flat = tl.reshape(acc, [TILE * TILE])
    end = tl.load(starts_ptr + tile + 1)
    for z in range(tl.load(starts_ptr + tile), end, BLOCK_Z):
        offs_z = z + tl.arange(0, BLOCK_Z)  # [BLOCK_Z]
        entry = offs_z < end
        cell = tl.load(cells_ptr + offs_z, mask=entry, other=0) & (TILE * TILE - 1)
        target = values_ptr + split * num_entries + tl.load(slots_ptr + offs_z, mask=entry, other=0)
        value = tl.gather(flat, cell, 0)
        if ACCUMULATE:
            value += tl.load(target, mask=entry, other=0.0)
        tl.store(target, value, mask=entry)


@triton.jit(do_not_specialize=["num_tokens"])
def sddmm_gather_kernel(
    grad_ptr,
    x_ptr,
    positions_ptr,
    slots_ptr,
    values_ptr,
    num_chosen,
    num_tokens,
    tokens_per_split,
    num_entries,
    columns,
    grad_stride_t,
    grad_stride_n,
    x_stride_t,
    x_stride_m,
    CHOSEN: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    BLOCK_Z: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """One program owns BLOCK_Z entries (all, or with CHOSEN those in ``slots``) and one share of the tokens.

    values[split, z] = Σ_t grad[t, positions[z] // columns] · x[t, positions[z] % columns]
    Example: grad [[1, 2]], x [[3, 4, 5]], positions [2, 3] -> [5, 6].
    """
    split = tl.program_id(1).to(tl.int64)
    offs_z = tl.program_id(0).to(tl.int64) * BLOCK_Z + tl.arange(0, BLOCK_Z)  # [BLOCK_Z]
    entry = offs_z < num_chosen
    slot = tl.load(slots_ptr + offs_z, mask=entry, other=0).to(tl.int64) if CHOSEN else offs_z
    position = tl.load(positions_ptr + slot, mask=entry, other=0).to(tl.int64)
    grad_column = grad_ptr + (position // columns) * grad_stride_n
    x_column = x_ptr + (position % columns) * x_stride_m
    first = split * tokens_per_split
    last = tl.minimum(first + tokens_per_split, num_tokens)
    acc = tl.zeros([BLOCK_Z], dtype=values_ptr.dtype.element_ty)
    for start in range(first, last, BLOCK_T):
        offs_t = (start + tl.arange(0, BLOCK_T))[:, None]  # [BLOCK_T, 1], int64
        inside = (offs_t < last) & entry[None, :]
        grad = tl.load(grad_column[None, :] + offs_t * grad_stride_t, mask=inside, other=0.0)
        x = tl.load(x_column[None, :] + offs_t * x_stride_t, mask=inside, other=0.0)
        acc += tl.sum(grad.to(acc.dtype) * x.to(acc.dtype), axis=0)
    target = values_ptr + split * num_entries + slot
    if ACCUMULATE:
        acc += tl.load(target, mask=entry, other=0.0)
    tl.store(target, acc, mask=entry)


def launch_sddmm(grad_TN: Tensor, x_TM: Tensor, positions_Z: Tensor, plan: list[Tensor]) -> Tensor:
    """Values (Z,), float32 (float64 for float64). Inputs are checked, T and Z are not zero.

    ``plan``: the parts of :meth:`TilePlan.sampling_parts`, or empty: then every entry is gathered.
    """
    tokens, entries, columns = x_TM.shape[0], positions_Z.numel(), x_TM.shape[1]
    wide = sum_dtype(x_TM.dtype)
    if wide == torch.float64:
        plan = []  # tensor cores of float64 are not worth a second kind of tile
    rows_order, columns_order, tiles, starts, slots, cells, rest = plan or [positions_Z[:0]] * 7
    chosen = rest.numel() if plan else entries
    width = rows_order.numel() + columns_order.numel()
    step = tokens_at_once(x_TM.element_size() * width) if len(tiles) else tokens
    tile_launch = TILES_LAUNCH.get(x_TM.element_size(), TILES_LAUNCH[4])
    block_t = tile_launch["BLOCK_T"]
    programs = len(tiles) + triton.cdiv(chosen, GATHER_LAUNCH["BLOCK_Z"])
    splits = token_splits(programs, min(step, tokens), 4 * block_t)
    values = torch.empty(splits, entries, dtype=wide, device=x_TM.device)
    for start in range(0, tokens, step):
        grad, x = grad_TN[start : start + step], x_TM[start : start + step]
        share = triton.cdiv(triton.cdiv(grad.shape[0], splits), block_t) * block_t
        sizes = (grad.shape[0], share, entries)
        if len(tiles):
            sddmm_tiles_kernel[(len(tiles), splits)](
                gather_columns(grad, rows_order),
                gather_columns(x, columns_order),
                tiles,
                starts,
                slots,
                cells,
                values,
                *sizes,
                rows_order.numel(),
                columns_order.numel(),
                ACCUMULATE=start > 0,
                TILE=TILE,
                **tile_launch,
            )
        if chosen:
            sddmm_gather_kernel[(triton.cdiv(chosen, GATHER_LAUNCH["BLOCK_Z"]), splits)](
                grad,
                x,
                positions_Z,
                rest,
                values,
                chosen,
                *sizes,
                columns,
                *grad.stride(),
                *x.stride(),
                CHOSEN=bool(plan),
                ACCUMULATE=start > 0,
                **GATHER_LAUNCH,
            )
    return values[0] if splits == 1 else values.sum(0)


def compiled_as(dtype: str) -> list[Spec]:
    """For :mod:`rosa_kernels.aot`, as they are launched here."""
    data, index = f"*{dtype}", "*i32"
    tiles = {"grad_ptr": data, "x_ptr": data, "tiles_ptr": index, "starts_ptr": index, "slots_ptr": index}
    tiles |= {"cells_ptr": index, "values_ptr": "*fp32", "num_tokens": "i32", "tokens_per_split": "i32!"}
    tiles |= {"num_entries": "i32", "grad_width": "i32!", "x_width": "i32!"}
    entries = {"grad_ptr": data, "x_ptr": data, "positions_ptr": index, "slots_ptr": index, "values_ptr": "*fp32"}
    entries |= dict.fromkeys(("num_chosen", "num_tokens", "tokens_per_split", "num_entries", "columns"), "i32")
    entries |= {"grad_stride_t": "i32!", "grad_stride_n": "1", "x_stride_t": "i32!", "x_stride_m": "1"}
    tiled = {"ACCUMULATE": True, "TILE": TILE, **TILES_LAUNCH[BYTES[dtype]]}
    return [
        Spec(sddmm_tiles_kernel, tiles, tiled, tiles=True),
        Spec(sddmm_gather_kernel, entries, {"CHOSEN": True, "ACCUMULATE": True, **GATHER_LAUNCH}),
    ]
