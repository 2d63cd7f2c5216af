"""Random numbers that depend on a seed and on what they are for, and on nothing else."""

from __future__ import annotations

import hashlib

import torch


def keyed_generator(seed: int, *key: str | int) -> torch.Generator:
    """A CPU generator that depends on nothing but the seed and the key, e.g. ``(seed, layer name, "A")``.

    Ranks, restarts and the order of calls do not matter: the same key draws the same numbers.
    """
    digest = hashlib.sha256(repr((seed, *key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
