"""Batches without padding: how they are dealt, that they change nothing, and which models keep their sequences apart. Padded
ones: which models need a mask.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerBase,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import rosa_ds
from rosa_ds.adapters.inject import adapted_layers
from rosa_ds.config.command_line import build_config
from rosa_ds.config.deepspeed import plan_deepspeed
from rosa_ds.config.schema import DataSettings
from rosa_ds.data.batches import IGNORE, Batch, BatchPlan, Part, collate, deal, pack, sequences_of
from rosa_ds.data.prepare import prepare
from rosa_ds.data.tokenise import Tokens
from rosa_ds.models.attention import BY_SEQUENCE
from rosa_ds.models.loss import batch_logits, token_loss_sum
from rosa_ds.training.packing import find_leak, plan_batches, settle_batches
from rosa_ds.training.padding import needs_mask

CPU = torch.device("cpu")
SIZES: dict[str, Any] = {
    "vocab_size": 200,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def lognormal(median: float, sigma: float, longest: int, count: int, seed: int) -> NDArray[np.int64]:
    drawn = np.random.default_rng(seed).lognormal(np.log(median), sigma, count)
    return -np.sort(-np.clip(drawn, 16, longest).astype(np.int64))


@pytest.mark.parametrize(("ranks", "batch", "micro"), [(8, 128, 4), (64, 512, 4), (2, 16, 4), (1, 16, 4)])
@pytest.mark.parametrize(("median", "sigma", "longest"), [(160, 0.35, 500), (400, 0.8, 4096)])
def test_ranks_get_as_many_tokens(
    ranks: int, batch: int, micro: int, median: float, sigma: float, longest: int
) -> None:
    """Of the tokens that the slowest rank of each micro-batch computes nearly all are real; padded rows: 0.3 to 0.9."""
    shares, padded = [], []
    micro_batches = batch // (ranks * micro)
    for seed in range(5):
        lengths = lognormal(median, sigma, longest, batch, seed)
        dealt = deal(lengths, ranks, micro_batches)
        assert sorted(number for bins in dealt for chosen in bins for number in chosen) == list(range(batch))
        loads = np.asarray([[lengths[chosen].sum() for chosen in bins] for bins in dealt])
        assert loads.max() <= lengths[:micro].sum()  # no more than the micro-batch of the longest rows holds
        shares.append(lengths.sum() / (ranks * loads.max(axis=1).sum()))
        padded.append(lengths.sum() / (ranks * micro * lengths.reshape(micro_batches, -1).max(axis=1).sum()))
    assert np.mean(shares) >= 0.95
    assert np.mean(shares) > np.mean(padded)


def test_a_long_sequence_stands_alone() -> None:
    lengths = np.asarray([100, 10, 10, 10, 10, 10])
    assert deal(lengths, 2, 2) == [[[0], [1, 2, 3, 4, 5]], [[], []]]
    assert deal(np.asarray([5, 4, 3]), 1, 1) == [[[0, 1, 2]]]


def test_examples_of_several_sequences() -> None:
    firsts = np.asarray([0, 2, 3, 6])
    assert sequences_of(firsts, np.asarray([2, 0])).tolist() == [3, 4, 5, 0, 1]
    parts = (Part("rows", 0, 3, 3),)
    lengths = np.asarray([5, 9, 4, 3, 6, 8])
    tokens = BatchPlan(lengths, firsts, parts, 2, 1, 2, seed=1, batching="tokens")
    padded = BatchPlan(lengths, firsts, parts, 2, 1, 2, seed=1, batching="sorted")
    assert tokens.steps_per_epoch == 2
    for epoch in range(3):
        seen: list[int] = []
        for step in (2 * epoch, 2 * epoch + 1):
            chosen = [n for rank in range(2) for batch in tokens.micro_batches(step, rank) for n in batch]
            rows = [n for rank in range(2) for batch in padded.micro_batches(step, rank) for n in batch if n >= 0]
            assert sorted(chosen) == sorted(rows) == sorted(tokens.step_sequences(step))
            seen += chosen
        assert sorted(seen) == list(range(6))


def test_the_largest_micro_batch() -> None:
    lengths = np.random.default_rng(0).integers(3, 60, 64)
    lengths[11] = 700  # longer than any step's share of a rank
    plan = BatchPlan(lengths, np.arange(65), (Part("rows", 0, 64, 64),), 8, 2, 2, seed=1, batching="tokens")
    every = [lengths[b].sum() for step in range(8) for b in plan.micro_batches(step, 0)]
    assert lengths[plan.largest_micro_batch()].sum() == max(every) == 700


@pytest.mark.parametrize(
    ("width", "attention", "expected"),
    [
        (4096, "eager", "tokens"),
        (16, "eager", "sorted"),
        (16, "sdpa", "tokens"),
        (16, "flash_attention_2", "tokens"),
    ],
)
def test_packing_where_it_takes_fewer_operations(
    width: int, attention: str, expected: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Eager attention computes every pair of a row's tokens; the products grow with the width's square."""
    rows = [{"text": "select " * length} for length in (2, 9, 40, 3, 5, 60, 8, 4) * 4]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = prepare(str(tmp_path / "rows.jsonl"), "train", tokenizer, DataSettings())
    config = LlamaConfig(**SIZES | {"hidden_size": width})
    config._attn_implementation = attention

    def batching(**given: Any) -> str:
        plan, settings = plan_deepspeed({"train_batch_size": 16}, build_config(given), 1, gpu_has_bfloat16=False)
        return plan_batches(data, settings, plan, 1, config).batching

    assert batching() == expected
    assert batching(data={"batching": "tokens"}) == "tokens"
    assert batching(data={"batching": "random"}) == "random"
    assert batching(model={"task": "classification"}) == "sorted"


