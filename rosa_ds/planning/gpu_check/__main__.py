"""The process of one stage; :mod:`rosa_ds.planning.gpu_check.runner` starts it."""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

from rosa_ds.planning.gpu_check.report import Report
from rosa_ds.planning.gpu_check.runner import NOT_RUN_STATUS
from rosa_ds.planning.gpu_check.stage import NEEDS_A_GPU, Check, NotRunError, Stage


def main(arguments: list[str]) -> None:
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    description, folder, begun, work = arguments
    stage = Stage(**json.loads(description))
    check = Check(stage, Report(Path(folder), float(begun)), Path(work))
    module, function = stage.place.split(":")
    try:
        if stage.gpu and not check.gpu:
            raise NotRunError(NEEDS_A_GPU)
        getattr(importlib.import_module(module), function)(check)
    except NotRunError as reason:
        sys.stderr.write(f"{reason}\n")
        sys.exit(NOT_RUN_STATUS)


def _end_with(parent: int) -> None:
    """Where the whole check is killed, no stage and nothing of what it started goes on."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os.killpg(os.getpgid(0), signal.SIGKILL)


if __name__ == "__main__":
    main(sys.argv[1:])
