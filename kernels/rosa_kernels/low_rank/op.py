"""The low-rank part's products with its input, dropout included: nothing of x's size is kept for backward."""

from __future__ import annotations

import torch
from torch import Tensor

from rosa_kernels.dispatch import choose, on_device_of
from rosa_kernels.low_rank.dropout import dropout_factors


def _in_triton(x_TM: Tensor, probability: float) -> bool:
    """Without dropout a library's product already is one pass over x; float64 has no tensor cores worth a kernel."""
    wanted = choose("low_rank", x_TM.device.type).implementation == "triton"
    return wanted and probability > 0.0 and x_TM.dtype != torch.float64


def down(x_TM: Tensor, A_RM: Tensor, probability: float, seed: Tensor) -> Tensor:
    """``drop(x) Aᵀ``.

    Shapes: x_TM (T, M); A_RM (R, M) of x's dtype; seed (1,) int64 on the CPU; result (T, R) of x's dtype.
    Source: LoRA, arXiv 2106.09685.
    """
    if _in_triton(x_TM, probability):
        from rosa_kernels.low_rank.triton_kernel import launch_down

        with on_device_of(x_TM, A_RM):
            return launch_down(x_TM, A_RM.contiguous(), probability, int(seed))
    if probability == 0.0:
        return x_TM @ A_RM.T
    return (x_TM * dropout_factors(x_TM, probability, int(seed))) @ A_RM.T


down_op = torch.library.custom_op("rosa::low_rank_down", down, mutates_args=())


@down_op.register_fake
def _(x_TM: Tensor, A_RM: Tensor, probability: float, seed: Tensor) -> Tensor:
    return x_TM.new_empty(x_TM.shape[0], A_RM.shape[0])


def backward(
    grad_x_TM: Tensor | None, grad_h_TR: Tensor, x_TM: Tensor, A_RM: Tensor, probability: float, seed: Tensor
) -> Tensor:
    """Gradient of A, (R, M); the gradient of x is added to ``grad_x_TM`` in place where it is given.

    The same ``seed`` and ``probability`` as in :func:`down` draw the same dropout.
    Shapes: grad_x_TM, x_TM (T, M); grad_h_TR (T, R); A_RM (R, M); all of one dtype.
    """
    if _in_triton(x_TM, probability):
        from rosa_kernels.low_rank.triton_kernel import launch_backward

        grad_h_TR, A_RM = grad_h_TR.contiguous(), A_RM.contiguous()
        with on_device_of(grad_x_TM, grad_h_TR, x_TM, A_RM):
            return launch_backward(grad_x_TM, grad_h_TR, x_TM, A_RM, probability, int(seed)).to(A_RM.dtype)
    if probability == 0.0:
        if grad_x_TM is not None:
            grad_x_TM.addmm_(grad_h_TR, A_RM)
        return (grad_h_TR.T @ x_TM).contiguous()
    factors = dropout_factors(x_TM, probability, int(seed))
    if grad_x_TM is not None:
        grad_x_TM.addcmul_(grad_h_TR @ A_RM, factors)
    return (grad_h_TR.T @ factors.mul_(x_TM)).contiguous()


backward_op = torch.library.custom_op("rosa::low_rank_backward", backward, mutates_args=("grad_x_TM",))


@backward_op.register_fake
def _(
    grad_x_TM: Tensor | None, grad_h_TR: Tensor, x_TM: Tensor, A_RM: Tensor, probability: float, seed: Tensor
) -> Tensor:
    return A_RM.new_empty(A_RM.shape)


def gradient(grad_h_TR: Tensor, x_TM: Tensor, A_RM: Tensor, probability: float, seed: Tensor) -> Tensor:
    """:func:`backward` where x needs no gradient: the compiler's inductor does not take a tensor to write to that is ``None``."""
    return backward(None, grad_h_TR, x_TM, A_RM, probability, seed)


gradient_op = torch.library.custom_op("rosa::low_rank_gradient", gradient, mutates_args=())


@gradient_op.register_fake
def _(grad_h_TR: Tensor, x_TM: Tensor, A_RM: Tensor, probability: float, seed: Tensor) -> Tensor:
    return A_RM.new_empty(A_RM.shape)


def registered_backward(
    grad_x_TM: Tensor | None, grad_h_TR: Tensor, x_TM: Tensor, A_RM: Tensor, probability: float, seed: Tensor
) -> Tensor:
    """:func:`backward` by torch's registered ops."""
    if grad_x_TM is None:
        return gradient_op(grad_h_TR, x_TM, A_RM, probability, seed)
    return backward_op(grad_x_TM, grad_h_TR, x_TM, A_RM, probability, seed)
