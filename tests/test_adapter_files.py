"""Adapter folders that were written once and must load for ever: ``data/adapter_v1``, of 2026-11-22, never to be written again.

A new version of the format gets a folder of its own beside it.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import rosa_ds
from rosa_ds.adapters.folder import FORMAT_VERSION
from rosa_ds.export.merge import export_merged
from rosa_ds.models.load import load_tokenizer
from rosa_ds.utils.files import write_manifest

DATA = Path(__file__).parent / "data"
IDS = torch.arange(12).view(2, 6)
KINDS = ["robust", "subspace"]


def micro_model() -> LlamaForCausalLM:
    """A Llama of one layer whose numbers follow from a formula, not from a generator that may change. float64."""
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=16,
    )
    model = LlamaForCausalLM(config).double().eval()
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters(), start=1):
            entries = torch.arange(parameter.numel(), dtype=torch.int64)
            parameter.copy_((((entries * 37 + number * 11) % 101).double() / 101 - 0.5).view(parameter.shape))
    return model


def logits(model: LlamaForCausalLM) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("kind", KINDS)
def test_version_1_loads_and_computes_what_it_did(kind: str) -> None:
    model = micro_model()
    known = json.loads((DATA / "adapter_v1" / "logits.json").read_text())
    description = rosa_ds.load_adapter(model, DATA / "adapter_v1" / kind)
    assert (description.config.method, description.config.rank, description.seed) == (kind, 2, 7)
    assert torch.allclose(logits(model), torch.tensor(known[kind], dtype=torch.float64), rtol=1e-6, atol=1e-7)
    assert not torch.allclose(logits(model), logits(micro_model()), atol=1e-2)
    assert torch.allclose(logits(micro_model()), torch.tensor(known["base"], dtype=torch.float64), rtol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_version_1_is_exported(kind: str, tmp_path: Path) -> None:
    micro_model().save_pretrained(tmp_path / "base")
    load_tokenizer(rosa_ds.RunConfig().model).save_pretrained(tmp_path / "base")
    shutil.copytree(DATA / "adapter_v1" / kind, tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base": {"name_or_path": str(tmp_path / "base")}}))
    write_manifest(tmp_path / "adapter")
    merged = LlamaForCausalLM.from_pretrained(export_merged(tmp_path / "adapter", tmp_path / "out", None))
    known = json.loads((DATA / "adapter_v1" / "logits.json").read_text())[kind]
    assert torch.allclose(logits(merged), torch.tensor(known, dtype=torch.float64), rtol=1e-5, atol=1e-6)


def test_a_newer_version_says_what_to_do(tmp_path: Path) -> None:
    shutil.copytree(DATA / "adapter_v1" / "robust", tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    for version in (FORMAT_VERSION + 1, None, "1"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": version}))
        with pytest.raises(ValueError, match=r"this rosa_ds reads up to \d+: .*pip install -U rosa-ds"):
            rosa_ds.load_adapter(micro_model(), tmp_path / "adapter")
