"""bitsandbytes' optimizers: their moments, which are kept in 8 bits, as float32 numbers while we read or write them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

BLOCK = 256
MOMENTS = {"exp_avg": "1", "exp_avg_sq": "2"}
"""The names that torch's Adam has for them -> bitsandbytes' numbers of them."""


def is_bitsandbytes(optimizer: Any) -> bool:
    return type(optimizer).__module__.startswith("bitsandbytes.")


def _fresh(optimizer: Any, group: int, tensor: Tensor) -> dict[str, Any]:
    """The state that bitsandbytes begins with."""
    optimizer.state.pop(tensor, None)
    settings = optimizer.param_groups[group]
    # ZeRO-3 keeps the groups empty but for the time of a step
    there, settings["params"] = settings["params"], [tensor]
    optimizer.init_state(settings, tensor, group, 0)
    settings["params"] = there
    state: dict[str, Any] = optimizer.state[tensor]
    return state


@torch.no_grad()
def expand(optimizer: Any, tensors: Iterable[tuple[int, Tensor]]) -> dict[int, dict[str, Any]]:
    """Give each tensor's state the form that torch's Adam has: ``step``, ``exp_avg`` and ``exp_avg_sq`` in float32.

    Args:
        tensors: what the optimizer steps, each with its parameter group's number.

    Returns: by ``id`` of the tensor the state as it was, whose buffers :func:`collapse` writes into.
    """
    import bitsandbytes.functional as bnb

    originals: dict[int, dict[str, Any]] = {}
    for _, tensor in tensors:
        kept = optimizer.state.get(tensor)
        if not kept:
            continue
        state: dict[str, Any] = {"step": kept["step"]}
        for name, number in MOMENTS.items():
            codes = kept[f"state{number}"]
            if codes.dtype != torch.float32:  # small tensors are kept in float32
                absmax, code = kept[f"absmax{number}"], kept[f"qmap{number}"]
                codes = codes.to(absmax.device)  # paged ones say that they are on the CPU
                codes = bnb.dequantize_blockwise(codes.view(-1), absmax=absmax, code=code, blocksize=BLOCK).view_as(
                    codes
                )
            state[name] = codes
        optimizer.state[tensor] = state
        originals[id(tensor)] = kept
    return originals


@torch.no_grad()
def collapse(optimizer: Any, tensors: Iterable[tuple[int, Tensor]], originals: Mapping[int, dict[str, Any]]) -> None:
    """The way back. Rounding 8-bit numbers again may move them: a run that saves does it, too, so a resumed one has the same."""
    import bitsandbytes.functional as bnb

    for group, tensor in tensors:
        state = optimizer.state.get(tensor)
        if not state:
            continue
        kept = originals.get(id(tensor)) or _fresh(optimizer, group, tensor)
        optimizer.state[tensor] = kept
        kept["step"] = int(state["step"])
        for name, number in MOMENTS.items():
            target = kept[f"state{number}"]
            if target.dtype == torch.float32:
                target.copy_(state[name])
                continue
            codes, rounding = bnb.quantize_blockwise(
                state[name].reshape(-1), code=kept[f"qmap{number}"], blocksize=BLOCK
            )
            target.view(-1).copy_(codes.view(-1))
            kept[f"absmax{number}"].copy_(rounding.absmax)
