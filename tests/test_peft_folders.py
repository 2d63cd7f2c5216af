"""Adapters that PEFT has written, against PEFT itself: loaded, and as the beginning of a run; and ours, which PEFT loads."""

from __future__ import annotations

import contextlib
import copy
import json
import math
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, ShiraConfig, SupertuningConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedModel

import rosa_ds
from launching import ROOT, TRAIN, metrics, run
from rosa_ds.adapters.folder import open_adapter
from rosa_ds.config.schema import AdapterConfig, DataSettings, ModelSettings, RunConfig
from rosa_ds.data.prepare import prepare
from rosa_ds.models.load import TINY_FOLDER, load_tokenizer
from rosa_ds.training.init_adapter import adopt, begin_from
from rosa_ds.utils.files import TensorFiles
from rosa_kernels.testing import relative_rms

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),  # PEFT 0.21 calls it
    # PEFT's own, while it writes what these tests read
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled:UserWarning"),
    pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed"),
    pytest.mark.filterwarnings("ignore:Adapter 'default'. 2 LoRA tensor"),
]
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FOLDERS: dict[str, tuple[str, PeftConfig, dict[str, Any]]] = {
    "lora": ("llama", LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj", "down_proj"]), {"alpha": 7.0}),
    "lora, rslora and patterns": (
        "llama",
        LoraConfig(
            r=4,
            lora_alpha=6,
            use_rslora=True,
            target_modules=LINEAR,
            rank_pattern={"k_proj": 2, "layers.0.mlp.up_proj": 5},
            alpha_pattern={"v_proj": 3, "layers.1.self_attn.o_proj": 11},
            modules_to_save=["embed_tokens", "norm"],
            lora_dropout=0.25,
            task_type="CAUSAL_LM",
        ),
        {"dropout": 0.25, "target_modules": ["all-linear"], "rank": 4, "alpha": 12.0},
    ),
    "lora on a head": ("llama", LoraConfig(r=2, target_modules=["lm_head", "v_proj"]), {"rank": 2}),
    "lora on Conv1D": ("gpt2", LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True), {"rank": 2}),
    "lora in some layers": (
        "llama",
        LoraConfig(r=2, target_modules=["q_proj", "v_proj"], layers_to_transform=[1]),
        {"target_modules": ["model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.v_proj"]},
    ),
    "supertuning": ("llama", SupertuningConfig(sparsity=0.93, target_modules=LINEAR), {"method": "sparse"}),
    "supertuning with a low-rank part": (
        "llama",
        SupertuningConfig(sparsity=0.9, r=3, target_modules=LINEAR),
        {"method": "robust", "alpha": 6.0},
    ),
    "shira": ("llama", ShiraConfig(r=1, target_modules=["q_proj", "k_proj", "up_proj"]), {"method": "sparse"}),
}


