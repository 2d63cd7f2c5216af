"""``python launch/compare.py STUDY.json --output OUT``: what ``rosa-ds compare`` runs, without an installed command."""

from rosa_ds.commands.compare import main
from rosa_ds.commands.program import run_program

if __name__ == "__main__":
    run_program(main)
