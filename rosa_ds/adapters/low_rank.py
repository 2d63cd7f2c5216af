"""The low-rank part ``scale · B A``: initial numbers and the dense difference that it stands for."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from rosa_ds.utils.generators import keyed_generator


def draw_generator(seed: int, name: str, number: int) -> torch.Generator:
    """What decides the directions that a layer's ``number``-th draw takes."""
    return keyed_generator(seed, name, "draw", number)


def initial_A(name: str, rank: int, features_in: int, seed: int) -> Tensor:
    """Kaiming-uniform with a = √5, i.e. uniform in ±1/√M; ``B`` starts at zero, so nothing changes at first.

    Shapes: result (R, M), float32. Source: LoRA, arXiv 2106.09685, released code.
    """
    bound = 1.0 / math.sqrt(features_in)
    generator = keyed_generator(seed, name, "A")
    return torch.empty(rank, features_in).uniform_(-bound, bound, generator=generator)


@contextlib.contextmanager
def float32_products() -> Iterator[None]:
    """Float32 products are computed in float32, whatever the process allows: NVIDIA's containers allow TF32, whose ten bits
    are too few for a factorisation or for what a base is changed by.
    """
    products: Iterator[Any] = (
        getattr(backend, "matmul", None) for backend in (torch.backends.cuda, torch.backends.mkldnn)
    )
    parts = [part for part in products if hasattr(part, "fp32_precision")]  # the newer settings, since torch 2.9
    before = [part.fp32_precision for part in parts]
    try:
        allowed = torch.get_float32_matmul_precision()
    except RuntimeError:  # the newer settings were used, and torch refuses the older
        allowed = None
    try:
        if allowed is not None:
            torch.set_float32_matmul_precision("highest")
        else:
            for part in parts:
                part.fp32_precision = "ieee"
        yield
    finally:
        if allowed is not None:
            torch.set_float32_matmul_precision(allowed)
        for part, precision in zip(parts, before, strict=True):
            part.fp32_precision = precision


@float32_products()
def low_rank_delta(A_RM: Tensor, B_NR: Tensor, scale: float) -> Tensor:
    """``scale · B A`` in float32 (float64 for float64 factors). Shapes: result (N, M)."""
    wide = torch.promote_types(torch.float32, torch.promote_types(A_RM.dtype, B_NR.dtype))
    return (B_NR.detach().to(wide) @ A_RM.detach().to(wide)).mul_(scale)
