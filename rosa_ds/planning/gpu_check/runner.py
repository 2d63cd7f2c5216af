"""Starts each stage as a process of its own, ends it at its deadline, and records how it ended."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rosa_ds.planning.gpu_check.report import RECORDS, TEXT, Report
from rosa_ds.planning.gpu_check.stage import Stage
from rosa_ds.planning.gpu_check.stages import STAGES
from rosa_ds.utils.suggest import did_you_mean

logger = logging.getLogger(__name__)
TOTAL_SECONDS = 600.0
NOT_RUN_STATUS = 75  # EX_TEMPFAIL: of a stage that cannot run here; its last line says why
LAST_LINES = 20


def choose_stages(names: str | None) -> list[Stage]:
    """Those of a comma-separated list, in the order of :data:`STAGES`; all for ``None``. Raises: ValueError for others."""
    if names is None:
        return list(STAGES)
    wanted = [name.strip() for name in names.split(",")]
    known = [stage.name for stage in STAGES]
    for name in wanted:
        if name not in known:
            raise ValueError(f"--stages: no stage {name!r}.{did_you_mean(name, known)} Give some of {', '.join(known)}")
    return [stage for stage in STAGES if stage.name in wanted]


def check(folder: Path, stages: Sequence[Stage], total: float = TOTAL_SECONDS) -> list[dict[str, Any]]:
    """Run the stages one after another; how each ended.

    Args:
        folder: for ``report.txt`` and ``results.jsonl``; made if it is not there.
        total: seconds for all of them.

    Raises: ValueError where the folder has the results of an earlier check.
    """
    if (folder / RECORDS).exists():
        raise ValueError(f"{folder} has the results of an earlier check: give --gpu another folder, or remove it")
    folder.mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()
    report = Report(folder.absolute(), time.time())
    ends = []
    with tempfile.TemporaryDirectory(prefix="rosa-gpu-check-") as work:
        for stage in stages:
            left = total - (time.monotonic() - begun)
            logger.info("%s: %s", stage.name, stage.summary)
            end = _run(dataclasses.replace(stage, seconds=min(stage.seconds, left)), report, Path(work))
            logger.info("  %s in %.1f s%s", end["outcome"], end["seconds"], f": {end['why']}" if "why" in end else "")
            ends.append({"stage": stage.name, **end})
    logger.info("%s has it all, to attach to an issue; %s the same for programs", folder / TEXT, folder / RECORDS)
    return ends


def _run(stage: Stage, report: Report, work: Path) -> dict[str, Any]:
    report.write(stage.name, "begun", {"summary": stage.summary, "deadline_s": round(stage.seconds, 1)})
    if stage.seconds < 1:
        end = {"outcome": "not run", "seconds": 0.0, "why": "no time is left of the whole check"}
        report.write(stage.name, "ended", end)
        return end
    own = work / stage.name
    own.mkdir()
    given = [json.dumps(dataclasses.asdict(stage)), str(report.folder), repr(report.begun), str(own)]
    begun = time.monotonic()
    with (own / "output").open("w+", errors="replace") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "rosa_ds.planning.gpu_check", *given],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = process.wait(stage.seconds)
        except subprocess.TimeoutExpired:
            status = None
        finally:  # also what a stage that has ended left running, and at an interrupt
            _end(process)
        output.seek(0)
        lines = [line for line in output.read().splitlines() if line.strip()][-LAST_LINES:]
    end = {"outcome": "done", "seconds": round(time.monotonic() - begun, 1)}
    if status is None:
        end |= {"outcome": "killed", "why": f"not done at its deadline of {stage.seconds:.0f} s", "last lines": lines}
    elif status == NOT_RUN_STATUS:
        end |= {"outcome": "not run", "why": lines[-1] if lines else "it does not say why"}
    elif status:
        end |= {"outcome": "failed", "why": f"exit status {status}", "last lines": lines}
    report.write(stage.name, "ended", end)
    return end


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill a stage and what it started, which is in its session."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    finally:
        process.wait()
