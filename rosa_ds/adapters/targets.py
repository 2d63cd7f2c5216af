"""Which layers of a model are adapted, and which modules are trained whole."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Iterable, Mapping
from typing import TypeAlias, TypeVar

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd
from transformers.pytorch_utils import Conv1D

from rosa_ds.config.schema import RunConfig
from rosa_ds.models.quantized import QuantizedLinear
from rosa_ds.models.task import head_modules, is_classifier, is_pooler, whole_modules
from rosa_ds.utils.logs import SAME_ON_ALL_RANKS
from rosa_ds.utils.suggest import did_you_mean
from rosa_ds.zero import full_shape

logger = logging.getLogger(__name__)
Value = TypeVar("Value", int, float)


Linear: TypeAlias = nn.Linear | Conv1D | QuantizedLinear


def find_targets(model: nn.Module, wanted: list[str], whole: Iterable[str] = ()) -> dict[str, Linear]:
    """The layers to adapt, by name, in the model's order.

    Args:
        wanted: ``["all-linear"]``, or names, name endings and regular expressions.
        whole: modules that are trained whole. Where a classifier's pooler is one, ``all-linear`` leaves it out.

    Raises:
        ValueError: nothing matches, a matched module is not linear, or its weight is tied to another module's (such layers
            ``all-linear`` leaves out, and head and pooler).
    """
    layers = linear_layers(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no linear layer to adapt")
    if wanted == ["all-linear"]:
        heads = head_names(model, layers)
        poolers = tuple(f"{name}." for name in whole if is_classifier(model) and is_pooler(name))
        names = [name for name in layers if name not in heads and not f"{name}.".startswith(poolers)]
        if not names:
            raise ValueError(
                f"{type(model).__name__} has no linear layer to adapt but its head ({', '.join(layers)}): its others are of other "
                "classes than nn.Linear and Conv1D"
            )
        shared = tied_layers(model, names)
        if names == shared:
            _check_untied(model, names, layers)
        return {name: layers[name] for name in names if name not in set(shared)}
    names = match_names(wanted, [name for name, _ in model.named_modules() if name], "adapter.target_modules")
    not_linear = [name for name in names if name not in layers]
    if not_linear:
        module = model.get_submodule(not_linear[0])
        own = "whose forward is its own" if isinstance(module, nn.Linear) else "which is none"
        raise ValueError(
            f"adapter.target_modules names {not_linear[0]}, a {type(module).__name__}: only nn.Linear and Conv1D can be adapted, and "
            f"{own}; use adapter.modules_to_save to train it whole"
        )
    _check_untied(model, names, layers)
    return {name: layers[name] for name in names}


def linear_layers(model: nn.Module) -> dict[str, Linear]:
    """All ``nn.Linear`` and ``Conv1D`` layers, quantised or not, by name, in the model's order: those that multiply with their
    weight and do nothing else.
    """
    kinds = (nn.Linear, Conv1D, QuantizedLinear)
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, kinds) and not _has_own_forward(module)
    }


def own_forwards(model: nn.Module) -> list[str]:
    """Names of layers that only inherit from ``nn.Linear``, such as routers that also choose experts."""
    return [name for name, module in model.named_modules() if _has_own_forward(module)]


def _has_own_forward(module: nn.Module) -> bool:
    """Whether a subclass of ``nn.Linear`` does something else: Falcon's does not, though it has a forward of its own."""
    if not isinstance(module, nn.Linear) or type(module).forward is nn.Linear.forward:
        return False
    small = copy.copy(module)
    x, weight, bias = torch.ones(2, 3), torch.arange(12.0).view(4, 3), None if module.bias is None else torch.ones(4)
    small.__dict__["_parameters"] = {"weight": weight, "bias": bias}
    try:
        found: object = type(module).forward(small, x)
    except Exception:  # whatever it does, it is not that
        return True
    expected = nn.functional.linear(x, weight, bias)
    return not (isinstance(found, torch.Tensor) and found.shape == expected.shape and torch.equal(found, expected))


def head_names(model: nn.Module, layers: Mapping[str, nn.Module]) -> set[str]:
    """Names of the output head among ``layers`` (what ``all-linear`` leaves out)."""
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if get_head is not None else None
    names = {name for name, layer in layers.items() if layer is head}
    # Heads of classification models are not output embeddings, but train whole or not at all.
    return names | {name for name in layers if name.partition(".")[0] in ("score", "classifier", *head_modules(model))}


