"""What an export reads: a finished adapter, or a checkpoint of any step, ranks and stage, as named tensors on the disk."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

from torch import Tensor

from rosa_ds.adapters.state import BASE_FILES, CONFIG_FILE, TENSOR_FILE, AdapterDescription, read_description
from rosa_ds.adapters.subspace import join_bits
from rosa_ds.checkpoints import checkpoint
from rosa_ds.config.schema import AdapterConfig
from rosa_ds.utils.files import TensorFiles, manifest_problem
from rosa_ds.utils.json_files import read_json

MergeBase = Literal["dequantized", "original"]
"""Of a quantised base: merge into the numbers that training saw, or into those that they were made of."""


@dataclasses.dataclass(frozen=True)
class Source:
    """A trained state.

    Attributes:
        folder: where it was found.
        trained: float32 numbers by parameter name; positions: by weight name.
        base: weights that draws have changed, or the change of quantised ones, by name, and ``NAME/residual``.
        tokenizer: folder of the run's tokenizer, if it is there.
    """

    folder: Path
    description: AdapterDescription
    trained: TensorFiles
    positions: TensorFiles
    base: TensorFiles
    tokenizer: Path | None

    def changed(self, name: str) -> Tensor | None:
        """What draws have written to a parameter, in float32 where its residual is there; ``None`` if nothing."""
        if name not in self.base:
            return None
        return join_bits(self.base[name], self.base.get(f"{name}/residual"))


def _check(folder: Path) -> Path:
    if problem := manifest_problem(folder):
        raise ValueError(f"{folder}: {problem}")
    return folder


def _open_adapter(folder: Path) -> Source:
    _check(folder)
    tensors = TensorFiles([folder / TENSOR_FILE])
    base = TensorFiles(sorted(folder.glob(f"{BASE_FILES}*.safetensors")))
    tokenizer = folder.parent / "tokenizer"
    return Source(
        folder,
        read_description(folder),
        tensors.under("trained."),
        tensors.under("positions."),
        base,
        tokenizer if tokenizer.is_dir() else None,
    )


def _files(part: object) -> TensorFiles:
    assert isinstance(part, TensorFiles)
    return part


def _open_checkpoint(folder: Path) -> Source:
    _check(folder)
    saved = checkpoint.load(folder)
    config, run = saved.config, folder.parent.parent
    adapter = {name: value for name, value in config["adapter"].items() if name != "init_from"}
    description = AdapterDescription(
        AdapterConfig(method=config["method"], **adapter), config["training"]["seed"], dict(saved.base)
    )
    tokenizer = run / "tokenizer"
    return Source(
        folder,
        description,
        _files(saved.trained),
        _files(saved.positions),
        _files(saved.base_changes),
        tokenizer if tokenizer.is_dir() else None,
    )


def run_folder(path: Path) -> Path:
    """The run that ``path`` is, or that this adapter or checkpoint lies in."""
    if checkpoint.is_checkpoint(path):
        return path.parent.parent
    return path.parent if (path / CONFIG_FILE).is_file() else path


def open_source(path: str | Path) -> Source:
    """A run's adapter, or where it has none yet its newest good checkpoint; or the adapter or checkpoint ``path`` itself.

    Raises: ValueError: there is none, or it is damaged.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path}: no such folder")
    if not path.is_dir():
        raise ValueError(f"{path} is a file: give the folder of a run, checkpoint or adapter")
    for folder in (path / "adapter", path):
        if (folder / CONFIG_FILE).is_file() and _is_ours(folder):
            return _open_adapter(folder)
    if checkpoint.is_checkpoint(path):
        return _open_checkpoint(path)
    newest = checkpoint.folders(path).newest_good()
    if newest is None and (path / CONFIG_FILE).is_file():
        raise ValueError(
            f"{path} is an adapter of PEFT or of another program: begin a run with it (--adapter.init_from), or merge it with PEFT"
        )
    if newest is None:
        raise ValueError(f"{path} holds no adapter (adapter/{CONFIG_FILE}) and no whole checkpoint")
    return _open_checkpoint(newest)


def _is_ours(folder: Path) -> bool:
    """PEFT's folders have a file of the same name."""
    return "format" in read_json(folder / CONFIG_FILE)
