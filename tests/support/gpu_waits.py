"""``python gpu_waits.py FILE TRAIN_ARGUMENTS``: a run that writes where each optimizer step waits for the GPU, a line a step."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from rosa_ds.commands import train
from rosa_ds.commands.program import run_program
from rosa_ds.planning.gpu_check.steps import host_waits
from rosa_ds.training.loop import Loop


def install(file: Path) -> None:
    """Note the waits of every optimizer step from now on."""
    train_step = Loop._train_step

    def counted(self: Loop, step: Any) -> Any:
        result: list[Any] = []
        waits = host_waits(lambda: result.append(train_step(self, step)))
        with file.open("a") as stream:
            stream.write(f"{json.dumps(waits)}\n")
        return result[0]

    Loop._train_step = counted


if __name__ == "__main__":
    install(Path(sys.argv.pop(1)))
    run_program(train.main)
