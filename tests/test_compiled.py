"""Blocks through torch.compile: the same losses and gradients, few graphs, and what is told of them."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlamaForCausalLM

import rosa_ds
from launching import SMALL, TRAIN, run
from rosa_ds.config.deepspeed import DeepSpeedPlan, plan_deepspeed
from rosa_ds.config.schema import RunConfig
from rosa_ds.training import compiled as module
from rosa_ds.training.compiled import as_it_is, blocks, compiled

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # torch's compiler's own
CLOSE = 1e-5
"""Largest difference of a gradient in float32, relative to its largest entry."""


def rows(*shape: int) -> dict[str, Tensor]:
    """Padded rows; the first has three tokens less."""
    mask = torch.ones(shape, dtype=torch.int64)
    mask[0, -3:] = 0
    return {"input_ids": torch.randint(3, 90, shape), "attention_mask": mask}


def packed(*lengths: int) -> dict[str, Tensor]:
    positions = torch.cat([torch.arange(length) for length in lengths])
    return {"input_ids": torch.randint(3, 90, (1, sum(lengths))), "position_ids": positions[None]}


def adapted(llama: LlamaForCausalLM, method: Any, targets: list[str]) -> LlamaForCausalLM:
    """With numbers in all parts; a sparse part sleeps."""
    llama.float().train()
    rosa_ds.inject(
        llama, rosa_ds.AdapterConfig(method=method, rank=2, density=0.05, dropout=0.0, target_modules=targets)
    )
    with torch.no_grad():
        for name, parameter in llama.named_parameters():
            if name.endswith((".B", ".values")):
                parameter.normal_(0, 0.1)
    return llama


def learnt(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The loss, and the gradient of everything that is trained."""
    model.zero_grad()
    loss = model(**inputs, labels=inputs["input_ids"], use_cache=False).loss
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **gradients}


def assert_same(model: nn.Module, inputs: dict[str, Tensor]) -> None:
    with as_it_is():
        expected = learnt(model, inputs)
    found = learnt(model, inputs)
    assert found.keys() == expected.keys()
    assert len(found) > 1
    for name, tensor in expected.items():
        assert float((found[name] - tensor).abs().max()) <= CLOSE * float(tensor.abs().max()), name


def graphs() -> int:
    count: int = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    return count


def test_blocks_and_rows_of_all_lengths_share_a_graph(
    llama: LlamaForCausalLM, caplog: pytest.LogCaptureFixture
) -> None:
    """The gradients are those without. A first block whose input needs no gradient would have a graph of its own."""
    caplog.set_level(logging.INFO, logger="rosa_ds")
    adapted(llama, "robust", ["q_proj"]).enable_input_require_grads()
    rosa_ds.set_mask(llama, rosa_ds.compute_mask(llama, [], score="random"))
    with compiled(llama, "aot_eager"):
        before = graphs()
        for shape in ((3, 11), (2, 17), (4, 4)):
            assert_same(llama, rows(*shape))
        assert graphs() == before + 1
    assert "torch.compile: 1 graphs in" in caplog.text
    assert "0 graph breaks" in caplog.text
    assert all(block._compiled_call_impl is None for block in blocks(llama))


@pytest.mark.nightly
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("method", ["lora", "robust", "subspace"])
def test_gradients_are_those_without(llama: LlamaForCausalLM, method: str, backend: str) -> None:
    adapted(llama, method, ["q_proj", "down_proj"])
    with compiled(llama, backend):
        before = graphs()
        assert_same(llama, rows(3, 11))
        if method == "robust":
            rosa_ds.set_mask(llama, rosa_ds.compute_mask(llama, [], score="random"))
        for inputs in (rows(3, 11), rows(2, 17), packed(6, 9), packed(4, 5, 11)):
            assert_same(llama, inputs)
        if method == "subspace":
            with torch.no_grad():
                for layer in rosa_ds.adapted_layers(llama).values():
                    layer.redraw(RunConfig(method="subspace").draw, torch.Generator().manual_seed(3))
            assert_same(llama, rows(2, 12))
        assert graphs() - before == (6 if method == "robust" else 4)
        llama.eval()
        with torch.no_grad():
            for shape in ((3, 9), (5, 12)):
                inputs = rows(*shape)
                with as_it_is():
                    expected = llama(**inputs, use_cache=False).logits
                torch.testing.assert_close(llama(**inputs, use_cache=False).logits, expected, atol=1e-5, rtol=1e-5)
        assert graphs() - before == (7 if method == "robust" else 5)


