"""Where one optimizer step waits for the device: the whole list, so that a new one is seen."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from device.cases import Case, words
from launching import TRAIN, run

pytestmark = pytest.mark.ranks
CASE: Case = {
    "stage": "2",
    "method": "robust",
    "precision": "bfloat16",
    "offload": "none",
    "accumulation": "2",
    "checkpointing": "off",
    "ranks": "1",
}


def waits_of_a_step(case: Case, batching: str, base: Path, folder: Path) -> dict[str, int]:
    """What and where -> how often, in the third step of a run on its first rank."""
    given = [*words(case), "--model.name_or_path", str(base), "--training.output_dir", str(folder / "run")]
    given += ["--data.batching", batching]
    variables = {"ROSA_KERNELS": "torch"}
    file = str(folder / "waits")
    run("device", int(case["ranks"]), "--waits", file, TRAIN, *given, cwd=folder, timeout=100, variables=variables)
    steps = (folder / "waits.0").read_text().splitlines()
    found: dict[str, int] = json.loads(steps[2])
    print(json.dumps(found, indent=1))
    return found


LOSS_COPY = "copy to the host: training/loop.py:_agree < training/loop.py:_train_step"
NORM = "the host needs the result of _local_scalar_dense: training/loop.py:_train_step < training/loop.py:_do"
MASK = "transformers/masking_utils.py"


@pytest.mark.parametrize(("stage", "batching", "masks"), [("2", "tokens", 2), ("3", "sorted", 2)])
def test_waits_of_a_step(stage: str, batching: str, masks: int, small_base: Path, tmp_path: Path) -> None:
    """Ours: the loss before the optimizer's step, and the gradients' norm after it; none for a micro-batch, or a layer."""
    found = waits_of_a_step(CASE | {"stage": stage}, batching, small_base, tmp_path)
    of_deepspeed = {
        where: times for where, times in found.items() if "runtime/utils.py" in where or "zero/stage" in where
    }
    of_transformers = {where: times for where, times in found.items() if MASK in where}
    ours = {where: times for where, times in found.items() if where not in of_deepspeed | of_transformers}
    assert ours == {LOSS_COPY: 1, NORM: 1}
    assert sum(of_deepspeed.values()) == {"2": 4, "3": 1}[stage]
    assert sum(of_transformers.values()) == masks
