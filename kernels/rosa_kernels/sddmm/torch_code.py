"""The sampled product in torch: ``sampled_addmm`` on the CPU; elsewhere, and for dense masks, the dense gradient sampled."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from rosa_kernels import limits
from rosa_kernels.gradient import gradient_blocks
from rosa_kernels.pattern.csr import acknowledge_beta_csr, compact_plan

# Transposed blocks of tokens are this large, but never of fewer than MIN_TOKENS, which would make the sums of a mask's
# entries more work than the copies. Fastest of 2 to 16 MiB and 64 to 512 tokens at 4096², 11008×4096 and 1536×576.
TRANSPOSE_BYTES = 8 * 2**20
MIN_TOKENS = 256


@torch.no_grad()
def sddmm_cpu(grad_TN: Tensor, x_TM: Tensor, positions_Z: Tensor, plan: list[Tensor]) -> Tensor:
    """``torch.sparse.sampled_addmm`` (MKL) on transposes of the features that the mask uses, a block of tokens at a time.

    The copies take longer than the sums. ``index_select`` of the transposed view makes them on all cores, and leaves
    out the features without entries; ``.T.contiguous()`` runs on one core.
    """
    (tokens, rows), columns = grad_TN.shape, x_TM.shape[1]
    acknowledge_beta_csr()
    dtype = limits.sum_dtype(x_TM.dtype)
    parts = plan or compact_plan(positions_Z, rows, columns).sampling_parts()
    used_rows, used_columns, pointers, column_Z = parts
    size = (used_rows.numel(), used_columns.numel())
    zeros = torch.zeros(positions_Z.numel(), dtype=dtype)
    total = torch.sparse_csr_tensor(pointers, column_Z, zeros, size, check_invariants=False)
    step = max(MIN_TOKENS, TRANSPOSE_BYTES // (dtype.itemsize * sum(size)))
    blocks = -(-tokens // step)
    for grad, x in zip(grad_TN.tensor_split(blocks), x_TM.tensor_split(blocks), strict=True):
        grad_NT, x_MT = grad.T.index_select(0, used_rows), x.T.index_select(0, used_columns)
        total = torch.sparse.sampled_addmm(total, grad_NT.to(dtype), x_MT.to(dtype).T)
    return total.values()


def sddmm_dense(grad_TN: Tensor, x_TM: Tensor, positions_Z: Tensor, bounds: Tensor) -> Tensor:
    """Blocks of rows of the dense gradient, each sampled and dropped. ``bounds``: :func:`row_bounds`, on the CPU."""
    columns = x_TM.shape[1]
    total = torch.empty(positions_Z.numel(), dtype=limits.sum_dtype(x_TM.dtype), device=x_TM.device)
    entries = itertools.pairwise(bounds.tolist())
    for (first, block), (start, stop) in zip(gradient_blocks(grad_TN, x_TM), entries, strict=True):
        if start < stop:
            torch.index_select(block.view(-1), 0, positions_Z[start:stop] - first * columns, out=total[start:stop])
    return total
