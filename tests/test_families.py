"""Model families: each is one line of a table. Adapters change nothing at first, are trained by every batch, and fold in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import rosa_ds
from rosa_ds import AdapterConfig
from rosa_ds.config.schema import ModelSettings
from rosa_ds.models.stream import stream_base

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
GROUPED = SMALL | {"num_key_value_heads": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": GROUPED,
    "mistral": GROUPED,
    "qwen2": GROUPED,  # biases
    "qwen3": GROUPED | {"head_dim": 8},  # norms of queries and keys
    "gemma2": GROUPED | {"head_dim": 8},  # scaled embeddings, capped logits
    "gemma3_text": GROUPED | {"head_dim": 8},
    "phi3": GROUPED | {"pad_token_id": 0},  # fused projections
    "olmo2": GROUPED,
    "granite": GROUPED,
    "starcoder2": GROUPED,
    "gpt_neox": SMALL,
    "falcon": {k: v for k, v in SMALL.items() if k != "intermediate_size"} | {"new_decoder_architecture": False},
    "opt": {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
    | {"word_embed_proj_dim": 32, "max_position_embeddings": 64},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64, "n_positions": 64},  # Conv1D: (in, out)
}


def build(family: str, config: dict[str, Any]) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **config)).double().eval()


def off(found: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest number; norms and rotations compute in float32 in a float64 model."""
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("method", ["robust", "subspace"])
@pytest.mark.parametrize("family", FAMILIES)
def test_family(family: str, method: str) -> None:
    model = build(family, FAMILIES[family])
    names = {name: p.shape for name, p in model.named_parameters()}
    ids = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before = model(input_ids=ids).logits
    report = rosa_ds.inject(model, AdapterConfig(method=method, rank=3, density=0.05, dropout=0.0))
    if method == "robust":
        rosa_ds.set_mask(model, rosa_ds.compute_mask(model, [{"input_ids": ids, "labels": ids}]))
    with torch.no_grad():
        assert off(model(input_ids=ids).logits, before) < 1e-5

    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(trained.values(), lr=0.1)
    for _ in range(2):  # A has no gradient while B is zero
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    assert not [name for name, p in trained.items() if p.grad is None or not p.grad.any()]
    with torch.no_grad():
        adapted = model(input_ids=ids).logits
    assert off(adapted, before) > 1e-3

    rosa_ds.merge(model)
    assert {name: p.shape for name, p in model.named_parameters()} == names
    with torch.no_grad():
        assert off(model(input_ids=ids).logits, adapted) < 1e-5
    heads = {"lm_head", "embed_out"}
    linear = {name for name, shape in names.items() if len(shape) == 2 and "emb" not in name and "wte" not in name}
    linear = {name.removesuffix(".weight") for name in linear if "wpe" not in name}
    assert set(report.adapted) == {name for name in linear if name not in heads}


def test_experts_that_no_adapter_reaches_are_named(caplog: pytest.LogCaptureFixture) -> None:
    model = build("mixtral", GROUPED | {"num_local_experts": 4})
    with caplog.at_level("WARNING"):
        report = rosa_ds.inject(model, AdapterConfig(method="lora", rank=2))
    assert "no adapter reaches 4 weights of three dimensions" in caplog.text
    assert "model.layers.0.mlp.experts.gate_up_proj" in caplog.text
    assert {name.rpartition(".")[2] for name in report.adapted} == {"q_proj", "k_proj", "v_proj", "o_proj"}


def test_a_convolution_is_no_expert(caplog: pytest.LogCaptureFixture) -> None:
    model = torch.nn.Sequential(torch.nn.Conv1d(4, 4, 3), torch.nn.Linear(4, 4))
    rosa_ds.inject(model, AdapterConfig(method="lora", rank=2))
    assert "three dimensions" not in caplog.text


GPTJ = {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "n_positions": 512, "vocab_size": 64}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", [*FAMILIES, "gptj", "codegen"])
def test_a_sharded_base_has_the_buffers_of_a_loaded_one(tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    """Tables of rotations, too, which transformers computes in float32 and then rounds."""
    config = FAMILIES.get(family, GPTJ)
    build(family, config).float().save_pretrained(tmp_path, save_original_format=False)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    sharded, base = stream_base(ModelSettings(name_or_path=str(tmp_path)), dtype)
    base.close()
    expected = dict(loaded.named_buffers())
    assert expected.keys() == dict(sharded.named_buffers()).keys()
    for name, buffer in sharded.named_buffers():
        assert buffer.dtype == expected[name].dtype
        torch.testing.assert_close(buffer, expected[name], rtol=0, atol=0)
