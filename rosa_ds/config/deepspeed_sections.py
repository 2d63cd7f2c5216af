"""What becomes of each key inside of a section of a DeepSpeed file, as :mod:`rosa_ds.config.deepspeed_keys` says of its sections.

Sections that are refused, or without effect, are so with all that is in them. Source: what DeepSpeed reads (a test compares).
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

from rosa_ds.utils.suggest import did_you_mean

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Section:
    """The keys of a section.

    Attributes:
        effect: have theirs.
        refused: key -> the value that changes nothing, and why there is no other.
        without_effect: key -> what has the effect instead.
    """

    effect: frozenset[str]
    refused: Mapping[str, tuple[Any, str]] = dataclasses.field(default_factory=dict)
    without_effect: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def known(self) -> frozenset[str]:
        return self.effect | self.refused.keys() | self.without_effect.keys()


_CHECKPOINTS = "checkpoints are those of the section rosa's checkpoint"
_DIVIDED = "DeepSpeed divides them over the ranks of one model, and here each rank has all of it"
_MASTERS = "masters are float32"
_DEEPCOMPILE = "its passes send gradients in another way than masks, masters and checkpoints are read by"
_SCHEDULE = "the schedule is ours"
_BUFFERS = "buffers have the type that transformers gives them"
SECTIONS = {
    "activation_checkpointing": Section(
        effect=frozenset({"cpu_checkpointing"}),
        without_effect={
            "partition_activations": _DIVIDED,
            "contiguous_memory_optimization": _DIVIDED,
            "number_checkpoints": _DIVIDED,
            "profile": "the section flops_profiler measures a step",
            "synchronize_checkpoint_boundary": "torch recomputes, and waits for nothing",
        },
    ),
    "bf16": Section(
        effect=frozenset({"enabled", "immediate_grad_update"}),
        refused={
            "bf16_master_weights_and_grads": (False, _MASTERS),
            "bf16_optimizer_states": (False, "moments are float32, or in 8 bits with AdamW8bit"),
            "check_grad_overflow": (True, "a step whose gradients are not finite is left out by it"),
        },
    ),
    "checkpoint": Section(
        effect=frozenset(),
        refused={"load_universal": (False, "--resume goes on with any number of ranks and any stage")},
        without_effect=dict.fromkeys(
            ("checkpoint_serialization", "parallel_write", "tag_validation", "use_node_local_storage", "writer"),
            _CHECKPOINTS,
        ),
    ),
    "comms_logger": Section(effect=frozenset({"enabled", "prof_all", "prof_ops", "verbose", "debug"})),
    "compile": Section(
        effect=frozenset({"enabled", "backend"}),  # of DeepSpeed's older versions; later ones leave them to the program
        refused={
            "deepcompile": (False, _DEEPCOMPILE),
            "autoep_non_moe": (False, "experts are not divided over the ranks"),
            "passes": (None, _DEEPCOMPILE),
        },
        without_effect=dict.fromkeys(
            (
                "debug_log",
                "double_buffer",
                "free_activation",
                "free_activation_threshold",
                "keep_all_input_tensors",
                "keep_int_input_tensors",
                "offload_activation",
                "offload_activation_pin_memory",
                "offload_opt_states",
                "offload_parameters",
                "symmetric_memory",
                "sync_after_allgather",
                "sync_after_reduce",
                "sync_before_allgather",
                "sync_before_reduce",
            ),
            "deepcompile alone reads it, which is not supported",
        ),
    ),
    "data_types": Section(
        effect=frozenset({"grad_accum_dtype"}),
        refused={
            "param_dtype": (None, "give bf16 or fp16"),
            "buffer_dtype": (None, _BUFFERS),
            "keep_in_fp32_modules": ("auto", _BUFFERS),
        },
    ),
    "flops_profiler": Section(
        effect=frozenset(
            {
                "enabled",
                "recompute_fwd_factor",
                "profile_step",
                "module_depth",
                "top_modules",
                "detailed",
                "output_file",
            }
        )
    ),
    "fp16": Section(
        effect=frozenset(
            {"enabled", "loss_scale", "initial_scale_power", "loss_scale_window", "hysteresis"}
            | {"consecutive_hysteresis", "min_loss_scale"}
        ),
        refused={"fp16_master_weights_and_grads": (False, _MASTERS)},
        without_effect={"auto_cast": "the model's inputs are numbers of tokens"},
    ),
    "optimizer": Section(
        effect=frozenset({"type", "params"}),
        without_effect={"legacy_fusion": "optimizer.type decides how it is computed"},
    ),
    "optimizer.params": Section(
        effect=frozenset({"lr", "weight_decay", "betas", "eps", "amsgrad", "adam_w_mode"}),
        refused={
            "bias_correction": (True, "moments are always corrected"),
            "fp32_optimizer_states": (True, "moments are float32, or in 8 bits with AdamW8bit"),
        },
        without_effect={
            "set_grad_none": "DeepSpeed's engine lets go of gradients",
            "torch_adam": "optimizer.type decides how it is computed",
        },
    ),
    "scheduler": Section(effect=frozenset({"type", "params"})),
    "scheduler.params": Section(
        effect=frozenset({"warmup_num_steps"}),
        without_effect=dict.fromkeys(
            (
                "cos_min_ratio",
                "last_batch_iteration",
                "total_num_steps",
                "warmup_max_lr",
                "warmup_min_lr",
                "warmup_min_ratio",
                "warmup_type",
            ),
            _SCHEDULE,
        ),
    ),
    "timers": Section(effect=frozenset({"throughput"})),
    "timers.throughput": Section(effect=frozenset({"enabled", "synchronized"})),
}


def take_section_keys(config: dict[str, Any]) -> None:
    """Remove from the sections of a DeepSpeed file what has no effect or changes nothing, and say the former.

    Sections that are none (their value is no object) are left for others to refuse.

    Raises: ValueError for a key that is not known or not supported.
    """
    for path, keys in SECTIONS.items():
        section: Any = config
        for part in path.split("."):
            section = section.get(part) if isinstance(section, dict) else None
        if not isinstance(section, dict) or (section.get("enabled", True) is False and path not in ("bf16", "fp16")):
            continue
        for key, value in [*section.items()]:
            if key in keys.effect:
                continue
            del section[key]
            what = f"{path}.{key} of the DeepSpeed file"
            if key in keys.refused:
                harmless, why = keys.refused[key]
                if value not in (None, "auto", harmless):
                    raise ValueError(f"{what}: {value!r} is not supported here ({why}): remove it")
            elif key in keys.without_effect:
                if value not in (None, "auto", False, {}):
                    logger.warning("setting without effect: %s (%s)", what, keys.without_effect[key])
            elif not key.startswith(("_", "#", "/")):  # a comment
                raise ValueError(
                    f"{what} is not known: {path} has {', '.join(sorted(keys.known))}.{did_you_mean(key, keys.known)}"
                )
