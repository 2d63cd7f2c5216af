"""Where the program waits for the device, or gives it what it must wait for: by step and place in the code."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from device.names import NAME

COUNTED_BY_THE_HOST = {
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "unique_consecutive",
    "_unique2",
    "unique_dim",
    "bincount",
}
CODE = ("/rosa_ds/", "/rosa_kernels/", "deepspeed/runtime", "transformers/", "torch/optim")


def tensors(*trees: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(trees) if isinstance(leaf, torch.Tensor)]


def is_asynchronous(name: str, args: Any, kwargs: Any) -> bool:
    place = {"copy_": 2, "_copy_from": 2}.get(name)
    given = args[place] if place is not None and len(args) > place else False
    return bool(kwargs.get("non_blocking", given))


def wait_of(name: str, args: Any, kwargs: Any, out: Any) -> str:
    """Why the host waits in this operator; empty where it does not.

    A copy to the device waits unless it is asynchronous and its source is page-locked, one from the device unless it is
    asynchronous; what has as many results as the device says waits for it.
    """
    given = tensors(args, kwargs)
    if not any(tensor.device.type == NAME for tensor in (*given, *tensors(out))):
        return ""
    masks = [tensor for tensor in tensors(args[1:2]) if tensor.dtype == torch.bool]
    if name in COUNTED_BY_THE_HOST or (name == "index" and masks):
        return f"the host needs the result of {name}"
    if name not in ("_to_copy", "copy_", "_copy_from"):
        return ""
    source, target = (args[0], out) if name == "_to_copy" else (args[1], args[0])
    if name == "_copy_from":
        source, target = args[0], args[1]
    if source.device.type == target.device.type:
        return ""
    later = is_asynchronous(name, args, kwargs)
    if target.device.type == "cpu":
        return "" if later else "copy to the host"
    return "" if later and (source.is_pinned() or source.dim() == 0) else "copy to the device"


def place() -> str:
    """The innermost two functions of the training system, of DeepSpeed, or of transformers, that are being called."""
    found: list[str] = []
    frame = sys._getframe(1)
    while frame is not None and len(found) < 2:
        path = frame.f_code.co_filename
        if any(part in path for part in CODE) and not path.endswith("traffic.py"):
            found.append(f"{'/'.join(path.split('/')[-2:])}:{frame.f_code.co_name}")
        frame = frame.f_back
    return " < ".join(found)


class _Waits(TorchDispatchMode):
    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.now: Counter[str] | None = None

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if self.now is not None:
            why = wait_of(func.overloadpacket.__name__, args, kwargs or {}, out)
            if why:
                self.now[f"{why}: {place()}"] += 1
        return out


def install(file: Path) -> None:
    """Note the waits of every optimizer step from now on; ``file`` has a JSON object {what and where: times} a step."""
    from rosa_ds.training.loop import Loop

    mode, steps = _Waits(), []
    train_step = Loop._train_step

    def counted(self: Loop, step: Any) -> Any:
        mode.now = Counter()
        try:
            return train_step(self, step)
        finally:
            steps.append(dict(mode.now))
            mode.now = None
            file.write_text("".join(f"{json.dumps(each)}\n" for each in steps))

    Loop._train_step = counted
    mode.__enter__()
