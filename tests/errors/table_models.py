"""Bad bases."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from errors.rows import Row, adapter, base, both, change_json, cut, write, write_rows

rows = write_rows("rows.jsonl")
STAGE_3 = "--ds.zero_optimization.stage 3"


def damaged(change: Callable[[Path], object]) -> Callable[[Path], object]:
    """A copy of the built-in model, and something done to its folder."""
    return both(rows, lambda folder: change(base(folder)))


def row(name: str, change: Callable[[Path], object], *words: str, more: str = "") -> Row:
    return Row(name, "train", f"--data.train rows.jsonl --model.name_or_path base {more}", words, damaged(change))


def weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def made(folder: Path) -> None:
        path = folder / "model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, {"format": "pt"})

    return made


def nan(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")


def lose(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.layers.1.mlp.up_proj.weight"]


def shrink(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.1.mlp.up_proj.weight"] = tensors["model.layers.1.mlp.up_proj.weight"][:5].clone()


def remove(*names: str) -> Callable[[Path], None]:
    return lambda folder: [path.unlink() for name in names for path in folder.glob(name)] and None


def config(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: change_json(folder / "config.json", **changes)


def model_row(name: str, model: str, *words: str, make: Callable[[Path], object] = rows) -> Row:
    return Row(name, "train", f"--data.train rows.jsonl --model.name_or_path {model}", words, make)


NO_TENSORS = both(write("model.safetensors.index.json", {"metadata": {}}), remove("model.safetensors"))

ROWS = [
    model_row(
        "model folder missing",
        "./bsae",
        "model.name_or_path ./bsae",
        "no such folder",
        "Did you mean base",
        make=both(rows, base),
    ),
    model_row(
        "model folder missing, without ./",
        "bsae",
        "'bsae'",
        "cannot be loaded",
        "Did you mean base",
        make=both(rows, base),
    ),
    model_row("model is a file", "rows.jsonl", "model.name_or_path", "rows.jsonl", "folder", make=rows),
    model_row(
        "model is a weights file",
        "base/model.safetensors",
        "model.name_or_path",
        "base/model.safetensors",
        "folder",
        make=both(rows, base),
    ),
    model_row("gguf missing", "model.gguf", "model.name_or_path model.gguf", "no such file"),
    model_row(
        "gguf broken",
        "model.gguf",
        "'model.gguf'",
        "cannot be loaded",
        "reader handles",
        make=both(rows, write("model.gguf", b"GGUF" + bytes(20))),
    ),
    model_row(
        "gguf is a text",
        "model.gguf",
        "'model.gguf'",
        "cannot be loaded",
        "not a GGUF file",
        make=both(rows, write("model.gguf", "hello")),
    ),
    model_row("model of the hub without a hub", "nobody/nothing", "'nobody/nothing'", "cannot be loaded"),
    model_row(
        "model is a run",
        "runs/default",
        "runs/default",
        "export",
        make=both(
            rows,
            write("runs/default/config.json", {"method": "robust", "model": {}}),
            write("runs/default/metrics.jsonl", ""),
        ),
    ),
    model_row(
        "model is an adapter",
        "adapter",
        "model.name_or_path adapter is an adapter",
        "adapter.init_from",
        make=both(rows, adapter),
    ),
    row("folder without config", remove("config.json"), "model.name_or_path 'base'", "config.json"),
    row("config is no JSON", write("config.json", "{"), "base/config.json", "not a valid JSON file"),
    row("unknown architecture", config(model_type="lama5"), "model.name_or_path 'base'", "lama5"),
    row(
        "architecture that is no language model",
        config(model_type="vit", architectures=["ViTModel"]),
        "model.name_or_path 'base'",
        "vit",
    ),
    row("config of other sizes", config(hidden_size=64), "model.name_or_path 'base'", "size"),
    row("config that makes no sense", config(num_attention_heads=0), "'base'", "make no sense", "are they whole"),
    row("no weights", remove("model.safetensors"), "model.name_or_path 'base'", "model.safetensors"),
    row(
        "no weights at stage 3",
        remove("model.safetensors"),
        "model.name_or_path 'base'",
        "model.safetensors",
        more=STAGE_3,
    ),
    row("weights cut", lambda f: cut(f / "model.safetensors"), "model.name_or_path 'base'", "model.safetensors"),
    row(
        "weights cut at stage 3",
        lambda f: cut(f / "model.safetensors"),
        "model.name_or_path 'base'",
        "model.safetensors",
        more=STAGE_3,
    ),
    row(
        "weights are a pointer of git-lfs",
        write("model.safetensors", "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n"),
        "model.name_or_path 'base'",
        "model.safetensors",
    ),
    row("weights empty", write("model.safetensors", ""), "model.name_or_path 'base'", "model.safetensors"),
    row("a weight is NaN", weights(nan), "'base'", "up_proj", "not finite", "get the base again"),
    row(
        "a weight is NaN at stage 3",
        weights(nan),
        "base/model.safetensors",
        "up_proj",
        "not finite",
        "get the base again",
        more=STAGE_3,
    ),
    row("a weight is missing", weights(lose), "'base'", "model.layers.1.mlp.up_proj.weight"),
    row("a weight is missing at stage 3", weights(lose), "'base'", "model.layers.1.mlp.up_proj.weight", more=STAGE_3),
    row("a weight of another shape", weights(shrink), "'base'", "model.layers.1.mlp.up_proj.weight"),
    row(
        "a weight of another shape at stage 3",
        weights(shrink),
        "'base'",
        "model.layers.1.mlp.up_proj.weight",
        more=STAGE_3,
    ),
    row(
        "a shard missing",
        both(
            write(
                "model.safetensors.index.json",
                {"metadata": {}, "weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}},
            ),
            remove("model.safetensors"),
        ),
        "'base'",
        "model-00001-of-00002.safetensors",
    ),
    row("an index that lists nothing", NO_TENSORS, "'base'", "weight_map"),
    row(
        "an index that lists nothing at stage 3", NO_TENSORS, "model.safetensors.index.json", "weight_map", more=STAGE_3
    ),
    row("tokenizer missing", remove("tokenizer*", "chat_template*"), "tokenizer of 'base'", "tokenizer"),
    row("tokenizer broken", write("tokenizer.json", "{"), "tokenizer of 'base'", "tokenizer"),
    row("tokenizer of a larger vocabulary", config(vocab_size=97), "'base'", "97"),
    row(
        "classifier as a language model",
        config(architectures=["LlamaForSequenceClassification"], num_labels=2),
        "'base'",
        "classifier",
        "model.task classification",
    ),
    row(
        "stored quantised",
        config(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
        "'base'",
        "stored quantised",
        "model.quantization",
    ),
    row(
        "stored quantised, unknown method",
        config(quantization_config={"quant_method": "sqz"}),
        "'base'",
        "stored quantised",
        "give the dense model",
    ),
    row(
        "code of its own",
        config(model_type="mine", auto_map={"AutoConfig": "mine.Mine", "AutoModelForCausalLM": "mine.Mine"}),
        "'base'",
        "code of its own, which is never run here",
    ),
    row("chat template broken", write("chat_template.jinja", "{% for %}"), "chat template"),
]
