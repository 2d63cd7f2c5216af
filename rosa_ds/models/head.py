"""The output head and the loss a block of tokens at a time, so that the logits of a batch are never there at once.

The model's own forward runs as always, so that DeepSpeed's hooks gather what is partitioned, the head once for all blocks.
Only what the head computes is another: from hidden states, a block of positions after the other, the loss itself. What the
model does with logits behind its head (scales, soft caps) was recorded in a pass of a few tokens, and is done to each block.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from rosa_ds.models.quantized import QuantizedLinear

BLOCK_BYTES = 256 * 2**20
"""Of the logits of a block in float32, where no number of tokens is given."""
_PLAIN = (nn.Linear, Conv1D, QuantizedLinear)
_FLOAT16_SCALE = 256.0
"""What keeps a softmax's small numbers from vanishing in float16, until backward brings DeepSpeed's own scale."""


@dataclasses.dataclass(frozen=True)
class Targets:
    """The ``tokens`` that are to be predicted at ``places`` of the head's rows, a batch's positions one row after the other; at all
    of them without places. Losses count ``weight`` times.

    Shapes: both (T,) int64.
    """

    tokens: Tensor
    places: Tensor | None
    weight: float = 1.0


@dataclasses.dataclass(frozen=True)
class _Made:
    """Stands in a recorded step for what the head, number 0, or an earlier step has made."""

    number: int


@dataclasses.dataclass(frozen=True)
class _Step:
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    named: dict[str, Any]


class _Recorder(TorchFunctionMode):
    """Records, while it is entered, what is made of the tensor that :meth:`begin` is given, until :meth:`end`."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[_Step] = []
        self.logits: Tensor | None = None
        self._newest: Tensor | None = None
        self._made: dict[int, tuple[Tensor, _Made]] = {}  # by id, which belongs to the tensor as long as it is here
        self._begun = 0

    def begin(self, tensor: Tensor) -> None:
        self._begun += 1
        self._keep(tensor)

    def end(self, logits: Tensor) -> None:
        """``logits`` are kept if they are the last that was made of what was given, once."""
        self.logits = logits if self._begun == 1 and logits is self._newest else None
        self._made.clear()

    def _keep(self, tensor: Tensor) -> None:
        self._made[id(tensor)] = tensor, _Made(len(self.steps))
        self._newest = tensor

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        named = kwargs or {}
        result = func(*args, **named)
        if isinstance(result, Tensor) and any(id(leaf) in self._made for leaf in tree_leaves((args, named))):
            arguments, named = tree_map(self._stand_in, (args, named))
            self.steps.append(_Step(func, arguments, named))
            self._keep(result)
        return result

    def _stand_in(self, leaf: Any) -> Any:
        return self._made[id(leaf)][1] if id(leaf) in self._made else leaf


