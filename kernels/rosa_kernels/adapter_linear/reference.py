"""The adapted linear layer in plain PyTorch, differentiated by autograd: what the fused op is held to."""

from __future__ import annotations

import torch
from torch import Tensor


def adapter_linear_reference(
    x: Tensor,
    weight_NM: Tensor,
    bias_N: Tensor | None = None,
    A_RM: Tensor | None = None,
    B_NR: Tensor | None = None,
    scale: float = 1.0,
    values_Z: Tensor | None = None,
    positions_Z: Tensor | None = None,
) -> Tensor:
    """``y = x (W + S)ᵀ + scale · x Aᵀ Bᵀ + bias`` with dense intermediates and no dropout.

    Shapes: x (..., M); weight_NM (N, M); A_RM (R, M); B_NR (N, R); values_Z, positions_Z (Z,); result (..., N).
    Source: RoSA, arXiv 2401.04679, equation of the adapted layer.
    """
    weight = weight_NM
    if values_Z is not None and positions_Z is not None:
        zeros = torch.zeros(weight_NM.numel(), dtype=weight_NM.dtype, device=weight_NM.device)
        weight = weight_NM + zeros.index_add(0, positions_Z.long(), values_Z.to(weight_NM.dtype)).view_as(weight_NM)
    y = torch.nn.functional.linear(x, weight, bias_N)
    if A_RM is not None and B_NR is not None:
        y = y + scale * (x @ A_RM.T @ B_NR.T)
    return y
