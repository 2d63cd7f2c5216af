"""DeepSpeed's own schema of its file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError
from torch import nn

from rosa_ds.utils.suggest import did_you_mean


def check_by_deepspeed(config: Mapping[str, Any]) -> None:
    """Raise ValueError for what ``deepspeed.initialize`` would refuse, of the ZeRO, bf16 and fp16 sections by names and reasons.

    Args:
        config: as it goes to ``deepspeed.initialize``.
    """
    from deepspeed.runtime.config import DeepSpeedConfig  # slow
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    kinds = {"zero_optimization": DeepSpeedZeroConfig, "bf16": DeepSpeedBF16Config, "fp16": DeepSpeedFP16Config}
    for name, kind in kinds.items():
        try:
            kind(**config.get(name, {}))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            key = ".".join(map(str, first["loc"]))
            hint = did_you_mean(key, kind.model_fields) if first["type"] == "extra_forbidden" else ""
            # what is said of options together has no key, and their values are all of the section
            what, given = (f"{name}.{key}", f", given {first['input']!r}") if key else (name, "")
            raise ValueError(
                f"{what} of the DeepSpeed file: {first['msg'].lower()}{given}.{hint} "
                "Correct it, or remove it for DeepSpeed's default"
            ) from None
    try:
        # the number of ranks is known to DeepSpeed when it has begun, and the sum follows from the rest
        DeepSpeedConfig({key: value for key, value in config.items() if key != "train_batch_size"})
    except Exception as error:  # assertions, types that it computes with, its own
        said = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"DeepSpeed refuses its file: {said}") from error


def leaf_modules(model: nn.Module, zero_optimization: Mapping[str, Any]) -> list[str]:
    """Names of the modules that stage 3 gathers as one by this section's ``leaf_module``."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.utils.z3_leaf_module import apply_zero_leaf_module_config

    found = {
        id(module)
        for module in apply_zero_leaf_module_config(model, DeepSpeedZeroConfig(**zero_optimization).leaf_module)
    }
    return [name for name, module in model.named_modules() if id(module) in found]
