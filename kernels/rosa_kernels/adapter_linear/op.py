"""A linear layer with a low-rank and a sparse part as one autograd function that saves a single input."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable

from rosa_kernels.adapter_linear.base import scattered_matmul, scattered_matmul_op
from rosa_kernels.low_rank import op as low_rank
from rosa_kernels.pattern.plan import Plan, check_plan
from rosa_kernels.sddmm.op import sampled, sddmm_op
from rosa_kernels.spmm.op import add_product, spmm_op

Collect = Callable[[Tensor, Tensor], None]
"""Receives ``grad_TN`` and ``x_TM`` of a layer during backward, detached."""

Around = Callable[[], AbstractContextManager[None]]
"""Entered for the time of a forward or backward, to bring in tensors whose numbers are kept elsewhere meanwhile."""

SparseProduct = Literal["scatter", "separate"]
"""How forward and backward see the sparse part: written into the weight, or as a product of its own."""


@dataclass(frozen=True, eq=False)
class _Options:
    """What is not a tensor of the layer."""

    scale: float
    dropout: float
    transposed: bool
    sparse_product: SparseProduct
    plan: Plan | None
    dequantize: Callable[[Tensor], Tensor] | None
    collect: Collect | None
    around: Around | None

    def held(self) -> AbstractContextManager[None]:
        return nullcontext() if self.around is None else self.around()


class _Primitives(NamedTuple):
    """What the layer is made of."""

    scattered_matmul: Callable[..., Tensor]
    spmm: Callable[..., None]
    down: Callable[..., Tensor]
    low_rank_backward: Callable[..., Tensor]
    sddmm: Callable[..., Tensor]


_PLAIN = _Primitives(scattered_matmul, add_product, low_rank.down, low_rank.backward, sampled)
_REGISTERED = _Primitives(scattered_matmul_op, spmm_op, low_rank.down_op, low_rank.registered_backward, sddmm_op)


def _primitives(x: Tensor) -> _Primitives:
    """As torch's registered ops for the compiler and for tensors without numbers (those of a plan); as plain functions
    otherwise, which start 15 to 50 µs sooner.
    """
    return _REGISTERED if torch.compiler.is_compiling() or isinstance(x, FakeTensor) else _PLAIN


def _base_product(
    x: Tensor, weight: Tensor, bias: Tensor | None, values: Tensor | None, positions: Tensor | None, o: _Options,
    transpose: bool,
) -> Tensor:  # fmt: skip
    """``x (W + S)ᵀ + bias`` of the weight as it is stored, or with ``transpose`` ``x (W + S) + bias``."""
    dense = weight if o.dequantize is None else o.dequantize(weight)
    if values is None or positions is None:
        return torch.nn.functional.linear(x, dense.T if transpose else dense, bias)
    if o.sparse_product == "scatter":
        return _primitives(x).scattered_matmul(x, dense, bias, values, positions, transpose)
    y = torch.nn.functional.linear(x, dense.T if transpose else dense, bias)
    parts = o.plan.product_parts(transpose) if o.plan is not None else []
    _primitives(x).spmm(y, x, values, positions, *dense.shape, transpose, parts)
    return y


class _AdapterLinear(torch.autograd.Function):
    """See :func:`adapter_linear`. Saves x where something is trained and, for B's gradient, ``drop(x) Aᵀ`` of R columns.

    Parameters are kept on ``ctx`` and not in ``save_for_backward``: under ZeRO-3 their storage is released after
    forward and gathered again before backward, and only the Parameter object finds the gathered data.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_TM: Tensor,
        weight: Tensor,
        bias_N: Tensor | None,
        A_RM: Tensor | None,
        B_NR: Tensor | None,
        values_Z: Tensor | None,
        positions_Z: Tensor | None,
        seed: Tensor,
        o: _Options,
    ) -> Tensor:
        with o.held():
            y_TN = _base_product(x_TM, weight, bias_N, values_Z, positions_Z, o, o.transposed)
        h_TR = None
        if A_RM is not None and B_NR is not None:
            h_TR = _primitives(x_TM).down(x_TM, A_RM.to(x_TM.dtype), o.dropout, seed)
            y_TN.addmm_(h_TR, B_NR.to(x_TM.dtype).T, alpha=o.scale)
        needs_input = A_RM is not None or values_Z is not None or o.collect is not None
        ctx.save_for_backward(x_TM if needs_input else None, h_TR)
        ctx.parameters = (weight, bias_N, A_RM, B_NR, values_Z, positions_Z)
        ctx.seed, ctx.options = seed, o
        return y_TN

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # first: under checkpointing this runs forward again, which lets go of what it holds
        with ctx.options.held():
            return _backward(ctx, saved, *grads)


