"""Writing folders so that a reader finds all of one or nothing of it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

MANIFEST = "manifest.json"


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Bring a folder and its files to the disk."""
    for path in sorted(folder.rglob("*")):
        _fsync(path)
    _fsync(folder)


@contextlib.contextmanager
def written_folder(target: Path) -> Iterator[Path]:
    """A temporary folder beside ``target`` that becomes ``target`` when the block ends without an error.

    All files reach the disk before the rename. An existing ``target`` is replaced only then. After an error
    nothing of the temporary folder is left.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}.partial"
    temporary.mkdir()
    try:
        yield temporary
        sync_folder(temporary)
        if target.exists():
            old = target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}.old"
            target.rename(old)
            temporary.rename(target)
            shutil.rmtree(old)
        else:
            temporary.rename(target)
        _fsync(target.parent)
    finally:
        if temporary.exists():
            shutil.rmtree(temporary)


def write_text(path: Path, text: str) -> None:
    """Write a small file in one step: a reader sees the old content or the new, never half of it."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    temporary.write_text(text)
    _fsync(temporary)
    temporary.rename(path)
    _fsync(path.parent)


def write_json(path: Path, content: Any) -> None:
    """As :func:`write_text`, with indented JSON."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def file_hash(path: Path) -> str:
    """SHA-256 of a file's content, hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_manifest(folder: Path) -> None:
    """Record size and hash of every file in ``folder``."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.name != MANIFEST)
    entries = {path.name: {"bytes": path.stat().st_size, "sha256": file_hash(path)} for path in files}
    write_json(folder / MANIFEST, {"files": entries})


def manifest_problem(folder: Path) -> str | None:
    """What is wrong with a folder by its manifest, or ``None``."""
    try:
        entries = json.loads((folder / MANIFEST).read_text())["files"]
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (ValueError, KeyError, TypeError):
        return f"{MANIFEST} is damaged"
    for name, entry in entries.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != entry["bytes"]:
            return f"{name} has {path.stat().st_size} bytes instead of {entry['bytes']}"
        if file_hash(path) != entry["sha256"]:
            return f"{name} does not have the hash that was written"
    return None


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file (tensors from any device). Raises OSError where it cannot be written."""
    try:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path, metadata)
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from None


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file.

    Raises:
        ValueError: the file is missing or no safetensors file.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt") as reader:
            return {name: reader.get_tensor(name) for name in reader.keys()}, reader.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from None


def move_aside(folder: Path) -> Path:
    """Rename ``folder`` to the first free ``folder.1``, ``folder.2``, ... and return the new path."""
    number = 1
    while (target := folder.with_name(f"{folder.name}.{number}")).exists():
        number += 1
    return folder.rename(target)