@pytest.fixture
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    model: PreTrainedModel = request.getfixturevalue(request.param)
    model.float().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def written(base: Path, config: PeftConfig, folder: Path) -> PeftModel:
    """PEFT's model, no number of the adapter zero, and its folder."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad or "shira" in name:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize(("base", "config", "wanted"), FOLDERS.values(), indirect=["base"], ids=FOLDERS)
def test_logits_are_pefts(
    base: Path, config: PeftConfig, wanted: dict[str, Any], batch: dict[str, Tensor], tmp_path: Path
) -> None:
    expected = written(base, config, tmp_path / "peft")(**batch).logits
    model = AutoModelForCausalLM.from_pretrained(base)
    plain = model(**batch).logits
    description = rosa_ds.load_adapter(model, tmp_path / "peft")
    assert relative_rms(plain, expected) > 1e-2
    assert relative_rms(model(**batch).logits, expected) < 1e-6
    assert {name: getattr(description.config, name) for name in wanted} == wanted
    rosa_ds.save_adapter(model, tmp_path / "ours")
    again = AutoModelForCausalLM.from_pretrained(base)
    rosa_ds.load_adapter(again, tmp_path / "ours")
    assert torch.equal(again(**batch).logits, model(**batch).logits)
    assert relative_rms(rosa_ds.merge(again)(**batch).logits, expected) < 1e-6


def test_what_we_export_comes_back(llama: LlamaForCausalLM, tmp_path: Path, batch: dict[str, Tensor]) -> None:
    """SUPERTUNING wants more entries than we have in some layers: the export fills them up, loading takes them out."""
    from rosa_ds.export.merge import export_peft

    llama.float().save_pretrained(tmp_path / "base")
    load_tokenizer(ModelSettings()).save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    rosa_ds.inject(model, AdapterConfig(method="robust", rank=3, alpha=7.0, density=0.0128, dropout=0.0))
    rosa_ds.set_mask(model, rosa_ds.compute_mask(model, [], score="random"))
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter += 0.1 * torch.randn(parameter.shape)
    rosa_ds.save_adapter(model, tmp_path / "ours")
    export_peft(tmp_path / "ours", tmp_path / "peft", None)
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert rosa_ds.load_adapter(back, tmp_path / "peft").base["name_or_path"] == str(tmp_path / "base")
    assert torch.equal(back(**batch).logits, model(**batch).logits)


def test_entries_that_stand_twice_are_added(llama: LlamaForCausalLM, tmp_path: Path, batch: dict[str, Tensor]) -> None:
    llama.float().save_pretrained(tmp_path / "base")
    written(tmp_path / "base", SupertuningConfig(sparsity=0.9, target_modules=["q_proj"]), tmp_path / "peft")
    tensors = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    for name in [name for name in tensors if name.endswith("indices")]:
        tensors[name][5:9] = tensors[name][4]
    save_file(tensors, tmp_path / "peft" / "adapter_model.safetensors")
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "peft")
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    rosa_ds.load_adapter(ours, tmp_path / "peft")
    assert relative_rms(ours(**batch).logits, theirs.eval()(**batch).logits) < 1e-6
    assert next(iter(rosa_ds.adapted_layers(ours).values())).entries == int(32 * 32 * 0.1) - 4


OURS: dict[str, tuple[str, dict[str, Any], str]] = {
    "lora": ("llama", {"method": "lora", "alpha": 7.0, "modules_to_save": ["norm"]}, "LORA"),
    "lora with patterns": (
        "llama",
        {"method": "lora", "rank_pattern": {"k_proj": 2, "up_proj": 0}, "alpha_pattern": {r"0\.self_attn.q": 5.0}},
        "LORA",
    ),
    "lora on Conv1D": ("gpt2", {"method": "lora", "target_modules": ["c_attn"]}, "LORA"),
    "robust": ("llama", {"method": "robust", "density": 0.0128, "modules_to_save": ["lm_head"]}, "SUPERTUNING"),
    "sparse": ("llama", {"method": "sparse", "density": 0.0128}, "SUPERTUNING"),
    "robust on Conv1D": ("gpt2", {"method": "robust"}, "a model with Conv1D layers"),
    "robust with patterns": ("llama", {"method": "robust", "density_pattern": {"q_proj": 0.1}}, "density_pattern"),
    "robust, few entries": ("llama", {"method": "robust", "density": 0.0005}, "k_proj, whose density gives it no"),
    "lora with half a module": ("gpt2", {"method": "lora", "modules_to_save": ["wte"]}, "is tied to lm_head.weight"),
    "subspace": ("llama", {"method": "subspace"}, ""),
    "full": ("llama", {"method": "full"}, ""),
}


def saved(base: Path, settings: dict[str, Any], folder: Path) -> PreTrainedModel:
    """Our model, no number of the adapter zero, and its folder."""
    model = AutoModelForCausalLM.from_pretrained(base)
    rosa_ds.inject(model, AdapterConfig(**({"rank": 3, "density": 0.05, "dropout": 0.0} | settings)), seed=11)
    if any(layer.entries for layer in rosa_ds.adapted_layers(model).values()):
        rosa_ds.set_mask(model, rosa_ds.compute_mask(model, [], score="random"))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    rosa_ds.save_adapter(model, folder)
    return model


@pytest.mark.parametrize(("base", "settings", "form"), OURS.values(), indirect=["base"], ids=OURS)
def test_what_we_save_is_pefts(
    base: Path,
    settings: dict[str, Any],
    form: str,
    batch: dict[str, Tensor],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Where PEFT has a format for it; and comes back to us bit for bit, whatever the format."""
    with caplog.at_level("INFO", "rosa_ds"):
        model = saved(base, settings, tmp_path / "ours")
    names = {path.name for path in (tmp_path / "ours").iterdir()} - {"manifest.json", "rosa_adapter.json"}
    if form in ("LORA", "SUPERTUNING"):
        assert names == {"adapter_config.json", "adapter_model.safetensors"}
        assert json.loads((tmp_path / "ours" / "adapter_config.json").read_text())["peft_type"] == form
        tensors = load_file(tmp_path / "ours" / "adapter_model.safetensors")
        assert {tensor.dtype for tensor in tensors.values()} <= {torch.float32, torch.int32}
        plain, expected = AutoModelForCausalLM.from_pretrained(base), model(**batch).logits
        assert relative_rms(plain(**batch).logits, expected) > 1e-2
        theirs = PeftModel.from_pretrained(plain, tmp_path / "ours")
        assert relative_rms(theirs.eval()(**batch).logits, expected) < 2e-6
        plain = AutoModelForCausalLM.from_pretrained(base)
        plain.load_adapter(str(tmp_path / "ours"))
        assert relative_rms(plain(**batch).logits, expected) < 2e-6
        assert "PEFT" not in caplog.text
    else:
        assert names <= {"adapter.safetensors", "base-00000.safetensors"}
        assert f"PEFT does not load {tmp_path / 'ours'}" in caplog.text if form else "PEFT" not in caplog.text
        assert form in caplog.text
    back = AutoModelForCausalLM.from_pretrained(base)
    description = rosa_ds.load_adapter(back, tmp_path / "ours")
    assert (description.seed, description.base["name_or_path"]) == (11, str(base))
    assert description.config == AdapterConfig(**({"rank": 3, "density": 0.05, "dropout": 0.0} | settings))
    own, theirs = dict(model.named_parameters()), dict(back.named_parameters())
    assert own.keys() == theirs.keys()
    assert all(torch.equal(own[name], theirs[name]) for name in own)
    assert [own[name].requires_grad for name in own] == [theirs[name].requires_grad for name in own]


