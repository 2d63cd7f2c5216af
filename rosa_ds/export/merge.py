"""From a finished run to a folder that other programs load."""

from __future__ import annotations

import shutil
from pathlib import Path

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
    return model.to(dtype), description


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
        ValueError: no adapter there, or ``out`` holds something.
    """
    folder, out = adapter_folder(source), _free_folder(out)
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
        write_json(temporary / EXPORT_FILE, origin)
    return out


def export_adapter(source: str | Path, out: str | Path) -> Path:
    """Copy the adapter alone, Arguments and errors as :func:`export_merged`."""
    folder, out = adapter_folder(source), _free_folder(out)
    with written_folder(out) as temporary:
        shutil.copytree(folder, temporary, dirs_exist_ok=True)
    return out


def _free_folder(out: str | Path) -> Path:
    """``out``, if nothing but an earlier export of ours is in it."""
    out = Path(out)
    ours = (EXPORT_FILE, CONFIG_FILE)
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not any((out / name).is_file() for name in ours))):
        raise ValueError(f"{out} exists and holds no earlier export: give another folder")
    return out
