"""Merged files written as the base is read, against the model merged in memory."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

import rosa_ds
from rosa_ds.adapters.state import trained_parameters
from rosa_ds.adapters.stored import StoredAdapter
from rosa_ds.checkpoints.source import open_source
from rosa_ds.config.schema import AdapterConfig, MergeBase, ModelSettings
from rosa_ds.export import adapted, merge, stream
from rosa_ds.export.merge import export_merged, export_peft
from rosa_ds.models.load import identify, load_tokenizer
from rosa_kernels.testing import relative_rms

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "full": ("llama", {"method": "full"}),
    "lora": ("llama", {"method": "lora"}),
    "sparse": ("gpt2", {"method": "sparse"}),
    "robust": ("gpt2", {"method": "robust", "modules_to_save": ["ln_f"]}),
    "subspace": ("gpt2", {"method": "subspace"}),
    "robust-subspace": ("llama", {"method": "robust-subspace", "rank_pattern": {"k_proj": 0}}),
    "tied": ("tied", {"method": "robust", "modules_to_save": ["embed_tokens"]}),
    "sharded": ("sharded", {"method": "robust", "modules_to_save": ["lm_head"], "density_pattern": {"q_proj": 0.0}}),
    "16 bits": ("half", {"method": "robust-subspace"}),
}


@pytest.fixture
def base(request: pytest.FixtureRequest, llama: LlamaForCausalLM, gpt2: GPT2LMHeadModel, tmp_path: Path) -> Path:
    """A folder with a base, its tokenizer and a tensor of another type."""
    kind = request.param
    model: PreTrainedModel = gpt2 if kind == "gpt2" else llama
    if kind == "tied":
        model = LlamaForCausalLM(LlamaConfig(**{**llama.config.to_dict(), "tie_word_embeddings": True}))
    model.to(torch.bfloat16 if kind == "half" else torch.float32)
    folder = tmp_path / "base"
    model.save_pretrained(folder, max_shard_size="12KB" if kind == "sharded" else "1GB")
    load_tokenizer(rosa_ds.RunConfig().model).save_pretrained(folder)
    return folder


def trained(base: Path, settings: dict[str, Any]) -> PreTrainedModel:
    """The base with an adapter that is not zero anywhere, its whole modules changed, too."""
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    config = {"rank": 3, "density": 0.05, "dropout": 0.0} if settings["method"] != "full" else {}
    rosa_ds.inject(model, AdapterConfig(**(config | settings)), seed=5)
    if any(layer.entries for layer in rosa_ds.adapted_layers(model).values()):
        rosa_ds.set_mask(model, rosa_ds.compute_mask(model, [], score="random"))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in trained_parameters(model).values():
            parameter.data = parameter.float() + 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def tensors(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as reader:
            found |= {name: reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118
    return found


def as_stored(model: PreTrainedModel, folder: Path, like: dict[str, Tensor]) -> dict[str, Tensor]:
    """What transformers writes of a model, under the base's names."""
    model.save_pretrained(folder)
    return {name: tensor for name, tensor in tensors(folder).items() if name in like}


