"""The model that a run trains: base, adapters, and at stage 3 their division over the ranks."""

from __future__ import annotations

import functools
import logging

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import rosa_kernels
from rosa_ds import distributed
from rosa_ds.adapters.inject import adapted_layers, inject
from rosa_ds.config import RunConfig
from rosa_ds.ds_config import DeepSpeedPlan
from rosa_ds.models.load import load_model
from rosa_ds.models.stream import Base, open_base

logger = logging.getLogger(__name__)


def _load_base(settings: RunConfig, plan: DeepSpeedPlan) -> tuple[PreTrainedModel, Base | None]:
    """The base; at stage 3 its shape alone, where possible, and where its numbers are."""
    dtype = getattr(torch, plan.dtype)
    with distributed.main_first():
        return open_base(settings.model, dtype) if plan.stage == 3 else (load_model(settings.model, dtype), None)


def _partition(model: PreTrainedModel, base: Base | None, plan: DeepSpeedPlan) -> None:
    """Divide base and adapters over the ranks, one parameter at a time."""
    layers = adapted_layers(model)

    def fill(name: str, parameter: nn.Parameter, target: Tensor, rows: slice) -> None:
        module, _, part = name.rpartition(".")
        if module in layers and part in ("A", "B", "values"):
            target.copy_(layers[module].initial_parameters()[part])
        elif not parameter.is_meta:
            distributed.keep_numbers(name, parameter, target, rows)
        elif module in layers and part == "positions":
            target.zero_()  # before a mask is known
        else:
            assert base is not None, f"nothing to fill {name} with"
            base.fill(name, parameter, target, rows)

    distributed.partition_model(model, plan.config, getattr(torch, plan.dtype), fill)
    if base is not None:
        base.close()


def build_model(settings: RunConfig, plan: DeepSpeedPlan) -> PreTrainedModel:
    """The base with its adapters on every rank; at stage 3 already divided over them. Collective there.

    Raises: ValueError for a base that cannot be loaded or targets that match nothing.
    """
    model, base = _load_base(settings, plan)
    report = inject(model, settings.adapter_config(), settings.training.seed, draw=None)
    logger.info("%s, %s: %s", settings.model.name_or_path, plan.dtype, report)
    if report.adapted:
        chosen = rosa_kernels.explain(distributed.device())
        logger.info("kernels: %s", "; ".join(f"{op} {c.implementation} ({c.reason})" for op, c in chosen.items()))
    if plan.stage == 3:
        _partition(model, base, plan)
    enable_checkpointing(model, settings.training.gradient_checkpointing)
    return model


def enable_checkpointing(model: PreTrainedModel, kind: bool | str) -> None:
    """Recompute activations as ``training.gradient_checkpointing`` says."""
    if not kind:
        return
    reentrant = kind == "reentrant"
    # transformers renamed it during version 5
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()  # a block whose input needs no gradient would not be recomputed


def divide_positions(model: nn.Module) -> None:
    """Leave each rank its share of every mask, whole only while its layer runs. After DeepSpeed has taken the model."""
    ahead = distributed.GatherAhead()
    for layer in adapted_layers(model).values():
        if layer.positions is not None:
            distributed.divide(layer.positions)
            layer.around = functools.partial(ahead.whole, layer.positions)
