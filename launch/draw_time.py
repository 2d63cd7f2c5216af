"""Time one draw beside ROSA's released algorithm: ``python launch/draw_time.py [--shape 2048 2048] [--rank 16]``."""

from __future__ import annotations

import argparse
import logging

from rosa_ds import distributed
from rosa_ds.commands.program import run_program
from rosa_ds.evaluation.draw_time import measure_draws

logger = logging.getLogger("rosa_ds.launch.draw_time")


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


if __name__ == "__main__":
    run_program(main)
