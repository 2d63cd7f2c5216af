"""Where a base's numbers lie: its weight files, in the order in which transformers looks for them, and a hash of them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    cached_file,
)
from transformers.utils.hub import get_checkpoint_shard_files

from rosa_ds.utils.files import file_hash
from rosa_ds.utils.json_files import read_json

SINGLE, INDEX = SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME
"""Of a model in safetensors: its one file, or the list of its shards."""
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".gguf")
_READ = (SINGLE, INDEX, WEIGHTS_NAME, WEIGHTS_INDEX_NAME)
"""In the order in which transformers looks for them."""
_OTHER_SUFFIXES = (*WEIGHT_SUFFIXES, ".pth", ".pt", ".h5", ".msgpack")
_WHOLE_BYTES, _SAMPLES, _SAMPLE_BYTES = 2**30, 4096, 2**16


def find_safetensors(name: str, revision: str) -> tuple[Path | None, dict[str, Path]]:
    """The single safetensors file of a folder or hub entry, or for each tensor its shard. Both are downloaded.

    As in transformers the single file counts where a folder has both.

    Returns: ``None`` and nothing where there is neither.
    Raises:
        OSError: a file is missing, or cannot be downloaded.
        ValueError: the list of shards is damaged.
    """
    found = [
        cached_file(name, file, revision=revision, _raise_exceptions_for_missing_entries=False)
        for file in (SINGLE, INDEX)
    ]
    single, index = (None if path is None else Path(path) for path in found)
    if single is not None or index is None:
        return single, {}
    shards = _shards(index)
    paths, _ = get_checkpoint_shard_files(name, str(index), revision=revision)
    by_file = {Path(path).name: Path(path) for path in paths}
    return None, {tensor: by_file[Path(file).name] for tensor, file in shards.items()}


def weight_files(folder: Path) -> Sequence[Path]:
    """What transformers would load from a folder; not what else lies there, such as training_args.bin."""
    for name in _READ:
        path = folder / name
        if path.is_file():
            is_index = path.suffix == ".json"
            return [folder / shard for shard in sorted(set(_shards(path).values()))] if is_index else [path]
    return sorted(path for path in folder.iterdir() if path.suffix in WEIGHT_SUFFIXES)


def check_weights(folder: Path) -> None:
    """Raise ValueError for a folder where transformers would find no weights, or not all files of its list of shards."""
    lists = [folder / name for name in _READ]
    found = next((path for path in lists if path.is_file()), None)
    if found is None:
        links = [path for path in lists if path.is_symlink()]
        others = sorted(path.name for path in folder.iterdir() if path.suffix in _OTHER_SUFFIXES)
        if links:
            what = f"{links[0]} is a link to a file that is not there: copy or download that"
        elif any("-of-" in name for name in others):
            what = f"{folder} has shards ({others[0]}) and not {INDEX}, which lists them: copy or download it"
        else:
            there = f", which transformers does not read: {', '.join(others[:4])}" if others else ""
            what = (
                f"{folder} has no {SINGLE} or {WEIGHTS_NAME}{there or ' '}; download the model in transformers' format"
            )
        raise ValueError(what)
    if found.suffix == ".json":
        missing = sorted({name for name in _shards(found).values() if not (folder / name).is_file()})
        if missing:
            raise ValueError(
                f"{found} lists {missing[0]} ({len(missing)} such), which is not there: copy or download the missing files, or the "
                "list of the files that are there"
            )


def _shards(index: Path) -> dict[str, str]:
    """Tensor name -> file name, of an index. Raises: ValueError if it lists none."""
    content = read_json(index)
    shards = content.get("weight_map")
    if not isinstance(shards, dict) or not shards or "metadata" not in content:
        raise ValueError(f"{index} lists no tensors (weight_map, metadata): copy or download it again")
    return shards


def hash_files(files: Sequence[Path]) -> str:
    """SHA-256 over the files' hashes, in their order. Files beyond 1 GiB are sampled, so that it takes seconds for any model."""
    with ThreadPoolExecutor(max_workers=4) as pool:  # hashing leaves the interpreter to others
        return hashlib.sha256("".join(pool.map(_content_hash, files)).encode()).hexdigest()


def _content_hash(path: Path) -> str:
    """SHA-256 of a file's size and content; of a file beyond 1 GiB, 4,096 blocks of 64 KiB spread over it evenly."""
    size = path.stat().st_size
    if size <= _WHOLE_BYTES:
        return file_hash(path)
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as stream:
        for sample in range(_SAMPLES):
            stream.seek((size - _SAMPLE_BYTES) * sample // (_SAMPLES - 1))
            digest.update(stream.read(_SAMPLE_BYTES))
    return digest.hexdigest()
