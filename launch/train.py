"""Train an adapter: ``deepspeed launch/train.py --config ds_configs/zero2.json [--name value ...]``; see ``--help``.

Also runs under ``torchrun`` and plain ``python``.
"""

from __future__ import annotations

from rosa_ds import distributed
from rosa_ds.cli import parse_command_line
from rosa_ds.logs import run_program
from rosa_ds.planning.dry_run import dry_run
from rosa_ds.training.run import train


def main(arguments: list[str]) -> None:
    command = parse_command_line(arguments)
    if command.dry_run:
        if distributed.planned_rank() == 0:
            dry_run(command, command.gpus or distributed.planned_world_size())
        return
    try:
        train(command)
    finally:
        distributed.shutdown()


if __name__ == "__main__":
    run_program(main)
