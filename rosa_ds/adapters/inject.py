"""Put adapters into a model, and take them out again merged."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterator, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from rosa_ds import zero
from rosa_ds.adapters.layer import MAX_POSITIONS, AdaptedLinear, plain_layer, stored_shape
from rosa_ds.adapters.low_rank import draw_generator
from rosa_ds.adapters.reach import leave_out, look_at_model
from rosa_ds.adapters.registry import (
    DEFAULT,
    Adapter,
    active_adapter,
    adapters_of,
    check_enabled,
    check_exchangeable,
    check_room,
    keep,
)
from rosa_ds.adapters.targets import (
    Linear,
    by_pattern,
    check_patterns,
    find_targets,
    match_names,
    stacked_weights,
    warn_of_left_out,
)
from rosa_ds.config.methods import METHODS
from rosa_ds.config.schema import (
    AdapterConfig,
    Directions,
    DrawSettings,
    Factorization,
)
from rosa_ds.models.checks import is_finite
from rosa_ds.models.quantized import QuantizedLinear
from rosa_ds.models.task import head_modules
from rosa_ds.utils.logs import SAME_ON_ALL_RANKS

_DRAW = DrawSettings()
logger = logging.getLogger(__name__)


PARTS = ("A", "B", "values", "positions")


@dataclasses.dataclass(frozen=True)
class InjectReport:
    """What :func:`inject` did: names of the adapted layers and counts of numbers."""

    adapted: tuple[str, ...]
    trained_whole: tuple[str, ...]
    low_rank: int
    sparse: int
    whole: int
    frozen: int

    @property
    def trained(self) -> int:
        return self.low_rank + self.sparse + self.whole

    def __str__(self) -> str:
        share = self.trained / max(1, self.trained + self.frozen)
        parts = [(self.low_rank, "low-rank"), (self.sparse, "sparse"), (self.whole, "whole modules")]
        said = ", ".join(f"{count:,} {what}" for count, what in parts if count)
        return (
            f"{len(self.adapted)} layers adapted; {self.trained:,} trained ({said}), "
            f"{self.frozen:,} frozen: {share:.2%} trained"
        )


def inject(
    model: nn.Module,
    config: AdapterConfig,
    seed: int = 42,
    draw: DrawSettings | None = _DRAW,
    keep_base: bool = False,
    name: str = DEFAULT,
    look: bool = True,
) -> InjectReport:
    """Freeze a model and give it trainable parts; the function it computes does not change.

    The subspace methods make their first draw here, which changes the base.

    Args:
        model: any model with ``nn.Linear`` or ``Conv1D`` layers, also on the meta device or partitioned by ZeRO-3 (whose
            weights are not gathered); changed in place.
        config: method, ranks, densities, targets. ``full`` makes everything trainable instead.
        seed: of the initial ``A`` or the first draw, per layer.
        draw: how the subspace methods draw; ``None``: not here, :func:`draw` or a run does it. ``A`` and ``B`` are then LoRA's.
        keep_base: copy what the adapter changes of the base itself (the adapted weights of the subspace methods, modules that
            are trained whole), so that :func:`rosa_ds.disable` and :func:`rosa_ds.set_adapter` can put it back. The other
            parts of an adapter leave the base as it is.
        name: of the adapter, beside others of this model that are not in it now.
        look: find the layers that the loss does not depend on, by a forward pass without numbers of a model of this one's config,
            if it is one of transformers and not partitioned: ``all-linear`` leaves them out.

    Returns: what matched, and counts.
    Raises: ValueError if a target, pattern or module to save matches nothing, a target is a layer that the loss does not depend
        on, a rank is too large for a draw, or the model has adapters already.
    """
    check_room(model, name, bool(adapted_layers(model)))
    if config.parts.everything:
        _check_trainable(model, [""])
        model.requires_grad_(True)
        _enter(model, config, seed, keep_base, name)
        return InjectReport((), ("all",), 0, 0, sum(map(zero.full_numel, model.parameters())), 0)
    if look:
        wanted = leave_out(model, config.target_modules, look_at_model(model))
        config = config.model_copy(update={"target_modules": wanted})
    targets, whole = _match(model, config)
    _check_trainable(model, whole)
    if idle := [head for head in head_modules(model) if not any(f"{head}.".startswith(f"{w}.") for w in whole)]:
        said = "the classifier's head (%s) stays as it is: modules_to_save would train it"
        logger.warning(said, ", ".join(idle), extra=SAME_ON_ALL_RANKS)
    if stacked := stacked_weights(model, whole):
        said = "no adapter reaches %d weights of three dimensions (experts, e.g. %s): they stay as they are"
        logger.warning(said, len(stacked), stacked[0], extra=SAME_ON_ALL_RANKS)
    if config.target_modules == ["all-linear"]:
        warn_of_left_out(model)
    plans = {target: plan_layer(target, layer, config) for target, layer in targets.items()}
    draw = draw if config.parts.resampled else None
    if draw is not None:
        _check_drawable(model)
        _check_finite({target: targets[target] for target, plan in plans.items() if plan.rank})
    if keep_base:
        changed = [layer for layer in targets.values() if config.parts.resampled]
        check_exchangeable(p for m in (*changed, *map(model.get_submodule, whole)) for p in m.parameters())

    model.requires_grad_(False)
    for target, plan in plans.items():
        if plan.rank or plan.entries:
            old = targets[target]
            parts = (plan.rank, plan.scale, plan.dropout, plan.entries)
            adapted = AdaptedLinear(old, target, *parts, seed, config.sparse_product, config.parts.resampled)
            set_submodule(model, target, adapted.train(old.training))
    for module in whole:
        model.get_submodule(module).requires_grad_(True)
    _enter(model, config, seed, keep_base, name)
    if draw is not None:
        _draw(model, draw, seed, 0)
    return _report(model, tuple(whole))


def _match(model: nn.Module, config: AdapterConfig) -> tuple[dict[str, Linear], list[str]]:
    """Layers to adapt by their names, and names of modules to train whole. Raises: ValueError as :func:`inject`."""
    all_names = [name for name, _ in model.named_modules() if name]
    whole = match_names(config.modules_to_save, all_names, "adapter.modules_to_save")
    targets = find_targets(model, config.target_modules, whole)
    check_patterns(config.rank_pattern, targets, "adapter.rank_pattern")
    check_patterns(config.alpha_pattern, targets, "adapter.alpha_pattern")
    check_patterns(config.density_pattern, targets, "adapter.density_pattern")
    both = [name for name in targets if any(name == other or name.startswith(other + ".") for other in whole)]
    if both:
        raise ValueError(f"{both[0]} is both in adapter.target_modules and in adapter.modules_to_save: choose one")
    return targets, whole


@dataclasses.dataclass(frozen=True)
class LayerPlan:
    """What one layer is given: ``rank``, ``entries`` of the sparse part, ``scale`` of ``B A``, ``dropout``."""

    rank: int
    entries: int
    scale: float
    dropout: float


def plan_layer(name: str, layer: nn.Module, config: AdapterConfig) -> LayerPlan:
    """What the settings give a layer. Raises: ValueError for more entries or directions than can be."""
    draws = config.parts.resampled
    rank = by_pattern(name, config.rank_pattern, config.rank) if config.parts.low_rank else 0
    density = by_pattern(name, config.density_pattern, config.density) if config.parts.sparse else 0.0
    shape = stored_shape(layer)
    if draws and rank >= (smaller := min(shape)):
        raise ValueError(
            f"rank {rank} of {name} takes all {smaller} directions of its weight: lower adapter.rank (or adapter.rank_pattern "
            "for this layer), or train it whole with adapter.modules_to_save"
        )
    if density > 0 and shape.numel() > MAX_POSITIONS:
        raise ValueError(
            f"{name}.weight has {shape.numel():,} entries, int32 positions reach {MAX_POSITIONS:,}: leave it out "
            "of the sparse part with adapter.density_pattern"
        )
    alpha = by_pattern(name, config.alpha_pattern, config.alpha)
    scale = alpha / rank if rank and not draws else 1.0
    return LayerPlan(rank, round(density * shape.numel()), scale, 0.0 if draws else config.dropout)


def _check_finite(layers: Mapping[str, nn.Module]) -> None:
    """Raise ValueError, before anything is changed, for a weight that no draw could take apart."""
    for name, layer in layers.items():
        assert isinstance(layer.weight, Tensor)
        if layer.weight.is_floating_point() and not is_finite(layer.weight):
            raise ValueError(f"{name}: its weight is not finite")


def _check_trainable(model: nn.Module, modules: list[str]) -> None:
    """Raise ValueError for a quantised layer in modules that are to be trained whole."""
    for name, module in ((name, model.get_submodule(name)) for name in modules):
        for inner, layer in module.named_modules(prefix=name):
            if isinstance(layer, QuantizedLinear):
                raise ValueError(
                    f"{inner} is quantised, so it cannot be trained whole: leave it out of rosa_ds.quantize (skip=...), or in a run "
                    "name its module in adapter.modules_to_save"
                )


def _enter(model: nn.Module, config: AdapterConfig, seed: int, keep_base: bool, name: str) -> None:
    known, parts = adapters_of(model), adapter_parts(model)
    whole = [own for own, p in model.named_parameters() if p.requires_grad and id(p) not in parts]
    known.active, known.disabled = Adapter(name, config, seed, whole), False
    if keep_base:
        keep(model, changed_parameters(model, planned=True))


def _report(model: nn.Module, whole: tuple[str, ...]) -> InjectReport:
    layers = adapted_layers(model)
    count = {"A": 0, "B": 0, "values": 0, "whole": 0, "frozen": 0}
    own = adapter_parts(model)
    numbers = _quantized_numbers(model)
    for parameter in model.parameters():
        key = own.get(id(parameter), "whole" if parameter.requires_grad else "frozen")
        if key != "positions":
            count[key] += numbers.get(id(parameter), zero.full_numel(parameter))
    low_rank = count["A"] + count["B"]
    return InjectReport(tuple(layers), whole, low_rank, count["values"], count["whole"], count["frozen"])


def _quantized_numbers(model: nn.Module) -> dict[int, int]:
    """``id`` of the parameters that stand for a quantised weight -> how many of its numbers they count for."""
    numbers: dict[int, int] = {}
    for module in model.modules():
        if isinstance(module, (AdaptedLinear, QuantizedLinear)) and module.form is not None:
            numbers |= {id(module.weight): module.form.numel, id(module.weight_scales): 0}
            if isinstance(module, AdaptedLinear) and module.change is not None:
                numbers[id(module.change)] = 0
    return numbers


def draw(
    model: nn.Module,
    directions: Directions = "random",
    sigma: Literal["A", "B", "even"] = "A",
    factorization: Factorization = "gram",
    seed: int = 42,
    number: int | None = None,
) -> None:
    """Fold the low-rank parts of a subspace method into the base and split new ones off; the function stays the same.

    A 16-bit base is rounded by each draw. Moments of A and B in an optimizer are the caller's to reset.

    Args:
        directions, sigma, factorization: as in :class:`rosa_ds.config.schema.DrawSettings`.
        number: with ``seed`` it decides the directions; by default one more than that of the last draw.

    Raises: ValueError for another method, a model that a DeepSpeed engine or ZeRO-3 has taken, a weight that is not finite.
    """
    adapter = adapters_of(model).active
    if adapter is None or not adapter.config.parts.resampled:
        raise ValueError(
            f"draw is for models injected with one of the methods {', '.join(sorted(name for name, parts in METHODS.items() if parts.resampled))}"
            f"{f', this one has {adapter.config.method}' if adapter else ''}"
        )
    check_without_engine(model)
    check_enabled(model)
    _check_drawable(model)
    settings = DrawSettings(directions=directions, sigma=sigma, factorization=factorization)
    _draw(model, settings, seed, adapter.draws if number is None else number)


def check_without_engine(model: nn.Module) -> None:
    """Raise ValueError for a model whose parameters have masters in a DeepSpeed engine: they would undo what is written."""
    if any(map(zero.belongs_to_engine, model.parameters())):
        raise ValueError(
            "this model belongs to a DeepSpeed engine already, whose float32 masters would undo what is written to it: do it "
            "before deepspeed.initialize"
        )


def _check_drawable(model: nn.Module) -> None:
    if any(zero.is_partitioned(p) or p.is_meta for p in model.parameters()):
        raise ValueError(
            "this model's parameters are partitioned by ZeRO-3, or not there: inject it with draw=None, and leave the draws to "
            "rosa-ds train"
        )


def _draw(model: nn.Module, settings: DrawSettings, seed: int, number: int) -> None:
    for name, layer in adapted_layers(model).items():
        if not layer.rank:
            continue
        try:
            layer.redraw(settings, draw_generator(seed, name, number))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    active_adapter(model).draws = number + 1


@torch.no_grad()
def merge(model: nn.Module) -> nn.Module:
    """Fold the adapter into the base weights and put plain layers back: an ordinary transformers model again.

    The sum is formed in float32 and rounded once to the weight's dtype. A quantised base becomes dense, in the type that it was
    used in: the sum has more values than 4 or 8 bits. Returns the same model, changed.
    Raises: ValueError for a model that ZeRO-3 has partitioned, whose layers cannot be exchanged, or that has other adapters,
        which belong to the base as it was.
    """
    if others := list(adapters_of(model).parked):
        raise ValueError(
            f"this model has other adapters ({', '.join(others)}), which belong to the base as it is: rosa_ds.remove_adapter "
            "first, or use rosa_ds.merged for a while"
        )
    _fold(model)
    adapters_of(model).active = None
    return model


@contextlib.contextmanager
def merged(model: nn.Module) -> Iterator[nn.Module]:
    """The model with its adapters folded in, for evaluation or generation; after the block as before, bit for bit.

    Keeps a copy of the adapted base weights meanwhile, or of a quantised base the dense one.
    """
    _check_whole(model)
    layers = _mergeable(model)
    backup = {name: layer.weight.detach().clone() for name, layer in layers.items() if layer.form is None}
    try:
        _fold(model)
        yield model
    finally:
        for name, layer in layers.items():
            if name in backup:
                layer.weight.data.copy_(backup[name])
            set_submodule(model, name, layer)


def _check_whole(model: nn.Module) -> None:
    if any(zero.is_partitioned(parameter) for parameter in model.parameters()):
        raise ValueError(
            "this model's parameters are partitioned by ZeRO-3 or over the ranks, so nothing can be merged into them: save the adapter "
            "(rosa_ds.save_adapter) and merge it into a model of one process, as rosa-ds export does"
        )
    check_enabled(model)


@torch.no_grad()
def _fold(model: nn.Module) -> None:
    _check_whole(model)
    for name, layer in _mergeable(model).items():
        if layer.form is None:
            assert isinstance(layer, AdaptedLinear)
            layer.weight.data.copy_(layer.merged_weight())
            dense = layer.weight
        else:
            whole = layer.merged_weight() if isinstance(layer, AdaptedLinear) else layer.dense(layer.weight)
            dense = nn.Parameter(whole.to(layer.form.dtype), requires_grad=False)
        set_submodule(model, name, plain_layer(layer, dense))


def _mergeable(model: nn.Module) -> dict[str, AdaptedLinear | QuantizedLinear]:
    """The layers that are not plain ones, by name."""
    kinds = (AdaptedLinear, QuantizedLinear)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def adapted_layers(model: nn.Module) -> dict[str, AdaptedLinear]:
    """The model's adapted layers by name, in the model's order."""
    return {module.name: module for module in model.modules() if isinstance(module, AdaptedLinear)}


def adapter_parts(model: nn.Module) -> dict[int, str]:
    """``id`` of every parameter that belongs to an adapter -> which of :data:`PARTS` it is."""
    layers = adapted_layers(model).values()
    pairs = ((getattr(layer, part), part) for layer in layers for part in PARTS)
    return {id(parameter): part for parameter, part in pairs if parameter is not None}


def changed_parameters(model: nn.Module, planned: bool = False) -> list[str]:
    """Names of the base's parameters that the adapter has changed, or with ``planned`` that it will change.

    Draws write beside a quantised weight, which is the base as it ever was.
    """
    adapter = active_adapter(model)
    draws = planned and adapter.config.parts.resampled
    layers = [layer for layer in adapted_layers(model).values() if layer.form is None]
    drawn = [layer.weight_name for layer in layers if layer.drawn or (draws and layer.rank)]
    return drawn + adapter.whole


def set_submodule(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in the place of the one that has this name."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent) if parent else model, child, module)
