"""The product with the sparse part, in torch; Triton's is held to the same reference in test_triton."""

from __future__ import annotations

import pytest
import torch

import rosa_kernels
from rosa_kernels import limits
from rosa_kernels.spmm.reference import spmm_reference
from rosa_kernels.testing import CASES, assert_rel_close, random_positions

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def test_example() -> None:
    positions, values = torch.tensor([2, 3], dtype=torch.int32), torch.tensor([2.0, 7.0])
    x, y = torch.tensor([[3.0, 4.0, 5.0]]), torch.ones(1, 2)
    rosa_kernels.spmm_add_into(y, x, values, positions, (2, 3))
    assert y.tolist() == [[11.0, 22.0]]
    assert spmm_reference(x, values, positions, (2, 3), False).tolist() == [[10.0, 21.0]]


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case[-1])
def test_matches_reference(case: tuple[int, int, int, float, str], dtype: torch.dtype, transpose: bool) -> None:
    tokens, rows, columns, density, _ = case
    generator = torch.Generator().manual_seed(0)
    positions = random_positions(rows, columns, density)
    values = torch.rand(positions.numel(), generator=generator)
    x = torch.randn(tokens, rows if transpose else columns, generator=generator).to(dtype)
    y = torch.randn(tokens, columns if transpose else rows, generator=generator).to(dtype)
    expected = y.double() + spmm_reference(x.double(), values.double(), positions, (rows, columns), transpose)
    rosa_kernels.spmm_add_into(y, x, values, positions, (rows, columns), transpose)
    assert_rel_close("y", y, expected, dtype, terms=max(rows, columns))


def test_blocks_of_tokens_and_strides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "SCRATCH_BYTES", 700)
    positions, values = random_positions(6, 8, 0.3), torch.rand(round(6 * 8 * 0.3))
    x, y = torch.randn(8, 40).T, torch.randn(6, 40).T
    expected = y.double() + spmm_reference(x.double(), values.double(), positions, (6, 8), False)
    rosa_kernels.spmm_add_into(y, x, values, positions, (6, 8))
    assert_rel_close("y", y, expected, torch.float32)


def test_nothing_to_add() -> None:
    y, x = torch.ones(2, 3), torch.ones(2, 4)
    rosa_kernels.spmm_add_into(y, x, torch.empty(0), torch.empty(0, dtype=torch.int32), (3, 4))
    assert torch.equal(y, torch.ones(2, 3))


@pytest.mark.parametrize(
    ("y", "x", "values", "message"),
    [
        (torch.ones(2, 3), torch.ones(2, 5), torch.ones(1), r"takes x \(T, 4\) to y \(T, 3\)"),
        (torch.ones(2, 3), torch.ones(2, 4).double(), torch.ones(1), "of one floating type"),
        (torch.ones(2, 3), torch.ones(2, 4), torch.ones(2), r"are both \(Z,\)"),
    ],
    ids=["shape", "dtype", "values"],
)
def test_rejects(y: torch.Tensor, x: torch.Tensor, values: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rosa_kernels.spmm_add_into(y, x, values, torch.tensor([1]), (3, 4))
