"""Loading bases: the built-in one, folders, GGUF files, and saying which it was."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, ClassVar

import gguf
import numpy as np
import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BartForConditionalGeneration,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.modeling_outputs import CausalLMOutput

from rosa_ds.config.schema import ModelSettings
from rosa_ds.data.batches import collate
from rosa_ds.data.tokenise import Tokens
from rosa_ds.models import load as loading
from rosa_ds.models.load import TINY_FOLDER, enable_checkpointing, identify, load_model, load_tokenizer, stored_dtype
from rosa_ds.models.loss import batch_logits
from rosa_ds.models.pretrain_tiny import build_model, build_tokenizer, pretrain
from rosa_ds.models.stream import open_base


def test_tiny_is_small_and_complete() -> None:
    model = load_model(ModelSettings(), torch.float32)
    assert 1e6 < sum(parameter.numel() for parameter in model.parameters()) < 3e6
    assert stored_dtype(ModelSettings()) == torch.bfloat16
    tokenizer = load_tokenizer(ModelSettings())
    assert tokenizer.decode(tokenizer("Zürich ≠ 東京\n\t🙂")["input_ids"]) == "Zürich ≠ 東京\n\t🙂"
    assert tokenizer.eos_token == "<|end|>"


def test_tiny_knows_its_grammar(tokenizer: PreTrainedTokenizerBase) -> None:
    """It copies invented words, which is what adapters build on."""
    model = load_model(ModelSettings(), torch.float32)
    prompt = "Name the table.\ntable: brolkans (name text, age number)"
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=False
    )
    output = model.generate(torch.tensor([ids]), max_new_tokens=20, do_sample=False)
    assert tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True) == "brolkans"


def test_pretraining_script_makes_a_model(tmp_path: Path) -> None:
    pretrain(tmp_path / "tiny", steps=2, batch_size=1, length=256, learning_rate=1e-3, minutes=9, seed=0)
    settings = ModelSettings(name_or_path=str(tmp_path / "tiny"))
    assert load_tokenizer(settings).chat_template == load_tokenizer(ModelSettings()).chat_template
    shapes = {name: tensor.shape for name, tensor in load_model(settings, torch.float32).state_dict().items()}
    assert shapes == {name: t.shape for name, t in load_model(ModelSettings(), torch.float32).state_dict().items()}


def write_gguf(path: Path) -> torch.nn.Module:
    """A random model of the built-in one's size as a GGUF file, its float32 original returned."""
    model = build_model(build_tokenizer(), seed=3)
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    tokenizer = build_tokenizer()
    vocabulary = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*vocabulary, "ab", "<unused0>", "<unused1>"])
    writer.add_token_types([3] * 5 + [1] * (config.vocab_size - 5))
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(1)
    writer.add_bos_token_id(1)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        array = tensor.numpy()
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        if heads:  # GGUF stores rotary pairs next to each other
            array = array.reshape(heads, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        writer.add_tensor(names.get_name(name, (".weight",)), np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model.eval()


def test_gguf(tmp_path: Path) -> None:
    original = write_gguf(tmp_path / "model.gguf")
    settings = ModelSettings(name_or_path=str(tmp_path / "model.gguf"))
    model = load_model(settings, torch.float32)
    ids = torch.arange(5, 60)[None]
    assert torch.allclose(model(ids).logits, original(ids).logits, atol=1e-5)
    assert load_tokenizer(settings)("abc")["input_ids"]
    assert stored_dtype(settings) == torch.float32
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_the_hash_tells_bases_apart(tmp_path: Path) -> None:
    shutil.copytree(TINY_FOLDER, tmp_path / "copy")
    settings = ModelSettings(name_or_path=str(tmp_path / "copy"))
    torch.save({"learning_rate": 1}, tmp_path / "copy" / "training_args.bin")  # no weights, and not loaded
    assert identify(settings)["hash"] == identify(ModelSettings())["hash"]
    model = load_model(settings, torch.float32)
    model.model.embed_tokens.weight.data[0] += 1
    model.to(torch.bfloat16).save_pretrained(tmp_path / "copy")
    changed = identify(settings)["hash"]
    assert changed != identify(ModelSettings())["hash"]
    (tmp_path / "copy" / "model.safetensors").unlink()
    model.save_pretrained(tmp_path / "copy", max_shard_size="1MB")
    (tmp_path / "copy" / "another.safetensors").write_bytes(b"")
    shards = identify(settings)["hash"]
    last = sorted((tmp_path / "copy").glob("model-*.safetensors"))[-1]
    last.write_bytes(last.read_bytes()[:-1] + b"!")
    assert len({changed, shards, identify(settings)["hash"]}) == 3


def test_rejects_models(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name, message in (
        (str(tmp_path / "emty"), "no such folder. Did you mean .*empty"),
        (str(tmp_path / "model.gguf"), "no such file"),
        (str(tmp_path / "empty"), "cannot be loaded"),
        ("nobody/nothing", "cannot be loaded"),
    ):
        settings = ModelSettings(name_or_path=name)
        with pytest.raises(ValueError, match=message):
            load_model(settings, torch.float32)
    with pytest.raises(ValueError, match="the tokenizer of .* cannot be loaded"):
        load_tokenizer(ModelSettings(name_or_path="nobody/nothing"))


@pytest.mark.parametrize("load", [load_model, open_base], ids=["whole", "streamed"])
def test_a_base_with_an_adapter_beside_it_is_refused(tmp_path: Path, load: Any) -> None:
    shutil.copytree(TINY_FOLDER, tmp_path / "base")
    LoraConfig(target_modules=["q_proj"]).save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match=r"holds a model and a PEFT adapter .*: move adapter_config.json away"):
        load(ModelSettings(name_or_path=str(tmp_path / "base")), torch.float32)


@pytest.mark.parametrize("load", [load_model, open_base], ids=["whole", "streamed"])
@pytest.mark.parametrize(
    "model",
    [
        T5ForConditionalGeneration(T5Config(vocab_size=64, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)),
        BartForConditionalGeneration(
            BartConfig(
                vocab_size=64, d_model=16, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=16, decoder_ffn_dim=16
            )
        ),
    ],
    ids=["t5", "bart"],
)
def test_a_base_with_an_encoder_is_refused(tmp_path: Path, model: Any, load: Any) -> None:
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"has an encoder and a decoder \((t5|bart)\): models that continue a text"):
        load(ModelSettings(name_or_path=str(tmp_path)), torch.float32)


def test_a_model_beside_somebodys_checkpoints_is_a_model(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(TINY_FOLDER, folder)
    (folder / "checkpoints").mkdir()
    (folder / "metrics.jsonl").write_text("{}\n")
    assert load_model(ModelSettings(name_or_path=str(folder)), torch.float32).num_parameters() > 0


class Counting(nn.Module):
    """Says of each position its number, and has no way to leave positions out."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool) -> CausalLMOutput:
        return CausalLMOutput(logits=torch.arange(input_ids.shape[1]).expand_as(input_ids)[..., None].float())


class Selecting(Counting):
    def forward(self, logits_to_keep: Tensor, **inputs: Any) -> CausalLMOutput:
        return CausalLMOutput(logits=super().forward(**inputs).logits[:, logits_to_keep])


class Engine(nn.Module):
    """As DeepSpeed's: takes any arguments for the model that it wraps."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *arguments: Any, **named: Any) -> Any:
        return self.module(*arguments, **named)


@pytest.mark.parametrize("model", [Counting(), Selecting(), Engine(Counting()), Engine(Selecting())])
def test_logits_of_the_positions_with_a_target(model: nn.Module) -> None:
    """Computed alone where the model can (it would else miss an argument), also behind an engine."""
    batch = collate([Tokens([5, 6, 7, 8], [False, False, True, True]), Tokens([5, 6], [False, False])], pad_id=0)
    assert batch_logits(model, batch, torch.device("cpu")).tolist() == [[[1.0], [2.0]]] * 2


class Packing(saved_tensors_hooks):
    """As torch's save_on_cpu; counts what it is given."""

    saved: ClassVar[list[torch.Size]] = []

    def __init__(self, pin_memory: bool) -> None:
        assert pin_memory == torch.cuda.is_available()
        super().__init__(lambda tensor: (self.saved.append(tensor.shape), tensor)[1], lambda tensor: tensor)


@pytest.mark.parametrize("kind", [True, "reentrant", "host"])
def test_recomputed_activations_give_the_same_gradients(
    llama: LlamaForCausalLM, batch: dict[str, Tensor], kind: bool | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And on the host is what each block begins from, and nothing else."""
    monkeypatch.setattr(loading, "save_on_cpu", Packing)
    monkeypatch.setattr(Packing, "saved", [])
    gradients, model = [], llama.train()
    for wanted in (False, kind):
        enable_checkpointing(model, wanted)
        model.zero_grad()
        model(**batch, use_cache=False).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=0)
    blocks = [torch.Size([*batch["input_ids"].shape, llama.config.hidden_size])] * llama.config.num_hidden_layers
    assert Packing.saved == (blocks if kind == "host" else [])
