"""Attention in a row of several sequences, of each over itself: no pair of two sequences is computed, and no mask is made.

transformers makes a mask of T² elements for a row of T tokens, and computes all of its pairs. Here the place of the mask is
taken by where the sequences end, so that models need not know. flash-attention does the same where it is installed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from rosa_ds import distributed

BY_SEQUENCE = "rosa_by_sequence"
"""The name under which transformers knows this attention. Rows of one sequence have the attention of ``sdpa`` in it."""

_KNOWN_LAYERS = {"full_attention", "sliding_attention"}


@dataclasses.dataclass(frozen=True)
class Sequences:
    """In the place of an attention mask: a row's sequences, and how far back their tokens see.

    ``lengths``: tokens of each. ``ends``: their sums, with 0 before them, (N + 1,) int32, on the device. ``window``: tokens that
    one sees, itself among them; ``None``: all before it.
    """

    lengths: tuple[int, ...]
    ends: Tensor
    window: int | None = None

    def __getitem__(self, _: Any) -> Sequences:
        """Some models cut a mask to the keys that there are, which are a row's own."""
        return self


_sequences: ContextVar[Sequences | None] = ContextVar("sequences", default=None)


def can_be_by_sequence(config: PreTrainedConfig) -> bool:
    """Whether a model's layers see all that is before a token or a window of it, and have torch's attention."""
    text = config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ())
    return (
        config._attn_implementation == text._attn_implementation == "sdpa"
        and kinds <= _KNOWN_LAYERS
        and getattr(text, "attention_chunk_size", None) is None
    )


def makes_mask(config: PreTrainedConfig) -> bool:
    """Whether a row of several sequences has a mask of T² elements in this model, as it is now."""
    return config._attn_implementation != BY_SEQUENCE and "flash" not in str(config._attn_implementation)


def joins_results(model: PreTrainedModel) -> bool:
    """Whether a model that attends by sequence does so with one call for each, whose results are then copied into one."""
    return model.config._attn_implementation == BY_SEQUENCE and not _has_kernel(model.device, model.dtype)


@contextlib.contextmanager
def of_sequences(model: nn.Module, position_ids: Tensor | None, device: torch.device) -> Iterator[None]:
    """While it is entered, a forward pass of ``model`` knows the sequences of its row, if it attends by sequence.

    Args:
        position_ids: on the CPU, (1, T), which begin again at 0 with each sequence; ``None``: rows of one sequence.
    """
    config: Any = getattr(model, "config", None)
    if position_ids is None or getattr(config, "_attn_implementation", None) != BY_SEQUENCE:
        yield
        return
    starts = (position_ids[0] == 0).nonzero().flatten().to(torch.int32)
    ends = torch.cat([starts, starts.new_tensor([position_ids.shape[1]])])
    token = _sequences.set(Sequences(tuple(ends.diff().tolist()), distributed.send(ends, device)))
    try:
        yield
    finally:
        _sequences.reset(token)


def _mask(*given: Any, use_vmap: bool = False, local_size: int | None = None, **named: Any) -> Any:
    """What models take for an attention mask. ``use_vmap``: a model has added something of its own to it."""
    sequences = _sequences.get()
    if sequences is None or use_vmap or named.get("attention_mask") is not None:
        return sdpa_mask(*given, use_vmap=use_vmap, local_size=local_size, **named)
    return dataclasses.replace(sequences, window=local_size)


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **named: Any
) -> tuple[Tensor, None]:
    """Shapes: query, key, value (B, heads, T, D); result (B, T, heads, D).

    Raises: ValueError for what torch's attention does not have, such as a softcap.
    """
    if not isinstance(attention_mask, Sequences):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **named)
    if more := [name for name in ("position_bias", "softcap", "s_aux") if named.get(name) is not None]:
        raise ValueError(f"attention by sequence has no {more[0]}")
    kernel = None if named.get("dropout") else _kernel()
    if kernel is not None and _has_kernel(query.device, query.dtype) and _fits(query, value):
        window = -1 if attention_mask.window is None else attention_mask.window - 1
        longest = max(attention_mask.lengths)
        rows = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
        ends = attention_mask.ends
        grouped = query.shape[1] != key.shape[1]
        found = kernel(
            *rows, ends, ends, longest, longest, scale=named.get("scaling"), window_size=(window, 0), enable_gqa=grouped
        )
        return found[None], None
    parts = zip(*(tensor.split(attention_mask.lengths, dim=2) for tensor in (query, key, value)), strict=True)
    masks = (_window(length, attention_mask.window, query.device) for length in attention_mask.lengths)
    of_each = [sdpa_attention_forward(module, *part, mask, **named)[0] for part, mask in zip(parts, masks, strict=True)]
    return torch.cat(of_each, dim=1) if len(of_each) > 1 else of_each[0], None


def _window(length: int, window: int | None, device: torch.device) -> Tensor | None:
    """The mask of a sequence that is longer than its window, (1, 1, L, L) bool."""
    if window is None or length <= window:
        return None
    seen = torch.ones(length, length, dtype=torch.bool, device=device)
    return seen.tril().triu(1 - window)[None, None]


def _has_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    wanted = device.type == "cuda" and dtype in (torch.float16, torch.bfloat16) and _kernel() is not None
    return wanted and torch.cuda.get_device_capability(device) >= (8, 0)


def _fits(query: Tensor, value: Tensor) -> bool:
    width = query.shape[-1]
    return width == value.shape[-1] and width <= 256 and width % 8 == 0


@functools.cache
def _kernel() -> Callable[..., Any] | None:
    """torch's flash-attention for rows of several sequences; ``None`` in a torch that has none, or one without windows."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    wanted = {"window_size", "enable_gqa", "scale"}
    return varlen_attn if wanted <= inspect.signature(varlen_attn).parameters.keys() else None


AttentionInterface.register(BY_SEQUENCE, _attend)
AttentionMaskInterface.register(BY_SEQUENCE, _mask)
