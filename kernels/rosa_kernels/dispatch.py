"""Which implementation of an op runs on a device, and why. A failing kernel is an error: nothing falls back."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
from dataclasses import dataclass

import torch
from torch import Tensor

VARIABLE = "ROSA_KERNELS"
OPS = ("sddmm", "scatter", "spmm", "low_rank")
IMPLEMENTATIONS = ("torch", "triton")
TRITON_DEVICES = ("cuda", "xpu")  # "cuda" is also ROCm's name in torch
OLDEST_TRITON = (3, 4)
"""3.2 has no ``tl.gather``; the assembler of 3.3 takes 20 minutes and 12 GB for a row of 11,008 columns."""


@dataclass(frozen=True)
class Choice:
    """An implementation (``torch`` or ``triton``) and one sentence that says why it runs."""

    implementation: str
    reason: str


def forced(setting: str) -> dict[str, str]:
    """Op -> implementation from a value of ``ROSA_KERNELS``: ``triton``, ``torch`` or ``sddmm=torch,scatter=triton``.

    Raises: ValueError for an unknown op or implementation.
    """
    wanted: dict[str, str] = {}
    for item in filter(None, (part.strip() for part in setting.split(","))):
        op, _, name = item.rpartition("=")
        if name not in IMPLEMENTATIONS or (op and op not in OPS):
            raise ValueError(
                f"{VARIABLE}={setting!r}: {item!r} is neither one of {', '.join(IMPLEMENTATIONS)} nor OP=IMPLEMENTATION "
                f"with OP one of {', '.join(OPS)}"
            )
        wanted |= {op: name} if op else dict.fromkeys(OPS, name)
    return wanted


def _check_triton(op: str, device_type: str) -> None:
    import triton

    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < OLDEST_TRITON:
        raise ValueError(
            f"{op} on {device_type} runs in Triton 3.4 or newer, installed is {triton.__version__}: "
            f"pip install 'torch>=2.8' 'triton>=3.4', or set {VARIABLE}=torch for the slower torch code"
        )


@functools.cache
def _choose(op: str, device_type: str, setting: str, interpreted: bool) -> Choice:
    name = forced(setting).get(op)
    if name == "torch":
        return Choice("torch", f"{VARIABLE}={setting}")
    triton_runs = device_type in TRITON_DEVICES or interpreted
    if name == "triton" and not triton_runs:
        raise ValueError(
            f"{VARIABLE}={setting} asks for Triton, which has no code for {device_type} tensors; on the CPU it runs in its "
            "interpreter alone: set TRITON_INTERPRET=1 before Python starts, or take the setting back"
        )
    if name is None and device_type not in TRITON_DEVICES:
        return Choice("torch", f"Triton has no code for {device_type} tensors")
    if importlib.util.find_spec("triton") is None:
        raise ValueError(
            f"{op} on {device_type} runs in Triton, which is not installed: pip install triton, or set {VARIABLE}=torch "
            "for the slower torch code"
        )
    if not interpreted:
        _check_triton(op, device_type)
    if os.environ.get("TRITON_INTERPRET") == "1":
        from rosa_kernels.interpreter import repair

        repair()
    return Choice("triton", f"{VARIABLE}={setting}" if name else f"the default on {device_type}")


def choose(op: str, device_type: str) -> Choice:
    """The implementation of ``op`` for tensors of a device type. Raises ValueError where there is none."""
    interpreted = device_type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    return _choose(op, device_type, os.environ.get(VARIABLE, ""), interpreted)


def explain(device: torch.device | str) -> dict[str, Choice]:
    """What runs for each op on ``device``, with the reason; the training run logs it."""
    return {op: choose(op, torch.device(device).type) for op in OPS}


def on_device_of(*tensors: Tensor | None) -> contextlib.AbstractContextManager[object]:
    """Launch where the tensors are: Triton takes device and stream from what is current.

    Raises: ValueError for tensors on different devices.
    """
    devices = {tensor.device for tensor in tensors if tensor is not None}
    if len(devices) > 1:
        raise ValueError(f"all tensors must lie on one device, given {sorted(map(str, devices))}: move them together")
    (device,) = devices
    if device.type == "cpu":
        return contextlib.nullcontext()
    guard: contextlib.AbstractContextManager[object] = torch.get_device_module(device).device(device)
    return guard
