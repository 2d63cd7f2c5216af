"""What may lie in a base's folder: the same model at every stage as transformers gives, or one line that says what to do.

What is trained is exported, too.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
)

import rosa_ds
from rosa_ds.config.schema import AdapterConfig, ModelSettings
from rosa_ds.export.merge import export_merged, export_peft
from rosa_ds.models.load import identify, load_model, load_tokenizer
from rosa_ds.models.stream import open_base

SIZES = {"vocab_size": 272, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
CONFIG = LlamaConfig(**SIZES, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
BIN, BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


def build(seed: int, config: Any = CONFIG) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(config)


def single(folder: Path, seed: int = 0) -> None:
    build(seed).save_pretrained(folder)


def sharded(folder: Path, seed: int = 0) -> None:
    build(seed).save_pretrained(folder, max_shard_size="20KB")
    assert (folder / INDEX).is_file()


def bins(folder: Path, seed: int, shards: int = 1) -> None:
    """PyTorch's format, in one file or several."""
    CONFIG.save_pretrained(folder)
    state = build(seed).state_dict()
    if shards == 1:
        torch.save(state, folder / BIN)
        return
    names = {name: f"pytorch_model-{number % shards + 1:05d}-of-{shards:05d}.bin" for number, name in enumerate(state)}
    for file in set(names.values()):
        torch.save({name: state[name] for name in names if names[name] == file}, folder / file)
    (folder / BIN_INDEX).write_text(json.dumps({"metadata": {}, "weight_map": names}))


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def shards_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("model-*.safetensors"))


def rewrite(path: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def with_config(folder: Path, config: Any, **more: Any) -> None:
    single(folder)
    config.save_pretrained(folder)
    edit(folder / "config.json", lambda content: content.update(more))


def config_says(**more: Any) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        single(folder)
        edit(folder / "config.json", lambda content: content.update(more))

    return make


def unlisted(folder: Path) -> None:
    """A shard has a tensor that the index does not name."""
    sharded(folder)
    edit(folder / INDEX, lambda index: index["weight_map"].pop("model.norm.weight"))


def listed(folder: Path) -> None:
    """The index names a tensor that no shard has."""
    sharded(folder)
    edit(folder / INDEX, lambda index: index["weight_map"].update({"model.extra": shards_of(folder)[0].name}))


def moved(folder: Path) -> None:
    """The index names another shard for a tensor than the one that has it."""
    sharded(folder)
    first = shards_of(folder)[0].name
    edit(folder / INDEX, lambda index: index["weight_map"].update({"model.norm.weight": first}))


def twice(folder: Path) -> None:
    """Two shards have one tensor, with other numbers."""
    sharded(folder)
    rewrite(shards_of(folder)[-1], lambda tensors: tensors.update({"model.embed_tokens.weight": torch.ones(272, 32)}))
    rewrite(shards_of(folder)[0], lambda tensors: tensors.update({"lm_head.weight": torch.ones(272, 32)}))


def without_shard(folder: Path) -> None:
    sharded(folder)
    shards_of(folder)[1].unlink()


def without_tensor(folder: Path) -> None:
    sharded(folder)
    for path in shards_of(folder):
        rewrite(path, lambda tensors: tensors.pop("model.norm.weight", None))


def without_index(folder: Path) -> None:
    sharded(folder)
    (folder / INDEX).unlink()


def index_of_others(folder: Path) -> None:
    """An index is left of another, larger model; the single file counts."""
    sharded(folder, 5)
    for path in shards_of(folder):
        path.unlink()
    single(folder)


def both(folder: Path) -> None:
    sharded(folder, 5)
    single(folder / "one")
    shutil.move(folder / "one" / SINGLE, folder)
    shutil.rmtree(folder / "one")


def two_formats(*, many: bool) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        bins(folder, 5)
        (sharded if many else single)(folder)

    return make


def consolidated(folder: Path) -> None:
    single(folder)
    save_file(build(5).state_dict(), folder / "consolidated.safetensors")
    (folder / "params.json").write_text("{}")


def only_consolidated(folder: Path) -> None:
    consolidated(folder)
    (folder / SINGLE).unlink()


def other_formats(folder: Path) -> None:
    single(folder)
    for name in ("tf_model.h5", "flax_model.msgpack", "model.gguf", "model.onnx", "training_args.bin", "optimizer.pt"):
        (folder / name).write_bytes(b"something else")
    (folder / "original").mkdir()
    (folder / "original" / SINGLE).write_bytes(b"something else")


def extra_tensors(folder: Path) -> None:
    single(folder)
    extra = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(4) for layer in (0, 1)}
    rewrite(folder / SINGLE, lambda tensors: tensors.update({**extra, "value_head.weight": torch.ones(1, 32)}))


