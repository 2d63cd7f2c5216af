"""Train an adapter, or the whole model: ``rosa-ds train --config ds_configs/zero2.json [--name value ...]``; see ``--help``.

On several GPUs ``deepspeed --module rosa_ds.commands.train ...`` or ``torchrun --nproc_per_node N -m rosa_ds.commands.train ...``.
"""

from __future__ import annotations

from rosa_ds.commands.program import run_program
from rosa_ds.config.command_line import parse_command_line


def main(arguments: list[str]) -> None:
    command = parse_command_line(arguments)  # --help and wrong settings do not wait for torch
    from rosa_ds import distributed

    if command.dry_run:
        if distributed.planned_rank() == 0:
            from rosa_ds.planning.dry_run import dry_run

            dry_run(command, command.gpus or distributed.planned_world_size())
        return
    distributed.leave_hub_to_first_rank()
    from rosa_ds.training.run import train

    train(command)


if __name__ == "__main__":
    run_program(main)
