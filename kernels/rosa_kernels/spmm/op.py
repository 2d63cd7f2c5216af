"""Public product with the sparse part, added in place: the exact alternative to writing values into a 16-bit weight."""

from __future__ import annotations

import torch
from torch import Tensor

from rosa_kernels import limits
from rosa_kernels.dispatch import choose, on_device_of
from rosa_kernels.pattern.csr import acknowledge_beta_csr, csr_pattern
from rosa_kernels.pattern.plan import Plan, check_plan


def _check_inputs(
    y: Tensor, x: Tensor, values_Z: Tensor, positions_Z: Tensor, shape: tuple[int, int], transpose: bool
) -> None:
    features_out, features_in = reversed(shape) if transpose else shape
    if x.ndim != 2 or y.shape != (x.shape[0], features_out) or x.shape[1] != features_in:
        raise ValueError(
            f"a sparse part of {shape}{', transposed,' if transpose else ''} takes x (T, {features_in}) to y "
            f"(T, {features_out}), given x {tuple(x.shape)} and y {tuple(y.shape)}"
        )
    if x.dtype != y.dtype or not x.is_floating_point():
        raise ValueError(f"spmm takes x and y of one floating type, given {x.dtype} and {y.dtype}")
    if values_Z.shape != positions_Z.shape or values_Z.ndim != 1:
        raise ValueError(
            f"values and positions are both (Z,), given {tuple(values_Z.shape)} and {tuple(positions_Z.shape)}"
        )


def _add_torch(
    y: Tensor, x: Tensor, values_Z: Tensor, positions_Z: Tensor, shape: tuple[int, int], transpose: bool
) -> None:
    """The vendor's CSR product, float32 or wider, over blocks of tokens in bounded memory."""
    acknowledge_beta_csr()
    wide = limits.sum_dtype(x.dtype)
    pointers, column_Z = csr_pattern(positions_Z, *shape)
    sparse = torch.sparse_csr_tensor(pointers, column_Z, values_Z.to(wide), shape, check_invariants=False)
    sparse = sparse.t() if transpose else sparse
    step = max(1, limits.SCRATCH_BYTES // (wide.itemsize * sum(shape)))
    for start in range(0, x.shape[0], step):
        part = y[start : start + step]
        # the product runs 2 to 10 times as fast on a contiguous transpose (4096², 1536×576, 512 and 1024 tokens)
        product = sparse @ x[start : start + step].to(wide).T.contiguous()
        part.copy_(part + product.T if y.dtype == wide else part.to(wide) + product.T)


def add_product(
    y: Tensor,
    x: Tensor,
    values_Z: Tensor,
    positions_Z: Tensor,
    rows: int,
    columns: int,
    transpose: bool,
    plan: list[Tensor],
) -> None:
    """The product that :func:`spmm_add_into` checked; ``plan``: the parts of a :data:`Plan`, or nothing."""
    if positions_Z.numel() == 0 or x.shape[0] == 0:
        return
    if choose("spmm", x.device.type).implementation == "torch":
        _add_torch(y, x, values_Z, positions_Z, (rows, columns), transpose)
        return
    if not plan or x.dtype == torch.float64:
        raise ValueError(
            f"spmm in Triton takes a plan (rosa_kernels.make_plan) and no float64, given {x.dtype} "
            f"{'with' if plan else 'without'} a plan: make one, or set ROSA_KERNELS=spmm=torch"
        )
    from rosa_kernels.spmm.triton_kernel import launch_spmm_add

    with on_device_of(y, x, values_Z, *plan):
        launch_spmm_add(y, x, values_Z, transpose, plan)


spmm_op = torch.library.custom_op("rosa::spmm_add_into", add_product, mutates_args=("y",))


@spmm_op.register_fake
def _(*inputs: object) -> None:
    return None


@torch.no_grad()
def spmm_add_into(
    y: Tensor,
    x: Tensor,
    values_Z: Tensor,
    positions_Z: Tensor,
    shape: tuple[int, int],
    transpose: bool = False,
    plan: Plan | None = None,
) -> None:
    """``y += x Sᵀ`` of the sparse S (N, M), or with ``transpose`` ``y += x S``; sums in float32 or wider.

    Where ``W + S`` written into a 16-bit W rounds a small value away, this keeps it: the values are rounded to x's
    dtype for a product on tensor cores (relative to themselves, not to W), and not at all on the CPU. y is rounded as
    its dtype asks, after the base product and after this one.

    Args:
        y: (T, N), or (T, M) with transpose; changed in place; any strides.
        x: (T, M), or (T, N) with transpose, of y's dtype.
        values_Z, positions_Z: (Z,) entries of S and their sorted flat row-major positions.
        shape: (N, M).
        plan: what :func:`rosa_kernels.make_plan` prepared of the positions; Triton needs it, torch does not read it.

    Raises: ValueError for shapes or dtypes that do not fit together, or a GPU without a plan.
    """
    _check_inputs(y, x, values_Z, positions_Z, shape, transpose)
    if plan is not None:
        check_plan(plan, *shape, positions_Z.numel(), positions_Z.device)
    parts = plan.product_parts(transpose) if plan is not None else []
    spmm_op(y, x, values_Z.detach(), positions_Z, *shape, transpose, parts)
