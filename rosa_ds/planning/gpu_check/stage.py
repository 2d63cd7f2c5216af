"""What a stage is, and what it has while it runs. Importing it does not wait for torch."""

from __future__ import annotations

import dataclasses
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rosa_ds.planning.gpu_check.report import Report

if TYPE_CHECKING:
    import torch

NEEDS_A_GPU = "needs a GPU"


class NotRunError(Exception):
    """A stage, or a part of one, cannot run here; the message says what it lacks."""


@dataclasses.dataclass(frozen=True)
class Stage:
    """One question to the machine.

    Attributes:
        place: ``module:function``, which is called with a :class:`Check`.
        seconds: after which its process is killed.
        summary: what it finds out.
        gpu: whether it says nothing on a CPU.
    """

    name: str
    place: str
    seconds: float
    summary: str
    gpu: bool = False


@dataclasses.dataclass(frozen=True)
class Check:
    """Attributes: ``device`` to compute on; ``work``: a folder that is removed afterwards."""

    stage: Stage
    report: Report
    work: Path

    @property
    def device(self) -> torch.device:
        from rosa_ds import distributed

        return distributed.device()

    @property
    def gpu(self) -> bool:
        return self.device.type == "cuda"

    def tell(self, **fields: Any) -> None:
        """Record a finding, with the device that it is of."""
        import torch

        name = torch.cuda.get_device_name() if self.gpu else f"CPU ({len(os.sched_getaffinity(0))} cores)"
        self.report.write(self.stage.name, "found", {**fields, "on": name})

    def synchronize(self) -> None:
        import torch

        if self.gpu:
            torch.cuda.synchronize()

    def seconds(self, run: Callable[[], object], repeats: int) -> float:
        """Median time of a call after one that is not counted, by the GPU's own clock where there is one."""
        import torch

        run()
        times = []
        for _ in range(repeats):
            self.synchronize()
            if self.gpu:
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                run()
                end.record()
                end.synchronize()
                times.append(begin.elapsed_time(end) / 1e3)
            else:
                begun = time.perf_counter()
                run()
                times.append(time.perf_counter() - begun)
        return statistics.median(times)


def randn(*shape: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> torch.Tensor:
    """The same numbers on every device."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype).to(device)
