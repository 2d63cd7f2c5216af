"""A linear layer with a low-rank and a sparse part as one autograd function that saves a single input."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rosa_kernels.scatter.op import scattered
from rosa_kernels.sddmm.op import sddmm

Collect = Callable[[Tensor, Tensor], None]
"""Receives ``grad_TN`` and ``x_TM`` of a layer during backward, detached."""


def dropout_factors(x_TM: Tensor, probability: float, seed: int) -> Tensor | None:
    """Factors of x's shape and dtype, 0 or 1/(1 - p), that follow from ``seed`` alone; ``None`` without dropout.

    Backward draws them again instead of keeping them. On the CPU, p is rounded to a multiple of 2^-16 and 16 random
    bits decide an entry: torch's ``bernoulli_`` with a generator takes 20 times as long there.
    """
    if probability == 0.0:
        return None
    if x_TM.device.type != "cpu":
        generator = torch.Generator(device=x_TM.device).manual_seed(seed)
        return torch.empty_like(x_TM).bernoulli_(1.0 - probability, generator=generator).div_(1.0 - probability)
    threshold = min(round(probability * 2**16), 2**16 - 1)
    words = np.random.SFC64(seed).random_raw(-(-x_TM.numel() // 4)).view(np.uint16)[: x_TM.numel()]
    keep = torch.from_numpy(words >= threshold).view(x_TM.shape)
    return keep.to(x_TM.dtype).div_(1.0 - threshold / 2**16)


def _times(tensor: Tensor, factors: Tensor | None) -> Tensor:
    return tensor if factors is None else tensor * factors


class _AdapterLinear(torch.autograd.Function):
    """See :func:`adapter_linear`.

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
        scale: float,
        dropout: float,
        seed: int,
        transposed: bool,
        collect: Collect | None,
    ) -> Tensor:
        ctx.save_for_backward(x_TM)
        ctx.parameters = (weight, bias_N, A_RM, B_NR, values_Z, positions_Z)
        ctx.scale, ctx.dropout, ctx.seed, ctx.transposed, ctx.collect = scale, dropout, seed, transposed, collect
        sparse = scattered(weight, values_Z, positions_Z) if positions_Z is not None else contextlib.nullcontext()
        with sparse:
            y_TN = torch.nn.functional.linear(x_TM, weight.T if transposed else weight, bias_N)
        if A_RM is not None and B_NR is not None:
            h_TR = _times(x_TM, dropout_factors(x_TM, dropout, seed)) @ A_RM.to(x_TM.dtype).T
            y_TN.addmm_(h_TR, B_NR.to(x_TM.dtype).T, alpha=scale)
        return y_TN

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_TN = grads[0].contiguous()
        (x_TM,) = ctx.saved_tensors
        weight, bias_N, A_RM, B_NR, values_Z, positions_Z = ctx.parameters
        needs_x, _, needs_bias, needs_A, needs_B, needs_values = ctx.needs_input_grad[:6]
        grad_x = grad_bias = grad_A = grad_B = grad_values = None
        if ctx.collect is not None:
            ctx.collect(grad_TN, x_TM)
        if needs_x:
            sparse = scattered(weight, values_Z, positions_Z) if positions_Z is not None else contextlib.nullcontext()
            with sparse:
                grad_x = grad_TN @ (weight.T if ctx.transposed else weight)
        if needs_bias:
            grad_bias = grad_TN.sum(0).to(bias_N.dtype)
        if needs_values and positions_Z is None:
            grad_values = torch.zeros_like(values_Z)
        elif needs_values:
            left, right = (x_TM, grad_TN) if ctx.transposed else (grad_TN, x_TM)
            grad_values = sddmm(left, right, positions_Z).to(values_Z.dtype)
        if A_RM is not None:
            A, B = A_RM.to(x_TM.dtype), B_NR.to(x_TM.dtype)
            factors = dropout_factors(x_TM, ctx.dropout, ctx.seed)
            dropped_TM = _times(x_TM, factors) if needs_A or needs_B else None
            if needs_B:
                grad_B = (grad_TN.T @ (dropped_TM @ A.T)).mul_(ctx.scale).to(B_NR.dtype)
            if needs_A or needs_x:
                grad_h_TR = (grad_TN @ B).mul_(ctx.scale)
                if needs_A:
                    grad_A = (grad_h_TR.T @ dropped_TM).to(A_RM.dtype)
                if grad_x is not None and factors is None:
                    grad_x.addmm_(grad_h_TR, A)
                elif grad_x is not None:
                    grad_x.addcmul_(grad_h_TR @ A, factors)
        return grad_x, None, grad_bias, grad_A, grad_B, grad_values, None, None, None, None, None, None


def _check_inputs(x: Tensor, weight: Tensor, parts: dict[str, Tensor | None], transposed: bool) -> None:
    features_in, features_out = weight.shape if transposed else weight.shape[::-1]
    if x.shape[-1] != features_in:
        raise ValueError(f"x has {x.shape[-1]} features, the weight takes {features_in}")
    if x.dtype != weight.dtype:
        raise ValueError(f"x is {x.dtype} and the weight {weight.dtype}: cast one of them")
    A, B, values, positions = parts["A"], parts["B"], parts["values"], parts["positions"]
    if (A is None) != (B is None):
        raise ValueError("A and B belong together: give both or neither")
    if (
        A is not None
        and B is not None
        and (A.shape[1], B.shape[0], A.shape[0]) != (features_in, features_out, B.shape[1])
    ):
        raise ValueError(
            f"A (R, M) and B (N, R) do not fit a layer of {features_in} to {features_out} features, "
            f"given {tuple(A.shape)} and {tuple(B.shape)}"
        )
    if positions is not None and values is None:
        raise ValueError("positions without values: give both, or values alone while the positions are not known")


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
    collect: Collect | None = None,
) -> Tensor:
    """``y = x (W + S)ᵀ + scale · drop(x) Aᵀ Bᵀ + bias``, saving x alone; the sparse part costs O(Z) memory.

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
        collect: called in backward with the output's gradient (T, N) and the input (T, M).

    Returns: (..., N) of the weight's dtype, also under autocast.
    Raises: ValueError for shapes or dtypes that do not fit together.
    Source: RoSA, arXiv 2401.04679; LoRA, arXiv 2106.09685.
    """
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(weight.dtype)  # the base's type decides; casting a weight would copy it
    _check_inputs(x, weight, {"A": A, "B": B, "values": values, "positions": positions}, transposed)
    seed = int(torch.randint(2**62, (1,))) if dropout > 0.0 and A is not None else 0
    flat = x.reshape(-1, x.shape[-1])
    with torch.autocast(x.device.type, enabled=False):
        y = _AdapterLinear.apply(flat, weight, bias, A, B, values, positions, scale, dropout, seed, transposed, collect)
    return y.view(*x.shape[:-1], y.shape[-1])
