"""Adapters beside each other on one base, and the base without any: bit for bit what each computes alone."""

from __future__ import annotations

import contextlib
import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import rosa_ds
from rosa_ds import zero
from rosa_ds.adapters import state
from rosa_ds.config.schema import AdapterConfig

BATCH = dict[str, Tensor]
SETTINGS: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora"},
    "sparse": {"method": "sparse"},
    "robust": {"method": "robust"},
    "subspace": {"method": "subspace"},
    "robust-subspace": {"method": "robust-subspace"},
    "whole modules": {"method": "lora", "modules_to_save": ["layers.1.post_attention_layernorm", "embed_tokens"]},
    "full": {"method": "full"},
}


@pytest.fixture(params=["llama", "gpt2"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    plain: PreTrainedModel = request.getfixturevalue(request.param)
    return plain.float()


def adapted(model: PreTrainedModel, settings: dict[str, Any], seed: int = 0, **more: Any) -> PreTrainedModel:
    """The model with an adapter, no number of which is zero."""
    if model.config.model_type == "gpt2" and "modules_to_save" in settings:
        settings = {**settings, "modules_to_save": ["ln_f", "wte"]}
    config = AdapterConfig(**({"rank": 3, "density": 0.05, "dropout": 0.0} | settings))
    rosa_ds.inject(model, config, seed=seed, **more)
    if any(layer.entries for layer in rosa_ds.adapted_layers(model).values()):
        rosa_ds.set_mask(model, rosa_ds.compute_mask(model, [], score="random", seed=seed))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def logits(model: PreTrainedModel, batch: BATCH) -> Tensor:
    with torch.no_grad():
        return model(**batch).logits


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_disabled_is_the_base(model: PreTrainedModel, batch: BATCH, settings: dict[str, Any]) -> None:
    base = logits(model, batch)
    keeps = settings["method"] in ("lora", "sparse", "robust") and "modules_to_save" not in settings
    adapted(model, settings, keep_base=not keeps)
    ours = logits(model, batch)
    assert not torch.allclose(ours, base)
    model.requires_grad_(False)  # as users do for inference: it does not hide what was trained whole
    with rosa_ds.disabled(model) as reference:
        assert torch.equal(logits(reference, batch), base)
        with rosa_ds.disabled(model):
            pass
        assert torch.equal(logits(model, batch), base)
    assert torch.equal(logits(model, batch), ours)
    rosa_ds.disable(model)
    assert torch.equal(logits(model.to(torch.float64).to(torch.float32), batch), base)
    for forbidden in (lambda: rosa_ds.save_adapter(model, "x"), lambda: rosa_ds.merge(model)):
        with pytest.raises(ValueError, match="is disabled: rosa_ds.enable"):
            forbidden()
    rosa_ds.enable(model)
    assert torch.equal(logits(model, batch), ours)


@pytest.mark.parametrize("method", ["full", "lora", "robust", "subspace"])
def test_what_was_not_kept_is_named(llama: PreTrainedModel, batch: BATCH, method: str) -> None:
    whole = {} if method == "full" else {"modules_to_save": ["norm"]}
    adapted(llama.float(), {"method": method, **whole})
    ours = logits(llama, batch)
    with pytest.raises(ValueError, match=r"the base's own .* is not there any more \(.*use keep_base=True"):
        rosa_ds.disable(llama)
    assert torch.equal(logits(llama, batch), ours)


def test_gradients_and_draws_go_on_after_it(llama: PreTrainedModel, batch: BATCH) -> None:
    base = logits(llama.float(), batch)
    adapted(llama, {"method": "subspace"}, keep_base=True)
    other = copy.deepcopy(llama)
    with rosa_ds.disabled(llama):
        assert torch.equal(logits(llama, batch), base)
    for each in (llama, other):
        each(**batch).loss.backward()
        rosa_ds.draw(each, seed=3)
    parts = zip(llama.named_parameters(), other.named_parameters(), strict=True)
    assert all(torch.equal(a, b) and (a.grad is None) == (b.grad is None) for (_, a), (_, b) in parts)
    assert all(
        torch.equal(a.grad, b.grad)
        for a, b in zip(llama.parameters(), other.parameters(), strict=True)
        if a.requires_grad
    )
    with rosa_ds.disabled(llama):
        assert torch.equal(logits(llama, batch), base)


def test_side_by_side(model: PreTrainedModel, batch: BATCH, tmp_path: Path) -> None:
    base, expected = logits(model, batch), {}
    for seed, (name, settings) in enumerate(SETTINGS.items()):
        alone = adapted(copy.deepcopy(model), settings, seed)
        rosa_ds.save_adapter(alone, tmp_path / name)
        expected[name] = logits(alone, batch)
    names = [name for name in model.state_dict() if "weight" in name]
    for name in SETTINGS:
        rosa_ds.load_adapter(model, tmp_path / name, name=name, keep_base=True)
        assert torch.equal(logits(model, batch), expected[name]), name
    assert sorted(rosa_ds.adapter_names(model)) == sorted(SETTINGS)
    for name in ("lora", "full", "subspace", "whole modules", "robust-subspace", "robust", "sparse", "full"):
        rosa_ds.set_adapter(model, name)
        assert rosa_ds.adapter_names(model)[0] == name
        assert torch.equal(logits(model, batch), expected[name]), name
        with rosa_ds.disabled(model):
            assert torch.equal(logits(model, batch), base), name
    rosa_ds.disable(model)
    rosa_ds.set_adapter(model, "robust")
    # the model may be on another device than when it was parked: what was prepared there is made again
    assert all(layer.plan is None for layer in rosa_ds.adapted_layers(model).values())
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all(name.endswith((".A", ".B", ".values")) for name in trained)
    rosa_ds.save_adapter(model, tmp_path / "again")
    (again,) = (tmp_path / "again").glob("*.safetensors")
    assert again.read_bytes() == (tmp_path / "robust" / again.name).read_bytes()
    with rosa_ds.merged(model):
        assert torch.allclose(logits(model, batch), expected["robust"], atol=1e-4)
    with pytest.raises(ValueError, match="has other adapters"):
        rosa_ds.merge(model)
    for name in SETTINGS:
        rosa_ds.remove_adapter(model, name)
    assert rosa_ds.adapter_names(model) == []
    assert torch.equal(logits(model, batch), base)
    assert [name for name in model.state_dict() if "weight" in name] == names
    with pytest.raises(ValueError, match="has no adapter"):
        rosa_ds.disable(model)


def test_a_second_adapter_needs_the_base(llama: PreTrainedModel, batch: BATCH, tmp_path: Path) -> None:
    for name in ("subspace", "lora"):
        rosa_ds.save_adapter(adapted(copy.deepcopy(llama.float()), {"method": name}), tmp_path / name)
    rosa_ds.load_adapter(llama, tmp_path / "subspace")
    ours = logits(llama, batch)
    with pytest.raises(ValueError, match="use keep_base=True"):
        rosa_ds.load_adapter(llama, tmp_path / "lora", name="lora")
    with pytest.raises(ValueError, match=r"has no adapter 'defalt' \(default\). Did you mean default"):
        rosa_ds.set_adapter(llama, "defalt")
    assert rosa_ds.adapter_names(llama) == ["default"]
    assert torch.equal(logits(llama, batch), ours)


def test_a_name_is_given_once(llama: PreTrainedModel, batch: BATCH, tmp_path: Path) -> None:
    rosa_ds.save_adapter(adapted(copy.deepcopy(llama.float()), {"method": "lora"}), tmp_path / "other")
    adapted(llama, {"method": "robust"})
    ours = logits(llama, batch)
    rosa_ds.load_adapter(llama, tmp_path / "other", name="b")
    rosa_ds.remove_adapter(llama, "b")
    with pytest.raises(ValueError, match="has an adapter 'default': rosa_ds.set_adapter"):
        rosa_ds.inject(llama, rosa_ds.AdapterConfig(method="lora"))
    rosa_ds.inject(llama, rosa_ds.AdapterConfig(method="lora"), name="c")
    assert rosa_ds.adapter_names(llama) == ["c", "default"]
    rosa_ds.set_adapter(llama, "default")
    assert torch.equal(logits(llama, batch), ours)


def test_full_is_injected_once(llama: PreTrainedModel) -> None:
    rosa_ds.inject(llama, rosa_ds.AdapterConfig(method="full"))
    with pytest.raises(ValueError, match="has adapters already"):
        rosa_ds.inject(llama, rosa_ds.AdapterConfig(method="lora"))


@pytest.mark.parametrize("name", ["default", "new"])
@pytest.mark.parametrize("where", ["open_adapter", "inject", "fill_adapter"])
def test_a_failure_of_any_kind_leaves_the_adapter_before(
    llama: PreTrainedModel, batch: BATCH, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, where: str
) -> None:
    rosa_ds.save_adapter(adapted(copy.deepcopy(llama.float()), {"method": "lora"}), tmp_path / "folder")
    adapted(llama, {"method": "robust"})
    rosa_ds.load_adapter(llama, tmp_path / "folder", name="active")
    ours, true_inject = logits(llama, batch), state.inject

    def fails(*arguments: Any, **named: Any) -> None:
        if where == "inject":
            true_inject(*arguments, **named)
        raise MemoryError

    if name == "default" and where == "inject":
        where = "fill_adapter"  # an adapter that is there is not injected
    monkeypatch.setattr(state, where, fails)
    with pytest.raises(MemoryError):
        rosa_ds.load_adapter(llama, tmp_path / "folder", name=name)
    assert rosa_ds.adapter_names(llama) == ["active", "default"]
    assert torch.equal(logits(llama, batch), ours)


@pytest.mark.parametrize("keep_base", [True, False])
@pytest.mark.parametrize("kind", ["subspace", "whole modules"])
def test_a_failure_half_way_gives_the_base_back_or_says_so(
    llama: PreTrainedModel, batch: BATCH, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, keep_base: bool
) -> None:
    rosa_ds.save_adapter(adapted(copy.deepcopy(llama.float()), SETTINGS[kind]), tmp_path / "folder")
    base, write, count = logits(llama, batch), zero.write_whole, itertools.count()
    with contextlib.closing(state.open_adapter(tmp_path / "folder", llama)) as stored:
        fatal = len(stored.trained) + 1 if stored.base else len(stored.trained) - 1

    def fails(parameter: torch.nn.Parameter, numbers: Tensor) -> None:
        if next(count) == fatal:
            raise MemoryError
        write(parameter, numbers)

    monkeypatch.setattr(zero, "write_whole", fails)
    with pytest.raises(MemoryError) as caught:
        rosa_ds.load_adapter(llama, tmp_path / "folder", keep_base=keep_base)
    assert rosa_ds.adapter_names(llama) == []
    assert not rosa_ds.adapted_layers(llama)
    (note,) = caught.value.__notes__
    assert ("load the base model and the adapter again" in note) is not keep_base
    assert torch.equal(logits(llama, batch), base) is keep_base


def test_an_adapter_of_another_form_names_what_differs(llama: PreTrainedModel, tmp_path: Path) -> None:
    for settings in ({"method": "sparse", "sparse_product": "separate"}, {"method": "lora", "rank": 2}):
        rosa_ds.save_adapter(adapted(copy.deepcopy(llama.float()), settings), tmp_path / settings["method"])
    adapted(llama, {"method": "sparse"})
    rosa_ds.load_adapter(llama, tmp_path / "sparse")  # how a product is formed is no part of what it is
    with pytest.raises(ValueError, match=r"lora has another form .* \(rank 2, not 3; method 'lora', not 'sparse'\)"):
        rosa_ds.load_adapter(llama, tmp_path / "lora")


def test_an_adapter_that_does_not_fit_leaves_the_one_before(
    llama: PreTrainedModel, gpt2: PreTrainedModel, batch: BATCH, tmp_path: Path
) -> None:
    rosa_ds.save_adapter(adapted(gpt2.float(), {"method": "lora"}), tmp_path / "foreign")
    adapted(llama.float(), {"method": "robust"})
    ours = logits(llama, batch)
    with pytest.raises(ValueError, match=r"foreign: .* is not in the adapter"):
        rosa_ds.load_adapter(llama, tmp_path / "foreign", name="foreign")
    with pytest.raises(ValueError, match="is not an adapter folder"):
        rosa_ds.load_adapter(llama, tmp_path, name="nothing")
    assert rosa_ds.adapter_names(llama) == ["default"]
    assert torch.equal(logits(llama, batch), ours)
