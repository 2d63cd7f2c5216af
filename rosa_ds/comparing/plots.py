"""The pictures of a study, as PNG. Each ``plot_`` function gives a figure, so that what it shows can be looked at without a file."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

from rosa_ds.comparing.results import Results, RunResult
from rosa_ds.comparing.updates import Changes, cumulated_shares

DPI = 110
SMALLEST_SHARE = 1e-8
"""Singular values below this part of the largest are rounding."""


def draw_plots(results: Results, changes: Mapping[str, Changes], layers: Sequence[str], root: Path) -> dict[str, str]:
    """Draw everything there is data for, in the folder ``plots`` of a study.

    Args:
        changes: variant -> what is drawn of its update and mask.
        layers: of these.

    Returns: what was drawn -> its file, relative to ``root``.
    """
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


def plot_metric(results: Results, metric: str) -> Figure:
    """A metric against trained parameters: a small point for each seed, a large one for the mean of a variant."""
    figure, panels = _panels(1, 1, 6.5, 4.5)
    panel: Axes = panels[0][0]
    for variant, color in colors_of(results).items():
        points = [
            (result.trained, result.figures[metric])
            for result in results.finals_of(variant)
            if result.trained is not None and metric in result.figures
        ]
        if points:
            x, y = np.array(points, float).T
            panel.scatter(x, y, s=14, color=color, alpha=0.6)
            panel.scatter([x.mean()], [y.mean()], s=70, color=color, marker="D", edgecolor="black", label=variant)
    panel.set(xlabel="trained parameters", ylabel=metric, xscale="log")
    counts = [result.trained for result in results.finals if result.trained is not None]
    if counts:
        panel.set_xlim(min(counts) / 1.6, max(counts) * 1.6)  # budgets that are nearly equal should look so
    panel.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    panel.xaxis.set_major_formatter(EngFormatter(sep=""))
    panel.xaxis.set_minor_formatter(NullFormatter())
    _legend(panel)
    return figure


def plot_losses(results: Results) -> Figure:
    """Training and evaluation loss against steps: the mean over seeds, and their range."""
    figure, panels = _panels(1, 2, 6.0, 4.2)
    for panel, kind in zip(panels[0], ("training", "evaluation"), strict=True):
        for variant, color in colors_of(results).items():
            curves = [curve for result in results.finals_of(variant) if (curve := getattr(result, kind))]
            table = mean_and_range(curves)
            if len(table):
                panel.plot(table[:, 0], table[:, 1], color=color, label=variant, linewidth=1.2)
                panel.fill_between(table[:, 0], table[:, 2], table[:, 3], color=color, alpha=0.2, linewidth=0)
        panel.set(title=kind, xlabel="step (with the mask's warm-up and collection)", ylabel="loss")
    _legend(panels[0][0])
    return figure


def mean_and_range(curves: Sequence[Sequence[tuple[int, float]]]) -> np.ndarray:
    """Step, mean, least and largest value over runs, at the steps that all of them have. Shapes: (steps, 4)."""
    found = [dict(curve) for curve in curves]
    steps = sorted(set.intersection(*(set(curve) for curve in found))) if found else []
    table = np.array([[curve[step] for curve in found] for step in steps], float).reshape(len(steps), len(found))
    if not steps:
        return np.empty((0, 4))
    return np.column_stack([steps, table.mean(axis=1), table.min(axis=1), table.max(axis=1)])


def plot_tuning(results: Results) -> Figure:
    """A panel for each setting that was tuned: the lowest validation loss of the trials with each value."""
    settings = tuned_numbers(results)
    figure, panels = _panels(1, len(settings))
    for panel, setting in zip(panels[0], settings, strict=True):
        for variant, color in colors_of(results).items():
            points = lowest_by_value([trial for trial in results.trials if trial.run.variant == variant], setting)
            if points:
                x, y = np.array(points, float).T
                panel.plot(x, y, "o-", color=color, label=variant, markersize=4)
        values = [value for variant in results.study.variants for value in results.study.grid(variant).get(setting, [])]
        panel.set(xlabel=setting, ylabel="validation loss", xscale="log" if min(values) > 0 else "linear")
        _legend(panel)
    return figure


def tuned_numbers(results: Results) -> list[str]:
    """Settings that were tuned over numbers."""
    grids = [results.study.grid(variant) for variant in results.study.variants]
    return list(
        dict.fromkeys(
            name
            for grid in grids
            for name, values in grid.items()
            if all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values)
        )
    )


def lowest_by_value(trials: Sequence[RunResult], setting: str) -> list[tuple[float, float]]:
    """Value of a setting -> the lowest validation loss of the trials that have it, sorted; none that did not end with a loss."""
    lowest: dict[float, float] = {}
    for trial in trials:
        value = trial.run.choice.get(setting)
        if isinstance(value, (int, float)) and math.isfinite(trial.validation_loss):
            lowest[value] = min(lowest.get(value, math.inf), trial.validation_loss)
    return sorted(lowest.items())


def plot_singular_values(changes: Mapping[str, Changes], layers: Sequence[str], colors: Mapping[str, str]) -> Figure:
    """A panel a layer: the singular values of each variant's update, divided by the largest."""
    figure, panels = _panels(1, len(layers))
    for panel, layer in zip(panels[0], layers, strict=True):
        for variant, found in changes.items():
            if layer in found.singular_values:
                values = found.singular_values[layer]
                kept = values[values >= SMALLEST_SHARE]
                panel.plot(np.arange(1, len(kept) + 1), kept, color=colors[variant], label=variant)
        panel.set_title(layer, fontsize="small")
        panel.set(xlabel="number of the singular value", ylabel="share of the largest", yscale="log")
        _legend(panel)
    return figure


