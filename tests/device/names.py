"""The emulated device's names for PyTorch, and its memory."""

from __future__ import annotations

NAME = "emu"
COLLECTIVES = "emuccl"
DEVICE_BYTES = 8 << 30
