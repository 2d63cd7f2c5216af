"""Sparse values written into a dense weight for a while, in place and exactly undone: O(Z), no second weight."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from rosa_kernels.dispatch import choose, on_device_of


def _check_inputs(weight: Tensor, values_Z: Tensor, positions_Z: Tensor) -> None:
    if values_Z.shape != positions_Z.shape or values_Z.ndim != 1:
        raise ValueError(
            f"values and positions are both (Z,), given {tuple(values_Z.shape)} and {tuple(positions_Z.shape)}"
        )
    if not weight.is_contiguous():
        raise ValueError("the weight must be contiguous, since positions index its flat memory: call .contiguous()")
    if positions_Z.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"positions are int32 or int64, given {positions_Z.dtype}")


def add(weight: Tensor, values_Z: Tensor, positions_Z: Tensor) -> Tensor:
    """:func:`scatter_add_into` without checks and outside autograd."""
    if choose("scatter", weight.device.type).implementation == "triton":
        from rosa_kernels.scatter.triton_kernel import launch_scatter_add

        with on_device_of(weight, values_Z, positions_Z):
            return launch_scatter_add(weight, values_Z.contiguous(), positions_Z.contiguous())
    flat = weight.view(-1)
    old = flat.index_select(0, positions_Z)
    total = (old.to(torch.promote_types(old.dtype, torch.float32)) + values_Z).to(old.dtype)
    flat.index_copy_(0, positions_Z.long(), total)
    return old


def put_back(weight: Tensor, old_Z: Tensor, positions_Z: Tensor) -> None:
    """:func:`restore_into` without checks and outside autograd."""
    if choose("scatter", weight.device.type).implementation == "triton":
        from rosa_kernels.scatter.triton_kernel import launch_restore

        with on_device_of(weight, old_Z, positions_Z):
            launch_restore(weight, old_Z.contiguous(), positions_Z.contiguous())
    else:
        weight.view(-1).index_copy_(0, positions_Z.long(), old_Z)


scatter_add_op = torch.library.custom_op("rosa::scatter_add_into", add, mutates_args=("weight",))
restore_op = torch.library.custom_op("rosa::restore_into", put_back, mutates_args=("weight",))


@scatter_add_op.register_fake
def _(weight: Tensor, values_Z: Tensor, positions_Z: Tensor) -> Tensor:
    return torch.empty_like(positions_Z, dtype=weight.dtype)


@restore_op.register_fake
def _(weight: Tensor, old_Z: Tensor, positions_Z: Tensor) -> None:
    return None


@torch.no_grad()
def scatter_add_into(weight: Tensor, values_Z: Tensor, positions_Z: Tensor) -> Tensor:
    """``weight[positions] += values`` in place; the sum is formed in float32 or wider and rounded once.

    Returns: (Z,) the numbers that stood there, for :func:`restore_into`, of the weight's dtype.
    Shapes: weight any, contiguous, indexed flat; values_Z and positions_Z (Z,), each position once.
    Raises: ValueError for shapes that do not fit or a weight that is not contiguous.
    """
    _check_inputs(weight, values_Z, positions_Z)
    if torch.compiler.is_compiling():
        old: Tensor = scatter_add_op(weight, values_Z.detach(), positions_Z)
        return old
    torch.autograd.graph.increment_version(weight)  # a Triton kernel does not tell autograd
    return add(weight, values_Z.detach(), positions_Z)


@torch.no_grad()
def restore_into(weight: Tensor, old_Z: Tensor, positions_Z: Tensor) -> None:
    """Undo :func:`scatter_add_into`, bit for bit. Shapes, Raises: as there."""
    _check_inputs(weight, old_Z, positions_Z)
    if torch.compiler.is_compiling():
        restore_op(weight, old_Z, positions_Z)
    else:
        torch.autograd.graph.increment_version(weight)
        put_back(weight, old_Z, positions_Z)


@contextlib.contextmanager
def scattered(weight: Tensor, values_Z: Tensor, positions_Z: Tensor) -> Iterator[Tensor]:
    """Inside the block ``weight[positions] + values`` stands in ``weight``; after it the old numbers, bit for bit.

    Autograd does not see the change (the version counter stays), so nothing inside the block may save the weight for
    a backward that runs after it.

    Shapes, Raises: as :func:`scatter_add_into`.
    """
    _check_inputs(weight, values_Z, positions_Z)
    hidden = weight.data
    old = add(hidden, values_Z.detach(), positions_Z)
    try:
        yield weight
    finally:
        put_back(hidden, old, positions_Z)
