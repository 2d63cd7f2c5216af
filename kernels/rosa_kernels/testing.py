"""What tests and benchmarks of the kernels share: cases with their reasons, bounds, and the comparison."""

from __future__ import annotations

import torch
from torch import Tensor

# Relative root-mean-square error that the output's own rounding explains.
BOUNDS = {
    torch.float64: 1e-12,  # order of summation
    torch.float32: 1e-6,  # order of summation
    torch.float16: 2**-10,  # unit roundoff 2^-11 of the result and of one intermediate
    torch.bfloat16: 2**-7,  # unit roundoff 2^-8 of the result and of one intermediate
}

# (T, N, M, density, why)
CASES = (
    (7, 12, 20, 0.2, "small"),
    (1, 1, 1, 1.0, "one entry"),
    (33, 65, 31, 0.05, "odd sizes"),
    (16, 8, 40_000, 0.001, "columns beyond int16"),
    (5, 40_000, 3, 0.001, "rows beyond int16, most of them empty"),
    (9, 16, 16, 1.0, "full pattern"),
)


def random_positions(rows: int, columns: int, density: float, seed: int = 0) -> Tensor:
    """Sorted int32 positions of at least one entry."""
    generator = torch.Generator().manual_seed(seed)
    count = max(1, round(rows * columns * density))
    return torch.randperm(rows * columns, generator=generator)[:count].sort().values.to(torch.int32)


def relative_rms(actual: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference over that of ``expected``, in float64; 0 for two zeros."""
    actual, expected = actual.detach().double(), expected.detach().double()
    difference = (actual - expected).norm()
    return float(difference / expected.norm().clamp_min(torch.finfo(torch.float64).tiny))


def bound(dtype: torch.dtype, terms: int = 1) -> float:
    """:data:`BOUNDS`, or where sums of many ``terms`` go beyond it, the random walk of their float32 (float64) roundings."""
    accumulator = torch.promote_types(torch.float32, dtype)
    return max(BOUNDS[dtype], torch.finfo(accumulator).eps / 2 * terms**0.5)


def assert_rel_close(name: str, actual: Tensor, expected: Tensor, dtype: torch.dtype, terms: int = 1) -> None:
    """Fail unless ``actual`` has the shape of ``expected``, is finite and lies within :func:`bound`."""
    assert actual.shape == expected.shape, f"{name}: {tuple(actual.shape)} instead of {tuple(expected.shape)}"
    assert torch.isfinite(actual).all(), f"{name} is not finite"
    error = relative_rms(actual, expected)
    limit = bound(dtype, terms)
    assert error <= limit, f"{name}: relative RMS error {error:.2e} above {limit:.2e}"