class Fussy(nn.Module):
    """A block that needs a graph for each value of an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.factor = nn.Parameter(torch.ones(3)), 0.5

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * self.factor


def test_too_many_graphs_are_told_once(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_GRAPHS", 2)
    model = nn.Sequential()
    model.layers = nn.ModuleList([Fussy()])
    block = model.layers[0]
    x = torch.ones(2, 3)
    with compiled(model, "eager"):
        for factor in (0.5, 1.5, 2.5, 3.5, 0.5):
            block.factor = factor
            assert torch.equal(block(x), x * factor)
    assert caplog.text.count("torch.compile has made 2 graphs of one function and makes no more of it") == 1


def test_the_blocks_of_a_model(llama: LlamaForCausalLM, gpt2: nn.Module) -> None:
    assert blocks(llama) == [*llama.model.layers]
    assert blocks(gpt2) == [*gpt2.transformer.h]
    alone = nn.Linear(2, 2)
    assert blocks(alone) == [alone]
    two = nn.ModuleDict({"a": nn.ModuleList([nn.Sequential(nn.ModuleList([alone])), nn.ReLU()]), "b": alone})
    assert blocks(two) == [two["a"][0]]


# -- settings --------------------------------------------------------------------------------------------------------


def plan(config: dict[str, Any], **given: Any) -> tuple[DeepSpeedPlan, RunConfig]:
    return plan_deepspeed({"train_batch_size": 4, **config}, RunConfig(**given), 1, gpu_has_bfloat16=False)


def test_the_section_of_deepspeed_is_our_setting() -> None:
    found, settings = plan({})
    assert found.compiler is None
    assert not settings.training.compile
    found, settings = plan({}, training={"compile": True})
    assert found.compiler == "inductor"
    assert settings.training.compile
    found, settings = plan({"compile": {"enabled": True, "backend": "aot_eager"}})
    assert found.compiler == "aot_eager"
    assert settings.training.compile
    assert "compile" not in found.config
    assert plan({"compile": {"enabled": False, "backend": "eager"}})[0].compiler is None
    assert plan({"compile": {"backend": "eager"}}, training={"compile": True})[0].compiler == "eager"


ON = {"training": {"compile": True}}
REFUSED: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"compile": {"enabled": True, "backend": "nothing"}}, {}, "compile.backend .* is inductor or aot_eager or eager"),
    ({"compile": {"enabled": "yes"}}, {}, "compile.enabled of the DeepSpeed file is true or false"),
    ({"compile": {"enabled": True, "deepcompile": True}}, {}, "compile.deepcompile"),
    ({"compile": {"enabled": False}}, ON, "says False, training.compile True: remove one of the two"),
    ({"compile": {"enabled": True}}, {"training": {"compile": False}}, "says True, training.compile False: remove"),
    ({}, {**ON, "model": {"quantization": "nf4"}}, "training.compile with model.quantization nf4"),
    ({"zero_optimization": {"stage": 3}}, ON, "training.compile with zero_optimization.stage 3: .* by hooks"),
    (
        {"activation_checkpointing": {"cpu_checkpointing": True}},
        ON,
        "training.compile with training.gradient_checkpointing host",
    ),
    ({}, {**ON, "adapter": {"partition_positions": True}}, "training.compile with adapter.partition_positions true"),
]


@pytest.mark.parametrize(("config", "given", "message"), REFUSED)
def test_what_cannot_be_compiled_is_refused(config: Any, given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(config, **given)


# -- whole runs ------------------------------------------------------------------------------------------------------

METHODS = {
    "lora": (),
    "robust": ("--mask.warmup_steps", "2", "--mask.steps", "2"),
    "subspace": ("--draw.every", "3"),
}


@pytest.mark.nightly
@pytest.mark.ranks
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("ranks", "stage", "batching"), [(1, 0, "tokens"), (2, 2, "sorted")])
def test_a_run_learns_what_it_learns_without(
    tmp_path: Path, method: str, ranks: int, stage: int, batching: str
) -> None:
    found = {}
    for name in ("false", "true"):
        output = run(
            "fork",
            ranks,
            TRAIN,
            *SMALL,
            *("--method", method, "--ds.zero_optimization.stage", str(stage), "--data.batching", batching),
            *("--ds.train_batch_size", "8", "--ds.gradient_accumulation_steps", "2", "--model.dtype", "float32"),
            *("--adapter.dropout", "0", "--adapter.target_modules", "q_proj,down_proj", "--training.max_steps", "7"),
            *("--training.compile", name, "--training.output_dir", name, "--training.warmup_steps", "1"),
            *METHODS[method],
            cwd=tmp_path,
        )
        assert ("0 graph breaks" in output) == (name == "true")
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        losses = [line["loss"] for line in lines if "loss" in line]
        (tensors,) = (tmp_path / name / "adapter").glob("adapter*.safetensors")
        found[name] = losses, load_file(tensors)
    assert found["true"][0] == pytest.approx(found["false"][0], rel=1e-5)
    for name, tensor in found["false"][1].items():
        # Adam makes a step of 7e-4 of every sign
        torch.testing.assert_close(found["true"][1][name], tensor, atol=1e-4, rtol=1e-4, msg=name)
