"""Short trainings of the built-in model as processes of their own, which several stages compare; what they say is the stage's."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

_SMALL = {
    "data.train": "builtin:sql[:16]",
    "data.eval": "builtin:sql[:2]",
    "training.max_steps": "1",
    "training.save_steps": "2",
    "mask.warmup_steps": "1",
    "adapter.low_rank_lr": "0.02",
    "adapter.sparse_lr": "0.02",
    "ds.train_batch_size": "4",
}


class Run:
    """One training of three steps (warm-up, collection of the mask, training), begun at once. ``folder``: its output.

    Args:
        given: settings beside those of all runs; ``checkpoint``: a step's folder to go on from.
        ranks: processes on this host, which share its GPUs through host memory where they are more than one.
    """

    def __init__(
        self, work: Path, name: str, given: Mapping[str, str], ranks: int = 1, checkpoint: Path | None = None
    ) -> None:
        self.name, self.folder = name, work / name
        settings = {**_SMALL, **given, "training.output_dir": str(self.folder)}
        words = [word for setting, value in settings.items() for word in (f"--{setting}", value)]
        words += [] if checkpoint is None else ["--resume", str(checkpoint)]
        command = [sys.executable, "-m", "rosa_ds.commands.train", *words]
        port = str(_free_port())
        self.processes = []
        for rank in range(ranks):
            variables = dict(os.environ)
            if ranks > 1:
                variables |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
                variables |= {"LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
                variables |= {"ROSA_COLLECTIVES": "host"}
            self.processes.append(subprocess.Popen(command, env=variables))

    def finish(self) -> list[float]:
        """Losses of its steps, in full precision. Raises: RuntimeError if a rank failed."""
        statuses = [process.wait() for process in self.processes]
        if any(statuses):
            raise RuntimeError(f"run {self.name} ended with the exit statuses {statuses} of its ranks")
        lines = [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]
        return [line["loss"] for line in lines if "loss" in line]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
