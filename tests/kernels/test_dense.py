"""Masks that are sampled from the dense gradient: which ones, by count, and in how much memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import rosa_kernels
from rosa_kernels import gradient
from rosa_kernels.pattern import dense
from rosa_kernels.pattern.dense import DensePlan, dense_cost, dense_is_cheaper, row_bounds, tiles_cost
from rosa_kernels.pattern.tiles import TilePlan, tile_plan
from rosa_kernels.sddmm.reference import sddmm_reference
from rosa_kernels.sddmm.torch_code import sddmm_dense
from rosa_kernels.testing import assert_rel_close, random_positions

SIZE = 1024


@pytest.fixture
def as_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans are made as where torch multiplies 16-bit matrices into float32, and Triton runs."""
    monkeypatch.setenv("ROSA_KERNELS", "triton")
    monkeypatch.setattr(dense, "multiplies_into_float32", lambda device: True)


def largest(score: Tensor, density: float) -> Tensor:
    return score.flatten().topk(round(score.numel() * density)).indices.sort().values.to(torch.int32)


def mask(kind: str, density: float = 0.006) -> Tensor:
    """Of a (SIZE, SIZE) matrix."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(SIZE, SIZE, generator=generator)
    if kind == "random":
        return random_positions(SIZE, SIZE, density)
    if kind == "clustered":  # as of gradients: a few rows and columns hold most
        weight *= torch.randn(SIZE, 1, generator=generator).exp() * torch.randn(SIZE, generator=generator).exp()
    return largest(weight.abs(), density)


@pytest.mark.parametrize(
    ("kind", "density", "dtype", "expected"),
    [
        ("random", 0.006, torch.bfloat16, True),
        ("random", 0.006, torch.float32, True),
        ("magnitude", 0.006, torch.float16, True),
        ("magnitude", 0.006, torch.float32, True),
        ("random", 0.001, torch.bfloat16, True),  # half of the tiles, and many entries between them
        ("random", 0.001, torch.float32, False),  # a float32 product takes as long as its operations
        ("random", 0.0001, torch.bfloat16, False),  # few enough to gather
        ("clustered", 0.006, torch.bfloat16, False),
        ("clustered", 0.006, torch.float32, False),
        ("random", 0.006, torch.float64, False),
    ],
)
@pytest.mark.usefixtures("as_on_cuda")
def test_which_masks(kind: str, density: float, dtype: torch.dtype, expected: bool) -> None:
    plan = rosa_kernels.make_plan(mask(kind, density), SIZE, SIZE, dtype)
    assert isinstance(plan, TilePlan)
    assert (plan.bounds is not None) == expected
    assert len(plan.sampling_parts()) == (1 if expected else 7)
    assert len(plan.product_parts(False)) == 6  # a product with the mask keeps its tiles


def test_16_bits_that_torch_multiplies_in_float32_alone_stay_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    positions = mask("random")
    plan = tile_plan(positions, SIZE, SIZE, torch.bfloat16)
    assert not dense_is_cheaper(plan, torch.bfloat16)
    monkeypatch.setattr(dense, "multiplies_into_float32", lambda device: True)
    assert dense_is_cheaper(plan, torch.bfloat16)


def test_costs_of_a_full_mask() -> None:
    """Counted by hand: 4 tiles of 2 · 64 inputs, and copies that are written and read, of 16 bits; 2 operations an entry in float32."""
    plan = tile_plan(torch.arange(128 * 128, dtype=torch.int32), 128, 128, torch.bfloat16)
    assert tiles_cost(plan, 2) == 4 * 256 + 2 * 2 * 64 * 4
    product = 128 * 128 * 2 * (1 / 128 + 1 / 256)
    assert dense_cost(plan, 2, True) == product + 128 * 128 * (4 + 32) / 1024
    assert dense_cost(plan, 4, False) == 2 * 128 * 128 / 10 + 128 * 128 * (4 + 32) / 1024


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.usefixtures("as_on_cuda")
def test_values_of_dense_masks(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradient, "BLOCK_BYTES", 4 * 300 * 64)
    generator = torch.Generator().manual_seed(1)
    grad, x = (torch.randn(90, size, generator=generator).to(dtype) for size in (200, 300))
    positions = random_positions(200, 300, 0.05)
    plan = rosa_kernels.make_plan(positions, 200, 300, dtype)
    (bounds,) = plan.sampling_parts()
    assert bounds.tolist() == [int((positions < 300 * row).sum()) for row in (0, 64, 128, 192, 200)]
    values = rosa_kernels.sddmm(grad, x, positions, plan)
    assert_rel_close("values", values, sddmm_reference(grad.double(), x.double(), positions), torch.float32, terms=90)


class Largest(TorchDispatchMode):
    """Numbers of the largest tensor that is made."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and not func.is_view:
            self.numbers = max(self.numbers, result.numel())
        return result


def test_a_block_of_the_gradient_is_all_that_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradient, "BLOCK_BYTES", 4 * SIZE * 50)
    generator = torch.Generator().manual_seed(1)
    grad, x = (torch.randn(20, SIZE, generator=generator) for _ in range(2))
    positions = mask("random")
    bounds = row_bounds(positions, SIZE, SIZE)
    with Largest() as largest_made:
        sddmm_dense(grad, x, positions, bounds)
    assert largest_made.numbers == SIZE * 50


def test_empty_blocks_and_rows_that_do_not_divide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradient, "BLOCK_BYTES", 4 * 5 * 2)  # two rows
    positions = torch.tensor([1, 33], dtype=torch.int32)  # of rows 0 and 6 of 7
    bounds = row_bounds(positions, 7, 5)
    assert bounds.tolist() == [0, 1, 1, 1, 2]
    grad, x = torch.arange(14.0).view(2, 7), torch.ones(2, 5)
    plan = DensePlan(7, 5, 2, x.device, bounds)
    assert rosa_kernels.sddmm(grad, x, positions, plan).tolist() == [7.0, 19.0]
