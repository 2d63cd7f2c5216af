"""Injection, merging, saving: one property harness for every method on ``nn.Linear`` and ``Conv1D`` models."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

import rosa_ds
from rosa_ds.adapters.layer import AdaptedLinear
from rosa_ds.adapters.state import trained_parameters
from rosa_ds.adapters.targets import find_targets
from rosa_ds.config.schema import AdapterConfig
from rosa_kernels.testing import relative_rms

METHODS = ("lora", "sparse", "robust")
BATCH = dict[str, torch.Tensor]


@pytest.fixture(params=["llama", "gpt2"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return request.getfixturevalue(request.param)


def adapt(model: PreTrainedModel, method: str, **settings: Any) -> rosa_ds.adapters.inject.InjectReport:
    """Inject with a random mask and parts that are not zero any more, float32 numbers held in float64."""
    report = rosa_ds.inject(
        model, AdapterConfig(method=method, **({"rank": 3, "density": 0.05, "dropout": 0.0} | settings))
    )
    if method != "lora":
        rosa_ds.set_mask(model, rosa_ds.compute_mask(model, [], score="random"))
    generator = torch.Generator().manual_seed(3)
    for parameter in trained_parameters(model).values():
        parameter.data = (torch.randn(parameter.shape, generator=generator) * 0.1).double()
    return report


@pytest.mark.parametrize("method", METHODS)
def test_injection_changes_nothing(model: PreTrainedModel, batch: BATCH, method: str) -> None:
    before = model(**batch).logits
    names = {name for name, _ in model.named_parameters()}
    rosa_ds.inject(model, AdapterConfig(method=method, rank=3, density=0.05))
    if method != "lora":
        rosa_ds.set_mask(model, rosa_ds.compute_mask(model, [], score="random"))
    assert relative_rms(model(**batch).logits, before) < 1e-14
    assert names <= {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("method", METHODS)
def test_merged_model_computes_the_same(model: PreTrainedModel, batch: BATCH, method: str) -> None:
    plain = model(**batch).logits
    adapt(model, method)
    adapted = model(**batch).logits
    assert relative_rms(adapted, plain) > 1e-3
    before = {name: parameter.clone() for name, parameter in model.state_dict().items()}
    with rosa_ds.merged(model):
        assert not rosa_ds.adapted_layers(model)
        assert relative_rms(model(**batch).logits, adapted) < 1e-12
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    rosa_ds.merge(model)
    assert not any(isinstance(module, AdaptedLinear) for module in model.modules())
    assert relative_rms(model(**batch).logits, adapted) < 1e-12


@pytest.mark.parametrize("method", METHODS)
def test_every_gradient_equals_dense_autograd(model: PreTrainedModel, batch: BATCH, method: str) -> None:
    """A, B and values of every layer, from the gradient of the merged dense model by the chain rule."""
    adapt(model, method)
    model(**batch).loss.backward()
    layers = rosa_ds.adapted_layers(model)
    grads = {name: {part: getattr(layer, part) for part in ("A", "B", "values")} for name, layer in layers.items()}
    rosa_ds.merge(model)
    for name in layers:
        model.get_submodule(name).weight.requires_grad_(True)
    model.zero_grad()
    model(**batch).loss.backward()
    for name, layer in layers.items():
        dense = model.get_submodule(name).weight.grad
        logical = dense.T if layer.transposed else dense
        expected = {}
        if layer.rank:
            expected = {"A": layer.scale * layer.B.T @ logical, "B": layer.scale * logical @ layer.A.T}
        if layer.entries:
            expected["values"] = dense.flatten()[layer.positions.long()]
        for part, wanted in expected.items():
            assert relative_rms(grads[name][part].grad, wanted) < 1e-10, f"{name}.{part}"


@pytest.mark.parametrize("method", METHODS)
def test_save_and_load(model: PreTrainedModel, batch: BATCH, method: str, tmp_path: Path) -> None:
    adapt(
        model, method, modules_to_save=["h.0.ln_1"] if hasattr(model, "transformer") else ["layers.0.input_layernorm"]
    )
    expected = model(**batch).logits
    rosa_ds.save_adapter(model, tmp_path / "adapter")
    fresh = type(model)(model.config).double().eval()
    fresh.load_state_dict(base_state(model))
    rosa_ds.load_adapter(fresh, tmp_path / "adapter")
    assert torch.equal(fresh(**batch).logits, expected)


def base_state(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    own = {f"{name}.{part}" for name in rosa_ds.adapted_layers(model) for part in ("A", "B", "values", "positions")}
    return {name: tensor for name, tensor in model.state_dict().items() if name not in own}


def test_full_method_trains_and_saves_everything(llama: PreTrainedModel, batch: BATCH, tmp_path: Path) -> None:
    report = rosa_ds.inject(llama, AdapterConfig(method="full"))
    assert report.trained == sum(parameter.numel() for parameter in llama.parameters())
    llama.lm_head.weight.data += 1
    rosa_ds.save_adapter(llama, tmp_path / "adapter")
    fresh = type(llama)(llama.config).double().eval()
    rosa_ds.load_adapter(fresh, tmp_path / "adapter")
    assert torch.equal(fresh(**batch).logits, llama(**batch).logits)


def test_report_counts(llama: PreTrainedModel) -> None:
    frozen = sum(parameter.numel() for parameter in llama.parameters())
    report = rosa_ds.inject(
        llama, AdapterConfig(method="robust", rank=2, density=0.1, target_modules=["q_proj", "up_proj"])
    )
    assert report.low_rank == 2 * 2 * ((32 + 32) + (32 + 48))
    assert report.sparse == 2 * (round(0.1 * 32 * 32) + round(0.1 * 32 * 48))
    assert report.frozen == frozen
    assert report.adapted == tuple(
        f"model.layers.{index}.{name}" for index in (0, 1) for name in ("self_attn.q_proj", "mlp.up_proj")
    )
    assert "4 layers adapted" in str(report)
    assert all(parameter.dtype == torch.float32 for parameter in trained_parameters(llama).values())


def test_patterns_give_each_layer_its_own_parts(llama: PreTrainedModel) -> None:
    config = AdapterConfig(
        method="robust",
        rank=4,
        density=0.1,
        rank_pattern={"k_proj": 0, "layers.1.": 7},
        density_pattern={"k_proj": 0.0, "down": 0.5},
    )
    rosa_ds.inject(llama, config)
    layers = rosa_ds.adapted_layers(llama)
    assert not any("k_proj" in name for name in layers)
    assert layers["model.layers.0.mlp.up_proj"].rank == 4
    assert layers["model.layers.1.mlp.up_proj"].rank == 7
    assert layers["model.layers.1.mlp.up_proj"].scale == pytest.approx(16 / 7)
    assert layers["model.layers.0.mlp.down_proj"].entries == 32 * 48 // 2


def test_all_linear_leaves_the_head_out(llama: PreTrainedModel, gpt2: PreTrainedModel) -> None:
    assert "lm_head" not in find_targets(llama, ["all-linear"])
    assert len(find_targets(llama, ["all-linear"])) == 14
    assert set(find_targets(gpt2, ["all-linear"])) == {
        f"transformer.h.{index}.{name}"
        for index in (0, 1)
        for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }


def test_targets_by_name_ending_and_expression(llama: PreTrainedModel) -> None:
    assert list(find_targets(llama, ["model.layers.0.mlp.up_proj"])) == ["model.layers.0.mlp.up_proj"]
    assert len(find_targets(llama, ["q_proj", "self_attn.v_proj"])) == 4
    assert len(find_targets(llama, [r".*layers\.1\..*_proj"])) == 7


def test_initial_numbers_depend_on_seed_and_name_alone(llama: PreTrainedModel) -> None:
    other = type(llama)(llama.config).double()
    rosa_ds.inject(llama, AdapterConfig(method="lora", rank=4), seed=1)
    rosa_ds.inject(other, AdapterConfig(method="lora", rank=4, target_modules=["v_proj"]), seed=1)
    one, two = rosa_ds.adapted_layers(llama), rosa_ds.adapted_layers(other)
    name = "model.layers.1.self_attn.v_proj"
    assert torch.equal(one[name].A, two[name].A)
    assert not torch.equal(one[name].A, one["model.layers.0.self_attn.v_proj"].A)
    assert float(one[name].A.detach().abs().max()) <= 32**-0.5
    assert not one[name].B.any()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_modules": ["q_prj"]}, "adapter.target_modules 'q_prj' matches no module. Did you mean q_proj"),
        ({"target_modules": ["norm"]}, "names model.norm, a LlamaRMSNorm: only nn.Linear and Conv1D"),
        ({"modules_to_save": ["embed"]}, "adapter.modules_to_save 'embed' matches no module"),
        ({"rank_pattern": {"qproj": 1}}, "adapter.rank_pattern 'qproj' is found in no adapted layer"),
        ({"density_pattern": {"(": 1}}, "is not a regular expression"),
        ({"modules_to_save": ["mlp"]}, "is both in adapter.target_modules and in adapter.modules_to_save"),
    ],
    ids=["nothing", "not linear", "module", "pattern", "expression", "both"],
)
def test_rejects(llama: PreTrainedModel, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rosa_ds.inject(llama, AdapterConfig(method="robust", **settings))


def test_rejects_a_tied_head_and_a_second_injection(gpt2: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match="whose weight is tied to transformer.wte.weight"):
        rosa_ds.inject(gpt2, AdapterConfig(target_modules=["lm_head"]))
    rosa_ds.inject(gpt2, AdapterConfig())
    with pytest.raises(ValueError, match="has adapters already"):
        rosa_ds.inject(gpt2, AdapterConfig())


def test_tied_layers_are_not_adapted_apart(llama: PreTrainedModel, caplog: pytest.LogCaptureFixture) -> None:
    """Each would have an update of its own, and one weight could take only one: named they are refused, of all left out."""
    first, second = (llama.get_submodule(f"model.layers.{layer}.mlp.up_proj") for layer in (0, 1))
    second.weight = first.weight
    with pytest.raises(ValueError, match=r"layers.0.mlp.up_proj, whose weight is tied to model.layers.1.mlp.up_proj"):
        rosa_ds.inject(llama, AdapterConfig(target_modules=["up_proj"]))
    every = [name for name, layer in llama.named_modules() if isinstance(layer, nn.Linear) and name != "lm_head"]
    report = rosa_ds.inject(llama, AdapterConfig())
    assert set(report.adapted) == {name for name in every if "up_proj" not in name}
    assert (
        "all-linear leaves out 2 layers whose weight another module has, too (e.g. model.layers.0.mlp.up_proj)"
        in caplog.text
    )


def test_rejects_a_model_without_linear_layers() -> None:
    with pytest.raises(ValueError, match="has no linear layer"):
        rosa_ds.inject(nn.Sequential(nn.Embedding(3, 4)), AdapterConfig())


def test_loading_rejects_what_does_not_fit(llama: PreTrainedModel, tmp_path: Path) -> None:
    adapt(llama, "robust")
    rosa_ds.save_adapter(llama, tmp_path / "adapter")
    wider = type(llama)(type(llama.config)(**(llama.config.to_dict() | {"intermediate_size": 56}))).double()
    with pytest.raises(ValueError, match="is it another base"):
        rosa_ds.load_adapter(wider, tmp_path / "adapter")
    with pytest.raises(ValueError, match="is not an adapter folder"):
        rosa_ds.load_adapter(llama, tmp_path)
    other = type(llama)(llama.config).double()
    rosa_ds.inject(other, AdapterConfig(method="robust", rank=3, density=0.05, dropout=0.0, alpha=64))
    with pytest.raises(ValueError, match=r"in the model \(alpha 16.0, not 64.0\): load it"):
        rosa_ds.load_adapter(other, tmp_path / "adapter")
    content = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    content.pop("base_model.model.model.layers.0.mlp.up_proj.supertuning_values")
    save_file(content, tmp_path / "adapter" / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="up_proj.values is not in the adapter"):
        rosa_ds.load_adapter(type(llama)(llama.config).double(), tmp_path / "adapter")
    with pytest.raises(ValueError, match="has no adapter"):
        rosa_ds.save_adapter(type(llama)(llama.config), tmp_path / "other")


def values_gradient(layer: AdaptedLinear) -> torch.Tensor:
    x = torch.arange(12, dtype=layer.weight.dtype).view(2, 6)
    (gradient,) = torch.autograd.grad(layer(x).square().sum(), layer.values)
    return gradient


def test_plan_follows_the_mask() -> None:
    """A layer that was loaded, copied, pickled or moved samples the gradient at its present positions."""
    layers = []
    for positions in ([1, 7, 20], [0, 8, 23]):
        torch.manual_seed(0)
        layer = AdaptedLinear(torch.nn.Linear(6, 4), "up", rank=2, scale=1.0, dropout=0.0, entries=3, seed=0)
        assert layer.plan is None
        layer.set_positions(torch.tensor(positions, dtype=torch.int32))
        assert layer.plan is not None
        layers.append(layer)
    first, second = layers
    expected = values_gradient(second)
    assert not torch.equal(values_gradient(first), expected)
    first.load_state_dict(second.state_dict())
    assert torch.equal(values_gradient(first), expected)
    assert torch.equal(values_gradient(copy.deepcopy(second)), expected)
    buffer = io.BytesIO()
    torch.save(second, buffer)
    buffer.seek(0)
    assert torch.equal(values_gradient(torch.load(buffer, weights_only=False)), expected)
    assert torch.allclose(values_gradient(second.double()).float(), expected)
    assert second.to("meta").plan is None


def test_state_dict_wakes_the_sparse_part() -> None:
    """A mask that a state dict brings is used; where it was not known, the sparse part sleeps on."""
    known, unknown, fresh = (
        AdaptedLinear(torch.nn.Linear(6, 4), "up", rank=0, scale=1.0, dropout=0.0, entries=1, seed=0) for _ in range(3)
    )
    known.set_positions(torch.tensor([0], dtype=torch.int32))
    assert known.values is not None
    torch.nn.init.ones_(known.values)
    x = torch.randn(3, 6)
    fresh.load_state_dict(known.state_dict())
    assert torch.equal(fresh(x), known(x))
    fresh.load_state_dict(unknown.state_dict())
    assert torch.equal(fresh(x), unknown(x))
    assert not fresh.mask_known


def test_an_adapter_does_not_care_how_its_positions_were_kept(llama: PreTrainedModel, tmp_path: Path) -> None:
    config = AdapterConfig(method="sparse", density=0.05, partition_positions=True)
    other = copy.deepcopy(llama)
    rosa_ds.inject(llama, config)
    rosa_ds.set_mask(llama, rosa_ds.compute_mask(llama, [], score="random"))
    rosa_ds.save_adapter(llama, tmp_path / "adapter")
    rosa_ds.inject(other, config.model_copy(update={"partition_positions": False}))
    rosa_ds.load_adapter(other, tmp_path / "adapter")
