"""Which linear layers of a model its loss depends on: found by one small forward pass, before a layer is adapted for nothing.

Layers can be there and not be used: those whose weight the model reads itself (``dt_proj`` of Mamba), the towers for images and
sounds of a model that is given text, what a fused kernel passes by.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from transformers import PreTrainedConfig, PreTrainedModel

from rosa_ds import zero
from rosa_ds.adapters.targets import find_targets, linear_layers, warn_of_left_out
from rosa_ds.models.no_numbers import (
    MORE,
    NOT_TRACED,
    Shape,
    alike_layers,
    running,
    with_layers,
    with_padding,
    without_numbers,
)
from rosa_ds.models.stream import allocate, build_like
from rosa_ds.models.task import is_classifier
from rosa_ds.utils.logs import SAME_ON_ALL_RANKS
from rosa_ds.utils.texts import kind_of, summary

logger = logging.getLogger(__name__)
_TARGETS = 8
_SHORT, _MOST_WITH_NUMBERS, _PERIOD = 64, 500_000_000, 1_000_003
"""Tokens of a row, and parameters of a model, that a CPU computes with in seconds; after how many numbers the made ones recur."""
_WITH_ALL_SHAPES = torch.bfloat16
"""The type in which every operator says its result's shape; ``_grouped_mm`` of experts does not in float32."""


@dataclasses.dataclass(frozen=True)
class Use:
    """What a forward pass does with a layer: how often it calls it, whether the loss depends on what that gives, and whether it
    depends on the layer's weight, where that needs a gradient.
    """

    calls: int
    reaches_loss: bool
    weight_reaches_loss: bool


def uses(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    loss: Callable[[], Tensor],
    numbers: bool = False,
    exact: bool = False,
) -> dict[str, Use]:
    """What one call of ``loss``, a forward pass of ``model`` with gradients, does with each of ``layers``.

    Args:
        numbers: the model has them, and a layer that is given nothing but zeros does not count as used.
        exact: nor does one whose gradient is zero, for which the pass goes backward, too.
    """
    nodes: dict[str, list[Any]] = {name: [] for name in layers}
    outputs: dict[str, list[Tensor]] = {name: [] for name in layers}
    fed: dict[str, list[Tensor]] = {name: [] for name in layers}

    def mark(name: str) -> Callable[..., Tensor]:
        def hook(_: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
            output = output if output.requires_grad else output.detach().requires_grad_()
            # a node of this call alone, also where what is given is then changed in place (Falcon)
            output = output.clone()
            nodes[name].append(output.grad_fn)
            if numbers and inputs:
                fed[name].append(inputs[0].detach().any())
            if exact:
                outputs[name].append(output)
            return output

        return hook

    with contextlib.ExitStack() as hooks:
        for name, layer in layers.items():
            hooks.enter_context(layer.register_forward_hook(mark(name)))
        hooks.enter_context(_without_checkpointing(model))
        hooks.enter_context(torch.enable_grad())
        found = loss()
        reached = _ancestors(found.grad_fn)
    used = {name: any(node in reached for node in mine) for name, mine in nodes.items()}
    read = {name: _accumulation(layer) in reached for name, layer in layers.items()}
    if numbers:
        used = {name: use and (not fed[name] or any(map(bool, fed[name]))) for name, use in used.items()}
    if exact:
        every = [output for name, mine in outputs.items() if used[name] for output in mine]
        grads = iter(torch.autograd.grad(found, every, allow_unused=True))
        for name in [name for name, use in used.items() if use]:
            own = [next(grads) for _ in outputs[name]]
            used[name] = any(grad is not None and bool(grad.any()) for grad in own)
    return {name: Use(len(mine), used[name], read[name]) for name, mine in nodes.items()}


def _accumulation(layer: nn.Module) -> Any:
    """The node of autograd that a layer's weight has its gradient from."""
    weight = getattr(layer, "weight", None)
    if isinstance(weight, Tensor) and weight.requires_grad and weight.is_leaf:
        return get_gradient_edge(weight).node
    return None


def _ancestors(node: Any) -> set[Any]:
    """All nodes of a graph of autograd that a backward pass from ``node`` would come to."""
    found, waiting = {node}, [node]
    while waiting:
        for before, _ in waiting.pop().next_functions:
            if before is not None and before not in found:
                found.add(before)
                waiting.append(before)
    return found


@contextlib.contextmanager
def _without_checkpointing(model: nn.Module) -> Iterator[None]:
    """A block that recomputes itself in backward may have no graph in forward."""
    blocks = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False) is True]
    for block in blocks:
        block.gradient_checkpointing = False  # type: ignore[assignment]
    try:
        yield
    finally:
        for block in blocks:
            block.gradient_checkpointing = True  # type: ignore[assignment]


