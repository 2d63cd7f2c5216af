"""The running choice of a product's largest entries."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rosa_kernels import gradient
from rosa_kernels.collect.op import RunningTopK
from rosa_kernels.collect.reference import top_positions_reference
from rosa_kernels.gradient import gradient_blocks
from rosa_kernels.testing import assert_rel_close


def running(grad: torch.Tensor, x: torch.Tensor, count: int) -> RunningTopK:
    largest = RunningTopK(count)
    for first, block in gradient_blocks(grad, x):
        largest.add(block.square(), first * x.shape[1])
    return largest


def test_example() -> None:
    grad, x = torch.tensor([[1.0, -3.0]]), torch.tensor([[1.0, 2.0]])
    assert running(grad, x, 2).positions().tolist() == [2, 3]
    assert top_positions_reference(grad, x, 2).tolist() == [2, 3]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("block_bytes", [1, 1000, 2**20])
@pytest.mark.parametrize("count", [1, 40, 35 * 21])
def test_same_entries_whatever_the_blocks(
    count: int, block_bytes: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gradient, "BLOCK_BYTES", block_bytes)
    generator = torch.Generator().manual_seed(0)
    grad, x = (torch.randn(9, size, generator=generator).to(dtype) for size in (35, 21))
    blocks = list(gradient_blocks(grad, x))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert {block.dtype for _, block in blocks} == {wide}
    assert [first for first, _ in blocks] == list(range(0, 35, len(blocks[0][1])))
    assert_rel_close("G", torch.cat([block for _, block in blocks]), grad.double().T @ x.double(), wide)
    largest = running(grad, x, count)
    assert largest.positions().dtype == torch.int32
    assert largest.positions().tolist() == top_positions_reference(grad.double(), x.double(), count).tolist()
    assert largest.scores().shape == (count,)


class WideNumbers(TorchDispatchMode):
    """Float32 numbers of each tensor that an operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        # a view, or what is changed in place, is another name of what there is
        if isinstance(result, torch.Tensor) and result.dtype == torch.float32 and not func.is_view:
            self.made.append(result.numel())
        return result


def test_long_inputs_of_16_bits_are_widened_in_parts() -> None:
    generator = torch.Generator().manual_seed(0)
    grad, x = (torch.randn(2500, size, generator=generator).bfloat16() for size in (6, 40))
    with WideNumbers() as numbers:
        [(first, block)] = gradient_blocks(grad, x)
    assert first == 0
    assert max(numbers.made) == gradient.TOKENS_AT_ONCE * 40
    assert_rel_close("G", block, grad.double().T @ x.double(), torch.float32)
    grad, x = grad.float(), x.float()
    with WideNumbers() as numbers:
        list(gradient_blocks(grad, x))
    assert numbers.made == [6 * 40]


def test_on_cuda_16_bits_are_multiplied_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """``torch.mm`` into float32 is there on CUDA alone: here stands in for it what it computes."""

    def mm(left: torch.Tensor, right: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
        assert left.dtype == right.dtype == torch.bfloat16
        return left.double().matmul(right.double()).to(out_dtype)

    monkeypatch.setattr(gradient, "multiplies_into_float32", lambda device: True)
    monkeypatch.setattr(gradient, "BLOCK_BYTES", 4 * 40 * 4)
    monkeypatch.setattr(torch, "mm", mm)
    generator = torch.Generator().manual_seed(0)
    grad, x = (torch.randn(2500, size, generator=generator).bfloat16() for size in (6, 40))
    with WideNumbers() as numbers:
        blocks = list(gradient_blocks(grad, x))
    assert numbers.made == [4 * 40, 2 * 40]  # the blocks and nothing else
    assert [first for first, _ in blocks] == [0, 4]
    assert_rel_close("G", torch.cat([block for _, block in blocks]), grad.double().T @ x.double(), torch.float32)


@pytest.mark.parametrize(
    ("device", "hip", "reduced", "expected"),
    [
        ("cuda", None, False, True),
        ("cuda", "7.0", False, False),  # torch refuses it there
        ("cuda", None, True, False),  # and with sums in float16
        ("cpu", None, False, False),
        ("xpu", None, False, False),
    ],
)
def test_where_torch_multiplies_into_float32(
    device: str, hip: str | None, reduced: bool, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "hip", hip)
    matmul = type("Matmul", (), {"allow_fp16_accumulation": reduced})
    monkeypatch.setattr(torch.backends.cuda, "matmul", matmul)
    assert gradient.multiplies_into_float32(torch.device(device)) == expected


def test_nothing_seen() -> None:
    assert RunningTopK(3).positions().numel() == 0
    assert RunningTopK(3).scores().numel() == 0
