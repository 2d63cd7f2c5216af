"""What a DeepSpeed file's sections may hold: refused before data and model are loaded, by the name of the key."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rosa_ds.utils.suggest import did_you_mean

BATCH_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
# DeepSpeed ignores top-level keys that it does not know; one that nearly matches these is a typing error.
# Source: https://www.deepspeed.ai/docs/config-json/
TOP_LEVEL_KEYS = (
    *BATCH_KEYS,
    "optimizer",
    "scheduler",
    "communication_data_type",
    "prescale_gradients",
    "gradient_predivide_factor",
    "sparse_gradients",
    "fp16",
    "bf16",
    "amp",
    "torch_autocast",
    "gradient_clipping",
    "zero_optimization",
    "steps_per_print",
    "wall_clock_breakdown",
    "dump_state",
    "comms_logger",
    "flops_profiler",
    "activation_checkpointing",
    "sparse_attention",
    "data_efficiency",
    "curriculum_learning",
    "tensorboard",
    "wandb",
    "comet",
    "csv_monitor",
    "elasticity",
    "autotuning",
    "aio",
    "checkpoint",
    "data_types",
    "compression_training",
    "nebula",
    "compile",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    "seed",
    "disable_allgather",
    "hybrid_engine",
    "memory_breakdown",
    "dataloader_drop_last",
    "use_data_before_expert_parallelism",
    "tensor_parallel",
    "pipeline",
)
# Parts of DeepSpeed that want its own data loader, another division of the model, or casts inside the layers.
REFUSED_KEYS = (
    "data_efficiency",
    "curriculum_learning",
    "elasticity",
    "tensor_parallel",
    "pipeline",
    "amp",
    "torch_autocast",
)


def check_keys(config: Mapping[str, Any], settings: Sequence[str]) -> None:
    """Raise ValueError for a top-level key that is misspelt, not supported, or one of our ``settings``."""
    for key in config:
        if key in settings and key not in TOP_LEVEL_KEYS:
            raise ValueError(f'{key!r} in the DeepSpeed file is a setting of ours: put it into the section "rosa"')
        if key not in TOP_LEVEL_KEYS and (hint := did_you_mean(key, TOP_LEVEL_KEYS)):
            raise ValueError(f"unknown key {key!r} in the DeepSpeed file.{hint}")
    for key in REFUSED_KEYS:
        section = config.get(key)
        if section and (not isinstance(section, dict) or section.get("enabled", True)):
            raise ValueError(f"{key!r} of the DeepSpeed file is not supported here: remove it")


def section_of(config: Mapping[str, Any], key: str, example: str, path: str = "") -> dict[str, Any]:
    """A section of the file; nothing where it has none. Raises: ValueError for anything but an object."""
    section = config.get(key)
    if section is None:
        return {}
    if not isinstance(section, dict):
        raise ValueError(f"{path}{key} of the DeepSpeed file is a section such as {example}, given {section!r}")
    return section


def number_of(
    section: Mapping[str, Any], key: str, path: str, least: float = 0.0, below: float = math.inf, whole: bool = False
) -> None:
    """Raise ValueError unless a key is missing, "auto", or a number in [least, below)."""
    value = section.get(key, "auto")
    if value == "auto":
        return
    kinds = (int,) if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not least <= value < below:
        kind = "a whole number" if whole else "a number"
        end = "" if below == math.inf else f" and below {below:g}"
        raise ValueError(f"{path}{key} of the DeepSpeed file is {kind}, {least:g} or more{end}, given {value!r}")


def check_optimizer(params: Mapping[str, Any]) -> None:
    """Raise ValueError for arguments of Adam that are no numbers, or outside of what it computes with."""
    path = "optimizer.params."
    for key in ("lr", "weight_decay", "eps"):
        number_of(params, key, path)
    betas = params.get("betas", "auto")
    if betas == "auto":
        return
    if not isinstance(betas, (list, tuple)) or len(betas) != 2:
        raise ValueError(
            f"{path}betas of the DeepSpeed file is a list of two numbers such as [0.9, 0.999], given {betas!r}"
        )
    for number, beta in enumerate(betas):
        number_of({f"betas[{number}]": beta}, f"betas[{number}]", path, below=1.0)


def check_enabled(section: Mapping[str, Any], key: str) -> None:
    """Raise ValueError unless a section's ``enabled`` is true, false or "auto"."""
    value = section.get("enabled", "auto")
    if value != "auto" and not isinstance(value, bool):
        raise ValueError(f'{key}.enabled of the DeepSpeed file is true, false or "auto", given {value!r}')
