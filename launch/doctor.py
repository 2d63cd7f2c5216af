"""``torchrun --nproc_per_node 8 launch/doctor.py``: what ``rosa-ds doctor`` runs, as the file that launchers take."""

from rosa_ds.commands.doctor import main
from rosa_ds.commands.program import run_program

if __name__ == "__main__":
    run_program(main)