def plot_masks(changes: Mapping[str, Changes], layers: Sequence[str], colors: Mapping[str, str]) -> Figure:
    """A row a layer: the mask of each variant as a picture (blocks that hold an entry are dark), and the share of entries in the
    busiest rows and columns.

    Source: after the RoSA paper's figures (arXiv 2401.04679).
    """
    figure, panels = _panels(len(layers), len(changes) + 2, 3.6, 3.6)
    for row, layer in zip(panels, layers, strict=True):
        weight = f"{layer}.weight"
        for panel, (variant, found) in zip(row, changes.items(), strict=False):
            if weight in found.masks:
                mask = found.masks[weight]
                extent = (0, mask.shape[1], mask.shape[0], 0)
                panel.imshow(mask.pooled().numpy(), cmap="Greys", interpolation="nearest", extent=extent)
                empty_rows, empty_columns = mask.empty_shares
                panel.set_xlabel(f"{empty_rows:.0%} of rows, {empty_columns:.0%} of columns empty", fontsize="x-small")
                panel.tick_params(labelsize="x-small")
            panel.set_title(f"{variant}\n{layer}", fontsize="x-small")
        for number, (panel, kind) in enumerate(zip(row[-2:], ("rows", "columns"), strict=True)):
            for variant, found in changes.items():
                if weight in found.masks:
                    shares = cumulated_shares(found.masks[weight].counts[number])
                    panel.plot(
                        np.arange(1, len(shares) + 1) / len(shares), shares, color=colors[variant], label=variant
                    )
            panel.plot([0, 1], [0, 1], color="grey", linewidth=0.5)
            panel.set_title(f"share of entries in the busiest {kind}", fontsize="x-small")
            panel.set(xlabel=f"share of {kind}", xlim=(0, 1), ylim=(0, 1.02))
            panel.legend(fontsize="x-small", loc="lower right")
    return figure


def colors_of(results: Results) -> dict[str, str]:
    """Of each variant, one of its own."""
    count = len(results.study.variants)
    palette = colormaps["tab10" if count <= 10 else "tab20"] if count <= 20 else colormaps["turbo"].resampled(count)
    return {variant: to_hex(palette(number)) for number, variant in enumerate(results.study.variants)}


def _panels(rows: int, columns: int, width: float = 4.8, height: float = 3.8) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def _legend(panel: Axes) -> None:
    """Where there is something to name; beside the panel if it would hide much of it."""
    names = len(panel.get_legend_handles_labels()[0])
    if names > 6:
        panel.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0.0)
    elif names:
        panel.legend(fontsize="small")
