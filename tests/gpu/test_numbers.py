"""Numbers of a GPU beside the CPU's, in this process: kernels at real sizes, quantised bits, merges, memory."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import get_args

import pytest
import torch
from transformers import LlamaForCausalLM

import rosa_ds
from rosa_ds.models.quantized import Form
from rosa_ds.planning.gpu_check import determinism, quantised, steps
from rosa_ds.planning.gpu_check.layer import Layer, SparseProduct
from rosa_ds.planning.gpu_check.report import Report
from rosa_ds.planning.gpu_check.stage import Check
from rosa_ds.planning.gpu_check.stages import STAGES
from rosa_kernels.testing import assert_rel_close

GPU = torch.device("cuda")


@pytest.mark.parametrize("sparse_product", get_args(SparseProduct))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_layers_step_against_dense_float64(dtype: torch.dtype, sparse_product: SparseProduct) -> None:
    layer = Layer.make(1024, 4096, 2048, dtype, GPU)
    found = layer.step(sparse_product=sparse_product)
    x, A, B, values = (t.detach().double().requires_grad_() for t in (layer.x, layer.A, layer.B, layer.values))
    S = torch.zeros(layer.weight.numel(), dtype=torch.float64, device=GPU)
    S = S.index_put((layer.positions.long(),), values).view_as(layer.weight)
    y = x @ (layer.weight.double() + S).T + 2.0 * (x @ A.T) @ B.T
    grads = torch.autograd.grad(y, (x, A, B, values), layer.grad.double())
    for name, wanted in zip(found, (y.detach(), *grads), strict=True):
        assert_rel_close(name, found[name], wanted, dtype, terms=4096)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_layers_step_has_the_same_bits_again(dtype: torch.dtype) -> None:
    layer = Layer.make(1024, 4096, 2048, dtype, GPU)
    assert determinism.differing(layer.step) == []


@pytest.mark.parametrize(("kind", "double"), quantised.FORMS)
def test_quantised_numbers_are_the_cpus(kind: str, double: bool) -> None:
    pytest.importorskip("bitsandbytes")
    found = quantised.differences(Form(kind, double, (512, 1088), torch.float32), GPU)
    assert {name: count for name, count in found.items() if name != "of" and count} == {}


@pytest.mark.parametrize("method", ["robust", "robust-subspace"])
def test_a_merge_is_the_cpus(method: str, llama: LlamaForCausalLM) -> None:
    model = llama.float()
    rosa_ds.inject(model, rosa_ds.AdapterConfig(method=method, rank=4, density=0.1, dropout=0.0))
    rosa_ds.set_mask(model, rosa_ds.compute_mask(model, [], score="random"))
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    there = rosa_ds.merge(copy.deepcopy(model).to(GPU)).state_dict()
    for name, wanted in rosa_ds.merge(model).state_dict().items():
        assert_rel_close(name, there[name].cpu(), wanted, torch.float32, terms=64)


def test_the_peak_is_near_the_plans(tmp_path: Path) -> None:
    """Of a 1B model's layers. Above the plan's are cuBLAS' workspaces alone, below it what does not happen at once."""
    stage = next(stage for stage in STAGES if stage.name == "steps")
    found = steps.against_plan(Check(stage, Report(tmp_path, 0.0), tmp_path), steps.ON_GPU[0])
    assert 0.7 < found["peak_of_planned"] < 1.1, found