def stray_buffer(folder: Path) -> None:
    """A table that older models saved, and newer ones compute."""
    single(folder)
    rewrite(folder / SINGLE, lambda tensors: tensors.update({"model.rotary_emb.inv_freq": torch.ones(4)}))


def dangling(folder: Path) -> None:
    single(folder)
    (folder / SINGLE).unlink()
    (folder / SINGLE).symlink_to(folder / "blobs" / "gone")


def written(name: str, content: bytes, make: Callable[[Path], None] = single) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        make(folder)
        (folder / name).write_bytes(content)

    return change


def cut(folder: Path) -> None:
    sharded(folder)
    path = shards_of(folder)[1]
    path.write_bytes(path.read_bytes()[:-10])


def remote(folder: Path) -> None:
    """Code of its own beside an architecture that transformers has."""
    single(folder)
    auto = {"AutoConfig": "config_mine.Mine", "AutoModelForCausalLM": "modeling_mine.Mine"}
    edit(folder / "config.json", lambda content: content.update(auto_map=auto))
    (folder / "modeling_mine.py").write_text("raise RuntimeError('this code was run')\n")


def remote_alone(folder: Path) -> None:
    remote(folder)
    edit(folder / "config.json", lambda content: content.update(model_type="mine"))


def contradictory(make: Callable[[Path], None]) -> Callable[[Path], None]:
    content = {"do_sample": False, "temperature": 0.6, "top_p": 0.9}
    return written("generation_config.json", json.dumps(content).encode(), make)


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
SAME: dict[str, Callable[[Path], None]] = {
    "single": single,
    "sharded": sharded,
    "bin": lambda folder: bins(folder, 0),
    "bin shards": lambda folder: bins(folder, 0, 3),
    "index without a tensor": unlisted,
    "index with a tensor more": listed,
    "index with tensors elsewhere": moved,
    "one tensor in two shards": twice,
    "stale index beside the file": index_of_others,
    "shards and a file": both,
    "broken index beside the file": written(INDEX, b"{"),
    "bin beside": two_formats(many=False),
    "bin beside shards": two_formats(many=True),
    "bin index beside the bin": written(BIN_INDEX, b"{", lambda folder: bins(folder, 0)),
    "consolidated beside": consolidated,
    "other formats beside": other_formats,
    "tensors of nothing": extra_tensors,
    "a buffer that is computed": stray_buffer,
    "config of a cousin": lambda folder: with_config(folder, MistralConfig(**CONFIG.to_diff_dict() | SIZES)),
    "config of fewer layers": config_says(num_hidden_layers=1),
    "config without architectures": config_says(architectures=None),
    "config of a model without head": config_says(architectures=["LlamaModel"]),
    "config with a type of numbers": config_says(dtype="bfloat16"),
    "config that ties unequal heads": config_says(tie_word_embeddings=True),
    "code beside": remote,
    "code beside bin": lambda folder: (bins(folder, 0), remote(folder), (folder / SINGLE).unlink())[0],
    "sampling that contradicts itself": contradictory(single),
    "sampling that contradicts itself, bin": contradictory(lambda folder: bins(folder, 0)),
    "config with ways to sample": config_says(temperature=0.6, max_length=30, do_sample=False),
    "broken generation config": written("generation_config.json", b"{"),
}
REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "shard missing": (without_shard, r"model-00002-of-\d+.safetensors"),
    "tensor missing": (without_tensor, "its files have no tensor for model.norm.weight"),
    "index missing": (without_index, "model.safetensors.index.json"),
    "broken index": (written(INDEX, b"{", sharded), "index.json"),
    "empty index": (written(INDEX, b'{"weight_map": {}}', sharded), "lists no tensors"),
    "index without metadata": (
        written(INDEX, b'{"weight_map": {"lm_head.weight": "model-00001-of-00006.safetensors"}}', sharded),
        "lists no tensors",
    ),
    "nothing": (lambda folder: CONFIG.save_pretrained(folder), "has no model.safetensors or pytorch_model.bin"),
    "consolidated alone": (only_consolidated, "consolidated.safetensors"),
    "pointer of git-lfs": (written(SINGLE, LFS), "model.safetensors.*(copy|download)"),
    "empty file": (written(SINGLE, b""), "model.safetensors.*(copy|download)"),
    "cut shard": (cut, "model-00002-of.*(copy|download)"),
    "broken bin": (
        written(BIN, b"x", lambda folder: CONFIG.save_pretrained(folder)),
        "pytorch_model.bin|cannot be loaded",
    ),
    "dangling link": (dangling, "model.safetensors"),
    "config of another family": (
        lambda folder: with_config(folder, GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=272)),
        "its files have no tensor for transformer",
    ),
    "config of more layers": (config_says(num_hidden_layers=3), "no tensor for model.layers.2.*is it whole"),
    "config of another width": (config_says(intermediate_size=64), r"size mismatch: .* are both of one model"),
    "config of another vocabulary": (config_says(vocab_size=300), r"size mismatch: .* are both of one model"),
    "config of other heads": (config_says(num_key_value_heads=4), r"size mismatch: .* are both of one model"),
    "config of an unknown type": (config_says(model_type="nobody"), "nobody"),
    "config that is none": (written("config.json", b"[]"), "cannot be loaded"),
    "broken config": (written("config.json", b"{"), "config.json"),
    "code alone": (remote_alone, "it needs code of its own"),
}


