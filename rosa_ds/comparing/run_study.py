"""A whole study: tune, run, read back, report."""

from __future__ import annotations

import dataclasses
import fnmatch
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from rosa_ds.comparing.children import Children
from rosa_ds.comparing.planned import PlannedRun, check_variants, plan_finals, plan_trials
from rosa_ds.comparing.plots import draw_plots
from rosa_ds.comparing.report import report_text
from rosa_ds.comparing.results import Results, RunResult, Tuning, as_json, choose_trials, read_run
from rosa_ds.comparing.runner import Programs, Runner
from rosa_ds.comparing.study import read_study
from rosa_ds.comparing.updates import read_updates
from rosa_ds.utils.errors import InterruptedRunError, RunError
from rosa_ds.utils.files import write_json, write_text
from rosa_ds.utils.suggest import did_you_mean

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Options:
    """What a user asked for. ``only``: a pattern of runs, ``lora`` or ``*/final-seed1``; ``command``: for the report."""

    study: Path
    output: Path
    jobs: int = 1
    only: str | None = None
    report_only: bool = False
    command: str = ""


def run_study(options: Options, programs: Programs) -> None:
    """Do what is not finished of a study, and write its report: ``report.md``, ``results.json`` and the plots.

    Raises:
        ValueError: the study or a setting in it is wrong, before anything is run.
        RunError: runs have failed; the report lists them.
        InterruptedRunError: SIGTERM or SIGINT came; the same command goes on.
    """
    study = read_study(options.study)
    root = options.output.absolute()
    trials = plan_trials(study, root)
    check_variants(study, root)
    known = [*trials, *plan_finals(study, root, {})]
    if not _wanted(known, options.only):
        names = [run.name for run in known]
        suggestion = did_you_mean(str(options.only), [*names, *study.variants])
        raise ValueError(f"--only {options.only} fits no run.{suggestion} There are {', '.join(names)}")
    if options.report_only and not (root / "runs").is_dir():
        raise ValueError(
            f"--report-only: there are no runs in {options.output}: give the folder of a study that was begun"
        )
    if not options.report_only:
        # runs that are done at once share the cores, unless OMP_NUM_THREADS says otherwise
        threads = max(1, len(os.sched_getaffinity(0)) // options.jobs)
        with Children({"OMP_NUM_THREADS": str(threads), **os.environ}) as children:
            runner = Runner(programs, children, options.jobs)
            runner.do(_wanted(trials, options.only), [])
            if not children.stopped:
                tried = [read_run(run, []) for run in trials]
                finals = plan_finals(study, root, _best_trials(choose_trials(study, tried), tried))
                runner.do(_wanted(finals, options.only), study.evaluate)
        if children.stopped:
            raise InterruptedRunError(f"interrupted ({children.stopped}): the same command goes on with {root}")
    tried = [read_run(run, []) for run in trials]
    tunings = choose_trials(study, tried)
    finals = plan_finals(study, root, _best_trials(tunings, tried))
    results = Results(study, tried, [read_run(run, study.evaluate) for run in finals])
    changes, layers = read_updates(results)
    plots = draw_plots(results, changes, layers, root)
    text = report_text(results, tunings, changes, plots, options.command, options.study.read_text())
    write_json(root / "results.json", as_json(results, root))
    write_text(root / "report.md", text)
    logger.info("wrote %s", options.output / "report.md")
    failed = [result.run.name for result in results.runs if result.state == "failed"]
    if failed:
        raise RunError(f"{len(failed)} runs failed: {', '.join(failed)}; {root / 'report.md'} says how")


def _wanted(runs: Sequence[PlannedRun], only: str | None) -> list[PlannedRun]:
    return [run for run in runs if only is None or any(fnmatch.fnmatch(n, only) for n in (run.variant, run.name))]


def _best_trials(tunings: Mapping[str, Tuning], trials: Sequence[RunResult]) -> dict[str, PlannedRun | None]:
    """Variant -> its best trial. A variant of which a trial is still to be done has none."""
    best: dict[str, PlannedRun | None] = {}
    for variant, tuning in tunings.items():
        waiting = [trial.run.name for trial in trials if trial.run.variant == variant and trial.state == "missing"]
        if waiting:
            logger.info("%s waits for its trials: %s", variant, ", ".join(waiting))
        best[variant] = None if waiting or tuning.best is None else tuning.best.run
    return best
