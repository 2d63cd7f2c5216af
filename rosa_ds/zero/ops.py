"""DeepSpeed's compiled operators."""

from __future__ import annotations


def buildable_ops() -> list[str]:
    """Names of those that can be compiled on this machine."""
    from deepspeed.ops.op_builder.all_ops import ALL_OPS  # slow
    from deepspeed.ops.op_builder.builder import probe_is_compatible  # without the CUDA toolkit a builder's own raises

    return sorted(name for name, builder in ALL_OPS.items() if probe_is_compatible(builder))
