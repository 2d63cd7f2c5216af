"""Masks that are sampled from the dense gradient: when that takes less than tiles, and where its blocks of rows begin."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rosa_kernels.gradient import block_rows, multiplies_into_float32
from rosa_kernels.pattern.tiles import SECTOR_BYTES, TILE, TilePlan

# All counts are of one token, in bytes read from L2; operations are counted as the bytes that are read meanwhile. By bytes of
# an input, of an H100: 790 and 55 · 10¹² operations a second, and 5.5 · 10¹² bytes.
OPERATIONS_A_BYTE = {2: 144, 4: 10}
TILE_SHARE = 512 / 615
"""Of a float32 tile's instructions, those that multiply (``rosa_kernels.aot``, sm_90); a library's nearly all do."""
LIBRARY_BLOCK = (128, 256)
"""Rows and columns of the result that one block of a library's product owns: with them it reads each input so rarely."""
TOKENS = 1024
"""Of a micro-batch, over which the time to write the dense gradient and to sample it is spread."""


def tiles_cost(plan: TilePlan, itemsize: int) -> float:
    """Of the heavy tiles, of the copies that they are read from, and of the entries that are gathered."""
    operations = 2 * TILE**2 / OPERATIONS_A_BYTE[itemsize] / (1 if itemsize == 2 else TILE_SHARE)
    tile = max(2 * TILE * itemsize, operations)
    copies = 2 * itemsize * TILE * sum(plan.heavy_blocks)
    return plan.heavy * tile + copies + 2 * SECTOR_BYTES * (plan.entries - plan.heavy_entries)


def dense_cost(plan: TilePlan, itemsize: int, in_16_bits: bool) -> float:
    """Of the whole product, and a token's share of writing the result and sampling it."""
    high, wide = LIBRARY_BLOCK
    size = plan.rows * plan.columns
    operations = 2 * size / OPERATIONS_A_BYTE[2 if in_16_bits else 4]
    product = max(size * itemsize * (1 / high + 1 / wide), operations)
    return product + (4 * size + SECTOR_BYTES * plan.entries) / TOKENS


def dense_is_cheaper(plan: TilePlan, dtype: torch.dtype) -> bool:
    """Whether the dense gradient, sampled, costs less than the plan's tiles; in float64, which has no tiles, never."""
    if dtype == torch.float64:
        return False
    in_16_bits = dtype.itemsize == 2 and multiplies_into_float32(plan.device)
    return dense_cost(plan, dtype.itemsize, in_16_bits) < tiles_cost(plan, dtype.itemsize)


def row_bounds(positions_Z: Tensor, rows: int, columns: int) -> Tensor:
    """How many entries lie before each block of rows of :func:`gradient_blocks`, and in all: int64, on the CPU.

    Waits for the device.
    """
    step = block_rows(columns)
    edges = torch.arange(0, rows + step, step, device=positions_Z.device).clamp_(max=rows) * columns
    return torch.searchsorted(positions_Z.long().contiguous(), edges).cpu()


DENSE_PARTS = 1  # tensors of DensePlan.sampling_parts


@dataclass(frozen=True, eq=False)
class DensePlan:
    """A mask as torch samples it on a GPU.

    Attributes:
        rows, columns, entries: sizes of the matrix and number of entries.
        device: of the positions.
        bounds: :func:`row_bounds`, on the host, so that a step does not wait for the device.
    """

    rows: int
    columns: int
    entries: int
    device: torch.device
    bounds: Tensor

    def sampling_parts(self) -> list[Tensor]:
        """What ``sddmm`` reads."""
        return [self.bounds]

    def product_parts(self, transpose: bool) -> list[Tensor]:
        """``spmm`` in torch reads positions alone."""
        return []
