"""Layers that the loss does not depend on, or more than once, and models that see what they are to predict."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AlbertConfig,
    AlbertForMaskedLM,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    RobertaConfig,
    RobertaForCausalLM,
)

import rosa_ds
from classifiers import SIZES, make_base, make_rows, write_rows
from launching import ROOT, TRAIN, metrics, run
from rosa_ds.adapters.quantize import quantize_as
from rosa_ds.adapters.reach import Use, unreached, uses
from rosa_ds.adapters.targets import find_targets, linear_layers
from rosa_ds.config.command_line import build_config
from rosa_ds.config.deepspeed import plan_deepspeed
from rosa_ds.config.schema import DataSettings, ModelSettings
from rosa_ds.data.prepare import prepare
from rosa_ds.memory.fake_model import ActivationPlan
from rosa_ds.models.load import load_model
from rosa_ds.models.no_numbers import Shape, alike_layers, with_layers
from rosa_ds.models.quantized import QuantizedLinear
from rosa_ds.planning.search import Planner
from rosa_ds.training.model import adapt
from rosa_ds.training.reach import keep_dense, look_at_base, probe, settle_targets

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
GROUPED = SMALL | {"num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
EXPERTS = GROUPED | {"num_experts": 4, "num_experts_per_tok": 2}
VISION = {k: v for k, v in SMALL.items() if k != "vocab_size"} | {"image_size": 28, "patch_size": 14}


def config_of(family: str, **values: Any) -> Any:
    return AutoConfig.for_model(family, **values)


def gemma3() -> Any:
    return config_of(
        "gemma3",
        text_config=GROUPED | {"head_dim": 8},
        vision_config=VISION,
        mm_tokens_per_image=4,
        image_token_index=60,
    )


MAMBA = {"hidden_size": 32, "state_size": 8, "num_hidden_layers": 4, "time_step_rank": 16, "vocab_size": 64}
JAMBA = EXPERTS | {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8, "mamba_dt_rank": 8}


@pytest.mark.parametrize(
    ("config", "left_out"),
    [
        (config_of("mamba", **MAMBA), {"dt_proj"}),
        (config_of("jamba", **JAMBA), {"dt_proj"}),
        (gemma3(), {"vision_tower", "multi_modal_projector"}),
        (config_of("llama", **GROUPED), set()),
        (config_of("falcon", **{k: v for k, v in SMALL.items() if k != "intermediate_size"}), set()),  # adds in place
        (config_of("codegen", n_embd=32, n_layer=2, n_head=4, rotary_dim=4, vocab_size=64), set()),  # no pad_token_id
        (config_of("mixtral", **GROUPED, num_local_experts=4, num_experts_per_tok=2), set()),
        (config_of("qwen3_moe", **EXPERTS, moe_intermediate_size=24, head_dim=8), set()),
    ],
    ids=lambda value: value.model_type if not isinstance(value, set) else None,
)
def test_all_linear_takes_the_layers_that_the_loss_depends_on(
    config: Any, left_out: set[str], caplog: pytest.LogCaptureFixture
) -> None:
    """As a backward pass of a model with numbers says it, too; Falcon asks for those of its mask."""
    settings = build_config({"method": "lora"})
    unused = look_at_base(settings, config)
    assert unused is not None
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    settings = settle_targets(settings, model, unused)
    every, taken = find_targets(model, ["all-linear"]), find_targets(model, settings.adapter.target_modules)
    ids = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(1))
    assert (
        set(unreached(uses(model, every, lambda: model(input_ids=ids, labels=ids).loss))) == every.keys() - taken.keys()
    )
    assert all(any(part in name for part in left_out) for name in every.keys() - taken.keys())
    assert bool(left_out) == ("all-linear leaves out" in caplog.text)
    rosa_ds.inject(model, settings.adapter_config())
    model(input_ids=ids, labels=ids).loss.backward()
    dead = [name for name, parameter in model.named_parameters() if parameter.requires_grad and parameter.grad is None]
    assert dead == []


def test_a_layer_that_is_named_and_not_used_is_refused() -> None:
    settings = build_config({"adapter": {"target_modules": ["in_proj", "dt_proj"]}})
    config = config_of("mamba", **MAMBA)
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(
        ValueError, match=r"names 4 layers that no gradient reaches, .*dt_proj; name others, such as in_proj"
    ):
        settle_targets(settings, model, look_at_base(settings, config))


def test_inject_looks_at_a_model(caplog: pytest.LogCaptureFixture) -> None:
    model = AutoModelForCausalLM.from_config(config_of("mamba", **MAMBA))
    ids = torch.tensor([[3, 4, 5, 6]])
    before = model.double()(ids).logits
    with pytest.raises(ValueError, match=r"target_modules names 4 layers that no gradient reaches, .*dt_proj"):
        rosa_ds.inject(model, rosa_ds.AdapterConfig(method="lora", rank=2, target_modules=["dt_proj"]))
    report = rosa_ds.inject(model, rosa_ds.AdapterConfig(method="subspace", rank=2, dropout=0.0))
    assert "all-linear leaves out 4 of 16 layers" in caplog.text
    assert report.adapted
    assert not any("dt_proj" in name for name in report.adapted)
    torch.testing.assert_close(
        model(ids).logits, before, rtol=1e-9, atol=1e-12
    )  # a draw of what it reads itself changed it
    plain = nn.Sequential(nn.Linear(3, 3))
    assert rosa_ds.inject(plain, rosa_ds.AdapterConfig(method="lora", rank=1)).adapted == ("0",)


@pytest.mark.parametrize(
    ("config", "dense"), [(config_of("mamba", **MAMBA), "dt_proj"), (gemma3(), None)], ids=["mamba", "gemma3"]
)
def test_what_the_model_reads_itself_is_not_quantised(config: Any, dense: str | None) -> None:
    """A tower that text never reaches is not adapted, and takes no more memory than what is."""
    settings = build_config({"model": {"quantization": "nf4", "quantization_skip": ["lm_head"]}})
    assert keep_dense(settings, None) is settings
    settings = keep_dense(settings, look_at_base(settings, config))
    model = AutoModelForCausalLM.from_config(config)
    layers = linear_layers(model)
    quantize_as(model, settings.model, torch.float32, [])
    skipped = {name for name in layers if not isinstance(model.get_submodule(name), QuantizedLinear)}
    assert skipped == {name for name in layers if name == "lm_head" or (dense and name.endswith(dense))}
    model(input_ids=torch.tensor([[3, 4, 5]]))


@pytest.mark.parametrize("family", ["llama4_text", "phimoe"])
def test_a_router_that_inherits_from_linear_is_left_out(family: str, caplog: pytest.LogCaptureFixture) -> None:
    more = {"intermediate_size_mlp": 48, "head_dim": 8, "attn_temperature_tuning": False} if "4" in family else {}
    model = AutoModelForCausalLM.from_config(
        config_of(family, **GROUPED, num_local_experts=4, num_experts_per_tok=1 + ("4" not in family), **more)
    )
    routers = [
        name for name, module in model.named_modules() if name.endswith("router") and isinstance(module, nn.Linear)
    ]
    assert routers
    assert not linear_layers(model).keys() & set(routers)
    report = rosa_ds.inject(model, rosa_ds.AdapterConfig(method="lora", rank=2))
    assert not set(report.adapted) & set(routers)
    assert f"all-linear leaves out {len(routers)} layers that inherit from nn.Linear" in caplog.text
    model(input_ids=torch.tensor([[3, 4, 5]]))
    with pytest.raises(ValueError, match=r"router, a \w+: only nn.Linear .*whose forward is its own"):
        find_targets(model, ["router"])


LONGFORMER = SMALL | {"num_hidden_layers": 4, "attention_window": 4, "max_position_embeddings": 80}
CLASSIFIER = {"model": {"task": "classification", "labels": ["no", "yes"]}, "data": {"max_length": 64}}


def test_a_layer_whose_gradient_is_always_zero_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    """Of Longformer's last layer a classifier takes the first token alone, which has query, key and value of its own."""
    settings = build_config({"method": "lora"} | CLASSIFIER)
    config = config_of("longformer", **LONGFORMER, num_labels=2, pad_token_id=0)
    model = AutoModelForSequenceClassification.from_config(config)
    unused = look_at_base(settings, config)
    settings = settle_targets(settings, model, unused)
    names = settings.adapter.target_modules
    local = [name for name in names if name.endswith((".query", ".key", ".value"))]
    assert {name.split(".")[3] for name in local} == {"0", "1", "2"}
    assert sum("query_global" in name for name in names) == 4
    assert "all-linear leaves out 3 of 36 layers" in caplog.text
    named = build_config({"method": "lora", "adapter": {"target_modules": ["query"]}} | CLASSIFIER)
    with pytest.raises(ValueError, match=r"names 1 layers that no gradient reaches, .*longformer.encoder.layer"):
        settle_targets(named, model, unused)


