"""Export a run: ``rosa-ds export RUN_DIR OUT_DIR [--format merged|peft|adapter] [--dtype bfloat16] [--verify]``."""

from __future__ import annotations

import argparse
import logging
import sys

import torch

from rosa_ds.commands.program import run_program
from rosa_ds.export.merge import export_adapter, export_merged, export_peft
from rosa_ds.export.verify import verify

DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
logger = logging.getLogger("rosa_ds.commands.export")


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="rosa-ds export", description=__doc__)
    parser.add_argument("run", help="run, checkpoint or adapter folder")
    parser.add_argument("out", help="folder to write; an earlier export in it is replaced")
    parser.add_argument("--format", choices=("merged", "peft", "adapter"), default="merged", help="default: merged")
    parser.add_argument(
        "--dtype", choices=tuple(DTYPES), default="auto", help="of the merged weights; auto: each as the base stores it"
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="reload the merged model and compare its logits; exit status 1 if they differ",
    )
    parser.add_argument(
        "--merge-base",
        choices=("dequantized", "original"),
        help="of a quantised base: the weights as training saw them (default), or as they were before",
    )
    parser.add_argument("--rank", type=int, help="with --format peft, of the LoRA that stands for a subspace run")
    options = parser.parse_args(arguments)
    if options.format != "merged" and (options.verify or options.dtype != "auto" or options.merge_base):
        raise ValueError(
            "--verify, --dtype and --merge-base belong to --format merged: an adapter's numbers are float32 as they are"
        )
    if options.format != "peft" and options.rank is not None:
        raise ValueError("--rank belongs to --format peft")
    if options.rank is not None and options.rank < 1:
        raise ValueError(f"--rank is 1 or more, given {options.rank}")
    if options.format == "adapter":
        logger.info("wrote %s", export_adapter(options.run, options.out))
        return
    if options.format == "peft":
        logger.info("wrote %s", export_peft(options.run, options.out, options.rank))
        return
    logger.info("wrote %s", export_merged(options.run, options.out, DTYPES[options.dtype], options.merge_base))
    if options.verify:
        result = verify(options.run, options.out, options.merge_base or "dequantized")
        logger.info("verification %s", result)
        if not result.passed:
            sys.exit(1)


if __name__ == "__main__":
    run_program(main)
