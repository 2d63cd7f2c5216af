"""The loss a block of tokens at a time: as of whole logits, for every kind of head, with less memory."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

import rosa_ds
from launching import ROOT, run
from rosa_ds import AdapterConfig
from rosa_ds.config.schema import RunConfig
from rosa_ds.data.batches import IGNORE, Batch, collate, pack
from rosa_ds.data.prepare import TokenSet, prepare
from rosa_ds.data.tokenise import Tokens
from rosa_ds.memory.activation_tracer import LiveBytes, SavedBytes
from rosa_ds.models.head import BlockedHead
from rosa_ds.models.load import load_tokenizer
from rosa_ds.models.loss import batch_logits, blocked_head, find_head_with, target_losses, token_loss_sum, use_head
from rosa_ds.models.quantized import Form, QuantizedLinear
from rosa_ds.training.evaluate import evaluate
from rosa_ds.training.head import settle_head

CPU, BLOCK = torch.device("cpu"), 4
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 97}
BEHIND = {  # what models do behind their heads
    "gemma2": SMALL | {"num_key_value_heads": 2, "head_dim": 8, "final_logit_softcapping": 0.05},
    "cohere": SMALL | {"logit_scale": 0.3, "eos_token_id": 1},
    "granite": SMALL | {"logits_scaling": 3.0},
    "nanochat": SMALL,  # a soft cap, and no setting of that name
    "bloom": {"hidden_size": 32, "n_layer": 1, "n_head": 4, "vocab_size": 97},  # takes no logits_to_keep of its class
    "roberta": SMALL | {"is_decoder": True},  # the head inside of another module
}


def make(kind: str, dtype: torch.dtype) -> PreTrainedModel:
    torch.manual_seed(0)
    if kind in BEHIND:
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **BEHIND[kind])).to(dtype).eval()
    model = LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=kind == "tied")).to(dtype)
    if kind == "frozen":
        rosa_ds.inject(model, AdapterConfig(rank=2, method="lora", dropout=0.0))
    elif kind == "adapted":
        targets = ["lm_head", "q_proj"]
        rosa_ds.inject(model, AdapterConfig(rank=2, density=0.05, dropout=0.0, target_modules=targets))
        for layer in rosa_ds.adapted_layers(model).values():
            layer.set_positions(torch.arange(0, 3 * layer.entries, 3, dtype=torch.int32))
            nn.init.normal_(layer.B, std=0.1)
    elif kind == "nf4":
        form = Form("nf4", True, (97, 32), dtype)
        model.lm_head = QuantizedLinear(form, False, None, form.pack(model.lm_head.weight.detach()))
    return model.to(dtype).eval()  # adapters begin in float32


def rows(*trained_from: int) -> list[Tokens]:
    ids = torch.randint(3, 97, (len(trained_from), 11), generator=torch.Generator().manual_seed(1)).tolist()
    return [
        Tokens(row[: 11 - first], [n > first for n in range(11 - first)])
        for row, first in zip(ids, trained_from, strict=True)
    ]


BATCHES = {"padded": collate(rows(1, 4, 2), 0), "packed": pack(rows(1, 4)), "one block": collate(rows(4), 0)}


def known(model: Any, batch: Batch, block: int = BLOCK) -> BlockedHead:
    head = find_head_with(model, batch, CPU, block)
    assert isinstance(head, BlockedHead), head
    return head


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def dense(model: Any, batch: Batch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Losses of each target, their sum and the gradients of it, from whole logits."""
    logits = batch_logits(model, batch, CPU)
    losses = nn.functional.cross_entropy(logits.transpose(1, 2), batch.targets, ignore_index=IGNORE, reduction="none")
    return losses.detach(), losses.detach().sum(), gradients(model, losses.sum())


@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("kind", ["trained", "tied", "frozen", "adapted", "nf4", *BEHIND])
def test_blocks_are_as_whole_logits(kind: str, batch: Batch) -> None:
    for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
        if (kind, dtype) == ("nf4", torch.float64):
            continue  # bitsandbytes has no such numbers
        model = make(kind, dtype)
        losses, total, expected = dense(model, batch)
        use_head(model, known(model, batch))
        found = token_loss_sum(model, batch, CPU)
        assert found.dtype == dtype
        assert float((found.detach() - total).abs() / total) < bound
        assert (target_losses(model, batch, CPU) - losses).abs().max() < 10 * bound
        ours = gradients(model, found)
        assert ours.keys() == expected.keys()
        largest = max(float(gradient.abs().max()) for gradient in expected.values())
        for name, gradient in expected.items():
            # what is zero but for rounding (biases of keys) is judged by the others
            scale = max(float(gradient.abs().max()), 1e-3 * largest)
            # a model's own norms compute in float32
            own = 1e-6 if kind == "roberta" else bound
            assert float((ours[name] - gradient).abs().max()) < own * scale, name


def test_what_is_behind_the_head_is_recorded() -> None:
    steps = {kind: len(known(make(kind, torch.float32), BATCHES["padded"]).steps) for kind in ("tied", *BEHIND)}
    assert steps == {"tied": 0, "gemma2": 3, "cohere": 1, "granite": 1, "nanochat": 3, "bloom": 0, "roberta": 0}


@pytest.mark.parametrize("kind", ["trained", "adapted"])
def test_a_batch_without_targets(kind: str) -> None:
    model = make(kind, torch.float32)
    use_head(model, known(model, BATCHES["padded"]))
    nothing = collate([Tokens([5, 6, 7], [False] * 3)] * 2, 0)
    loss = token_loss_sum(model, nothing, CPU)
    assert float(loss.detach()) == 0
    assert not target_losses(model, nothing, CPU).any()
    found = gradients(model, loss)
    assert found.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    assert not any(gradient.any() for gradient in found.values())