def test_a_model_whose_layers_are_of_another_class_is_refused() -> None:
    model = AutoModelForSequenceClassification.from_config(config_of("ibert", **SMALL))
    with pytest.raises(ValueError, match=r"has no linear layer to adapt but its head \(classifier.dense"):
        find_targets(model, ["all-linear"])


class Uneven(nn.Module):
    """Calls one layer twice, reads the weight of another, and drops what a third one gives."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.read, self.dropped, self.idle = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        self.dropped(x)
        return self.twice(self.twice(x)) @ self.read.weight


def test_uses() -> None:
    model = Uneven().requires_grad_(False)
    found = uses(model, dict(model.named_children()), lambda: model(torch.ones(2, 4)).sum())
    assert found == {
        "twice": Use(2, True, False),
        "read": Use(0, False, False),
        "dropped": Use(1, False, False),
        "idle": Use(0, False, False),
    }
    model.requires_grad_(True)
    found = uses(model, dict(model.named_children()), lambda: model(torch.ones(2, 4)).sum())
    assert [name for name, use in found.items() if use.weight_reaches_loss] == ["twice", "read"]


class Zeroed(nn.Module):
    """Gives one layer nothing but zeros, and multiplies what another one says with zero."""

    def __init__(self) -> None:
        super().__init__()
        self.fed, self.starved, self.muted = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.fed(x) + self.starved(torch.zeros_like(x)) + 0 * self.muted(x)


@pytest.mark.parametrize(
    ("how", "used"),
    [
        ({}, {"fed", "starved", "muted"}),
        ({"numbers": True}, {"fed", "muted"}),
        ({"numbers": True, "exact": True}, {"fed"}),
    ],
)
def test_uses_of_numbers(how: dict[str, bool], used: set[str]) -> None:
    model = Zeroed().requires_grad_(False)
    found = uses(model, dict(model.named_children()), lambda: model(torch.ones(2, 4)).sum(), **how)
    assert {name for name, use in found.items() if use.reaches_loss} == used


def test_the_first_pass_of_a_run_looks_again(
    tokenizer: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture
) -> None:
    """At what runs, which kernels on a GPU may do otherwise."""
    data = prepare("builtin:sql[:4]", "train", tokenizer, DataSettings())
    model = load_model(ModelSettings(), torch.float32)
    rosa_ds.inject(model, rosa_ds.AdapterConfig(method="lora", rank=2))
    assert probe(model, model, data, 0, traced=True) == 1
    model.model.layers[1].mlp.forward = lambda x: x
    with pytest.raises(ValueError, match=r"adapters on 3 layers that no gradient reaches, .*layers.\*.mlp.down_proj"):
        probe(model, model, data, 0, traced=False)
    assert probe(model, model, data, 0, traced=True) == 1
    assert "no gradient reaches the adapters of 3 layers in rows of" in caplog.text


@pytest.mark.parametrize("is_decoder", [True, False], ids=["decoder", "encoder"])
def test_a_model_that_sees_the_future_is_refused(is_decoder: bool, tokenizer: PreTrainedTokenizerBase) -> None:
    torch.manual_seed(0)
    sizes = SMALL | {"vocab_size": len(tokenizer), "max_position_embeddings": 300}
    model = RobertaForCausalLM(RobertaConfig(**sizes, is_decoder=is_decoder)).eval()
    data = prepare("builtin:sql[:4]", "train", tokenizer, DataSettings())
    rosa_ds.inject(model, rosa_ds.AdapterConfig(method="lora", rank=2))
    if is_decoder:
        assert probe(model, model, data, 0, traced=True) == 1
        return
    with pytest.raises(ValueError, match="RobertaForCausalLM sees the tokens that it is to predict"):
        probe(model, model, data, 0, traced=True)


@pytest.mark.ranks
def test_layers_used_twice_get_a_mask_from_one_micro_batch(tmp_path: Path) -> None:
    """ALBERT runs one block several times, so gradients of a step are summed although there is one micro-batch."""
    torch.manual_seed(0)
    make_base(tmp_path / "albert", "bert")  # for its tokenizer
    sizes = {name: size for name, size in SIZES.items() if name != "vocab_size"}
    albert = AlbertConfig(
        vocab_size=len(AutoTokenizer.from_pretrained(tmp_path / "albert")), embedding_size=32, **sizes
    )
    AlbertForMaskedLM(albert).save_pretrained(tmp_path / "albert")
    rows = write_rows(tmp_path / "rows.csv", make_rows(16))
    arguments = (
        *("--config", str(ROOT / "ds_configs" / "zero2.json"), "--model.name_or_path", "albert", "--data.train", rows),
        *(
            "--model.task",
            "classification",
            "--training.max_steps",
            "2",
            "--mask.warmup_steps",
            "1",
            "--mask.steps",
            "1",
        ),
        *("--adapter.rank", "2", "--adapter.density", "0.05", "--ds.train_batch_size", "8"),
        *("--ds.train_micro_batch_size_per_gpu", "8"),
    )
    output = run("fork", 1, TRAIN, *arguments, cwd=tmp_path)
    assert "one forward pass of two rows of" in output
    assert [line["phase"] for line in metrics(tmp_path / "runs" / "default") if "phase" in line][-1] == "train"


def test_a_model_that_cannot_be_traced_is_told_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    """Experts in float32 have no shape without numbers; torch's own traceback of it does not look like an error of the run."""
    settings = build_config({"adapter": {"target_modules": ["q_proj"]}})
    config = config_of("mixtral", **GROUPED, num_local_experts=4, num_experts_per_tok=2)
    with pytest.raises(ValueError, match="activations of MixtralForCausalLM cannot be predicted: it asks for numbers"):
        ActivationPlan(config, settings, torch.float32).measure(Shape(1, 8, 8), checkpointing=False)
    assert not [record for record in caplog.records if record.name.startswith("torch")]


