"""What a run sets of torch before it first uses a GPU: its allocator, and arithmetic that is the same bit for bit."""

from __future__ import annotations

import logging
import os
import sys

import torch
from packaging.version import Version

logger = logging.getLogger(__name__)
ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""The second is what torch before 2.9 reads, and later ones where the first is not set."""
_EXPANDABLE = "expandable_segments:True"


def choose_allocator() -> None:
    """Have torch's allocator grow the segments that it has, since no two micro-batches have rows of one length: pieces of other
    lengths are of no use to it, and stay taken. Not where a user has chosen anything, or it cannot be done.
    """
    chosen = next((name for name in ALLOCATOR if name in os.environ), None)
    if chosen is not None:
        logger.info("GPU memory: %s=%s, as given", chosen, os.environ[chosen])
    elif has_expandable_segments() and not torch.cuda.is_initialized():
        name = ALLOCATOR[0 if Version(torch.__version__) >= Version("2.9") else 1]
        os.environ[name] = _EXPANDABLE
        logger.info("GPU memory: %s=%s, since row lengths vary", name, _EXPANDABLE)


def has_expandable_segments() -> bool:
    """Whether torch is built for NVIDIA's GPUs on Linux; for others its allocator warns and goes on without."""
    return sys.platform == "linux" and torch.version.cuda is not None
