"""Bad adapters and masks to begin with."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from errors.rows import Row, adapter, both, change_json, cut, mask, write, write_rows

rows = write_rows("rows.jsonl")
SAME = "--adapter.rank 2 --adapter.density 0.001"


def started(name: str, change: Callable[[Path], object], *words: str, more: str = "") -> Row:
    """A run that begins with an adapter."""
    make = both(rows, change)
    return Row(name, "train", f"--data.train rows.jsonl --adapter.init_from adapter {more}", words, make)


def masked(name: str, change: Callable[[Path], object], *words: str, more: str = SAME) -> Row:
    """A run that loads a mask."""
    make = both(rows, change)
    return Row(name, "train", f"--data.train rows.jsonl --mask.load mask.safetensors {more}", words, make)


def peft(folder: Path, **config: Any) -> None:
    (folder / "adapter").mkdir()
    said = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4, **config}
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(said))
    q = "base_model.model.model.layers.0.self_attn.q_proj"
    tensors = {f"{q}.lora_A.weight": torch.ones(2, 160), f"{q}.lora_B.weight": torch.ones(160, 2)}
    save_file(tensors, folder / "adapter" / "adapter_model.safetensors")


FIRST = "model.layers.0.self_attn.q_proj.weight"
ROWS = [
    started("start missing", lambda f: None, "adapter.init_from adapter", "no such folder"),
    started(
        "start is empty", lambda f: (f / "adapter").mkdir(), "adapter", "not an adapter folder", "adapter_config.json"
    ),
    started(
        "start's tensors missing",
        lambda f: (adapter(f) / "adapter_model.safetensors").unlink(),
        "adapter_model.safetensors",
        "no such file",
    ),
    started(
        "start's tensors cut",
        lambda f: cut(adapter(f) / "adapter_model.safetensors"),
        "adapter_model.safetensors",
        "not a whole safetensors file",
    ),
    started(
        "start's config is no JSON",
        lambda f: (adapter(f), write("adapter/rosa_adapter.json", "{")(f)),
        "rosa_adapter.json",
        "not JSON",
    ),
    started(
        "start's config is a list",
        lambda f: (adapter(f), write("adapter/rosa_adapter.json", "[]")(f)),
        "rosa_adapter.json",
    ),
    started(
        "start's config lacks settings",
        lambda f: (
            adapter(f),
            write("adapter/rosa_adapter.json", {"format": "rosa_ds adapter", "format_version": 2})(f),
        ),
        "rosa_adapter.json",
        "config",
    ),
    started(
        "start of a newer format",
        lambda f: change_json(adapter(f) / "rosa_adapter.json", format_version=9),
        "format version 9",
        "reads up to 2",
        "update",
    ),
    started(
        "start has a setting of a newer version",
        lambda f: change_json(adapter(f) / "rosa_adapter.json", config={"method": "robust", "rank": 2, "wings": 3}),
        "rosa_adapter.json",
        "wings",
    ),
    started(
        "start that PEFT has saved again",
        lambda f: (adapter(f), change_json(f / "adapter" / "adapter_config.json", lora_alpha=5.0)),
        "adapter/adapter_config.json",
        "saved again with PEFT",
        "Remove rosa_adapter.json",
    ),
    started(
        "start without PEFT's config",
        lambda f: (adapter(f) / "adapter_config.json").unlink(),
        "adapter has no adapter_config.json",
        "take it from its run again",
    ),
    started(
        "start of version 1 that is damaged",
        lambda f: write("adapter/adapter_config.json", {"format": "rosa_ds adapter", "format_version": 1})(f),
        "adapter_config.json",
        "config",
    ),
    started(
        "start of another method",
        adapter,
        "holds method robust",
        "given is lora",
        "--method robust",
        more="--method lora",
    ),
    started("start of another rank", adapter, "rank 2, 8 is given", "leave out", more="--adapter.rank 8"),
    started("start of another base", lambda f: adapter(f, hash="0" * 64), "was trained on other weights", "tiny"),
    started("start of a subspace run", lambda f: adapter(f, method="subspace", hash=None), "adapter"),
    started(
        "PEFT of another type",
        lambda f: peft(f, peft_type="IA3"),
        "peft_type IA3",
        "LORA, SUPERTUNING, SHIRA",
        "merge it with PEFT",
    ),
    started("PEFT with DoRA", lambda f: peft(f, use_dora=True), "use_dora True", "merge it with PEFT"),
    started(
        "PEFT without alpha",
        lambda f: peft(f, lora_alpha=None),
        "adapter_config.json",
        "lora_alpha",
        "save the adapter with PEFT again",
    ),
    started(
        "PEFT cut",
        lambda f: (peft(f), cut(f / "adapter" / "adapter_model.safetensors")),
        "adapter_model.safetensors",
        "not a whole safetensors file",
    ),
    started(
        "PEFT without tensors",
        lambda f: (peft(f), (f / "adapter" / "adapter_model.safetensors").unlink()),
        "adapter_model.safetensors",
        "no such file",
    ),
    masked("mask missing", lambda f: mask(f, "mask2.safetensors"), "mask.safetensors", "no such file"),
    masked(
        "mask is a folder", lambda f: (f / "mask.safetensors").mkdir(), "mask.safetensors", "a folder and not a file"
    ),
    masked("mask cut", lambda f: cut(mask(f)), "mask.safetensors", "not a whole safetensors file"),
    masked(
        "mask is an adapter",
        lambda f: (adapter(f) / "adapter_model.safetensors").rename(f / "mask.safetensors"),
        "is not a mask",
        "mask.load takes",
    ),
    masked(
        "mask with metadata of its own",
        lambda f: save_file({"a": torch.zeros(1)}, f / "mask.safetensors", {"rosa_ds": "mask"}),
        "is not a mask",
        "mask.load takes",
    ),
    masked(
        "mask in the folder that moves aside",
        lambda f: (f / "run").mkdir() or mask(f, "run/mask.safetensors"),
        "run/mask.safetensors lies in training.output_dir run",
        "another training.output_dir",
        more=f"{SAME} --mask.load run/mask.safetensors --training.output_dir run",
    ),
    masked(
        "mask of another density",
        mask,
        "mask.safetensors",
        "adapter.density",
        more="--adapter.rank 2 --adapter.density 0.01",
    ),
    masked("mask unsorted", lambda f: mask(f, **{FIRST: torch.arange(25, -1, -1, dtype=torch.int32)}), FIRST, "sorted"),
    masked(
        "mask beyond the matrix",
        lambda f: mask(f, **{FIRST: torch.arange(10**6, 10**6 + 26, dtype=torch.int32)}),
        FIRST,
    ),
    masked("mask of floats", lambda f: mask(f, **{FIRST: torch.arange(26.0)}), FIRST, "int32"),
    masked(
        "mask of another model",
        lambda f: mask(f, **{"transformer.h.0.attn.c_attn.weight": torch.arange(3, dtype=torch.int32)}),
        "transformer.h.0.attn.c_attn.weight",
        "no sparse part",
    ),
    masked(
        "mask of other targets", mask, "mask", "no sparse part here", more=SAME + " --adapter.target_modules q_proj"
    ),
]