def test_a_routers_loss_that_is_left_out_is_told(caplog: pytest.LogCaptureFixture) -> None:
    model = AutoModelForCausalLM.from_config(
        config_of("mixtral", **GROUPED, num_local_experts=4, num_experts_per_tok=2)
    )
    settings = build_config({"method": "full"})
    adapt(model, None, settings, plan_deepspeed({"train_batch_size": 1}, settings, 1, gpu_has_bfloat16=False)[0])
    assert "the routers' auxiliary loss (router_aux_loss_coef) is not part of the loss" in caplog.text


def test_kinds_of_layers_that_follow_from_their_number_under_another_name() -> None:
    """Bamba's ``layer_types`` is another name of a property that cannot be set."""
    config = config_of(
        "bamba", **GROUPED | {"num_hidden_layers": 4}, mamba_n_heads=4, mamba_d_head=16, attn_layer_indices=[]
    )
    assert len(with_layers(config, 2).layer_types) == 2


def test_a_plan_says_that_it_could_not_look(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr("rosa_ds.adapters.reach._MOST_WITH_NUMBERS", 0)
    config = config_of("falcon", **{k: v for k, v in SMALL.items() if k != "intermediate_size"})
    with caplog.at_level("WARNING"):
        Planner(build_config({"method": "lora"}), {}, config)
    assert "which layers the loss depends on is not known" in caplog.text


@pytest.mark.parametrize("kind", ["prophetnet", "longformer", "funnel"])
def test_layers_that_say_something_each_are_not_taken_for_alike(kind: str) -> None:
    """A window for each layer (Longformer), and numbers of layers that cannot be set (ProphetNet, Funnel)."""
    config = AutoConfig.for_model(kind)
    if kind == "longformer":
        config.attention_window = [64] * config.num_hidden_layers
    assert alike_layers(config) is None
