"""What a model knows of its adapters: which one is in it, the others, and numbers of the base that are kept for later."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from rosa_ds import zero
from rosa_ds.adapters.layer import AdaptedLinear
from rosa_ds.config.schema import AdapterConfig

DEFAULT = "default"


@dataclasses.dataclass
class Adapter:
    """An adapter of a model, in it or parked.

    Attributes:
        whole: names of the base's parameters that it trains.
        draws: how many its low-rank parts have had.
        kept: parameter name -> numbers that change places with the model's, of what the adapter changes of the base: the base's
            own while it is in the model, the adapter's while it is parked or disabled.
        layers: its layers by name while it is parked; in the model they are the model's.
    """

    name: str
    config: AdapterConfig
    seed: int
    whole: list[str]
    draws: int = 0
    kept: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    layers: dict[str, AdaptedLinear] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Adapters:
    """The adapters of a model: the ``active`` one, which is in it, and the ``parked`` others by name."""

    active: Adapter | None = None
    parked: dict[str, Adapter] = dataclasses.field(default_factory=dict)
    disabled: bool = False


def adapters_of(model: nn.Module) -> Adapters:
    """The model's own record, made where there is none yet."""
    found: Any = getattr(model, "rosa_adapters", None)
    if found is None:
        found = Adapters()
        model.rosa_adapters = found
    assert isinstance(found, Adapters)
    return found


def active_adapter(model: nn.Module) -> Adapter:
    """The adapter that is in a model. Raises: ValueError if there is none."""
    active = adapters_of(model).active
    if active is None:
        raise ValueError("this model has no adapter: rosa_ds.inject(model, config) comes first")
    return active


def adapter_names(model: nn.Module) -> list[str]:
    """The model's adapters by name, the one that is in it first. ``rosa_ds.inject`` calls its adapter ``default``."""
    known = adapters_of(model)
    return [*([known.active.name] if known.active is not None else []), *known.parked]


def check_enabled(model: nn.Module) -> None:
    """Raise ValueError for a model whose adapter is disabled."""
    if adapters_of(model).disabled:
        raise ValueError("this model's adapter is disabled: rosa_ds.enable(model) comes first")


def check_room(model: nn.Module, name: str, adapted: bool) -> None:
    """Raise ValueError unless a new adapter may have this name, and none is in the model."""
    known = adapters_of(model)
    if adapted or known.active is not None:
        raise ValueError("this model has adapters already: rosa_ds.merge(model) folds them in first")
    if name in known.parked:
        raise ValueError(
            f"this model has an adapter {name!r}: rosa_ds.set_adapter puts it in, rosa_ds.remove_adapter forgets it"
        )


@torch.no_grad()
def keep(model: nn.Module, names: list[str]) -> None:
    """Copy these parameters, which the active adapter is about to change. Raises: ValueError if they are not whole here."""
    parameters = dict(model.named_parameters())
    check_exchangeable([parameters[name] for name in names])
    active_adapter(model).kept = {name: parameters[name].detach().clone() for name in names}


def check_exchangeable(parameters: Iterable[nn.Parameter]) -> None:
    """Raise ValueError for parameters that are not whole here."""
    if any(zero.is_partitioned(parameter) or parameter.is_meta for parameter in parameters):
        raise ValueError(
            "parameters that the adapter changes are partitioned by ZeRO-3, or not there, and cannot be exchanged for the base's: "
            "load base and adapter into a model of one process"
        )


@torch.no_grad()
def exchange(model: nn.Module, changed: list[str]) -> None:
    """Swap these parameters' numbers, which the adapter has changed, with what was kept. Raises: ValueError, before it does."""
    kept, parameters = active_adapter(model).kept, dict(model.named_parameters())
    check_exchangeable([parameters[name] for name in changed])
    if missing := [name for name in changed if name not in kept]:
        raise ValueError(
            f"the base's own {missing[0]} is not there any more ({len(missing)} parameters were changed by the adapter): use "
            "keep_base=True in rosa_ds.inject or rosa_ds.load_adapter, which keeps a copy"
        )
    for name in changed:
        parameter = parameters[name]
        theirs = kept[name].to(parameter.device, parameter.dtype)
        kept[name], parameter.data = parameter.data, theirs
