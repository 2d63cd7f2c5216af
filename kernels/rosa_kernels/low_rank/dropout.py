"""Dropout that follows from a seed alone, so that backward draws it again instead of keeping it."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def dropout_factors(x_TM: Tensor, probability: float, seed: int) -> Tensor:
    """Factors of x's shape and dtype, 0 or 1/(1 - p), that follow from ``seed``, shape and device type alone.

    On the CPU, p is rounded to a multiple of 2^-16 and 16 random bits decide an entry: torch's ``bernoulli_`` with a
    generator takes 20 times as long there.
    """
    if x_TM.device.type != "cpu":
        generator = torch.Generator(device=x_TM.device).manual_seed(seed)
        return torch.empty_like(x_TM).bernoulli_(1.0 - probability, generator=generator).div_(1.0 - probability)
    threshold = min(round(probability * 2**16), 2**16 - 1)
    words = np.random.SFC64(seed).random_raw(-(-x_TM.numel() // 4)).view(np.uint16)[: x_TM.numel()]
    keep = torch.from_numpy(words >= threshold).view(x_TM.shape)
    return keep.to(x_TM.dtype).div_(1.0 - threshold / 2**16)
