"""Whole runs on a GPU beside the CPU's."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from launching import ROOT, run
from rosa_ds.config.methods import METHODS
from rosa_kernels.testing import bound, relative_rms

pytestmark = pytest.mark.ranks
NEAR = {"float32": 1e-4, "bfloat16": 2e-2, "nf4": 3e-2}
"""How far losses may be from the CPU's in float32: the order of sums, which Adam's first steps enlarge; units of rounding."""

Train = Callable[..., list[float]]


@pytest.fixture(scope="module")
def on_the_cpu(train: Train, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[float]]:
    """Losses of a method in float32 at stage 2."""

    @functools.cache
    def losses_of(method: str) -> list[float]:
        folder = tmp_path_factory.mktemp("cpu") / method
        return train(folder, {"method": method, "ds.zero_optimization.stage": "2"}, device="cpu")

    return losses_of


@pytest.mark.parametrize("stage", ["0", "2", "3"])
@pytest.mark.parametrize("method", METHODS)
def test_losses_are_the_cpus(
    method: str, stage: str, train: Train, tmp_path: Path, on_the_cpu: Callable[[str], list[float]]
) -> None:
    found = train(tmp_path / "run", {"method": method, "ds.zero_optimization.stage": stage})
    assert found == pytest.approx(on_the_cpu(method), rel=NEAR["float32"])


@pytest.mark.parametrize("stage", ["2", "3"])
def test_two_ranks_have_the_losses_of_one(
    stage: str, train: Train, tmp_path: Path, on_the_cpu: Callable[[str], list[float]]
) -> None:
    found = train(tmp_path / "run", {"method": "robust", "ds.zero_optimization.stage": stage}, ranks=2)
    assert found == pytest.approx(on_the_cpu("robust"), rel=NEAR["float32"])


@pytest.mark.parametrize("kind", ["bfloat16", "nf4"])
def test_fewer_bits(kind: str, train: Train, tmp_path: Path, on_the_cpu: Callable[[str], list[float]]) -> None:
    given = {"method": "robust", "model.dtype": "auto", "ds.zero_optimization.stage": "2"}
    if kind == "nf4":
        pytest.importorskip("bitsandbytes")
        given["model.quantization"] = "nf4"
    found = train(tmp_path / "run", given)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["model"]["dtype"] == "bfloat16"
    assert found == pytest.approx(on_the_cpu("robust"), rel=NEAR[kind])


@pytest.mark.parametrize("stage", ["2", "3"])
def test_a_resumed_run_has_the_bits_of_one_that_went_on(stage: str, train: Train, tmp_path: Path) -> None:
    given = {"ds.zero_optimization.stage": stage, "training.save_steps": "2", "adapter.dropout": "0.1"}
    straight = train(tmp_path / "straight", given)
    first = min((tmp_path / "straight" / "checkpoints").glob("step-*"))
    resumed = train(tmp_path / "resumed", given, more=("--resume", str(first)))
    assert 0 < len(resumed) < len(straight)
    assert resumed == straight[-len(resumed) :]
    name = "adapter/adapter_model.safetensors"
    assert (tmp_path / "resumed" / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()


def test_an_export_is_the_cpus(train: Train, tmp_path: Path) -> None:
    train(tmp_path / "run", {"method": "robust-subspace", "ds.zero_optimization.stage": "2"})
    merged: dict[str, dict[str, Any]] = {}
    for device, variables in (("cuda", {}), ("cpu", {"CUDA_VISIBLE_DEVICES": ""})):
        words = (str(ROOT / "launch" / "export.py"), str(tmp_path / "run"), str(tmp_path / device))
        run("python", 1, *words, cwd=tmp_path, variables=variables)
        merged[device] = load_file(tmp_path / device / "model.safetensors")
    assert merged["cuda"].keys() == merged["cpu"].keys()
    for name, tensor in merged["cpu"].items():
        assert relative_rms(merged["cuda"][name], tensor) <= bound(tensor.dtype), name


@pytest.mark.parametrize("stage", ["2", "3"])
def test_a_step_waits_as_often_as_on_the_emulated_device(stage: str, tmp_path: Path) -> None:
    """Twice of ours: for the loss, and for the gradients' norm; tests/device has the whole list."""
    given = [
        "--ds.zero_optimization.stage",
        stage,
        "--data.train",
        "builtin:sql[:16]",
        "--data.eval",
        "builtin:sql[:2]",
    ]
    given += ["--ds.train_batch_size", "4", "--training.max_steps", "3", "--method", "lora"]
    given += ["--training.output_dir", str(tmp_path / "run")]
    script = str(ROOT / "tests" / "support" / "gpu_waits.py")
    run("python", 1, script, str(tmp_path / "waits"), *given, cwd=tmp_path)
    steps = [json.loads(line) for line in (tmp_path / "waits").read_text().splitlines()]
    ours = [place for place in steps[-1] if "/rosa_ds/" in place or "/rosa_kernels/" in place]
    assert len(steps) == 3
    assert 0 < len(ours) <= 2, ours
    assert all("training/loop.py" in place for place in ours)
