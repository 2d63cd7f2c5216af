"""Triton's interpreter made to treat bfloat16 as a GPU does.

Read in Triton 3.9's ``runtime/interpreter.py``: it holds bfloat16 as uint16; ``tl.dot`` multiplies those integers, and a cast
from float32 cuts the lower bits off where GPUs round to nearest even.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np


def float32_to_bfloat16(numbers: np.ndarray) -> np.ndarray:
    """Bit patterns (uint16) of float32 numbers, rounded to nearest even. NaN stays NaN."""
    bits = np.ascontiguousarray(numbers, dtype=np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(numbers), 0x7FC0, rounded).astype(np.uint16)


def bfloat16_to_float32(patterns: np.ndarray) -> np.ndarray:
    """Float32 numbers of bfloat16 bit patterns (uint16)."""
    return (patterns.astype(np.uint32) << 16).view(np.float32)


@functools.cache
def repair() -> None:
    """Give the interpreter of this process the right bfloat16. Does nothing to code compiled for a GPU."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cast, dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        kinds = (src.dtype.scalar, dst_type.scalar)
        if kinds == (tl.float32, tl.bfloat16):
            return TensorHandle(float32_to_bfloat16(src.data), tl.bfloat16)
        if kinds == (tl.bfloat16, tl.float32):
            return TensorHandle(bfloat16_to_float32(src.data), tl.float32)
        return cast(self, src, dst_type)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        a, b = (
            TensorHandle(bfloat16_to_float32(side.data), tl.float32) if side.dtype.scalar == tl.bfloat16 else side
            for side in (a, b)
        )
        return dot(self, a, b, *rest)

    InterpreterBuilder.cast_impl = cast_impl
    InterpreterBuilder.create_dot = create_dot
