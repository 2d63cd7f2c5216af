"""Everything of this folder is marked ``gpu``; what needs more ranks than there are GPUs lets them share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from launching import TRAIN, losses, run

FOLDER = Path(__file__).parent
Train = Callable[..., list[float]]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent == FOLDER:
            item.add_marker(pytest.mark.gpu)


COMMON = {
    "data.train": "builtin:sql[:16]",
    "data.eval": "builtin:sql[:4]",
    "training.max_steps": "3",
    "mask.warmup_steps": "1",
    "draw.every": "2 steps",
    "ds.train_batch_size": "4",
    "adapter.rank": "4",
    "adapter.density": "0.02",
    "adapter.dropout": "0",
    "model.dtype": "float32",
}


def variables_of(device: str, ranks: int) -> dict[str, str]:
    """``cpu`` hides the GPUs; ranks that are more than the GPUs go through host memory, since NCCL refuses them."""
    if device == "cpu":
        return {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
    return {"ROSA_COLLECTIVES": "host"} if ranks > torch.cuda.device_count() else {}


@pytest.fixture(scope="session")
def train() -> Train:
    """Train the built-in model in ``folder``; losses of all steps and evaluations."""

    def call(
        folder: Path, given: dict[str, str], device: str = "cuda", ranks: int = 1, more: Sequence[str] = ()
    ) -> list[float]:
        settings = {**COMMON, **given, "training.output_dir": str(folder)}
        words = [word for name, value in settings.items() for word in (f"--{name}", value)]
        launcher = "python" if ranks == 1 else "torchrun"
        run(launcher, ranks, TRAIN, *words, *more, cwd=folder.parent, variables=variables_of(device, ranks))
        return [loss for _, _, loss in losses(folder)]

    return call
