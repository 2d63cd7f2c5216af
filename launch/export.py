"""``python launch/export.py RUN OUT``: what ``rosa-ds export`` runs, without an installed command."""

from rosa_ds.commands.export import main
from rosa_ds.commands.program import run_program

if __name__ == "__main__":
    run_program(main)