def test_float16_keeps_small_numbers_of_a_softmax() -> None:
    """Of 2**15 tokens all but a few have a gradient below float16's smallest number."""
    torch.manual_seed(0)
    config = LlamaConfig(**SMALL | {"vocab_size": 2**15})
    reference = LlamaForCausalLM(config)
    nn.init.normal_(reference.lm_head.weight, std=3.0)
    reference.half().float().requires_grad_(False)
    reference.model.norm.weight.requires_grad_(True)
    model = LlamaForCausalLM(config).half().requires_grad_(False)
    model.load_state_dict(reference.state_dict())
    model.model.norm.weight.requires_grad_(True)
    batch = BATCHES["padded"]
    _, _, expected = dense(reference, batch)
    use_head(model, known(model, batch))
    found = gradients(model, token_loss_sum(model, batch, CPU))
    distance = (found["model.norm.weight"].float() - expected["model.norm.weight"]).norm()
    assert float(distance / expected["model.norm.weight"].norm()) < 5e-3


def test_whole_logits_are_never_there() -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SMALL | {"vocab_size": 8192})).requires_grad_(False)
    model.model.layers[0].mlp.up_proj.requires_grad_(True)
    batch = collate([Tokens(list(range(3, 67)), [True] * 64)] * 4, 0)
    logits = batch.targets.numel() * 8192 * 4
    peaks, kept = [], []
    for head in (None, known(model, batch, block=16)):
        use_head(model, head)
        saved, live = SavedBytes(model), LiveBytes()
        for tensor in (*model.parameters(), *model.buffers()):
            live.know(tensor)
        with live:
            with saved:
                loss = token_loss_sum(model, batch, CPU)
            loss.backward()
        peaks.append(live.peak)
        kept.append(saved.bytes)
    assert peaks[0] - peaks[1] > 1.7 * logits
    assert kept[0] - kept[1] > 0.9 * logits


def test_dropout_of_an_adapted_head_is_the_same_in_backward() -> None:
    """Several blocks are computed again there: the gradient is that of the loss."""
    model = make("adapted", torch.float64).train()
    layer = rosa_ds.adapted_layers(model)["lm_head"]
    layer.dropout = 0.5
    batch = BATCHES["padded"]
    use_head(model, known(model, batch))

    def loss() -> Tensor:
        torch.manual_seed(3)
        return token_loss_sum(model, batch, CPU)

    gradient = gradients(model, loss())["lm_head.B"]
    direction = torch.randn(layer.B.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    sums = []
    for sign in (1, -1):
        with torch.no_grad():
            layer.B.add_(direction, alpha=sign * 1e-5)
            sums.append(float(loss()))
            layer.B.sub_(direction, alpha=sign * 1e-5)
    assert (sums[0] - sums[1]) / 2e-5 == pytest.approx(float((gradient * direction).sum()), rel=1e-6)


@pytest.fixture
def rows_of_tiny(tmp_path: Path) -> TokenSet:
    (tmp_path / "rows.jsonl").write_text('{"text": "one two three four"}\n{"text": "five six seven eight nine ten"}\n')
    settings = RunConfig(data={"train": str(tmp_path / "rows.jsonl")})
    return prepare(settings.data.train, "train", load_tokenizer(settings.model, settings.data), settings.data)


class _Mixed(LlamaForCausalLM):
    """Says of a token what depends on the number of those beside it, which no block can know."""

    def forward(self, *given: Any, **named: Any) -> Any:
        output = super().forward(*given, **named)
        output.logits = output.logits * output.logits.shape[1]
        return output


class _Twice(LlamaForCausalLM):
    def forward(self, *given: Any, **named: Any) -> Any:
        super().forward(*given, **named)
        return super().forward(*given, **named)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (_Mixed, "_Mixed makes of its head's output is another thing in blocks"),
        (_Twice, "_Twice are not made of one call"),
    ],
)
def test_models_that_cannot_be_asked_in_blocks(
    kind: type[LlamaForCausalLM], message: str, rows_of_tiny: TokenSet, caplog: pytest.LogCaptureFixture
) -> None:
    model = kind(LlamaConfig(**SMALL | {"vocab_size": int(rows_of_tiny.largest_id()) + 1}))
    assert not settle_head(model, rows_of_tiny, 0, "auto")
    assert blocked_head(model) is None
    assert message in caplog.text


def test_a_run_asks_in_blocks(rows_of_tiny: TokenSet) -> None:
    model = LlamaForCausalLM(LlamaConfig(**SMALL | {"vocab_size": int(rows_of_tiny.largest_id()) + 1}))
    assert not settle_head(model, rows_of_tiny, 0, "whole")
    whole = evaluate(model, rows_of_tiny, 2, 0)
    assert settle_head(model, rows_of_tiny, 0, 3)
    head = blocked_head(model)
    assert head is not None
    assert head.block == 3
    assert whole is not None
    assert evaluate(model, rows_of_tiny, 2, 0) == {"loss": pytest.approx(whole["loss"], rel=1e-6)}
    assert settle_head(model, rows_of_tiny, 0, "auto")
    assert dataclasses.replace(head, block=2**26 // model.config.vocab_size) == blocked_head(model)


@pytest.mark.ranks
def test_two_ranks_at_stages_0_2_and_3(tmp_path: Path, llama: LlamaForCausalLM) -> None:
    llama.float().save_pretrained(tmp_path / "llama")
    LlamaForCausalLM(LlamaConfig(**{**llama.config.to_dict(), "tie_word_embeddings": True})).save_pretrained(
        tmp_path / "tied"
    )
    output = run("fork", 2, str(ROOT / "tests" / "support" / "head_ranks.py"), str(tmp_path), cwd=tmp_path)
    assert output.count("equal ") == 6
