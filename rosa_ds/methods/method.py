"""The protocol between the training loop and what methods do around steps, and what a restart puts back."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from rosa_ds import distributed, zero
from rosa_ds.adapters.inject import adapted_layers
from rosa_ds.checkpoints.checkpoint import Checkpoint, MethodState, SavedBase
from rosa_ds.config.deepspeed import DeepSpeedPlan
from rosa_ds.config.schema import RunConfig
from rosa_ds.memory.account import Term

if TYPE_CHECKING:  # what a plan does not need imports deepspeed
    from rosa_ds.adapters.stored import StoredAdapter
    from rosa_ds.training.schedule import Schedule, Step
    from rosa_ds.zero.trained_state import TrainedState


@dataclasses.dataclass(frozen=True)
class Context:
    """What a method works with once the engine is there.

    Attributes:
        state: the trained parameters, their master weights and moments.
        gradients_a_step: that a layer has on one rank: the micro-batches of a step, times how often a forward pass calls it.
        base: name and hash of the base.
        record: writes a line of ``metrics.jsonl``; fields ``step`` and ``event`` are required.
        leave_if_asked: to call before work that takes long. If a signal asked the run to stop, it saves and ends there.
    """

    model: nn.Module
    state: TrainedState
    folder: Path
    gradients_a_step: int
    base: Mapping[str, Any]
    record: Callable[..., None]
    leave_if_asked: Callable[[], None]


class Method:
    """What a method does around steps. All hooks are collective: every rank calls them in the same order.

    A method overrides the hooks that it needs. It is built before the engine takes the model, from the settings alone.
    """

    def __init__(self, model: nn.Module, settings: RunConfig, schedule: Schedule) -> None:
        self.model, self.settings, self.schedule = model, settings, schedule

    def start(self, context: Context) -> None:
        """The engine is there. Raises: ValueError for settings that cannot work with it."""
        self.context = context

    def restore(self, saved: Checkpoint, source: Path) -> None:
        """Go on from a checkpoint in ``source``; before trained parameters and moments are written."""

    def begin_with(self, start: StoredAdapter) -> None:
        """Take what an adapter has that the run begins with; before its trained parameters are written."""

    def begin(self, step: int) -> None:
        """What must be there before step ``step``, the first of this process."""

    @property
    def settled(self) -> bool:
        """Whether layers compute from now on as in the rest of the run: memory is measured in the second such step."""
        return True

    def before_step(self, step: Step) -> None: ...

    def after_step(self, step: Step, scale: float, applied: bool) -> None:
        """After the optimizer's step.

        Args:
            scale: what the loss was multiplied with before backward, ranks included.
            applied: false for a step that was left out, since its loss or a gradient was not finite.
        """

    def restart(self) -> None:
        """Training begins again: put back what :class:`Restart` does not know."""

    def state(self) -> MethodState | None:
        """What a checkpoint of the state between two steps has of this method."""
        return None

    def saved(self, folder: Path) -> None:
        """That checkpoint is complete."""

    @property
    def saved_base(self) -> SavedBase | None:
        """The checkpoint that has the base as this method has changed it; ``None`` if it has not."""
        return None

    def measured_memory(self) -> dict[str, int]:
        """Bytes of this rank by the names of :meth:`memory_terms`, as far as they were seen."""
        return {}

    @staticmethod
    def memory_terms(model: nn.Module, plan: DeepSpeedPlan, settings: RunConfig, ranks: int, gpu: bool) -> list[Term]:
        """What the method will hold on one rank, beside the parameters. Arguments as :func:`memory_terms`."""
        return []


def build_methods(model: nn.Module, settings: RunConfig, schedule: Schedule) -> list[Method]:
    """What acts around the steps of a run, in the order in which it acts."""
    return [kind(model, settings, schedule) for kind in _kinds(settings)]


def memory_terms(
    model: nn.Module, plan: DeepSpeedPlan, settings: RunConfig, ranks: int | None = None, gpu: bool | None = None
) -> list[Term]:
    """What the run's method holds on one rank, for :func:`rosa_ds.memory.estimate.predict`.

    Args:
        model: injected; on the meta device, whole, or divided already.
        ranks: by default as many as there are; ``gpu``: whether they are GPUs, by default as here.
    """
    ranks = distributed.world_size() if ranks is None else ranks
    gpu = distributed.device().type == "cuda" if gpu is None else gpu
    return [term for kind in _kinds(settings) for term in kind.memory_terms(model, plan, settings, ranks, gpu)]


def _kinds(settings: RunConfig) -> list[type[Method]]:
    modules = (import_module(f"rosa_ds.methods.{name}") for name in settings.parts.around_steps)
    return [module.Method for module in modules]


class Restart:
    """What training began with, to begin again: fresh A, B and values, modules as the base has them, an empty optimizer.

    Args:
        whole: parameters that are trained whole, by name. This rank keeps a copy of its share.
    """

    def __init__(self, model: nn.Module, whole: Mapping[str, nn.Parameter]) -> None:
        self._layers = adapted_layers(model)
        self._whole = {name: zero.own_numbers(p).float().cpu().clone() for name, p in whole.items()}

    def apply(self, state: TrainedState) -> None:
        for name, own in self._whole.items():
            state.write({name: zero.whole_of(state.parameters[name], own)})
        for name, layer in self._layers.items():
            initial: dict[str, Tensor] = layer.initial_parameters()
            state.write({f"{name}.{part}": tensor for part, tensor in initial.items()})
        state.reset_optimizer(state.groups)
