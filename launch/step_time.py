"""Time training steps: ``python launch/step_time.py MODEL --candidate peft-lora --candidate robust [--dtype bfloat16]``.

With ``--config ds_configs/zero3.json`` under ``torchrun`` or ``deepspeed`` every candidate is a DeepSpeed engine.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import torch

from rosa_ds import distributed, zero
from rosa_ds.adapters.mask import load_mask
from rosa_ds.commands.program import run_program
from rosa_ds.config.command_line import parse_command_line
from rosa_ds.config.deepspeed import plan_deepspeed
from rosa_ds.config.schema import ModelSettings, RunConfig
from rosa_ds.evaluation.step_time import OURS, PEERS, QUANTIZED, OperatorTime, StepBench, StepCase

logger = logging.getLogger("rosa_ds.launch.step_time")


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="step_time.py", description=__doc__)
    parser.add_argument("model", help="model folder, hub name, .gguf file or tiny")
    parser.add_argument(
        "--candidate",
        action="append",
        choices=(*OURS, *PEERS, *QUANTIZED),
        help="repeatable; ratios are to the first; default: all on a dense base",
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="default: float32")
    parser.add_argument("--mask", type=Path, help="mask.safetensors of a run; default: from a gradient of the batch")
    parser.add_argument("--config", help="DeepSpeed JSON; its batch sizes do not count")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, help="of the CPU (default: torch's)")
    for name, default in (("rank", 8), ("batch", 4), ("length", 256), ("repeats", 7)):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default: {default}")
    parser.add_argument("--density", type=float, default=0.006, help="default: 0.006")
    parser.add_argument("--profile", action="store_true", help="also: what each operator takes, beside the first's")
    options = parser.parse_args(arguments)
    if min(options.rank, options.batch, options.length - 1, options.repeats) < 1:
        raise ValueError("--rank, --batch and --repeats are 1 or more, --length 2 or more")
    if options.threads:
        torch.set_num_threads(options.threads)
    sizes = {name: getattr(options, name) for name in ("rank", "density", "batch", "length", "repeats")}
    model, plan = ModelSettings(name_or_path=options.model, dtype=options.dtype), None
    if options.config:
        zero.initialize()
        batch = {"train_batch_size": options.batch * distributed.world_size()}
        config = {**parse_command_line(["--config", options.config]).deepspeed, **batch}
        config |= {"train_micro_batch_size_per_gpu": options.batch, "gradient_accumulation_steps": 1}
        plan, _ = plan_deepspeed(config, RunConfig(model=model), distributed.world_size(), gpu_has_bfloat16=False)
    case = StepCase(model, getattr(torch, options.dtype), **sizes, deepspeed=plan)
    names = options.candidate or [PEERS[0], *OURS, PEERS[1]]
    if options.profile and len(set(names)) < 2:
        raise ValueError("--profile compares: give --candidate twice, or not at all for all of them")
    mask = load_mask(options.mask) if options.mask else None
    bench = StepBench(case, names, mask)
    rows = bench.measure()
    logger.info(
        "%s, %s, %d ranks of %d × %d tokens, %d threads each, medians of %d steps in turns, torch %s",
        *(options.model, options.dtype, distributed.world_size(), case.batch, case.length),
        *(torch.get_num_threads(), case.repeats),
        torch.__version__,
    )
    for row in rows:
        logger.info(
            "%-17s %10s trained  forward %.3f s  backward %.3f s  update %.3f s  step %.3f s  ratio %.3f",
            *(row.name, f"{row.trained:,}", row.forward, row.backward, row.update, row.step, row.ratio),
        )
    if options.profile:
        for name, found in bench.profile().items():
            _show(names[0], name, found)


def _show(first: str, name: str, operators: list[OperatorTime]) -> None:
    """Operators whose times differ by a millisecond, the others as one line, so that the columns add up."""
    apart = [row for row in operators if abs(row.other - row.first) >= 1e-3]
    alike = [row for row in operators if abs(row.other - row.first) < 1e-3]
    rest = OperatorTime(f"{len(alike)} others", sum(row.first for row in alike), sum(row.other for row in alike))
    both = OperatorTime("all", sum(row.first for row in operators), sum(row.other for row in operators))
    logger.info("%-50s %12s %17s %10s", "ms a step in the operator itself", first, name, "difference")
    for row in (*apart, rest, both):
        times = (1e3 * row.first, 1e3 * row.other, 1e3 * (row.other - row.first))
        logger.info("%-50s %12.1f %17.1f %+10.1f", row.operator[:50], *times)


if __name__ == "__main__":
    run_program(main)
