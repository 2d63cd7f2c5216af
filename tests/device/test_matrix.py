"""Whole runs on the emulated device: every pair of settings in one of them, with the CPU's losses."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest

from device.cases import Case, all_pairs, covering, name_of, pairs_of, words
from launching import TRAIN, losses, run

pytestmark = pytest.mark.ranks
PLAIN: Case = {
    "stage": "2",
    "precision": "float32",
    "offload": "none",
    "accumulation": "1",
    "checkpointing": "off",
    "ranks": "1",
}
NEAR = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 2e-3, "nf4": 3e-2, "int8": 2e-2}
"""How far losses may be from those of float32 on the CPU."""

Losses = list[float]


def run_case(
    launcher: str, case: Case, base: Path, folder: Path, settings: tuple[str, ...] = (), **variables: str
) -> Losses:
    given = [*words(case), *settings, "--model.name_or_path", str(base), "--training.output_dir", str(folder / "run")]
    run(
        launcher,
        int(case["ranks"]),
        TRAIN,
        *given,
        cwd=folder,
        timeout=120,
        variables={"ROSA_KERNELS": "torch"} | variables,
    )
    return [loss for _, _, loss in losses(folder / "run")]


@pytest.fixture(scope="module")
def on_the_cpu(small_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Losses]:
    """Losses of a method in float32 on one CPU rank."""

    @functools.cache
    def losses_of(method: str) -> Losses:
        return run_case("fork", PLAIN | {"method": method}, small_base, tmp_path_factory.mktemp(method))

    return losses_of


def test_every_pair_of_settings_is_run() -> None:
    assert set().union(*map(pairs_of, covering())) == all_pairs()


NF4: Case = PLAIN | {"stage": "3", "method": "lora", "precision": "nf4", "ranks": "2"}
"""Minutes: bitsandbytes unpacks 4 bits on an unknown device in a loop of Python."""
IN_THE_GATE = 10  # of the covering runs, the ones with the most pairs; the night runs all
CASES = [
    *covering()[:IN_THE_GATE],
    *(pytest.param(case, marks=pytest.mark.nightly) for case in (*covering()[IN_THE_GATE:], NF4)),
]


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_losses_are_the_cpus(case: Case, small_base: Path, tmp_path: Path, on_the_cpu: Callable[[str], Losses]) -> None:
    wanted = on_the_cpu(case["method"])
    found = run_case("device", case, small_base, tmp_path)
    print(name_of(case), " ".join(f"{loss:.4f}" for loss in found), "CPU", " ".join(f"{loss:.4f}" for loss in wanted))
    assert found == pytest.approx(wanted, rel=NEAR[case["precision"]])
    assert found[-1] < found[0] - 0.05


def test_tritons_kernels_on_the_device(small_base: Path, tmp_path: Path) -> None:
    """In Triton's interpreter, with the plans and launchers of a GPU, at stage 3: one short step, the interpreter is slow."""
    case = PLAIN | {"stage": "3", "method": "sparse"}
    short = ("--ds.train_batch_size", "1", "--ds.train_micro_batch_size_per_gpu", "1", "--training.max_steps", "1")
    folders = [tmp_path / name for name in ("fork", "device")]
    for folder in folders:
        folder.mkdir()
    interpreted = {"ROSA_KERNELS": "triton", "TRITON_INTERPRET": "1"}
    wanted = run_case("fork", case, small_base, folders[0], settings=short)
    found = run_case("device", case, small_base, folders[1], settings=short, **interpreted)
    assert "sddmm triton" in next((folders[1] / "run" / "logs").iterdir()).read_text()
    assert found == pytest.approx(wanted, rel=NEAR["float32"])
    assert found[-1] < found[0]