@pytest.mark.parametrize("base", ["llama"], indirect=True)
def test_what_peft_makes_longer_is_cut_when_it_is_read(base: Path, tmp_path: Path) -> None:
    """Also by name alone, one tensor at a time, as exports and beginning runs read it."""
    model = saved(base, {"method": "robust", "density": 0.0128}, tmp_path / "ours")
    tensors = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    longer = 0
    with contextlib.closing(open_adapter(tmp_path / "ours")) as stored:
        assert isinstance(stored.trained, TensorFiles)
        assert stored.trained.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
        for name, layer in rosa_ds.adapted_layers(model).items():
            longer += len(tensors[f"base_model.model.{name}.supertuning_values"]) - layer.entries
            assert stored.trained.shape(f"{name}.values") == (layer.entries,)
            assert torch.equal(stored.trained[f"{name}.values"], layer.values)
            assert torch.equal(stored.positions[f"{name}.weight"], layer.positions)
    assert longer > 0


@pytest.mark.parametrize("base", ["llama"], indirect=True)
def test_what_another_program_has_saved_over_ours(base: Path, batch: dict[str, Tensor], tmp_path: Path) -> None:
    saved(base, {"method": "lora"}, tmp_path / "ours")
    path = tmp_path / "ours" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": f"{base}/."}))
    rosa_ds.load_adapter(AutoModelForCausalLM.from_pretrained(base), tmp_path / "ours")
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "ours", is_trainable=True)
    with torch.no_grad():
        for parameter in (p for p in theirs.parameters() if p.requires_grad):
            parameter += 0.1
    theirs.save_pretrained(tmp_path / "ours")
    ours = AutoModelForCausalLM.from_pretrained(base)
    with pytest.raises(ValueError, match=r"saved again with PEFT\? Remove rosa_adapter.json"):
        rosa_ds.load_adapter(ours, tmp_path / "ours")
    (tmp_path / "ours" / "rosa_adapter.json").unlink()
    rosa_ds.load_adapter(ours, tmp_path / "ours")
    assert relative_rms(ours(**batch).logits, theirs.eval()(**batch).logits) < 2e-6


