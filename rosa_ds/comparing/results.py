"""What the runs of a study have left, read back and put side by side."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rosa_ds.adapters.folder import open_adapter
from rosa_ds.comparing.planned import PlannedRun
from rosa_ds.comparing.runner import RECORD_FILE, is_finished, is_trained, read_record
from rosa_ds.comparing.statistics import PairedSeeds, RowInterval, Summary, compare_rows, compare_seeds, summarise
from rosa_ds.comparing.study import Evaluation, Study
from rosa_ds.utils.files import TensorFiles

VALIDATION_LOSS = "validation loss"
_NOT_FIGURES = frozenset({"seconds"})

logger = logging.getLogger(__name__)


def read_run(run: PlannedRun, evaluations: Sequence[Evaluation]) -> RunResult:
    """What is there of a run with these settings."""
    result, record = RunResult(run), read_record(run)
    if record is None:
        return result
    result.attempts, result.problem = record.attempts, record.problem
    if is_finished(run, evaluations):
        result.state = "finished"
    elif record.problem:
        result.state = "failed"
    if not is_trained(run, record):
        return result
    trained = open_adapter(run.folder / "run" / "adapter").trained
    assert isinstance(trained, TensorFiles)
    result.trained = sum(math.prod(trained.shape(name)) for name in trained)
    for text in (run.folder / "run" / "metrics.jsonl").read_text().splitlines():
        line = json.loads(text)
        if line.get("event") == "eval":
            result.evaluation.append((line["step"], line["loss"]))
        elif "event" not in line:
            result.training.append((line["step"], line["loss"]))
            result.peak_memory_bytes = line.get("peak_memory_bytes", result.peak_memory_bytes)
    if result.evaluation:
        result.figures[VALIDATION_LOSS] = result.evaluation[-1][1]
    for evaluation in evaluations:
        path = record.result(run.folder, evaluation)
        if path is not None:
            _take_figures(result, json.loads(path.read_text()), evaluation, alone=len(evaluations) == 1)
    return result


@dataclasses.dataclass
class RunResult:
    """One run.

    Attributes:
        state: ``finished``, ``failed``, or ``missing`` (not begun, or to be gone on with).
        problem: of one that failed.
        trained: numbers that training changed, without positions.
        training: (step, loss) of every logged step, those of a mask's warm-up and collection first; evaluation: likewise.
        figures: title of a metric -> its value.
        rows: title of a metric -> the score of each row, where its value is their mean.
        prompts: title of a metric -> digest of the rows it was measured on.
        attempts: as in :class:`rosa_ds.comparing.runner.Record`.
    """

    run: PlannedRun
    state: str = "missing"
    problem: str = ""
    trained: int | None = None
    training: list[tuple[int, float]] = dataclasses.field(default_factory=list)
    evaluation: list[tuple[int, float]] = dataclasses.field(default_factory=list)
    figures: dict[str, float] = dataclasses.field(default_factory=dict)
    rows: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    prompts: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    attempts: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    peak_memory_bytes: int | None = None

    @property
    def validation_loss(self) -> float:
        """After the last step; infinite where there is none or it is not a number, so that no tuning chooses it."""
        loss = self.figures.get(VALIDATION_LOSS, math.inf)
        return loss if math.isfinite(loss) else math.inf

    @property
    def cpu_seconds(self) -> float:
        return sum(attempt["cpu_seconds"] for attempt in self.attempts)

    @property
    def seconds(self) -> float:
        return sum(attempt["seconds"] for attempt in self.attempts)


def _take_figures(result: RunResult, content: dict[str, Any], evaluation: Evaluation, alone: bool) -> None:
    """From what eval.py has written. Where there are several evaluations, the title of a figure says which it is of."""
    figures = {
        name: float(value)
        for name, value in content.items()
        if name in evaluation.metric or (isinstance(value, float) and name not in _NOT_FIGURES)
    }
    samples = content.get("samples", [])
    for name, value in figures.items():
        title = name if alone else f"{name}, {evaluation.title}"
        result.figures[title] = value
        scores = [float(sample["scores"][name]) for sample in samples if name in sample["scores"]]
        # of a figure that is the mean of its rows' (BLEU of a corpus is not)
        if scores and math.isclose(sum(scores) / len(scores), value, rel_tol=1e-9, abs_tol=1e-12):
            result.rows[title] = scores
            result.prompts[title] = [str(sample["prompt"]) for sample in samples]


def choose_trials(study: Study, trials: Sequence[RunResult]) -> dict[str, Tuning]:
    """Of each variant that is tuned, the trial with the lowest validation loss; of equal ones the first."""
    found = {}
    for variant in study.variants:
        grid = study.grid(variant)
        if not grid:
            continue
        own = [trial for trial in trials if trial.run.variant == variant and math.isfinite(trial.validation_loss)]
        best = min(own, key=lambda trial: trial.validation_loss, default=None)
        edges = []
        for name, values in grid.items():
            numbers = [value for value in values if isinstance(value, (int, float)) and not isinstance(value, bool)]
            ranged = len(numbers) == len(values) > 1
            if best is not None and ranged and best.run.choice[name] in (min(numbers), max(numbers)):
                edges.append(name)
        found[variant] = Tuning(best, edges)
    return found


@dataclasses.dataclass(frozen=True)
class Tuning:
    """What tuning a variant has shown. ``best`` is ``None`` if no trial has ended with a loss; ``edges``: settings whose best value
    is the least or largest that was tried."""

    best: RunResult | None
    edges: list[str]


@dataclasses.dataclass(frozen=True)
class Results:
    """Everything that is reported of a study."""

    study: Study
    trials: list[RunResult]
    finals: list[RunResult]

    @property
    def runs(self) -> list[RunResult]:
        """Each once: a final run may be one of the trials."""
        return list({result.run.folder: result for result in [*self.trials, *self.finals]}.values())

    def finals_of(self, variant: str) -> list[RunResult]:
        return [result for result in self.finals if result.run.variant == variant]

    @property
    def metrics(self) -> list[str]:
        """Titles, in the order of the study's evaluations; the validation loss last."""
        titles = dict.fromkeys(title for result in self.finals for title in result.figures)
        return sorted(titles, key=lambda title: title == VALIDATION_LOSS)

    def values(self, variant: str, metric: str) -> dict[int, float]:
        """Seed -> figure, of the final runs that have it."""
        return {r.run.seed: r.figures[metric] for r in self.finals_of(variant) if metric in r.figures}

    def summary(self, variant: str, metric: str) -> Summary | None:
        values = self.values(variant, metric)
        return summarise(list(values.values())) if values else None

    def trained(self, variant: str) -> list[int]:
        """Numbers of trained parameters that the variant's runs have: one, but for masks of other sizes."""
        return sorted({result.trained for result in self.finals_of(variant) if result.trained is not None})

    @functools.cached_property
    def comparisons(self) -> list[Comparison]:
        """Every variant beside every reference, in every metric that both have."""
        found = []
        for reference in self.study.reference:
            for metric in self.metrics:
                for variant in (name for name in self.study.variants if name != reference):
                    seeds = compare_seeds(self.values(variant, metric), self.values(reference, metric))
                    if seeds is not None:
                        rows = self._compare_rows(variant, reference, metric)
                        found.append(Comparison(variant, reference, metric, seeds, rows))
        return found

    def _compare_rows(self, variant: str, reference: str, metric: str) -> RowInterval | None:
        both = [result for name in (variant, reference) for result in self.finals_of(name) if metric in result.rows]
        if len({tuple(result.prompts[metric]) for result in both}) > 1:
            logger.warning(
                "%s was measured on different prompts (%s), so rows are not compared: a data file has changed (delete %s in the folders "
                "of those runs), or the variants' models write prompts differently",
                metric,
                ", ".join(result.run.name for result in both),
                RECORD_FILE,
            )
            return None
        by_seed = [{r.run.seed: r.rows[metric] for r in both if r.run.variant == name} for name in (variant, reference)]
        return compare_rows(*by_seed)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A variant beside a reference in one metric. ``rows`` is ``None`` where the metric has no value for each row."""

    variant: str
    reference: str
    metric: str
    seeds: PairedSeeds
    rows: RowInterval | None


def as_json(results: Results, folder: Path) -> dict[str, Any]:
    """``results.json``: every run with its settings and figures, and what follows from them."""

    def of_run(result: RunResult) -> dict[str, Any]:
        run = result.run
        return {
            "name": run.name, "variant": run.variant, "seed": run.seed, "choice": run.choice, "digest": run.digest,
            "folder": str(run.folder.relative_to(folder)), "state": result.state, "problem": result.problem,
            "trained_parameters": result.trained, "figures": result.figures, "seconds": result.seconds,
            "cpu_seconds": result.cpu_seconds, "peak_memory_bytes": result.peak_memory_bytes, "attempts": result.attempts,
        }  # fmt: skip

    summaries = {
        variant: {m: dataclasses.asdict(s) for m in results.metrics if (s := results.summary(variant, m)) is not None}
        for variant in results.study.variants
    }
    return {
        "study": results.study.model_dump(),
        "cpu_hours": sum(result.cpu_seconds for result in results.runs) / 3600,
        "trials": [of_run(result) for result in results.trials],
        "finals": [of_run(result) for result in results.finals],
        "summaries": summaries,
        "comparisons": [dataclasses.asdict(comparison) for comparison in results.comparisons],
    }


def machines(results: Sequence[RunResult]) -> list[str]:
    """The machines that the runs were done on, each once."""
    found = [attempt["machine"] for result in results for attempt in result.attempts]
    return list(
        dict.fromkeys(", ".join(f"{key} {value}" for key, value in machine.items() if value) for machine in found)
    )