def match_names(wanted: Iterable[str], names: Iterable[str], setting: str) -> list[str]:
    """The ``names`` that equal a wanted one, end in it after a dot, or match it as a whole regular expression.

    Raises:
        ValueError: a wanted name that matches nothing, with the nearest names.
    """
    names = list(names)
    found: set[str] = set()
    for pattern in wanted:
        matching = {name for name in names if _matches(name, pattern)}
        if not matching:
            endings = {part for name in names for part in (name, name.rsplit(".", 1)[-1])}
            hint = did_you_mean(pattern, endings)
            last = sorted({name.rsplit(".", 1)[-1] for name in names if not name.rsplit(".", 1)[-1].isdigit()})
            raise ValueError(f"{setting} {pattern!r} matches no module.{hint} There are: {', '.join(last)}")
        found |= matching
    return [name for name in names if name in found]


def _matches(name: str, wanted: str) -> bool:
    if name == wanted or name.endswith("." + wanted):
        return True
    try:
        return re.fullmatch(wanted, name) is not None
    except re.error:
        return False


def tied_layers(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Those of the layers ``names`` whose weight another module has, too, such as Zamba's shared blocks."""
    layers = dict(model.named_modules())
    owners = _owners(model)
    return [name for name in names if len(owners.get(id(layers[name].weight), ())) > 1]


def _owners(model: nn.Module) -> dict[int, list[str]]:
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    return owners


def _check_untied(model: nn.Module, names: Iterable[str], layers: Mapping[str, Linear]) -> None:
    owners = _owners(model)
    for name in names:
        shared = [other for other in owners.get(id(layers[name].weight), []) if other != f"{name}.weight"]
        if shared:
            raise ValueError(
                f"adapter.target_modules names {name}, whose weight is tied to {shared[0]}: an adapter on one of the two "
                "cannot be merged; use adapter.modules_to_save, untie them first, or name other modules"
            )


def warn_of_left_out(model: nn.Module) -> None:
    """Say which linear layers ``all-linear`` leaves out by what they are, beside the head."""
    if own := own_forwards(model):
        said = "all-linear leaves out %d layers that inherit from nn.Linear and have a forward of their own (e.g. %s, a %s)"
        logger.warning(said, len(own), own[0], type(model.get_submodule(own[0])).__name__, extra=SAME_ON_ALL_RANKS)
    layers = linear_layers(model)
    heads = head_names(model, layers)
    if shared := tied_layers(model, [name for name in layers if name not in heads]):
        said = "all-linear leaves out %d layers whose weight another module has, too (e.g. %s): an adapter on one cannot be merged"
        logger.warning(said, len(shared), shared[0], extra=SAME_ON_ALL_RANKS)


def stacked_weights(model: nn.Module, whole: Iterable[str] = ()) -> list[str]:
    """Names of weights of three dimensions, as experts have theirs, that no adapter reaches and that are not trained ``whole``."""
    own = tuple(f"{name}." for name in whole)
    convolutions = {name for name, module in model.named_modules() if isinstance(module, _ConvNd)}
    return [
        name
        for name, parameter in model.named_parameters()
        if len(full_shape(parameter)) == 3 and name.rpartition(".")[0] not in convolutions and not name.startswith(own)
    ]


def by_pattern(name: str, patterns: Mapping[str, Value], default: Value) -> Value:
    """The value of the first pattern that is found in ``name`` (``re.search``), else ``default``."""
    return next((value for pattern, value in patterns.items() if re.search(pattern, name)), default)


def check_patterns(patterns: Mapping[str, object], names: Iterable[str], setting: str) -> None:
    """Raise ValueError for a pattern that is no regular expression or is found in none of the ``names``."""
    names = list(names)
    for pattern in patterns:
        try:
            used = any(re.search(pattern, name) for name in names)
        except re.error as error:
            raise ValueError(f"{setting} {pattern!r} is not a regular expression: {error}") from None
        if not used:
            endings = {name.rsplit(".", 1)[-1] for name in names}
            raise ValueError(
                f"{setting} {pattern!r} is found in no adapted layer.{did_you_mean(pattern, endings)} "
                f"Adapted are: {', '.join(sorted(endings))}"
            )


def with_head(settings: RunConfig, model: nn.Module) -> RunConfig:
    """The settings with a classifier's head among the modules that are trained whole."""
    given = settings.adapter.modules_to_save
    if settings.model.task == "causal-lm" or settings.parts.everything:
        return settings
    names = [name for name, _ in model.named_modules() if name]
    whole = match_names(given, names, "adapter.modules_to_save")
    more = [name for name in whole_modules(model) if not any(f"{name}.".startswith(f"{other}.") for other in whole)]
    if not more:
        return settings
    adapter = settings.adapter.model_copy(update={"modules_to_save": [*given, *more]})
    return settings.model_copy(update={"adapter": adapter})
