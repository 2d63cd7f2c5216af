"""An injected model becomes a DeepSpeed engine whose parameter groups have the learning rates of its settings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from rosa_ds.adapters.inject import adapter_parts
from rosa_ds.config.deepspeed import DeepSpeedPlan
from rosa_ds.config.schema import RunConfig
from rosa_ds.zero import engine

if TYPE_CHECKING:
    from rosa_ds.zero.trained_state import TrainedState

ParameterGroups = dict[str, dict[str, nn.Parameter]]


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


def build_engine(model: nn.Module, settings: RunConfig, plan: DeepSpeedPlan) -> tuple[Any, TrainedState]:
    """The engine, and access to its trained parameters.

    Raises: ValueError if nothing is trainable.
    """
    groups = parameter_groups(model)
    if not groups:
        raise ValueError("nothing is trainable: check adapter.rank, adapter.density and adapter.target_modules")
    return engine.build_engine(model, groups, learning_rates(settings), plan, adapter_parts(model))
