"""Several adapters side by side on one base, one of them in the model at a time; and the base without any.

What an adapter has in place of the base's own numbers, weights of the subspace methods and modules that are trained whole, is
exchanged for a copy that ``keep_base`` made. Everything else of the base is never touched, so nothing is copied.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from rosa_ds import zero
from rosa_ds.adapters.inject import (
    adapted_layers,
    changed_parameters,
    check_without_engine,
    set_submodule,
)
from rosa_ds.adapters.registry import adapter_names, adapters_of, exchange
from rosa_ds.utils.suggest import did_you_mean


def set_adapter(model: nn.Module, name: str) -> None:
    """Put the adapter of this name in the place of the one that is in the model.

    Raises: ValueError for a name that the model does not have; as :func:`disable` for what cannot be exchanged.
    """
    known = adapters_of(model)
    if name not in adapter_names(model):
        names = adapter_names(model)
        raise ValueError(
            f"this model has no adapter {name!r} ({', '.join(names) or 'none'}).{did_you_mean(name, names)}"
        )
    if known.disabled:
        enable(model)
    if known.active is None or name != known.active.name:
        park(model)
        unpark(model, name)


def remove_adapter(model: nn.Module, name: str) -> None:
    """Forget an adapter; where it is the one in the model, the plain base is left. Raises: as :func:`set_adapter`."""
    known = adapters_of(model)
    if name not in adapter_names(model):
        set_adapter(model, name)
    if known.active is not None and name == known.active.name:
        park(model)
    del known.parked[name]


@torch.no_grad()
def park(model: nn.Module) -> None:
    """Take the active adapter out of the model, which is the plain base then. Raises: as :func:`disable`; for an engine."""
    known = adapters_of(model)
    if known.disabled:
        enable(model)
    adapter = known.active
    if adapter is None:
        return
    check_without_engine(model)
    if any(zero.is_partitioned(parameter) for parameter in model.parameters()):
        raise ValueError(
            "this model's parameters are partitioned by ZeRO-3: its adapter cannot be exchanged for another"
        )
    changed, layers = changed_parameters(model), adapted_layers(model)
    exchange(model, changed)
    for name, layer in layers.items():
        set_submodule(model, name, layer.base_layer())
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    adapter.layers, adapter.kept = layers, {name: adapter.kept[name] for name in changed}
    known.parked[adapter.name], known.active = adapter, None


@torch.no_grad()
def unpark(model: nn.Module, name: str) -> None:
    """Put a parked adapter into a model that has none."""
    known = adapters_of(model)
    adapter = known.parked.pop(name)
    for layer_name, layer in adapter.layers.items():
        plain: Any = model.get_submodule(layer_name)
        layer.weight, layer.bias = plain.weight, plain.bias
        layer.weight_scales = getattr(plain, "weight_scales", None)
        for part in (layer.A, layer.B, layer.values, layer.positions, layer.change):
            if part is not None:
                part.data = part.data.to(plain.weight.device)
        layer.plan = None  # of the device where the layer was parked
        set_submodule(model, layer_name, layer.train(plain.training))
    parameters = dict(model.named_parameters())
    for parameter_name in adapter.whole:
        parameters[parameter_name].requires_grad_(True)
    known.active, adapter.layers = adapter, {}
    exchange(model, changed_parameters(model))


def disable(model: nn.Module) -> None:
    """Let the model compute what the base computes, bit for bit, until :func:`enable`. Works inside an engine and under ZeRO-3.

    For reference logits: the adapter is not to be trained, saved or merged meanwhile.

    Raises: ValueError if the adapter has changed numbers of the base (a subspace method, modules that are trained whole,
        method full) that were not kept, see ``keep_base`` of :func:`rosa_ds.inject`, or that ZeRO-3 has partitioned.
    """
    _set_disabled(model, True)


def enable(model: nn.Module) -> None:
    """Take :func:`disable` back."""
    _set_disabled(model, False)


@contextlib.contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """The model as :func:`disable` leaves it; after the block as before: ``with disabled(model): reference = model(...)``."""
    was = adapters_of(model).disabled
    disable(model)
    try:
        yield model
    finally:
        if not was:
            enable(model)


def _set_disabled(model: nn.Module, value: bool) -> None:
    known = adapters_of(model)
    if known.active is None and not known.parked:
        raise ValueError("this model has no adapter: rosa_ds.inject(model, config) or rosa_ds.load_adapter comes first")
    if known.disabled == value:
        return
    if known.active is not None:
        exchange(model, changed_parameters(model))
    for layer in adapted_layers(model).values():
        layer.disabled = value
    known.disabled = value
