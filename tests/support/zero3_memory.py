"""Resident memory of each rank while a base is loaded and divided; started by test_zero3.py with the base's folder."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from rosa_ds import distributed, zero
from rosa_ds.config.deepspeed import plan_deepspeed
from rosa_ds.config.schema import RunConfig
from rosa_ds.training.model import adapt, load_base


def resident(field: str) -> int:
    """Bytes of this process, ``VmRSS`` now or ``VmHWM`` at most since the last reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def load(folder: str) -> tuple[int, int]:
    """Growth of resident memory (peak, afterwards)."""
    settings = RunConfig(method="robust", model={"name_or_path": folder, "dtype": "float32"})
    section = {"stage": 3, "stage3_param_persistence_threshold": 0}
    plan, settings = plan_deepspeed({"zero_optimization": section}, settings, distributed.world_size(), False)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    model = adapt(*load_base(settings, plan), settings, plan)
    shares = sum(parameter.ds_tensor.nbytes for parameter in model.parameters())
    sys.stdout.write(f"shares {shares / 2**20:.0f} MiB\n")
    return resident("VmHWM") - before, resident("VmRSS") - before


if __name__ == "__main__":
    zero.initialize()
    load("tiny")  # imports and first allocations
    peak, after = load(sys.argv[1])
    Path(f"memory-{distributed.rank()}.json").write_text(json.dumps({"peak": peak, "after": after}))
    distributed.barrier()
    distributed.leave()
