"""What fits before anything runs: ``rosa-ds plan MODEL --gpus 8 --gpu-memory 80 [--rank R] [settings of rosa-ds train]``.

Searches ZeRO stage, micro-batch and checkpointing for a model of which only the config is read, prints what a GPU holds,
and the command to run.
"""

from __future__ import annotations

import argparse
import logging
import shlex
from pathlib import Path

from rosa_ds.commands.program import run_program
from rosa_ds.config.command_line import parse_command_line
from rosa_ds.planning.search import GIB, Machine, Planner, best
from rosa_ds.planning.tables import choice_table, explain, term_table

logger = logging.getLogger("rosa_ds.commands.plan")


def _parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(prog="rosa-ds plan", description=__doc__, allow_abbrev=False)
    parser.add_argument("model", nargs="?", help="folder (config.json suffices), hub name, .gguf file or tiny")
    parser.add_argument("--gpus", type=int, default=8, help="default: 8")
    parser.add_argument("--gpu-memory", type=float, default=80, help="GB of one (10^9 bytes); default: 80")
    parser.add_argument("--reserve", type=float, default=4, help="GiB of it for CUDA, NCCL, fragments; default: 4")
    parser.add_argument("--length", type=int, help="tokens of a row; default: data.max_length")
    parser.add_argument("--batch", type=int, help="rows of an optimizer step on all GPUs; default: 8 a GPU")
    parser.add_argument("--stage", type=int, choices=(0, 1, 2, 3), help="default: all are tried")
    parser.add_argument("--rank", help="short for --adapter.rank")
    parser.add_argument("--density", help="short for --adapter.density")
    parser.add_argument("--tflops", type=float, default=300, help="that a GPU reaches; default: 300")
    parser.add_argument("--bandwidth", type=float, default=50, help="GB/s that a GPU sends; default: 50")
    options, rest = parser.parse_known_args(arguments)
    for name in ("rank", "density"):
        if getattr(options, name) is not None:
            rest += [f"--adapter.{name}", getattr(options, name)]
    if options.model is None:
        raise ValueError("give a model: a folder (config.json suffices), a hub name, a .gguf file or tiny")
    if min(options.gpus, options.gpu_memory, options.tflops, options.bandwidth) <= 0:
        raise ValueError("--gpus, --gpu-memory, --tflops and --bandwidth are above 0")
    if options.length is not None and options.length < 2:
        raise ValueError(f"--length is 2 or more, given {options.length}")
    if options.batch is not None and options.batch < 1:
        raise ValueError(f"--batch is 1 or more, given {options.batch}")
    return options, rest


def main(arguments: list[str]) -> None:
    options, rest = _parse(arguments)
    machine = Machine(
        options.gpus,
        options.gpu_memory * 1e9,
        options.reserve * GIB,
        options.tflops * 1e12,
        options.bandwidth * 1e9,
    )
    command = parse_command_line([*rest, "--model.name_or_path", options.model])
    settings = command.config
    length, batch = options.length or settings.data.max_length, options.batch or 8 * options.gpus
    if batch % options.gpus:
        raise ValueError(f"--batch {batch} rows cannot be shared by {options.gpus} GPUs: give a multiple")
    planner = Planner(settings, command.deepspeed)
    logger.info("%s, %s: %s", options.model, str(planner.dtype).removeprefix("torch."), planner.report)
    stages = (0, 1, 2, 3) if options.stage is None else (options.stage,)
    choices = list(planner.search(machine, length, batch, stages))
    logger.info("a step of %d rows of %d tokens on %d GPUs:\n%s", batch, length, options.gpus, choice_table(choices))
    chosen = best(choices)
    if chosen is None:
        least = min(choices, key=lambda choice: choice.peak)
        logger.info("the least, by term:\n%s", term_table(planner, machine, least, length))
        raise ValueError(explain(planner, machine, least))
    logger.info("the shortest step, by term:\n%s", term_table(planner, machine, chosen, length))
    several, config = options.gpus > 8, Path(f"ds_configs/zero{chosen.stage}.json")
    hint = "" if "--config" in rest or config.is_file() else f" (rosa-ds init FOLDER writes {config})"
    words = [
        *(("deepspeed", "--hostfile", "HOSTFILE") if several else ("deepspeed", "--num_gpus", str(options.gpus))),
        *("--module", "rosa_ds.commands.train"),
        *(() if "--config" in rest else ("--config", str(config))),
        *("--model.name_or_path", options.model, *rest),
        *("--ds.zero_optimization.stage", str(chosen.stage)),
        *("--ds.train_batch_size", str(batch), "--ds.train_micro_batch_size_per_gpu", str(chosen.micro_batch)),
        *("--data.max_length", str(length)),
        *(("--training.gradient_checkpointing", "true") if chosen.checkpointing else ()),
    ]
    logger.info("to run it%s:\n%s", hint, shlex.join(words))


if __name__ == "__main__":
    run_program(main)
