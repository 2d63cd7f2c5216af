"""Order rows and columns of a mask so that few tiles hold its entries: made once, with the mask.

Rows and columns are sorted by how many entries they hold; those without any drop out. In that order the 64 × 64 tiles
that hold at least :func:`min_entries` entries go to tensor cores, the entries of the others are gathered one by one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

TILE = 64  # rows and columns of a tile: the fp32 accumulator takes 32 registers of each of 128 threads

# Entries from which a tile is cheaper than gathering. Both are bound by reads from L2 (README, "Tiles or a gather"):
# for each token a tile reads 2 · 64 numbers, a gathered entry two sectors of 32 bytes.
SECTOR_BYTES = 32


def min_entries(itemsize: int) -> int:
    """Entries from which a tile reads fewer bytes than a gather: 4 for 16-bit inputs, 8 for float32."""
    return -(-2 * TILE * itemsize // (2 * SECTOR_BYTES))


@dataclass(frozen=True, eq=False)
class TilePlan:
    """The tiles of one mask; all tensors on one device. ``K`` tiles, ``Z`` entries.

    Attributes:
        rows, columns, entries: sizes of the matrix and number of entries.
        row_order: (rows with entries, up to a multiple of 64) int32, most entries first, padded with -1.
        column_order: the same of the columns.
        tiles: (K, 2) int32, block of rows and block of columns; those with most entries first.
        starts: (K + 1,) int32, where each tile's entries begin in ``slots`` and ``cells``.
        slots: (Z,) int32, index of an entry in values and positions, tile by tile.
        cells: (Z,) int32, tile · 64² + row in it · 64 + column in it.
        heavy, heavy_entries, heavy_blocks: how many tiles, the first ones, go to tensor cores; how many entries, the first
            ones, they hold; and how many blocks of rows and of columns, the first ones, they touch. On the host, so that
            a launch does not wait for the device.
        by_row, by_column: for products with the sparse matrix: (pointers (blocks + 1,), members (K, 2)), the tiles of
            each block of rows, and of columns, each with its block on the other side.
        bounds: :func:`rosa_kernels.pattern.dense.row_bounds` where sampling the dense gradient takes less than the tiles do.
    """

    rows: int
    columns: int
    entries: int
    row_order: Tensor
    column_order: Tensor
    tiles: Tensor
    starts: Tensor
    slots: Tensor
    cells: Tensor
    heavy: int
    heavy_entries: int
    heavy_blocks: tuple[int, int]
    by_row: tuple[Tensor, Tensor]
    by_column: tuple[Tensor, Tensor]
    bounds: Tensor | None = None

    @property
    def device(self) -> torch.device:
        return self.slots.device

    def sampling_parts(self) -> list[Tensor]:
        """What ``sddmm`` reads: orders of the blocks that heavy tiles touch, heavy tiles and their starts, slots, cells.

        Or of a mask that is sampled from the dense gradient ``bounds`` alone.
        """
        if self.bounds is not None:
            return [self.bounds]
        rows, columns = self.heavy_blocks
        return [
            self.row_order[: rows * TILE],
            self.column_order[: columns * TILE],
            self.tiles[: self.heavy],
            self.starts[: self.heavy + 1],
            self.slots[: self.heavy_entries],
            self.cells[: self.heavy_entries],
            self.slots[self.heavy_entries :],
        ]

    def product_parts(self, transpose: bool) -> list[Tensor]:
        """What ``spmm`` reads: orders of its input and output, slots, cells, and the tiles of each output block."""
        orders = (self.row_order, self.column_order) if transpose else (self.column_order, self.row_order)
        members = self.by_column if transpose else self.by_row
        return [*orders, self.slots, self.cells, *members]


def _order(counts: Tensor) -> tuple[Tensor, Tensor]:
    """Indices by falling count (ties by index), without empty ones, padded to whole tiles with -1; and their inverse."""
    order = counts.argsort(descending=True, stable=True)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(order.numel(), device=order.device)
    kept = order[: int((counts > 0).sum())]
    return torch.nn.functional.pad(kept, (0, -kept.numel() % TILE), value=-1).to(torch.int32), rank


def _tiles_of(blocks: Tensor, others: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """Pointers (number + 1,) and (tile, other block) (K, 2) of each block, both int32."""
    tiles = blocks.argsort(stable=True)
    pointers = torch.searchsorted(blocks[tiles], torch.arange(number + 1, device=blocks.device))
    return pointers.to(torch.int32), torch.stack([tiles, others[tiles]], 1).to(torch.int32)


@torch.no_grad()
def tile_plan(positions_Z: Tensor, rows: int, columns: int, dtype: torch.dtype, least: int | None = None) -> TilePlan:
    """The plan of a mask for inputs of ``dtype``. Waits for the device: it belongs where the mask is made, not in a step.

    Args:
        positions_Z: (Z,) int32 or int64, flat row-major in (rows, columns), sorted.
        least: entries from which a tile is heavy, by default :func:`min_entries` of the dtype.
    """
    least = min_entries(dtype.itemsize) if least is None else least
    row = positions_Z.long() // columns
    column = positions_Z.long() % columns
    row_order, row_rank = _order(torch.bincount(row, minlength=rows))
    column_order, column_rank = _order(torch.bincount(column, minlength=columns))
    row_rank, column_rank = row_rank[row], column_rank[column]
    blocks_across = max(column_order.numel() // TILE, 1)
    tile = row_rank // TILE * blocks_across + column_rank // TILE
    names, tile, counts = tile.unique(return_inverse=True, return_counts=True)
    by_size = counts.argsort(descending=True, stable=True)
    number = torch.empty_like(by_size)
    number[by_size] = torch.arange(by_size.numel(), device=by_size.device)
    names, counts = names[by_size], counts[by_size]
    cells = (number[tile] * TILE + row_rank % TILE) * TILE + column_rank % TILE
    if cells.numel() and int(cells.max()) > torch.iinfo(torch.int32).max:
        raise ValueError(f"a mask of {cells.numel()} entries spreads over too many tiles ({names.numel()}) for int32")
    cells, slots = cells.sort()
    tiles = torch.stack([names // blocks_across, names % blocks_across], 1)
    heavy = int((counts >= least).sum())
    heavy_blocks = (tiles[:heavy].amax(0) + 1).tolist() if heavy else (0, 0)
    return TilePlan(
        rows,
        columns,
        positions_Z.numel(),
        row_order,
        column_order,
        tiles.to(torch.int32),
        torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32),
        slots.to(torch.int32),
        cells.to(torch.int32),
        heavy,
        int(counts[:heavy].sum()),
        (heavy_blocks[0], heavy_blocks[1]),
        _tiles_of(tiles[:, 0], tiles[:, 1], row_order.numel() // TILE),
        _tiles_of(tiles[:, 1], tiles[:, 0], column_order.numel() // TILE),
    )
