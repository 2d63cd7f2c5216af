"""A whole study: tune, run, read back, report."""

from __future__ import annotations

import dataclasses
import fnmatch
import logging
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from rosa_ds.comparing.children import Children
from rosa_ds.comparing.planned import PlannedRun, check_variants, plan_finals, plan_trials
from rosa_ds.comparing.plots import (
    DPI,
    colors_of,
    plot_losses,
    plot_masks,
    plot_metric,
    plot_singular_values,
    plot_tuning,
    tuned_numbers,
)
from rosa_ds.comparing.report import write_report
from rosa_ds.comparing.results import Choice, Results, RunResult, as_json, choose, read_run
from rosa_ds.comparing.running import Programs, Runner
from rosa_ds.comparing.study import Study, read_study
from rosa_ds.comparing.updates import Changes, adapted_names, middle_layers, read_changes
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


def compare(options: Options, programs: Programs) -> None:
    """Do what is not finished of a study, and write its report.

    Raises:
        ValueError: the study or a setting in it is wrong, before anything is run.
        RunError: runs have failed; the report lists them.
        InterruptedRunError: SIGTERM or SIGINT came; the same command goes on.
    """
    study = read_study(options.study)
    root = options.output.absolute()
    trials = plan_trials(study, root)
    check_variants(study, root)
    _check_pattern(study, trials, root, options.only)
    if not options.report_only:
        with Children(_environment(options.jobs)) as children:
            runner = Runner(programs, children, options.jobs)
            runner.do([run for run in trials if _is_wanted(run, options.only)], [])
            if not children.stopped:
                finals = plan_finals(study, root, _best(study, [read_run(run, []) for run in trials]))
                runner.do([run for run in finals if _is_wanted(run, options.only)], study.evaluate)
        if children.stopped:
            raise InterruptedRunError(f"interrupted ({children.stopped}): the same command goes on with {root}")
    elif not (root / "runs").is_dir():
        raise ValueError(
            f"--report-only: there are no runs in {options.output}: give the folder of a study that was begun"
        )
    results = report(study, trials, options)
    failed = [result.run.name for result in results.runs if result.state == "failed"]
    if failed:
        raise RunError(f"{len(failed)} runs failed: {', '.join(failed)}; {root / 'report.md'} says how")


def _environment(jobs: int) -> dict[str, str]:
    """Of the runs: those that are done at once share the cores, unless OMP_NUM_THREADS says otherwise."""
    threads = max(1, len(os.sched_getaffinity(0)) // jobs)
    return {"OMP_NUM_THREADS": str(threads), **os.environ}


def _is_wanted(run: PlannedRun, only: str | None) -> bool:
    return only is None or fnmatch.fnmatch(run.variant, only) or fnmatch.fnmatch(run.name, only)


def _check_pattern(study: Study, trials: Sequence[PlannedRun], root: Path, only: str | None) -> None:
    known = [*trials, *plan_finals(study, root, {})]
    if not any(_is_wanted(run, only) for run in known):
        names = [run.name for run in known]
        raise ValueError(
            f"--only {only} fits no run.{did_you_mean(str(only), [*names, *study.variants])} There are {', '.join(names)}"
        )


def _choices(study: Study, trials: Sequence[RunResult]) -> dict[str, Choice]:
    return {variant: choose(study, variant, trials) for variant in study.variants if study.grid(variant)}


def _best(study: Study, trials: Sequence[RunResult]) -> dict[str, PlannedRun | None]:
    """Variant -> its best trial. A variant of which a trial is still to be done has none."""
    best: dict[str, PlannedRun | None] = {}
    for variant, choice in _choices(study, trials).items():
        waiting = [trial.run.name for trial in trials if trial.run.variant == variant and trial.state == "missing"]
        if waiting:
            logger.info("%s waits for its trials: %s", variant, ", ".join(waiting))
        best[variant] = None if waiting or choice.best is None else choice.best.run
    return best


def report(study: Study, trials: Sequence[PlannedRun], options: Options) -> Results:
    """Write ``report.md``, ``results.json`` and the plots from what the runs have left, and return what was read."""
    root = options.output.absolute()
    tried = [read_run(run, []) for run in trials]
    finals = plan_finals(study, root, _best(study, tried))
    results = Results(study, tried, [read_run(run, study.evaluate) for run in finals])
    choices = _choices(study, tried)
    changes, layers = _read_changes(results)
    plots = _draw(results, changes, layers, root)
    text = write_report(results, choices, changes, plots, options.command, options.study.read_text())
    write_json(root / "results.json", as_json(results, root))
    write_text(root / "report.md", text)
    logger.info("wrote %s", options.output / "report.md")
    return results


def _read_changes(results: Results) -> tuple[dict[str, Changes], list[str]]:
    """Of the first finished run of each variant; and the layers that are drawn."""
    runs = {}
    for variant in results.study.variants:
        finished = [result.run.folder / "run" for result in results.finals_of(variant) if result.state == "finished"]
        if finished:
            runs[variant] = finished[0]
    adapted = next((names for run in runs.values() if (names := adapted_names(run))), [])
    layers = results.study.layers or (middle_layers(adapted) if adapted else [])
    named = bool(results.study.layers)
    return {variant: read_changes(run, layers, demanded=named) for variant, run in runs.items()}, layers


def _draw(results: Results, changes: Mapping[str, Changes], layers: Sequence[str], root: Path) -> dict[str, str]:
    """What was drawn -> its file, relative to ``root``. Nothing of what there is no data for."""
    colors = colors_of(results)
    figures = {metric: plot_metric(results, metric) for metric in results.metrics}
    if any(result.training for result in results.finals):
        figures["losses"] = plot_losses(results)
    if results.trials and tuned_numbers(results):
        figures["tuning"] = plot_tuning(results)
    if layers and any(found.singular_values for found in changes.values()):
        figures["singular values"] = plot_singular_values(changes, layers, colors)
    masked = {variant: found for variant, found in changes.items() if found.masks}
    if layers and masked:
        figures["masks"] = plot_masks(masked, layers, colors)
    folder = root / "plots"
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for number, (name, figure) in enumerate(figures.items(), start=1):
        file = f"{number}-{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}.png"
        figure.savefig(folder / file, dpi=DPI)
        files[name] = f"plots/{file}"
    for old in set(folder.glob("*.png")) - {root / file for file in files.values()}:
        old.unlink()
    return files