def _backward(ctx: Any, saved: tuple[Any, Any], *grads: Tensor) -> tuple[Tensor | None, ...]:
    grad_TN = grads[0].contiguous()
    x_TM, h_TR = saved
    weight, bias_N, A_RM, B_NR, values_Z, positions_Z = ctx.parameters
    o: _Options = ctx.options
    needs_x, _, needs_bias, needs_A, needs_B, needs_values = ctx.needs_input_grad[:6]
    grad_x = grad_bias = grad_A = grad_B = grad_values = None
    if o.collect is not None:
        o.collect(grad_TN, x_TM)
    if needs_x:
        grad_x = _base_product(grad_TN, weight, None, values_Z, positions_Z, o, not o.transposed)
    if needs_bias:
        grad_bias = grad_TN.sum(0).to(bias_N.dtype)
    if needs_values and positions_Z is None:
        grad_values = torch.zeros_like(values_Z)
    elif needs_values:
        left, right = (x_TM, grad_TN) if o.transposed else (grad_TN, x_TM)
        parts = o.plan.sampling_parts() if o.plan is not None else []
        grad_values = _primitives(left).sddmm(left, right, positions_Z, parts).to(values_Z.dtype)
    if needs_B:
        # h first: two to four times as fast as grad.T @ h in MKL (1024 tokens, 576 and 1536 features, rank 8)
        grad_B = (h_TR.T @ grad_TN).T.mul(o.scale).to(B_NR.dtype).contiguous()
    if A_RM is not None and (needs_A or needs_x):
        B = B_NR.to(x_TM.dtype)
        grad_h_TR = torch.nn.functional.linear(grad_TN, B.T.contiguous()).mul_(o.scale)  # as fast as x Aᵀ so
        A = A_RM.to(x_TM.dtype)
        grad_A = _primitives(x_TM).low_rank_backward(grad_x, grad_h_TR, x_TM, A, o.dropout, ctx.seed)
        grad_A = grad_A.to(A_RM.dtype) if needs_A else None
    return grad_x, None, grad_bias, grad_A, grad_B, grad_values, None, None, None


def _check_inputs(x: Tensor, weight: Tensor, parts: dict[str, Tensor | None], o: _Options) -> None:
    A, B, values, positions = parts["A"], parts["B"], parts["values"], parts["positions"]
    if (A is None) != (B is None):
        raise ValueError("A and B belong together: give both or neither")
    if positions is not None and values is None:
        raise ValueError("positions without values: give both, or values alone while the positions are not known")
    if o.sparse_product not in ("scatter", "separate"):
        raise ValueError(f"sparse_product is scatter or separate, given {o.sparse_product!r}")
    if o.plan is not None and values is not None:
        check_plan(o.plan, o.plan.rows, o.plan.columns, values.numel(), values.device)
    if o.dequantize is not None:
        return  # the stored form says nothing of the matrix's shape and type
    features_in, features_out = weight.shape if o.transposed else weight.shape[::-1]
    if o.plan is not None and (o.plan.rows, o.plan.columns) != tuple(weight.shape):
        raise ValueError(f"the plan is of a ({o.plan.rows}, {o.plan.columns}) matrix, the weight {tuple(weight.shape)}")
    if x.shape[-1] != features_in:
        raise ValueError(f"x has {x.shape[-1]} features, the weight takes {features_in}")
    if x.dtype != weight.dtype:
        raise ValueError(f"x is {x.dtype} and the weight {weight.dtype}: cast one of them")
    if (
        A is not None
        and B is not None
        and (A.shape[1], B.shape[0], A.shape[0]) != (features_in, features_out, B.shape[1])
    ):
        raise ValueError(
            f"A (R, M) and B (N, R) do not fit a layer of {features_in} to {features_out} features, "
            f"given {tuple(A.shape)} and {tuple(B.shape)}"
        )


def adapter_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    A: Tensor | None = None,
    B: Tensor | None = None,
    scale: float = 1.0,
    values: Tensor | None = None,
    positions: Tensor | None = None,
    dropout: float = 0.0,
    *,
    transposed: bool = False,
    plan: Plan | None = None,
    sparse_product: SparseProduct = "scatter",
    dequantize: Callable[[Tensor], Tensor] | None = None,
    collect: Collect | None = None,
    around: Around | None = None,
) -> Tensor:
    """``y = x (W + S)ᵀ + scale · drop(x) Aᵀ Bᵀ + bias``, saving x and (T, R) numbers; the sparse part costs O(Z) memory.

    Args:
        x: input, any number of leading dimensions.
        weight: the frozen base, (N, M); or (M, N) with ``transposed`` (transformers' Conv1D). Never receives a gradient.
        bias: (N,), trained if it requires a gradient.
        A, B: the low-rank part, (R, M) and (N, R); float32 parts on a 16-bit base are cast for the products.
        scale: factor of the low-rank part.
        values: (Z,) the sparse part's entries. Without ``positions`` they take no part and their gradient is zero.
        positions: (Z,) sorted flat row-major indices into ``weight`` as it is stored.
        dropout: probability of dropping an input entry of the low-rank part. Its seed comes from torch's CPU stream.
        transposed: the weight is stored (M, N).
        plan: what :func:`rosa_kernels.make_plan` prepared of the positions.
        sparse_product: ``scatter`` writes the values into the weight for each product, which rounds ``W + S`` to the
            weight's dtype; ``separate`` adds a sparse product of its own, in which no value is rounded against the weight.
        dequantize: makes the dense weight, of x's dtype, from ``weight`` in forward and again in backward.
        collect: called in backward with the output's gradient (T, N) and the input (T, M).
        around: entered around forward and again around backward; the numbers of ``positions`` need only be there inside.

    Returns: (..., N) of the weight's dtype, also under autocast.
    Raises: ValueError for shapes or dtypes that do not fit together.
    Source: RoSA, arXiv 2401.04679; LoRA, arXiv 2106.09685.
    """
    if torch.is_autocast_enabled(x.device.type) and dequantize is None:
        x = x.to(weight.dtype)  # the base's type decides; casting a weight would copy it
    options = _Options(scale, dropout, transposed, sparse_product, plan, dequantize, collect, around)
    _check_inputs(x, weight, {"A": A, "B": B, "values": values, "positions": positions}, options)
    drops = dropout > 0.0 and A is not None
    seed = torch.randint(2**62, (1,)) if drops else torch.zeros(1, dtype=torch.int64)
    flat = x.reshape(-1, x.shape[-1])
    with torch.autocast(x.device.type, enabled=False):
        y = _AdapterLinear.apply(flat, weight, bias, A, B, values, positions, seed, options)
    return y.view(*x.shape[:-1], y.shape[-1])
