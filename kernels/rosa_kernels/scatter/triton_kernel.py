"""Triton kernels that add values to chosen entries of a weight, keeping the old ones, and put those back."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rosa_kernels.spec import Spec

BLOCK_Z = 1024  # eight entries for each of 128 threads: enough loads in flight to hide their latency


@triton.jit
def scatter_add_kernel(
    weight_ptr, values_ptr, positions_ptr, old_ptr, num_entries, SUM_DTYPE: tl.constexpr, BLOCK_Z: tl.constexpr
):
    """old[z] = weight[positions[z]]; weight[positions[z]] = old[z] + values[z], rounded once. Each position once.

    Example: weight [1, 2, 3], positions [0, 2], values [10, 20] -> weight [11, 2, 23], old [1, 3].
    """
    offs_z = tl.program_id(0).to(tl.int64) * BLOCK_Z + tl.arange(0, BLOCK_Z)  # [BLOCK_Z]
    entry = offs_z < num_entries
    target = weight_ptr + tl.load(positions_ptr + offs_z, mask=entry, other=0)
    old = tl.load(target, mask=entry, other=0.0)
    tl.store(old_ptr + offs_z, old, mask=entry)
    total = old.to(SUM_DTYPE) + tl.load(values_ptr + offs_z, mask=entry, other=0.0).to(SUM_DTYPE)
    tl.store(target, total.to(old.dtype), mask=entry)


@triton.jit
def restore_kernel(weight_ptr, positions_ptr, old_ptr, num_entries, BLOCK_Z: tl.constexpr):
    """weight[positions[z]] = old[z]. Example: weight [11, 2, 23], positions [0, 2], old [1, 3] -> [1, 2, 3]."""
    offs_z = tl.program_id(0).to(tl.int64) * BLOCK_Z + tl.arange(0, BLOCK_Z)  # [BLOCK_Z]
    entry = offs_z < num_entries
    position = tl.load(positions_ptr + offs_z, mask=entry, other=0)
    tl.store(weight_ptr + position, tl.load(old_ptr + offs_z, mask=entry, other=0.0), mask=entry)


def launch_scatter_add(weight: Tensor, values_Z: Tensor, positions_Z: Tensor) -> Tensor:
    """Add in place, return the old numbers (Z,). Inputs are checked."""
    old = torch.empty_like(positions_Z, dtype=weight.dtype)
    scatter_add_kernel[(triton.cdiv(old.numel(), BLOCK_Z),)](
        weight,
        values_Z,
        positions_Z,
        old,
        old.numel(),
        SUM_DTYPE=tl.float64 if weight.dtype == torch.float64 else tl.float32,
        BLOCK_Z=BLOCK_Z,
    )
    return old


def launch_restore(weight: Tensor, old_Z: Tensor, positions_Z: Tensor) -> None:
    """Put the old numbers back. Inputs are checked."""
    restore_kernel[(triton.cdiv(old_Z.numel(), BLOCK_Z),)](weight, positions_Z, old_Z, old_Z.numel(), BLOCK_Z=BLOCK_Z)


def compiled_as(dtype: str) -> list[Spec]:
    """For :mod:`rosa_kernels.aot`, as they are launched here."""
    data, launch = f"*{dtype}", {"BLOCK_Z": BLOCK_Z, "num_warps": 4}
    scatter = {
        "weight_ptr": data,
        "values_ptr": "*fp32",
        "positions_ptr": "*i32",
        "old_ptr": data,
        "num_entries": "i32",
    }
    restore = {"weight_ptr": data, "positions_ptr": "*i32", "old_ptr": data, "num_entries": "i32"}
    return [
        Spec(scatter_add_kernel, scatter, {"SUM_DTYPE": "fp32", **launch}),
        Spec(restore_kernel, restore, launch),
    ]