def unreached(found: Mapping[str, Use]) -> list[str]:
    """The layers that the loss does not depend on. Experts that few tokens do not choose count as reached."""
    return [name for name, use in found.items() if not use.reaches_loss and "expert" not in name]


@dataclasses.dataclass(frozen=True)
class Unused:
    """Linear layers of a base that the loss does not depend on, by name: those whose weight the model ``read`` itself, and all."""

    read: tuple[str, ...]
    every: tuple[str, ...]


Builder: TypeAlias = Callable[[Any, torch.dtype], PreTrainedModel]
"""Makes a model of a config on the meta device, computing in a type."""


def find_unused(build: Builder, config: Any, length: int) -> Unused | None:
    """Which of a base's linear layers are not used as such, before anything of its weights is read.

    The model goes through a forward pass without numbers, of rows of ``length`` tokens, or where it asks for them with made
    ones, so every stage and kind of base gives the same answer.

    Returns: ``None`` for a model that could not be looked at so: nothing is known yet.
    """
    begun = time.monotonic()
    config = with_padding(config)
    alike = alike_layers(config) is not None
    try:
        found, same = _uses_of(build, config, length, MORE if alike else None)
        if alike and not same:  # the last layer is used in another way than those before it
            alike = False
            found, _ = _uses_of(build, config, length, None)
    except (*NOT_TRACED, AssertionError, LookupError) as error:  # the first pass of the run looks again
        logger.debug("which layers the loss depends on is not known yet (%s: %s)", type(error).__name__, error)
        return None
    every = unreached(found)
    # of one that is called the graph has the weight anyway
    read = [name for name in every if found[name].weight_reaches_loss and not found[name].calls]
    if every and alike:
        whole = linear_layers(build(config, _WITH_ALL_SHAPES))
        read, every = ([name for name in whole if kind_of(name) in set(map(kind_of, kinds))] for kinds in (read, every))
    logger.debug(
        "found %d linear layers that the loss does not depend on in %.1f s", len(every), time.monotonic() - begun
    )
    return Unused(tuple(read), tuple(every))


def look_at_model(model: nn.Module) -> Unused | None:
    """:func:`find_unused` of a model of transformers that is not partitioned, from its config; ``None``: of another one."""
    if not isinstance(model, PreTrainedModel) or any(zero.is_partitioned(p) for p in model.parameters()):
        return None
    kinds: Any = type(model), type(model.config)
    return _look_at(*kinds, json.dumps(model.config.to_dict(), default=str))


@functools.lru_cache(maxsize=32)
def _look_at(kind: type[PreTrainedModel], config_kind: type[PreTrainedConfig], config: str) -> Unused | None:
    return find_unused(functools.partial(build_like, kind), config_kind.from_dict(json.loads(config)), _SHORT)


