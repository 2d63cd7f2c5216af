"""Public sampled dense-dense product: checks once, then sums over tokens in bounded memory."""

from __future__ import annotations

import functools
import itertools
import warnings

import torch
from torch import Tensor

# A block of tokens (CPU, 16-bit inputs) or of rows (other devices) is in float32 at a time; this bounds its memory.
SCRATCH_BYTES = 64 * 2**20


def _check_inputs(grad_TN: Tensor, x_TM: Tensor, positions_Z: Tensor) -> None:
    if grad_TN.ndim != 2 or x_TM.ndim != 2 or grad_TN.shape[0] != x_TM.shape[0]:
        raise ValueError(
            f"sddmm takes grad (T, N) and x (T, M) with the same T, given {tuple(grad_TN.shape)} and "
            f"{tuple(x_TM.shape)}: flatten batch and length first"
        )
    if grad_TN.dtype != x_TM.dtype or not grad_TN.is_floating_point():
        raise ValueError(f"sddmm takes grad and x of one floating type, given {grad_TN.dtype} and {x_TM.dtype}")
    if positions_Z.ndim != 1 or positions_Z.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"sddmm takes positions (Z,) of int32 or int64, given {tuple(positions_Z.shape)} of {positions_Z.dtype}"
        )


@functools.cache
def _acknowledge_beta_csr() -> None:
    """torch says once per process that CSR tensors are in beta; that is of no use to the caller."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        torch.sparse_csr_tensor([0, 0], [], [], (1, 1))


def csr_pattern(positions_Z: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Row pointers (rows + 1,) and column indices (Z,) of sorted flat positions, both in their dtype."""
    edges = torch.arange(rows + 1, device=positions_Z.device) * columns
    if rows * columns <= torch.iinfo(positions_Z.dtype).max:
        edges = edges.to(positions_Z.dtype)
    pointers = torch.searchsorted(positions_Z.to(edges.dtype), edges)
    return pointers.to(positions_Z.dtype), positions_Z % columns


def _sddmm_cpu(grad_TN: Tensor, x_TM: Tensor, positions_Z: Tensor) -> Tensor:
    (tokens, rows), columns = grad_TN.shape, x_TM.shape[1]
    _acknowledge_beta_csr()
    dtype = torch.float64 if x_TM.dtype == torch.float64 else torch.float32
    pointers, column_Z = csr_pattern(positions_Z, rows, columns)
    total = torch.sparse_csr_tensor(
        pointers, column_Z, torch.zeros(positions_Z.numel(), dtype=dtype), (rows, columns), check_invariants=False
    )
    step = tokens
    if x_TM.dtype != dtype:
        step = max(1, SCRATCH_BYTES // (dtype.itemsize * (rows + columns)))
    for start in range(0, tokens, max(step, 1)):
        grad, x = grad_TN[start : start + step].to(dtype), x_TM[start : start + step].to(dtype)
        total = torch.sparse.sampled_addmm(total, grad.T, x)
    return total.values()


def _sddmm_blocks(grad_TN: Tensor, x_TM: Tensor, positions_Z: Tensor) -> Tensor:
    """Blocks of rows of the dense product on the device's matrix units, each sampled and dropped."""
    (tokens, rows), columns = grad_TN.shape, x_TM.shape[1]
    dtype = torch.float64 if x_TM.dtype == torch.float64 else torch.float32
    step = max(1, SCRATCH_BYTES // (dtype.itemsize * max(columns, tokens)))
    edges = torch.arange(0, rows + step, step, device=positions_Z.device).clamp_(max=rows) * columns
    bounds = torch.searchsorted(positions_Z.long(), edges).tolist()
    total = torch.empty(positions_Z.numel(), dtype=dtype, device=x_TM.device)
    wide_x = x_TM.to(dtype)
    for block, (start, stop) in enumerate(itertools.pairwise(bounds)):
        if start < stop:
            dense = grad_TN[:, block * step : (block + 1) * step].to(dtype).T @ wide_x
            total[start:stop] = dense.flatten()[positions_Z[start:stop].long() - block * step * columns]
    return total


def sddmm(grad_TN: Tensor, x_TM: Tensor, positions_Z: Tensor) -> Tensor:
    """Entries of ``gradᵀ x`` at given positions, without forming the dense product.

    Args:
        grad_TN: gradient of a linear layer's output.
        x_TM: the layer's input.
        positions_Z: flat row-major indices into (N, M), sorted, each once.

    Returns:
        (Z,) sums over tokens, float32 (float64 for float64 inputs).

    Shapes: grad_TN (T, N); x_TM (T, M); positions_Z (Z,).
    Raises: ValueError for shapes or dtypes that do not fit together.
    Source: RoSA, arXiv 2401.04679. CPU: ``torch.sparse.sampled_addmm``; other devices: blocks of the dense
    product, sampled.
    """
    _check_inputs(grad_TN, x_TM, positions_Z)
    if positions_Z.numel() == 0 or grad_TN.shape[0] == 0:
        dtype = torch.float64 if x_TM.dtype == torch.float64 else torch.float32
        return torch.zeros(positions_Z.numel(), dtype=dtype, device=x_TM.device)
    implementation = _sddmm_cpu if x_TM.device.type == "cpu" else _sddmm_blocks
    return implementation(grad_TN, x_TM, positions_Z)
