"""Adapter folders that were written once and must load for ever, never to be written again: ``data/adapter_v1``, of 2026-11-22,
and ``data/adapter_v2``, of 2026-11-30.

A new version of the format gets a folder of its own beside them.
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
from rosa_ds.adapters.folder import FORMAT_VERSION, description_file, open_adapter
from rosa_ds.export.merge import export_merged
from rosa_ds.models.load import load_tokenizer
from rosa_ds.utils.files import write_manifest

DATA = Path(__file__).parent / "data"
IDS = torch.arange(12).view(2, 6)
KINDS = [("v1", "robust"), ("v1", "subspace"), ("v2", "lora"), ("v2", "robust"), ("v2", "subspace")]


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


@pytest.mark.parametrize(("version", "kind"), KINDS)
def test_every_version_loads_and_computes_what_it_did(version: str, kind: str) -> None:
    model = micro_model()
    known = json.loads((DATA / f"adapter_{version}" / "logits.json").read_text())
    description = rosa_ds.load_adapter(model, DATA / f"adapter_{version}" / kind)
    assert (description.config.method, description.config.rank, description.seed) == (kind, 2, 7)
    assert torch.allclose(logits(model), torch.tensor(known[kind], dtype=torch.float64), rtol=1e-6, atol=1e-7)
    assert not torch.allclose(logits(model), logits(micro_model()), atol=1e-2)
    assert torch.allclose(logits(micro_model()), torch.tensor(known["base"], dtype=torch.float64), rtol=1e-9)


@pytest.mark.parametrize(("version", "kind"), KINDS)
def test_every_version_is_exported(version: str, kind: str, tmp_path: Path) -> None:
    micro_model().save_pretrained(tmp_path / "base")
    load_tokenizer(rosa_ds.RunConfig().model).save_pretrained(tmp_path / "base")
    shutil.copytree(DATA / f"adapter_{version}" / kind, tmp_path / "adapter")
    path = description_file(tmp_path / "adapter")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base": {"name_or_path": str(tmp_path / "base")}}))
    write_manifest(tmp_path / "adapter")
    merged = LlamaForCausalLM.from_pretrained(export_merged(tmp_path / "adapter", tmp_path / "out", None))
    known = json.loads((DATA / f"adapter_{version}" / "logits.json").read_text())[kind]
    assert torch.allclose(logits(merged), torch.tensor(known, dtype=torch.float64), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_every_version_is_saved_again_as_the_same(version: str, tmp_path: Path) -> None:
    """What loading has put into a model, and what was read, bit for bit."""
    for kind in (kind for known, kind in KINDS if known == version):
        model, folder = micro_model(), DATA / f"adapter_{version}" / kind
        description = rosa_ds.load_adapter(model, folder)
        rosa_ds.save_adapter(model, tmp_path / kind, base=description.base)
        old, new = open_adapter(folder), open_adapter(tmp_path / kind)
        assert old.description == new.description
        for before, after in ((old.trained, new.trained), (old.positions, new.positions)):
            assert before.keys() == after.keys()
            assert all(torch.equal(before[name].double(), after[name].double()) for name in before)
        assert old.base.keys() == new.base.keys()
        assert all(torch.equal(old.changed(name).double(), new.changed(name).double()) for name in old.base)


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_a_newer_version_says_what_to_do(version: str, tmp_path: Path) -> None:
    shutil.copytree(DATA / f"adapter_{version}" / "robust", tmp_path / "adapter")
    path = description_file(tmp_path / "adapter")
    for wrong in (FORMAT_VERSION + 1, None, "1"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": wrong}))
        with pytest.raises(ValueError, match=r"this rosa_ds reads up to \d+: .*pip install -U rosa-ds"):
            rosa_ds.load_adapter(micro_model(), tmp_path / "adapter")