def test_packed_targets_stop_at_the_end_of_a_sequence() -> None:
    batch = pack([Tokens([5, 6, 7], [True, True, True]), Tokens([8, 9], [True, True]), Tokens([4, 3], [False, False])])
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9, 4, 3]]
    assert batch.attention_mask is None
    assert batch.position_ids is not None
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 0, 1]]
    assert batch.kept.tolist() == [0, 1, 3]
    assert batch.targets.tolist() == [[6, 7, 9]]
    assert pack([Tokens([4, 3], [False, False])]).targets.tolist() == [[IGNORE]]


def build(kind: str) -> Any:
    torch.manual_seed(0)
    if kind == "gpt2":
        return GPT2LMHeadModel(
            GPT2Config(vocab_size=200, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2)
        )
    if kind == "gemma3":  # sliding windows shorter than the sequences, and whole ones
        types = ["sliding_attention", "full_attention"]
        return Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, head_dim=8, sliding_window=4, layer_types=types))
    if kind == "bloom":
        return BloomForCausalLM(BloomConfig(vocab_size=200, hidden_size=32, n_layer=2, n_head=4))
    if kind == "opt":
        sizes = {"hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        return OPTForCausalLM(OPTConfig(vocab_size=200, max_position_embeddings=512, word_embed_proj_dim=32, **sizes))
    if kind == "mamba":
        return MambaForCausalLM(MambaConfig(vocab_size=200, hidden_size=32, num_hidden_layers=2, state_size=4))
    if kind == "qwen3":
        return Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=8))
    return LlamaForCausalLM(LlamaConfig(**SIZES))


def loss_in_float64(model: Any, batch: Batch) -> Tensor:
    logits = batch_logits(model, batch, CPU)
    assert logits.dtype == torch.float64
    return nn.functional.cross_entropy(logits[0], batch.targets[0], ignore_index=IGNORE, reduction="sum")


