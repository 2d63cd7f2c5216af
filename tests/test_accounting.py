"""What stays whole at stage 3, and what a step sends."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention
from transformers import BloomConfig, GPT2LMHeadModel, LlamaForCausalLM, OPTConfig, PreTrainedConfig

import rosa_ds
from rosa_ds import distributed
from rosa_ds.adapters.inject import adapter_parts
from rosa_ds.config.deepspeed import plan_deepspeed
from rosa_ds.config.schema import RunConfig
from rosa_ds.memory import fake_model
from rosa_ds.memory.account import Account, table
from rosa_ds.memory.estimate import predict
from rosa_ds.memory.fake_model import ActivationPlan
from rosa_ds.methods import memory_terms
from rosa_ds.methods.subspace import RESIDUAL
from rosa_ds.models.no_numbers import Shape
from rosa_ds.zero.engine import PERSISTENCE, keep_vectors_everywhere


def threshold(model: Any, given: dict[str, Any], **adapter: Any) -> int:
    rosa_ds.inject(model, rosa_ds.AdapterConfig(**adapter))
    config = {"zero_optimization": given}
    keep_vectors_everywhere(model, config, adapter_parts(model))
    return int(config["zero_optimization"][PERSISTENCE])


def test_norms_stay_and_adapters_do_not(llama: LlamaForCausalLM) -> None:
    # a norm has 32 numbers, the smallest part of an adapter, k_proj's B, 64
    assert threshold(llama, {}, rank=4, density=0.15) == 32


def test_a_bias_may_be_larger_than_an_adapter(gpt2: GPT2LMHeadModel) -> None:
    # the largest bias has 128 numbers, the smallest A 64
    assert threshold(gpt2, {}, method="lora", rank=2) == 63


def test_the_file_decides_where_it_says_something(llama: LlamaForCausalLM) -> None:
    assert threshold(llama, {PERSISTENCE: 7}, rank=4) == 7


def test_one_rank_sends_nothing_and_keeps_all(llama: LlamaForCausalLM) -> None:
    model = llama.float()
    plan, _ = plan_deepspeed({}, RunConfig(), 1, gpu_has_bfloat16=False)
    base = 4 * sum(parameter.numel() for parameter in model.parameters())
    rosa_ds.inject(model, rosa_ds.AdapterConfig(rank=2, density=0.01))
    account = predict(model, plan, memory_terms(model, plan, RunConfig()), recomputes=False)
    assert account.traffic == {}
    assert account.memory["base"] == base
    # stage 0 in float32: moments alone
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert account.memory["optimizer"] == 8 * trained
    assert account.memory["positions"] == account.memory["values"] > 0
    lines = table(account, account.memory, {}).splitlines()
    assert len(lines) == 1 + len([size for size in account.memory.values() if size])


def test_the_table_is_in_column() -> None:
    account = Account({"base": 2**20, "forward and backward, beside": 2**30}, {"gather again for backward": 5}, {})
    lines = table(account, {"base": 2**20}, {"all_gather_into_tensor bfloat16": 7}).splitlines()
    right = len(lines[0])  # a line ends with one of the three columns, each 12 wide
    assert {(right - len(line)) % 12 for line in lines} == {0}
    assert all(len(line) <= right for line in lines)


def test_draws_have_their_place_in_the_account(llama: LlamaForCausalLM) -> None:
    settings = RunConfig(method="subspace", adapter={"rank": 2}, model={"dtype": "bfloat16"})
    plan, settings = plan_deepspeed({}, settings, 1, gpu_has_bfloat16=False)
    model = llama.bfloat16()
    rosa_ds.inject(model, settings.adapter_config(), draw=None)
    numbers = sum(layer.weight_numel for layer in rosa_ds.adapted_layers(model).values())
    account = predict(model, plan, memory_terms(model, plan, settings), recomputes=False)
    assert account.memory[RESIDUAL] == account.total[RESIDUAL] == 2 * numbers
    assert account.memory["draw, at once"] > 4 * 5 * 32 * 48  # five float32 matrices of the largest layer
    without = RunConfig(method="subspace", adapter={"rank": 2}, draw={"residual": False}, model={"dtype": "bfloat16"})
    assert RESIDUAL not in {term.name for term in memory_terms(model, plan, without)}


@pytest.mark.parametrize(
    "config",
    [
        OPTConfig(
            hidden_size=32,
            ffn_dim=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            vocab_size=64,
            word_embed_proj_dim=32,
        ),
        BloomConfig(hidden_size=32, n_layer=3, n_head=4, vocab_size=64),
    ],
    ids=lambda config: config.model_type,
)
def test_models_that_read_the_masks_two_dimensions(config: PreTrainedConfig) -> None:
    """They are planned as if rows had one length."""
    plan = ActivationPlan(config, RunConfig(method="lora"), torch.float32)
    found = plan.measure(Shape(2, 16, 8, padded=True), False)
    assert found == plan.measure(Shape(2, 16, 8), False)
    assert found.saved > 0


def test_a_model_that_cannot_be_traced(llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*arguments: object) -> None:
        raise RuntimeError("data-dependent\nmore")

    monkeypatch.setattr(fake_model, "trace", fails)
    plan = ActivationPlan(llama.config, RunConfig(method="lora"), torch.float32)
    with pytest.raises(ValueError, match=r"LlamaForCausalLM cannot be predicted: .*\(RuntimeError: data-dependent\)"):
        plan.measure(Shape(2, 16, 8), False)


@pytest.mark.filterwarnings("ignore:flex_attention called without:UserWarning")
def test_counting_does_not_disturb_higher_order_operators() -> None:
    """Flex attention is one; an ordinary dispatch mode makes it fail."""
    q = torch.randn(1, 1, 16, 16)
    with distributed.TrafficCounter() as counter:
        inside = flex_attention(q, q, q)
    assert torch.allclose(inside, flex_attention(q, q, q))
    assert not counter.bytes
