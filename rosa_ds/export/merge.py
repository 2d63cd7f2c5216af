"""From a finished run to a folder that other programs load."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from rosa_ds.adapters.inject import merge
from rosa_ds.adapters.state import CONFIG_FILE, AdapterDescription, load_adapter, read_description
from rosa_ds.config import ModelSettings
from rosa_ds.files import manifest_problem, write_json, written_folder
from rosa_ds.models.load import identify, load_model, load_tokenizer, stored_dtype

EXPORT_FILE = "rosa_ds.json"


def adapter_folder(path: str | Path) -> Path:
    """The adapter of a run folder, or the folder itself if it is one.

    Raises:
        ValueError: there is none, or it is damaged.
    """
    path = Path(path)
    for folder in (path / "adapter", path):
        if (folder / CONFIG_FILE).is_file():
            if problem := manifest_problem(folder):
                raise ValueError(f"{folder}: {problem}")
            return folder
    if not path.exists():
        raise ValueError(f"{path}: no such folder")
    raise ValueError(f"{path} holds no adapter (adapter/{CONFIG_FILE}): did the run finish? Resume it with --resume")


def base_settings(description: AdapterDescription) -> ModelSettings:
    """Settings that load an adapter's base."""
    base = description.base
    return ModelSettings(name_or_path=base["name_or_path"], revision=base.get("revision"))


def load_adapted(folder: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, AdapterDescription]:
    """The base with its adapter, not merged, in ``dtype`` with a float32 adapter.

    Raises:
        ValueError: the base's weights are not those that the adapter was trained on.
    """
    description = read_description(folder)
    settings = base_settings(description)
    found = identify(settings)
    if description.base.get("hash") not in (None, found["hash"]):
        raise ValueError(
            f"{folder} was trained on other weights than {settings.name_or_path} has now: restore the base, or give its "
            f"path in {CONFIG_FILE}"
        )
    model = load_model(settings, dtype)
    load_adapter(model, folder)
    return model.eval(), description


def load_merged(folder: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, AdapterDescription]:
    """The base in float32 with its adapter folded in, then rounded once to ``dtype``."""
    model, description = load_adapted(folder, torch.float32)
    merge(model)
    for (
        parameter
    ) in model.parameters():  # buffers, such as rotary frequencies, stay in float32 as transformers keeps them
        parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    return model, description


def run_tokenizer(folder: Path, description: AdapterDescription) -> PreTrainedTokenizerBase:
    """The tokenizer that the run trained with, else the base's."""
    saved = folder.parent / "tokenizer"
    return AutoTokenizer.from_pretrained(saved) if saved.is_dir() else load_tokenizer(base_settings(description))


def export_merged(source: str | Path, out: str | Path, dtype: torch.dtype | None) -> Path:
    """Write the merged model as a Hugging Face folder: sharded safetensors, configurations, tokenizer.

    Args:
        source: run or adapter folder.
        out: folder to write; an earlier export in it is replaced.
        dtype: of the weights; ``None`` as the base stores them.

    Raises:
        ValueError: no adapter there, or ``out`` holds anything but an earlier export.
    """
    folder = adapter_folder(source)
    out = _free_folder(out, Path(source))
    description = read_description(folder)
    dtype = dtype or stored_dtype(base_settings(description))
    model, _ = load_merged(folder, dtype)
    with written_folder(out) as temporary:
        model.save_pretrained(temporary)
        run_tokenizer(folder, description).save_pretrained(temporary)
        origin = {
            "base": description.base,
            "method": description.config.method,
            "run": str(source),
            "dtype": str(dtype),
        }
        _sign(temporary, origin)
    return out


def export_adapter(source: str | Path, out: str | Path) -> Path:
    """Copy the adapter alone. Arguments and errors as :func:`export_merged`."""
    folder = adapter_folder(source)
    out = _free_folder(out, Path(source))
    with written_folder(out) as temporary:
        shutil.copytree(folder, temporary, dirs_exist_ok=True)
        _sign(temporary, {"run": str(source), "format": "adapter"})
    return out


def _sign(folder: Path, origin: dict[str, Any]) -> None:
    """Say where an export comes from and which files it has, so that a later one may replace it."""
    files = sorted(path.name for path in folder.iterdir())
    write_json(folder / EXPORT_FILE, {**origin, "files": files})


def _free_folder(out: str | Path, source: Path) -> Path:
    """``out``, if it is not the source, and nothing or only an earlier export of ours is in it."""
    out = Path(out)
    mine, theirs = out.resolve(), source.resolve()
    if mine == theirs or mine in theirs.parents or theirs in mine.parents:
        raise ValueError(f"{out} and {source} are one in the other: give another folder to write")
    if not out.exists():
        return out
    there = {path.name for path in out.iterdir()} if out.is_dir() else {out.name}
    signature = out / EXPORT_FILE
    ours = {EXPORT_FILE, *json.loads(signature.read_text())["files"]} if signature.is_file() else set()
    if there - ours:
        raise ValueError(
            f"{out} holds {sorted(there - ours)[0]}, which is not an earlier export's: give another folder"
        )
    return out