@pytest.mark.parametrize("attention", [BY_SEQUENCE, "sdpa", "eager"])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3", "gpt2"])
def test_packed_equals_each_sequence_alone(kind: str, attention: str) -> None:
    """The loss, and the gradient of every part of every adapter, float64."""
    model = build(kind)
    model.set_attn_implementation(attention)
    rosa_ds.inject(model, rosa_ds.AdapterConfig(method="lora", rank=2))
    model.double().eval()
    rng = np.random.default_rng(0)
    sequences = [
        Tokens(rng.integers(3, 200, length).tolist(), [n % 3 > 0 for n in range(length)]) for length in (12, 7, 31, 5)
    ]
    with torch.no_grad():
        for layer in adapted_layers(model).values():
            layer.B.normal_()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    packed = loss_in_float64(model, pack(sequences))
    alone = torch.stack([loss_in_float64(model, collate([tokens], 0)) for tokens in sequences]).sum()
    float64 = attention != "eager"  # eager attention has its softmax in float32
    torch.testing.assert_close(packed, alone, rtol=1e-12 if float64 else 1e-8, atol=0.0)
    for found, expected in zip(torch.autograd.grad(packed, trained), torch.autograd.grad(alone, trained), strict=True):
        assert float((found - expected).norm() / expected.norm()) <= (1e-12 if float64 else 1e-5)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [("llama", None), ("gemma3", None), ("gpt2", None), ("bloom", "takes no position_ids"), ("mamba", "position_ids")],
)
@pytest.mark.parametrize("attention", [BY_SEQUENCE, "sdpa"])
def test_which_models_keep_sequences_apart(
    kind: str, reason: str | None, attention: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    data = prepare("builtin:sql[:4]", "train", tokenizer, DataSettings())
    model = build(kind)
    model.resize_token_embeddings(len(tokenizer))
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(attention)
    leak = find_leak(model, data)
    assert leak is None if reason is None else reason in str(leak)


@pytest.mark.parametrize("by_sequence", [True, False])
def test_which_attention_packed_rows_have(by_sequence: bool, tokenizer: PreTrainedTokenizerBase) -> None:
    """Graphs of a compiler have masks: where sequences end would be another graph for each row."""
    data = prepare("builtin:sql[:4]", "train", tokenizer, DataSettings())
    model = build("llama")
    model.resize_token_embeddings(len(tokenizer))
    batches = BatchPlan(data.lengths, data.firsts, data.parts, 2, 2, 1, seed=1, batching="tokens")
    assert settle_batches(batches, model, data, "tokens", by_sequence) is batches
    assert model.config._attn_implementation == (BY_SEQUENCE if by_sequence else "sdpa")


@pytest.mark.parametrize("leak", ["state", "position"])
def test_a_leak_is_found(leak: str, tokenizer: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture) -> None:
    data = prepare("builtin:sql[:4]", "train", tokenizer, DataSettings())
    model = build("llama" if leak == "state" else "gpt2")
    model.resize_token_embeddings(len(tokenizer))
    if leak == "state":  # of one token to the next, as a convolution does
        model.model.layers[0].mlp.register_forward_hook(lambda _, __, out: out + 0.1 * out.roll(1, dims=1))
        expected = "depends on the one before it"
    else:  # counts tokens itself
        model.transformer.wpe.register_forward_pre_hook(lambda _, given: torch.arange(given[0].shape[1])[None])
        expected = "depends on where it stands"
    batches = BatchPlan(data.lengths, data.firsts, data.parts, 2, 2, 1, seed=1, batching="tokens")
    assert settle_batches(batches, model, data, "tokens").batching == "sorted"
    assert expected in caplog.text
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("kind", "attention"),
    [(kind, how) for kind in ("llama", "gemma3", "gpt2", "bloom", "opt") for how in ("sdpa", "eager")]
    + [("mamba", None)],
)
def test_padded_rows_without_a_mask(
    kind: str, attention: str | None, tokenizer: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture
) -> None:
    """The loss, and the gradient of every parameter, are those of the run with the mask, float32."""
    caplog.set_level("INFO")
    data = prepare("builtin:sql[:4]", "train", tokenizer, DataSettings())
    model = build(kind)
    model.resize_token_embeddings(len(tokenizer))
    if attention is not None:
        model.set_attn_implementation(attention)
    model.train()
    assert not needs_mask(model, data, 0)
    assert model.training
    assert "padded rows have no attention mask" in caplog.text
    model.eval()  # no dropout
    found, expected = (data.batch([0, -1, 1, 2], 0, masked=masked) for masked in (False, True))
    assert found.attention_mask is None
    assert expected.attention_mask is not None
    assert not expected.attention_mask.all()
    losses = [token_loss_sum(model, batch, CPU) for batch in (found, expected)]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=0.0)
    ours, theirs = (torch.autograd.grad(loss, list(model.parameters())) for loss in losses)
    largest = max(float(gradient.abs().max()) for gradient in theirs)
    for gradient, masked in zip(ours, theirs, strict=True):
        torch.testing.assert_close(gradient, masked, rtol=1e-6, atol=1e-6 * largest)


@pytest.mark.parametrize("reads", ["how long the row is", "positions from its end"])
def test_a_model_that_reads_the_mask_keeps_it(
    reads: str, tokenizer: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    data = prepare("builtin:sql[:4]", "train", tokenizer, DataSettings())
    model = build("gpt2")
    model.resize_token_embeddings(len(tokenizer))

    def mask_of(named: dict[str, Tensor]) -> Tensor:
        return named.get("attention_mask", torch.ones_like(named["input_ids"]))

    def scaled(_: nn.Module, __: Any, named: dict[str, Tensor], out: Any) -> Any:
        out.logits = out.logits * mask_of(named).sum(1)[:, None, None]
        return out

    def from_the_end(_: nn.Module, given: Any, named: dict[str, Any]) -> Any:
        positions = mask_of(named).flip(1).cumsum(1).flip(1)
        return given, named | {"position_ids": positions}

    if reads == "how long the row is":
        model.register_forward_hook(scaled, with_kwargs=True)
    else:
        model.register_forward_pre_hook(from_the_end, with_kwargs=True)
    assert needs_mask(model, data, 0)
    assert "padded rows have an attention mask" in caplog.text
