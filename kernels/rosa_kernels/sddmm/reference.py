"""Sampled dense-dense product in plain PyTorch: the definition that every implementation is held to."""

from __future__ import annotations

from torch import Tensor


def sddmm_reference(grad_TN: Tensor, x_TM: Tensor, positions_Z: Tensor) -> Tensor:
    """Gradient of the sparse values of a linear layer, by the whole dense gradient.

    ``values[z] = Σ_t grad[t, positions[z] // M] · x[t, positions[z] % M]``

    Shapes: grad_TN (T, N); x_TM (T, M); positions_Z (Z,) flat row-major indices into (N, M); result (Z,).
    Dtypes: float32 or float64, kept.
    Example: grad = [[1, 2]], x = [[3, 4, 5]], positions = [2, 3] (entries (0, 2) and (1, 0)) -> [5, 6].
    Source: RoSA, arXiv 2401.04679, gradient of the sparse adapter.
    """
    return (grad_TN.T @ x_TM).flatten()[positions_Z.long()]
