"""``python launch/plan.py MODEL --gpus 8``: what ``rosa-ds plan`` runs, without an installed command."""

from rosa_ds.commands.plan import main
from rosa_ds.commands.program import run_program

if __name__ == "__main__":
    run_program(main)
