"""bitsandbytes' optimizers: their moments, which are kept in 8 bits, as float32 numbers while we read or write them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

BLOCK = 256
MOMENTS = {"exp_avg": "1", "exp_avg_sq": "2"}
"""The names that torch's Adam has for them -> bitsandbytes' numbers of them."""


def is_bitsandbytes(optimizer: Any) -> bool:
    return type(optimizer).__module__.startswith("bitsandbytes.")


@torch.no_grad()
def expand(optimizer: Any, tensors: Iterable[tuple[int, Tensor]]) -> None:
    """Give each tensor's state the form that torch's Adam has: ``step``, ``exp_avg`` and ``exp_avg_sq`` in float32.

    Args:
        tensors: what the optimizer steps, each with its parameter group's number.
    """
    import bitsandbytes.functional as bnb

    for _, tensor in tensors:
        kept = optimizer.state.get(tensor)
        if not kept:
            continue
        state: dict[str, Any] = {"step": kept["step"]}
        for name, number in MOMENTS.items():
            codes = kept[f"state{number}"]
            if codes.dtype != torch.float32:  # small tensors are kept in float32
                absmax, code = kept[f"absmax{number}"], kept[f"qmap{number}"]
                codes = bnb.dequantize_blockwise(codes.view(-1), absmax=absmax, code=code, blocksize=BLOCK).view_as(
                    codes
                )
            state[name] = codes
        optimizer.state[tensor] = state


@torch.no_grad()
def collapse(optimizer: Any, tensors: Iterable[tuple[int, Tensor]]) -> None:
    """The way back. Rounding 8-bit numbers again may move them: a run that saves does it, too, so a resumed one has the same."""
    import bitsandbytes.functional as bnb

    for group, tensor in tensors:
        state = optimizer.state.get(tensor)
        if not state:
            continue
        del optimizer.state[tensor]
        settings = optimizer.param_groups[group]
        # ZeRO-3 keeps the groups empty but for the time of a step
        kept_there, settings["params"] = settings["params"], [tensor]
        optimizer.init_state(settings, tensor, group, 0)
        settings["params"] = kept_there
        kept = optimizer.state[tensor]
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
