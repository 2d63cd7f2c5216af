"""Model and settings become a DeepSpeed engine."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from rosa_ds import distributed
from rosa_ds.adapters.inject import adapter_parts
from rosa_ds.config import RunConfig
from rosa_ds.ds_config import BITSANDBYTES, DeepSpeedPlan
from rosa_ds.models.quantized import require_bitsandbytes

if TYPE_CHECKING:
    from rosa_ds.training.trained_state import TrainedState

ParameterGroups = dict[str, dict[str, nn.Parameter]]
logger = logging.getLogger(__name__)


def parameter_groups(model: nn.Module) -> ParameterGroups:
    """The trainable parameters by group: ``low_rank`` (A, B), ``sparse`` (values), ``whole``; empty groups left out."""
    kinds = {"A": "low_rank", "B": "low_rank", "values": "sparse"}
    parts = adapter_parts(model)
    groups: ParameterGroups = {"low_rank": {}, "sparse": {}, "whole": {}}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[kinds.get(parts.get(id(parameter), ""), "whole")][name] = parameter
    return {name: group for name, group in groups.items() if group}


def learning_rates(settings: RunConfig) -> dict[str, float]:
    """Base learning rate of each group."""
    return {
        "low_rank": settings.adapter.low_rank_lr,
        "sparse": settings.adapter.sparse_lr,
        "whole": settings.training.learning_rate,
    }


PERSISTENCE = "stage3_param_persistence_threshold"


def keep_vectors_everywhere(model: nn.Module, config: dict[str, Any]) -> None:
    """At stage 3, where the file says nothing else, only norms and biases stay gathered, and never a part of an adapter.

    DeepSpeed's own default of 100,000 numbers would leave most of A, B, values and positions on every rank.
    """
    parts = adapter_parts(model)
    vectors, adapters = [0], []
    for parameter in model.parameters():
        if id(parameter) in parts:
            adapters.append(distributed.full_numel(parameter))
        elif len(distributed.full_shape(parameter)) == 1:
            vectors.append(distributed.full_numel(parameter))
    config["zero_optimization"].setdefault(PERSISTENCE, min([max(vectors), *(size - 1 for size in adapters)]))


def optimizer_class(plan: DeepSpeedPlan) -> Any:
    """Torch's, bitsandbytes' or DeepSpeed's. Raises: ValueError where it cannot run."""
    name, zero = plan.optimizer.name, plan.config["zero_optimization"]
    if name == "DeepSpeedCPUAdam":
        if distributed.device().type != "cpu" and (zero.get("offload_optimizer") or {}).get("device") != "cpu":
            raise ValueError(
                "optimizer DeepSpeedCPUAdam steps on the CPU: use it with zero_optimization.offload_optimizer to cpu, or AdamW"
            )
        from deepspeed.ops.adam import DeepSpeedCPUAdam  # compiles at its first use

        return DeepSpeedCPUAdam
    if name in BITSANDBYTES:
        require_bitsandbytes(f"optimizer {name}")
        if name.startswith("Paged") and distributed.device().type == "cpu":
            raise ValueError(
                f"optimizer {name} moves its state between a GPU and host memory, and there is no GPU: use {name[5:]}"
            )
        import bitsandbytes

        return getattr(bitsandbytes.optim, name)
    return getattr(torch.optim, name)


BUCKET = "reduce_bucket_size"


def settle_zero(model: nn.Module, plan: DeepSpeedPlan) -> None:
    """What the file leaves open and only the injected model decides, written into ``plan.config``.

    Gradients are sent in one bucket that holds all of them, or 500,000,000 numbers: DeepSpeed allocates as many as it is
    told, 1 GB in 16 bits, however few are trained.
    """
    zero = plan.config["zero_optimization"]
    if plan.stage == 3:
        keep_vectors_everywhere(model, plan.config)
    if plan.stage:
        trained = sum(distributed.full_numel(p) for p in model.parameters() if p.requires_grad)
        zero.setdefault(BUCKET, min(500_000_000, trained))


def build_engine(model: nn.Module, settings: RunConfig, plan: DeepSpeedPlan) -> tuple[Any, TrainedState]:
    """Wrap an injected model in a DeepSpeed engine with one parameter group per learning rate.

    Returns: the engine and access to its trained parameters.
    Raises: ValueError if nothing is trainable.
    """
    import deepspeed  # a slow import that only training needs

    from rosa_ds.training.trained_state import TrainedState

    deepspeed.utils.logger.setLevel(logging.WARNING)
    groups = parameter_groups(model)
    if not groups:
        raise ValueError("nothing is trainable: check adapter.rank, adapter.density and adapter.target_modules")
    settle_zero(model, plan)
    rates = learning_rates(settings)
    parameters = [{"params": list(group.values()), "lr": rates[name], "name": name} for name, group in groups.items()]
    optimizer = optimizer_class(plan)(parameters, **plan.optimizer.arguments)
    engine, _, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, config=plan.config)
    state = TrainedState(engine.optimizer, groups)
    state.reset_optimizer(groups)  # some of DeepSpeed's optimizers count a step while they are built
    return engine, state
