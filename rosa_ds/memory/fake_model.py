"""A run's model without numbers: from a config alone, for planning what no machine here could hold."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
from transformers import PreTrainedModel

from rosa_ds.adapters.inject import InjectReport, adapted_layers, inject
from rosa_ds.adapters.quantize import quantize_as
from rosa_ds.adapters.targets import with_head
from rosa_ds.config.schema import RunConfig
from rosa_ds.memory.activation_tracer import Activations, trace
from rosa_ds.models.load import enable_checkpointing
from rosa_ds.models.no_numbers import (
    FEW,
    MORE,
    NOT_TRACED,
    Shape,
    alike_layers,
    with_layers,
    with_padding,
    without_numbers,
)
from rosa_ds.models.stream import build_on_meta


def build_skeleton(config: Any, settings: RunConfig, dtype: torch.dtype) -> tuple[PreTrainedModel, InjectReport]:
    """Base and adapters on the meta device, in the types and with the checkpointing that they have in training.

    Args:
        config: a transformers config. Whether the base's files have a classifier's pooler it does not say: it counts as there.
        dtype: what the model computes in; DeepSpeed casts trained parameters to it.

    Raises: ValueError as :func:`rosa_ds.inject`.
    """
    model = build_on_meta(with_padding(config), settings.model, dtype)
    settings = with_head(settings, model)
    quantize_as(model, settings.model, dtype, settings.adapter.modules_to_save)
    report = inject(model, settings.adapter_config(), settings.training.seed, draw=None, look=False)
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    for layer in adapted_layers(model).values():
        layer.mask_known = layer.entries > 0
    enable_checkpointing(model, settings.training.gradient_checkpointing)
    return model, report


class ActivationPlan:
    """What micro-batches of a model keep, found by tracing it; see :mod:`rosa_ds.memory.activation_tracer`.

    A model of many like layers is traced with one and two of them, and the rest follows on a line.
    """

    def __init__(self, config: Any, settings: RunConfig, dtype: torch.dtype) -> None:
        self.config, self.settings, self.dtype = config, settings, dtype
        self._depth = alike_layers(config)

    @functools.lru_cache(maxsize=16)  # noqa: B019 - a plan lives as long as the program that asks it
    def _traced(self, layers: int | None, checkpointing: bool) -> tuple[PreTrainedModel, Any]:
        config = self.config if layers is None else with_layers(self.config, layers)
        wanted = self.settings.training.gradient_checkpointing or True if checkpointing else False
        training = self.settings.training.model_copy(update={"gradient_checkpointing": wanted})
        model, _ = build_skeleton(config, self.settings.model_copy(update={"training": training}), self.dtype)
        return model, without_numbers(model)

    @functools.lru_cache(maxsize=256)  # noqa: B019
    def measure(self, shape: Shape, checkpointing: bool) -> Activations:
        """Bytes of one micro-batch."""
        if self._depth is not None:
            try:
                few, more = (self._trace(layers, checkpointing, shape) for layers in (FEW, MORE))
            except ValueError:  # targets or patterns that name deeper layers
                self._depth = None
            else:
                return few.extended(more, (self._depth - FEW) / (MORE - FEW))
        return self._trace(None, checkpointing, shape)

    def _trace(self, layers: int | None, checkpointing: bool, shape: Shape) -> Activations:
        """Raises: ValueError for a model that does not run without numbers."""
        model, mode = self._traced(layers, checkpointing)
        try:
            return trace(model, mode, shape, self.settings.training.loss_block)
        except NOT_TRACED as error:
            if shape.padded:  # OPT and BLOOM make positions of a mask of two dimensions: as if rows had one length
                return self._trace(layers, checkpointing, dataclasses.replace(shape, padded=False))
            raise ValueError(
                f"activations of {type(model).__name__} cannot be predicted: it asks for numbers that a plan does not have "
                f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'})"
            ) from error

    def of_rows(self, shape: Shape, checkpointing: bool) -> Activations:
        """As :meth:`measure`, from the line through one and eight rows: for asking about many numbers of rows."""
        one, eight = (self.measure(shape.with_rows(rows), checkpointing) for rows in (1, 8))
        return one.extended(eight, (shape.rows - 1) / 7)
