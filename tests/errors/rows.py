"""What a row of the tables is, and the good things that its bad one is made of."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import rosa_ds
from rosa_ds.adapters.inject import adapted_layers
from rosa_ds.adapters.mask import save_mask
from rosa_ds.checkpoints import checkpoint
from rosa_ds.checkpoints.checkpoint import Checkpoint
from rosa_ds.config.deepspeed import plan_deepspeed
from rosa_ds.config.schema import RunConfig
from rosa_ds.models.load import TINY_FOLDER, identify
from rosa_ds.utils.files import write_manifest

PAIRS = [{"prompt": f"count {i}", "completion": f"number {i}"} for i in range(16)]
SMALL = {"method": "robust", "adapter": {"rank": 2, "density": 0.001}}


@dataclasses.dataclass(frozen=True)
class Row:
    """One bad input of a program.

    Attributes:
        arguments: of the command line, in the folder that ``make`` has filled.
        words: all of them stand in the message: what was given, what is allowed, what to do.
        make: puts the files there that the row is about.
        status: exit status; 2 is argparse's.
        around: what else the process meets: a full disk, a package that is not installed.
    """

    name: str
    program: str
    arguments: str | Sequence[str]
    words: tuple[str, ...]
    make: Callable[[Path], object] | None = None
    environ: Mapping[str, str] = dataclasses.field(default_factory=dict)
    status: int = 1
    around: Callable[[], AbstractContextManager[object]] = contextlib.nullcontext

    def command(self) -> list[str]:
        given = self.arguments.split() if isinstance(self.arguments, str) else [*self.arguments]
        return given


@dataclasses.dataclass(frozen=True)
class FunctionRow:
    """One bad input of a function for Python: ``call`` raises ValueError with these words."""

    name: str
    call: Callable[[Path], object]
    words: tuple[str, ...]


def write_rows(name: str, rows: Sequence[Any] = PAIRS) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def write(name: str, content: bytes | str | Mapping[str, Any]) -> Callable[[Path], object]:
    def made(folder: Path) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        text = content if isinstance(content, (bytes, str)) else json.dumps(content)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())

    return made


def both(*parts: Callable[[Path], object]) -> Callable[[Path], object]:
    def made(folder: Path) -> None:
        for part in parts:
            part(folder)

    return made


def base(folder: Path, name: str = "base") -> Path:
    """A copy of the built-in model."""
    return Path(shutil.copytree(TINY_FOLDER, folder / name))


def cut(path: Path, share: float = 0.5) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


def change_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def tiny() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(TINY_FOLDER, dtype=torch.float32)


@functools.cache
def _identity() -> Mapping[str, Any]:
    return identify(RunConfig().model)


def adapter(folder: Path, name: str = "adapter", method: str = "robust", **base_says: Any) -> Path:
    """An adapter of the built-in model, as a run would leave it."""
    model = tiny()
    rosa_ds.inject(model, rosa_ds.AdapterConfig(method=method, rank=2, density=0.001))
    if method == "robust":
        rosa_ds.set_mask(model, rosa_ds.compute_mask(model, [], score="random"))
    rosa_ds.save_adapter(model, folder / name, base={**_identity(), **base_says})
    return folder / name


def mask(folder: Path, name: str = "mask.safetensors", **changes: Any) -> Path:
    """A mask for :data:`SMALL`."""
    model = tiny()
    rosa_ds.inject(model, rosa_ds.AdapterConfig(method="robust", rank=2, density=0.001))
    made = {
        layer.weight_name: torch.arange(layer.entries, dtype=torch.int32) for layer in adapted_layers(model).values()
    }
    for key, value in changes.items():
        made[key] = value
    save_mask(made, folder / name)
    return folder / name


def saved(step: int, **config: Any) -> Checkpoint:
    """The state of a run that has trained the built-in model on ``rows.jsonl``; its numbers are not those of a model."""
    plan, settings = plan_deepspeed({}, RunConfig(**{**SMALL, **config}), 1, gpu_has_bfloat16=False)
    return Checkpoint(
        step=step,
        phase="train",
        trained={"layer.A": torch.arange(6.0).view(2, 3)},
        moments={},
        positions={},
        collected={},
        base_changes={},
        collected_steps=1,
        optimizer_scalars={"low_rank": {"step": 3.0}},
        loss_scaler={},
        trained_tokens=99,
        config={**settings.model_dump(), "deepspeed": plan.record()},
        batch_size=16,
        base=_identity(),
        data="d",
        evaluation_due=False,
    )


def run(folder: Path, name: str = "runs/default", steps: Sequence[int] = (1,), **config: Any) -> Path:
    """A run's folder with checkpoints of these steps, the last one's folder is returned."""
    for step in steps:
        checkpoint.save(folder / name, saved(step, **config), keep=2)
    return folder / name / "checkpoints" / f"step-{steps[-1]:06}"


def sign(folder: Path) -> None:
    """Make a changed folder whole again in the eyes of its manifest."""
    write_manifest(folder)
