"""The ROSA paper's synthetic regression: ``python launch/regression.py OUT_DIR [--layers 1 2] [--epochs 500]``.

Writes regression.json and regression.png, and prints what LoRA could reach at best, what was reached, and how many draws
it takes to recover the update.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import torch

from rosa_ds.commands.program import run_program
from rosa_ds.evaluation.regression import Training, draws_to_recover, make_task, plot, train
from rosa_ds.utils.files import write_json

logger = logging.getLogger("rosa_ds.launch.regression")
EPOCHS = {1: 500, 2: 1000}


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


if __name__ == "__main__":
    run_program(main)
