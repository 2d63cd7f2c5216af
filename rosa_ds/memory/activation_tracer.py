"""What a micro-batch keeps between forward and backward, counted without computing anything.

A model whose tensors have a shape and no numbers goes through forward and backward once. Every storage that an operator
makes is counted from its birth to its end, so that no formula has to know an architecture.
"""

from __future__ import annotations

import dataclasses
import math
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rosa_ds.config.schema import LossBlock
from rosa_ds.models.no_numbers import Shape, running


@dataclasses.dataclass(frozen=True)
class Activations:
    """Bytes of one micro-batch on one rank, beside parameters and their gradients.

    ``saved``: of distinct storages that autograd keeps when forward is done. ``peak``: most that is alive at any moment of
    forward and backward, ``saved`` included.
    """

    saved: int
    peak: int

    def extended(self, other: Activations, share: float) -> Activations:
        """The point on the line from here through ``other`` that is ``share`` of their distance away, rounded up."""
        saved = math.ceil(self.saved + (other.saved - self.saved) * share)
        return Activations(saved, math.ceil(self.peak + (other.peak - self.peak) * share))


class SavedBytes:
    """Counts, while it is entered, the distinct storages that autograd saves, without parameters.

    Inside a block that recomputes its activations only what is kept outside of it is seen.
    """

    def __init__(self, model: nn.Module) -> None:
        self._known = {_key(parameter) for parameter in model.parameters() if parameter.numel()}
        self._found: dict[int, int] = {}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._take, lambda tensor: tensor)

    def _take(self, tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter) and (key := _key(tensor)) not in self._known:
            self._found[key] = tensor.untyped_storage().nbytes()
        return tensor

    @property
    def bytes(self) -> int:
        return sum(self._found.values())

    def __enter__(self) -> SavedBytes:
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)


def _key(tensor: Tensor) -> int:
    """One for each storage; a saved one lives as long as the block, so that no key is used twice."""
    return int(tensor.untyped_storage()._cdata)


class LiveBytes(TorchDispatchMode):
    """Counts, while it is entered, the bytes of storages that operators have made and nobody has let go: now and at most."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: dict[int, Any] = {}

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def know(self, tensor: Tensor) -> None:
        """Leave a tensor's storage out of the count."""
        self._alive.setdefault(_key(tensor), None)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.layout == torch.strided:
                self._take(leaf)
        return result

    def _take(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:
            return

        def forget(_: Any) -> None:
            if self._alive.pop(key, None) is not None:
                self.now -= size

        self._alive[key] = weakref.ref(storage, forget)
        self.now += size
        self.peak = max(self.peak, self.now)


def trace(model: nn.Module, mode: FakeTensorMode, shape: Shape, loss_block: LossBlock = "auto") -> Activations:
    """Forward and backward of one micro-batch of a model that :func:`without_numbers` has emptied. Arguments as :func:`running`."""
    model.train()
    live = LiveBytes()
    with running(model, mode, shape, loss_block) as loss_of_batch:
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.grad = None
            live.know(tensor)
        with live:
            saved = SavedBytes(model)
            with saved:
                loss = loss_of_batch()
            known = saved.bytes
            grads = watch_gradients(model, live)
            loss.backward()
            for handle in grads:
                handle.remove()
    for parameter in model.parameters():
        parameter.grad = None
    return Activations(known, live.peak)


def watch_gradients(model: nn.Module, live: LiveBytes) -> list[Any]:
    """Take a parameter's gradient out of the count as soon as it is there."""

    def leave_out(parameter: Tensor) -> None:
        if parameter.grad is not None:
            live.now -= parameter.grad.untyped_storage().nbytes()
            live._alive[_key(parameter.grad)] = None

    return [p.register_post_accumulate_grad_hook(leave_out) for p in model.parameters() if p.requires_grad]