def settings(folder: Path) -> ModelSettings:
    return ModelSettings(name_or_path=str(folder))


@pytest.mark.parametrize("case", SAME)
def test_the_same_model_at_every_stage_and_exported(tmp_path: Path, case: str) -> None:
    folder = tmp_path / "base"
    folder.mkdir()
    load_tokenizer(ModelSettings()).save_pretrained(folder)
    SAME[case](folder)
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    loaded = load_model(settings(folder), torch.float32)
    streamed, base = open_base(settings(folder), torch.float32)
    numbers = dict(expected.named_parameters())
    for model in (loaded, streamed):
        assert [(name, p.shape) for name, p in model.named_parameters()] == [(n, p.shape) for n, p in numbers.items()]
        for name, buffer in expected.named_buffers():
            assert torch.equal(model.get_buffer(name), buffer), name
    for name, parameter in numbers.items():
        assert torch.equal(loaded.get_parameter(name), parameter), name
        found = streamed.get_parameter(name) if base is None else base.rows(name, slice(None))
        assert torch.equal(found.float(), parameter), name
    rosa_ds.inject(loaded, AdapterConfig(method="lora", rank=2, dropout=0.0, target_modules=["q_proj"]), seed=1)
    loaded.get_parameter("model.layers.0.self_attn.q_proj.B").data.fill_(0.5)
    rosa_ds.save_adapter(loaded, tmp_path / "adapter", identify(settings(folder)))
    out = export_merged(tmp_path / "adapter", tmp_path / "out", torch.float32)
    again, report = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not report["missing_keys"]
    assert type(again) is type(expected)
    assert "auto_map" not in json.loads((out / "config.json").read_text())
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, loaded.eval()(ids).logits, rtol=1e-5, atol=1e-5)
    export_peft(tmp_path / "adapter", tmp_path / "peft", None)


@pytest.mark.parametrize("load", [load_model, open_base], ids=["whole", "streamed"])
@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_line(tmp_path: Path, case: str, load: Callable[..., Any]) -> None:
    folder = tmp_path / "base"
    folder.mkdir()
    make, message = REFUSED[case]
    make(folder)
    with pytest.raises(ValueError, match=message) as error:
        load(settings(folder), torch.float32)
    text = str(error.value)
    assert str(folder) in text
    assert "\n" not in text
    assert len(text) < 800, os.linesep
