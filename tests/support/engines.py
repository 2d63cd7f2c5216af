"""An engine as a run builds it, whose masks are drawn at random."""

from __future__ import annotations

from typing import Any

import rosa_ds
from rosa_ds.adapters.mask import static_positions
from rosa_ds.config.deepspeed import DeepSpeedPlan
from rosa_ds.config.schema import RunConfig
from rosa_ds.training.engine import build_engine
from rosa_ds.training.model import adapt, load_base
from rosa_ds.zero.trained_state import TrainedState


def make_engine(given: RunConfig, plan: DeepSpeedPlan) -> tuple[Any, Any, TrainedState]:
    """The model, its engine, and the engine's trained parameters."""
    model = adapt(*load_base(given, plan), given, plan)
    engine, state = build_engine(model, given, plan)
    for layer in rosa_ds.adapted_layers(model).values():
        if layer.entries:
            layer.set_positions(static_positions("random", layer, layer.weight, 0))
    return model, engine, state
