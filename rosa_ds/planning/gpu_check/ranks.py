"""Several ranks on one GPU, which NCCL refuses: their collectives go through host memory, all else is as on several GPUs."""

from __future__ import annotations

from rosa_ds.planning.gpu_check.runs import Run
from rosa_ds.planning.gpu_check.stage import Check

_FLOAT32 = {"model.dtype": "float32", "adapter.dropout": "0"}


def train(check: Check) -> None:
    """Losses of 2 and 4 ranks beside those of one, in float32, which differ by the order of sums alone."""
    cases = ((2, "3"), (4, "3"), (2, "2")) if check.gpu else ((2, "3"),)
    alone = Run(check.work, "alone", _FLOAT32 | {"ds.zero_optimization.stage": "2"}).finish()
    for ranks, stage in cases:
        run = Run(check.work, f"{ranks}-ranks-{stage}", _FLOAT32 | {"ds.zero_optimization.stage": stage}, ranks)
        found = run.finish()
        off = max(abs(a - b) / b for a, b in zip(found, alone, strict=True))
        check.tell(
            ranks=ranks, zero_stage=stage, largest_relative_difference=off, losses=[repr(loss) for loss in found]
        )