def _uses_of(build: Builder, config: Any, length: int, few: int | None) -> tuple[dict[str, Use], bool]:
    """What a config's model does with its linear layers, and whether layers of one kind are all reached or all not.

    Args:
        few: how many of its layers are looked at, where all are alike.

    Raises: one of ``NOT_TRACED`` for a model that is too large to be asked with numbers, or does not run with them.
    """
    config = config if few is None else with_layers(config, few)
    small = build(config, _WITH_ALL_SHAPES)
    try:
        layers, mode = linear_layers(small), without_numbers(small)
        with running(small, mode, Shape(2, length, _TARGETS, padded=False)) as loss:
            found = uses(small, layers, loss)
    except NOT_TRACED:
        if sum(parameter.numel() for parameter in small.parameters()) > _MOST_WITH_NUMBERS:
            raise
        found = _uses_with_numbers(build, config, length)
    idle = unreached(found)
    kinds = set(map(kind_of, idle))
    return found, not any(kind_of(name) in kinds for name in found.keys() - set(idle))


def _uses_with_numbers(build: Builder, config: Any, length: int) -> dict[str, Use]:
    """As :func:`uses`, forward and backward in float32, of a model with made numbers and of rows that end as texts do."""
    model = build(config, torch.float32)
    draw = torch.Generator().manual_seed(0)
    noise = 0.02 * torch.randn(_PERIOD, generator=draw)

    def fill(_: str, parameter: nn.Parameter, target: Tensor, __: slice) -> None:
        times = -(-parameter.numel() // _PERIOD)
        target.copy_(noise.repeat(times)[: parameter.numel()].view(parameter.shape) + float(parameter.ndim < 2))

    allocate(model, fill, torch.device("cpu"))
    text = config.get_text_config()
    length = min(length, _SHORT)
    ids = torch.randint(min(_SHORT, text.vocab_size), (2, length), generator=draw)
    if isinstance(end := getattr(text, "eos_token_id", None), int) and 0 <= end < text.vocab_size:
        ids[ids == end] = 0 if end else 1
        ids[:, -1] = end
    more = {} if is_classifier(model) else {"use_cache": False}

    def loss() -> Tensor:
        logits: Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids), **more).logits
        return (logits * torch.randn(logits.shape, generator=draw)).sum()

    return uses(model.eval(), linear_layers(model), loss, numbers=True, exact=True)


def leave_out(model: nn.Module, wanted: list[str], unused: Unused | None) -> list[str]:
    """``adapter.target_modules`` without the layers that the loss does not depend on, where it is ``all-linear``; says which.

    Args:
        model: the base, or one of its shape on the meta device.

    Raises: ValueError for such a layer that is named, or if no other one is there.
    """
    if unused is None or not unused.every:
        return wanted
    found = find_targets(model, wanted)
    dead = [name for name in found if name in set(unused.every)]
    if not dead:
        return wanted
    if wanted != ["all-linear"]:
        raise ValueError(refusal("adapter.target_modules names", dead, found))
    logger.warning(
        "all-linear leaves out %d of %d layers, whose weight the model reads itself or which text never reaches: %s",
        len(dead),
        len(found),
        summary(dead),
        extra=SAME_ON_ALL_RANKS,
    )
    warn_of_left_out(model)
    kept = [name for name in found if name not in set(dead)]
    if not kept:
        raise ValueError(refusal("all-linear takes", dead, found))
    return kept


def refusal(what: str, dead: list[str], wanted: Iterable[str]) -> str:
    """One line for ``dead`` layers, with what can be named of those that are ``wanted``."""
    kept = list(dict.fromkeys(name.rpartition(".")[2] for name in wanted if name not in set(dead)))
    spoilt = {name.rpartition(".")[2] for name in dead}
    names = [name for name in kept if name not in spoilt]
    remedy = f"name others, such as {','.join(names)}" if names else "name others"
    return (
        f"{what} {len(dead)} layers that no gradient reaches, because the model reads their weight itself, calls them where "
        f"autograd does not look (without gradients, or in a function of its own that recomputes), or text never comes to them: "
        f"{summary(dead)}; {remedy}"
    )
