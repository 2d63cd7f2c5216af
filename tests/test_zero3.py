"""ZeRO-3 on two ranks: what users of other adapter libraries ran into, with everything partitioned and with DeepSpeed's default."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from launching import ROOT, run
from transformers import GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

CHECKS = ROOT / "tests" / "zero3_ranks.py"


@pytest.fixture
def models(tmp_path: Path, llama: LlamaForCausalLM, gpt2: GPT2LMHeadModel) -> Path:
    llama.float().save_pretrained(tmp_path / "llama", max_shard_size="10KB")
    assert len(list((tmp_path / "llama").glob("*.safetensors"))) > 2
    gpt2.float().save_pretrained(tmp_path / "gpt2")
    config = LlamaConfig(**{**llama.config.to_dict(), "tie_word_embeddings": True})
    LlamaForCausalLM(config).save_pretrained(tmp_path / "tied")
    llama.config.save_pretrained(tmp_path / "bin")
    torch.save(llama.state_dict(), tmp_path / "bin" / "pytorch_model.bin")
    return tmp_path


@pytest.mark.ranks
@pytest.mark.parametrize("threshold", [0, 100_000])
def test_two_ranks(models: Path, threshold: int) -> None:
    output = run("torchrun", 2, str(CHECKS), str(models), str(threshold), cwd=models)
    passed = {line.split()[1] for line in output.splitlines() if line.startswith("passed ")}
    wanted = {line[4:].split("(")[0] for line in CHECKS.read_text().splitlines() if line.startswith("def check_")}
    assert passed == wanted
