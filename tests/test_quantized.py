"""Bases in 4 and 8 bits, against dense models that have the dequantised weights."""

from __future__ import annotations

import contextlib
import copy
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

import rosa_ds
from launching import ROOT, SMALL, TRAIN, losses, metrics, run
from rosa_ds import distributed
from rosa_ds.adapters.quantize import load_quantized, packed_hashes
from rosa_ds.checkpoints.source import open_source
from rosa_ds.config.schema import AdapterConfig, MergeBase, ModelSettings, RunConfig
from rosa_ds.config.unused import settings_without_effect
from rosa_ds.export.adapted import load_adapted, load_merged
from rosa_ds.export.merge import export_merged, export_peft
from rosa_ds.export.verify import verify
from rosa_ds.models.load import load_model
from rosa_ds.models.quantized import Form, Kind, QuantizedLinear, quantization_of
from rosa_ds.utils.files import write_manifest

KINDS: list[tuple[Kind, bool]] = [("nf4", True), ("nf4", False), ("int8", True)]


def nearest_nf4(weight: Tensor) -> Tensor:
    """QLoRA's rounding by its definition: in each block of 64 the nearest of 16 numbers times the largest magnitude."""
    flat = torch.cat([weight.reshape(-1), torch.zeros(-weight.numel() % 64)]).view(-1, 64)
    largest = flat.abs().amax(1, keepdim=True)
    code = bnb.get_4bit_type("nf4", device="cpu")
    index = (flat / largest.clamp_min(1e-30))[..., None].sub(code).abs().argmin(-1)
    return (code[index] * largest).view(-1)[: weight.numel()].view(weight.shape)


