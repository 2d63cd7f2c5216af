"""Runs the planned runs of a study, each one once: finished ones stay, interrupted ones go on, failed ones are reported."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import platform
import queue
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from rosa_ds.checkpoints import checkpoint
from rosa_ds.checkpoints.folder_lock import holder
from rosa_ds.comparing.children import Children
from rosa_ds.comparing.planned import PlannedRun
from rosa_ds.comparing.study import Evaluation
from rosa_ds.utils.errors import INTERRUPTED_STATUS
from rosa_ds.utils.files import move_aside, write_json

logger = logging.getLogger(__name__)
RECORD_FILE, CONFIG_FILE, LOG_FILE = "result.json", "config.json", "log.txt"
TAIL_LINES = 15
WAIT_SECONDS = 0.5


@dataclasses.dataclass(frozen=True)
class Programs:
    """The commands that train and evaluate, without their arguments."""

    train: Sequence[str]
    evaluate: Sequence[str]


class Runner:
    """Does runs, ``jobs`` of them at once.

    Args:
        children: how programs are started and stopped.
    """

    def __init__(self, programs: Programs, children: Children, jobs: int) -> None:
        self.programs, self.children, self.jobs = programs, children, jobs
        self._places: queue.SimpleQueue[dict[str, str]] = queue.SimpleQueue()
        for place in places(jobs):
            self._places.put(place)

    def do(self, runs: Sequence[PlannedRun], evaluations: Sequence[Evaluation]) -> None:
        """Do what is not finished of these runs. What fails is in its record; the others go on."""
        waiting = [run for run in runs if not is_finished(run, evaluations)]
        logger.info("%d of %d runs are finished already", len(runs) - len(waiting), len(runs))
        with ThreadPoolExecutor(self.jobs) as pool:
            for future in [pool.submit(self._do, run, evaluations) for run in waiting]:
                future.result()

    def _do(self, run: PlannedRun, evaluations: Sequence[Evaluation]) -> None:
        self._wait_for(run)
        if self.children.stopped:
            return
        record = _begin(run)
        record.problem = ""
        if not is_trained(run, record):
            record.trained = False
            resumes = checkpoint.folders(run.folder / "run").newest_good() is not None
            logger.info("%s: training%s", run.name, " goes on" if resumes else "")
            arguments = ["--config", str(run.folder / CONFIG_FILE), *(["--resume"] if resumes else [])]
            if not self._attempt(run, record, "train", [*self.programs.train, *arguments]):
                return
            record.trained = True
            _write(run, record)
            _delete_checkpoints(run.folder / "run")
        for evaluation in record.lacks(run.folder, evaluations):
            file = f"evaluation-{evaluation.digest}.json"
            arguments = [str(run.folder / "run"), *evaluation.arguments(), f"--output={run.folder / file}"]
            if self._attempt(run, record, f"evaluate {evaluation.title}", [*self.programs.evaluate, *arguments]):
                record.evaluations[evaluation.digest] = file
                _write(run, record)

    def _wait_for(self, run: PlannedRun) -> None:
        """A study that was killed leaves its runs alone in the world: what they do is not in vain."""
        said = None
        while not self.children.stopped and (who := holder(run.folder / "run")) is not None:
            if who != said:
                logger.info("%s: waiting for the run that is there already (%s)", run.name, who)
            said = who
            time.sleep(WAIT_SECONDS)

    def _attempt(self, run: PlannedRun, record: Record, what: str, command: list[str]) -> bool:
        log, place = run.folder / LOG_FILE, self._places.get()
        try:
            outcome = self.children.run(command, log, place)
        finally:
            self._places.put(place)
        record.attempts.append({"what": what, **dataclasses.asdict(outcome), "machine": machine()})
        if outcome.status == 0:
            problem = ""
        elif outcome.status == INTERRUPTED_STATUS:
            problem = f"{what} was interrupted and goes on when the study is started again"
        else:
            lines = log.read_text(errors="replace").splitlines()[-TAIL_LINES:]
            problem = f"{what} ended with status {outcome.status}:\n" + "\n".join(lines)
        if outcome.status != INTERRUPTED_STATUS and not self.children.stopped:  # which goes on when it is started again
            record.problem = record.problem or problem  # what failed first
        _write(run, record)
        if outcome.status == 0:
            logger.info("%s: %s took %.0f s (%.0f s of CPU)", run.name, what, outcome.seconds, outcome.cpu_seconds)
        elif not self.children.stopped:
            logger.warning("%s: %s", run.name, problem)
        return outcome.status == 0


def places(jobs: int) -> list[dict[str, str]]:
    """Environment variables of each of the runs that are done at once: a GPU of its own, or by turns if there are fewer."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    found = torch.cuda.device_count()
    gpus = visible.split(",")[:found] if visible else [str(index) for index in range(found)]
    return [{"CUDA_VISIBLE_DEVICES": gpus[job % len(gpus)]} if gpus else {} for job in range(jobs)]


