"""DeepSpeed's CUDA accelerator with the emulated device's name, memory and streams.

To be imported with DS_ACCELERATOR=cuda, which DeepSpeed reads at its own import.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator
from torch import Tensor

from device import timelines
from device.names import COLLECTIVES, DEVICE_BYTES, NAME

FIXED: dict[str, Any] = {
    "device": torch.device(NAME, 0),
    "set_device": None,
    "current_device": 0,
    "current_device_name": f"{NAME}:0",
    "device_count": 1,
    "communication_backend_version": (2, 27, 5),
    "communication_backend_name": COLLECTIVES,
    "get_rng_state": torch.zeros(8, dtype=torch.uint8),
    "set_rng_state": None,
    "empty_cache": None,
    "memory_stats": {},
    "total_memory": DEVICE_BYTES,
    "available_memory": DEVICE_BYTES,
    "is_bf16_supported": True,
    "is_fp16_supported": True,
    "is_available": True,
    "is_triton_supported": False,
    "is_current_stream_capturing": False,
    "range_push": None,
    "range_pop": None,
}
FIXED |= {
    name: 0 for each in ("memory_allocated", "memory_cached", "memory_reserved") for name in (each, f"max_{each}")
}
FIXED |= dict.fromkeys(("reset_max_memory_allocated", "reset_max_memory_cached", "reset_peak_memory_stats"))
"""Answers that never change, and what does nothing here."""


def _constant(value: Any) -> Callable[..., Any]:
    return lambda self, *_, **__: value


class Accelerator(CUDA_Accelerator):
    def __init__(self) -> None:
        self._name, self._communication_backend_name = NAME, COLLECTIVES
        self._compile_backend, self._nvtx_domains, self.class_dict = "inductor", {}, None

    def device_name(self, index: int | None = None) -> str:
        return NAME if index is None else f"{NAME}:{index}"

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    manual_seed_all = manual_seed

    def initial_seed(self) -> int:
        return torch.initial_seed()

    def default_generator(self, index: int) -> torch.Generator:
        return torch.default_generator

    def synchronize(self, index: int | None = None) -> None:
        timelines.synchronize()

    Stream = property(lambda self: timelines.Stream)
    Event = property(lambda self: timelines.Event)

    def stream(self, stream: Any) -> Any:
        return timelines.stream(stream)

    def current_stream(self, index: int | None = None) -> Any:
        return timelines.current_stream()

    def default_stream(self, index: int | None = None) -> Any:
        return timelines.DEFAULT

    def on_accelerator(self, tensor: Tensor) -> bool:
        return tensor.device.type == NAME

    def pin_memory(self, tensor: Tensor, align_bytes: int = 1) -> Tensor:
        return tensor.pin_memory()

    def is_pinned(self, tensor: Tensor) -> bool:
        return tensor.is_pinned()

    def lazy_call(self, callback: Callable[[], None]) -> None:
        callback()


for _name, _value in FIXED.items():
    setattr(Accelerator, _name, _constant(_value))
for _kind, _dtype in {
    "BFloat16": torch.bfloat16,
    "Byte": torch.uint8,
    "Double": torch.float64,
    "Float": torch.float32,
    "Half": torch.float16,
    "Int": torch.int32,
    "Long": torch.int64,
}.items():
    _make = _constant(lambda *given, dtype=_dtype: torch.tensor(*given, dtype=dtype, device=NAME))
    setattr(Accelerator, f"{_kind}Tensor", property(_make))
