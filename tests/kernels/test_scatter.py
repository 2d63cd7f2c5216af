"""Values inside a weight for the length of a block."""

from __future__ import annotations

import pytest
import torch

from rosa_kernels import restore_into, scatter_add_into, scattered
from rosa_kernels.scatter.reference import scatter_add_reference
from rosa_kernels.testing import random_positions


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_adds_inside_and_restores_every_bit(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight, positions = torch.randn(40, 30).to(dtype), random_positions(40, 30, 0.1)
    values, before = torch.randn(positions.numel()), weight.clone()
    with scattered(weight, values, positions):
        expected = before.clone().double().flatten()
        expected[positions.long()] += values.double()
        wanted = expected.float().to(dtype) if dtype != torch.float64 else expected
        assert torch.allclose(weight.flatten().double(), wanted.double(), rtol=torch.finfo(dtype).eps, atol=0)
        assert not torch.equal(weight, before)
    assert torch.equal(weight, before)


def test_add_into_and_restore() -> None:
    weight = torch.tensor([1.0, 2.0, 3.0])
    positions, values = torch.tensor([0, 2], dtype=torch.int32), torch.tensor([10.0, 20.0], requires_grad=True)
    version = weight._version
    old = scatter_add_into(weight, values, positions)
    assert weight._version > version  # autograd sees that a saved weight is no longer what it was
    assert weight.tolist() == [11.0, 2.0, 23.0]
    assert old.tolist() == [1.0, 3.0]
    restore_into(weight, old, positions)
    assert weight.tolist() == [1.0, 2.0, 3.0]
    assert scatter_add_reference(weight, values.detach(), positions).tolist() == [11.0, 2.0, 23.0]
    with pytest.raises(ValueError, match="positions are int32 or int64, given torch.float32"):
        scatter_add_into(weight, values, torch.ones(2))


def test_restores_after_an_error_and_hides_from_autograd() -> None:
    weight = torch.randn(6, 6)
    before, version = weight.clone(), weight._version
    with pytest.raises(KeyError), scattered(weight, torch.ones(2), torch.tensor([0, 35])):
        raise KeyError
    assert torch.equal(weight, before)
    assert weight._version == version


def test_rejects() -> None:
    with (
        pytest.raises(ValueError, match="are both .Z,."),
        scattered(torch.ones(2, 2), torch.ones(2), torch.tensor([1])),
    ):
        pass
    with (
        pytest.raises(ValueError, match="must be contiguous"),
        scattered(torch.ones(2, 3).T, torch.ones(1), torch.tensor([1])),
    ):
        pass
