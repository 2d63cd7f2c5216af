"""Adapter folders: ours, and PEFT's where a base model says what they leave unsaid."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from pydantic import ValidationError
from torch import nn

from rosa_ds.adapters.peft_format import is_peft, read_peft
from rosa_ds.adapters.stored import AdapterDescription, StoredAdapter
from rosa_ds.config.schema import AdapterConfig
from rosa_ds.config.validation import validation_message
from rosa_ds.utils.files import TensorFiles, link_file, write_json, write_manifest, write_tensors, written_folder
from rosa_ds.utils.json_files import read_json

FORMAT_VERSION = 1
CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter.safetensors"
BASE_FILES = "base-"


def open_adapter(folder: Path, model: nn.Module | None = None) -> StoredAdapter:
    """A folder of ours, or for a base ``model`` (which says what PEFT leaves unsaid) of PEFT.

    Raises: ValueError if it is none, or one of PEFT's that no adapter here can be.
    """
    if model is not None and is_peft(folder):
        return read_peft(folder, model)
    description = _read_description(folder)
    content = TensorFiles([folder / TENSOR_FILE])
    base = TensorFiles(sorted(folder.glob(f"{BASE_FILES}*.safetensors")))
    return StoredAdapter(folder, description, content.under("trained."), content.under("positions."), base)


def _read_description(folder: Path) -> AdapterDescription:
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise ValueError(f"{folder} is not an adapter folder: it has no {CONFIG_FILE}")
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
        return AdapterDescription(AdapterConfig(**content["config"]), content["seed"], content["base"])
    except KeyError as error:
        raise ValueError(f"{path} has no {error}: it is damaged; take the folder from its run again") from None
    except (TypeError, ValidationError) as error:
        fields = list(AdapterConfig.model_fields)
        said = validation_message(error, "config", fields) if isinstance(error, ValidationError) else str(error)
        raise ValueError(
            f"{path} has settings that this rosa_ds does not read ({said}): it is damaged, or a newer one has written it"
        ) from None


def write_adapter(stored: StoredAdapter, base_files: Iterable[Path]) -> None:
    """Write ``stored.folder``, whole or not at all. ``base_files`` are linked, see :func:`rosa_ds.save_adapter`."""
    description = stored.description
    with written_folder(stored.folder) as temporary:
        content = {f"trained.{name}": tensor for name, tensor in stored.trained.items()}
        content |= {f"positions.{name}": positions for name, positions in stored.positions.items()}
        write_tensors(temporary / TENSOR_FILE, content, {"format": "pt"})
        if stored.base:
            write_tensors(temporary / f"{BASE_FILES}00000.safetensors", stored.base)
        for number, path in enumerate(sorted(base_files)):
            link_file(path, temporary / f"{BASE_FILES}{number:05d}.safetensors")
        write_json(
            temporary / CONFIG_FILE,
            {
                "format": "rosa_ds adapter",
                "format_version": FORMAT_VERSION,
                "config": description.config.model_dump(),
                "seed": description.seed,
                "base": description.base,
            },
        )
        write_manifest(temporary)
