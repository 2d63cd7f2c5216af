"""ZeRO-3 on two ranks: what users of other adapter libraries ran into, with everything partitioned and with DeepSpeed's default."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MixtralConfig

from launching import ROOT, run

CHECKS = ROOT / "tests" / "support" / "zero3_ranks.py"


@pytest.fixture
def models(tmp_path: Path, llama: LlamaForCausalLM, gpt2: GPT2LMHeadModel) -> Path:
    llama.float().save_pretrained(tmp_path / "llama", max_shard_size="10KB")
    assert len(list((tmp_path / "llama").glob("*.safetensors"))) > 2
    gpt2.float().save_pretrained(tmp_path / "gpt2")
    config = LlamaConfig(**{**llama.config.to_dict(), "tie_word_embeddings": True})
    LlamaForCausalLM(config).save_pretrained(tmp_path / "tied")
    llama.config.save_pretrained(tmp_path / "bin")
    torch.save(llama.state_dict(), tmp_path / "bin" / "pytorch_model.bin")
    llama.save_pretrained(tmp_path / "differs")
    config.save_pretrained(tmp_path / "differs")  # says tied, and the file has two different tensors
    shutil.copytree(tmp_path / "llama", tmp_path / "both")  # sharded, and one file with other numbers
    LlamaForCausalLM(llama.config).save_pretrained(tmp_path / "single")
    shutil.copy(tmp_path / "single" / "model.safetensors", tmp_path / "both")
    return tmp_path


@pytest.mark.ranks
@pytest.mark.parametrize("threshold", [0, 100_000])
def test_two_ranks(models: Path, threshold: int) -> None:
    output = run("fork", 2, str(CHECKS), str(models), str(threshold), cwd=models)
    passed = {line.split()[1] for line in output.splitlines() if line.startswith("passed ")}
    wanted = {line[4:].split("(")[0] for line in CHECKS.read_text().splitlines() if line.startswith("def check_")}
    assert passed == wanted


WIDE = {"hidden_size": 512, "num_hidden_layers": 6, "num_attention_heads": 8, "num_key_value_heads": 8}
BASES = {
    "dense": LlamaConfig(**WIDE, vocab_size=32_000, intermediate_size=2048),
    "experts": MixtralConfig(**WIDE, vocab_size=512, intermediate_size=512, num_local_experts=12),  # one tensor each
}


@pytest.mark.ranks
@pytest.mark.parametrize("kind", BASES)
def test_no_rank_holds_the_base_while_it_is_loaded(tmp_path: Path, kind: str) -> None:
    model = AutoModelForCausalLM.from_config(BASES[kind])
    size, shard = sum(parameter.nbytes for parameter in model.parameters()), 16_000_000
    largest = max(parameter.nbytes for parameter in model.parameters())
    assert size > 200e6
    model.save_pretrained(tmp_path / "base", max_shard_size=shard)
    run("torchrun", 4, str(ROOT / "tests" / "support" / "zero3_memory.py"), str(tmp_path / "base"), cwd=tmp_path)
    adapters = 25e6  # A, B, values and positions of all layers with rank 16, undivided
    for rank in range(4):
        grown = json.loads((tmp_path / f"memory-{rank}.json").read_text())
        assert grown["peak"] <= size / 4 + max(shard, largest) + adapters + 40e6, grown
