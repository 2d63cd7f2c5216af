"""Examine this machine, and the ranks if there are several: ``rosa-ds doctor [--output runs]``.

Several ranks: ``torchrun --nproc_per_node N -m rosa_ds.commands.doctor``. Every finding says what to do where something is to
be done. Works with one process and no GPU, too. ``--gpu OUT`` measures a GPU instead: kernels, steps, memory, bits; at most ten
minutes, and ``OUT/report.txt`` has it all.
"""

from __future__ import annotations

import argparse
import logging
import socket
from pathlib import Path

from rosa_ds import distributed, zero
from rosa_ds.commands.program import run_program
from rosa_ds.planning.doctor import examine, examine_ranks
from rosa_ds.planning.gpu_check.runner import check, choose_stages
from rosa_ds.training.failures import explain_status

logger = logging.getLogger("rosa_ds.commands.doctor")


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="rosa-ds doctor", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("runs"), help="folder of runs; default: runs")
    parser.add_argument("--megabytes", type=int, default=64, help="of the timed collectives; default: 64")
    parser.add_argument("--timeout-minutes", type=float, default=5, help="of a collective; default: 5")
    parser.add_argument(
        "--status", type=int, help="only say what this exit status of a rank means, as its launcher gave it"
    )
    parser.add_argument(
        "--gpu", type=Path, metavar="OUT", help="measure the GPU in at most ten minutes; a folder for what is found"
    )
    parser.add_argument("--stages", help="of --gpu, separated by commas; default: all")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.stages is not None and options.gpu is None:
        raise ValueError("--stages chooses stages of --gpu OUT: give both, or neither")
    if options.status is not None:
        logger.info("exit status %d: %s", options.status, explain_status(options.status))
        return
    if options.gpu is not None:
        check(options.gpu, choose_stages(options.stages))
        return
    if options.megabytes < 1 or options.timeout_minutes <= 0:
        raise ValueError("--megabytes is 1 or more, --timeout-minutes above 0")
    zero.initialize(options.timeout_minutes)
    with distributed.together():
        mine = (socket.gethostname(), examine(options.output))
    by_host = dict(reversed(distributed.gather_objects(mine)))  # of each host its first rank's
    by_host["all ranks"] = examine_ranks(options.megabytes * 10**6)
    for host, found in by_host.items():
        logger.info("%s\n%s", host, "\n".join(map(str, found)))
    todo = sum(bool(finding.advice) for found in by_host.values() for finding in found)
    logger.info("%d findings with something to do (→)", todo)


if __name__ == "__main__":
    run_program(main)
