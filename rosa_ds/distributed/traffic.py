"""Counting what the ranks send each other, whoever asked for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# how the name of an operator begins (``_allgather_base_``) -> its kind; the longer ones first, since one begins another
_KINDS = {"allgather": "all_gather", "reduce_scatter": "reduce_scatter", "allreduce": "all_reduce", "reduce": "reduce"}


class TrafficCounter(TorchDispatchMode):
    """Counts, while it is entered, the bytes of every collective on this rank, DeepSpeed's too.

    ``bytes``: (kind, dtype) -> bytes of the whole payload: what an all-gather puts out, what a reduce-scatter takes in,
    what any other one works on. Kinds: all_gather, reduce_scatter, all_reduce, reduce, broadcast, barrier, ...
    """

    supports_higher_order_operators = True  # flex attention is one

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[tuple[str, torch.dtype]] = Counter()

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace == "c10d":
            # the payload is the largest of the tensors, or lists of tensors, among the arguments
            sizes: list[tuple[int, torch.dtype]] = []
            for argument in args:
                tensors = [leaf for leaf in tree_leaves(argument) if isinstance(leaf, Tensor)]
                if tensors:
                    sizes.append((sum(tensor.nbytes for tensor in tensors), tensors[0].dtype))
            size, dtype = max(sizes, key=lambda entry: entry[0], default=(0, torch.uint8))
            operator = func.overloadpacket.__name__.strip("_")
            kind = next((kind for start, kind in _KINDS.items() if operator.startswith(start)), operator)
            self.bytes[kind, dtype] += size
        call: Callable[..., Any] = func
        return call(*args, **(kwargs or {}))
