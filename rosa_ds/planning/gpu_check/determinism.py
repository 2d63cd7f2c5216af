"""Whether the same step has the same bits again."""

from __future__ import annotations

from collections.abc import Callable
from typing import get_args

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from rosa_ds.planning.gpu_check.layer import Layer, SparseProduct
from rosa_ds.planning.gpu_check.stage import Check, randn

TIMES = 20


def repeat(check: Check) -> None:
    tokens, rows, columns = (4096, 4096, 4096) if check.gpu else (64, 96, 80)
    for dtype in (torch.float32, torch.bfloat16):
        layer = Layer.make(tokens, rows, columns, dtype, check.device)
        for sparse_product in get_args(SparseProduct):

            def step(layer: Layer = layer, how: SparseProduct = sparse_product) -> dict[str, Tensor]:
                torch.manual_seed(0)  # of dropout
                return layer.step(dropout=0.1, sparse_product=how)

            unlike = differing(step)
            check.tell(
                what="adapted layer", dtype=str(dtype), sparse_product=sparse_product, times=TIMES, unlike=unlike
            )
    length = 1024 if check.gpu else 32
    q = randn(2, 8, length, 64, dtype=torch.bfloat16, device=check.device).requires_grad_()
    lower = torch.ones(2, 1, length, length, dtype=torch.bool, device=check.device).tril()
    for name, mask in (("causal", None), ("with a mask", lower)):

        def attention(mask: Tensor | None = mask) -> dict[str, Tensor]:
            y = scaled_dot_product_attention(q, q, q, attn_mask=mask, is_causal=mask is None)
            return {"y": y.detach(), "q": torch.autograd.grad(y, q, torch.ones_like(y))[0]}

        check.tell(what=f"torch's attention, {name}", times=TIMES, unlike=differing(attention))


def differing(step: Callable[[], dict[str, Tensor]], times: int = TIMES) -> list[str]:
    """Names of results that had other bits in one of the repetitions than at first."""
    first = step()
    found: set[str] = set()
    for _ in range(times - 1):
        found |= {name for name, tensor in step().items() if not torch.equal(tensor, first[name])}
    return sorted(found)
