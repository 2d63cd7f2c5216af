"""What a micro-batch keeps between forward and backward, counted without computing anything.

A model whose tensors have a shape and no numbers goes through forward and backward once. Every storage that an operator
makes is counted from its birth to its end, so that no formula has to know an architecture.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from rosa_ds.config.schema import LossBlock
from rosa_ds.data.batches import Batch, LabelledBatch
from rosa_ds.models.loss import blocked_head, find_head_with, token_loss_sum, use_head
from rosa_ds.models.quantized import Form
from rosa_ds.models.task import is_classifier, uses_types

NOT_TRACED = (RuntimeError, ValueError, IndexError, TypeError, AttributeError)
"""What a model raises that asks its tensors for numbers."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """A micro-batch: ``rows`` of ``length`` tokens, logits of ``kept`` positions, and whether rows are ``padded`` or hold several
    sequences, so that attention has a mask; ``joined``: it has none, and copies the sequences' results into one. Of the rows ×
    kept targets ``trained`` count, by default all.
    """

    rows: int
    length: int
    kept: int
    padded: bool = True
    joined: bool = False
    trained: int | None = None

    def with_rows(self, rows: int) -> Shape:
        """The same with another number of rows, which are trained as much."""
        trained = None if self.trained is None else min(rows * self.kept, -(-self.trained * rows // self.rows))
        return dataclasses.replace(self, rows=rows, trained=trained)


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


class _FusedAttention(torch.autograd.Function):
    """What every fused attention keeps: query, key, value, mask, result, and one float32 number a row."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        result = query.new_empty(*query.shape[:-1], value.shape[-1]).transpose(1, 2).contiguous().transpose(1, 2)
        ctx.save_for_backward(query, key, value, mask, result, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None


def _fused_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *_: Any, **__: Any
) -> Any:
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.empty_like(attn_mask, dtype=query.dtype)  # torch turns it into numbers to add, in each layer
    return _FusedAttention.apply(query, key, value, attn_mask)


def _joined_attention(*given: Any, **named: Any) -> Any:
    """As :func:`rosa_ds.models.attention.of_sequences` without a kernel for it."""
    return _fused_attention(*given, **named).clone()


_UNMASKED = "rosa_unmasked"
AttentionInterface.register(_UNMASKED, sdpa_attention_forward)
AttentionMaskInterface.register(_UNMASKED, lambda *arguments, **named: None)


@contextlib.contextmanager
def _attention_of(model: Any, shape: Shape) -> Iterator[None]:
    """Fused attention, which tensors without numbers would not choose. Rows of one length need no mask, which transformers
    sees in the numbers of a mask alone.
    """
    before, plain = model.config._attn_implementation, nn.functional.scaled_dot_product_attention
    nn.functional.scaled_dot_product_attention = _joined_attention if shape.joined else _fused_attention
    if before != "eager":  # kernels of other packages keep what torch's keep, and do not run here
        model.config._attn_implementation = "sdpa" if shape.padded else _UNMASKED
    try:
        yield
    finally:
        model.config._attn_implementation = before
        nn.functional.scaled_dot_product_attention = plain


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's tracebacks of operators that ask for numbers: callers tell what that means."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before = log.disabled
    log.disabled = True
    try:
        yield
    finally:
        log.disabled = before


@contextlib.contextmanager
def _dequantising() -> Iterator[None]:
    """bitsandbytes' tables are real tensors, which meet no others here: only what a weight becomes is made."""
    before = Form.unpack

    def unpack(form: Form, packed: Tensor, scales: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return packed.new_empty(form.shape, dtype=form.dtype if dtype is None else dtype)

    Form.unpack = unpack  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        Form.unpack = before  # type: ignore[method-assign]


def without_numbers(model: nn.Module) -> FakeTensorMode:
    """Turn a model's parameters and buffers, wherever they are, into ones of a CPU that have no memory; in place."""
    mode = FakeTensorMode()
    done: dict[int, Any] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None or isinstance(tensor, FakeTensor):
                    continue
                if id(tensor) not in done:
                    fake: Any = FakeTensor(mode, tensor.detach().to("meta"), torch.device("cpu"))
                    if isinstance(tensor, nn.Parameter):
                        fake = nn.Parameter(fake, requires_grad=tensor.requires_grad)
                    done[id(tensor)] = fake
                tensors[name] = done[id(tensor)]
    return mode


@dataclasses.dataclass(frozen=True)
class _TracedBatch(Batch):
    """One whose targets do not tell how many of them are ``trained``."""

    trained: int | None = None

    def places(self) -> Tensor | None:
        every = self.trained is None or self.trained >= self.targets.numel()
        return None if every else torch.zeros(self.trained, dtype=torch.int64)  # type: ignore[arg-type]


def _batch(model: Any, ids: Tensor, kept: int, trained: int | None) -> Batch:
    """What the model's task makes of rows of token ids, with ``kept`` targets each."""
    if is_classifier(model):
        none = torch.zeros(1, dtype=torch.int64), torch.zeros(len(ids), 1, dtype=torch.int64)
        return LabelledBatch(ids, ids, *none, ids if uses_types(model.config) else None)
    targets = torch.zeros(len(ids), kept, dtype=torch.int64)
    return _TracedBatch(ids, ids, torch.zeros(kept, dtype=torch.int64), targets, trained=trained)


@contextlib.contextmanager
def running(
    model: nn.Module, mode: FakeTensorMode, shape: Shape, loss_block: LossBlock = "whole"
) -> Iterator[Callable[[], Tensor]]:
    """While it is entered, the loss of a micro-batch of a model that :func:`without_numbers` has emptied can be asked for.

    Args:
        loss_block: as ``training.loss_block``.
    """
    rows, length, kept = shape.rows, shape.length, min(shape.kept, shape.length)
    with mode:
        # four dimensions: transformers takes such a mask as it is, and does not ask for its numbers; none: rows of one length
        mask = torch.ones(rows, 1, length, length, dtype=torch.bool) if shape.padded else None
        ids = torch.zeros(rows, length, dtype=torch.int64)
        batch = _batch(model, ids, kept, shape.trained)

        def with_mask(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
            return arguments, named | {"attention_mask": mask}

        masked = model.register_forward_pre_hook(with_mask, with_kwargs=True)
        with masked, _attention_of(model, shape), _dequantising(), _quiet():
            if loss_block != "whole" and not is_classifier(model) and blocked_head(model) is None:
                head = find_head_with(model, batch, ids.device, None if loss_block == "auto" else loss_block)
                use_head(model, None if isinstance(head, str) else head)
            yield lambda: token_loss_sum(model, batch, torch.device("cpu"))


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
