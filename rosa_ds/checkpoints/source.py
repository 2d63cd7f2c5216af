"""A trained state by the folder of its run: a finished adapter, or a checkpoint of any step, ranks and stage."""

from __future__ import annotations

from pathlib import Path

from rosa_ds.adapters.folder import is_adapter, is_ours, open_adapter
from rosa_ds.adapters.stored import AdapterDescription, StoredAdapter
from rosa_ds.checkpoints import checkpoint
from rosa_ds.config.schema import AdapterConfig
from rosa_ds.utils.files import manifest_problem


def open_source(path: str | Path) -> StoredAdapter:
    """A run's adapter, or where it has none yet its newest good checkpoint; or the adapter or checkpoint ``path`` itself.

    Raises: ValueError: there is none, or it is damaged.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path}: no such folder")
    if not path.is_dir():
        raise ValueError(f"{path} is a file: give the folder of a run, checkpoint or adapter")
    for folder in (path / "adapter", path):
        if is_ours(folder):
            _check(folder)
            return open_adapter(folder)
    if checkpoint.is_checkpoint(path):
        return _open_checkpoint(path)
    newest = checkpoint.folders(path).newest_good()
    if newest is None and is_adapter(path):
        raise ValueError(
            f"{path} is an adapter of PEFT or of another program: begin a run with it (--adapter.init_from), or merge it with PEFT"
        )
    if newest is None:
        raise ValueError(f"{path} holds no adapter (adapter/) and no whole checkpoint")
    return _open_checkpoint(newest)


def _check(folder: Path) -> None:
    if problem := manifest_problem(folder):
        raise ValueError(f"{folder}: {problem}")


def _open_checkpoint(folder: Path) -> StoredAdapter:
    _check(folder)
    saved = checkpoint.load(folder)
    adapter = {name: value for name, value in saved.config["adapter"].items() if name != "init_from"}
    config = AdapterConfig(method=saved.config["method"], **adapter)
    description = AdapterDescription(config, saved.config["training"]["seed"], dict(saved.base))
    return StoredAdapter(folder, description, saved.trained, saved.positions, saved.base_changes)


def run_folder(path: Path) -> Path:
    """The run that ``path`` is, or that this adapter or checkpoint lies in."""
    if checkpoint.is_checkpoint(path):
        return path.parent.parent
    return path.parent if is_adapter(path) else path
