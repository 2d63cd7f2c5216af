"""Packages that only some settings need."""

from __future__ import annotations

import logging

import torch
from packaging.version import Version

OLDEST_TORCH_ON_GPUS = "2.8"  # the first with a Triton that compiles every kernel


def torch_for_gpus() -> str:
    """What is wrong with this torch where it computes on a GPU; empty where nothing is."""
    if not torch.cuda.is_available() or Version(torch.__version__).release >= Version(OLDEST_TORCH_ON_GPUS).release:
        return ""
    return (
        f"GPUs need torch {OLDEST_TORCH_ON_GPUS} or newer, installed is {torch.__version__}: "
        f"pip install 'torch>={OLDEST_TORCH_ON_GPUS}'"
    )


def require_bitsandbytes(wanted_by: str) -> None:
    """Raise ValueError where it is not installed."""
    # its CPU part warns of a kernel for products with 4-bit weights, which is never used here
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise ValueError(f"{wanted_by} needs bitsandbytes: pip install bitsandbytes ({error})") from error
