"""Which folder a run may take: a new one, or that of another run."""

from __future__ import annotations

from pathlib import Path

from rosa_ds.checkpoints import deepspeed_format

SAVE_FILE = "save"
"""A user touches it to ask for a checkpoint."""
MARK_FILE = "interrupted.json"

_OUR_FILES = frozenset(
    {
        "config.json",
        "ds_config.json",
        "accounting.json",
        "metrics.jsonl",
        "mask.safetensors",
        MARK_FILE,
        "logs",
        "checkpoints",
        "adapter",
        "tokenizer",
        "tensorboard",
        deepspeed_format.FOLDER,
        SAVE_FILE,
        # beside DeepSpeed's own checkpoints
        "latest",
        "zero_to_fp32.py",
    }
)


def is_ours(path: Path) -> bool:
    """Could a run have made this, also one that was killed while it wrote?"""
    partial = path.name.startswith(".") and path.name.endswith((".partial", ".old"))
    return path.name in _OUR_FILES or partial or deepspeed_format.is_checkpoint(path)


def check_free(folder: Path) -> None:
    """Raise ValueError unless a new run may take this folder: before anything is loaded."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"training.output_dir {folder} is a file: give another folder")
    if folder.is_dir() and any(not is_ours(path) for path in folder.iterdir()):
        raise ValueError(f"training.output_dir {folder} is not empty and holds no run: give another folder")
