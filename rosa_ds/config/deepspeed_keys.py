"""What becomes of each top-level key of a DeepSpeed file: it has its effect, it is refused, or it has none, which is said.

Source: what ``DeepSpeedConfig`` reads (a test compares), and https://www.deepspeed.ai/docs/config-json/.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from rosa_ds.config.deepspeed_sections import take_section_keys
from rosa_ds.config.schema import RunConfig
from rosa_ds.utils.suggest import did_you_mean

logger = logging.getLogger(__name__)

BATCH_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
EFFECT = frozenset(
    {
        *BATCH_KEYS,
        "activation_checkpointing",
        "bf16",
        "checkpoint",
        "comms_logger",
        "communication_data_type",
        "compile",
        "data_types",
        "disable_python_gc",
        "dump_state",
        "flops_profiler",
        "fp16",
        "gradient_allreduce_op",
        "gradient_clipping",
        "gradient_predivide_factor",
        "log_level",
        "memory_breakdown",
        "optimizer",
        "prescale_gradients",
        "scheduler",
        "steps_per_print",
        "timers",
        "wall_clock_breakdown",
        "zero_allow_untested_optimizer",
        "zero_force_ds_cpu_optimizer",
        "zero_optimization",
    }
)
"""Keys with their effect, and sections of which each key has its own fate."""
_DIVIDES = "the model is divided over the ranks by ZeRO alone"
_LOADS = "rows and their order are those of the section rosa's data"
REFUSED = {
    "amp": "give bf16 or fp16",
    "autotuning": "rosa-ds plan finds what fits",
    "bfloat16": "it is called bf16",
    "compression_training": "the base stays as it is, or is quantised by model.quantization",
    "curriculum_learning": _LOADS,
    "data_efficiency": _LOADS,
    "datastates_ckpt": "checkpoints are those of the section rosa's checkpoint",
    "eigenvalue": "it belongs to DeepSpeed's own compression",
    "elasticity": "a run resumes on any number of ranks by itself",
    "expert_parallel": _DIVIDES,
    "graph_harvesting": "steps are not captured as graphs",
    "hybrid_engine": "nothing is generated while training",
    "managed_gradient_accumulation": "a step counts its micro-batches itself",
    "nebula": "checkpoints are those of the section rosa's checkpoint",
    "pipeline": _DIVIDES,
    "progressive_layer_drop": "every layer is trained at every step",
    "quantize_training": "the base is quantised by model.quantization",
    "sparse_attention": "attention is chosen by model.attn_implementation",
    "sparse_gradients": "gradients of embeddings are dense",
    "tensor_parallel": _DIVIDES,
    "torch_autocast": "give bf16 or fp16",
    "weight_quantization": "the base is quantised by model.quantization",
}
"""Key -> what to do instead."""
_METRICS = "metrics.jsonl and training.tensorboard have what a step did"
WITHOUT_EFFECT = {
    "aio": "only offloading to NVMe reads it, which is not supported",
    "comet": _METRICS,
    "csv_monitor": _METRICS,
    "dataloader_drop_last": _LOADS,
    "disable_allgather": "DeepSpeed itself has given it up",
    "seed": "training.seed decides",
    "seq_parallel_communication_data_type": _DIVIDES,
    "tensorboard": _METRICS,
    "use_data_before_expert_parallelism": _DIVIDES,
    "vocabulary_size": "the model has its own",
    "wandb": _METRICS,
}
"""Key -> what has the effect instead."""
KNOWN = EFFECT | REFUSED.keys() | WITHOUT_EFFECT.keys()
STAGE3_NAMES = (
    "prefetch_bucket_size",
    "param_persistence_threshold",
    "model_persistence_threshold",
    "max_live_parameters",
    "max_reuse_distance",
    "gather_16bit_weights_on_model_save",
    "module_granularity_threshold",
    "use_all_reduce_for_fetch_params",
    "allgather_sequential",
)
"""DeepSpeed takes these with ``stage3_`` before them, too; here that is their one name."""
ZERO_OPTIONS = frozenset(
    {
        *STAGE3_NAMES,
        *(f"stage3_{name}" for name in STAGE3_NAMES),
        "allgather_bucket_size",
        "allgather_partitions",
        "compute_grad_norm",
        "contiguous_gradients",
        "cpu_offload",
        "cpu_offload_param",
        "cpu_offload_use_pin_memory",
        "elastic_checkpoint",
        "enable_sanity_checks",
        "ignore_unused_parameters",
        "leaf_module",
        "legacy_stage1",
        "load_from_fp32_weights",
        "log_trace_cache_warnings",
        "memory_efficient_linear",
        "offload_optimizer",
        "offload_param",
        "overlap_comm",
        "override_module_apply",
        "parameter_alignment",
        "pipeline_loading_checkpoint",
        "reduce_bucket_size",
        "reduce_scatter",
        "round_robin_gradients",
        "save_muon_momentum_buffer_in_memory",
        "stage",
        "stage3_gather_fp16_weights_on_model_save",
        "sub_group_size",
        "use_multi_rank_bucket_allreduce",
        "zenflow",
        "zero_hpz_partition_size",
        "zero_quantized_gradients",
        "zero_quantized_nontrainable_weights",
        "zero_quantized_weights",
    }
)
"""What stands in the section ``zero_optimization``, and is looked for where it stands a level too high."""


def take_keys(config: dict[str, Any]) -> None:
    """Remove from a DeepSpeed file what has no effect or is switched off, and say the former.

    Raises: ValueError for a key that is misspelt, stands at the wrong place, is not supported, or is a setting of ours.
    """
    take_section_keys(config)
    for key in [*config]:
        if key in EFFECT:
            continue
        value = config.pop(key)
        if key in REFUSED:
            if _is_on(value):
                raise ValueError(f"{key!r} of the DeepSpeed file is not supported here ({REFUSED[key]}): remove it")
        elif key in WITHOUT_EFFECT:
            if _is_on(value):
                logger.warning("setting without effect: %s of the DeepSpeed file (%s)", key, WITHOUT_EFFECT[key])
        elif key in RunConfig.model_fields:
            raise ValueError(f'{key!r} in the DeepSpeed file is a setting of ours: put it into the section "rosa"')
        elif key in ZERO_OPTIONS:
            raise ValueError(f"{key!r} of the DeepSpeed file belongs into its section zero_optimization: move it there")
        elif key.startswith(("_", "#", "/")):  # a comment
            continue
        elif hint := did_you_mean(key, KNOWN):
            raise ValueError(f"unknown key {key!r} in the DeepSpeed file.{hint}")
        else:
            logger.warning("setting without effect: %s of the DeepSpeed file (DeepSpeed knows no such key)", key)


def _is_on(value: Any) -> bool:
    switched_off = isinstance(value, Mapping) and value.get("enabled", True) is False
    return value not in (None, False, "auto", {}, [], 0) and not switched_off
