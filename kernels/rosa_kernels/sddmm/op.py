"""Public sampled dense-dense product: checks once, picks the implementation, tells torch what comes out."""

from __future__ import annotations

import torch
from torch import Tensor

from rosa_kernels.dispatch import choose, on_device_of
from rosa_kernels.limits import sum_dtype
from rosa_kernels.pattern.csr import COMPACT_PARTS
from rosa_kernels.pattern.dense import DENSE_PARTS, row_bounds
from rosa_kernels.pattern.plan import Plan, check_plan
from rosa_kernels.sddmm import torch_code


def _check_inputs(grad_TN: Tensor, x_TM: Tensor, positions_Z: Tensor, plan: Plan | None) -> None:
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
    if plan is not None:
        check_plan(plan, grad_TN.shape[1], x_TM.shape[1], positions_Z.numel(), positions_Z.device)


def sampled(grad_TN: Tensor, x_TM: Tensor, positions_Z: Tensor, plan: list[Tensor]) -> Tensor:
    """The product that :func:`sddmm` checked; ``plan``: the parts of a :data:`Plan`, or nothing."""
    if positions_Z.numel() == 0 or grad_TN.shape[0] == 0:
        return torch.zeros_like(positions_Z, dtype=sum_dtype(x_TM.dtype))
    if len(plan) == DENSE_PARTS:
        return torch_code.sddmm_dense(grad_TN, x_TM, positions_Z, *plan)
    if choose("sddmm", x_TM.device.type).implementation == "triton":
        from rosa_kernels.sddmm.triton_kernel import launch_sddmm

        with on_device_of(grad_TN, x_TM, positions_Z, *plan):
            return launch_sddmm(grad_TN, x_TM, positions_Z.contiguous(), plan)
    if x_TM.device.type == "cpu":
        compact = plan if len(plan) == COMPACT_PARTS else []  # tiles say nothing here
        return torch_code.sddmm_cpu(grad_TN, x_TM, positions_Z, compact)
    bounds = row_bounds(positions_Z, grad_TN.shape[1], x_TM.shape[1])
    return torch_code.sddmm_dense(grad_TN, x_TM, positions_Z, bounds)


sddmm_op = torch.library.custom_op("rosa::sddmm", sampled, mutates_args=())


@sddmm_op.register_fake
def _(grad_TN: Tensor, x_TM: Tensor, positions_Z: Tensor, plan: list[Tensor]) -> Tensor:
    return torch.empty_like(positions_Z, dtype=sum_dtype(x_TM.dtype))


def sddmm(grad_TN: Tensor, x_TM: Tensor, positions_Z: Tensor, plan: Plan | None = None) -> Tensor:
    """Entries of ``gradᵀ x`` at given positions, without forming the dense product.

    Args:
        grad_TN: gradient of a linear layer's output; any strides.
        x_TM: the layer's input, of the same dtype; any strides.
        positions_Z: flat row-major indices into (N, M), sorted, each once.
        plan: what :func:`rosa_kernels.make_plan` prepared of these positions. Without it Triton gathers every
            entry, and torch prepares its form again at every call, for which it waits for a GPU.

    Returns:
        (Z,) sums over tokens, float32 (float64 for float64 inputs). Not differentiable.

    Shapes: grad_TN (T, N); x_TM (T, M); positions_Z (Z,).
    Raises: ValueError for shapes or dtypes that do not fit together.
    Source: RoSA, arXiv 2401.04679. What runs where: ``rosa_kernels.explain(device)``.
    """
    _check_inputs(grad_TN, x_TM, positions_Z, plan)
    return sddmm_op(grad_TN, x_TM, positions_Z, plan.sampling_parts() if plan is not None else [])
