"""Several training runs in one process, or in each of several ranks: ``classifier_runs.py COMMANDS.json``, a list of command lines."""

from __future__ import annotations

import json
from pathlib import Path

from rosa_ds import distributed
from rosa_ds.commands.program import run_program
from rosa_ds.config.command_line import parse_command_line
from rosa_ds.planning.dry_run import dry_run
from rosa_ds.training.run import train


def main(arguments: list[str]) -> None:
    try:
        for words in json.loads(Path(arguments[0]).read_text()):
            command = parse_command_line(words)
            if command.dry_run:
                dry_run(command, command.gpus or 1)
            else:
                train(command)
    finally:
        distributed.shutdown()


if __name__ == "__main__":
    run_program(main)
