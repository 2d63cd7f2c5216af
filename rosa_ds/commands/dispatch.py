"""``rosa-ds COMMAND ...``: the console script, also ``python -m rosa_ds COMMAND ...``.

Launchers start a command as a module: ``deepspeed --module rosa_ds.commands.train ...``, ``torchrun -m rosa_ds.commands.train ...``.
"""

from __future__ import annotations

import importlib
import sys
from typing import NoReturn

import rosa_ds
from rosa_ds.commands.program import run_program
from rosa_ds.utils.suggest import did_you_mean

COMMANDS = {
    "init": "write a folder to start from: configs, recipes, SLURM scripts",
    "prepare": "tokenise the data of a run, before it is trained",
    "train": "train adapters, or the whole model",
    "eval": "measure a run or a model on rows of your own, or on lm-eval's tasks",
    "export": "merge a run's adapter into its base, or write it as a PEFT folder",
    "plan": "find what fits N GPUs, before anything runs",
    "doctor": "examine this machine, or say what an exit status means",
    "compare": "run a study of several methods and report it",
}
"""Name -> its line of ``--help``; each is the module of that name in this folder."""
USAGE = "usage: rosa-ds COMMAND ...\n\n{}\n\nrosa-ds COMMAND --help says what a command takes.\n"


def main() -> NoReturn:
    """Run the command that the command line names, and end the process with its exit status."""
    run_program(dispatch)


def dispatch(arguments: list[str]) -> None:
    """Run ``arguments[0]`` with the others. Raises: ValueError where there is no such command."""
    name, *rest = arguments or [""]
    if name in ("-h", "--help"):
        width = max(map(len, COMMANDS))
        sys.stdout.write(USAGE.format("\n".join(f"  {command:{width}}  {line}" for command, line in COMMANDS.items())))
    elif name == "--version":
        sys.stdout.write(f"rosa-ds {rosa_ds.__version__}\n")
    elif name in COMMANDS:
        importlib.import_module(f"rosa_ds.commands.{name}").main(rest)
    else:
        said = f"unknown command {name!r}.{did_you_mean(name, COMMANDS)} Give" if name else "give a command:"
        raise ValueError(f"{said} one of {', '.join(COMMANDS)}; rosa-ds --help says what each does")
