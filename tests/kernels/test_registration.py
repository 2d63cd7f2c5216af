"""The ops as torch knows them: schema, fake tensors, and the layer through torch.compile in one graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch._inductor.config
from torch import Tensor

import rosa_kernels
from rosa_kernels.adapter_linear.base import scattered_matmul_op
from rosa_kernels.low_rank.op import backward_op, down_op, gradient_op
from rosa_kernels.pattern.dense import row_bounds
from rosa_kernels.scatter.op import restore_op, scatter_add_op
from rosa_kernels.sddmm.op import sddmm_op
from rosa_kernels.spmm.op import spmm_op
from rosa_kernels.testing import assert_rel_close, random_positions

CHECKS = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")


def samples() -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """Op and arguments, by a name that says the case."""
    positions = random_positions(5, 7, 0.3)
    values, seed = torch.randn(positions.numel()), torch.tensor([3])
    weight, x, grad = torch.randn(5, 7), torch.randn(4, 7), torch.randn(4, 5)
    A, grad_h = torch.randn(2, 7), torch.randn(4, 2)
    parts = rosa_kernels.make_plan(positions, 5, 7, torch.float32).sampling_parts()
    return {
        "sddmm": (sddmm_op, (grad, x, positions, [])),
        "sddmm planned": (sddmm_op, (grad, x, positions, parts)),
        "sddmm dense": (sddmm_op, (grad, x, positions, [row_bounds(positions, 5, 7)])),
        "sddmm empty": (sddmm_op, (grad, x, positions[:0], [])),
        "scatter": (scatter_add_op, (weight.clone(), values, positions)),
        "restore": (restore_op, (weight.clone(), values, positions)),
        "matmul": (scattered_matmul_op, (x, weight, torch.randn(5), values, positions, False)),
        "matmul transposed": (scattered_matmul_op, (grad, weight, None, values, positions, True)),
        "spmm": (spmm_op, (torch.randn(4, 5), x, values, positions, 5, 7, False, [])),
        "spmm transposed": (spmm_op, (torch.randn(4, 7), grad, values, positions, 5, 7, True, [])),
        "down": (down_op, (x, A, 0.5, seed)),
        "backward": (backward_op, (torch.randn(4, 7), grad_h, x, A, 0.5, seed)),
        "gradient": (gradient_op, (grad_h, x, A, 0.5, seed)),
        "down of a transposed A": (down_op, (x, torch.randn(7, 2).T, 0.5, seed)),
        "backward of a transposed A": (backward_op, (torch.randn(4, 7), grad_h, x, torch.randn(7, 2).T, 0.5, seed)),
        "backward of a transposed A without dropout": (backward_op, (None, grad_h, x, torch.randn(7, 2).T, 0.0, seed)),
        "backward without x": (backward_op, (None, grad_h, x, A, 0.0, seed)),
    }


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # torch's, of its own checks
@pytest.mark.parametrize("name", samples())
def test_opcheck(name: str) -> None:
    op, arguments = samples()[name]
    results = torch.library.opcheck(op, arguments, test_utils=CHECKS)
    assert results == dict.fromkeys(CHECKS, "SUCCESS")


class Layer(torch.nn.Module):
    def __init__(self, transposed: bool, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        shape = (20, 12) if transposed else (12, 20)
        positions = random_positions(*shape, 0.2)
        self.weight = torch.nn.Parameter(torch.randn(shape), requires_grad=False)
        self.bias = torch.nn.Parameter(torch.randn(12))
        self.A = torch.nn.Parameter(torch.randn(3, 20))
        self.B = torch.nn.Parameter(torch.randn(12, 3))
        self.values = torch.nn.Parameter(torch.randn(positions.numel()))
        self.positions = torch.nn.Parameter(positions, requires_grad=False)
        self.options = options | {"transposed": transposed}
        self.options["plan"] = rosa_kernels.make_plan(positions, *shape, torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        return rosa_kernels.adapter_linear(
            x, self.weight, self.bias, self.A, self.B, 0.5, self.values, self.positions, **self.options
        ).relu()


def run(layer: Layer, function: Any) -> dict[str, Tensor]:
    x = torch.linspace(-1, 1, 120).view(2, 3, 20).requires_grad_()
    leaves = {"x": x} | {name: p for name, p in layer.named_parameters() if p.requires_grad}
    torch.manual_seed(1)
    y = function(x)
    return {"y": y.detach()} | dict(
        zip(leaves, torch.autograd.grad(y.square().sum(), list(leaves.values())), strict=True)
    )


@pytest.mark.filterwarnings("ignore")  # torch's compiler warns of itself
@pytest.mark.parametrize(
    "options",
    [{}, {"dropout": 0.5}, {"sparse_product": "separate"}, {"transposed": True}],
    ids=["plain", "dropout", "separate", "transposed"],
)
def test_compiles_into_one_graph(options: dict[str, Any]) -> None:
    layer = Layer(options.pop("transposed", False), **options)
    torch._dynamo.reset()
    before = layer.weight.clone()
    compiled = run(layer, torch.compile(layer, fullgraph=True, backend="aot_eager"))
    for name, expected in run(layer, layer).items():
        assert_rel_close(name, compiled[name], expected, torch.float32)
    assert torch.equal(layer.weight, before)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@torch._inductor.config.patch(
    fallback_random=True
)  # the dropout's seed is torch's; pytest's monkeypatch cannot undo this
def test_inductor_takes_a_layer_whose_input_needs_no_gradient(dropout: float) -> None:
    """As a model's first layers; it refuses an op that may write to a tensor and is given none."""
    layer = Layer(False, dropout=dropout)
    x, found = torch.linspace(-1, 1, 120).view(2, 3, 20), []
    torch._dynamo.reset()
    for function in (layer, torch.compile(layer, fullgraph=True, backend="inductor")):
        torch.manual_seed(1)
        layer.zero_grad()
        function(x).square().sum().backward()
        found.append({name: p.grad for name, p in layer.named_parameters() if p.grad is not None})
    assert found[0].keys() == {"bias", "A", "B", "values"}
    for name, expected in found[0].items():
        assert_rel_close(name, found[1][name], expected, torch.float32)


@pytest.mark.filterwarnings("ignore")
def test_a_model_compiles_with_one_graph_for_its_layers(llama: torch.nn.Module) -> None:
    import rosa_ds

    llama.float()
    rosa_ds.inject(llama, rosa_ds.AdapterConfig(method="robust", rank=2, density=0.05, dropout=0.0))
    rosa_ds.set_mask(llama, rosa_ds.compute_mask(llama, [], score="random"))
    ids = torch.arange(8).view(1, 8)
    expected = llama(input_ids=ids, labels=ids).loss
    torch._dynamo.reset()
    explained = torch._dynamo.explain(llama)(input_ids=ids, labels=ids)
    assert explained.graph_break_count == 0, explained.break_reasons
    actual = torch.compile(llama, fullgraph=True, backend="aot_eager")(input_ids=ids, labels=ids).loss
    assert torch.allclose(actual, expected)
