"""Operations of sparse and low-rank adapters on a linear layer.

Shapes everywhere: ``T`` tokens (batch × length, flattened), ``M`` in-features, ``N`` out-features, ``R`` rank,
``Z`` stored entries of the sparse part. A suffix of a name is its logical shape: ``grad_TN`` is (T, N).
"""

from rosa_kernels.adapter_linear.op import adapter_linear
from rosa_kernels.dispatch import explain
from rosa_kernels.pattern.plan import Plan, make_plan
from rosa_kernels.scatter.op import restore_into, scatter_add_into, scattered
from rosa_kernels.sddmm.op import sddmm
from rosa_kernels.spmm.op import spmm_add_into

__all__ = [
    "Plan",
    "adapter_linear",
    "explain",
    "make_plan",
    "restore_into",
    "scatter_add_into",
    "scattered",
    "sddmm",
    "spmm_add_into",
]
