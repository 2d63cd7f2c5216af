"""The synthetic regression of the ROSA paper: can an adapter reach an update of higher rank than its own?

``python benchmarks/regression.py OUT_DIR [--layers 1 2] [--epochs 500]`` writes regression.json and regression.png, and prints
what LoRA could reach at best, what was reached, and how many draws it takes to recover the update.

The target is the base plus a random product of rank 24, a linear map of 512 features to 32 or a network of two layers
with 64 hidden units; labels have noise, so that the level that full fine-tuning reaches is a number to compare with.

Source: ROSA, arXiv 2407.07802, section on synthetic data (which has no noise).
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import itertools
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import rosa_ds
from rosa_ds.adapters.subspace import split_off
from rosa_ds.commands.program import run_program
from rosa_ds.config.schema import AdapterConfig, Directions, DrawSettings
from rosa_ds.utils.files import write_json
from rosa_ds.utils.generators import keyed_generator

logger = logging.getLogger("rosa_ds.benchmarks.regression")
EPOCHS = {1: 500, 2: 1000}
FEATURES, HIDDEN, OUTPUTS, RANK = 512, 64, 32, 24


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="regression.py", description=__doc__)
    parser.add_argument("out", type=Path, help="folder for regression.json and regression.png")
    parser.add_argument("--layers", type=int, nargs="+", choices=(1, 2), default=[1, 2])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 6, 8, 24])
    parser.add_argument("--epochs", type=int, help="500 for one layer and 1000 for two where not given")
    parser.add_argument("--draws", type=int, default=24)
    parser.add_argument("--directions", nargs="+", default=["random", "window", "top", "bottom", "projection"])
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # faster at this size
    content: dict[str, dict[str, object]] = {"draws_to_recover": {}}
    for rank in options.ranks:
        found = {directions: draws_to_recover(directions, rank) for directions in options.directions}
        content["draws_to_recover"][str(rank)] = found
        logger.info("rank %d, at least %d draws: %s", rank, -(-24 // rank), found)
    curves: dict[str, dict[str, list[float]]] = {}
    bounds: dict[str, dict[str, float]] = {}
    for layers in options.layers:
        task, name = make_task(layers), "linear map" if layers == 1 else "two layers"
        epochs = options.epochs or EPOCHS[layers]
        runs = {"full": Training("full", epochs=epochs)}
        for rank in options.ranks:
            for method in ("lora", "subspace") if rank < 24 else ("lora",):
                runs[f"{method} {rank}"] = Training(method, rank, epochs, options.draws)
        bounds[name] = {f"lora {rank}": task.bounds[rank] for rank in options.ranks if task.bounds}
        curves[name] = {}
        for label, training in runs.items():
            curves[name][label] = train(task, training)
            reached, full = curves[name][label][-1], curves[name]["full"][-1]
            bound = f", bound of its rank {bounds[name][label]:.5f}" if label in bounds[name] else ""
            logger.info("%s, %s: %.5f, %.3f of full%s", name, label, reached, reached / full, bound)
        content[name] = {"curves": curves[name], "bounds": bounds[name]}
        write_json(options.out / "regression.json", content)
    plot(curves, bounds, options.out / "regression.png")
    logger.info("wrote %s", options.out)


@dataclasses.dataclass(frozen=True)
class Task:
    """A base, and examples of what it should have been.

    Attributes:
        bounds: adapter rank -> the least expected validation loss of the linear map plus an update of that rank; none for
            the network.
    """

    base: nn.Sequential
    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    bounds: dict[int, float]


def _network(layers: int, generator: torch.Generator) -> nn.Sequential:
    sizes = (FEATURES, OUTPUTS) if layers == 1 else (FEATURES, HIDDEN, OUTPUTS)
    modules: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(sizes):
        linear = nn.Linear(inputs, outputs, bias=False)
        with torch.no_grad():
            linear.weight.copy_(torch.randn(outputs, inputs, generator=generator) / inputs**0.5)
        modules += [linear, nn.ReLU()]
    return nn.Sequential(*modules[:-1])


@torch.no_grad()
def make_task(layers: int, seed: int = 0, noise: float = 0.1) -> Task:
    """5,000 examples to train on and 1,000 to validate, inputs standard normal.

    Args:
        layers: 1 or 2.
        noise: standard deviation of what is added to the labels, whose own is about 1.4.
    """
    generator = keyed_generator(seed, "regression", layers)
    base = _network(layers, generator)
    target = copy.deepcopy(base)
    updates = []
    for module in target:
        if isinstance(module, nn.Linear):
            outputs, inputs = module.weight.shape
            rank = min(RANK, outputs)
            left, right = (torch.randn(size, rank, generator=generator) for size in (outputs, inputs))
            updates.append(left @ right.T / (inputs * rank) ** 0.5)
            module.weight += updates[-1]
    x = torch.randn(6000, FEATURES, generator=generator)
    y = target(x)
    y += noise * torch.randn(y.shape, generator=generator)
    tail = torch.linalg.svdvals(updates[0].double()).square()
    bounds = {rank: noise**2 + float(tail[rank:].sum()) / OUTPUTS for rank in range(RANK + 1)} if layers == 1 else {}
    return Task(base, (x[:5000], y[:5000]), (x[5000:], y[5000:]), bounds)


@dataclasses.dataclass(frozen=True)
class Training:
    """How one adapter is trained, the learning rate falling linearly to 0. ``draws``: after the first, evenly over the run."""

    method: str
    rank: int = 0
    epochs: int = 500
    draws: int = 24
    warmup_epochs: int = 4
    batch_size: int = 64
    learning_rate: float = 1e-3
    draw: DrawSettings = dataclasses.field(default_factory=DrawSettings)


def _epochs_of_draws(training: Training) -> frozenset[int]:
    """Draws come after ``warmup_epochs``, and leave the last piece as long as the others."""
    length = (training.epochs - training.warmup_epochs) / (training.draws + 1)
    return frozenset(training.warmup_epochs + round(length * number) for number in range(1, training.draws + 1))


def _optimizer(model: nn.Module, training: Training) -> torch.optim.Optimizer:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, lr=training.learning_rate, weight_decay=0.0)


def train(task: Task, training: Training, seed: int = 0) -> list[float]:
    """Mean squared validation error after each epoch, by the adapters and draws of :mod:`rosa_ds` itself."""
    model = copy.deepcopy(task.base)
    if training.method != "full":
        config = AdapterConfig(
            method=training.method,
            rank=training.rank,
            alpha=float(training.rank),
            dropout=0.0,
        )
        rosa_ds.inject(model, config, seed=seed, draw=training.draw)
    optimizer, curve = _optimizer(model, training), []
    x, y = task.train
    steps = len(x) // training.batch_size
    draws = _epochs_of_draws(training) if training.method == "subspace" else frozenset()
    generator, number = keyed_generator(seed, "batches"), 0
    for epoch in range(training.epochs):
        if epoch in draws:
            number += 1
            chosen = training.draw
            rosa_ds.draw(model, chosen.directions, chosen.sigma, chosen.factorization, seed, number)
            optimizer = _optimizer(model, training)  # everything that is trained was replaced
        for step, rows in enumerate(torch.randperm(len(x), generator=generator).split(training.batch_size)[:steps]):
            for group in optimizer.param_groups:
                group["lr"] = training.learning_rate * (1 - (epoch * steps + step) / (training.epochs * steps))
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x[rows]), y[rows]).backward()
            optimizer.step()
        with torch.no_grad():
            curve.append(float(nn.functional.mse_loss(model(task.validation[0]), task.validation[1])))
    return curve


def _recover(settings: DrawSettings, rank: int, base: Tensor, target: Tensor, seed: int) -> Iterator[float]:
    """Relative error of the map after each draw, each trained to convergence.

    With inputs of unit covariance the best factors are known: the truncated SVD of what the fixed part leaves.
    """
    weight = base.clone()
    number = 0
    while True:
        generator = keyed_generator(seed, "recover", rank, number)
        fixed = split_off(weight, rank, settings, generator, torch.float64).rest
        U, S, Vh = torch.linalg.svd(target - fixed, full_matrices=False)
        weight = fixed + U[:, :rank] * S[:rank] @ Vh[:rank]
        number += 1
        yield float((weight - target).norm() / (base - target).norm())


def draws_to_recover(
    directions: Directions, rank: int, error: float = 1e-3, limit: int = 500, seed: int = 0
) -> int | None:
    """How many draws, each trained to convergence, until the update of rank 24 is found to a relative error.

    Returns: ``None`` if ``limit`` are not enough.
    """
    task = make_task(1, seed, noise=0.0)
    base = task.base[0].weight.detach().double()  # type: ignore[operator]
    x, y = (tensor.double() for tensor in task.train)
    target = torch.linalg.lstsq(x, y).solution.T
    errors = _recover(DrawSettings(directions=directions), rank, base, target, seed)
    return next(
        (number for number, found in enumerate(itertools.islice(errors, limit), start=1) if found <= error), None
    )


def plot(curves: dict[str, dict[str, list[float]]], bounds: dict[str, dict[str, float]], path: Any) -> None:
    """One panel a task: validation loss against epochs, and the bounds of LoRA's ranks. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(curves), figsize=(7 * len(curves), 5), squeeze=False)
    style = {"lora": "--", "subspace": "-", "full": ":"}
    for panel, (task, lines) in zip(panels[0], curves.items(), strict=True):
        ranks = sorted({name.partition(" ")[2] for name in lines})
        for name, curve in lines.items():
            method, _, rank = name.partition(" ")
            color = "black" if method == "full" else f"C{ranks.index(rank)}"
            panel.plot(range(1, len(curve) + 1), curve, style[method], color=color, label=name)
        for name, bound in bounds.get(task, {}).items():
            panel.axhline(bound, color=f"C{ranks.index(name.partition(' ')[2])}", linewidth=0.5)
        panel.set(title=task, xlabel="epoch", ylabel="validation loss", yscale="log")
        panel.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    run_program(main)
