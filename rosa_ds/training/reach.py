"""Which layers the loss depends on: found by one small forward pass, before a layer is adapted for nothing.

Layers can be there and not be used: those whose weight the model reads itself (``dt_proj`` of Mamba), the towers for images and
sounds of a model that is given text, what a fused kernel passes by.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rosa_ds.adapters.inject import adapted_layers
from rosa_ds.adapters.targets import find_targets, linear_layers
from rosa_ds.config.schema import RunConfig
from rosa_ds.data.batches import Batch, collate
from rosa_ds.data.labelled import LabelledSet
from rosa_ds.data.prepare import TokenSet
from rosa_ds.data.tokenise import Tokens
from rosa_ds.memory.activation_tracer import NOT_TRACED, Shape, running, without_numbers
from rosa_ds.memory.fake_model import MORE, alike_layers, with_layers, with_padding
from rosa_ds.models.checks import rounding_of
from rosa_ds.models.load import read_config
from rosa_ds.models.loss import batch_logits, loss_of
from rosa_ds.models.stream import build_on_meta
from rosa_ds.models.task import is_classifier
from rosa_ds.utils.texts import kind_of, summary

logger = logging.getLogger(__name__)
_LENGTH, _TARGETS = 256, 8
_WITH_ALL_SHAPES = torch.bfloat16
"""The type in which every operator says its result's shape; ``_grouped_mm`` of experts does not in float32."""


@dataclasses.dataclass(frozen=True)
class Use:
    """What a forward pass does with a layer: how often it calls it, and whether the loss depends on what that gives."""

    calls: int
    reaches_loss: bool


