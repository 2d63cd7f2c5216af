"""Folders that a reader finds whole or not at all, the manifest that says so, and safetensors files."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

MANIFEST = "manifest.json"
HASHES_AT_ONCE = 8

Entries = dict[str, dict[str, Any]]
"""File name -> its ``bytes`` and ``sha256``."""


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
            try:
                temporary.rename(target)
            except BaseException:
                old.rename(target)
                raise
            shutil.rmtree(old)
        else:
            temporary.rename(target)
        _fsync(target.parent)
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(f"{target} cannot be written: {error}; nothing of it is left") from error
    finally:
        if temporary.exists():
            shutil.rmtree(temporary)


def sync_folder(folder: Path) -> None:
    """Bring a folder and its files to the disk."""
    sync_files([*sorted(folder.rglob("*")), folder])


def sync_files(paths: Iterable[Path]) -> None:
    """Bring files, or folders' lists of their files, to the disk."""
    for path in paths:
        _fsync(path)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write a small file in one step: a reader sees the old content or the new, never half of it."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        temporary.write_text(text)
        _fsync(temporary)
        temporary.rename(path)
    except OSError as error:  # a full disk names no file
        temporary.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error
    _fsync(path.parent)


def write_json(path: Path, content: Any) -> None:
    """As :func:`write_text`, with indented JSON."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_manifest(folder: Path, entries: Entries | None = None) -> None:
    """Record size and hash of every file in ``folder`` (or what ``entries`` say of them), signed against damage of itself."""
    if entries is None:
        entries = describe_files(path for path in folder.iterdir() if path.is_file() and path.name != MANIFEST)
    write_json(folder / MANIFEST, {"files": entries, "sha256": _signature(entries)})


def describe_files(paths: Iterable[Path]) -> Entries:
    """What a manifest says of these files, read from the disk."""
    files = sorted(paths)
    hashes = file_hashes(files)
    return {
        path.name: {"bytes": path.stat().st_size, "sha256": found} for path, found in zip(files, hashes, strict=True)
    }


def file_hashes(paths: Sequence[Path]) -> list[str]:
    """:func:`file_hash` of each, several at once: hashing releases the interpreter's lock. Raises: OSError of the first."""
    with ThreadPoolExecutor(min(HASHES_AT_ONCE, len(os.sched_getaffinity(0)))) as pool:
        return list(pool.map(file_hash, paths))


def file_hash(path: Path) -> str:
    """SHA-256 of a file's content, hexadecimal. Raises: OSError with the file's name."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    except OSError as error:  # of a disk that fails while it is read: without a name
        raise OSError(error.errno, error.strerror, str(path)) from error
    return digest.hexdigest()


def _signature(entries: Entries) -> str:
    return hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()


def read_manifest(folder: Path) -> Entries:
    """The files of a folder. Raises ValueError if its manifest is missing or damaged."""
    try:
        content = json.loads((folder / MANIFEST).read_text())
        entries: Entries = content["files"]
        # names of files in the folder, never paths that lead out of it
        whole = content["sha256"] == _signature(entries) and all(Path(name).name == name for name in entries)
    except FileNotFoundError:
        raise ValueError(f"{MANIFEST} is missing") from None
    except (ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        raise ValueError(f"{MANIFEST} is damaged")
    return entries


def manifest_problem(folder: Path) -> str | None:
    """What is wrong with a folder by its manifest, or ``None``."""
    try:
        entries = read_manifest(folder)
    except ValueError as problem:
        return str(problem)
    paths = [folder / name for name in entries]
    try:
        for path, entry in zip(paths, entries.values(), strict=True):
            if not path.is_file():
                return f"{path.name} is missing"
            if path.stat().st_size != entry["bytes"]:
                return f"{path.name} has {path.stat().st_size} bytes instead of {entry['bytes']}"
        for path, entry, found in zip(paths, entries.values(), file_hashes(paths), strict=True):
            if found != entry["sha256"]:
                return f"{path.name} does not have the hash that was written"
    except OSError as error:
        return f"{Path(error.filename).name} cannot be read: {error.strerror}"
    return None


def link_file(source: Path, target: Path) -> None:
    """Give a file that nobody changes a second name, or where the file system cannot, make a copy of it."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
        _fsync(target)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file (tensors from any device). Raises OSError where it cannot be written."""
    try:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path, metadata)
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from None


class TensorFiles(Mapping[str, Tensor]):
    """The tensors of several safetensors files by name, each read when it is asked for; ``metadata`` of all files.

    Raises: ValueError for a file that is none, or a name that stands in two of them.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        self._names: dict[str, str] = {}
        self._readers: dict[str, Any] = {}
        self._lengths: Mapping[str, int] = {}
        self.metadata: dict[str, str] = {}
        for path in paths:
            if not path.is_file():
                raise ValueError(f"{path}: {'a folder and not a file' if path.is_dir() else 'no such file'}")
            try:
                reader = safe_open(path, framework="pt").__enter__()
            except SafetensorError as error:
                raise ValueError(f"{path} is not a whole safetensors file: {error}") from None
            self.metadata |= reader.metadata() or {}
            for name in reader.keys():  # noqa: SIM118
                if name in self._readers:
                    raise ValueError(f"{path}: {name} is in another file, too")
                self._readers[name] = reader
                self._names[name] = name

    def __getitem__(self, name: str) -> Tensor:
        own = self._names[name]
        reader, length = self._readers[own], self._lengths.get(name)
        tensor: Tensor = reader.get_tensor(own) if length is None else reader.get_slice(own)[:length]
        return tensor

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor, without reading it."""
        own = self._names[name]
        shape = tuple(self._readers[own].get_slice(own).get_shape())
        return (self._lengths[name], *shape[1:]) if name in self._lengths else shape

    def close(self) -> None:
        """Give the files back; nothing can be read any more. A mapped file cannot be deleted for good on a network disk."""
        self._readers.clear()
        self._names.clear()

    def under(self, prefix: str) -> TensorFiles:
        """The tensors whose names begin with a prefix, by the rest of their names; the files stay this object's."""
        return self.renamed({name.removeprefix(prefix): name for name in self if name.startswith(prefix)})

    def renamed(self, names: Mapping[str, str], lengths: Mapping[str, int] | None = None) -> TensorFiles:
        """The tensors that ``names`` (new -> old) has, by their new names; of some, by new name, so many first rows alone."""
        assert not self._lengths
        part = TensorFiles(())
        part._names = {new: self._names[old] for new, old in names.items()}
        part._readers, part._lengths = self._readers, lengths or {}
        return part

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def check_place(path: Path, what: str) -> None:
    """Raise ValueError unless a file or folder can be made at a path, as far as its nearest parent tells."""
    parent = next(folder for folder in path.absolute().parents if folder.exists())
    if not parent.is_dir():
        raise ValueError(f"{what} {path}: {parent} is a file: give another folder")
    if not os.access(parent, os.W_OK):
        raise ValueError(f"{what} {path}: {parent} cannot be written to: give another folder")


def move_aside(folder: Path) -> Path:
    """Rename ``folder`` to the first free ``folder.1``, ``folder.2``, ... and return the new path."""
    number = 1
    while (target := folder.with_name(f"{folder.name}.{number}")).exists():
        number += 1
    return folder.rename(target)
