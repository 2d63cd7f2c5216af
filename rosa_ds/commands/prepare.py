"""Tokenise the data of a run before it is trained: ``rosa-ds prepare --config FILE [--name value ...]``.

It takes what ``rosa-ds train`` takes. No weights are read and no GPU is used; data.workers processes work, by default one for
each core. Training with the same tokenizer and the same settings of data finds the result in HF_DATASETS_CACHE, on any number
of ranks.
"""

from __future__ import annotations

import logging
import sys

from rosa_ds.commands.program import run_program
from rosa_ds.config.command_line import parse_command_line

logger = logging.getLogger("rosa_ds.commands.prepare")


def main(arguments: list[str]) -> None:
    if {"-h", "--help"} & set(arguments):
        sys.stdout.write(f"{__doc__}\n")
    settings = parse_command_line(arguments).config  # --help and wrong settings do not wait for torch
    import datasets

    from rosa_ds.models.load import load_tokenizer
    from rosa_ds.training.task import prepare_data
    from rosa_ds.utils.logs import begin_log

    begin_log()
    prepare_data(settings, load_tokenizer(settings.model, settings.data))
    logger.info("kept for training in %s", datasets.config.HF_DATASETS_CACHE)


if __name__ == "__main__":
    run_program(main)