@pytest.mark.parametrize("method", ["full", "lora", "robust", "subspace"])
@pytest.mark.parametrize("base", ["half"], indirect=True)
def test_a_16_bit_base_is_merged_in_its_own_type(
    base: Path, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bits as through float32, which only what a draw has changed needs."""
    settings = {"method": method} | ({"modules_to_save": ["lm_head"]} if method == "robust" else {})
    rosa_ds.save_adapter(trained(base, settings), tmp_path / "adapter", identify(ModelSettings(name_or_path=str(base))))
    source, loaded = open_source(tmp_path / "adapter"), []
    load_adapted = adapted.load_adapted

    def load(source: StoredAdapter, dtype: torch.dtype, merge_base: MergeBase) -> PreTrainedModel:
        loaded.append(dtype)
        return load_adapted(source, dtype, merge_base)

    through = adapted.load_adapted(source, torch.float32)
    expected = {name: tensor.bfloat16() for name, tensor in rosa_ds.merge(through).state_dict().items()}
    monkeypatch.setattr(adapted, "load_adapted", load)
    found = adapted.load_merged(source, torch.bfloat16).state_dict()
    assert loaded == [torch.float32 if method == "subspace" else torch.bfloat16]
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize(("base", "settings"), CASES.values(), indirect=["base"], ids=CASES)
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block", [64 * 2**20, 1000])
def test_the_same_as_merging_in_memory(
    base: Path,
    settings: dict[str, Any],
    dtype: torch.dtype | None,
    block: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stream, "BLOCK_BYTES", block)
    before = tensors(base)
    model = trained(base, settings)
    rosa_ds.save_adapter(model, tmp_path / "adapter", base={"name_or_path": str(base)})
    export_merged(tmp_path / "adapter", tmp_path / "out", dtype)
    found = tensors(tmp_path / "out")
    wide = copy.deepcopy(model).float()
    for name, layer in rosa_ds.adapted_layers(model).items():  # the base as the adapter knows it
        wide.get_submodule(name).weight.data = layer.weight.detach().float()
    expected = as_stored(rosa_ds.merge(wide), tmp_path / "expected", before)
    assert found.keys() == before.keys() == expected.keys()
    changed = {layer.weight_name for layer in rosa_ds.adapted_layers(model).values()} | set(trained_parameters(model))
    for name, tensor in found.items():
        kind = dtype or before[name].dtype
        assert tensor.dtype == kind, name
        if name not in changed:
            assert torch.equal(tensor, before[name].to(kind)), name
        step = torch.finfo(kind).eps * expected[name].abs() + 1e-6  # one rounding, and float32 sums in another order
        assert bool(((tensor.float() - expected[name]).abs() <= step).all()), name
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"] - {"lm_head.weight"}
    assert not report["unexpected_keys"]
    assert loaded.dtype == (dtype or next(iter(before.values())).dtype)


@pytest.mark.parametrize("base", ["sharded"], indirect=True)
def test_files_are_laid_out_like_the_bases(base: Path, tmp_path: Path) -> None:
    rosa_ds.save_adapter(trained(base, {"method": "robust"}), tmp_path / "adapter", base={"name_or_path": str(base)})
    out = export_merged(tmp_path / "adapter", tmp_path / "out", None)
    old, new = (json.loads((folder / stream.INDEX).read_text()) for folder in (base, out))
    assert new["weight_map"] == old["weight_map"]
    assert len(set(new["weight_map"].values())) > 2
    assert new["metadata"]["total_size"] == old["metadata"]["total_size"]
    for path in out.glob("*.safetensors"):
        with safe_open(path, "pt") as reader:
            assert reader.metadata()["format"] == "pt"
            origin = json.loads(reader.metadata()["rosa_ds"])
            assert (origin["method"], origin["base"]["name_or_path"]) == ("robust", str(base))
    for name in ("config.json", "generation_config.json", "tokenizer.json", "rosa_ds.json"):
        assert (out / name).is_file()


@pytest.mark.parametrize("base", ["llama"], indirect=True)
def test_an_interrupted_export_leaves_nothing(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rosa_ds.save_adapter(trained(base, {"method": "lora"}), tmp_path / "adapter", base={"name_or_path": str(base)})
    export_merged(tmp_path / "adapter", tmp_path / "out", None)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(merge, "_write_config", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export_merged(tmp_path / "adapter", tmp_path / "out", torch.bfloat16)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert not [path for path in tmp_path.iterdir() if "partial" in path.name]


@pytest.mark.parametrize("base", ["llama"], indirect=True)
def test_another_base_is_refused(base: Path, tmp_path: Path) -> None:
    origin = {"name_or_path": str(base), "hash": "0" * 64}
    rosa_ds.save_adapter(trained(base, {"method": "lora"}), tmp_path / "adapter", base=origin)
    with pytest.raises(ValueError, match="was trained on other weights"):
        export_merged(tmp_path / "adapter", tmp_path / "out", None)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("base", ["llama"], indirect=True)
@pytest.mark.parametrize("settings", [{"method": "robust"}, {"method": "subspace"}], ids=["robust", "subspace"])
def test_a_base_that_cannot_be_streamed_is_merged_whole(base: Path, settings: dict[str, Any], tmp_path: Path) -> None:
    torch.save(AutoModelForCausalLM.from_pretrained(base).state_dict(), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    model = trained(base, settings)
    rosa_ds.save_adapter(model, tmp_path / "adapter", base={"name_or_path": str(base)})
    export_merged(tmp_path / "adapter", tmp_path / "out", None)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    expected = rosa_ds.merge(model).state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    for name, tensor in loaded.state_dict().items():
        assert torch.allclose(tensor, expected[name], rtol=1e-6, atol=1e-7), name
    assert load_tokenizer(ModelSettings(name_or_path=str(tmp_path / "out")))


@pytest.mark.parametrize("base", ["llama"], indirect=True)
@pytest.mark.parametrize("layer", ["model.norm", "model.layers.0.self_attn.q_proj"])  # as it is, and merged
def test_what_float16_does_not_have_is_refused(base: Path, layer: str, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        model.get_submodule(layer).weight.view(-1)[-1] = 7e4
    model.save_pretrained(base)
    rosa_ds.save_adapter(trained(base, {"method": "lora"}), tmp_path / "adapter", base={"name_or_path": str(base)})
    with pytest.raises(ValueError, match=f"{layer}.weight has numbers beyond float16's 65,504: give --dtype bfloat16"):
        export_merged(tmp_path / "adapter", tmp_path / "out", torch.float16)
    with pytest.raises(ValueError, match="beyond float16's"):
        adapted.load_merged(open_source(tmp_path / "adapter"), torch.float16)
    assert not (tmp_path / "out").exists()
    export_merged(tmp_path / "adapter", tmp_path / "out", torch.bfloat16)


@pytest.mark.parametrize("base", ["llama"], indirect=True)
def test_an_adapter_that_changes_nothing_is_exported_to_peft(base: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base)
    rosa_ds.inject(model, AdapterConfig(method="subspace", rank=2), draw=None)
    rosa_ds.save_adapter(model, tmp_path / "adapter", base={"name_or_path": str(base)})
    out = export_peft(tmp_path / "adapter", tmp_path / "peft", 2)
    with safe_open(out / "adapter_model.safetensors", "pt") as file:
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dictionary)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in found.values())
    assert not any(bool((found[name.replace("_A", "_B")] @ A).any()) for name, A in found.items() if "lora_A" in name)


PEFT_CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": (
        "llama",
        {"method": "lora", "rank_pattern": {"k_proj": 2, r"0\.mlp": 5}, "modules_to_save": ["lm_head", "norm"]},
    ),
    "lora on Conv1D": ("gpt2", {"method": "lora", "alpha": 5.0}),
    "robust": ("llama", {"method": "robust", "alpha": 7.0, "density": 0.0128}),
    "sparse": ("llama", {"method": "sparse", "density": 0.031}),
    "subspace": ("gpt2", {"method": "subspace"}),
}


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # PEFT 0.21 calls it
@pytest.mark.parametrize(("base", "settings"), PEFT_CASES.values(), indirect=["base"], ids=PEFT_CASES)
def test_peft_computes_the_same(base: Path, settings: dict[str, Any], batch: dict[str, Tensor], tmp_path: Path) -> None:
    model = trained(base, settings).float()
    rosa_ds.save_adapter(model, tmp_path / "adapter", base={"name_or_path": str(base)})
    rank = 6 if settings["method"] == "subspace" else None  # one draw: what was split off, and what was trained
    out = export_peft(tmp_path / "adapter", tmp_path / "peft", rank)
    plain = AutoModelForCausalLM.from_pretrained(base)
    difference = relative_rms(plain(**batch).logits, model(**batch).logits)
    loaded = PeftModel.from_pretrained(plain, out).eval()
    assert difference > 1e-2
    assert relative_rms(loaded(**batch).logits, model(**batch).logits) < 1e-5


@pytest.mark.parametrize(
    ("base", "settings", "rank", "message"),
    [
        ("llama", {"method": "robust-subspace"}, 4, "method robust-subspace cannot be written in PEFT's format"),
        ("llama", {"method": "subspace"}, None, "give --rank"),
        ("gpt2", {"method": "robust"}, None, "SUPERTUNING knows nn.Linear alone"),
        ("llama", {"method": "robust", "rank_pattern": {"k_proj": 2}}, None, "adapter.rank_pattern cannot be written"),
        ("tied", {"method": "lora", "modules_to_save": ["embed_tokens"]}, None, "it is tied to lm_head.weight"),
    ],
    indirect=["base"],
)
def test_what_peft_has_no_format_for(
    base: Path, settings: dict[str, Any], rank: int | None, message: str, tmp_path: Path
) -> None:
    rosa_ds.save_adapter(trained(base, settings), tmp_path / "adapter", base={"name_or_path": str(base)})
    with pytest.raises(ValueError, match=message):
        export_peft(tmp_path / "adapter", tmp_path / "peft", rank)
    assert not (tmp_path / "peft").exists()
