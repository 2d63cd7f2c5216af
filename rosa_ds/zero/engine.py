"""A model and a plan become a DeepSpeed engine."""

from __future__ import annotations

import logging
from collections.abc import Container, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from rosa_ds import distributed, zero
from rosa_ds.config.deepspeed import BITSANDBYTES, DeepSpeedPlan
from rosa_ds.utils.packages import require_bitsandbytes

if TYPE_CHECKING:
    from rosa_ds.zero.masters import Groups
    from rosa_ds.zero.trained_state import TrainedState

logger = logging.getLogger(__name__)


PERSISTENCE = "stage3_param_persistence_threshold"


def keep_vectors_everywhere(model: nn.Module, config: dict[str, Any], adapters: Container[int]) -> None:
    """At stage 3, where the file says nothing else, only norms and biases stay gathered, and never a part of an adapter.

    DeepSpeed's own default of 100,000 numbers would leave most of A, B, values and positions on every rank.

    Args:
        adapters: ``id`` of the parameters that are parts of adapters.
    """
    vectors, parts = [0], []
    for parameter in model.parameters():
        if id(parameter) in adapters:
            parts.append(zero.full_numel(parameter))
        elif len(zero.full_shape(parameter)) == 1:
            vectors.append(zero.full_numel(parameter))
    config["zero_optimization"].setdefault(PERSISTENCE, min([max(vectors), *(size - 1 for size in parts)]))


def optimizer_class(plan: DeepSpeedPlan) -> Any:
    """Torch's, bitsandbytes' or DeepSpeed's. Raises: ValueError where it cannot run."""
    name, section = plan.optimizer.name, plan.config["zero_optimization"]
    if name == "DeepSpeedCPUAdam":
        if distributed.device().type != "cpu" and (section.get("offload_optimizer") or {}).get("device") != "cpu":
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


def settle_zero(model: nn.Module, plan: DeepSpeedPlan, adapters: Container[int]) -> None:
    """What the file leaves open and only the injected model decides, written into ``plan.config``.

    Gradients are sent in one bucket that holds all of them, or 500,000,000 numbers: DeepSpeed allocates as many as it is
    told, 1 GB in 16 bits, however few are trained.
    """
    section = plan.config["zero_optimization"]
    if plan.stage == 3:
        keep_vectors_everywhere(model, plan.config, adapters)
    if plan.stage:
        trained = sum(zero.full_numel(p) for p in model.parameters() if p.requires_grad)
        section.setdefault(BUCKET, min(500_000_000, trained))


def build_engine(
    model: nn.Module, groups: Groups, rates: Mapping[str, float], plan: DeepSpeedPlan, adapters: Container[int]
) -> tuple[Any, TrainedState]:
    """Wrap a model in a DeepSpeed engine with one parameter group per learning rate.

    Args:
        groups: parameter group -> name -> parameter; ``rates``: its learning rate.
        adapters: ``id`` of the parameters that are parts of adapters.

    Returns: the engine and access to its trained parameters.
    Raises: RunError if DeepSpeed keeps masters that are not the parameters' (:meth:`TrainedState.check`).
    """
    import deepspeed  # a slow import that only training needs

    from rosa_ds.zero.trained_state import TrainedState

    deepspeed.utils.logger.setLevel(logging.WARNING)
    settle_zero(model, plan, adapters)
    parameters = [{"params": list(group.values()), "lr": rates[name], "name": name} for name, group in groups.items()]
    optimizer = optimizer_class(plan)(parameters, **plan.optimizer.arguments)
    engine, _, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, config=plan.config)
    state = TrainedState(engine.optimizer, groups)
    state.reset_optimizer(groups)  # some of DeepSpeed's optimizers count a step while they are built
    state.check("before the first step")
    return engine, state


def forget_order(engine: Any) -> None:
    """After forward passes without a backward one: stage 3 shall learn the order of a whole step from the next one.

    DeepSpeed keeps parameters from forward to backward, and fetches them ahead, by the first order that it has seen. What it
    lets go behind a module it has decided once for ever, also for an order that is no longer valid (0.19.8): after two
    evaluation batches every later step would gather all parameters again for its backward pass.
    """
    offload = getattr(engine.optimizer, "parameter_offload", None)
    if offload is None:
        return
    coordinator = offload.get_param_coordinator()
    if not coordinator.is_invalid_trace():
        coordinator._invalidate_trace()
    decide = type(coordinator)._PartitionedParameterCoordinator__params_to_release
    for cell in decide.__closure__ or ():  # below a wrapper for profilers
        if clear := getattr(cell.cell_contents, "cache_clear", None):
            clear()
