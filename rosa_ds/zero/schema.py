"""DeepSpeed's own schema of its file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from rosa_ds.utils.suggest import did_you_mean


def check_by_deepspeed(config: Mapping[str, Any]) -> None:
    """Raise ValueError for a ZeRO, bf16 or fp16 section that ``deepspeed.initialize`` would refuse, by names and reasons.

    Args:
        config: as it goes to ``deepspeed.initialize``.
    """
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config  # slow
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
