"""Each kernel's time in percent of the least that this device can take.

The least time of a kernel is the larger of two: its bytes, each counted once, at the rate of a copy, and its operations at the
rate of a dense product of the same type. Both rates are measured here, on the same device and in the same minute.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

import rosa_kernels
from rosa_ds.planning.gpu_check.layer import Layer
from rosa_ds.planning.gpu_check.stage import Check, randn

_REPEATS = 9


@dataclasses.dataclass(frozen=True)
class Rates:
    """``bandwidth``: bytes a second that a copy reads and writes; ``flops``: operations a second of a product."""

    bandwidth: float
    flops: float

    def least(self, size: float, flops: float) -> float:
        """Seconds."""
        return max(size / self.bandwidth, flops / self.flops)


@dataclasses.dataclass(frozen=True)
class Work:
    """What a call must move and compute at least. ``bytes``: every input and output once."""

    name: str
    run: Callable[[], object]
    bytes: int
    flops: int


def rates(check: Check, dtype: torch.dtype) -> Rates:
    """Of this device."""
    numbers, side = (2**29, 8192) if check.gpu else (2**23, 384)
    source = torch.empty(numbers, dtype=torch.uint8, device=check.device).zero_()
    target = torch.empty_like(source)
    left, right = (randn(side, side, dtype=dtype, device=check.device, seed=seed) for seed in (0, 1))
    copying = check.seconds(lambda: target.copy_(source), _REPEATS)
    product = check.seconds(lambda: left @ right, _REPEATS)
    return Rates(2 * numbers / copying, 2 * side**3 / product)


def kernel_work(layer: Layer) -> list[Work]:
    """The kernels' calls in a step of ``layer``, and the whole of it."""
    T, N, M, R, Z = layer.sizes
    item, index = layer.weight.itemsize, layer.positions.itemsize
    tokens_in, tokens_out, weight = T * M * item, T * N * item, N * M * item
    x, grad, values, positions = layer.x.detach(), layer.grad, layer.values.detach(), layer.positions
    matrix, y = layer.weight.clone(), torch.zeros_like(layer.grad)
    summed = torch.promote_types(torch.float32, x.dtype).itemsize

    def scatter() -> None:
        rosa_kernels.restore_into(matrix, rosa_kernels.scatter_add_into(matrix, values, positions), positions)

    def spmm() -> None:
        rosa_kernels.spmm_add_into(y, x, values, positions, (N, M), plan=layer.plan)

    # forward: 2TNM and 2TR(N + M); backward: the same for the input, and 2TR(N + M) for A and B, and the sampled product
    whole = 2 * (2 * T * N * M) + 3 * 2 * T * R * (N + M) + 2 * T * Z
    return [
        Work(
            "sddmm",
            lambda: rosa_kernels.sddmm(grad, x, positions, layer.plan),
            tokens_in + tokens_out + Z * (index + summed),
            2 * T * Z,
        ),
        Work("scatter and restore", scatter, 2 * Z * index + Z * item + 6 * Z * item, 2 * Z),
        Work("spmm", spmm, tokens_in + 2 * tokens_out + Z * (index + item), 2 * T * Z),
        Work("forward and backward", layer.step, 2 * weight + 3 * tokens_in + 2 * tokens_out, whole),
    ]


def measure(check: Check) -> None:
    shapes = ((8192, 4096, 4096), (8192, 14336, 4096)) if check.gpu else ((96, 64, 80),)
    for dtype in (torch.bfloat16, torch.float32) if check.gpu else (torch.float32,):
        peak = rates(check, dtype)
        check.tell(dtype=str(dtype), copy_GB_s=peak.bandwidth / 1e9, product_TFLOP_s=peak.flops / 1e12)
        for tokens, rows, columns in shapes:
            layer = Layer.make(tokens, rows, columns, dtype, check.device)
            for work in kernel_work(layer):
                seconds = check.seconds(work.run, _REPEATS)
                check.tell(
                    kernel=work.name,
                    shape=f"{rows}x{columns}, {tokens} tokens, {layer.sizes[-1]} entries at random",
                    dtype=str(dtype),
                    ms=1e3 * seconds,
                    percent_of_roofline=100 * peak.least(work.bytes, work.flops) / seconds,
                )