def test_a_classifier_whose_head_is_not_trained(
    llama: LlamaForCausalLM, batch: dict[str, Tensor], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    plain = LlamaForSequenceClassification(llama.config).eval()
    plain.config.pad_token_id = 0
    model, ids = copy.deepcopy(plain), batch["input_ids"]
    rosa_ds.inject(model, AdapterConfig(method="lora", rank=2, dropout=0.0))
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter += 0.1
    rosa_ds.save_adapter(model, tmp_path / "ours")
    theirs = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "ours").eval()
    assert relative_rms(theirs(ids).logits, model(ids).logits) < 2e-6


@pytest.mark.parametrize("base", ["llama"], indirect=True)
def test_a_frozen_adapter_is_saved_and_half_of_one_is_not(base: Path, tmp_path: Path) -> None:
    model = saved(base, {"method": "robust", "modules_to_save": ["norm"]}, tmp_path / "ours")
    tensors = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    model.requires_grad_(False)
    rosa_ds.save_adapter(model, tmp_path / "frozen")
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("ours", "frozen")]
    assert files[0] == files[1]
    tensors.popitem()
    with pytest.raises(ValueError, match="model.norm.weight is not in the adapter"):
        rosa_ds.save_adapter(model, tmp_path / "half", tensors=tensors)
    assert not (tmp_path / "half").exists()


REFUSED: dict[str, tuple[PeftConfig, dict[str, Any], str]] = {
    "DoRA": (LoraConfig(r=2, target_modules=["q_proj"], use_dora=True), {}, "has use_dora True"),
    "biases": (LoraConfig(r=2, target_modules=["q_proj"], bias="all"), {}, "has bias 'all'"),
    "B's bias": (LoraConfig(r=2, target_modules=["q_proj"], lora_bias=True), {}, "has lora_bias True"),
    "embedding": (LoraConfig(r=2, target_modules=["embed_tokens"]), {}, "lora_embedding_"),
    "parameters": (
        LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["k_proj.weight"]),
        {},
        "has target_parameters",
    ),
    "tokens": (
        LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[1]),
        {},
        "has trainable_token_indic",
    ),
    "replication": (
        LoraConfig(r=2, target_modules=["q_proj"]),
        {"layer_replication": [[0, 2]]},
        "has layer_replication",
    ),
    "task": (LoraConfig(r=2, target_modules=["q_proj"]), {"task_type": "SEQ_CLS"}, "has task_type SEQ_CLS"),
    "changed base": (LoraConfig(r=2, target_modules=["q_proj"]), {"init_lora_weights": "pissa"}, "the base is changed"),
    "another type": (LoraConfig(r=2, target_modules=["q_proj"]), {"peft_type": "IA3"}, "has peft_type IA3"),
    "no positions": (
        SupertuningConfig(sparsity=0.9, target_modules=["q_proj"]),
        {"save_precomputed_indices": False},
        "save it again with save_precomputed_indices=True",
    ),
    "future": (LoraConfig(r=2, target_modules=["q_proj"]), {"use_flying_lora": True}, "has use_flying_lora True"),
}


