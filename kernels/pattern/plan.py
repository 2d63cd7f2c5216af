"""What an op prepares once for a mask, in the form that its implementation reads."""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor

from rosa_kernels.dispatch import choose
from rosa_kernels.pattern.csr import CompactPlan, compact_plan
from rosa_kernels.pattern.tiles import TilePlan, tile_plan

Plan: TypeAlias = TilePlan | CompactPlan
"""Made once with the mask by :func:`make_plan`; ``sddmm``, ``spmm_add_into`` and ``adapter_linear`` take it."""


@torch.no_grad()
def make_plan(positions_Z: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Plan:
    """The plan of a mask for inputs of ``dtype``: tiles for Triton, a CSR matrix for torch.

    Waits for the device, so it belongs where the mask is made, not in a step.
    Shapes: positions_Z (Z,) int32 or int64, flat row-major in (rows, columns), sorted, each once.
    """
    if choose("sddmm", positions_Z.device.type).implementation == "triton":
        return tile_plan(positions_Z, rows, columns, dtype)
    return compact_plan(positions_Z, rows, columns)


def check_plan(plan: Plan, rows: int, columns: int, positions_Z: Tensor) -> None:
    """Raise ValueError unless ``plan`` has the sizes of this matrix and mask and is of the kind that runs here."""
    wanted = TilePlan if choose("sddmm", positions_Z.device.type).implementation == "triton" else CompactPlan
    given = (plan.rows, plan.columns, plan.entries)
    if given != (rows, columns, positions_Z.numel()) or not isinstance(plan, wanted):
        raise ValueError(
            f"a {type(plan).__name__} of {given[2]} entries in a ({given[0]}, {given[1]}) matrix was given, for "
            f"{positions_Z.numel()} in ({rows}, {columns}) and a {wanted.__name__}: make it with make_plan from these "
            "positions, on their device"
        )
