"""``report.md``: everything that a study has shown, in one Markdown file beside its plots."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence

from rosa_ds.comparing.results import Comparison, Results, RunResult, Tuning, machines
from rosa_ds.comparing.statistics import FEWEST_PAIRS, Summary
from rosa_ds.comparing.updates import Changes


def report_text(
    results: Results,
    tunings: Mapping[str, Tuning],
    changes: Mapping[str, Changes],
    plots: Mapping[str, str],
    command: str,
    study_text: str,
) -> str:
    """The report as Markdown.

    Args:
        changes: variant -> what the first finished run of it has changed.
        plots: what was drawn -> its file, relative to the report.
        command: that does the study again; study_text: its file.
    """
    runs = results.runs
    missing = [result.run.name for result in [*results.trials, *results.finals] if result.state == "missing"]
    example = (results.finals or results.trials)[0].run if runs else None
    again = f"\n    rosa-ds train --config {example.folder / 'config.json'}   # one run of it" if example else ""
    cpu, wall = (sum(getattr(result, kind) for result in runs) / 3600 for kind in ("cpu_seconds", "seconds"))
    parts = [
        f"# {results.study.name}",
        f"    {command}{again}",
        f"{len(runs)} runs, {cpu:.2f} CPU hours, {wall:.2f} hours of run time. Done on: {'; '.join(machines(runs)) or '–'}.",
    ]
    if missing:
        parts.append(f"Not finished: {', '.join(missing)}.")
    parts += _failures(runs)
    parts += _results(results)
    for metric in results.metrics:
        parts += _picture(plots, metric, f"{metric} against trained parameters: seeds, and the mean of each variant.")
    parts += _comparisons(results.comparisons)
    parts += _picture(plots, "losses", "Loss against steps, mean over seeds and their range.")
    parts += _tuning(results, tunings, plots)
    if changes:
        first = {r.run.variant: r.run.seed for r in reversed(results.finals) if r.state == "finished"}
        seeds = ", ".join(f"{variant} {first[variant]}" for variant in changes)
        parts += ["## Updates and masks", f"Of one run each (seed: {seeds})."]
        parts += _picture(plots, "singular values", "Singular values of the update of a weight, by the largest.")
        parts += _picture(
            plots,
            "masks",
            "Masks: blocks of the weight that hold an entry, and entries in the busiest rows and columns.",
        )
        parts += _masks(changes)
    parts += ["## Study", f"```json\n{study_text.strip()}\n```"]
    return "\n\n".join(parts) + "\n"


def _failures(runs: Sequence[RunResult]) -> list[str]:
    failed = [result for result in runs if result.state == "failed"]
    if not failed:
        return []
    parts = ["## Failures"]
    for result in failed:
        what, _, tail = result.problem.partition("\n")
        # a fence longer than any in the output
        fence = "`" * max(3, *(len(found) + 1 for found in re.findall("`+", tail)), 3)
        parts.append(f"`{result.run.name}`: {what}" + (f"\n\n{fence}\n{tail}\n{fence}" if tail else ""))
    return parts


def _results(results: Results) -> list[str]:
    parts = ["## Results", "Mean ± sample standard deviation over seeds."]
    rows = []
    for variant in results.study.variants:
        counts = results.trained(variant)
        trained = " to ".join(f"{count:,}" for count in dict.fromkeys([*counts[:1], *counts[-1:]]))
        finals = results.finals_of(variant)
        finished = sum(result.state == "finished" for result in finals)
        peaks = [result.peak_memory_bytes for result in finals if result.peak_memory_bytes]
        cells = [spread(results.summary(variant, metric)) for metric in results.metrics]
        peak = f"{max(peaks) / 2**30:.2f}" if peaks else "–"
        rows.append([variant, trained or "–", f"{finished} of {len(results.study.seeds)}", *cells, peak])
    head = ["variant", "trained parameters", "seeds finished", *results.metrics, "peak memory, GiB"]
    parts.append(table(head, rows))
    for metric in results.metrics:
        seeds = results.study.seeds
        values = {variant: results.values(variant, metric) for variant in results.study.variants}
        rows = [[variant, *(number(found.get(seed)) for seed in seeds)] for variant, found in values.items()]
        parts += [f"Each seed, {metric}:", table(["variant", *(f"seed {seed}" for seed in seeds)], rows)]
    return parts


def _comparisons(found: Sequence[Comparison]) -> list[str]:
    if not found:
        return []
    rows = []
    for entry in found:
        pair = entry.seeds
        between = "–"
        if entry.rows is not None:
            between = f"{number(entry.rows.low)} to {number(entry.rows.high)} ({entry.rows.rows} rows, {entry.rows.seeds} seeds)"
        rows.append(
            [entry.variant, entry.reference, entry.metric, str(pair.summary.count), spread(pair.summary), _p(pair.t_p), _p(pair.sign_p), between]
        )  # fmt: skip
    head = ["variant", "reference", "metric", "pairs", "difference", "p (paired t)", "p (signs)", "95 % over rows"]
    count = max(entry.seeds.summary.count for entry in found)
    tests = sum(entry.seeds.t_p is not None or entry.seeds.sign_p is not None for entry in found)
    explanation = [
        f"Variant minus reference, over the seeds that both have ({count} at most), mean ± standard deviation of the differences.",
        "*p (paired t)*: two-sided paired t-test; *p (signs)*: permutation test that turns the signs of the differences, "
        f"whose least possible value with {count} pairs is {min(1.0, 2 / 2**count):.2g}.",
        f"No p-value is given for fewer than {FEWEST_PAIRS} pairs"
        + (f"; {tests} comparisons were tested, and none is corrected for their number." if tests else "."),
        "*95 % over rows*: bootstrap of the difference, rows drawn again and seeds kept: it holds for these seeds.",
    ]
    return ["## Paired comparisons", " ".join(explanation), table(head, rows)]


def _p(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}" if value >= 0.001 else "< 0.001"


def _tuning(results: Results, tunings: Mapping[str, Tuning], plots: Mapping[str, str]) -> list[str]:
    study = results.study
    if not results.trials:
        return []
    count = len(study.choices(next(iter(study.variants))))
    parts = [
        "## Tuning",
        f"{count} trials of each variant with seed {study.seed_of_trials}, by the loss on `{study.validation or 'data.eval'}` after the "
        "last step"
        + (f" ({settings_text(study.tune_settings)})" if study.tune_settings else "")
        + "; the lowest is bold.",
    ]
    rows = []
    for variant in study.variants:
        best = tunings[variant].best
        for trial in (trial for trial in results.trials if trial.run.variant == variant):
            mark = "**" if best is not None and trial.run == best.run else ""
            loss = number(trial.validation_loss) if trial.state == "finished" else trial.state
            rows.append([variant, settings_text(trial.run.choice), f"{mark}{loss}{mark}"])
    parts.append(table(["variant", "settings", "validation loss"], rows))
    for variant, tuning in tunings.items():
        failed = sum(trial.state == "failed" for trial in results.trials if trial.run.variant == variant)
        if failed:
            parts.append(f"{failed} of the {count} trials of {variant} failed: it is tuned by the others alone.")
        if tuning.best is None:
            parts.append(f"No trial of {variant} has ended with a loss: there are no runs of it.")
        for name in tuning.edges:
            value = tuning.best.run.choice[name] if tuning.best is not None else None
            parts.append(
                f"The best of {variant} lies at the edge of its grid ({name} {value}): a wider one may have a better."
            )
    return [
        *parts,
        *_picture(plots, "tuning", "Validation loss by what was tuned (the lowest of the trials with that value)."),
    ]


def _masks(changes: Mapping[str, Changes]) -> list[str]:
    """Share of empty rows and columns by the last part of the layers' names, mean over layers."""
    rows = []
    for variant, found in changes.items():
        kinds: dict[str, list[tuple[float, float]]] = {}
        for name, mask in found.masks.items():
            kinds.setdefault(name.split(".")[-2], []).append(mask.empty_shares)
        for kind, shares in kinds.items():
            empty = [sum(column) / len(shares) for column in zip(*shares, strict=True)]
            rows.append([variant, kind, str(len(shares)), f"{empty[0]:.1%}", f"{empty[1]:.1%}"])
    head = ["variant", "layers", "count", "empty rows", "empty columns"]
    return ["Rows and columns of masks without any entry, mean over layers:", table(head, rows)] if rows else []


def _picture(plots: Mapping[str, str], name: str, caption: str) -> list[str]:
    return [f"![{caption}]({plots[name]})", f"*{caption}*"] if name in plots else []


def number(value: float | None) -> str:
    """Four significant digits, 0 for what only rounding keeps from it; a dash for what is not there."""
    return "–" if value is None or not math.isfinite(value) else f"{round(value, 14):.4g}"


def spread(summary: Summary | None) -> str:
    if summary is None:
        return "–"
    return number(summary.mean) + ("" if summary.sd is None else f" ± {number(summary.sd)}")


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Of Markdown. A ``|`` inside a cell is kept."""
    lines = [list(head), ["---"] * len(head), *(list(row) for row in rows)]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def settings_text(settings: Mapping[str, object]) -> str:
    return ", ".join(f"{name} {json.dumps(value)}" for name, value in settings.items())
