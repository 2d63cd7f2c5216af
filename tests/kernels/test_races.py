"""No two programs of a Triton kernel touch what one of them writes, and none leaves its tensors."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import rosa_kernels
from races import watched
from rosa_kernels.low_rank import op as low_rank
from rosa_kernels.pattern.tiles import tile_plan
from rosa_kernels.testing import random_positions

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled where there is a GPU")

ROWS, COLUMNS, TOKENS = 70, 90, 40


@pytest.fixture(autouse=True)
def _forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROSA_KERNELS", "triton")


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def sparse_products() -> None:
    """Sampled products, scatter and sparse products, with a plan of tiles and gathered entries, and without one."""
    positions = random_positions(ROWS, COLUMNS, 0.05)
    values, weight = randn(positions.numel()), randn(ROWS, COLUMNS)
    grad, x, y = randn(TOKENS, ROWS), randn(TOKENS, COLUMNS), randn(TOKENS, ROWS)
    rosa_kernels.sddmm(grad, x, positions)
    for least in (0, 10, 10**9):
        rosa_kernels.sddmm(grad, x, positions, tile_plan(positions, ROWS, COLUMNS, torch.float32, least))
    old = rosa_kernels.scatter_add_into(weight, values, positions)
    rosa_kernels.restore_into(weight, old, positions)
    plan = rosa_kernels.make_plan(positions, ROWS, COLUMNS, torch.float32)
    rosa_kernels.spmm_add_into(y, x, values, positions, (ROWS, COLUMNS), plan=plan)
    rosa_kernels.spmm_add_into(x, y, values, positions, (ROWS, COLUMNS), True, plan)


def low_rank_products() -> None:
    features = 2 * COLUMNS
    x, A, grad_h, grad_x = randn(TOKENS, features), randn(3, features), randn(TOKENS, 3), randn(TOKENS, features)
    low_rank.down(x, A, 0.25, torch.tensor([7]))
    low_rank.backward(grad_x, grad_h, x, A, 0.25, torch.tensor([7]))
    low_rank.backward(None, grad_h, x.T.contiguous().T, A, 0.25, torch.tensor([7]))


@pytest.mark.parametrize("run", [sparse_products, low_rank_products])
def test_programs_share_nothing_that_is_written(run: Callable[[], None]) -> None:
    with watched() as found:
        run()
    print(found.programs, "programs", found.accesses, "accesses")
    assert found.programs >= 9
    assert found.problems == []


@triton.jit
def overlapping_kernel(target, size, BLOCK: tl.constexpr):
    """Neighbours store one number in common."""
    tl.store(target + tl.program_id(0) * (BLOCK - 1) + tl.arange(0, BLOCK), 1.0)


@triton.jit
def beyond_kernel(target, size, BLOCK: tl.constexpr):
    """The last block has no mask."""
    at = target + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target + tl.program_id(0), tl.sum(tl.load(at), 0), mask=tl.program_id(0) < 0)


@triton.jit
def in_place_kernel(target, size, BLOCK: tl.constexpr):
    """Every program loads what its neighbour stores."""
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    number = tl.load(target + offsets + BLOCK, mask=offsets + BLOCK < size, other=0.0)
    tl.store(target + offsets, number, mask=offsets < size)


@triton.jit
def twice_kernel(target, size, BLOCK: tl.constexpr):
    """One store has an address twice."""
    tl.store(target + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK) // 2, 1.0)


@pytest.mark.parametrize(
    ("kernel", "problem"),
    [
        (overlapping_kernel, "two programs store the same address"),
        (beyond_kernel, "loads 2 numbers outside of its tensors"),
        (in_place_kernel, "loads what another one stores"),
        (twice_kernel, "stores an address twice at once"),
    ],
)
def test_a_planted_fault_is_found(kernel: Callable[..., None], problem: str) -> None:
    target = torch.zeros(30)
    with watched() as found:
        kernel[(4,)](target, 30, BLOCK=8)  # type: ignore[index]
    assert any(problem in each for each in found.problems), found.problems