class _KnownGradients(torch.autograd.Function):
    """A sum whose gradients were computed beside it: ``given`` are first what it was made of, then as many gradients."""

    @staticmethod
    def forward(ctx: Any, total: Tensor, scale: float, *given: Tensor | None) -> Tensor:
        ctx.scale, ctx.dtypes = scale, [made.dtype for made in given[: len(given) // 2] if made is not None]
        ctx.save_for_backward(*given[len(given) // 2 :])
        return total.clone()

    @staticmethod
    def backward(ctx: Any, *incoming: Tensor) -> tuple[Tensor | None, ...]:
        factor = incoming[0] / ctx.scale
        found = [
            None if gradient is None else (gradient * factor).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return None, None, *found, *[None] * len(found)


@dataclasses.dataclass(frozen=True)
class BlockedHead:
    """The head of a causal language model, ``module``, with the steps that the model takes behind it.

    ``block``: tokens whose logits are there at once.
    """

    module: nn.Module
    steps: list[_Step]
    block: int

    def loss_sum(self, model: nn.Module, call: Callable[[], Any], targets: Targets) -> Tensor:
        """Sum of the negative log-likelihoods, float32 (float64 in a float64 model), with gradients.

        Args:
            model: that ``call`` calls, itself or by its engine, with hidden states for the head as ``targets`` count them.
        """
        module: Any = self.module
        plain = type(module) in _PLAIN

        def compute(forward: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
            total = self._sum_and_gradients if plain else self._sum_recomputed
            return total(forward, rows, targets)

        with self._instead(model, targets, compute):
            total: Tensor = call().view(())
        return total

    @torch.no_grad()
    def losses(self, model: nn.Module, call: Callable[[], Any], targets: Targets) -> Tensor:
        """The negative log-likelihood of each target, (T,), as :meth:`loss_sum` without gradients."""
        found: list[Tensor] = []

        def compute(forward: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
            for part, tokens in self._blocks(rows, targets):
                log_probabilities, _ = self._log_probabilities(forward, part)
                found.append(-log_probabilities.gather(1, tokens[:, None])[:, 0])
            return found[-1].sum()

        with self._instead(model, targets, compute):
            call()
        return torch.cat(found) * targets.weight

    @contextlib.contextmanager
    def _instead(
        self, model: nn.Module, targets: Targets, compute: Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]
    ) -> Iterator[None]:
        """While it is entered, calling the model gives what ``compute`` makes of the head's own forward and its rows (T, H)."""
        module: Any = self.module
        own, found = module.forward, []

        def forward(hidden: Tensor) -> Tensor:
            rows = hidden.flatten(0, -2)
            rows = rows if targets.places is None else rows.index_select(0, targets.places)
            return compute(own, rows).view(1, 1, 1)  # the model goes on with it as with logits, for nothing

        hooks = (
            module.register_forward_hook(lambda _, __, output: found.append(output)),  # as DeepSpeed's hooks leave it
            model.register_forward_hook(lambda *_: found[-1], prepend=True),  # for DeepSpeed's hooks, too
        )
        before = vars(module).get("forward")
        module.forward = forward
        try:
            yield
        finally:
            del module.forward
            if before is not None:
                module.forward = before
            for hook in hooks:
                hook.remove()

    def _blocks(self, rows: Tensor, targets: Targets) -> Iterator[tuple[Tensor, Tensor]]:
        # what a mask is collected from is the gradient of all rows at once
        size = len(rows) if getattr(self.module, "collect", None) is not None else self.block
        return zip(rows.split(size), targets.tokens.split(size), strict=True)

    def _logits(self, forward: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
        made = [forward(rows[None])]

        def settle(leaf: Any) -> Any:
            return made[leaf.number] if isinstance(leaf, _Made) else leaf

        for step in self.steps:
            arguments, named = tree_map(settle, (step.arguments, step.named))
            made.append(step.function(*arguments, **named))
        return made[-1].flatten(0, 1)  # not [0], whose gradient is another tensor of that size

    def _log_probabilities(self, forward: Callable[[Tensor], Tensor], rows: Tensor) -> tuple[Tensor, Tensor]:
        """In float32 or wider, a new tensor, and the logits that they come from."""
        logits = self._logits(forward, rows)
        wide = torch.promote_types(logits.dtype, torch.float32)
        return logits.detach().log_softmax(-1, dtype=wide), logits

    def _sum_and_gradients(self, forward: Callable[[Tensor], Tensor], rows: Tensor, targets: Targets) -> Tensor:
        """Of a head that is a product and no more: gradients are computed while a block's logits are there, none twice."""
        total = torch.zeros((), dtype=torch.promote_types(rows.dtype, torch.float32), device=rows.device)
        if not torch.is_grad_enabled():
            for part, tokens in self._blocks(rows, targets):
                total -= self._log_probabilities(forward, part)[0].gather(1, tokens[:, None]).sum()
            return total * targets.weight
        trained = self._trained()
        scale = _FLOAT16_SCALE if rows.dtype == torch.float16 else 1.0
        of_rows: list[Tensor] = []
        of_trained: list[Tensor | None] = [None] * len(trained)
        # what a block keeps for its own backward is not what the model keeps: no hooks of others
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
            for part, tokens in self._blocks(rows, targets):
                part = part.detach().requires_grad_()
                gradient, logits = self._log_probabilities(forward, part)
                total -= gradient.gather(1, tokens[:, None]).sum()
                gradient.exp_().scatter_add_(1, tokens[:, None], gradient.new_full((len(part), 1), -1.0))
                if targets.weight * scale != 1:
                    gradient *= targets.weight * scale
                gradient = gradient.to(logits.dtype)
                mine, *others = torch.autograd.grad(logits, [part, *trained], gradient, allow_unused=True)
                del gradient, logits
                of_rows.append(mine)
                for number, other in enumerate(others):
                    of_trained[number] = _add(of_trained[number], other)
        gradients = [of_rows[0] if len(of_rows) == 1 else torch.cat(of_rows), *of_trained]
        known: Tensor = _KnownGradients.apply(total * targets.weight, scale, rows, *trained, *gradients)
        return known

    def _sum_recomputed(self, forward: Callable[[Tensor], Tensor], rows: Tensor, targets: Targets) -> Tensor:
        """Of a head with adapters: its gradients are made in backward, where their scale is known; several blocks are computed
        again there.
        """

        def block_sum(part: Tensor, tokens: Tensor) -> Tensor:
            logits = self._logits(forward, part)
            wide = torch.promote_types(logits.dtype, torch.float32)
            return nn.functional.cross_entropy(logits.to(wide), tokens, reduction="sum")

        parts = list(self._blocks(rows, targets))
        if len(parts) == 1 or not torch.is_grad_enabled():
            sums = [block_sum(*part) for part in parts]
        else:
            sums = [checkpoint(block_sum, *part, use_reentrant=False) for part in parts]
        return torch.stack(sums).sum() * targets.weight

    def _trained(self) -> list[Tensor]:
        """What is trained of the head, or behind it."""
        behind = (leaf for step in self.steps for leaf in tree_leaves((step.arguments, step.named)))
        found = [*self.module.parameters(), *(leaf for leaf in behind if isinstance(leaf, Tensor))]
        return list({id(tensor): tensor for tensor in found if tensor.requires_grad}.values())


def _add(total: Tensor | None, gradient: Tensor | None) -> Tensor | None:
    """A sum over blocks, in float32 or wider."""
    if total is None or gradient is None:
        return gradient if total is None else total
    wide = torch.promote_types(total.dtype, torch.float32)
    return total.to(wide).add_(gradient)


def find_head(model: Any, call: Callable[[], Any], block: int | None) -> BlockedHead | str:
    """The head of a model, and what the model does behind it, from one forward pass without gradients; or why it has none that
    can be asked in blocks.

    Args:
        model: that ``call`` calls, itself or by its engine.
        block: tokens whose logits are there at once; by default as many as :data:`BLOCK_BYTES` has room for.
    """
    module = model.get_output_embeddings()
    if not isinstance(module, nn.Module):
        return f"{type(model).__name__} has no module for its output head"
    if any(True for _ in module.children()):
        return f"the output head of {type(model).__name__} consists of several modules"
    recorder = _Recorder()
    hooks = (
        module.register_forward_hook(lambda _, __, output: recorder.begin(output)),
        model.register_forward_hook(lambda _, __, output: recorder.end(output.logits), prepend=True),
    )
    try:
        with torch.no_grad(), recorder:
            call()
    finally:
        for hook in hooks:
            hook.remove()
    if recorder.logits is None or recorder.logits.dim() != 3:
        return f"the logits of {type(model).__name__} are not made of one call of its output head"
    size = max(1, BLOCK_BYTES // (4 * recorder.logits.shape[-1])) if block is None else block
    return BlockedHead(module, recorder.steps, size)