def machine() -> dict[str, Any]:
    """What a run's time depends on."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    return {
        "cores": len(os.sched_getaffinity(0)),
        "processor": platform.processor() or platform.machine(),
        "gpu": gpu,
    } | versions


def _begin(run: PlannedRun) -> Record:
    """The record of a run; a folder of other settings is moved aside."""
    record = read_record(run)
    if record is not None:
        return record
    if run.folder.exists():
        logger.info("%s: its settings were others; that run is in %s now", run.name, move_aside(run.folder))
    run.folder.mkdir(parents=True)
    section = run.config["rosa"]
    training = section.get("training", {}) | {"output_dir": str(run.folder / "run")}
    write_json(run.folder / CONFIG_FILE, {**run.config, "rosa": {**section, "training": training}})
    record = Record(run.digest)
    _write(run, record)
    return record


def _delete_checkpoints(folder: Path) -> None:
    """They are of no use any more; the adapter stays."""
    for path in (folder / "checkpoints", folder / "deepspeed"):
        try:
            if path.exists():
                shutil.rmtree(path)
        except OSError as error:
            logger.warning("%s cannot be deleted: %s", path, error)


@dataclasses.dataclass
class Record:
    """What is known of a run: ``result.json`` in its folder.

    Attributes:
        digest: of the settings that it has been begun with.
        trained: whether training has ended well.
        evaluations: digest of an evaluation -> its file, of those that have ended well.
        attempts: every program that was started: ``what``, ``status``, ``seconds``, ``cpu_seconds``, ``machine``.
        problem: what failed first when it was last tried, with the last lines of its output; empty if nothing did.
    """

    digest: str
    trained: bool = False
    evaluations: dict[str, str] = dataclasses.field(default_factory=dict)
    attempts: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    problem: str = ""

    def lacks(self, folder: Path, evaluations: Sequence[Evaluation]) -> list[Evaluation]:
        """The evaluations whose results are not there."""
        return [entry for entry in evaluations if self.result(folder, entry) is None]

    def result(self, folder: Path, evaluation: Evaluation) -> Path | None:
        """The file of an evaluation that has ended well."""
        name = self.evaluations.get(evaluation.digest)
        return folder / name if name is not None and (folder / name).is_file() else None


def read_record(run: PlannedRun) -> Record | None:
    """Of a run with just these settings; ``None`` where there is none, or it is damaged."""
    path = run.folder / RECORD_FILE
    try:
        record = Record(**json.loads(path.read_text()))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        logger.warning("%s is damaged (%s): the run is done again", path, error)
        return None
    return record if record.digest == run.digest else None


def is_finished(run: PlannedRun, evaluations: Sequence[Evaluation]) -> bool:
    record = read_record(run)
    return record is not None and is_trained(run, record) and not record.lacks(run.folder, evaluations)


def is_trained(run: PlannedRun, record: Record) -> bool:
    """Whether training has ended well, and what came of it is still there."""
    return record.trained and (run.folder / "run" / "adapter" / "manifest.json").is_file()


def _write(run: PlannedRun, record: Record) -> None:
    write_json(run.folder / RECORD_FILE, dataclasses.asdict(record))
