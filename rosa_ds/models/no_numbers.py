"""A model without numbers: its shapes from a config alone, and its forward pass, which computes nothing."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from rosa_ds.config.schema import LossBlock
from rosa_ds.data.batches import Batch, LabelledBatch
from rosa_ds.models.loss import blocked_head, find_head_with, token_loss_sum, use_head
from rosa_ds.models.quantized import Form
from rosa_ds.models.task import is_classifier, uses_types

NOT_TRACED = (RuntimeError, ValueError, IndexError, TypeError, AttributeError)
"""What a model raises that asks its tensors for numbers."""


FEW, MORE = 1, 2
"""How many layers are looked at where all are alike."""


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


def with_padding(config: Any) -> Any:
    """A copy of a config with a padding token, which tells classifiers where rows end."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    text.pad_token_id = getattr(text, "pad_token_id", None) or 0
    return config


def alike_layers(config: Any) -> int | None:
    """Number of layers where all are alike, so that one and two of them tell what all of them keep."""
    depth = getattr(config, "num_hidden_layers", None)
    kinds = set(getattr(config, "layer_types", None) or ())
    uneven = any(getattr(config, name, None) for name in ("mlp_only_layers", "first_k_dense_replace", "sub_configs"))
    uneven |= any(
        isinstance(value, list) and len(value) == depth for name, value in vars(config).items() if name != "layer_types"
    )
    try:
        copy.deepcopy(config).num_hidden_layers = MORE
    except NotImplementedError:  # it has a number for each of its parts
        return None
    return depth if isinstance(depth, int) and depth > MORE and len(kinds) < 2 and not uneven else None


def with_layers(config: Any, layers: int) -> Any:
    """A copy of a config with as many layers, where all are alike."""
    config = copy.deepcopy(config)
    config.num_hidden_layers = layers
    own_name = config.attribute_map.get("layer_types", "layer_types")
    follows = isinstance(getattr(type(config), own_name, None), property)  # from the number, as Mamba's
    if getattr(config, "layer_types", None) and not follows:
        config.layer_types = config.layer_types[:layers]
    return config


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
