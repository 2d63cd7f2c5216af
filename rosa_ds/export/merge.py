"""From a finished run to a folder that other programs load."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME

from rosa_ds.adapters.folder import is_adapter
from rosa_ds.adapters.inject import inject
from rosa_ds.adapters.quantize import quantize_as
from rosa_ds.checkpoints.source import open_source
from rosa_ds.config.schema import MergeBase, ModelSettings
from rosa_ds.export.adapted import check_base, load_merged, open_adapted, run_tokenizer, settle_generation, stops_of
from rosa_ds.export.peft import write_peft
from rosa_ds.export.stream import MergedRows, write_merged
from rosa_ds.models.convert import NotStreamableError
from rosa_ds.models.load import stored_dtype
from rosa_ds.models.stream import stream_base
from rosa_ds.utils.files import check_place, write_json, written_folder
from rosa_ds.utils.json_files import read_json

logger = logging.getLogger(__name__)
EXPORT_FILE = "rosa_ds.json"


def export_merged(
    path: str | Path, out: str | Path, dtype: torch.dtype | None, merge_base: MergeBase | None = None
) -> Path:
    """Write the merged model as a Hugging Face folder: safetensors like the base's, configurations, tokenizer.

    A base in safetensors is merged as it is read, some rows at a time, without building the model; another one (a ``.gguf``
    file) is loaded whole.

    Args:
        path: run folder, checkpoint or adapter.
        out: folder to write; an earlier export in it is replaced.
        dtype: of the weights; ``None`` each as the base stores it.
        merge_base: of a quantised base; by default ``dequantized``, the numbers that training saw.

    Raises:
        ValueError: no trained state there, a ``merge_base`` that is not there, or ``out`` holds anything but an earlier export.
    """
    source = open_source(path)
    out = _free_folder(out, Path(path))
    settings = check_base(source)
    description = source.description
    chosen = _choose_base(settings, merge_base)
    origin: dict[str, Any] = {
        "base": description.base,
        "method": description.config.method,
        "run": str(path),
        "state": source.folder.name,
        "dtype": "stored" if dtype is None else str(dtype).removeprefix("torch."),
        **({} if chosen is None else {"merge_base": chosen}),
    }
    tokenizer = run_tokenizer(source)
    with written_folder(out) as temporary:
        try:
            model, base = stream_base(settings, dtype or stored_dtype(settings))
            quantize_as(model, settings, torch.float32, description.config.modules_to_save)
            inject(model, description.config, description.seed, draw=None, look=False)
            rows = MergedRows(model, base, source, dtype, chosen or "dequantized")
        except NotStreamableError as reason:
            logger.warning("%s is loaded whole to be merged: %s", settings.name_or_path, reason)
            model = load_merged(source, dtype or stored_dtype(settings), chosen or "dequantized")
            model.config.__dict__.pop("auto_map", None)
            generation, model.generation_config = model.generation_config, GenerationConfig()  # written below
            model.save_pretrained(temporary)
            model.generation_config = generation
        else:
            # not where it was found: the same state gives the same bytes
            said = {key: origin[key] for key in ("base", "method", "dtype", "merge_base") if key in origin}
            metadata = {"format": "pt", "rosa_ds": json.dumps(said)}
            write_merged(rows, temporary, metadata)
            if rows.quantization_error:
                origin["quantization_error"] = rows.quantization_error
                width = max(map(len, rows.quantization_error))
                lines = "\n".join(f"{name:{width}}  {error:.2%}" for name, error in rows.quantization_error.items())
                logger.info("what %s loses of each weight, ‖W − Q‖ / ‖W‖:\n%s", settings.quantization, lines)
            settle_generation(model, source, tokenizer)
            _write_config(model, settings, dtype, temporary)
        if model.can_generate() and model.generation_config is not None:
            # as the base has it: saving it in transformers' way would refuse what contradicts itself
            model.generation_config.to_json_file(temporary / GENERATION_CONFIG_NAME)
        tokenizer.save_pretrained(temporary)
        _sign(temporary, origin)
    return out


def _choose_base(settings: ModelSettings, wanted: MergeBase | None) -> MergeBase | None:
    """What is merged into; ``None`` for a base that was never quantised. Raises: ValueError for what there is not."""
    gguf = settings.name_or_path.endswith(".gguf")
    if wanted is not None and settings.quantization == "none" and not gguf:
        raise ValueError(
            f"--merge-base is for quantised bases, {settings.name_or_path} was used as it is: leave it out"
        )
    if wanted == "original" and gguf:
        raise ValueError(
            f"--merge-base original: {settings.name_or_path} has no other weights than its quantised ones: use dequantized"
        )
    return (wanted or "dequantized") if gguf or settings.quantization != "none" else None


def _write_config(model: PreTrainedModel, settings: ModelSettings, dtype: torch.dtype | None, folder: Path) -> None:
    model.config.dtype = dtype or stored_dtype(settings)
    model.config.architectures = [type(model).__name__]
    model.config.__dict__.pop("auto_map", None)  # code of its own, which this model was not made by, and is not there
    model.config.save_pretrained(folder)


def export_adapter(path: str | Path, out: str | Path) -> Path:
    """Copy the adapter of a finished run alone. Arguments and errors as :func:`export_merged`."""
    source = open_source(path)
    if not is_adapter(source.folder):
        raise ValueError(
            f"{path} has no finished adapter, only checkpoints: finish the run with --resume, or export it merged"
        )
    out = _free_folder(out, Path(path))
    with written_folder(out) as temporary:
        shutil.copytree(source.folder, temporary, dirs_exist_ok=True)
        _sign(temporary, {"run": str(path), "format": "adapter"})
    return out


def export_peft(path: str | Path, out: str | Path, rank: int | None) -> Path:
    """Write a folder that PEFT loads, see :mod:`rosa_ds.export.peft`. Arguments and errors as there and for merging."""
    source = open_source(path)
    out = _free_folder(out, Path(path))
    description = source.description
    tokenizer = run_tokenizer(source)
    model, base = open_adapted(source)
    with written_folder(out) as temporary:
        write_peft(model, base, source, temporary, rank)
        tokenizer.save_pretrained(temporary)
        origin = {"base": description.base, "method": description.config.method, "run": str(path), "format": "peft"}
        _sign(
            temporary, {**origin, "stop_tokens": stops_of(model, source, tokenizer)}
        )  # PEFT's files have no place for them
    return out


def _free_folder(out: str | Path, source: Path) -> Path:
    """``out``, if it is not the source, and nothing or only an earlier export of ours is in it."""
    out = Path(out)
    mine, theirs = out.resolve(), source.resolve()
    if mine == theirs or mine in theirs.parents or theirs in mine.parents:
        raise ValueError(f"{out} and {source} are one in the other: give another folder to write")
    if not out.exists():
        check_place(out, "the export's folder")
        return out
    if not out.is_dir():
        raise ValueError(f"{out} is a file: give another folder to write")
    there = {path.name for path in out.iterdir()}
    signature = out / EXPORT_FILE
    try:
        ours = {EXPORT_FILE, *read_json(signature)["files"]} if signature.is_file() else set()
    except (ValueError, KeyError, TypeError):
        raise ValueError(
            f"{signature} is damaged, so {out} may hold more than an export: give another folder"
        ) from None
    if there - ours:
        raise ValueError(
            f"{out} holds {sorted(there - ours)[0]}, which is not an earlier export's: give another folder"
        )
    return out


def _sign(folder: Path, origin: dict[str, Any]) -> None:
    """Say where an export comes from and which files it has, so that a later one may replace it."""
    files = sorted(path.name for path in folder.iterdir())
    write_json(folder / EXPORT_FILE, {**origin, "files": files})
