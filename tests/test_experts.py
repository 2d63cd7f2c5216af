"""Bases whose files have other tensors than the model, such as one an expert: read parameter by parameter, and written back as they were."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

import rosa_ds
from rosa_ds.adapters.state import trained_parameters
from rosa_ds.config.schema import AdapterConfig, ModelSettings
from rosa_ds.export import merge
from rosa_ds.export.merge import export_merged
from rosa_ds.models.load import load_tokenizer
from rosa_ds.models.stream import Base, open_base, stream_base

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
GROUPED = SMALL | {"num_key_value_heads": 2}
EXPERTS = GROUPED | {"num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
LATENT = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8}
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": GROUPED | {"num_local_experts": 4},  # renamed, too
    "qwen2_moe": EXPERTS | {"num_experts": 4, "shared_expert_intermediate_size": 24},
    "qwen3_moe": EXPERTS | {"num_experts": 4},
    "deepseek_v3": SMALL
    | LATENT
    | {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1}
    | {"moe_intermediate_size": 16, "first_k_dense_replace": 1},  # a buffer of the routers
    "glm4_moe": EXPERTS | {"n_routed_experts": 4, "first_k_dense_replace": 1},
    "olmoe": GROUPED | {"num_experts": 4, "num_experts_per_tok": 2},
    "hrm_text": GROUPED | {"head_dim": 8},  # one tensor becomes several parameters
}


def save(family: str, folder: Path, dtype: torch.dtype = torch.float32, **more: Any) -> PreTrainedModel:
    """A random model under its checkpoints' own names."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **FAMILIES[family], pad_token_id=0, bos_token_id=1, eos_token_id=2)
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    for parameter in model.parameters():
        parameter.data.normal_()
    model.save_pretrained(folder, **more)
    load_tokenizer(ModelSettings()).save_pretrained(folder)
    return model


def stored(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16], ids=["stored32", "stored16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_made_as_transformers_makes_them(
    tmp_path: Path, family: str, kept: torch.dtype, dtype: torch.dtype
) -> None:
    save(family, tmp_path, kept, max_shard_size="20KB")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert stored(tmp_path).keys() != loaded.state_dict().keys()
    model, base = open_base(ModelSettings(name_or_path=str(tmp_path)), dtype)
    assert base is not None
    for name, expected in loaded.named_parameters():
        found, half = torch.full_like(expected, float("nan")), len(expected) // 2
        for rows in (slice(half), slice(half, len(expected))):  # as two ranks read it
            base.fill(name, expected, found, rows)
        assert torch.equal(found, expected), name
    expected_buffers = dict(loaded.named_buffers())
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, expected_buffers[name]), name


def test_a_rank_reads_the_experts_of_its_rows_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save("mixtral", tmp_path)
    _, base = stream_base(ModelSettings(name_or_path=str(tmp_path)), torch.float32)
    read, seen = Base._read, []
    monkeypatch.setattr(Base, "_read", lambda self, key: (seen.append(key), read(self, key))[1])
    name = "model.layers.1.mlp.experts.gate_up_proj"
    target = torch.empty(base.shape(name))
    base.fill(name, torch.nn.Parameter(target), target, slice(2, 4))
    inside = "model.layers.1.block_sparse_moe.experts"
    assert seen == [f"{inside}.{expert}.w{part}.weight" for expert in (2, 3) for part in (1, 3)]  # one after another


def test_a_base_without_one_of_its_experts_is_refused(tmp_path: Path) -> None:
    save("olmoe", tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.experts.2.up_proj.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"has no tensor|size mismatch|cannot be loaded"):
        open_base(ModelSettings(name_or_path=str(tmp_path)), torch.float32)


def adapter(base: Path, folder: Path, **settings: Any) -> None:
    """Of numbers that are nowhere zero."""
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    rosa_ds.inject(model, AdapterConfig(**({"rank": 2, "dropout": 0.0} | settings)), seed=5)
    with torch.no_grad():
        for parameter in trained_parameters(model).values():
            parameter.add_(0.1)
    rosa_ds.save_adapter(model, folder, base={"name_or_path": str(base)})
    rosa_ds.merge(model).save_pretrained(folder.parent / "expected", max_shard_size="20KB")


@pytest.mark.parametrize("family", FAMILIES)
def test_an_export_has_the_tensors_of_its_base(tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    save(family, tmp_path / "base", max_shard_size="20KB")
    adapter(tmp_path / "base", tmp_path / "adapter", method="lora", target_modules=["o_proj"])
    monkeypatch.setattr(merge, "load_merged", None)  # never whole
    export_merged(tmp_path / "adapter", tmp_path / "out", None)
    before, found, expected = (stored(tmp_path / name) for name in ("base", "out", "expected"))
    assert found.keys() == before.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-6)
        assert torch.equal(tensor, before[name]) != ("o_proj" in name), name


@pytest.mark.parametrize(
    ("family", "settings", "part"),
    [
        ("mixtral", {"method": "lora", "target_modules": ["o_proj"], "modules_to_save": ["experts"]}, "gate_up_proj"),
        ("hrm_text", {"method": "lora", "target_modules": ["q_proj"]}, "q_proj"),
    ],
)
def test_trained_experts_are_taken_apart_by_transformers(
    tmp_path: Path, family: str, settings: dict[str, Any], part: str, caplog: pytest.LogCaptureFixture
) -> None:
    save(family, tmp_path / "base")
    adapter(tmp_path / "base", tmp_path / "adapter", **settings)
    with caplog.at_level("WARNING"):
        export_merged(tmp_path / "adapter", tmp_path / "out", None)
    assert "is loaded whole to be merged" in caplog.text
    assert f"{part}" in caplog.text
    before, found, expected = (stored(tmp_path / name) for name in ("base", "out", "expected"))
    assert found.keys() == before.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-6)


def test_a_classifier_is_written_under_names_that_transformers_reads(tmp_path: Path) -> None:
    model = save("mixtral", tmp_path / "whole")
    model.model.save_pretrained(tmp_path / "base")  # without its head: no name begins with model.
    load_tokenizer(ModelSettings()).save_pretrained(tmp_path / "base")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=2, pad_token_id=0).eval()
    config = AdapterConfig(method="lora", rank=2, dropout=0.0, modules_to_save=["score"])
    rosa_ds.inject(loaded, config, seed=5)
    about = {"name_or_path": str(tmp_path / "base"), "task": "classification", "labels": ["a", "b"]}
    rosa_ds.save_adapter(loaded, tmp_path / "adapter", base=about)
    export_merged(tmp_path / "adapter", tmp_path / "out", None)
    again, report = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"] | report["unexpected_keys"]
    ids = torch.arange(1, 9)[None]
    torch.testing.assert_close(again(ids).logits, loaded(ids).logits)
