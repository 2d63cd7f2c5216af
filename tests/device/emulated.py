"""Makes the emulated device this process' accelerator, for PyTorch, DeepSpeed, Triton's interpreter and rosa_ds.

To be called once, before anything asks which accelerator there is. DeepSpeed's accelerator is its CUDA one with another
name, so that its streams, events, prefetching and pinned buffers are executed.
"""

from __future__ import annotations

import functools
import os
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from device import building, timelines
from device.names import COLLECTIVES, DEVICE_BYTES, NAME


class _Here:
    """``torch.cuda.device`` with one device."""

    def __init__(self, device: Any) -> None: ...

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


def _device_module() -> types.ModuleType:
    module = types.ModuleType(f"torch.{NAME}")
    module.__dict__.update(
        device=_Here,
        device_of=_Here,
        is_available=lambda: True,
        is_initialized=lambda: True,
        _is_in_bad_fork=lambda: False,
        _lazy_init=lambda: None,
        device_count=lambda: 1,
        current_device=lambda: 0,
        set_device=lambda device: None,
        manual_seed=lambda seed: None,
        manual_seed_all=lambda seed: None,
        get_rng_state=lambda device=None: torch.zeros(8, dtype=torch.uint8),
        set_rng_state=lambda state, device=None: None,
        get_amp_supported_dtype=lambda: [torch.float16, torch.bfloat16],
        is_bf16_supported=lambda including_emulation=True: True,
        **{name: getattr(timelines, name) for name in ("Stream", "Event", "stream", "current_stream", "synchronize")},
    )
    return module


def _collectives(store: Any, rank: int, size: int, timeout: Any) -> Any:
    gloo = dist.ProcessGroupGloo(dist.PrefixStore(NAME, store), rank, size, timeout=timeout)
    return backend().collectives(gloo, rank, size)


def _keep_parameters() -> None:
    """A parameter that moves between devices stays the same object, as between the CPU and CUDA."""
    apply = nn.Module._apply

    def applied(self: nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        with torch.no_grad():
            for parameter in self._parameters.values():
                if parameter is not None and not parameter.is_meta:
                    moved = function(parameter)
                    if moved.device.type != parameter.device.type:
                        backend().become(parameter, moved.detach())
        return apply(self, function, recurse)

    nn.Module._apply = applied


def interpret() -> None:
    """Triton's kernels run on the device too: the interpreter works on its bytes."""
    from triton.runtime.interpreter import GridExecutor

    from rosa_kernels import dispatch

    def host(value: Any) -> Any:
        return backend().host_view(value) if isinstance(value, Tensor) else value

    def arguments(self: Any, given: Any, named: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        return [host(each) for each in given], {name: host(each) for name, each in named.items()}

    GridExecutor._init_args_hst = arguments
    GridExecutor._restore_args_dev = lambda self, *_: None
    dispatch.TRITON_DEVICES = (*dispatch.TRITON_DEVICES, NAME)


def _names_of_the_device() -> Iterator[tuple[Any, str, Any]]:
    """Where rosa_ds asks which device there is: every such name, so that a new one is missed by a test."""
    from rosa_ds import distributed
    from rosa_ds.distributed import group, timing, watch

    answers = {
        "device": lambda: torch.device(NAME, 0),
        "gpu_has_bfloat16": lambda: True,
        "free_memory": lambda: DEVICE_BYTES // 2,
    }
    for module in (distributed, group, timing, watch):
        for name, answer in answers.items():
            if hasattr(module, name):
                yield module, name, answer


@functools.cache
def backend() -> Any:
    """The C++ part."""
    return building.load()


def install() -> None:
    """Give this process the device."""
    os.environ["DS_ACCELERATOR"] = "cuda"  # DeepSpeed's, until it has this one
    backend().start()
    torch.utils.rename_privateuse1_backend(NAME)
    torch._register_device_module(NAME, _device_module())
    torch.utils.generate_methods_for_privateuse1_backend()
    Tensor.record_stream = timelines.record_stream
    dist.Backend.register_backend(COLLECTIVES, _collectives, devices=[NAME])
    dist.Backend.default_device_backend_map[NAME] = COLLECTIVES
    _keep_parameters()

    from deepspeed.accelerator import real_accelerator

    from device.accelerator import Accelerator

    real_accelerator.set_accelerator(Accelerator())
    for module, name, answer in _names_of_the_device():
        setattr(module, name, answer)