@pytest.mark.parametrize("base", ["llama"], indirect=True)
@pytest.mark.parametrize(("config", "change", "message"), REFUSED.values(), ids=REFUSED)
def test_what_no_adapter_here_can_be(
    base: Path, config: PeftConfig, change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(tmp_path / "peft")
    path = tmp_path / "peft" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    model = AutoModelForCausalLM.from_pretrained(base)
    with pytest.raises(ValueError, match=message):
        rosa_ds.load_adapter(model, tmp_path / "peft")
    assert not rosa_ds.adapted_layers(model)


@pytest.mark.parametrize("base", ["llama"], indirect=True)
def test_damaged_and_foreign_folders(base: Path, tmp_path: Path, gpt2: PreTrainedModel) -> None:
    written(base, LoraConfig(r=2, target_modules=["q_proj"]), tmp_path / "peft")
    with pytest.raises(ValueError, match="is no linear layer of this model"):
        rosa_ds.load_adapter(gpt2, tmp_path / "peft")
    path = tmp_path / "peft" / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({name: t for name, t in tensors.items() if "layers.0" not in name or "lora_A" not in name}, path)
    model = AutoModelForCausalLM.from_pretrained(base)
    with pytest.raises(ValueError, match="has not both of A and B"):
        rosa_ds.load_adapter(model, tmp_path / "peft")
    save_file({**tensors, "base_model.model.lm_head.weight": torch.ones(97, 32)}, path)
    with pytest.raises(ValueError, match="lm_head.weight with other numbers than the base has"):
        rosa_ds.load_adapter(model, tmp_path / "peft")
    save_file({**tensors, "base_model.model.lm_head.weight": torch.ones(98, 32)}, path)
    with pytest.raises(ValueError, match=r"lm_head.weight \(98, 32\), which is \(97, 32\) here"):
        rosa_ds.load_adapter(model, tmp_path / "peft")
    os.rename(path, tmp_path / "peft" / "adapter_model.bin")
    with pytest.raises(ValueError, match="is a pickle, which can run any code"):
        rosa_ds.load_adapter(model, tmp_path / "peft")


def test_a_tied_module_is_refused(gpt2: PreTrainedModel, tmp_path: Path) -> None:
    gpt2.float().save_pretrained(tmp_path / "base")
    config = LoraConfig(r=2, target_modules=["c_attn"], modules_to_save=["wte"], fan_in_fan_out=True)
    written(tmp_path / "base", config, tmp_path / "peft")
    with pytest.raises(ValueError, match=r"its own copy of transformer.wte.weight, here tied to lm_head.weight"):
        rosa_ds.load_adapter(gpt2, tmp_path / "peft")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"method": "robust"}, "holds method lora, given is robust: give --method lora"),
        ({"adapter": {"rank": 5}}, r"q_proj has rank 4, 5 is given: leave out what differs \(adapter.rank given\)"),
        ({"adapter": {"alpha": 3.0}}, "has alpha 6, 3 is given"),
        ({"adapter": {"target_modules": ["q_proj"]}}, "adapts model.layers.0.mlp.down_proj"),
        ({"adapter": {"modules_to_save": ["lm_head"]}}, "has model.norm trained whole"),
    ],
)
def test_given_settings_must_be_the_folders(llama: LlamaForCausalLM, given: dict[str, Any], message: str) -> None:
    found = AdapterConfig(
        method="lora", rank=4, alpha=6.0, rank_pattern={"k_proj": 2}, modules_to_save=["norm"], dropout=0.5
    )
    given.setdefault("adapter", {})["init_from"] = "FOLDER"
    with pytest.raises(ValueError, match=message):
        adopt(RunConfig(**given), found, llama)
    same = {"init_from": "FOLDER", "target_modules": [f"{n}" for n in LINEAR], "rank": 4, "dropout": 0.1}
    taken = adopt(RunConfig(method="lora", adapter=same), found, llama)
    wanted = {"method": "lora", **found.model_dump(), "dropout": 0.1, "target_modules": LINEAR}
    assert taken.adapter_config().model_dump() == wanted
    assert adopt(RunConfig(adapter={"init_from": "FOLDER"}), found, llama).adapter_config() == found


