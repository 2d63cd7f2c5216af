"""The sampled product against its definition in float64."""

from __future__ import annotations

import pytest
import torch

import rosa_kernels
from rosa_kernels import gradient
from rosa_kernels.pattern.csr import compact_plan, csr_pattern
from rosa_kernels.pattern.dense import row_bounds
from rosa_kernels.sddmm import torch_code
from rosa_kernels.sddmm.reference import sddmm_reference
from rosa_kernels.testing import CASES, assert_rel_close, random_positions

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def in_blocks(grad: torch.Tensor, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    return torch_code.sddmm_dense(grad, x, positions, row_bounds(positions, grad.shape[1], x.shape[1]))


IMPLEMENTATIONS = {"csr": lambda *given: torch_code.sddmm_cpu(*given, []), "dense": in_blocks}


def make(tokens: int, rows: int, columns: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    grad = torch.randn(tokens, rows, generator=generator).to(dtype)
    return grad, torch.randn(tokens, columns, generator=generator).to(dtype)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_example(implementation: str) -> None:
    grad, x = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0, 5.0]])
    positions = torch.tensor([2, 3], dtype=torch.int32)
    assert IMPLEMENTATIONS[implementation](grad, x, positions).tolist() == [5.0, 6.0]
    assert sddmm_reference(grad, x, positions).tolist() == [5.0, 6.0]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case[-1])
def test_matches_reference(case: tuple[int, int, int, float, str], dtype: torch.dtype, implementation: str) -> None:
    tokens, rows, columns, density, _ = case
    grad, x = make(tokens, rows, columns, dtype)
    positions = random_positions(rows, columns, density)
    values = IMPLEMENTATIONS[implementation](grad, x, positions)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert values.dtype == wide
    # sums are float32 whatever the inputs: the products of 16-bit numbers are exact in it
    assert_rel_close("values", values, sddmm_reference(grad.double(), x.double(), positions), wide)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_blocks_add_up(implementation: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    grad, x = make(37, 12, 20, dtype)
    positions = random_positions(12, 20, 0.3)
    monkeypatch.setattr(gradient, "BLOCK_BYTES", 4 * 20 * 5)  # five of the 12 rows at a time
    monkeypatch.setattr(gradient, "TOKENS_AT_ONCE", 8)
    for name, value in {"TRANSPOSE_BYTES": 600, "MIN_TOKENS": 4}.items():
        monkeypatch.setattr(torch_code, name, value)
    values = IMPLEMENTATIONS[implementation](grad, x, positions)
    assert_rel_close("values", values, sddmm_reference(grad.double(), x.double(), positions), torch.float32)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case[-1])
def test_a_plan_changes_nothing(case: tuple[int, int, int, float, str]) -> None:
    tokens, rows, columns, density, _ = case
    grad, x = make(tokens, rows, columns, torch.float32)
    positions = random_positions(rows, columns, density)
    plan = rosa_kernels.make_plan(positions, rows, columns, torch.float32)
    assert torch.equal(rosa_kernels.sddmm(grad, x, positions, plan), rosa_kernels.sddmm(grad, x, positions))


def test_compact_plan_example() -> None:
    plan = compact_plan(torch.tensor([5, 7], dtype=torch.int32), 3, 4)
    assert plan.used_rows.tolist() == [1]
    assert plan.used_columns.tolist() == [1, 3]
    assert plan.pointers.tolist() == [0, 2]
    assert plan.column_indices.tolist() == [0, 1]


def test_a_plan_of_another_mask_is_refused() -> None:
    grad, x = make(3, 4, 5, torch.float32)
    positions = random_positions(4, 5, 0.3)
    plan = rosa_kernels.make_plan(positions, 5, 4, torch.float32)
    with pytest.raises(ValueError, match=r"in a \(5, 4\) matrix on cpu was given for 6 in \(4, 5\)"):
        rosa_kernels.sddmm(grad, x, positions, plan)


def test_empty_pattern_and_no_tokens() -> None:
    grad, x = make(4, 3, 5, torch.bfloat16)
    none = torch.empty(0, dtype=torch.int32)
    assert rosa_kernels.sddmm(grad, x, none).shape == (0,)
    values = rosa_kernels.sddmm(grad[:0], x[:0], torch.tensor([1], dtype=torch.int32))
    assert values.tolist() == [0.0]
    assert values.dtype == torch.float32


def test_strided_inputs() -> None:
    grad, x = make(8, 10, 12, torch.float32)
    positions = random_positions(5, 12, 0.5)
    values = rosa_kernels.sddmm(grad[:, ::2], x.T.contiguous().T, positions)
    assert_rel_close("values", values, sddmm_reference(grad[:, ::2].double(), x.double(), positions), torch.float32)


def test_same_bits_again() -> None:
    grad, x = make(300, 64, 96, torch.float32)
    positions = random_positions(64, 96, 0.05)
    assert torch.equal(rosa_kernels.sddmm(grad, x, positions), rosa_kernels.sddmm(grad, x, positions))


def test_csr_pattern_beyond_int32() -> None:
    positions = torch.tensor([5, 2**33], dtype=torch.int64)
    pointers, columns = csr_pattern(positions, 3, 2**32)
    assert pointers.tolist() == [0, 1, 1, 2]
    assert columns.tolist() == [5, 0]


@pytest.mark.parametrize(
    ("grad", "x", "positions", "message"),
    [
        (torch.ones(2, 3), torch.ones(4, 5), torch.zeros(1, dtype=torch.int32), "with the same T"),
        (torch.ones(1, 2, 3), torch.ones(2, 5), torch.zeros(1, dtype=torch.int32), "flatten batch and length"),
        (torch.ones(2, 3), torch.ones(2, 5).double(), torch.zeros(1, dtype=torch.int32), "of one floating type"),
        (torch.ones(2, 3), torch.ones(2, 5), torch.zeros(1), "positions .Z,. of int32 or int64"),
    ],
    ids=["tokens", "dimensions", "dtypes", "positions"],
)
def test_rejects(grad: torch.Tensor, x: torch.Tensor, positions: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rosa_kernels.sddmm(grad, x, positions)
