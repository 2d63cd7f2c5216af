"""Bases whose vocabulary is not what it was: resized embeddings, tied and untied heads, tokens that have no row."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

import rosa_ds
from rosa_ds.config.schema import AdapterConfig, DataSettings, ModelSettings
from rosa_ds.data.prepare import prepare
from rosa_ds.export.merge import export_merged, export_peft
from rosa_ds.models.load import load_model, load_tokenizer
from rosa_ds.models.stream import open_base
from rosa_ds.training.model import check_vocabulary

BATCH = {"input_ids": torch.tensor([[3, 88, 95, 7], [1, 2, 3, 4]])}


def resized(llama: LlamaForCausalLM, folder: Path, rows: int, tied: bool) -> LlamaForCausalLM:
    """A saved base, and in ``folder``-resized the same with other rows of the embedding."""
    model = LlamaForCausalLM(LlamaConfig(**{**llama.config.to_dict(), "tie_word_embeddings": tied})).eval()
    model.save_pretrained(folder)
    model.resize_token_embeddings(rows, mean_resizing=False)
    model.save_pretrained(f"{folder}-resized")
    for target in (folder, f"{folder}-resized"):
        load_tokenizer(ModelSettings()).save_pretrained(target)
    return model


def trained(model: LlamaForCausalLM, tied: bool) -> LlamaForCausalLM:
    modules = ["embed_tokens"] if tied else ["embed_tokens", "lm_head"]
    rosa_ds.inject(model, AdapterConfig(method="robust", rank=2, density=0.05, dropout=0.0, modules_to_save=modules))
    rosa_ds.set_mask(model, rosa_ds.compute_mask(model, [], score="random"))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        return model(**BATCH).logits


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # PEFT 0.21 calls it
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("rows", [128, 96], ids=["more rows", "fewer rows"])
def test_a_resized_base_is_trained_and_exported(llama: LlamaForCausalLM, rows: int, tied: bool, tmp_path: Path) -> None:
    model = trained(resized(llama, tmp_path / "base", rows, tied), tied)
    expected = logits(model)
    rosa_ds.save_adapter(model, tmp_path / "adapter", base={"name_or_path": str(tmp_path / "base-resized")})
    out = export_merged(tmp_path / "adapter", tmp_path / "out", None)
    assert json.loads((out / "config.json").read_text())["vocab_size"] == rows
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    assert torch.allclose(logits(loaded), expected, atol=1e-5)
    if tied:
        with pytest.raises(ValueError, match=r"modules_to_save model.embed_tokens.weight .* tied to lm_head.weight"):
            export_peft(tmp_path / "adapter", tmp_path / "peft", None)
        return
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base-resized")
    theirs = PeftModel.from_pretrained(base, export_peft(tmp_path / "adapter", tmp_path / "peft", None)).eval()
    assert torch.allclose(logits(theirs), expected, atol=1e-5)


@pytest.mark.parametrize("rows", [128, 96], ids=["more rows", "fewer rows"])
def test_an_adapter_of_the_resized_model_is_none_of_the_base(
    llama: LlamaForCausalLM, rows: int, tmp_path: Path
) -> None:
    model = trained(resized(llama, tmp_path / "base", rows, tied=False), tied=False)
    rosa_ds.save_adapter(model, tmp_path / "adapter", base={"name_or_path": str(tmp_path / "base")})
    message = (
        rf"weight is \({rows}, 32\), the model's is \(97, 32\): is it another base, or one whose embedding was resized"
    )
    for attempt in (
        lambda: export_merged(tmp_path / "adapter", tmp_path / "out", None),
        lambda: export_peft(tmp_path / "adapter", tmp_path / "out", None),
        lambda: rosa_ds.load_adapter(LlamaForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter"),
    ):
        with pytest.raises(ValueError, match=message):
            attempt()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("load", [load_model, open_base], ids=["whole", "streamed"])
def test_a_config_with_the_old_vocabulary_is_a_clear_error(
    llama: LlamaForCausalLM, load: object, tmp_path: Path
) -> None:
    resized(llama, tmp_path / "base", 128, tied=False)
    path = tmp_path / "base-resized" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"vocab_size": 97}))
    with pytest.raises(ValueError, match=r"base-resized' cannot be loaded: .*mismatch"):
        load(ModelSettings(name_or_path=str(tmp_path / "base-resized")), torch.float32)  # type: ignore[operator]


def test_tokens_without_a_row(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """What a user meets who adds tokens to a tokenizer alone."""
    model, more = load_model(ModelSettings(), torch.float32), load_tokenizer(ModelSettings())
    rows = model.get_input_embeddings().weight.shape[0]
    assert more.add_tokens([f"<|added {number}|>" for number in range(rows - len(more) + 1)]) > 0
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "one", "completion": "two"}) + "\n")
    check_vocabulary(model, {"rows": prepare(str(path), "train", more, DataSettings())}, more)  # not used: fine
    path.write_text(json.dumps({"prompt": "one", "completion": f"<|added {rows - len(tokenizer)}|>"}) + "\n")
    data = prepare(str(path), "train", more, DataSettings())
    assert data.largest_id() == rows
    message = (
        rf"rows has token {rows} \('<\|added .*embedding has {rows} rows .*modules_to_save \[\"model.embed_tokens\"\]"
    )
    with pytest.raises(ValueError, match=message):
        check_vocabulary(model, {"rows": data}, more)
    model.resize_token_embeddings(len(more), mean_resizing=False)
    check_vocabulary(model, {"rows": data}, more)
    untied = LlamaForCausalLM(
        LlamaConfig(**{**model.config.to_dict(), "tie_word_embeddings": False, "vocab_size": rows})
    )
    with pytest.raises(ValueError, match=r"modules_to_save \[\"model.embed_tokens\", \"lm_head\"\]"):
        check_vocabulary(untied, {"rows": data}, more)
    more.pad_token = f"<|added {rows - len(tokenizer)}|>"
    with pytest.raises(ValueError, match="the padding token has token"):
        check_vocabulary(untied, {}, more)
