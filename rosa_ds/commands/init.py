"""Write a folder to start from: ``rosa-ds init FOLDER``.

It gets a DeepSpeed file for each ZeRO stage, recipes, SLURM scripts and a README with the commands that use them.
"""

from __future__ import annotations

import argparse
import logging
import shutil
from pathlib import Path

from rosa_ds.commands.program import run_program

STARTING_POINT = Path(__file__).resolve().parent / "starting_point"
"""In the repository its folders are links to ``ds_configs``, ``launch/recipes`` and ``launch/slurm``; wheels have the files."""
FILES = ("README.md", "ds_configs/*.json", "recipes/*.json", "slurm/*.sbatch")
logger = logging.getLogger("rosa_ds.commands.init")


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="rosa-ds init", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="a new folder, or an empty one")
    folder = parser.parse_args(arguments).folder
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file: give a new folder")
    if folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty: give a new folder, or an empty one")
    for pattern in FILES:
        for source in sorted(STARTING_POINT.glob(pattern)):
            target = folder / source.relative_to(STARTING_POINT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
    logger.info("wrote %s; its README.md has the commands to begin with", folder)


if __name__ == "__main__":
    run_program(main)
