"""Sorted flat positions as torch's CSR pattern."""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor


@functools.cache
def acknowledge_beta_csr() -> None:
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


COMPACT_PARTS = 4  # tensors of CompactPlan.sampling_parts


@dataclass(frozen=True, eq=False)
class CompactPlan:
    """A mask as a CSR matrix without empty rows and columns: what ``sampled_addmm`` reads.

    Attributes:
        rows, columns, entries: sizes of the matrix and number of entries.
        used_rows, used_columns: sorted indices of those with entries, int64.
        pointers, column_indices: :func:`csr_pattern` of the matrix that the used ones form.
    """

    rows: int
    columns: int
    entries: int
    used_rows: Tensor
    used_columns: Tensor
    pointers: Tensor
    column_indices: Tensor

    @property
    def device(self) -> torch.device:
        return self.pointers.device

    def sampling_parts(self) -> list[Tensor]:
        """What ``sddmm`` reads."""
        return [self.used_rows, self.used_columns, self.pointers, self.column_indices]

    def product_parts(self, transpose: bool) -> list[Tensor]:
        """``spmm`` in torch reads positions alone."""
        return []


def compact_plan(positions_Z: Tensor, rows: int, columns: int) -> CompactPlan:
    """The mask without empty rows and columns.

    Example: positions [5, 7] of (3, 4) -> rows [1], columns [1, 3], pointers [0, 2], column indices [0, 1].
    """
    pointers, column_Z = csr_pattern(positions_Z, rows, columns)
    used_rows = pointers.diff().nonzero().squeeze(1)
    used = torch.zeros(columns, dtype=torch.bool, device=positions_Z.device)
    used[column_Z] = True
    rank = used.cumsum(0, dtype=column_Z.dtype) - 1
    pointers = torch.cat([pointers[:1], pointers[1:].index_select(0, used_rows)])
    columns_Z = rank.index_select(0, column_Z)
    return CompactPlan(rows, columns, positions_Z.numel(), used_rows, used.nonzero().squeeze(1), pointers, columns_Z)
