"""Streams of whole runs: the sanitizer finds nothing of ours, and finds what a missing wait or record_stream leaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from device.cases import Case, words
from launching import TRAIN, run

pytestmark = pytest.mark.ranks
STAGE3: Case = {
    "stage": "3",
    "method": "robust",
    "precision": "float32",
    "offload": "none",
    "accumulation": "2",
    "checkpointing": "on",
    "ranks": "2",
}
STAGE2: Case = STAGE3 | {"stage": "2", "checkpointing": "off"}


def sanitized(case: Case, base: Path, folder: Path, *options: str) -> list[dict[str, Any]]:
    """What the sanitizer of each rank has found in a run."""
    plant = options[:2] if options[:1] == ("--plant",) else ()
    given = [*words(case), *options[len(plant) :], "--model.name_or_path", str(base), "--training.max_steps", "2"]
    given += ["--training.output_dir", str(folder / "run")]
    file = str(folder / "found")
    variables = {"ROSA_KERNELS": "torch"}
    run(
        "device", int(case["ranks"]), "--sanitize", file, *plant, TRAIN, *given,
        cwd=folder, timeout=200, variables=variables,
    )  # fmt: skip
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("found.*"))]
    for rank in found:
        print(rank["operations"], "operations", rank["timelines"], sum(rank["findings"].values()), "findings")
    return found


NIGHTLY = ("stage 3, draws", "stage 2, divided positions", "stage 0")
RUNS = {
    "stage 3, checkpointing, accumulation": (STAGE3, ()),
    "stage 3, offload": (STAGE3 | {"offload": "parameters", "checkpointing": "off"}, ()),
    "stage 3, draws": (STAGE3 | {"method": "robust-subspace", "accumulation": "1"}, ("--draw.moments", "project")),
    "stage 2, divided positions": (STAGE2, ("--adapter.partition_positions", "true")),
    "stage 0": (STAGE2 | {"stage": "0"}, ()),
}


@pytest.mark.parametrize(
    ("case", "options"),
    [pytest.param(*run, id=name, marks=[pytest.mark.nightly] * (name in NIGHTLY)) for name, run in RUNS.items()],
)
def test_nothing_is_unordered(case: Case, options: tuple[str, ...], small_base: Path, tmp_path: Path) -> None:
    for rank in sanitized(case, small_base, tmp_path, *options):
        assert rank["findings"] == {}
        assert rank["operations"] > 5000
        assert len(rank["timelines"]) >= 3  # the host, the default stream, and the collectives'


@pytest.mark.parametrize("fault", ["missing_wait", "missing_record_stream"])
def test_a_planted_fault_is_found(fault: str, small_base: Path, tmp_path: Path) -> None:
    case = STAGE3 | {"accumulation": "1", "checkpointing": "off"}
    for rank in sanitized(case, small_base, tmp_path, "--plant", fault):
        assert sum(rank["findings"].values()) > 10
