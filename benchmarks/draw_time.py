"""Time one draw beside the algorithm of ROSA's released code, in one process, in turns.

``python benchmarks/draw_time.py [--shape 2048 2048] [--rank 16]``
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from rosa_ds import distributed
from rosa_ds.adapters.subspace import split_off
from rosa_ds.commands.program import run_program
from rosa_ds.config.schema import DrawSettings
from rosa_ds.utils.generators import keyed_generator

logger = logging.getLogger("rosa_ds.benchmarks.draw_time")


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="draw_time.py", description=__doc__)
    parser.add_argument("--shape", type=int, nargs=2, action="append", help="rows and columns (repeatable)")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args(arguments)
    threads = distributed.use_threads()
    for shape in options.shape or [[2048, 2048], [4096, 1024]]:
        found = measure_draws(tuple(shape), options.rank, options.repeats, ("random", "projection"))
        for name, seconds in found.seconds.items():
            times = f"{found.ratio(name):.1f} times as fast as released"
            logger.info("%d × %d, %d threads, %s: %.3f s, %s", *shape, threads, name, seconds, times)


@dataclasses.dataclass(frozen=True)
class DrawTime:
    """Median seconds by candidate; ``released`` is the peer."""

    shape: tuple[int, int]
    seconds: dict[str, float]

    def ratio(self, candidate: str) -> float:
        """How many times as fast as the released algorithm."""
        return self.seconds["released"] / self.seconds[candidate]


def released_draw(weight: Tensor, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """What the released code does: SVD, a check of the whole product, a window of triplets, the fixed part from all others.

    Returns: factors (N, R) and (R, M), and the fixed part (N, M). Source: marawangamal/rosa, its linear layer's factorisation.
    """
    U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    left = S.reshape(1, -1) * U
    if not torch.allclose(weight, left @ Vh, atol=1e-2):
        raise AssertionError("the released algorithm does not give the weight back")
    start = int(torch.randint(0, S.numel() - rank, (1,), generator=generator))
    chosen = torch.zeros(S.numel(), dtype=torch.bool)
    chosen[start : start + rank] = True
    return left[:, chosen], Vh[chosen], left[:, ~chosen] @ Vh[~chosen]


def measure_draws(shape: tuple[int, int], rank: int, repeats: int, directions: tuple[str, ...]) -> DrawTime:
    """Median times on a random float32 weight; candidates take turns, after one round that does not count."""
    weight = torch.randn(*shape, generator=keyed_generator(0, "draw time", *shape)) / shape[1] ** 0.5

    def ours(settings: DrawSettings) -> Callable[[torch.Generator], object]:
        return lambda generator: split_off(weight, rank, settings, generator, torch.float32)

    candidates: dict[str, Callable[[torch.Generator], object]] = {
        "released": lambda generator: released_draw(weight, rank, generator),
        **{name: ours(DrawSettings(directions=name)) for name in directions},  # type: ignore[arg-type]
    }
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(repeats + 1):
        for name, run in candidates.items():
            begun = time.perf_counter()
            run(keyed_generator(turn, name))
            times[name].append(time.perf_counter() - begun)
    return DrawTime(shape, {name: statistics.median(found[1:]) for name, found in times.items()})


if __name__ == "__main__":
    run_program(main)
