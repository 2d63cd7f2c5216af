"""Model and settings become a DeepSpeed engine."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

from rosa_ds.adapters.inject import adapted_layers
from rosa_ds.config import RunConfig
from rosa_ds.ds_config import DeepSpeedPlan
from rosa_ds.suggest import did_you_mean
from rosa_ds.training.trained_state import TrainedState

ParameterGroups = dict[str, dict[str, nn.Parameter]]
logger = logging.getLogger(__name__)


def parameter_groups(model: nn.Module) -> ParameterGroups:
    """The trainable parameters by group: ``low_rank`` (A, B), ``sparse`` (values), ``whole``; empty groups left out."""
    kinds: dict[int, str] = {}
    for layer in adapted_layers(model).values():
        kinds |= {id(layer.A): "low_rank", id(layer.B): "low_rank", id(layer.values): "sparse"}
    groups: ParameterGroups = {"low_rank": {}, "sparse": {}, "whole": {}}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[kinds.get(id(parameter), "whole")][name] = parameter
    return {name: group for name, group in groups.items() if group}


def learning_rates(settings: RunConfig) -> dict[str, float]:
    """Base learning rate of each group."""
    return {
        "low_rank": settings.adapter.low_rank_lr,
        "sparse": settings.adapter.sparse_lr,
        "whole": settings.training.learning_rate,
    }


def _build_optimizer(groups: list[dict[str, Any]], plan: DeepSpeedPlan) -> torch.optim.Optimizer:
    """The optimizer that the DeepSpeed file names, as torch implements it (nothing has to be compiled)."""
    arguments = {k: v for k, v in plan.optimizer.arguments.items() if k not in ("torch_adam", "adam_w_mode")}
    name = plan.optimizer.name
    if name.lower() == "adam" and plan.optimizer.arguments.get("adam_w_mode", True):
        name = "AdamW"  # as DeepSpeed reads it
    by_name = {key.lower(): value for key, value in vars(torch.optim).items() if isinstance(value, type)}
    if name.lower() not in by_name or name.lower() in ("optimizer", "lbfgs", "sparseadam"):
        raise ValueError(
            f"optimizer type {name!r} of the DeepSpeed file is none of torch.optim.{did_you_mean(name, by_name)}"
        )
    if "betas" in arguments:
        arguments["betas"] = tuple(arguments["betas"])
    try:
        return by_name[name.lower()](groups, **arguments)
    except TypeError as error:
        raise ValueError(f"optimizer {name} of the DeepSpeed file: {error}") from None


def build_engine(model: nn.Module, settings: RunConfig, plan: DeepSpeedPlan) -> tuple[Any, TrainedState]:
    """Wrap an injected model in a DeepSpeed engine with one parameter group per learning rate.

    Returns: the engine and access to its trained parameters.
    Raises: ValueError if nothing is trainable or the optimizer does not exist.
    """
    import deepspeed  # a slow import that only training needs

    deepspeed.utils.logger.setLevel(logging.WARNING)
    groups = parameter_groups(model)
    if not groups:
        raise ValueError("nothing is trainable: check adapter.rank, adapter.density and adapter.target_modules")
    rates = learning_rates(settings)
    optimizer = _build_optimizer(
        [{"params": list(group.values()), "lr": rates[name], "name": name} for name, group in groups.items()], plan
    )
    engine, _, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, config=plan.config)
    state = TrainedState(engine.optimizer, groups)
    state.reset_optimizer(groups)  # some of DeepSpeed's optimizers count a step while they are built
    return engine, state
