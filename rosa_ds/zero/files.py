"""What DeepSpeed's own checkpoint files may hold."""

from __future__ import annotations

from typing import Any


def classes_in_files() -> list[Any]:
    """The only classes that these files may name; anything else in them is refused before it runs."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]