@pytest.mark.parametrize("shape", [(32, 64), (432, 160), (48, 96), (7, 13), (3, 65)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_numbers_are_the_nearest(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    eps = torch.finfo(dtype).eps
    for kind, double in KINDS:
        form = Form(kind, double, shape, dtype)
        packed = form.pack(weight)
        assert {name: (tuple(array.shape), array.dtype) for name, array in packed.items()} == form.sizes()
        found = form.unpack(packed["weight"], packed["weight_scales"]).float()
        if kind == "int8":
            step = weight.abs().amax(1, keepdim=True) / 127
            assert bool(((found - weight).abs() <= 0.5 * step + 2**-10 * weight.abs() + eps * weight.abs()).all())
        elif not double:
            expected = nearest_nf4(weight).to(dtype).float()
            wrong = (found - expected).abs() > 2 * eps * expected.abs()
            assert wrong.float().mean() < 1e-3  # ties
        else:
            assert (found - nearest_nf4(weight)).norm() < 0.01 * weight.norm()  # scales in 8 bits


def test_bits_a_number() -> None:
    bits = {}
    for kind, double in KINDS:
        sizes = Form(kind, double, (4096, 4096), torch.float32).sizes().values()
        bits[kind, double] = 8 * sum(shape[0] * shape[1] * dtype.itemsize for shape, dtype in sizes) / 4096**2
    assert bits == pytest.approx({("nf4", True): 4.127, ("nf4", False): 4.5, ("int8", True): 8.008}, abs=1e-3)


def dense_like(model: nn.Module, quantized: nn.Module) -> nn.Module:
    """A dense model with the weights that the quantised one stands for."""
    for name, module in quantized.named_modules():
        if isinstance(module, QuantizedLinear):
            model.get_submodule(name).weight.data.copy_(module.dense(module.weight))
    return model


def pair(model: nn.Module, kind: Kind, dtype: torch.dtype) -> tuple[Any, Any]:
    """A quantised model and a dense one with its numbers."""
    dense = model.to(dtype)
    quantized = rosa_ds.quantize(copy.deepcopy(dense), kind)
    return quantized, dense_like(dense, quantized)


def give_numbers(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["lora", "sparse", "robust"])
@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_loss_mask_and_every_gradient(
    request: pytest.FixtureRequest, arch: str, method: str, dtype: torch.dtype, kind: Kind, batch: dict[str, Tensor]
) -> None:
    config = AdapterConfig(method=method, rank=3, density=0.05, dropout=0.0, target_modules=["all-linear"])
    results = []
    models = pair(request.getfixturevalue(arch), kind, dtype)
    assert sum(isinstance(module, QuantizedLinear) for module in models[0].modules()) >= 8
    assert torch.equal(models[0](**batch).logits, models[0](**batch).logits)
    reports = [rosa_ds.inject(model, config) for model in models]
    assert reports[0] == reports[1]  # counts numbers, not bytes
    for model in models:
        mask = {}
        if method != "lora":
            mask = rosa_ds.compute_mask(model, [batch], score="gradient_over_magnitude")
            rosa_ds.set_mask(model, mask)
        give_numbers(model)
        loss = model(**batch).loss
        loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        results.append((mask, loss.detach(), gradients))
    assert results[0][2].keys() == results[1][2].keys()
    assert results[0][2]
    for first, second in ((results[0][0], results[1][0]), (results[0][2], results[1][2])):
        for name, tensor in first.items():
            assert torch.equal(tensor, second[name]), name  # the same products of the same numbers
    assert torch.equal(results[0][1], results[1][1])


def test_no_dense_weight_is_kept(llama: LlamaForCausalLM, batch: dict[str, Tensor]) -> None:
    model, dense = pair(llama, "nf4", torch.float32)
    sizes = []
    for each in (model, dense):
        rosa_ds.inject(each, AdapterConfig(method="robust", rank=2, density=0.01))
        rosa_ds.set_mask(each, rosa_ds.compute_mask(each, [batch]))
        parameters = {p.untyped_storage().data_ptr() for p in each.parameters()}
        saved: dict[int, int] = {}

        def keep(tensor: Tensor, known: set[int] = parameters, found: dict[int, int] = saved) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in known:
                found[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = each(**batch).loss
        sizes.append(sum(saved.values()))
        loss.backward()
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_merging_makes_a_dense_model(
    request: pytest.FixtureRequest, arch: str, batch: dict[str, Tensor], tmp_path: Path
) -> None:
    model, _ = pair(request.getfixturevalue(arch), "nf4", torch.float32)
    rosa_ds.inject(model, AdapterConfig(method="robust", rank=3, density=0.05, rank_pattern={"c_fc|up_proj": 0}))
    rosa_ds.set_mask(model, rosa_ds.compute_mask(model, [batch]))
    give_numbers(model)
    expected = model(**batch).logits
    with rosa_ds.merged(model) as plain:
        assert not any(isinstance(module, QuantizedLinear) for module in plain.modules())
        torch.testing.assert_close(plain(**batch).logits, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(model(**batch).logits, expected)
    rosa_ds.merge(model).save_pretrained(tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(loaded(**batch).logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_draws_leave_the_bits_alone(
    request: pytest.FixtureRequest, arch: str, batch: dict[str, Tensor], tmp_path: Path
) -> None:
    model, dense = pair(request.getfixturevalue(arch), "nf4", torch.float32)
    plain = copy.deepcopy(model)
    expected = model(**batch).logits
    report = rosa_ds.inject(model, AdapterConfig(method="robust-subspace", rank=3, density=0.05), seed=7)
    assert report.frozen == sum(p.numel() for p in dense.parameters())
    bits = {name: p.clone() for name, p in model.named_parameters() if p.dtype in (torch.uint8, torch.int8)}
    assert bits
    for number in range(3):
        torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-5, atol=1e-5)
        rosa_ds.draw(model, seed=number)
    parameters = dict(model.named_parameters())
    assert all(torch.equal(parameters[name], before) for name, before in bits.items())
    rosa_ds.set_mask(model, rosa_ds.compute_mask(model, [batch], score="magnitude"))
    give_numbers(model)
    rosa_ds.save_adapter(model, tmp_path / "adapter", base={"name_or_path": "x"})
    again = copy.deepcopy(plain)
    rosa_ds.load_adapter(again, tmp_path / "adapter")
    assert torch.equal(again(**batch).logits, model(**batch).logits)
    with pytest.raises(ValueError, match="was drawn from a quantised base, and the model's is dense"):
        rosa_ds.load_adapter(dense, tmp_path / "adapter")


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_the_base_is_there_when_adapters_are_off(
    request: pytest.FixtureRequest, arch: str, batch: dict[str, Tensor], tmp_path: Path
) -> None:
    base, _ = pair(request.getfixturevalue(arch), "nf4", torch.float32)
    expected = base(**batch).logits
    logits = {}
    for method in ("robust-subspace", "lora"):
        model = copy.deepcopy(base)
        rosa_ds.inject(model, AdapterConfig(method=method, rank=2, density=0.05, dropout=0.0))
        if method != "lora":
            rosa_ds.set_mask(model, rosa_ds.compute_mask(model, [batch]))
        give_numbers(model)
        logits[method] = model(**batch).logits
        rosa_ds.save_adapter(model, tmp_path / method, base={"name_or_path": "x"})
        with rosa_ds.disabled(model):
            assert torch.equal(model(**batch).logits, expected)
        assert torch.equal(model(**batch).logits, logits[method])
    for method in logits:  # draws write beside the bits, so the base need not be kept
        rosa_ds.load_adapter(base, tmp_path / method, name=method)
    for method, found in logits.items():
        rosa_ds.set_adapter(base, method)
        assert torch.equal(base(**batch).logits, found)
    rosa_ds.remove_adapter(base, "lora")
    rosa_ds.remove_adapter(base, "robust-subspace")
    assert torch.equal(base(**batch).logits, expected)


def test_an_adapter_says_how_its_base_is_quantised(stored: Path, tmp_path: Path, batch: dict[str, Tensor]) -> None:
    """Saved and exported without a word about the base: what is merged is what was trained."""
    for method in ("lora", "subspace"):
        model = AutoModelForCausalLM.from_pretrained(stored).eval()
        rosa_ds.quantize(model, "nf4", double=False)
        rosa_ds.inject(model, AdapterConfig(method=method, rank=2, dropout=0.0))
        with torch.no_grad():
            for layer in rosa_ds.adapted_layers(model).values():
                layer.B.add_(0.02)
        rosa_ds.save_adapter(model, tmp_path / method)
        out = export_merged(tmp_path / method, tmp_path / f"{method}-out", None)
        found = AutoModelForCausalLM.from_pretrained(out)(**batch).logits
        torch.testing.assert_close(found, model(**batch).logits, rtol=1e-4, atol=1e-5)
        description = rosa_ds.load_adapter(
            rosa_ds.quantize(AutoModelForCausalLM.from_pretrained(stored), "nf4"), tmp_path / method
        )
        assert (description.base["quantization"], description.base["double_quantization"]) == ("nf4", False)
    text = (tmp_path / "subspace" / "rosa_adapter.json").read_text()
    (tmp_path / "subspace" / "rosa_adapter.json").write_text(
        text.replace('"quantization": "nf4"', '"quantization": "none"')
    )
    write_manifest(tmp_path / "subspace")
    with pytest.raises(ValueError, match="was drawn from a quantised base, and the model's is dense"):
        export_merged(tmp_path / "subspace", tmp_path / "wrong", None)
    assert not (tmp_path / "wrong").exists()


def test_other_numbers_than_were_trained_on_are_not_merged_into(
    stored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Another device's sums and ties: one bit of one layer's packed numbers."""
    model = AutoModelForCausalLM.from_pretrained(stored).eval()
    rosa_ds.quantize(model, "nf4")
    packed = packed_hashes(model)
    rosa_ds.inject(model, AdapterConfig(method="lora", rank=2))
    assert packed_hashes(model) == packed
    base = {"name_or_path": str(stored), **quantization_of(model), "packed": packed}
    rosa_ds.save_adapter(model, tmp_path / "adapter", base)
    export_merged(tmp_path / "adapter", tmp_path / "same", None)

    pack, planted = Form.pack, packed_shape(model, "model.layers.1.mlp.down_proj")

    def elsewhere(self: Form, weight: Tensor) -> dict[str, Tensor]:
        found = pack(self, weight)
        if self.shape == planted:
            found["weight"][0] ^= 1
        return found

    monkeypatch.setattr(Form, "pack", elsewhere)
    with pytest.raises(ValueError, match=r"down_proj is quantised to other numbers .*--merge-base original") as refused:
        export_merged(tmp_path / "adapter", tmp_path / "out", None)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()
    export_merged(tmp_path / "adapter", tmp_path / "out", None, "original")
    with contextlib.closing(open_source(tmp_path / "adapter")) as source:
        load_adapted(source, torch.float32)
        assert "quantised to other numbers here than the run trained on (2 of 14 layers)" in caplog.text
        with pytest.raises(ValueError, match="--merge-base original"):
            load_merged(source, torch.float32)


def packed_shape(model: nn.Module, name: str) -> tuple[int, int]:
    """Of the matrix of a quantised layer."""
    form = model.get_submodule(name).form
    assert isinstance(form, Form)
    return form.shape


def test_a_base_that_is_loaded_whole_has_the_same_bits(stored: Path, tmp_path: Path) -> None:
    """In every compute type: training in 16 bits and export in 32 quantise the same numbers."""
    model = AutoModelForCausalLM.from_pretrained(stored)
    torch.save(model.state_dict(), stored / "pytorch_model.bin")
    (stored / "model.safetensors").unlink()
    settings = ModelSettings(name_or_path=str(stored), quantization="nf4")
    wide, narrow = (load_quantized(settings, dtype, []) for dtype in (torch.float32, torch.bfloat16))
    for name, module in wide.named_modules():
        if isinstance(module, QuantizedLinear):
            assert torch.equal(module.weight, narrow.get_submodule(name).weight)
            assert torch.equal(module.weight_scales, narrow.get_submodule(name).weight_scales)
    assert narrow.model.embed_tokens.weight.dtype == torch.bfloat16


def test_a_rank_that_loads_for_itself_waits_for_nobody(stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in an evaluation on several ranks: no collective, and none of the CPU's arrays under NCCL."""
    settings = ModelSettings(name_or_path=str(stored), quantization="nf4")
    expected = load_quantized(settings, torch.float32, []).state_dict()

    def never(*given: object) -> None:
        raise AssertionError("a collective")

    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    for name in ("broadcast", "together", "sum_over_ranks", "gather_objects"):
        monkeypatch.setattr(distributed, name, never)
    found = load_quantized(settings, torch.float32, []).state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_an_undrawn_adapter_does_not_go_into_a_drawn_model(llama: LlamaForCausalLM, tmp_path: Path) -> None:
    undrawn, drawn = (copy.deepcopy(llama).float() for _ in range(2))
    rosa_ds.inject(undrawn, AdapterConfig(method="subspace", rank=2), draw=None)
    rosa_ds.save_adapter(undrawn, tmp_path / "adapter", base={"name_or_path": "x"})
    rosa_ds.inject(drawn, AdapterConfig(method="subspace", rank=2))
    with pytest.raises(ValueError, match="the model has been drawn from its own: load it into the plain base"):
        rosa_ds.load_adapter(drawn, tmp_path / "adapter")
    broken = copy.deepcopy(llama).float()
    broken.model.layers[1].mlp.down_proj.weight.data[0, 0] = float("nan")
    before = copy.deepcopy(broken.state_dict())
    with pytest.raises(ValueError, match=r"layers.1.mlp.down_proj: its weight is not finite"):
        rosa_ds.inject(broken, AdapterConfig(method="subspace", rank=2))
    assert not rosa_ds.adapted_layers(broken)
    assert all(
        torch.equal(before[name].nan_to_num(), value.nan_to_num()) for name, value in broken.state_dict().items()
    )


@pytest.fixture
def stored(llama: LlamaForCausalLM, tmp_path: Path, tokenizer: Any) -> Path:
    folder = tmp_path / "base"
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**{**llama.config.to_dict(), "vocab_size": 264})).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("merge_base", ["dequantized", "original"])
@pytest.mark.parametrize("method", ["robust", "robust-subspace"])
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_export(
    stored: Path, kind: Kind, method: str, merge_base: MergeBase, tmp_path: Path, batch: dict[str, Tensor]
) -> None:
    settings = ModelSettings(name_or_path=str(stored), quantization=kind)
    model = load_quantized(settings, torch.float32, [])
    config = AdapterConfig(method=method, rank=3, density=0.05, target_modules=["q_proj", "down_proj"])
    rosa_ds.inject(model, config)
    rosa_ds.set_mask(model, rosa_ds.compute_mask(model, [batch]))
    with torch.no_grad():  # what was trained since the draw
        for layer in rosa_ds.adapted_layers(model).values():
            layer.B.add_(0.01)
            layer.values.add_(0.02)
    base = {"name_or_path": str(stored), "quantization": kind, "double_quantization": True}
    rosa_ds.save_adapter(model, tmp_path / "adapter", base=base)
    out = export_merged(tmp_path / "adapter", tmp_path / "out", None, merge_base)
    quantized = load_quantized(settings, torch.float32, [])
    original = load_model(ModelSettings(name_or_path=str(stored)), torch.float32)
    trained = rosa_ds.merge(model)
    loaded = AutoModelForCausalLM.from_pretrained(out)
    report = json.loads((out / "rosa_ds.json").read_text())
    assert report["merge_base"] == merge_base
    for name, module in quantized.named_modules():
        if isinstance(module, QuantizedLinear):
            before, weight = module.dense(module.weight), original.get_submodule(name).weight.detach()
            update = trained.get_submodule(name).weight - before
            expected = (before if merge_base == "dequantized" else weight) + update
            torch.testing.assert_close(loaded.get_submodule(name).weight, expected, rtol=1e-5, atol=1e-6)
            assert report["quantization_error"][name] == pytest.approx(float((before - weight).norm() / weight.norm()))
            assert (update.abs().max() > 0.01) == name.endswith(("q_proj", "down_proj"))
    assert verify(tmp_path / "adapter", out, merge_base).passed
    if merge_base == "dequantized":
        assert not verify(tmp_path / "adapter", out, "original").passed


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_peft_of_a_quantised_subspace_run(stored: Path, tmp_path: Path, batch: dict[str, Tensor]) -> None:
    from peft import PeftModel

    settings = ModelSettings(name_or_path=str(stored), quantization="int8")
    model = load_quantized(settings, torch.float32, [])
    rosa_ds.inject(model, AdapterConfig(method="subspace", rank=2))
    with torch.no_grad():
        for layer in rosa_ds.adapted_layers(model).values():
            layer.B.add_(0.05)
    rosa_ds.save_adapter(model, tmp_path / "adapter", base={"name_or_path": str(stored), "quantization": "int8"})
    export_peft(tmp_path / "adapter", tmp_path / "peft", rank=4)
    dense = dense_like(
        load_model(ModelSettings(name_or_path=str(stored)), torch.float32), load_quantized(settings, torch.float32, [])
    )
    with torch.no_grad():
        found = PeftModel.from_pretrained(dense, tmp_path / "peft")(**batch).logits
        torch.testing.assert_close(found, model(**batch).logits, rtol=1e-4, atol=1e-5)


def test_what_cannot_be(stored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, llama: LlamaForCausalLM) -> None:
    with pytest.raises(ValueError, match="method full trains the base itself, which model.quantization nf4 freezes"):
        RunConfig(method="full", model={"quantization": "nf4"})
    assert any(
        "model.double_quantization" in line
        for line in settings_without_effect(RunConfig(model={"double_quantization": False}))
    )
    model = rosa_ds.quantize(copy.deepcopy(llama.float()), "int8", skip=["layers.0"])
    assert isinstance(model.model.layers[0].mlp.up_proj, nn.Linear)
    with pytest.raises(
        ValueError, match=r"model.layers.1.self_attn.q_proj is quantised, so it cannot be trained whole"
    ):
        rosa_ds.inject(
            model, AdapterConfig(method="lora", target_modules=["up_proj"], modules_to_save=["layers.1.self_attn"])
        )
    with pytest.raises(ValueError, match=r"cannot be trained whole"):
        rosa_ds.inject(model, AdapterConfig(method="full"))
    with pytest.raises(ValueError, match=r"x is torch.bfloat16 and the weight is dequantised to torch.float32"):
        model.model.layers[1].mlp.up_proj(torch.zeros(2, 32, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match=r"would compute in torch.float64"):
        rosa_ds.quantize(copy.deepcopy(llama).double(), "nf4")
    rosa_ds.inject(model, AdapterConfig(method="lora", rank=2))
    with pytest.raises(ValueError, match="quantise the base first"):
        rosa_ds.quantize(model, "nf4")
    rosa_ds.save_adapter(model, tmp_path / "adapter", base={"name_or_path": str(stored)})
    with pytest.raises(ValueError, match="--merge-base is for quantised bases"):
        export_merged(tmp_path / "adapter", tmp_path / "out", None, "original")
    config = json.loads((stored / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    shutil.copytree(stored, tmp_path / "already")
    (tmp_path / "already" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="is stored quantised: give the dense model, and model.quantization"):
        load_model(ModelSettings(name_or_path=str(tmp_path / "already")), torch.float32)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ValueError, match="model.quantization needs bitsandbytes: pip install bitsandbytes"):
        rosa_ds.quantize(llama.float(), "nf4")


STEPS = ("--training.max_steps", "6", "--mask.warmup_steps", "2", "--mask.steps", "2", "--training.warmup_steps", "2")
COMMON = (*SMALL, *STEPS, "--adapter.dropout", "0", "--training.save_steps", "0", "--ds.train_batch_size", "8")


@pytest.fixture(scope="module")
def dequantised(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built-in model with the weights that NF4 makes of it, dense."""
    folder = tmp_path_factory.mktemp("dequantised")
    settings = ModelSettings(quantization="nf4")
    dense = dense_like(load_model(ModelSettings(), torch.float32), load_quantized(settings, torch.float32, []))
    dense.save_pretrained(folder)
    for path in (ROOT / "rosa_ds" / "models" / "tiny").iterdir():
        if path.suffix in (".json", ".jinja") and path.name != "config.json":
            shutil.copy(path, folder)
    return folder


@pytest.mark.ranks
def test_ten_steps_like_the_dense_model_at_stages_2_and_3(tmp_path: Path, dequantised: Path) -> None:
    """The curve of ``robust`` on NF4, 2 ranks, against a dense run on a base that has the dequantised weights."""
    everything = ("--ds.zero_optimization.stage3_param_persistence_threshold", "0")
    runs = {
        "stage2": (2, "zero2.json", ("--model.quantization", "nf4")),
        "stage3": (2, "zero3.json", ("--model.quantization", "nf4", *everything)),
        "plain": (1, "zero0.json", ("--model.name_or_path", str(dequantised))),
    }
    curves = {}
    for name, (ranks, config, more) in runs.items():
        arguments = ("--config", str(ROOT / "ds_configs" / config), *COMMON, *more, "--training.output_dir", name)
        run("fork", ranks, TRAIN, *arguments, cwd=tmp_path)
        curves[name] = losses(tmp_path / name)
    assert [line[:2] for line in curves["stage2"]] == [line[:2] for line in curves["plain"]]
    assert sum(line[1] == "train" for line in curves["plain"]) == 10
    for name in ("stage2", "stage3"):
        for (step, _, expected), (_, _, found) in zip(curves["plain"], curves[name], strict=True):
            assert found == pytest.approx(expected, rel=1e-5), (name, step)
    masks = []
    for name in runs:
        with safe_open(tmp_path / name / "mask.safetensors", "pt") as reader:
            masks.append({key: reader.get_tensor(key) for key in reader.keys()})  # noqa: SIM118
    assert all(float(torch.isin(masks[2][key], mask[key]).float().mean()) > 0.99 for mask in masks for key in mask)
    accounts = [json.loads((tmp_path / name / "accounting.json").read_text()) for name in ("stage2", "stage3")]
    assert accounts[0]["measured"]["memory"]["base"] == accounts[0]["predicted"]["total"]["base"]
    assert accounts[1]["measured"]["memory"]["base"] <= 0.51 * accounts[0]["measured"]["memory"]["base"]
    described = [json.loads((tmp_path / name / "adapter" / "rosa_adapter.json").read_text()) for name in runs]
    packed = [description["base"].get("packed") for description in described]
    assert packed[0] == packed[1]
    assert len(packed[0]) > 7
    assert packed[2] is None
    merged = export_merged(tmp_path / "stage3", tmp_path / "out", None)
    assert verify(tmp_path / "stage3", merged).passed


@pytest.mark.ranks
@pytest.mark.parametrize("stage", [2, 3])
def test_draws_like_those_of_the_dense_model(tmp_path: Path, dequantised: Path, stage: int) -> None:
    """Three draws on NF4 with a mask of the largest weights, 2 ranks, and a resume after the second, against a dense run."""
    draws = ("--method", "robust-subspace", "--draw.directions", "projection", "--draw.every", "2 steps")
    steps = ("--mask.score", "magnitude", "--training.max_steps", "6", "--training.warmup_steps", "2")
    common = (*SMALL, *draws, *steps, "--training.save_steps", "5", "--ds.train_batch_size", "8")
    zero = ("--config", str(ROOT / "ds_configs" / f"zero{stage}.json"), "--model.quantization", "nf4")
    plain = ("--config", str(ROOT / "ds_configs" / "zero0.json"), "--model.name_or_path", str(dequantised))
    run("fork", 1, TRAIN, *plain, *common, "--training.output_dir", "plain", cwd=tmp_path)
    run("fork", 2, TRAIN, *zero, *common, "--training.output_dir", "nf4", cwd=tmp_path)
    expected, found = losses(tmp_path / "plain"), losses(tmp_path / "nf4")
    assert [line[:2] for line in found] == [line[:2] for line in expected]
    assert [line[2] for line in found] == pytest.approx([line[2] for line in expected], rel=1e-5)
    assert sum(line.get("event") == "draw" for line in metrics(tmp_path / "nf4")) == 3
    shutil.rmtree(tmp_path / "nf4" / "checkpoints" / "step-000006")
    run("fork", 2, TRAIN, *zero, *common, "--training.output_dir", "nf4", "--resume", cwd=tmp_path)
    assert losses(tmp_path / "nf4") == found
    assert verify(tmp_path / "nf4", export_merged(tmp_path / "nf4", tmp_path / "out", None)).passed


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_what_stays_dense_is_told_with_its_share(kind: Kind, caplog: pytest.LogCaptureFixture) -> None:
    """Experts are weights of three dimensions, and most of such a base."""
    config = MixtralConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
    )
    model = MixtralForCausalLM(config)
    with caplog.at_level("INFO", "rosa_ds"):
        rosa_ds.quantize(model, kind)
    dense = sum(p.nbytes for name, p in model.named_parameters() if "self_attn" not in name)
    share = dense / sum(p.nbytes for p in model.parameters())
    assert f", {share:.0%} of it, stay dense (model.layers.*.mlp.experts.gate_up_proj 0.000, " in caplog.text
