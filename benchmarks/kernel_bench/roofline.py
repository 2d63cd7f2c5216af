"""The least time that a GPU could take for an op: its bytes over the bandwidth, or its operations over the peak rate."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Work:
    """What an op cannot do without: bytes read and written, each once, and floating-point operations."""

    bytes: int
    flops: int


@dataclass(frozen=True)
class Peak:
    """Terabytes and teraflops a second: dense 16-bit products on tensor cores, float32 products outside them."""

    bandwidth: float
    half: float
    single: float


# NVIDIA's data sheets (dense rates, SXM). Keys: parts of the name that torch gives the device.
PEAKS: dict[tuple[str, ...], Peak] = {
    ("A100", "SXM", "80GB"): Peak(2.039, 312.0, 19.5),
    ("H100", "80GB HBM3"): Peak(3.35, 989.4, 67.0),
    ("H200",): Peak(4.8, 989.4, 67.0),
}


def percent_of_peak(device_name: str, work: Work, dtype: torch.dtype, milliseconds: float) -> float | None:
    """The roofline's time in percent of the time taken; None on a device whose peaks are not in the table."""
    for parts, peak in PEAKS.items():
        if all(part in device_name for part in parts):
            rate = peak.half if dtype.itemsize == 2 else peak.single
            least = max(work.bytes / peak.bandwidth, work.flops / rate) * 1e-9  # tera, milli
            return 100 * least / milliseconds
    return None
