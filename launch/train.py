"""``deepspeed launch/train.py --config ds_configs/zero2.json``: what ``rosa-ds train`` runs, as the file that launchers take."""

from rosa_ds.commands.program import run_program
from rosa_ds.commands.train import main

if __name__ == "__main__":
    run_program(main)