def test_a_resumed_run_needs_the_folder_no_more(llama: LlamaForCausalLM) -> None:
    found = AdapterConfig(method="lora", rank=4, target_modules=["q_proj"])
    saved_settings = adopt(RunConfig(adapter={"init_from": "gone"}), found, llama)
    saved = SimpleNamespace(config=saved_settings.model_dump())
    assert begin_from(RunConfig(adapter={"init_from": "gone"}), llama, {}, saved) == (saved_settings, None)
    with pytest.raises(ValueError, match="q_proj has rank 4, 8 is given"):
        begin_from(RunConfig(adapter={"init_from": "gone", "rank": 8}), llama, {}, saved)
    with pytest.raises(ValueError, match=r"adapter.init_from gone: no such folder"):
        begin_from(RunConfig(adapter={"init_from": "gone"}), llama, {}, None)


def test_what_a_run_cannot_begin_with(llama: LlamaForCausalLM, tmp_path: Path) -> None:
    rosa_ds.inject(llama, AdapterConfig(method="subspace", rank=2))
    rosa_ds.save_adapter(llama, tmp_path / "subspace")
    settings = RunConfig(adapter={"init_from": str(tmp_path / "subspace")})
    plain = LlamaForCausalLM(llama.config)
    base = {"name_or_path": "base", "hash": "1"}
    with pytest.raises(ValueError, match="method subspace has changed the base itself: export it merged"):
        begin_from(settings, plain, base, None)
    rosa_ds.inject(plain, AdapterConfig(method="lora", rank=2))
    rosa_ds.save_adapter(plain, tmp_path / "subspace", base={"name_or_path": "base", "hash": "2"})
    with pytest.raises(ValueError, match="was trained on other weights than base has"):
        begin_from(settings, LlamaForCausalLM(llama.config), base, None)
    with pytest.raises(ValueError, match=r"adapter.init_from brings its mask: remove mask.load"):
        RunConfig(adapter={"init_from": "x"}, mask={"load": "y"})


@pytest.mark.ranks
def test_a_run_begins_where_peft_ended(tmp_path: Path) -> None:
    """Its first loss is that of PEFT's model on the same examples; two ranks, ZeRO-3."""
    config = SupertuningConfig(sparsity=0.99, r=4, target_modules=["q_proj", "v_proj", "up_proj"])
    theirs = written(TINY_FOLDER, config, tmp_path / "peft")
    tokenizer = load_tokenizer(ModelSettings())
    data = prepare("builtin:sql[:16]", "train", tokenizer, DataSettings())
    batch = data.batch(range(16), tokenizer.pad_token_id)
    with torch.no_grad():
        logits = theirs(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[:, batch.kept]
    expected = float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten()))
    given = ("--data.train", "builtin:sql[:16]", "--data.eval", "builtin:sql[:2]", "--training.max_steps", "2")
    given = (*given, "--adapter.init_from", "peft", "--adapter.dropout", "0")
    output = run("fork", 2, TRAIN, "--config", str(ROOT / "ds_configs" / "zero3.json"), *given, cwd=tmp_path)
    assert "beginning with the robust adapter of peft" in output
    folder = tmp_path / "runs" / "default"
    lines = [line for line in metrics(folder) if "event" not in line]
    assert [line["phase"] for line in lines] == ["train", "train"]
    assert math.isclose(lines[0]["loss"], expected, rel_tol=1e-5)
    resolved = json.loads((folder / "config.json").read_text())["adapter"]
    assert (resolved["rank"], resolved["alpha"], resolved["target_modules"]) == (
        4,
        8.0,
        ["q_proj", "up_proj", "v_proj"],
    )
    with safe_open(folder / "mask.safetensors", "pt") as mask:
        assert len(mask.keys()) == 18
