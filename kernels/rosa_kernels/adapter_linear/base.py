"""The base product with the sparse part written into the weight for its duration, as one op without side effects."""

from __future__ import annotations

import torch
from torch import Tensor

from rosa_kernels.scatter.op import scattered


def scattered_matmul(
    x: Tensor, weight: Tensor, bias: Tensor | None, values_Z: Tensor, positions_Z: Tensor, transpose: bool
) -> Tensor:
    """``x (W + S)ᵀ + bias``, or with ``transpose`` ``x (W + S) + bias``.

    The weight is changed for the duration of the product and restored bit for bit, so the op as a whole changes
    nothing, on one stream; two streams must not use one weight at a time.

    Shapes: x (T, K); weight contiguous 2-D, its second size K (its first with transpose); values_Z, positions_Z (Z,).
    """
    with scattered(weight, values_Z, positions_Z):
        return torch.nn.functional.linear(x, weight.T if transpose else weight, bias)


scattered_matmul_op = torch.library.custom_op("rosa::scattered_matmul", scattered_matmul, mutates_args=())


@scattered_matmul_op.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, values_Z: Tensor, positions_Z: Tensor, transpose: bool) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1 if transpose else 0])