def uses(model: nn.Module, layers: Mapping[str, nn.Module], loss: Callable[[], Tensor]) -> dict[str, Use]:
    """What one call of ``loss``, a forward pass of ``model`` with gradients, does with each of ``layers``."""
    nodes: dict[str, list[Any]] = {name: [] for name in layers}

    def mark(name: str) -> Callable[..., Tensor]:
        def hook(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> Tensor:
            output = output if output.requires_grad else output.detach().requires_grad_()
            # a node of this call alone, also where what is given is then changed in place (Falcon)
            output = output.clone()
            nodes[name].append(output.grad_fn)
            return output

        return hook

    with contextlib.ExitStack() as hooks:
        for name, layer in layers.items():
            hooks.enter_context(layer.register_forward_hook(mark(name)))
        hooks.enter_context(_without_checkpointing(model))
        hooks.enter_context(torch.enable_grad())
        reached = _ancestors(loss().grad_fn)
    return {name: Use(len(found), any(node in reached for node in found)) for name, found in nodes.items()}


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


def settle_targets(settings: RunConfig, config: Any = None) -> tuple[RunConfig, bool]:
    """The settings with ``all-linear`` resolved where it would adapt layers that the loss does not depend on; says which.

    The model goes through a forward pass without numbers, of rows of ``data.max_length``: nothing of its weights is read, and
    every stage and quantised base gives the same answer.

    Args:
        config: of transformers; by default the base's.

    Returns: the settings, and whether the model could be traced so; else nothing is known yet.
    Raises: ValueError for such a layer that ``adapter.target_modules`` names, or that would be quantised.
    """
    if settings.parts.everything:
        return settings, True
    begun = time.monotonic()
    config = read_config(settings.model) if config is None else config
    alike = alike_layers(config) is not None
    few = with_padding(with_layers(config, MORE) if alike else config)
    try:
        small = build_on_meta(few, settings.model, _WITH_ALL_SHAPES)
        idle = _unreached_without_numbers(small, settings.data.max_length)
    except NOT_TRACED as error:  # experts that are chosen by numbers; the first pass with numbers looks again
        logger.debug("which layers the loss depends on is not known yet (%s: %s)", type(error).__name__, error)
        return settings, False
    if not idle:
        return settings, True
    model = build_on_meta(config, settings.model, _WITH_ALL_SHAPES) if alike else small
    wanted = find_targets(model, settings.adapter.target_modules)
    kinds = set(map(kind_of, idle)) if alike else set(idle)
    dead = [name for name in wanted if (kind_of(name) if alike else name) in kinds]
    if not dead:
        return settings, True
    if settings.model.quantization != "none":
        raise ValueError(
            f"model.quantization {settings.model.quantization}: the model reads the weight of {dead[0]} itself, or text never reaches "
            f"it ({len(dead)} such layers: {summary(dead)}): it cannot be quantised; use model.quantization none"
        )
    if settings.adapter.target_modules != ["all-linear"]:
        raise ValueError(_refusal("adapter.target_modules names", dead, wanted))
    logger.warning(
        "all-linear leaves out %d of %d layers, whose weight the model reads itself or which text never reaches: %s (found in %.1f s)",
        len(dead),
        len(wanted),
        summary(dead),
        time.monotonic() - begun,
    )
    kept = [name for name in wanted if name not in set(dead)]
    adapter = settings.adapter.model_copy(update={"target_modules": kept})
    return settings.model_copy(update={"adapter": adapter}), True


def _unreached_without_numbers(model: PreTrainedModel, length: int) -> list[str]:
    layers = linear_layers(model)
    mode = without_numbers(model)
    with running(model, mode, Shape(2, length, _TARGETS, padded=False)) as loss:
        return unreached(uses(model, layers, loss))


def probe(engine: Any, model: PreTrainedModel, data: TokenSet, pad_id: int, traced: bool) -> int:
    """One forward pass of two short rows with the adapters, on the device and by the kernels of the run. Collective.

    Args:
        traced: :func:`settle_targets` could look at the model. What this pass does not reach may then need longer rows, or a
            kernel passes it by, and is told; else it is refused.

    Returns: how often it calls the layer that it calls most.
    Raises: ValueError for adapted layers that the loss does not depend on, or a language model that sees the tokens that it
        is to predict.
    """
    begun = time.monotonic()
    layers = adapted_layers(model)
    device = engine.device
    batch = _short_batch(data, pad_id)
    seen: list[Tensor] = []

    def loss() -> Tensor:
        seen.append(batch_logits(engine, batch, device))
        return loss_of(seen[0], batch.targets.to(device))

    engine.eval()
    found = uses(model, layers, loss)
    length = batch.input_ids.shape[1]
    if dead := unreached(found):
        if not traced:
            raise ValueError(_refusal("there are adapters on", dead, layers))
        logger.warning(
            "no gradient reaches the adapters of %d layers in rows of %d tokens: %s; if a kernel passes them by, they are not trained",
            len(dead),
            length,
            summary(dead),
        )
    if not is_classifier(model):
        _check_causal(model, seen[0].detach())
    logger.info("one forward pass of two rows of %d tokens: %.2f s", length, time.monotonic() - begun)
    return max((use.calls for use in found.values()), default=1)


def _short_batch(data: TokenSet, pad_id: int) -> Batch:
    """Two rows: the shortest, or for a language model half of the longest, and the same with another last token; so they hold
    no more tokens than the longest one.
    """
    if isinstance(data, LabelledSet):
        return data.batch([int(data.lengths.argmin())] * 2, pad_id)
    length = max(2, min(_LENGTH, int(data.lengths.max()) // 2))
    ids = data.sequence(int(data.lengths.argmax())).ids[:length]
    other = [*ids[:-1], next((token for token in ids if token != ids[-1]), pad_id)]
    trained = [number >= len(ids) - _TARGETS for number in range(len(ids))]
    return collate([Tokens(row, trained) for row in (ids, other)], pad_id)


def _check_causal(model: PreTrainedModel, logits: Tensor) -> None:
    """Raise ValueError if what is said before the last token depends on it. Shapes: logits (2, K, V) of the K positions before it."""
    wide = logits.float()
    if float((wide[0] - wide[1]).abs().max()) > rounding_of(logits):
        raise ValueError(
            f"{type(model).__name__} sees the tokens that it is to predict (another last token changes what it says before it): it "
            "is no language model that continues a text; encoders have a setting such as is_decoder in config.json, or use "
            "model.task classification"
        )


def _refusal(what: str, dead: list[str], wanted: Iterable[str]) -> str:
    kept = list(dict.fromkeys(name.rpartition(".")[2] for name in wanted if name not in set(dead)))
    spoilt = {name.rpartition(".")[2] for name in dead}
    names = [name for name in kept if name not in spoilt]
    remedy = f"name others, such as {','.join(names)}" if names else "name others"
    return (
        f"{what} {len(dead)} layers that no gradient reaches, because the model reads their weight itself or text never comes to "
        f"them: {summary(dead)}; {remedy}"
    )
