"""Whether a run that is resumed has the bits of one that went straight on, and whether a second run has the first one's."""

from __future__ import annotations

from pathlib import Path

from rosa_ds.planning.gpu_check.runs import Run
from rosa_ds.planning.gpu_check.stage import Check

ADAPTER = "adapter"


def compare(check: Check) -> None:
    stages = ("2", "3") if check.gpu else ("2",)
    given = {stage: {"ds.zero_optimization.stage": stage} for stage in stages}
    straight = {stage: Run(check.work, f"straight-{stage}", given[stage]) for stage in stages}
    losses = {stage: run.finish() for stage, run in straight.items()}
    first = {stage: min((run.folder / "checkpoints").glob("step-*")) for stage, run in straight.items()}
    again = {stage: Run(check.work, f"again-{stage}", given[stage]) for stage in stages if check.gpu}
    resumed = {stage: Run(check.work, f"resumed-{stage}", given[stage], checkpoint=first[stage]) for stage in stages}
    for what, runs in (("again", again), ("resumed", resumed)):
        for stage, run in runs.items():
            found = run.finish()
            check.tell(
                what=what,
                zero_stage=stage,
                same_losses=found == losses[stage][-len(found) :],
                same_files=_files(run.folder) == _files(straight[stage].folder),
                losses=[f"{a!r} {b!r}" for a, b in zip(losses[stage][-len(found) :], found, strict=True)],
            )


def _files(folder: Path) -> dict[str, bytes]:
    """The adapter's tensors at the end of a run."""
    files = {path.name: path.read_bytes() for path in (folder / ADAPTER).glob("*.safetensors")}
    assert files
    return files
