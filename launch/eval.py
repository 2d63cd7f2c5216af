"""``torchrun --nproc_per_node 8 launch/eval.py RUN --data FILE``: what ``rosa-ds eval`` runs, as the file that launchers take."""

from rosa_ds.commands.eval import main
from rosa_ds.commands.program import run_program

if __name__ == "__main__":
    run_program(main)
