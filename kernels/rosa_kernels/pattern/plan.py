"""What an op prepares once for a mask, in the form that its implementation reads."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeAlias

import torch
from torch import Tensor

from rosa_kernels.dispatch import choose
from rosa_kernels.pattern.csr import CompactPlan, compact_plan
from rosa_kernels.pattern.dense import DensePlan, dense_is_cheaper, row_bounds
from rosa_kernels.pattern.tiles import TilePlan, tile_plan

Plan: TypeAlias = TilePlan | CompactPlan | DensePlan
"""Made once with the mask by :func:`make_plan`; ``sddmm``, ``spmm_add_into`` and ``adapter_linear`` take it."""


def needs_tiles(device: torch.device) -> bool:
    """Does an op that reads a plan run in Triton on this device?"""
    return any(choose(op, device.type).implementation == "triton" for op in ("sddmm", "spmm"))


def waits_for_device(device: torch.device) -> bool:
    """Whether :func:`make_plan` waits for a device, or under Triton's interpreter does what would."""
    return device.type != "cpu" or needs_tiles(device)


@torch.no_grad()
def make_plan(positions_Z: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Plan:
    """The plan of a mask for inputs of ``dtype``: tiles where Triton runs, a CSR matrix where torch does on a CPU, and where
    it does on a GPU, or tiles would take longer, how the dense gradient is sampled.

    Waits for the device, so it belongs where the mask is made, not in a step.
    Shapes: positions_Z (Z,) int32 or int64, flat row-major in (rows, columns), sorted, each once.
    """
    if needs_tiles(positions_Z.device):
        plan = tile_plan(positions_Z, rows, columns, dtype)
        return replace(plan, bounds=row_bounds(positions_Z, rows, columns)) if dense_is_cheaper(plan, dtype) else plan
    if positions_Z.device.type == "cpu":
        return compact_plan(positions_Z, rows, columns)
    return DensePlan(rows, columns, positions_Z.numel(), positions_Z.device, row_bounds(positions_Z, rows, columns))


def check_plan(plan: Plan, rows: int, columns: int, entries: int, device: torch.device) -> None:
    """Raise ValueError unless ``plan`` has these sizes and device, and tiles where Triton runs. Not its positions."""
    given = (plan.rows, plan.columns, plan.entries)
    fits = given == (rows, columns, entries) and plan.device == device
    if not fits or (needs_tiles(device) and not isinstance(plan, TilePlan)):
        raise ValueError(
            f"a {type(plan).__name__} of {given[2]} entries in a ({given[0]}, {given[1]}) matrix on {plan.device} was given "
            f"for {entries} in ({rows}, {columns}) on {device}: make it with make_plan from these "
            "positions, under the same ROSA_KERNELS"
        )
