"""Adapter folders: ours, and PEFT's where a base model says what they leave unsaid.

A folder of ours has ``rosa_adapter.json``. Its tensors are in PEFT's files where PEFT has a format for them, so that PEFT loads the
folder, too; else in ``adapter.safetensors``, with the weights that draws have changed beside it. Version 1 had no such file: it
kept its description in ``adapter_config.json``, and its tensors always in ``adapter.safetensors``.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

from pydantic import ValidationError
from torch import nn

from rosa_ds.adapters import peft_format
from rosa_ds.adapters.stored import AdapterDescription, StoredAdapter
from rosa_ds.config.schema import AdapterConfig
from rosa_ds.config.validation import validation_message
from rosa_ds.utils.files import TensorFiles, link_file, write_json, write_manifest, write_tensors, written_folder
from rosa_ds.utils.json_files import read_json

FORMAT_VERSION = 2
OUR_FILE = "rosa_adapter.json"
TENSOR_FILE = "adapter.safetensors"
BASE_FILES = "base-"
logger = logging.getLogger(__name__)


def open_adapter(folder: Path, model: nn.Module | None = None) -> StoredAdapter:
    """A folder of ours, or for a base ``model`` (which says what PEFT leaves unsaid) of PEFT.

    Raises: ValueError if it is none, or one of PEFT's that no adapter here can be.
    """
    if model is not None and is_peft(folder):
        return peft_format.read_peft(folder, model)
    path = description_file(folder)
    if not path.is_file():
        raise ValueError(f"{folder} is not an adapter folder: it has neither {OUR_FILE} nor {peft_format.CONFIG_FILE}")
    content = read_json(path)
    if content.get("format") != "rosa_ds adapter":
        raise ValueError(f"{path} is not an adapter of rosa_ds")
    version = content.get("format_version")
    if version not in range(1, FORMAT_VERSION + 1):
        raise ValueError(
            f"{path} has format version {version!r}, this rosa_ds reads up to {FORMAT_VERSION}: it was written by a newer one, "
            "update this one (pip install -U rosa-ds), or export the adapter merged where it was made"
        )
    try:
        stops = tuple(int(token) for token in content.get("stop_tokens", ()))
        description = AdapterDescription(AdapterConfig(**content["config"]), content["seed"], content["base"], stops)
        record = None if version == 1 else content["peft"]
        if record is None:
            files = TensorFiles([folder / TENSOR_FILE])
            trained, positions = files.under("trained."), files.under("positions.")
        else:
            trained, positions = peft_format.read_record(folder, record)
    except KeyError as error:
        raise ValueError(f"{path} has no {error}: it is damaged; take the folder from its run again") from None
    except (TypeError, ValidationError) as error:
        fields = list(AdapterConfig.model_fields)
        said = validation_message(error, "config", fields) if isinstance(error, ValidationError) else str(error)
        raise ValueError(
            f"{path} has settings that this rosa_ds does not read ({said}): it is damaged, or a newer one has written it"
        ) from None
    base = TensorFiles(sorted(folder.glob(f"{BASE_FILES}*.safetensors")))
    return StoredAdapter(folder, description, trained, positions, base)


def is_adapter(folder: Path) -> bool:
    """Whether a folder is an adapter's: of ours, of PEFT or of another program with its file's name."""
    return description_file(folder).is_file()


def is_ours(folder: Path) -> bool:
    path = description_file(folder)
    return path.name == OUR_FILE or (path.is_file() and "format" in read_json(path))


def is_peft(folder: Path) -> bool:
    """Whether a folder is PEFT's alone, without what we write beside it."""
    path = description_file(folder)
    return path.name != OUR_FILE and path.is_file() and "peft_type" in read_json(path)


def description_file(folder: Path) -> Path:
    """The file that says what an adapter folder holds, where there is one; of version 1 it has the name of PEFT's."""
    ours = folder / OUR_FILE
    return ours if ours.is_file() else folder / peft_format.CONFIG_FILE


def write_adapter(model: nn.Module, stored: StoredAdapter, base_files: Iterable[Path]) -> None:
    """Write ``stored.folder``, whole or not at all. ``base_files`` are linked. As :func:`rosa_ds.save_adapter`."""
    description = stored.description
    record = None
    with written_folder(stored.folder) as temporary:
        try:
            made = peft_format.peft_folder(model, stored)
            made.write(temporary)
            record = made.record
        except peft_format.NotInPeftError as reason:
            parts = description.config.parts
            if not (parts.everything or parts.resampled):
                logger.info("PEFT does not load %s, which is in a format of our own: %s", stored.folder, reason)
            content = {f"trained.{name}": tensor for name, tensor in stored.trained.items()}
            content |= {f"positions.{name}": positions for name, positions in stored.positions.items()}
            write_tensors(temporary / TENSOR_FILE, content, {"format": "pt"})
        if stored.base:
            write_tensors(temporary / f"{BASE_FILES}00000.safetensors", stored.base)
        for number, path in enumerate(sorted(base_files)):
            link_file(path, temporary / f"{BASE_FILES}{number:05d}.safetensors")
        write_json(
            temporary / OUR_FILE,
            {
                "format": "rosa_ds adapter",
                "format_version": FORMAT_VERSION,
                "config": description.config.model_dump(),
                "seed": description.seed,
                "base": description.base,
                "stop_tokens": list(description.stop_tokens),
                "peft": record,
            },
        )
        write_manifest(temporary)
