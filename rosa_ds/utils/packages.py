"""Packages that only some settings need."""

from __future__ import annotations

import logging


def require_bitsandbytes(wanted_by: str) -> None:
    """Raise ValueError where it is not installed."""
    # its CPU part warns of a kernel for products with 4-bit weights, which is never used here
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise ValueError(f"{wanted_by} needs bitsandbytes: pip install bitsandbytes ({error})") from error
